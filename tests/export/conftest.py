"""A tiny model, one pruned from it, and artifacts of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.evaluation.evaluator import evaluate_model
from uncurl_jax.export.manifest import ExportOptions
from uncurl_jax.export.stablehlo import export_stablehlo

CONFIG = ModelConfig(
    num_experts=(4, 0),
    vocab_size=260,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_length=96,
    num_selected_experts=2,
    dtype="float32",
)
# Experts of the pruned model, by their numbers in the unpruned one.
KEPT = (2, 0)


@pytest.fixture(autouse=True, scope="session")
def compile_quickly() -> Iterator[None]:
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What lets other processes compile quickly too, and each program once."""
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture
def quick_processes(environment, monkeypatch) -> None:
    """Puts that into the environment that other processes get."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for name, shape in expected_parameters(config).items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = generator.normal(0, 0.4, shape).astype(np.float32)
        if last == "scale":
            node[last] += 1
    return params


def save(directory: Path, config: ModelConfig, params: Any) -> Path:
    record = load_vocabulary("bytes").describe()
    provenance = {"created_by": "test", "token_cache": {"task": "synthetic_choice"}}
    with CheckpointStore(
        directory, model_config=config, provenance=provenance, vocabulary=record
    ) as store:
        store.save(5, params)
    return directory


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Path]:
    """Returns save_checkpoint(directory, config, params): the directory."""
    return save


@pytest.fixture(scope="session")
def make_params() -> Callable[..., dict[str, Any]]:
    """Returns make_params(config, seed=0): random parameters."""
    return random_params


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`base`, and `pruned` with two of its experts and a router of its own."""
    root = tmp_path_factory.mktemp("checkpoints")
    params = random_params(CONFIG)
    pruned = dataclasses.replace(CONFIG, num_experts=(len(KEPT), 0))
    moe = params["layers_0"]["moe"]
    kept = {
        "experts": {name: array[list(KEPT)] for name, array in moe["experts"].items()},
        "router": {"kernel": moe["router"]["kernel"][:, ::2].copy()},
    }
    layer = {**params["layers_0"], "moe": kept}
    return {
        "base": save(root / "base", CONFIG, params),
        "pruned": save(root / "pruned", pruned, {**params, "layers_0": layer}),
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """The validation split of a task with options."""
    root = tmp_path_factory.mktemp("task")
    synthetic.write_tasks(root / "data", num_train=4, num_validation=11, num_documents=2)
    build_token_cache(
        "synthetic_choice",
        vocabulary="bytes",
        out=root / "choice",
        max_length=90,
        data_dir=root / "data",
        splits=("validation",),
    )
    return TokenCache.open(root / "choice" / "validation")


def evaluate(model: Any, cache: TokenCache) -> dict[str, Any]:
    return evaluate_model(model, cache, quiet=True).summary


@pytest.fixture(scope="session")
def shared(checkpoints, cache, tmp_path_factory) -> Path:
    """One artifact of both models, `pruned` scored."""
    out = tmp_path_factory.mktemp("artifacts") / "shared"
    options = ExportOptions(caches={"pruned": cache}, evaluate=evaluate)
    export_stablehlo(checkpoints, out, options)
    return out


@pytest.fixture(scope="session")
def read_manifest() -> Callable[[Path], dict[str, Any]]:
    """Returns read_manifest(artifact)."""
    return lambda path: json.loads((path / "manifest.json").read_text())
