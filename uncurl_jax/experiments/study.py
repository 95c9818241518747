"""What a study consists of: its settings and the list of models to evaluate. No JAX, no files."""

from __future__ import annotations

import dataclasses
from typing import Any

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.errors import InputError

PRUNED, UNPRUNED, SCRATCH = "pruned", "unpruned", "scratch"


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How far can experts be pruned for some tasks? The settings of the whole comparison.

    For each task and seed: the source model fine-tuned, the source pruned by each method to each
    smaller count (calibrate, plan, prune, router-only warm-up, fine-tune), and a model of each
    smaller count trained from scratch and fine-tuned; all evaluated on the validation split.

    Attributes:
      title: heading of the report.
      model: the architecture; entries of num_experts that are not 0 get each count in turn.
      pretrain, warmup, finetune: the stages. Pretraining keeps its own seed; the seeds of the
        study are those of pruning, warm-up and fine-tuning.
      corpus: pretraining task, a registered name or a LanguageModelingTask.
      tasks: tasks to prune for, registered names or JsonlTasks.
      source_num_experts: Z, the counts to prune from.
      target_num_experts: D, the counts to prune to, wherever below Z.
      methods: see `uncurl_jax.pruning.methods`.
      routers: router treatments, see `uncurl_jax.pruning.router`.
      layer_methods: methods of the MoE layers in order, for the method "composite".
      seeds: one run of everything but pretraining for each.
      prunes_finetuned: whether what is pruned is the unpruned model after fine-tuning on the task,
        as someone who has such a checkpoint would do, and not the pretrained one as in the paper.
      has_zero_shot: whether every model is also evaluated before it is trained on the task (a
        pruned one right after the prune).
      has_scratch: whether models of the target counts are trained from scratch.
      affinity, alignment, gate_compensation: see `uncurl_jax.pruning.plan.make_plan`.
      vocabulary: spec, see `uncurl_jax.data.vocabulary.load_vocabulary`.
      max_length: tokens per row in the caches, at most the model's.
      calibration_batch_size: rows.
      calibration_max_batches: None calibrates on the whole training split.
      sample_tokens: tokens that router "fit" is fitted on.
      examples_per_batch: in evaluation.
      is_length_normalized: in rank classification.
      is_dropless_evaluation: evaluate without capacity limit, whatever the model says.
      keep_checkpoints: False removes a run's pruned, warmed-up and fine-tuned checkpoints once it
        is evaluated; plans, metrics and pretrained models stay.
    """

    title: str
    model: ModelConfig
    pretrain: TrainConfig
    warmup: TrainConfig
    finetune: TrainConfig
    corpus: Any
    tasks: tuple[Any, ...]
    source_num_experts: tuple[int, ...]
    target_num_experts: tuple[int, ...]
    methods: tuple[str, ...] = ("uncurl", "frequency")
    routers: tuple[str, ...] = ("reference",)
    layer_methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    prunes_finetuned: bool = False
    has_zero_shot: bool = False
    has_scratch: bool = True
    affinity: str = "cosine"
    alignment: str | None = None
    gate_compensation: bool = False
    vocabulary: str = "bytes"
    max_length: int | None = None
    calibration_batch_size: int = 32
    calibration_max_batches: int | None = None
    sample_tokens: int = 4096
    examples_per_batch: int = 16
    is_length_normalized: bool = False
    is_dropless_evaluation: bool = False
    keep_checkpoints: bool = True

    def __post_init__(self):
        for name in ("tasks", "source_num_experts", "methods", "routers", "seeds"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values:
                raise InputError(f"{name} must name at least one, got none.")
            if len(set(map(str, values))) < len(values):
                raise InputError(f"{name} must not repeat, got {values}: remove the doubles.")
        object.__setattr__(self, "target_num_experts", tuple(self.target_num_experts))
        if self.layer_methods is not None:
            object.__setattr__(self, "layer_methods", tuple(self.layer_methods))
        largest = max(self.source_num_experts)
        for count in self.target_num_experts:
            if not self.model.num_selected_experts <= count < largest:
                raise InputError(
                    f"target_num_experts must be at least top-k={self.model.num_selected_experts} "
                    f"and below the largest source count {largest}, got {count}: choose others."
                )
        if not self.model.moe_layers:
            raise InputError("A study needs a model with MoE layers, got a dense one.")
        if self.warmup.trainable != "router":
            raise InputError(
                f'warmup.trainable must be "router", got {self.warmup.trainable!r}: set it so.'
            )
        for name in ("warmup", "finetune"):
            if getattr(self, name).model is not None:
                raise InputError(
                    f"{name}.model must be left out, the stage goes on from a checkpoint: unset it."
                )

    @property
    def row_length(self) -> int:
        """Tokens per row in the caches."""
        return min(self.max_length or self.model.max_length, self.model.max_length)


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """One model to evaluate.

    Attributes:
      kind: PRUNED, UNPRUNED or SCRATCH.
      source_num_experts: Z; None from scratch.
      num_experts: experts per MoE layer when it is evaluated.
      method, router: None unless pruned.
      task: name.
      seed: of everything after pretraining.
    """

    kind: str
    source_num_experts: int | None
    num_experts: int
    method: str | None
    router: str | None
    task: str
    seed: int

    @property
    def pretrained_num_experts(self) -> int:
        """Experts of the pretrained model that it begins with."""
        return self.source_num_experts or self.num_experts

    @property
    def run(self) -> str:
        """A name that is unique in the study and fit for a directory."""
        if self.kind == PRUNED:
            head = f"{self.source_num_experts}to{self.num_experts}-{self.method}-{self.router}"
        else:
            head = f"{self.num_experts}-{self.kind}"
        return f"{head}-{self.task}-seed{self.seed}"


def task_name(task: Any) -> str:
    """Name of a task that is given by name or as an object."""
    return task if isinstance(task, str) else task.name


def work_items(config: StudyConfig) -> list[WorkItem]:
    """Lists the models of a study, those that share a pretrained model side by side."""
    names = [task_name(task) for task in config.tasks]
    items: list[WorkItem] = []
    for source in config.source_num_experts:
        for task in names:
            for seed in config.seeds:
                items.append(WorkItem(UNPRUNED, source, source, None, None, task, seed))
                items.extend(
                    WorkItem(PRUNED, source, target, method, router, task, seed)
                    for target in config.target_num_experts
                    if target < source
                    for method in config.methods
                    for router in config.routers
                )
    if config.has_scratch:
        # A count that is also a source is there already, as the unpruned model of that size.
        items.extend(
            WorkItem(SCRATCH, None, target, None, None, task, seed)
            for target in config.target_num_experts
            if target not in config.source_num_experts
            for task in names
            for seed in config.seeds
        )
    return items


def shard(items: list[WorkItem], index: int, count: int) -> list[WorkItem]:
    """Returns part `index` of `count` contiguous parts, so that parts share few stages.

    Raises:
      InputError: If not 0 <= index < count.
    """
    if not 0 <= index < count:
        raise InputError(f"--shard i/n must have 0 <= i < n, got {index}/{count}.")
    return items[index * len(items) // count : (index + 1) * len(items) // count]
