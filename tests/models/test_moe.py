from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.expert_parallel import Experts
from uncurl_jax.models.moe import MoeLayer

TOLERANCE = 1e-5
CONFIG = ModelConfig(
    num_experts=(5,),
    vocab_size=8,
    embed_dim=8,
    num_heads=1,
    mlp_dim=12,
    max_length=16,
    min_capacity=1,
    auxiliary_loss_weight=0.5,
    router_z_loss_weight=0.25,
    dtype="float32",
)
BATCH, LENGTH = 3, 7


def present(experts: Experts) -> dict[str, Any]:
    return {name: array for name, array in experts._asdict().items() if array is not None}


@pytest.fixture
def params(random_experts) -> dict[str, Any]:
    experts = random_experts(5, CONFIG.embed_dim, CONFIG.mlp_dim)
    kernel = np.random.default_rng(1).normal(0, 1, (CONFIG.embed_dim, 5)).astype(np.float32)
    return {"router": {"kernel": kernel}, "experts": present(experts)}


@pytest.fixture
def inputs() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(2).normal(size=(BATCH, LENGTH, CONFIG.embed_dim))
    mask = np.arange(LENGTH) < np.asarray([[7], [4], [6]])
    return x.astype(np.float32), mask


@functools.cache
def compiled(config: ModelConfig, num_groups: int | None, is_training: bool, is_dropless: bool):
    layer = MoeLayer(config, 0, num_groups=num_groups)
    return jax.jit(
        lambda params, x, mask: layer.apply(
            {"params": params},
            x,
            mask,
            is_training=is_training,
            is_dropless=is_dropless,
            mutable=["intermediates", "router_observations"],
        )
    )


def run(
    config: ModelConfig,
    params: Any,
    x: Any,
    mask: Any,
    num_groups: int | None = None,
    *,
    is_training: bool = False,
    is_dropless: bool = False,
):
    apply = compiled(config, num_groups, is_training, is_dropless)
    y, sown = apply(params, x, mask)
    metrics = {name: float(value[0]) for name, value in sown["intermediates"].items()}
    return np.asarray(y), metrics, sown["router_observations"]["observation"][0]


