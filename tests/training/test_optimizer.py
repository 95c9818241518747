from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.training import optimizer

TOLERANCE = 1e-5
CONFIG = OptimizerConfig(peak_learning_rate=0.5, warmup_steps=4)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # Step: 0, 1, 4 (peak), 6 (a quarter of the decay), 8 (half), 12 (the end).
        ("linear", [0.0, 0.125, 0.5, 0.375, 0.25, 0.0]),
        ("cosine", [0.0, 0.125, 0.5, 0.25 * (1 + np.cos(np.pi / 4)), 0.25, 0.0]),
        ("constant", [0.0, 0.125, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_learning_rates_worked_by_hand(schedule: str, values: list[float]):
    config = dataclasses.replace(CONFIG, schedule=schedule)
    rate = optimizer.learning_rate_schedule(config, 12)
    found = [np.asarray(rate(np.int32(step))) for step in (0, 1, 4, 6, 8, 12)]
    np.testing.assert_allclose(found, values, atol=TOLERANCE)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    rate = optimizer.learning_rate_schedule(dataclasses.replace(CONFIG, warmup_steps=0), 4)
    np.testing.assert_allclose(
        [np.asarray(rate(step)) for step in range(5)], [0.5, 0.375, 0.25, 0.125, 0]
    )


def ones(model: ModelConfig) -> Any:
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(model))


def named(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def update(config: OptimizerConfig, params: Any, grads: Any, trainable: str = "all") -> Any:
    transformation = optimizer.make_optimizer(config, 10, trainable)

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        return transformation.update(grads, transformation.init(params), params)[0]

    return named(run(params, grads))


def test_weight_decay_touches_kernels_experts_and_embeddings_only(model: ModelConfig):
    params = ones(model)
    config = OptimizerConfig(peak_learning_rate=0.5, weight_decay=0.1)
    updates = update(config, params, jax.tree.map(np.zeros_like, params))
    decayed = {name for name, value in updates.items() if np.any(value)}
    layer = "layers_0"
    assert {
        f"{layer}/moe/experts/wi",
        f"{layer}/moe/experts/wo",
        f"{layer}/moe/router/kernel",
    } <= decayed
    assert {"token_embedder/embedding", "position_embedder/embedding"} <= decayed
    assert {"layers_1/mlp/wi/kernel", f"{layer}/attention/out/kernel"} <= decayed
    spared = set(updates) - decayed
    assert {name.rpartition("/")[2] for name in spared} == {"bias", "scale", "wi_bias", "wo_bias"}
    assert not {name for name in decayed if name.endswith(("bias", "scale"))}
    # Decoupled: -rate * decay * value, and no gradient.
    np.testing.assert_allclose(updates["token_embedder/embedding"], -0.05, rtol=TOLERANCE)


def test_gradients_are_clipped_to_their_global_norm(model: ModelConfig):
    params = ones(model)
    clipped = OptimizerConfig(peak_learning_rate=0.5, weight_decay=0.0, epsilon=1.0, clip_norm=1e-3)
    grads = jax.tree.map(lambda leaf: np.full(leaf.shape, 3.0, np.float32), params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    scaled = 1e-3 / np.sqrt(size)  # each of `size` equal elements, after clipping
    # First step of Adam with epsilon 1: -rate * g / (|g| + 1).
    expected = -0.5 * scaled / (scaled + 1)
    for value in update(clipped, params, grads).values():
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    free = dataclasses.replace(clipped, clip_norm=None)
    for value in update(free, params, grads).values():
        np.testing.assert_allclose(value, -0.5 * 3 / 4, rtol=TOLERANCE)


def test_router_training_updates_router_kernels_and_keeps_no_other_state(model: ModelConfig):
    params = ones(model)
    grads = jax.tree.map(np.ones_like, params)
    updates = update(CONFIG_NO_WARMUP, params, grads, "router")
    assert {name for name, value in updates.items() if np.any(value)} == {
        "layers_0/moe/router/kernel"
    }
    transformation = optimizer.make_optimizer(CONFIG_NO_WARMUP, 10, "router")
    state = jax.eval_shape(transformation.init, params)
    assert max(np.size(leaf) for leaf in jax.tree.leaves(state)) == 8 * 3
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) < 3 * 8 * 3


CONFIG_NO_WARMUP = dataclasses.replace(CONFIG, warmup_steps=0)


def test_clipping_in_router_training_sees_the_routers_alone(model: ModelConfig):
    config = dataclasses.replace(CONFIG_NO_WARMUP, weight_decay=0.0, epsilon=1.0, clip_norm=1.0)
    params = ones(model)
    small = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(
            leaf.shape, 0.01 if "router" in jax.tree_util.keystr(path) else 1e6, np.float32
        ),
        params,
    )
    updates = update(config, params, small, "router")
    # 24 elements of 0.01 have a norm below 1: nothing is clipped.
    np.testing.assert_allclose(
        updates["layers_0/moe/router/kernel"], -0.5 * 0.01 / 1.01, rtol=TOLERANCE
    )


def test_trained_leaves_are_all_or_the_routers(model: ModelConfig):
    params = ones(model)
    assert len(optimizer.trained_leaves(params, "all")) == len(jax.tree.leaves(params))
    (router,) = optimizer.trained_leaves(params, "router")
    assert router.shape == (8, 3)
    assert float(optax.tree.norm([router])) == pytest.approx(np.sqrt(24))
