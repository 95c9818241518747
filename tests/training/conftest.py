"""A tiny text, its token cache, and a model of one MoE and one dense layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.token_cache import build_token_cache


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train split of a language-modelling cache: rows of 16 bytes."""
    directory = tmp_path_factory.mktemp("text")
    words = ["router", "expert", "merges", "prunes", "token", "slot", "\n\n"]
    text = " ".join(np.random.default_rng(0).choice(words, 400))
    (directory / "text.txt").write_text(text, encoding="utf-8")
    build_token_cache(
        LanguageModelingTask("text", "text.txt"),
        vocabulary="bytes",
        out=directory / "cache",
        max_length=16,
        data_dir=directory,
    )
    return directory / "cache" / "train"


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """Three experts, dropless, so that devices and groups do not matter."""
    return ModelConfig(
        num_experts=(3, 0),
        vocab_size=260,
        embed_dim=8,
        num_heads=1,
        mlp_dim=8,
        max_length=16,
        capacity_factor=None,
        eval_capacity_factor=None,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def config(model: ModelConfig) -> TrainConfig:
    """Six steps of eight rows, every step logged."""
    return TrainConfig(
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1),
        num_steps=6,
        batch_size=8,
        model=model,
        log_every_steps=1,
        seed=3,
    )
