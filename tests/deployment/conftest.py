"""Eight devices of the CPU as a mesh and as a slice, and a small decoder to compile for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.deployment.slices import Slice, load_slice

ROOT = Path(__file__).parents[2]

# Tokens of a device: 2 rows of 8. Each of 4 or 8 experts has 16 * 1.0 / 4 = 4 or 2 slots.
MODEL = ModelConfig(
    num_experts=(8, 0, 4),
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=8,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    min_capacity=1,
    dtype="float32",
)


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    return MODEL


@pytest.fixture(scope="session")
def stage() -> Callable[..., TrainConfig]:
    """Returns stage(**changes): 16 rows per step, two per device."""

    def make(**changes: object) -> TrainConfig:
        values = {"num_steps": 10, "batch_size": 16, "model": MODEL, **changes}
        return TrainConfig(optimizer=OptimizerConfig(peak_learning_rate=1e-3), **values)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def slice_of_eight() -> Slice:
    """As a v5e-16, but of 2 * 4 chips."""
    of_16 = load_slice("v5e-16", ROOT / "configs" / "slices")
    return dataclasses.replace(of_16, name="v5e-8", topology=(2, 4), num_chips=8, num_hosts=2)
