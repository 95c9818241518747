"""Identities that hold whatever a model was trained on: pruning exact copies loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.token_cache import Batch, TokenCache, build_token_cache
from uncurl_jax.evaluation.calibration import calibrate_checkpoint, router_observer
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.pruning.calibration import calibrate
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.prune import prune_layer
from uncurl_jax.pruning.statistics import make_manifest

TOLERANCE = 1e-5
DISTINCT, COPIES = 3, 2
CONFIG = ModelConfig(
    num_experts=(DISTINCT * COPIES, 0),
    vocab_size=260,
    embed_dim=16,
    num_heads=2,
    mlp_dim=10,
    max_length=16,
    capacity_factor=None,
    eval_capacity_factor=None,
    dtype="float32",
)


def make_batch() -> Batch:
    generator = np.random.default_rng(12)
    tokens = generator.integers(3, 260, (16, 17)).astype(np.int32)
    mask = np.arange(16) < generator.integers(8, 17, (16, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32), mask)


def logits_of(config: ModelConfig, params: Any) -> np.ndarray:
    batch = make_batch()
    apply = jax.jit(
        lambda params: Decoder(config).apply({"params": params}, batch.inputs, batch.mask)
    )
    return np.asarray(apply(params))[batch.mask]


def prune_in_memory(
    params: Any, num_experts: int, config: ModelConfig = CONFIG, **options: Any
) -> tuple[PruningPlan, Any]:
    observe = router_observer(config)
    manifest = make_manifest(
        checkpoint_hash="0" * 64,
        num_experts=config.num_experts,
        num_selected_experts=config.num_selected_experts,
        task="random",
        split="train",
        vocabulary_hash="1" * 64,
        seed=0,
    )
    statistics = calibrate(lambda batch: observe(params, batch), [make_batch()], manifest=manifest)
    options = {"router": "mean", "eval_capacity_factor": None, **options}
    plan = make_plan(statistics, num_experts=num_experts, **options)
    moe = params["layers_0"]["moe"]
    pruned = prune_layer(plan, 0, moe["router"]["kernel"], moe["experts"], init_stddev=0.02)
    moe = {**moe, "router": {"kernel": pruned.router}, "experts": pruned.experts}
    return plan, {**params, "layers_0": {**params["layers_0"], "moe": moe}}


def test_equal_copies_are_pruned_without_loss(copied_params):
    params = copied_params(CONFIG, DISTINCT)
    plan, pruned = prune_in_memory(params, DISTINCT, gate_compensation=True)
    assert plan.layer(0).cluster_sizes == (COPIES,) * DISTINCT
    before = logits_of(CONFIG, params)
    after = logits_of(CONFIG.with_experts(DISTINCT), pruned)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE)


SMALL = dataclasses.replace(CONFIG, num_experts=(DISTINCT * COPIES,))
QWEN_LIKE = dataclasses.replace(
    SMALL,
    is_gated=True,
    activation="silu",
    has_mlp_bias=False,
    shared_mlp_dim=6,
    has_shared_gate=True,
)


@pytest.mark.parametrize("config", [QWEN_LIKE, dataclasses.replace(SMALL, is_gated=True)])
def test_equal_copies_of_gated_experts_are_pruned_without_loss(copied_params, config):
    params = copied_params(config, DISTINCT)
    plan, pruned = prune_in_memory(params, DISTINCT, config, gate_compensation=True)
    assert plan.layer(0).cluster_sizes == (COPIES,) * DISTINCT
    before = logits_of(config, params)
    after = logits_of(config.with_experts(DISTINCT), pruned)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE)


def test_with_normalised_gates_of_top_1_no_compensation_is_needed(copied_params):
    config = dataclasses.replace(SMALL, normalize_gates=True)
    params = copied_params(config, DISTINCT)
    _, pruned = prune_in_memory(params, DISTINCT, config)
    before = logits_of(config, params)
    after = logits_of(config.with_experts(DISTINCT), pruned)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE)


def test_top_2_routing_sends_pairs_of_copies_to_two_experts_and_loses_that(copied_params):
    # The two best columns are copies of one expert; the merged router picks its second best too.
    config = dataclasses.replace(QWEN_LIKE, num_selected_experts=2, normalize_gates=True)
    params = copied_params(config, DISTINCT)
    before = logits_of(config, params)
    _, merged = prune_in_memory(params, DISTINCT, config)
    change = logits_of(config.with_experts(DISTINCT), merged) - before
    assert np.abs(change).max() > 0.1
    # The old router over merged experts adds both gates up and loses nothing.
    plan, kept = prune_in_memory(params, DISTINCT, config, router="remap")
    remapped = dataclasses.replace(config, num_experts=(DISTINCT,), expert_map=plan.expert_map)
    np.testing.assert_allclose(logits_of(remapped, kept), before, rtol=TOLERANCE, atol=TOLERANCE)
    # As many experts as before, in another order, lose nothing either.
    _, same = prune_in_memory(params, DISTINCT * COPIES, config)
    np.testing.assert_allclose(logits_of(config, same), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_without_gate_compensation_the_merged_branch_grows(copied_params):
    params = copied_params(CONFIG, DISTINCT)
    _, pruned = prune_in_memory(params, DISTINCT)
    change = logits_of(CONFIG.with_experts(DISTINCT), pruned) - logits_of(CONFIG, params)
    assert np.abs(change).max() > 0.1


def test_as_many_experts_as_before_changes_nothing_but_the_order(copied_params):
    params = copied_params(CONFIG, DISTINCT, 0.1)
    plan, same = prune_in_memory(params, DISTINCT * COPIES, gate_compensation=True)
    labels = np.asarray(plan.layer(0).labels)
    assert sorted(labels) == list(range(DISTINCT * COPIES))
    old, new = params["layers_0"]["moe"], same["layers_0"]["moe"]
    np.testing.assert_array_equal(new["router"]["kernel"][:, labels], old["router"]["kernel"])
    for name, array in old["experts"].items():
        np.testing.assert_array_equal(new["experts"][name][labels], array, err_msg=name)
    np.testing.assert_allclose(logits_of(CONFIG, same), logits_of(CONFIG, params), atol=TOLERANCE)


def test_copies_that_share_the_tokens_are_pruned_without_loss_from_file_to_file(
    copied_params, tmp_path: Path
):
    params = copied_params(CONFIG, DISTINCT, 1e-7)
    words = [
        "pruning",
        "keeps",
        "what",
        "the",
        "task",
        "needs",
        "and",
        "merges",
        "the",
        "rest",
        "of",
        "the",
        "experts",
        "\n\n",
    ]
    text = " ".join(np.random.default_rng(13).choice(words, 300))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    build_token_cache(
        LanguageModelingTask("text", "text.txt"),
        vocabulary="bytes",
        out=tmp_path / "cache",
        max_length=16,
        data_dir=tmp_path,
    )
    cache = TokenCache.open(tmp_path / "cache" / "train")
    with CheckpointStore(
        tmp_path / "source",
        model_config=CONFIG,
        provenance={"created_by": "test"},
        vocabulary=cache.manifest["vocabulary"],
    ) as store:
        store.save(1, params)
    statistics = calibrate_checkpoint(
        tmp_path / "source", cache, out=tmp_path / "statistics.npz", batch_size=8, quiet=True
    )
    # Every copy works, so that the merge is a mean of aligned experts and no mere choice.
    assert statistics.layers[0].selected.min() > 0
    plan = make_plan(
        statistics,
        num_experts=DISTINCT,
        router="mean",
        gate_compensation=True,
        eval_capacity_factor=None,
    )
    prune_checkpoint(tmp_path / "source", plan, tmp_path / "pruned")
    pruned = load_model(tmp_path / "pruned")
    assert pruned.config == dataclasses.replace(CONFIG, num_experts=(DISTINCT, 0))
    before = logits_of(CONFIG, params)
    after = logits_of(pruned.config, pruned.params)
    np.testing.assert_allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE)
