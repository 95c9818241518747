from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.models.decoder import Decoder, moe_metrics
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, make_mesh, place_batch

TOLERANCE = 1e-5
DROPLESS = ModelConfig(
    num_experts=(1, 3, 0, 5, 8),
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    mlp_dim=8,
    max_length=8,
    capacity_factor=None,
    eval_capacity_factor=None,
    min_capacity=1,
    router_z_loss_weight=0.01,
    dtype="float32",
)
BATCH = 8


@functools.cache
def make_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    inputs = generator.integers(0, 32, (BATCH, 8)).astype(np.int32)
    mask = np.arange(8) < generator.integers(4, 9, (BATCH, 1))
    return inputs, mask, generator.normal(size=(BATCH, 8, 32)).astype(np.float32)


def loss_and_gradients(config: ModelConfig, mesh: Mesh | None, num_groups: int | None, params: Any):
    """Compiles and runs forward and backward; returns the program's text and its results."""
    model = Decoder(config, mesh, num_groups)

    def loss(params: Any, inputs: jax.Array, mask: jax.Array, cotangent: jax.Array):
        logits, sown = model.apply(
            {"params": params}, inputs, mask, is_training=True, mutable=["intermediates"]
        )
        metrics = moe_metrics(sown["intermediates"])
        weighted = jnp.sum(logits * cotangent * mask[..., None]) / mask.sum()
        return weighted + metrics["auxiliary_loss"] + metrics["router_z_loss"], (logits, metrics)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
        params = jax.device_put(params, shardings)
    batch = place_batch(make_batch(), mesh)
    compiled = gradient.lower(params, *batch).compile()
    return compiled.as_text() or "", jax.device_get(compiled(params, *batch))


QWEN_LIKE = dataclasses.replace(
    DROPLESS,
    num_experts=(5,),
    num_selected_experts=2,
    normalize_gates=True,
    is_gated=True,
    activation="silu",
    has_mlp_bias=False,
    shared_mlp_dim=12,
    has_shared_gate=True,
)


def case(shape: tuple[int, int, int], num_experts: tuple[int, ...], factor: float | None):
    """Few layers by default; with all of them, a minute each, only on request."""
    name = "x".join(map(str, shape))
    kind = "dropless" if factor is None else "dropping"
    counts = "-".join(map(str, num_experts))
    marks = pytest.mark.slow if len(num_experts) > 2 else ()
    return pytest.param(shape, num_experts, factor, id=f"{name}-{counts}-{kind}", marks=marks)


@pytest.mark.parametrize(
    ("shape", "num_experts", "factor"),
    [
        # Of these counts 3 and 5 divide no expert axis, and 1 none either.
        case((2, 2, 2), (8, 1), 0.5),
        case((1, 4, 2), (3, 8), None),
        case((1, 8, 1), (5, 0), 0.5),
        case((8, 1, 1), (5, 0), None),
        *(
            case(shape, DROPLESS.num_experts, factor)
            for shape in ((2, 2, 2), (1, 4, 2), (1, 8, 1), (2, 4, 1), (8, 1, 1))
            for factor in (0.5, None)
        ),
    ],
)
def test_eight_devices_equal_one(shape, num_experts, factor, random_params):
    config = dataclasses.replace(DROPLESS, num_experts=num_experts, capacity_factor=factor)
    compare(config, shape, random_params(config))


@pytest.mark.parametrize(
    ("shape", "expert_map"),
    [
        ((2, 2, 2), None),
        pytest.param((1, 4, 2), ((4, 3, 2, 1, 0, 0, 1),), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), None, marks=pytest.mark.slow),
    ],
)
def test_gated_and_shared_experts_on_eight_devices_equal_one(shape, expert_map, random_params):
    config = dataclasses.replace(QWEN_LIKE, expert_map=expert_map)
    compare(config, shape, random_params(config))


def compare(config: ModelConfig, shape: tuple[int, int, int], params: Any) -> None:
    factor = config.capacity_factor
    mesh = make_mesh(expert_partitions=shape[1], model_partitions=shape[2])
    assert tuple(mesh.devices.shape) == shape
    # Tokens compete for slots within a group, so the groups must be the same ones.
    is_dropless = factor is None
    groups = 1 if is_dropless else axis_size(mesh, TOKEN_AXES)
    text, ((loss, (logits, metrics)), gradients) = loss_and_gradients(config, None, groups, params)
    assert "all-to-all" not in text
    text, ((sharded_loss, (sharded_logits, sharded_metrics)), sharded) = loss_and_gradients(
        config, mesh, None, params
    )
    # Without drops, the devices that divide experts see each other's tokens instead.
    assert ("all-to-all" in text) == (shape[1] > 1 and not is_dropless)
    assert ("all-gather" in text) >= (shape[1] > 1 and is_dropless)

    np.testing.assert_allclose(sharded_loss, loss, rtol=TOLERANCE)
    np.testing.assert_allclose(sharded_logits, logits, rtol=TOLERANCE, atol=TOLERANCE)
    # How many slots are computed, filled or not, depends on the mesh.
    usage = sharded_metrics.pop("expert_usage")
    assert 0 < usage <= 1
    for name, value in sharded_metrics.items():
        np.testing.assert_allclose(value, metrics[name], rtol=TOLERANCE, err_msg=name)
    assert (metrics["fraction_tokens_left_behind"] > 0.05) == (not is_dropless)
    expected = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, value), found in zip(expected, jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(
            found, value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path)
        )
        assert np.any(value) or "router" in jax.tree_util.keystr(path)
