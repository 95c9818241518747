"""The training step as a program to time. Its imports need all packages of uncurl_jax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.config import OptimizerConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.deployment.bench_programs import random_params, random_tokens
from uncurl_jax.deployment.bench_settings import BenchModel, BenchSettings, Layout
from uncurl_jax.deployment.timing import Alternative
from uncurl_jax.models.decoder import abstract_params, count_parameters
from uncurl_jax.partitioning import place_batch
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


def training_step(
    model: BenchModel, layout: Layout, mesh: Mesh | None, count: int, settings: BenchSettings
) -> TrainingStep:
    """Returns the step of `uncurl train`: float32 parameters, AdamW, the whole batch at once."""
    config = model.config
    batch = settings.batch_per_device * count
    train_config = TrainConfig(
        # So small a rate that a model can take any number of measured steps.
        OptimizerConfig(peak_learning_rate=1e-6),
        num_steps=1_000_000,
        batch_size=batch,
        expert_partitions=layout.expert,
        model_partitions=layout.model,
        expert_axes=layout.expert_axes,
    )
    if model.checkpoint is None:
        # The model's own initialisation takes a minute to compile on a GPU.
        abstract = abstract_params(config, mesh, layout.expert_axes)
        params = random_params(abstract, config.init_stddev, settings.seed)
    else:
        params = load_model(model.checkpoint, mesh, layout.expert_axes).params
    carried = {"state": train_step.new_state(params, train_config)}
    targets = random_tokens(config, batch, settings.length, settings.seed)
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    is_token = np.ones(targets.shape, bool)
    rows = place_batch(Batch(inputs, targets, is_token.astype(np.float32), is_token), mesh)
    step = train_step.make_train_step(config, train_config, mesh)

    def run() -> Any:
        carried["state"], metrics = step(carried["state"], rows, np.int32(settings.seed))
        return carried["state"].step, metrics

    per_token = throughput.training_flops_per_token(
        config, count_parameters(config).active, settings.length
    )
    peak = throughput.peak_flops_per_second(jax.devices()[0].device_kind)
    return TrainingStep(
        Alternative(run),
        tokens=targets.size,
        flops=per_token * targets.size,
        peak_flops_per_second=None if peak is None else peak * count,
    )
