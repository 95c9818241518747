"""T5X where it can be found, else one reason to skip; tiny models, tasks and token caches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.token_cache import Batch, TokenCache, build_token_cache
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.t5x_adapter import availability

LENGTH = 16


@pytest.fixture(scope="session")
def t5x() -> None:
    """Makes T5X importable; skips with the reason where it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = availability.why_missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Five experts, which four devices hold unequally; dropless, so that groups do not matter."""
    return ModelConfig(
        num_experts=(5, 0),
        vocab_size=260,
        embed_dim=16,
        num_heads=2,
        mlp_dim=32,
        max_length=LENGTH,
        capacity_factor=None,
        eval_capacity_factor=None,
        router_z_loss_weight=1e-2,
        # A key's bias shifts all scores of a query alike: its gradient is rounding, which Adam
        # scales to the learning rate.
        attention_bias="none",
        init_stddev=0.2,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def optimizer_config() -> OptimizerConfig:
    """Clipping and decay are on; the first step already moves."""
    return OptimizerConfig(peak_learning_rate=1e-3, schedule="cosine", clip_norm=0.5)


@pytest.fixture
def make_params():
    """Returns make_params(config, seed=0): fresh parameters as numpy arrays."""

    def make(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
        variables = Decoder(config).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
        return jax.tree.map(np.asarray, nn.meta.unbox(variables["params"]))

    return make


@pytest.fixture
def make_batch():
    """Returns make_batch(seed=0): eight rows of 16 tokens, prompts of three."""

    def make(seed: int = 0) -> Batch:
        generator = np.random.default_rng(seed)
        mask = np.arange(LENGTH) < generator.integers(5, LENGTH + 1, (8, 1))
        targets = np.where(mask, generator.integers(3, 259, (8, LENGTH)), 0).astype(np.int32)
        inputs = np.concatenate([np.zeros((8, 1), np.int32), targets[:, :-1]], axis=1)
        weights = (mask & (np.arange(LENGTH) >= 3)).astype(np.float32)
        return Batch(inputs, targets, weights, mask)

    return make


@pytest.fixture
def as_features():
    """Returns as_features(batch): the same rows as T5X's features."""

    def convert(batch: Batch) -> dict[str, np.ndarray]:
        return {
            "decoder_input_tokens": batch.inputs,
            "decoder_target_tokens": batch.targets,
            "decoder_loss_weights": batch.weights.astype(np.int32),
        }

    return convert


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the synthetic tasks."""
    directory = tmp_path_factory.mktemp("data")
    synthetic.write_tasks(directory, num_train=24, num_validation=10, num_documents=12)
    return directory


@pytest.fixture(scope="session")
def topic_cache(data_dir, tmp_path_factory) -> Path:
    """Rows of up to 96 bytes: a prompt and one of eight options."""
    out = tmp_path_factory.mktemp("caches") / "topic"
    build_token_cache("synthetic_topic", out=out, max_length=96, data_dir=data_dir)
    return out


@pytest.fixture(scope="session")
def text_cache(data_dir, tmp_path_factory) -> Path:
    """Rows of exactly 64 bytes of text."""
    out = tmp_path_factory.mktemp("caches") / "text"
    build_token_cache("synthetic_corpus", out=out, max_length=64, data_dir=data_dir)
    return out


@pytest.fixture(scope="session")
def validation(topic_cache) -> TokenCache:
    """The validation split of `topic_cache`."""
    return TokenCache.open(topic_cache / "validation")
