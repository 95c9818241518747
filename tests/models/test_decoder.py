from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.config import ModelConfig
from uncurl_jax.models import architecture, decoder
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.partitioning import make_mesh

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2
CONFIG = ModelConfig(
    num_experts=(3, 0),
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    mlp_dim=12,
    max_length=8,
    capacity_factor=None,
    eval_capacity_factor=None,
    dtype="float32",
)
DENSE = dataclasses.replace(CONFIG, num_experts=(0, 0))
# Shapes of other families: Mixtral, Qwen3-MoE, Qwen2-MoE and OLMoE differ in these.
LLAMA = {
    "position_embedding": "rotary",
    "norm": "rms_norm",
    "attention_bias": "none",
    "has_mlp_bias": False,
    "is_gated": True,
    "activation": "silu",
    "has_tied_embeddings": False,
}
FAMILIES = {
    "gpt2": {},
    "grouped_queries": LLAMA | {"num_kv_heads": 1},
    "norms_per_head": LLAMA | {"qk_norm": "head", "attention_head_dim": 6, "dense_mlp_dim": 20},
    "shared_expert": LLAMA
    | {"attention_bias": "qkv", "shared_mlp_dim": 10, "has_shared_gate": True},
    "norms_over_heads": LLAMA | {"qk_norm": "all", "has_tied_embeddings": True},
}
family = pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)

GOLDEN_SHAPES = {
    "final_norm/bias": (16,),
    "final_norm/scale": (16,),
    "layers_0/attention/key/bias": (2, 8),
    "layers_0/attention/key/kernel": (16, 2, 8),
    "layers_0/attention/out/bias": (16,),
    "layers_0/attention/out/kernel": (2, 8, 16),
    "layers_0/attention/query/bias": (2, 8),
    "layers_0/attention/query/kernel": (16, 2, 8),
    "layers_0/attention/value/bias": (2, 8),
    "layers_0/attention/value/kernel": (16, 2, 8),
    "layers_0/moe/experts/wi": (3, 16, 12),
    "layers_0/moe/experts/wi_bias": (3, 12),
    "layers_0/moe/experts/wo": (3, 12, 16),
    "layers_0/moe/experts/wo_bias": (3, 16),
    "layers_0/moe/router/kernel": (16, 3),
    "layers_0/pre_attention_norm/bias": (16,),
    "layers_0/pre_attention_norm/scale": (16,),
    "layers_0/pre_mlp_norm/bias": (16,),
    "layers_0/pre_mlp_norm/scale": (16,),
    "layers_1/attention/key/bias": (2, 8),
    "layers_1/attention/key/kernel": (16, 2, 8),
    "layers_1/attention/out/bias": (16,),
    "layers_1/attention/out/kernel": (2, 8, 16),
    "layers_1/attention/query/bias": (2, 8),
    "layers_1/attention/query/kernel": (16, 2, 8),
    "layers_1/attention/value/bias": (2, 8),
    "layers_1/attention/value/kernel": (16, 2, 8),
    "layers_1/mlp/wi/bias": (12,),
    "layers_1/mlp/wi/kernel": (16, 12),
    "layers_1/mlp/wo/bias": (16,),
    "layers_1/mlp/wo/kernel": (12, 16),
    "layers_1/pre_attention_norm/bias": (16,),
    "layers_1/pre_attention_norm/scale": (16,),
    "layers_1/pre_mlp_norm/bias": (16,),
    "layers_1/pre_mlp_norm/scale": (16,),
    "position_embedder/embedding": (8, 16),
    "token_embedder/embedding": (32, 16),
}


def named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def make_inputs(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 32, (batch, length)).astype(np.int32)


def forward(config: ModelConfig, params: Any, inputs: np.ndarray, mask: Any = None) -> np.ndarray:
    apply = jax.jit(
        lambda params, inputs, mask: Decoder(config).apply({"params": params}, inputs, mask)
    )
    return np.asarray(apply(params, inputs, mask))


