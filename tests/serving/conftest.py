"""A tiny model, pruned for a task and exported beside its base, and ways to serve the two."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from starlette.testclient import TestClient

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import ModelConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.evaluation.calibration import calibrate_model
from uncurl_jax.export.manifest import ExportOptions
from uncurl_jax.export.stablehlo import export_stablehlo
from uncurl_jax.models.architecture import init_params
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.serving.app import make_app
from uncurl_jax.serving.models import ServedArtifact, open_artifact
from uncurl_jax.serving.service import Service
from uncurl_jax.serving.settings import ServeConfig

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
TASK = "synthetic_topic"
# One shape for everything, so that each model compiles once.
SHAPES = {"batch_sizes": (4,), "lengths": (96,)}


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Programs that run a few times need not be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


class Made(NamedTuple):
    """What the tests serve, and what it was made from."""

    base: Path
    pruned: Path
    train: TokenCache
    validation: TokenCache
    statistics: RouterStatistics  # of base, on the training split
    artifact: Path  # models "base", without a task, and "topic"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("serving")
    synthetic.write_tasks(root / "data", num_train=60, num_validation=9, num_documents=10)
    build_token_cache(TASK, out=root / "cache", max_length=90, data_dir=root / "data")
    train = TokenCache.open(root / "cache" / "train")
    validation = TokenCache.open(root / "cache" / "validation")
    with quick_compilation():
        with CheckpointStore(
            root / "base",
            model_config=CONFIG,
            provenance={"created_by": "test"},
            vocabulary=load_vocabulary("bytes").describe(),
        ) as store:
            store.save(3, jax.device_get(init_params(CONFIG, 0)))
        base = load_model(root / "base")
        statistics = calibrate_model(base, train, batch_size=20, length=96, quiet=True)
        plan = make_plan(statistics, num_experts=2, eval_capacity_factor=None)
        prune_checkpoint(root / "base", plan, root / "pruned", workers=0)
        export_stablehlo(
            {"base": root / "base", "topic": root / "pruned"},
            root / "artifact",
            ExportOptions(caches={"topic": validation}),
        )
    return Made(
        root / "base",
        root / "pruned",
        train,
        validation,
        statistics,
        root / "artifact",
    )


@pytest.fixture(scope="session")
def artifact(made: Made) -> ServedArtifact:
    return open_artifact(made.artifact)


class Serving(NamedTuple):
    """A running service and a client of it."""

    service: Service
    client: TestClient

    def post(self, path: str, **body):
        return self.client.post(path, json=body)

    def wait_until_idle(self) -> None:
        """Statistics are counted after a request has been answered."""
        while not self.service.batcher.is_idle:
            time.sleep(0.01)


@pytest.fixture(scope="session")
def serve(artifact: ServedArtifact) -> Callable[..., contextlib.AbstractContextManager[Serving]]:
    """Returns serve(references={}, **settings): a context manager; programs compile once."""

    @contextlib.contextmanager
    def run(references: dict | None = None, **settings) -> Iterator[Serving]:
        config = ServeConfig(**{**SHAPES, "max_wait_ms": 0.0, **settings})
        service = Service(artifact, config, references)
        app = make_app(service, host="127.0.0.1")
        with TestClient(app, base_url="http://127.0.0.1") as client:
            assert client.portal is not None
            with quick_compilation():
                client.portal.call(service.start)
            yield Serving(service, client)
            client.portal.call(service.drain)

    return run


@pytest.fixture(scope="module")
def serving(serve, made: Made) -> Iterator[Serving]:
    """With the calibration of the base model as its reference."""
    with serve({"base": made.statistics}) as running:
        yield running
