"""A tiny mixture of experts with random parameters, and token caches to run it on."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.models.architecture import abstract_params, init_params

# Large initial values: an untrained model routes to all experts and prefers some options clearly.
CONFIG = ModelConfig(
    num_experts=(4, 4),
    vocab_size=260,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_length=96,
    eval_capacity_factor=None,
    init_stddev=0.4,
    dtype="float32",
)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenCache]:
    """The validation splits of two tasks and a corpus, and one training split."""
    root = tmp_path_factory.mktemp("evaluation")
    synthetic.write_tasks(root / "data", num_train=21, num_validation=11, num_documents=10)
    opened = {}
    for name in ("entailment", "choice", "corpus"):
        out = root / name
        build_token_cache(
            f"synthetic_{name}",
            vocabulary="bytes",
            out=out,
            max_length=90,
            data_dir=root / "data",
        )
        opened[name] = TokenCache.open(out / "validation")
    opened["train"] = TokenCache.open(root / "entailment" / "train")
    return opened


def save(directory: Path, config: ModelConfig, params: object) -> Path:
    vocabulary = load_vocabulary("bytes").describe()
    with CheckpointStore(
        directory, model_config=config, provenance={"created_by": "test"}, vocabulary=vocabulary
    ) as store:
        store.save(3, params)
    return directory


@pytest.fixture(scope="session")
def save_checkpoint():
    """Returns save_checkpoint(directory, config, params): the directory."""
    return save


@pytest.fixture(scope="session")
def zero_params():
    """Returns zero_params(config): parameters that are never run."""
    return lambda config: jax.tree.map(
        lambda array: np.zeros(array.shape, array.dtype), abstract_params(config)
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return save(directory, CONFIG, jax.device_get(init_params(CONFIG, 0)))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> LoadedModel:
    """The checkpoint on one device."""
    return load_model(checkpoint)
