"""The training step as a program to time. Its imports need all packages of uncurl_jax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.deployment.bench_programs import random_params, random_tokens
from uncurl_jax.deployment.bench_settings import BenchModel, BenchSettings, Layout
from uncurl_jax.deployment.timing import Alternative
from uncurl_jax.models.architecture import abstract_params, count_parameters
from uncurl_jax.partitioning import place_batch, replicated
from uncurl_jax.training import throughput, train_step


class TrainingStep(NamedTuple):
    """A training step to time.

    Attributes:
      alternative: one step, each from the state of the one before.
      tokens: of its batch.
      flops: useful floating-point operations of one step.
      peak_flops_per_second: of all devices, None if not known.
    """

    alternative: Alternative
    tokens: int
    flops: float
    peak_flops_per_second: float | None

    def rates(self, seconds: float) -> dict[str, Any]:
        """Returns tokens per second and the share of the devices' peak that is useful (MFU)."""
        peak = self.peak_flops_per_second
        return {
            "tokens_per_second": self.tokens / seconds,
            "model_flops_per_second": self.flops / seconds,
            "mfu": None if peak is None else self.flops / seconds / peak,
        }


def compile_step(
    model: BenchModel, layout: Layout, mesh: Mesh | None, count: int, settings: BenchSettings
) -> Any:
    """Compiles the step of `uncurl train`: float32 parameters, AdamW, the whole batch at once.

    Nothing but the batch is allocated.
    """
    config = _train_config(layout, count, settings)
    params, opt_state = train_step.abstract_state(model.config, config, mesh)
    whole = None if mesh is None else replicated(mesh)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    # _make, because this tuple holds shapes in the places of arrays.
    state = train_step.TrainState._make([counter, params, opt_state])
    step = train_step.make_train_step(model.config, config, mesh)
    rows = _batch(model.config, mesh, count, settings)
    return step.lower(state, rows, np.int32(settings.seed)).compile()


def training_step(
    compiled: Any,
    model: BenchModel,
    layout: Layout,
    mesh: Mesh | None,
    count: int,
    settings: BenchSettings,
) -> TrainingStep:
    """Returns what `compile_step` compiled with a state and a batch, to time."""
    config = model.config
    if model.checkpoint is None:
        # The model's own initialisation takes a minute to compile on a GPU.
        abstract = abstract_params(config, mesh, layout.expert_axes)
        params = random_params(abstract, config.init_stddev, settings.seed)
    else:
        params = load_model(model.checkpoint, mesh, layout.expert_axes).params
    train_config = _train_config(layout, count, settings)
    carried = {"state": train_step.new_state(params, train_config)}
    rows = _batch(config, mesh, count, settings)

    def run() -> Any:
        carried["state"], metrics = compiled(carried["state"], rows, np.int32(settings.seed))
        return carried["state"].step, metrics

    per_token = throughput.training_flops_per_token(
        config, count_parameters(config).active, settings.length
    )
    peak = throughput.peak_flops_per_second(jax.devices()[0].device_kind)
    tokens = settings.batch_per_device * count * settings.length
    return TrainingStep(
        Alternative(run),
        tokens=tokens,
        flops=per_token * tokens,
        peak_flops_per_second=None if peak is None else peak * count,
    )


def _train_config(layout: Layout, count: int, settings: BenchSettings) -> TrainConfig:
    return TrainConfig(
        # So small a rate that a model can take any number of measured steps.
        OptimizerConfig(peak_learning_rate=1e-6),
        num_steps=1_000_000,
        batch_size=settings.batch_per_device * count,
        expert_partitions=layout.expert,
        model_partitions=layout.model,
        expert_axes=layout.expert_axes,
    )


def _batch(config: ModelConfig, mesh: Mesh | None, count: int, settings: BenchSettings) -> Batch:
    batch = settings.batch_per_device * count
    targets = random_tokens(config, batch, settings.length, settings.seed)
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    is_token = np.ones(targets.shape, bool)
    return place_batch(Batch(inputs, targets, is_token.astype(np.float32), is_token), mesh)
