"""Gated networks, activations, biases and shared experts against plain numpy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters, is_expert_array
from uncurl_jax.config import ModelConfig
from uncurl_jax.models import architecture, layers
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.partitioning import make_mesh

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2
CONFIG = ModelConfig(
    num_experts=(5, 0),
    vocab_size=32,
    embed_dim=8,
    num_heads=2,
    mlp_dim=12,
    max_length=8,
    capacity_factor=None,
    eval_capacity_factor=None,
    dtype="float32",
)
# Qwen2-MoE's layer: gated SiLU experts without biases beside a gated shared expert.
QWEN_LIKE_OPTIONS: dict[str, Any] = {
    "num_selected_experts": 2,
    "normalize_gates": True,
    "is_gated": True,
    "activation": "silu",
    "has_mlp_bias": False,
    "shared_mlp_dim": 6,
    "has_shared_gate": True,
}
QWEN_LIKE = dataclasses.replace(CONFIG, **QWEN_LIKE_OPTIONS)
OPTIONS: list[dict[str, Any]] = [
    {"is_gated": gated, "has_mlp_bias": bias, "shared_mlp_dim": shared, "has_shared_gate": gate}
    for gated, bias, (shared, gate) in itertools.product(
        (False, True), (False, True), ((0, False), (6, False), (6, True))
    )
]


def inputs() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(2).normal(size=(3, 7, 8)).astype(np.float32)
    return x, np.arange(7) < np.asarray([[7], [4], [6]])


def named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def flat(params: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"wi": {"kernel": ...}} -> {"wi/kernel": ...}."""
    return {f"{a}/{b}": array for a, arrays in params.items() for b, array in arrays.items()}


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_feed_forward_network_equals_numpy(
    random_params, reference_feed_forward, is_gated, has_bias, activation
):
    config = dataclasses.replace(
        CONFIG, is_gated=is_gated, has_mlp_bias=has_bias, activation=activation
    )
    params = random_params(config)["layers_1"]["mlp"]
    assert set(params) == ({"wi", "wg", "wo"} if is_gated else {"wi", "wo"})
    x, _ = inputs()
    found: Any = layers.Mlp(config).apply({"params": params}, x)
    expected = reference_feed_forward(flat(params), x, activation, join="/")
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_gated_network_worked_by_hand():
    # relu(gate) * up: gate 3 and -1, up 2 and 5, so hidden (6, 0) and output 6 * 7.
    params = {
        "wi": {"kernel": np.asarray([[2.0, 5.0]])},
        "wg": {"kernel": np.asarray([[3.0, -1.0]])},
        "wo": {"kernel": np.asarray([[7.0], [11.0]])},
    }
    config = dataclasses.replace(
        CONFIG,
        embed_dim=1,
        num_heads=1,
        mlp_dim=2,
        is_gated=True,
        activation="relu",
        has_mlp_bias=False,
    )
    found: Any = layers.Mlp(config).apply({"params": params}, np.ones((1, 1, 1), np.float32))
    np.testing.assert_allclose(found, [[[42.0]]])


def expected_moe(config: ModelConfig, params: Any, x: np.ndarray, mask: np.ndarray, network):
    """Dropless mixture and shared expert, one token at a time, in float64."""
    logits = x.astype(np.float64) @ params["router"]["kernel"]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    y = np.zeros(x.shape)
    for place in zip(*np.nonzero(mask), strict=True):
        top = np.argsort(-p[place])[: config.num_selected_experts]
        for expert in top:
            one = {name: array[expert] for name, array in params["experts"].items()}
            gate = p[place][expert] / (p[place][top].sum() if config.normalize_gates else 1.0)
            y[place] += gate * network(one, x[place], config.activation)
        if config.shared_mlp_dim:
            shared = network(flat(params["shared"]), x[place], config.activation, join="/")
            if config.has_shared_gate:
                (score,) = x[place].astype(np.float64) @ params["shared_gate"]["kernel"]
                shared = shared / (1.0 + np.exp(-score))
            y[place] += shared
    return y


@pytest.mark.parametrize(
    "options",
    [
        {"is_gated": True},
        {"is_gated": True, "activation": "silu", "has_mlp_bias": False},
        {"activation": "relu", "has_mlp_bias": False},
        {"shared_mlp_dim": 6},
        {"shared_mlp_dim": 6, "is_gated": True, "has_shared_gate": True},
        {"num_selected_experts": 2, "activation": "silu"},
        QWEN_LIKE_OPTIONS,
    ],
)
def test_an_moe_layer_equals_numpy(random_params, reference_feed_forward, options):
    config = dataclasses.replace(CONFIG, **options)
    params = random_params(config)["layers_0"]["moe"]
    x, mask = inputs()
    layer = MoeLayer(config, 0)
    found = jax.jit(lambda params: layer.apply({"params": params}, x, mask))(params)
    expected = expected_moe(config, params, x, mask, reference_feed_forward)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not np.asarray(found)[~mask].any()  # the shared expert skips padding too


