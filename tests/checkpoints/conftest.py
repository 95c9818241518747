"""Tiny models whose parameters are random, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from uncurl_jax.checkpoints.layout import StateReader, fingerprint, resolve
from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.pruning.grouping import GroupingOptions
from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource
from uncurl_jax.pruning.merging import normalized_weights
from uncurl_jax.pruning.plan import PruningPlan

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


# {layer: labels} for the fixture `config`.
LABELS = {0: [0, 1, 0, 2, 1, 0, 2, 0], 2: [0, 1, 1, 0]}


@pytest.fixture
def labels() -> dict[int, list[int]]:
    """Labels that make the fixture `config`'s 8 and 4 experts 3 and 2."""
    return {layer: list(values) for layer, values in LABELS.items()}


def make_layer_plan(
    layer: int,
    labels: list[int],
    *,
    seed: int = 0,
    gate_factors: tuple[float, ...] | None = None,
    fitted_router: str | None = None,
) -> LayerPlan:
    """Counts are random; the reference is the member with the largest."""
    array = np.array(labels)
    selected = np.random.default_rng(seed).integers(1, 100, len(array)).astype(float)
    clusters = range(array.max() + 1)
    return LayerPlan(
        layer=layer,
        method="uncurl",
        num_experts=len(array),
        labels=tuple(labels),
        reference=tuple(int(np.argmax(np.where(array == c, selected, -1))) for c in clusters),
        weights=tuple(normalized_weights(array, selected).tolist()),
        selected=tuple(selected.tolist()),
        cluster_sizes=tuple(int((array == c).sum()) for c in clusters),
        gate_factors=gate_factors,
        fitted_router=fitted_router,
        expected_drop_fraction=0.0,
        diagnostics={},
        verdict="made for a test",
        warnings=(),
    )


@pytest.fixture
def plan_for() -> Callable[..., PruningPlan]:
    """Returns plan_for(path, {layer: labels}, **fields): a plan for the checkpoint at `path`."""

    def make(path: Path, layers: dict[int, list[int]], **options: Any) -> PruningPlan:
        config = resolve(path).model_config()
        factors = options.pop("gate_factors", {})
        fitted = options.pop("fitted_routers", {})
        source = PlanSource(
            checkpoint_hash=fingerprint(path),
            statistics_hash="s" * 64,
            task="superglue_rte",
            split="train",
            tokens=1000,
            num_experts=config.num_experts,
            num_selected_experts=config.num_selected_experts,
        )
        fields = {
            "method": "uncurl",
            "router": "reference",
            "grouping": GroupingOptions(),
            "seed": 0,
            "alignment": "features",
            "gate_compensation": bool(factors),
            "eval_capacity_factor": 1.0,
        }
        return PruningPlan(
            **{**fields, **options},
            source=source,
            layers=tuple(
                make_layer_plan(
                    layer,
                    labels,
                    seed=layer,
                    gate_factors=factors.get(layer),
                    fitted_router=fitted.get(layer),
                )
                for layer, labels in layers.items()
            ),
        )

    return make


@pytest.fixture
def read_arrays() -> Callable[[Any], dict[str, np.ndarray]]:
    """Returns read_arrays(path): {key: array} of all of a checkpoint's arrays."""

    def read(path: Any) -> dict[str, np.ndarray]:
        reader = StateReader(path)
        return {name: reader.read(name) for name in reader.metadata}

    return read