def test_the_shape_tree_is_the_golden_one():
    shapes = {
        name: leaf.shape for name, leaf in named(architecture.abstract_params(CONFIG)).items()
    }
    assert shapes == GOLDEN_SHAPES


@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (8, 1, 5)])
def test_the_parameters_are_those_that_checkpoints_expect(counts: tuple[int, ...]):
    config = dataclasses.replace(CONFIG, num_experts=counts)
    found = named(architecture.abstract_params(config))
    assert {name: leaf.shape for name, leaf in found.items()} == expected_parameters(config)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float32")}


@family
def test_the_parameters_of_every_family_are_those_that_checkpoints_expect(fields: dict[str, Any]):
    config = dataclasses.replace(CONFIG, **fields)
    found = named(architecture.abstract_params(config))
    assert {name: leaf.shape for name, leaf in found.items()} == expected_parameters(config)


def test_initial_values_follow_gpt_2_and_the_seed():
    config = dataclasses.replace(CONFIG, embed_dim=64, mlp_dim=64, num_experts=(4, 0))
    params = named(architecture.init_params(config, 3))
    assert np.std(params["layers_0/moe/experts/wi"]) == pytest.approx(0.02, rel=0.05)
    residual = 0.02 / math.sqrt(2 * 2)
    assert np.std(params["layers_0/moe/experts/wo"]) == pytest.approx(residual, rel=0.05)
    assert np.std(params["layers_1/mlp/wo/kernel"]) == pytest.approx(residual, rel=0.05)
    assert np.std(params["layers_1/attention/out/kernel"]) == pytest.approx(residual, rel=0.05)
    assert not np.any(params["layers_0/moe/experts/wi_bias"])
    np.testing.assert_array_equal(params["final_norm/scale"], 1.0)
    again = named(architecture.init_params(config, 3))
    other = named(architecture.init_params(config, 4))
    for name, value in params.items():
        np.testing.assert_array_equal(value, again[name])
        is_constant = np.ptp(value) == 0
        assert is_constant or not np.array_equal(value, other[name])


