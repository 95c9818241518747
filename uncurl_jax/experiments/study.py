"""What a study consists of: its settings and the list of models to evaluate. No JAX, no files."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.mixtures import MixtureConfig
from uncurl_jax.errors import InputError

PRUNED, UNPRUNED, SCRATCH = "pruned", "unpruned", "scratch"
DURING_PRETRAINING = "during_pretraining"
"""Name that models pruned during pretraining have in place of a method."""


@dataclasses.dataclass(frozen=True)
class FinetuneGrid:
    """Settings of fine-tuning to choose from, for every kind of model alike.

    Every combination is fine-tuned with a seed of its own; the one with the best validation score
    is what all seeds of that model, task and size are fine-tuned with.

    Attributes:
      learning_rates: peaks; () keeps that of the stage.
      num_steps: lengths; () keeps that of the stage.
      seed: of the trials; not one of the study's, whose scores would then be chosen ones.
    """

    learning_rates: tuple[float, ...] = ()
    num_steps: tuple[int, ...] = ()
    seed: int = 1000

    def __post_init__(self):
        object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
        object.__setattr__(self, "num_steps", tuple(self.num_steps))

    def points(self, stage: TrainConfig) -> list[TrainConfig]:
        """Returns the stage with each combination."""
        return [
            dataclasses.replace(
                stage,
                num_steps=steps,
                optimizer=dataclasses.replace(stage.optimizer, peak_learning_rate=rate),
            )
            for rate in self.learning_rates or (stage.optimizer.peak_learning_rate,)
            for steps in self.num_steps or (stage.num_steps,)
        ]


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How far can experts be pruned for some tasks? The settings of the whole comparison.

    For each task and seed: the source model fine-tuned, the source pruned by each method to each
    smaller count (calibrate, plan, prune, router-only warm-up, fine-tune), and a model of each
    smaller count trained from scratch and fine-tuned; all evaluated on the validation split. With
    `prefinetune` every one of them is trained on the mixture before it is fine-tuned, with the same
    budget (arXiv 2409.01483, Figure 3).

    Attributes:
      title: heading of the report.
      model: the architecture; entries of num_experts that are not 0 get each count in turn.
      pretrain, warmup, finetune: the stages. Pretraining keeps its own seed; the seeds of the
        study are those of pruning, warm-up and fine-tuning. `pretrain` and `corpus` are None if a
        `checkpoint` is given.
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
      prefinetune: a stage on the mixture between warm-up and fine-tuning; None leaves it out.
      mixture: what `prefinetune` trains on. Tasks of the study are left out of it, by name and by
        text.
      finetune_grid: settings of fine-tuning to choose from; None takes `finetune` as it is.
      finetune_epochs: length of fine-tuning in epochs of each task's training rows, in place of
        finetune.num_steps; None takes the steps.
      pretraining_prunes: fractions of pretraining after which a source model is pruned with UNCURL
        on the pretraining text and goes on, to each target in equal ratios; () leaves it out. It
        takes the first of `routers`, and is compared as the method "during_pretraining".
      checkpoint: what to prune in place of pretrained models; source_num_experts is its count.
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
    pretrain: TrainConfig | None
    warmup: TrainConfig
    finetune: TrainConfig
    corpus: Any | None
    tasks: tuple[Any, ...]
    source_num_experts: tuple[int, ...]
    target_num_experts: tuple[int, ...]
    methods: tuple[str, ...] = ("uncurl", "frequency")
    routers: tuple[str, ...] = ("reference",)
    layer_methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    prunes_finetuned: bool = False
    has_zero_shot: bool = False
    prefinetune: TrainConfig | None = None
    mixture: MixtureConfig | None = None
    finetune_grid: FinetuneGrid | None = None
    finetune_epochs: float | None = None
    pretraining_prunes: tuple[float, ...] = ()
    checkpoint: str | None = None
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
        self._check_sources()
        for name in ("warmup", "finetune", "prefinetune"):
            if getattr(self, name) is not None and getattr(self, name).model is not None:
                raise InputError(
                    f"{name}.model must be left out, the stage goes on from a checkpoint: unset it."
                )

    def _check_sources(self) -> None:
        object.__setattr__(self, "pretraining_prunes", tuple(self.pretraining_prunes))
        if (self.prefinetune is None) != (self.mixture is None):
            raise InputError(
                "prefinetune and mixture belong together, got one of them: give both or neither."
            )
        fractions = (0.0, *self.pretraining_prunes, 1.0)
        if any(a >= b for a, b in itertools.pairwise(fractions)):
            raise InputError(
                "pretraining_prunes must be fractions of pretraining in ascending order, above 0 "
                f"and below 1, got {self.pretraining_prunes}."
            )
        if self.finetune_grid is not None and self.finetune_grid.seed in self.seeds:
            raise InputError(
                f"finetune_grid.seed must not be one of the study's seeds {self.seeds}, got "
                f"{self.finetune_grid.seed}: it would be judged by the scores it was chosen by."
            )
        if self.finetune_epochs is not None and (
            self.finetune_epochs <= 0 or (self.finetune_grid and self.finetune_grid.num_steps)
        ):
            raise InputError(
                "finetune_epochs must be positive, and not with finetune_grid.num_steps, got "
                f"{self.finetune_epochs}: give one length."
            )
        if self.checkpoint is None:
            if self.pretrain is None or self.corpus is None:
                raise InputError(
                    "A study needs models to prune, got neither pretrain and corpus nor a "
                    "checkpoint: give one of them."
                )
            return
        if self.has_scratch or self.pretraining_prunes or len(self.source_num_experts) > 1:
            raise InputError(
                "A study of a given checkpoint has one source_num_experts, and neither "
                "has_scratch nor pretraining_prunes, got others: they need pretraining."
            )
        if self.mixture is not None and self.mixture.corpus_share and self.corpus is None:
            raise InputError(
                "mixture.corpus_share needs a corpus, got none: name one or set the share to 0."
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

    @property
    def group(self) -> str:
        """What its seeds have in common, as a name."""
        return self.run.removesuffix(f"-seed{self.seed}")


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
                items.extend(
                    WorkItem(
                        PRUNED, source, target, DURING_PRETRAINING, config.routers[0], task, seed
                    )
                    for target in config.target_num_experts
                    if target < source and config.pretraining_prunes
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