def test_dropped_tokens_still_go_through_the_shared_expert(random_params, reference_feed_forward):
    config = dataclasses.replace(
        CONFIG, shared_mlp_dim=6, eval_capacity_factor=1e-6, min_capacity=1
    )
    params = random_params(config)["layers_0"]["moe"]
    x, mask = inputs()
    layer = MoeLayer(config, 0)

    @jax.jit
    def output(params: Any):
        y, sown = layer.apply({"params": params}, x, mask, mutable=["router_observations"])
        return y, sown["router_observations"]["observation"][0]["is_kept"]

    y, is_kept = output(params)
    is_dropped = mask & ~np.asarray(is_kept)[..., 0]
    assert is_dropped.sum() >= 12  # 17 tokens, one slot for each of 5 experts
    shared = reference_feed_forward(flat(params["shared"]), x[is_dropped], join="/")
    np.testing.assert_allclose(np.asarray(y)[is_dropped], shared, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_shared_gate_of_zeros_halves_the_shared_expert(random_params):
    params = random_params(QWEN_LIKE)["layers_0"]["moe"]
    params["shared_gate"]["kernel"][:] = 0.0
    ungated = dataclasses.replace(QWEN_LIKE, has_shared_gate=False)
    alone = dataclasses.replace(QWEN_LIKE, has_shared_gate=False, shared_mlp_dim=0)
    x, mask = inputs()

    def output(config: ModelConfig) -> np.ndarray:
        used = {n: v for n, v in params.items() if config.has_shared_gate or n != "shared_gate"}
        if not config.shared_mlp_dim:
            del used["shared"]
        layer = MoeLayer(config, 0)
        return np.asarray(jax.jit(lambda used: layer.apply({"params": used}, x, mask))(used))

    half, whole, none = (output(config) for config in (QWEN_LIKE, ungated, alone))
    np.testing.assert_allclose(half - none, (whole - none) / 2, rtol=1e-4, atol=TOLERANCE)
    assert np.abs(whole - none).max() > 0.1


@pytest.mark.parametrize("options", OPTIONS)
def test_the_parameters_are_those_that_checkpoints_expect(options):
    config = dataclasses.replace(CONFIG, **options)
    found = named(architecture.abstract_params(config))
    assert {name: leaf.shape for name, leaf in found.items()} == expected_parameters(config)
    for name, leaf in found.items():
        assert (leaf.shape[0] == 5) == is_expert_array(name), name
    text = " ".join(found)
    assert ("wg" in text) == options["is_gated"]
    assert ("experts/wi_bias" in text) == options["has_mlp_bias"]
    assert ("mlp/wi/bias" in text) == options["has_mlp_bias"]
    assert ("moe/shared/" in text) == bool(options["shared_mlp_dim"])
    assert ("moe/shared_gate/kernel" in text) == options["has_shared_gate"]


def test_every_token_uses_the_shared_expert():
    plain = dataclasses.replace(QWEN_LIKE, shared_mlp_dim=0, has_shared_gate=False)
    with_shared, without = (architecture.count_parameters(c) for c in (QWEN_LIKE, plain))
    shared = 3 * 8 * 6 + 8  # wi, wg and wo of one layer, and the gate's column
    assert with_shared.total - without.total == with_shared.active - without.active == shared
    assert with_shared.total - with_shared.active == 3 * (3 * 8 * 12)  # 3 of 5 experts


def test_initial_values_of_all_networks_follow_gpt_2():
    config = dataclasses.replace(
        QWEN_LIKE, embed_dim=64, mlp_dim=64, shared_mlp_dim=64, has_mlp_bias=True
    )
    params = named(architecture.init_params(config, 3))
    residual = 0.02 / math.sqrt(2 * 2)
    for network, kernel in (("moe/experts", ""), ("moe/shared", "/kernel")):
        for name, deviation in (("wi", 0.02), ("wg", 0.02), ("wo", residual)):
            values = params[f"layers_0/{network}/{name}{kernel}"]
            assert np.std(values) == pytest.approx(deviation, rel=0.06), (network, name)
    assert np.std(params["layers_1/mlp/wg/kernel"]) == pytest.approx(0.02, rel=0.06)
    for name, values in params.items():
        if name.endswith("bias"):
            assert not np.any(values), name


def test_gated_networks_are_divided_among_devices_as_plain_ones():
    config = dataclasses.replace(QWEN_LIKE, num_experts=(4, 0), has_mlp_bias=True)
    mesh = make_mesh(expert_partitions=4, model_partitions=2)
    params = named(architecture.abstract_params(config, mesh))

    def shard(name: str) -> tuple[int, ...]:
        return params[name].sharding.shard_shape(params[name].shape)

    assert shard("layers_0/moe/experts/wg") == shard("layers_0/moe/experts/wi") == (1, 8, 6)
    assert shard("layers_0/moe/experts/wg_bias") == (1, 6)
    assert shard("layers_0/moe/shared/wg/kernel") == (8, 3)
    assert shard("layers_1/mlp/wg/kernel") == (8, 6)


def test_bfloat16_is_close_to_float32(random_params):
    params = random_params(QWEN_LIKE)
    # Every expert is selected: rounding may change the choice of tokens between two of them.
    config = dataclasses.replace(QWEN_LIKE, num_selected_experts=5)
    tokens = np.random.default_rng(5).integers(0, 32, (4, 8)).astype(np.int32)

    def logits(dtype: str) -> np.ndarray:
        model = Decoder(dataclasses.replace(config, dtype=dtype))
        return np.asarray(jax.jit(lambda params: model.apply({"params": params}, tokens))(params))

    exact, rounded = logits("float32"), logits("bfloat16")
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < BFLOAT16_TOLERANCE
