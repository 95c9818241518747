"""What a comparison of recipes consists of: its settings and its cells. No JAX, no files."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.errors import InputError

CHOOSE, CONFIRM = "choose", "confirm"
WHOLE, PRUNED = "whole", "pruned"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to prune; the defaults are UNCURL with kept router columns.

    Attributes:
      name: unique in the study.
      method: see `uncurl_jax.pruning.methods`.
      first_layer_method: of the first MoE layer, which often has no clusters (arXiv 2409.01483,
        section 5); None takes `method` there too.
      router: see `uncurl_jax.pruning.router`.
      affinity, merge_weights, max_cluster_size, alignment, gate_compensation: see
        `uncurl_jax.pruning.plan.make_plan`.
      protected_fraction: of the places, those that "uncurl_protected" keeps for the most used
        experts; None takes its default.
      distillation_weight: of the divergence from the fine-tuned unpruned model's predictions, added
        to the loss of fine-tuning; 0 leaves it out.
    """

    name: str
    method: str = "uncurl"
    first_layer_method: str | None = None
    router: str = "reference"
    affinity: str = "cosine"
    merge_weights: str = "frequency"
    max_cluster_size: int | None = None
    protected_fraction: float | None = None
    alignment: str | None = None
    gate_compensation: bool = False
    distillation_weight: float = 0.0

    def __post_init__(self):
        if not self.name:
            raise InputError("A recipe must have a name, got none.")
        if not 0 <= self.distillation_weight < math.inf:
            raise InputError(
                f"distillation_weight of {self.name} must be at least 0, got "
                f"{self.distillation_weight}."
            )
        if self.protected_fraction is not None and not 0 < self.protected_fraction < 1:
            raise InputError(
                f"protected_fraction of {self.name} must lie between 0 and 1, got "
                f"{self.protected_fraction}."
            )

    def plan_options(self, num_experts: int) -> dict[str, Any]:
        """Returns the keyword arguments of `make_plan` for a prune to `num_experts`."""
        method, layer_methods = self.method, None
        if self.first_layer_method is not None:
            method, layer_methods = "composite", (self.first_layer_method, self.method)
        protected = None
        if self.protected_fraction is not None:
            protected = min(max(round(self.protected_fraction * num_experts), 1), num_experts - 1)
        return {
            "num_experts": num_experts,
            "method": method,
            "layer_methods": layer_methods,
            "router": self.router,
            "affinity": self.affinity,
            "merge_weights": self.merge_weights,
            "max_cluster_size": self.max_cluster_size,
            "num_protected": protected,
            "alignment": self.alignment,
            "gate_compensation": self.gate_compensation,
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods whose statistics are needed."""
        first = () if self.first_layer_method is None else (self.first_layer_method,)
        return (*first, self.method)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Where recipes are compared: one pretraining and one domain.

    Attributes:
      role: CHOOSE (the winner is picked here) or CONFIRM (it is judged here).
      pretrain_seed: of the pretrained models.
      domain: name of a task in the study's domains.
      seeds: of pruning, warm-up and fine-tuning.
    """

    role: str
    pretrain_seed: int
    domain: str
    seeds: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.role not in (CHOOSE, CONFIRM):
            raise InputError(f'role must be "{CHOOSE}" or "{CONFIRM}", got {self.role!r}.')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must be distinct and at least one, got {self.seeds}.")

    @property
    def name(self) -> str:
        """Unique among arms."""
        return f"{self.role}-pretrain{self.pretrain_seed}-{self.domain}"


@dataclasses.dataclass(frozen=True)
class RecipeStudyConfig:
    """Recipes compared by held-out loss after equal fine-tuning on a domain's text.

    Models of every source and target count are pretrained alike. In each arm, for each seed, the
    sources are pruned by every recipe to every smaller target (calibrate, plan, prune, router-only
    warm-up, fine-tune), and whole models of all counts (the sources unpruned, the targets from
    scratch) are fine-tuned with the same budget.

    Attributes:
      title: heading of the report.
      model: the architecture; entries of num_experts that are not 0 get each count in turn.
      pretrain, warmup, finetune: the stages; each length of `finetune_steps` is a run with its own
        learning-rate schedule.
      corpus: pretraining text, a LanguageModelingTask.
      domains: texts to prune for, LanguageModelingTasks with a validation file.
      arms: at least one to choose in; those that confirm share no pretraining with it.
      source_num_experts: counts to prune from.
      target_num_experts: counts to prune to, wherever below.
      recipes: to compare.
      baselines: names of recipes that a winner must beat.
      finetune_steps: lengths of fine-tuning; the winner is chosen at the last.
      vocabulary: spec, see `uncurl_jax.data.vocabulary.load_vocabulary`.
      calibration_batch_size, calibration_max_batches, sample_tokens: see `calibrate_checkpoint`.
      rows_per_batch: of the evaluation.
      num_distractors: of the cloze test, see `evaluation.held_out`.
    """

    title: str
    model: ModelConfig
    pretrain: TrainConfig
    warmup: TrainConfig
    finetune: TrainConfig
    corpus: Any
    domains: tuple[Any, ...]
    arms: tuple[Arm, ...]
    source_num_experts: tuple[int, ...]
    target_num_experts: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    baselines: tuple[str, ...]
    finetune_steps: tuple[int, ...]
    vocabulary: str = "bytes"
    calibration_batch_size: int = 32
    calibration_max_batches: int | None = None
    sample_tokens: int = 4096
    rows_per_batch: int = 32
    num_distractors: int = 9

    def __post_init__(self):
        for name in (
            "domains",
            "arms",
            "source_num_experts",
            "target_num_experts",
            "recipes",
            "baselines",
            "finetune_steps",
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values:
                raise InputError(f"{name} must name at least one, got none.")
        self._check_names()
        self._check_counts()
        if self.warmup.trainable != "router":
            raise InputError(
                f'warmup.trainable must be "router", got {self.warmup.trainable!r}: set it so.'
            )
        if list(self.finetune_steps) != sorted(set(self.finetune_steps)):
            raise InputError(f"finetune_steps must rise, got {self.finetune_steps}.")

    def _check_names(self) -> None:
        domains = [domain.name for domain in self.domains]
        recipes = [recipe.name for recipe in self.recipes]
        arms = [arm.name for arm in self.arms]
        for what, names in {"domains": domains, "recipes": recipes, "arms": arms}.items():
            if len(set(names)) < len(names):
                raise InputError(f"{what} must have different names, got {names}.")
        for arm in self.arms:
            if arm.domain not in domains:
                raise InputError(
                    f"An arm's domain must be one of {', '.join(domains)}, got {arm.domain!r}."
                )
        for name in self.baselines:
            if name not in recipes:
                raise InputError(
                    f"baselines must be among the recipes {', '.join(recipes)}, got {name!r}."
                )
        chosen_on = {arm.pretrain_seed for arm in self.arms if arm.role == CHOOSE}
        if not chosen_on:
            raise InputError(f'arms must hold one with role "{CHOOSE}", got none.')
        for arm in self.arms:
            if arm.role == CONFIRM and arm.pretrain_seed in chosen_on:
                raise InputError(
                    f"Arms that confirm must have pretrainings of their own, got seed "
                    f"{arm.pretrain_seed}, on which the winner is chosen: take another seed."
                )

    def _check_counts(self) -> None:
        if not self.model.moe_layers:
            raise InputError("Recipes need a model with MoE layers, got a dense one.")
        largest, topk = max(self.source_num_experts), self.model.num_selected_experts
        for count in self.target_num_experts:
            if not topk <= count < largest:
                raise InputError(
                    f"target_num_experts must be at least top-k={topk} and below {largest}, got "
                    f"{count}: choose others."
                )

    def recipe(self, name: str) -> Recipe:
        """Returns a recipe by name."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    def domain(self, name: str) -> Any:
        """Returns a domain's task by name."""
        return next(domain for domain in self.domains if domain.name == name)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model that is fine-tuned, once for each length.

    Attributes:
      arm: where.
      seed: of everything after pretraining.
      kind: WHOLE or PRUNED.
      source_num_experts: of the pretrained model it begins with.
      num_experts: when it is fine-tuned.
      recipe: name; None for a whole model.
    """

    arm: Arm
    seed: int
    kind: str
    source_num_experts: int
    num_experts: int
    recipe: str | None

    @property
    def name(self) -> str:
        """Unique in the study."""
        what = (
            f"{self.num_experts}-{WHOLE}"
            if self.kind == WHOLE
            else f"{self.source_num_experts}to{self.num_experts}-{self.recipe}"
        )
        return f"{self.arm.name}/seed{self.seed}/{what}"


def cells(config: RecipeStudyConfig) -> list[Cell]:
    """Lists the models, so that what is cut off is whole for as many seeds as possible.

    Within an arm and seed the unpruned models come first: recipes may learn from them.
    """
    counts = sorted({*config.source_num_experts, *config.target_num_experts}, reverse=True)
    found = []
    for arm in sorted(config.arms, key=lambda arm: arm.role != CHOOSE):
        for seed in arm.seeds:
            found += [Cell(arm, seed, WHOLE, count, count, None) for count in counts]
            found += [
                Cell(arm, seed, PRUNED, source, target, recipe.name)
                for source in config.source_num_experts
                for target in config.target_num_experts
                if target < source
                for recipe in config.recipes
            ]
    return found
