"""Tiny models whose parameters are random, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig

VOCABULARY = {"name": "bytes", "spec": "bytes", "size": 259, "hash": "0" * 64}
PROVENANCE = {"created_by": "test"}


@pytest.fixture
def config() -> ModelConfig:
    """MoE layers 0 and 2 with unequal expert counts, a dense layer between."""
    return ModelConfig(
        num_experts=(8, 0, 4),
        vocab_size=32,
        embed_dim=16,
        num_heads=2,
        mlp_dim=24,
        max_length=12,
        dtype="float32",
    )


@pytest.fixture
def make_params() -> Callable[..., dict[str, Any]]:
    """Returns make_params(config, seed=0, dtype="float32"): random numpy parameters."""

    def make(config: ModelConfig, *, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        params: dict[str, Any] = {}
        for name, shape in expected_parameters(config).items():
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = generator.standard_normal(shape).astype(numpy_dtype)
        return params

    return make


@pytest.fixture
def save_checkpoint(make_params) -> Callable[..., Path]:
    """Returns save_checkpoint(directory, config, params=None, step=7, ...): the directory."""

    def save(
        directory: Path,
        config: ModelConfig,
        *,
        params: dict[str, Any] | None = None,
        param_states: dict[str, Any] | None = None,
        step: int = 7,
    ) -> Path:
        with CheckpointStore(
            directory, model_config=config, provenance=PROVENANCE, vocabulary=VOCABULARY
        ) as store:
            store.save(step, make_params(config) if params is None else params, param_states)
        return directory

    return save