def test_a_dense_decoder_equals_a_numpy_forward_pass(random_params, reference_gelu):
    params = random_params(DENSE)
    inputs = make_inputs(2, 5)
    p = {name: np.asarray(value, np.float64) for name, value in named(params).items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + DENSE.norm_epsilon)
        return scaled * p[f"{name}/scale"] + p[f"{name}/bias"]

    x = p["token_embedder/embedding"][inputs] + p["position_embedder/embedding"][:5]
    for layer in ("layers_0", "layers_1"):
        y = norm(x, f"{layer}/pre_attention_norm")
        q, k, v = (
            np.einsum("bld,dhk->bhlk", y, p[f"{layer}/attention/{name}/kernel"])
            + p[f"{layer}/attention/{name}/bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(DENSE.head_dim)
        scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhlk,hkd->bld", weights @ v, p[f"{layer}/attention/out/kernel"])
        x = x + out + p[f"{layer}/attention/out/bias"]
        y = norm(x, f"{layer}/pre_mlp_norm")
        hidden = reference_gelu(y @ p[f"{layer}/mlp/wi/kernel"] + p[f"{layer}/mlp/wi/bias"])
        x = x + hidden @ p[f"{layer}/mlp/wo/kernel"] + p[f"{layer}/mlp/wo/bias"]
    expected = norm(x, "final_norm") @ p["token_embedder/embedding"].T
    found = forward(DENSE, params, inputs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
def test_a_rotary_decoder_equals_a_numpy_forward_pass(random_params, qk_norm: str):
    config = dataclasses.replace(
        DENSE, **LLAMA, num_heads=4, num_kv_heads=2, attention_head_dim=6, qk_norm=qk_norm
    )
    params = random_params(config)
    inputs = make_inputs(2, 7)
    p = {name: np.asarray(value, np.float64) for name, value in named(params).items()}

    def rms(x: np.ndarray, name: str, axes: Any = -1) -> np.ndarray:
        square = (x**2).mean(axes, keepdims=True)
        return x / np.sqrt(square + config.norm_epsilon) * p[f"{name}/scale"]

    def rotated(x: np.ndarray) -> np.ndarray:  # as complex numbers: coordinate i and i + 3
        frequency = config.rotary_base ** (-np.arange(3) / 3)
        turn = np.exp(1j * np.arange(7)[:, None, None] * frequency)
        z = (x[..., :3] + 1j * x[..., 3:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["token_embedder/embedding"][inputs]
    for layer in ("layers_0", "layers_1"):
        y = rms(x, f"{layer}/pre_attention_norm")
        q, k, v = (
            np.einsum("bld,dhk->blhk", y, p[f"{layer}/attention/{name}/kernel"])
            for name in ("query", "key", "value")
        )
        if qk_norm != "none":
            axes = -1 if qk_norm == "head" else (-2, -1)
            q = rms(q, f"{layer}/attention/query_norm", axes)
            k = rms(k, f"{layer}/attention/key_norm", axes)
        q, k = rotated(q), rotated(k)
        k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
        scores = np.einsum("bqhk,blhk->bhql", q, k) / math.sqrt(6)
        scores = np.where(np.tril(np.ones((7, 7), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhql,blhk->bqhk", weights, v)
        x = x + np.einsum("bqhk,hkd->bqd", out, p[f"{layer}/attention/out/kernel"])
        y = rms(x, f"{layer}/pre_mlp_norm")
        gate = y @ p[f"{layer}/mlp/wg/kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (y @ p[f"{layer}/mlp/wi/kernel"])
        x = x + hidden @ p[f"{layer}/mlp/wo/kernel"]
    expected = rms(x, "final_norm") @ p["output_embedder/embedding"].T
    found = forward(config, params, inputs)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_rotary_attention_depends_on_distances_alone(random_params):
    config = dataclasses.replace(CONFIG, **LLAMA)
    params = random_params(config)
    inputs = make_inputs(2, 6)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), inputs.shape)
    apply = jax.jit(
        lambda positions: Decoder(config).apply({"params": params}, inputs, None, positions)
    )
    np.testing.assert_allclose(apply(positions), apply(positions + 100), rtol=1e-4, atol=1e-4)
    assert not np.allclose(apply(positions), apply(positions * 3), rtol=1e-2, atol=1e-2)


def test_padding_at_the_end_of_a_row_changes_nothing_before_it(random_params):
    params = random_params(CONFIG)
    inputs = make_inputs(2, 8)
    mask = np.arange(8) < np.asarray([[5], [8]])
    changed = np.where(mask, inputs, (inputs + 1) % 32)
    one, other = (forward(CONFIG, params, array, mask) for array in (inputs, changed))
    np.testing.assert_allclose(one[mask], other[mask], atol=TOLERANCE)


@family
def test_decoding_with_the_cache_equals_the_full_forward_pass(
    random_params, fields: dict[str, Any]
):
    # Capacity would drop tokens in the full pass; the cached one is dropless, and so is this model.
    config = dataclasses.replace(CONFIG, num_selected_experts=2, **fields)
    params = random_params(config)
    inputs = make_inputs(3, 8)
    full = forward(config, params, inputs)
    lengths = np.asarray([2, 5, 3])
    model = Decoder(config)

    @jax.jit
    def prefill(inputs: jax.Array, mask: jax.Array):
        return model.apply({"params": params}, inputs, mask, decode=True, mutable=["cache"])

    @jax.jit
    def step(cache: Any, token: jax.Array, positions: jax.Array):
        variables = {"params": params, **cache}
        return model.apply(variables, token, positions=positions, decode=True, mutable=["cache"])

    mask = np.arange(5) < lengths[:, None]
    logits, cache = prefill(np.where(mask, inputs[:, :5], 0), mask)
    np.testing.assert_allclose(logits[mask], full[:, :5][mask], rtol=TOLERANCE, atol=TOLERANCE)
    rows = np.arange(3)
    for offset in range(3):  # row 1 reaches the last position
        positions = lengths + offset
        logits, cache = step(cache, inputs[rows, positions][:, None], positions[:, None])
        np.testing.assert_allclose(
            logits[:, 0], full[rows, positions], rtol=TOLERANCE, atol=TOLERANCE
        )


def test_bfloat16_is_close_to_float32(random_params):
    params = random_params(CONFIG)
    inputs = make_inputs(4, 8)
    exact = forward(CONFIG, params, inputs)
    rounded = forward(dataclasses.replace(CONFIG, dtype="bfloat16"), params, inputs)
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < BFLOAT16_TOLERANCE


def test_a_sequence_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="must not be longer than max_length=8, got 9"):
        jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


def test_metrics_of_layers_are_summed_or_averaged():
    def sown(auxiliary_loss: float, usage: float) -> dict[str, Any]:
        values = {"auxiliary_loss": auxiliary_loss, "expert_usage": usage}
        return {"moe": {name: (jnp.float32(value),) for name, value in values.items()}}

    found = decoder.moe_metrics({"layers_0": sown(0.5, 0.25), "layers_2": sown(1.0, 0.75)})
    assert float(found["auxiliary_loss"]) == 1.5
    assert float(found["expert_usage"]) == 0.5
    assert set(found) == set(decoder.MOE_METRICS)
    assert {float(value) for value in decoder.moe_metrics({}).values()} == {0.0}


def test_token_log_probabilities_worked_by_hand():
    logits = jnp.log(jnp.asarray([[[0.25, 0.75], [2.0, 2.0]]]))
    found = jax.jit(decoder.token_log_probabilities)(logits, jnp.asarray([[1, 0]]))
    np.testing.assert_allclose(found, np.log([[0.75, 0.5]]), rtol=TOLERANCE)


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_use():
    counts = architecture.count_parameters(CONFIG)
    assert counts.total == sum(math.prod(shape) for shape in GOLDEN_SHAPES.values())
    one_expert = 16 * 12 + 12 + 12 * 16 + 16
    assert counts.total - counts.active == 2 * one_expert
    top_2 = architecture.count_parameters(dataclasses.replace(CONFIG, num_selected_experts=2))
    assert counts.total - top_2.active == one_expert
    assert architecture.count_parameters(DENSE).total == architecture.count_parameters(DENSE).active


def test_parameters_are_divided_as_the_table_of_axes_says():
    config = dataclasses.replace(CONFIG, num_experts=(4, 3))
    mesh = make_mesh(expert_partitions=4, model_partitions=2)
    params = named(architecture.abstract_params(config, mesh))

    def shard(name: str) -> tuple[int, ...]:
        return params[name].sharding.shard_shape(params[name].shape)

    assert shard("layers_0/moe/experts/wi") == (1, 16, 6)
    assert shard("layers_1/moe/experts/wi") == (3, 4, 6)  # 3 experts do not divide among 4
    assert shard("layers_0/attention/query/kernel") == (16, 1, 8)
    assert shard("token_embedder/embedding") == (16, 16)
    assert shard("final_norm/scale") == (16,)


def test_initial_values_do_not_depend_on_the_mesh():
    config = dataclasses.replace(CONFIG, num_experts=(3,))
    mesh = make_mesh(expert_partitions=4, model_partitions=2)
    alone, divided = (named(architecture.init_params(config, 0, where)) for where in (None, mesh))
    for name, value in divided.items():
        np.testing.assert_allclose(value, alone[name], atol=TOLERANCE, err_msg=name)
        spec = named(architecture.abstract_params(config, mesh))[name].sharding
        assert value.sharding.is_equivalent_to(spec, value.ndim)
