"""A router wider than its experts, as pruning with router "remap" leaves it: the old gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.config import ModelConfig
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.pruning.merging import merge_experts
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.prune import prune_layer
from uncurl_jax.pruning.statistics import (
    RouterStatistics,
    layer_statistics,
    make_manifest,
    to_host,
)

TOLERANCE = 1e-5
CONFIG = ModelConfig(
    num_experts=(6,),
    vocab_size=32,
    embed_dim=8,
    num_heads=1,
    mlp_dim=10,
    max_length=8,
    capacity_factor=None,
    eval_capacity_factor=None,
    dtype="float32",
)
ROW = (1, 0, 2, 0, 1, 0)
MAPPED = dataclasses.replace(CONFIG, num_experts=(3,), expert_map=(ROW,))


def make_inputs() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(3).normal(size=(4, 6, 8)).astype(np.float32)
    return x, np.arange(6) < np.asarray([[6], [3], [5], [6]])


def apply_moe_layer(config: ModelConfig, params: Any):
    x, mask = make_inputs()
    layer = MoeLayer(config, 0)
    apply = jax.jit(
        lambda params: layer.apply(
            {"params": params}, x, mask, mutable=["router_observations", "intermediates"]
        )
    )
    y, sown = apply(params)
    return np.asarray(y), sown["router_observations"]["observation"][0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("topk", [1, 2])
def test_tokens_go_to_the_experts_of_their_columns_at_the_old_gates(
    random_params, reference_feed_forward, topk, normalize
):
    options: dict[str, Any] = {"num_selected_experts": topk, "normalize_gates": normalize}
    config = dataclasses.replace(MAPPED, **options)
    params = random_params(config)["layers_0"]["moe"]
    assert params["router"]["kernel"].shape == (8, 6) and len(params["experts"]["wi"]) == 3
    y, observed = apply_moe_layer(config, params)
    x, mask = make_inputs()
    logits = x.astype(np.float64) @ params["router"]["kernel"]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = np.zeros_like(logits[..., :1] * x)
    for place in zip(*np.nonzero(mask), strict=True):
        top = np.argsort(-p[place])[:topk]
        # Two columns of one expert: their gates add up.
        for column in top:
            gate = p[place][column] / (p[place][top].sum() if normalize else 1.0)
            one = {name: array[ROW[column]] for name, array in params["experts"].items()}
            expected[place] += gate * reference_feed_forward(one, x[place])
    np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    # What is observed is the router's own choice among its columns.
    np.testing.assert_allclose(observed["logits"], logits, atol=TOLERANCE)
    np.testing.assert_array_equal(
        observed["expert_index"][mask], np.argsort(-p, axis=-1)[mask][:, :topk]
    )


def test_a_table_of_the_identity_changes_nothing(random_params):
    params = random_params(CONFIG)["layers_0"]["moe"]
    config = dataclasses.replace(CONFIG, expert_map=(tuple(range(6)),))
    np.testing.assert_array_equal(
        apply_moe_layer(config, params)[0], apply_moe_layer(CONFIG, params)[0]
    )


@pytest.mark.parametrize("topk", [1, 2])
def test_pruned_copies_with_the_old_router_are_the_unpruned_model(copied_params, topk):
    """Three distinct experts, each twice: with top-2 both gates of a pair go to one expert."""
    config = dataclasses.replace(CONFIG, num_selected_experts=topk)
    params = copied_params(config, 3)
    moe = params["layers_0"]["moe"]
    _, observed = apply_moe_layer(config, moe)
    sums = layer_statistics(
        observed["logits"],
        observed["expert_index"],
        observed["gate"],
        observed["is_kept"],
        jnp.asarray(make_inputs()[1]),
    )
    manifest = make_manifest(
        checkpoint_hash="0" * 64,
        num_experts=config.num_experts,
        num_selected_experts=topk,
        task="random",
        split="train",
        vocabulary_hash="1" * 64,
        seed=0,
    )
    statistics = RouterStatistics({0: to_host(sums)}, manifest)
    plan = make_plan(statistics, num_experts=3, router="remap")
    assert plan.layers[0].cluster_sizes == (2, 2, 2)
    pruned = prune_layer(plan, 0, moe["router"]["kernel"], moe["experts"], init_stddev=0.02)
    assert pruned.router.tobytes() == moe["router"]["kernel"].tobytes()
    merged = {"router": {"kernel": pruned.router}, "experts": pruned.experts}
    remapped = dataclasses.replace(config, num_experts=plan.num_experts, expert_map=plan.expert_map)
    pruned_params = {**params, "layers_0": {**params["layers_0"], "moe": merged}}
    tokens = np.random.default_rng(4).integers(0, 32, (4, 8)).astype(np.int32)

    def logits(config: ModelConfig, params: Any) -> np.ndarray:
        model = Decoder(config)
        return np.asarray(jax.jit(lambda params: model.apply({"params": params}, tokens))(params))

    before, after = logits(config, params), logits(remapped, pruned_params)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE)


def test_merged_experts_with_the_old_router_use_the_old_gates(random_params):
    # Not copies this time: y is exactly the old gates times the merged experts.
    params = random_params(CONFIG)["layers_0"]["moe"]
    weights = np.asarray([1 / 2, 1 / 3, 1, 1 / 3, 1 / 2, 1 / 3], np.float32)
    merged = merge_experts(params["experts"], np.asarray(ROW), weights)
    spread = {name: array[list(ROW)] for name, array in merged.items()}
    wide, _ = apply_moe_layer(CONFIG, {**params, "experts": spread})
    narrow, _ = apply_moe_layer(MAPPED, {**params, "experts": merged})
    np.testing.assert_allclose(narrow, wide, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_parameters_are_a_wide_router_and_few_experts():
    config = dataclasses.replace(CONFIG, num_experts=(3, 0, 2), expert_map=(ROW, None, None))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    assert shapes == expected_parameters(config)
    assert shapes["layers_0/moe/router/kernel"] == (8, 6)
    assert shapes["layers_0/moe/experts/wi"] == (3, 8, 10)
    assert shapes["layers_2/moe/router/kernel"] == (8, 2)