def reference_choice(params: Any, x: np.ndarray, config: ModelConfig):
    logits = x.reshape(-1, x.shape[-1]).astype(np.float64) @ params["router"]["kernel"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    index = np.argsort(-p, axis=-1, kind="stable")[:, : config.num_selected_experts]
    gate = np.take_along_axis(p, index, axis=-1)
    if config.normalize_gates:
        gate = gate / gate.sum(-1, keepdims=True)
    return logits, p, index, gate


@pytest.mark.parametrize(
    ("topk", "normalize", "factor", "num_groups"),
    [
        (1, False, None, None),
        (2, True, None, None),
        (1, False, 0.7, None),
        (2, False, 0.7, None),
        (2, True, 0.6, 4),  # 21 tokens in 4 groups of 6: three places are filling
    ],
)
def test_the_layer_equals_a_loop_over_tokens(
    params, inputs, reference_experts, topk, normalize, factor, num_groups
):
    config = dataclasses.replace(
        CONFIG,
        num_selected_experts=topk,
        normalize_gates=normalize,
        eval_capacity_factor=factor,
    )
    x, mask = inputs
    y, metrics, observation = run(config, params, x, mask, num_groups)
    logits, p, index, gate = reference_choice(params, x, config)

    flat_x, flat_mask = x.reshape(-1, x.shape[-1]), mask.reshape(-1)
    size = -(-len(flat_x) // (num_groups or 1))
    capacity = config.expert_capacity(0, size, is_training=False)
    parts = [
        reference_experts(
            flat_x[part],
            index[part],
            gate[part],
            flat_mask[part],
            Experts(**params["experts"]),
            capacity,
        )
        for part in (slice(i, i + size) for i in range(0, len(flat_x), size))
    ]
    expected, is_kept = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(observation["is_kept"].reshape(is_kept.shape), is_kept)
    np.testing.assert_array_equal(observation["expert_index"].reshape(index.shape), index)
    assert is_kept[flat_mask].all() == (factor is None)

    count = flat_mask.sum()
    fraction = np.bincount(index[flat_mask].ravel(), minlength=5) / (count * topk)
    balance = 5 * fraction @ p[flat_mask].mean(0)
    z_loss = (np.log(np.exp(logits[flat_mask]).sum(-1)) ** 2).mean()
    left_behind = (~is_kept[flat_mask].any(-1)).mean()
    expected_metrics = {
        "auxiliary_loss": 0.5 * balance,
        "router_z_loss": 0.25 * z_loss,
        "fraction_tokens_left_behind": left_behind,
        "router_confidence": gate[is_kept].mean(),
    }
    if capacity is not None:
        slots = capacity * 5 * (num_groups or 1)
        expected_metrics["expert_usage"] = is_kept.sum() / slots
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=TOLERANCE, err_msg=name)
    assert 0 < metrics["expert_usage"] <= 1


@pytest.mark.parametrize("factor", [None, 0.6])
def test_masked_tokens_take_no_slot_and_count_nowhere(params, inputs, factor):
    config = dataclasses.replace(CONFIG, num_selected_experts=2, eval_capacity_factor=factor)
    x, mask = inputs
    y, metrics, observation = run(config, params, x, mask)
    changed = np.where(mask[..., None], x, 100.0 * np.roll(x, 1))
    changed_y, changed_metrics, _ = run(config, params, changed, mask)
    np.testing.assert_array_equal(y, changed_y)
    assert metrics == changed_metrics
    assert not y[~mask].any()
    assert not np.asarray(observation["is_kept"])[~mask].any()


def test_a_layer_without_any_token_gives_zeros_and_finite_metrics(params, inputs):
    y, metrics, _ = run(CONFIG, params, inputs[0], np.zeros_like(inputs[1]))
    assert not y.any()
    assert np.isfinite(list(metrics.values())).all()


def test_training_has_its_own_capacity(params, inputs):
    config = dataclasses.replace(CONFIG, capacity_factor=0.4, eval_capacity_factor=None)
    x, mask = inputs
    trained, evaluated = (
        run(config, params, x, mask, is_training=is_training) for is_training in (True, False)
    )
    # 21 tokens * 0.4 / 5 experts, rounded up: 2 slots for each of 5 experts.
    assert 0 < np.asarray(trained[2]["is_kept"]).sum() <= 10
    assert evaluated[1]["fraction_tokens_left_behind"] == 0.0
    assert trained[1]["fraction_tokens_left_behind"] > 0.0
    dropless = run(config, params, x, mask, is_training=True, is_dropless=True)
    np.testing.assert_allclose(dropless[0], evaluated[0], atol=TOLERANCE)


def test_jitter_moves_the_router_in_training_only(params, inputs):
    config = dataclasses.replace(CONFIG, router_jitter=0.5, eval_capacity_factor=None)
    layer = MoeLayer(config, 0)
    x, mask = inputs

    @jax.jit
    def logits(key: jax.Array) -> Any:
        _, sown = layer.apply(
            {"params": params},
            x,
            mask,
            is_training=True,
            mutable=["router_observations"],
            rngs={"jitter": key},
        )
        return sown["router_observations"]["observation"][0]["logits"]

    one, again, other = (logits(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    plain = run(config, params, x, mask)[2]["logits"]
    np.testing.assert_allclose(plain, x @ params["router"]["kernel"], atol=TOLERANCE)


def test_permuting_the_hidden_units_of_an_expert_leaves_the_output_unchanged(params, inputs):
    x, mask = inputs
    y = run(CONFIG, params, x, mask)[0]
    order = np.random.default_rng(3).permutation(CONFIG.mlp_dim)
    experts = {name: array.copy() for name, array in params["experts"].items()}
    experts["wi"][2] = experts["wi"][2][:, order]
    experts["wi_bias"][2] = experts["wi_bias"][2][order]
    experts["wo"][2] = experts["wo"][2][order]
    permuted = run(CONFIG, {**params, "experts": experts}, x, mask)[0]
    np.testing.assert_allclose(y, permuted, atol=TOLERANCE)
    assert np.abs(y).max() > 0.1
