"""Makes the models of a recipe study: pretrained ones on disk, everything after them in memory."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.artifacts import read_json_lines
from uncurl_jax.checkpoints.accounting import pruned_config
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.checkpoints.weights import CheckpointWeights
from uncurl_jax.config import DistillationConfig, ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.evaluation.calibration import calibrate_checkpoint
from uncurl_jax.evaluation.held_out import HeldOut, held_out
from uncurl_jax.experiments.recipes.recipe_study import (
    WHOLE,
    Arm,
    Cell,
    Recipe,
    RecipeStudyConfig,
)
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.models.decoder import Params
from uncurl_jax.partitioning import place_batch
from uncurl_jax.pruning.methods import get_method
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.prune import prune_layer
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.training import distillation, train_step, trainer


class _Model(NamedTuple):
    """A model in memory."""

    config: ModelConfig
    params: Params


class CellRunner:
    """Makes pretrained models and cells; what is on disk is not made again.

    The directory holds caches/<task>/<split>, pretrained/<n>_experts_seed<s> and
    calibration/<n>_experts_seed<s>/<domain>.npz.
    """

    def __init__(self, config: RecipeStudyConfig, directory: Path, cache_dir: Path):
        """Keeps what the stages need; nothing is read yet."""
        self._config = config
        self._directory = directory
        self._cache_dir = cache_dir
        self._teacher: tuple[tuple[Any, ...], _Model] | None = None

    def cache(self, task: str, split: str) -> TokenCache:
        """Opens a token cache."""
        return TokenCache.open(self._cache_dir / task / split)

    def pretrained(self, num_experts: int, seed: int) -> Path:
        """Returns where a pretrained model lies, whether it is there or not."""
        return self._directory / "pretrained" / f"{num_experts}_experts_seed{seed}"

    def is_pretrained(self, num_experts: int, seed: int) -> bool:
        """Whether a pretrained model is there, whole."""
        return trainer.is_finished(self.pretrained(num_experts, seed))

    def pretrain(self, num_experts: int, seed: int) -> dict[str, Any]:
        """Pretrains a model and returns what it took.

        Tokens per second and MFU are medians over the logged intervals but the first, which holds
        the compilation.
        """
        config, out = self._config, self.pretrained(num_experts, seed)
        model = config.model.with_experts(num_experts)
        training = dataclasses.replace(config.pretrain, model=model, seed=seed)
        begin = time.perf_counter()
        result = trainer.train(
            training, cache=self.cache(config.corpus.name, "train").directory, out=out, quiet=True
        )
        lines = read_json_lines(out / "metrics.jsonl")
        steady = lines[1:] or lines
        count = count_parameters(model)
        rates = {
            name: float(np.median([line[name] for line in steady if name in line]))
            for name in ("tokens_per_second", "mfu")
            if name in steady[-1]
        }
        return {
            "num_experts": num_experts,
            "pretrain_seed": seed,
            "parameters": count.total,
            "active_parameters": count.active,
            "steps": result.step,
            "tokens": result.tokens,
            "loss": result.metrics["loss"],
            "tokens_per_second": rates["tokens_per_second"],
            "mfu": rates.get("mfu"),
            "seconds": round(time.perf_counter() - begin, 3),
        }

    def run(self, cell: Cell) -> dict[str, Any]:
        """Makes a cell and returns what was measured: before, after warm-up, after fine-tuning."""
        config = self._config
        train_cache = self.cache(cell.arm.domain, "train")
        seconds = {}
        begin = time.perf_counter()
        recipe = None if cell.recipe is None else config.recipe(cell.recipe)
        if recipe is None:
            model = self._load(cell.source_num_experts, cell.arm.pretrain_seed)
        else:
            model = self._prune(cell, recipe)
        seconds["prune"] = _since(begin)
        found: dict[str, Any] = {"before": self._measure(cell.arm, model)}
        if recipe is not None:
            begin = time.perf_counter()
            trained = _train(model, config.warmup, train_cache, cell.seed)
            model = _Model(model.config, trained)
            seconds["warmup"] = _since(begin)
            found["warmed_up"] = self._measure(cell.arm, model)
        teacher = None
        if recipe is not None and recipe.distillation_weight:
            teacher = self._teacher_of(cell)
        found["finetuned"] = {}
        for steps in config.finetune_steps:
            begin = time.perf_counter()
            tuned = self._finetune(model, cell, steps, teacher, recipe)
            seconds[f"finetune_{steps}"] = _since(begin)
            found["finetuned"][str(steps)] = self._measure(cell.arm, tuned)
        if cell.kind == WHOLE:
            self._teacher = (self._teacher_key(cell), tuned)
        return {
            **found,
            "tokens_per_step": config.finetune.batch_size * train_cache.max_row_length,
            "num_experts_per_layer": list(model.config.num_experts),
            "parameters": count_parameters(model.config).total,
            "seconds": seconds,
        }

    def _load(self, num_experts: int, seed: int) -> _Model:
        loaded: LoadedModel = load_model(self.pretrained(num_experts, seed))
        return _Model(loaded.config, loaded.params)

    def _prune(self, cell: Cell, recipe: Recipe) -> _Model:
        source, seed = cell.source_num_experts, cell.arm.pretrain_seed
        path = self.pretrained(source, seed)
        statistics, inputs = self._calibrated(source, cell.arm)
        loaded = self._load(source, seed)
        plan = make_plan(
            statistics,
            **recipe.plan_options(cell.num_experts),
            eval_capacity_factor=loaded.config.eval_capacity_factor,
            seed=cell.seed,
            weights=CheckpointWeights(path),
            router_inputs=inputs,
        )
        params: Any = jax.device_get(loaded.params)
        for layer in loaded.config.moe_layers:
            moe = params[f"layers_{layer}"]["moe"]
            pruned = prune_layer(
                plan,
                layer,
                moe["router"]["kernel"],
                moe["experts"],
                init_stddev=loaded.config.init_stddev,
            )
            moe["router"]["kernel"], moe["experts"] = pruned.router, pruned.experts
        return _Model(pruned_config(loaded.config, plan), jax.tree.map(jnp.asarray, params))

    def _calibrated(self, num_experts: int, arm: Arm) -> tuple[RouterStatistics, RouterInputs]:
        config = self._config
        home = f"{num_experts}_experts_seed{arm.pretrain_seed}"
        path = self._directory / "calibration" / home / f"{arm.domain}.npz"
        inputs = path.with_suffix(".inputs.npz")
        if not path.exists():
            # A kill between the two files leaves inputs without statistics.
            inputs.unlink(missing_ok=True)
            methods = {name for recipe in config.recipes for name in recipe.methods}
            calibrate_checkpoint(
                self.pretrained(num_experts, arm.pretrain_seed),
                self.cache(arm.domain, "train"),
                out=path,
                batch_size=config.calibration_batch_size,
                max_batches=config.calibration_max_batches,
                collect=tuple(sorted({g for name in methods for g in get_method(name).collect})),
                inputs_out=inputs,
                sample_tokens=config.sample_tokens,
                quiet=True,
            )
        return RouterStatistics.load(path), RouterInputs.load(inputs)

    def _teacher_key(self, cell: Cell) -> tuple[Any, ...]:
        return (cell.arm.name, cell.seed, cell.source_num_experts)

    def _teacher_of(self, cell: Cell) -> _Model:
        """The unpruned model after the longest fine-tuning with the cell's seed."""
        key = self._teacher_key(cell)
        if self._teacher is None or self._teacher[0] != key:
            whole = self._load(cell.source_num_experts, cell.arm.pretrain_seed)
            steps = self._config.finetune_steps[-1]
            self._teacher = (key, self._finetune(whole, cell, steps, None, None))
        return self._teacher[1]

    def _finetune(
        self,
        model: _Model,
        cell: Cell,
        steps: int,
        teacher: _Model | None,
        recipe: Recipe | None,
    ) -> _Model:
        stage = dataclasses.replace(self._config.finetune, num_steps=steps)
        taught = None
        if teacher is not None and recipe is not None:
            weights = DistillationConfig(logit_weight=recipe.distillation_weight)
            taught = (distillation.Teacher(teacher.config, (), weights), teacher.params)
        cache = self.cache(cell.arm.domain, "train")
        # The step takes its state's memory, and the model is fine-tuned again.
        fresh = _Model(model.config, jax.tree.map(jnp.copy, model.params))
        return _Model(model.config, _train(fresh, stage, cache, cell.seed, taught))

    def _measure(self, arm: Arm, model: _Model) -> dict[str, Any]:
        found: HeldOut = held_out(
            model.config,
            model.params,
            self.cache(arm.domain, "validation"),
            rows_per_batch=self._config.rows_per_batch,
            num_distractors=self._config.num_distractors,
        )
        return found._asdict()


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 3)


def _train(
    model: _Model,
    stage: TrainConfig,
    cache: TokenCache,
    seed: int,
    taught: tuple[distillation.Teacher, Params] | None = None,
) -> Params:
    """Trains a model in memory and returns its parameters; those of `model` are used up.

    Raises:
      RuntimeError: If the loss is not finite at the end.
    """
    stage = dataclasses.replace(stage, seed=seed)
    state = train_step.new_state(model.params, stage)
    step = train_step.make_train_step(
        model.config,
        stage,
        target_length=cache.target_length,
        teacher=None if taught is None else taught[0],
    )
    teacher_params = () if taught is None else (taught[1],)
    batches: Iterable[Any] = cache.train_batches(
        stage.batch_size, length=cache.max_row_length, seed=seed
    )
    metrics: dict[str, jax.Array] = {}
    for batch in itertools.islice(batches, stage.num_steps):
        state, metrics = step(state, place_batch(batch, None), stage.seed, *teacher_params)
    loss = float(metrics["loss"])
    if not np.isfinite(loss):
        raise RuntimeError(
            f"The loss must stay finite, got {loss} after {stage.num_steps} steps: lower "
            "OptimizerConfig.peak_learning_rate."
        )
    return state.params
