"""kill -9 in the middle: nothing half-written is taken for a result, the same command completes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import ModelConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics, make_manifest


@pytest.fixture
def larger_checkpoint(tmp_path):
    """Twelve layers of random values, and a plan for it: enough to be caught in the middle."""
    config = ModelConfig(
        num_experts=(8,) * 12,
        vocab_size=260,
        embed_dim=32,
        num_heads=2,
        mlp_dim=64,
        max_length=32,
        dtype="float32",
    )
    generator = np.random.default_rng(0)
    params: dict = {}
    for name, shape in expected_parameters(config).items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = generator.standard_normal(shape).astype(np.float32)
    directory = tmp_path / "source"
    with CheckpointStore(
        directory,
        model_config=config,
        provenance={"created_by": "test"},
        vocabulary=load_vocabulary("bytes").describe(),
    ) as store:
        store.save(1, params)
    layers = {}
    for layer in config.moe_layers:
        h = generator.standard_normal((200, 8))
        p = np.exp(h) / np.exp(h).sum(axis=1, keepdims=True)
        chosen = np.eye(8)[h.argmax(axis=1)]
        layers[layer] = LayerStatistics(
            tokens=200,
            gram=h.T @ h,
            logit_sum=h.sum(axis=0),
            selected=chosen.sum(axis=0),
            kept=chosen.sum(axis=0),
            gate_mass=(chosen * p).sum(axis=0),
            prob_mass=p.sum(axis=0),
            coactivation=chosen.T @ chosen,
            routed_prob=chosen.T @ p,
        )
    manifest = make_manifest(
        checkpoint_hash=layout.fingerprint(directory),
        num_experts=config.num_experts,
        num_selected_experts=1,
        task="random",
        split="train",
        vocabulary_hash="0" * 64,
        seed=0,
    )
    make_plan(RouterStatistics(layers, manifest), num_experts=3).save(tmp_path / "plan.json")
    return directory


def test_a_killed_prune_leaves_no_checkpoint_and_the_same_command_makes_it(
    larger_checkpoint, tmp_path, kill_when, run_alone, uncurl
):
    arguments = ("prune", "--checkpoint", "source", "--plan", "plan.json", "--out", "pruned")

    def is_writing() -> bool:
        journals = tmp_path.glob(".pruned.*.partial/journal.jsonl")
        return any(path.read_bytes().count(b"\n") > 2 for path in journals)

    kill_when(tmp_path, is_writing, *arguments)
    assert not (tmp_path / "pruned").exists()
    leftovers = list(tmp_path.glob(".pruned.*"))
    assert leftovers
    for leftover in [*leftovers, *leftovers[0].glob("checkpoint"), *leftovers[0].glob("*/*_0")]:
        with pytest.raises(InputError):
            layout.resolve(leftover)
    assert uncurl("inspect", "pruned").status == 2
    done = run_alone(tmp_path, *arguments)
    plan = PruningPlan.load(tmp_path / "plan.json")
    expected = prune_checkpoint(larger_checkpoint, plan, tmp_path / "uninterrupted")
    assert done.result["fingerprint"] == expected["fingerprint"]
    assert layout.fingerprint(tmp_path / "pruned") == expected["fingerprint"]


def test_a_killed_calibration_goes_on_to_the_same_statistics(world, tmp_path, kill_when, run_all):
    synthetic.write_tasks(tmp_path / "data", num_train=600, num_validation=1, num_documents=1)
    cache = "cache --task synthetic_topic --data_dir data --split train --max_length 96 --out topic"
    begin = f"calibrate --checkpoint {world['pretrained']} --task topic --batch_size 1 --out"
    (built,) = run_all(tmp_path, [cache.split()])
    assert built.status == 0, built.err

    def is_half_done() -> bool:
        return (tmp_path / ".cut.npz.resume.npz").exists()

    kill_when(tmp_path, is_half_done, *begin.split(), "cut.npz")
    assert not (tmp_path / "cut.npz").exists()
    # What is there says itself that it is a part, and cannot be planned with.
    plan = "plan --statistics .cut.npz.resume.npz --num_experts 2 --out plan.json"
    refused, resumed, whole = run_all(
        tmp_path, [plan.split(), [*begin.split(), "cut.npz"], [*begin.split(), "whole.npz"]]
    )
    assert refused.status == 2
    assert "A plan needs complete statistics, got a partial file of" in refused.err
    assert resumed.result["hash"] == whole.result["hash"]
    assert resumed.result["tokens"] == whole.result["tokens"]
    assert not is_half_done()


def test_a_killed_sweep_resumes_and_repeats_nothing(world, tmp_path, kill_when, run_all, uncurl):
    arguments = ["sweep", "--gin_file", world["study.gin"], "--out", "study"]
    arguments += ["--cache_dir", world["study_caches"]]
    # The study's file includes model.gin, looked up from where the command runs.
    (tmp_path / "model.gin").write_text((world.root / "model.gin").read_text())
    runs = tmp_path / "study" / "runs.jsonl"
    pretrained = tmp_path / "study" / "pretrained" / "4_experts" / "train_summary.json"

    is_model = b'"stage": "evaluate"'
    kill_when(tmp_path, lambda: runs.exists() and is_model in runs.read_bytes(), *arguments)
    before = runs.read_bytes()
    assert before.count(is_model) == 1
    pretrained_at = pretrained.stat().st_mtime_ns
    resumed, again = run_all(tmp_path, [arguments, arguments])
    assert resumed.result["runs"] == again.result["runs"] == 3
    after = runs.read_bytes()
    assert after.startswith(before)
    stages = [json.loads(line) for line in after.splitlines()]
    assert len({stage["name"] for stage in stages}) == len(stages)
    records = [stage for stage in stages if stage["stage"] == "evaluate"]
    assert len(records) == 3
    assert pretrained.stat().st_mtime_ns == pretrained_at
    assert uncurl("report", "study").status == 0
    # The same numbers as in a study that nobody interrupted.
    parts = sorted((world.root / "study").glob("shard_*/runs.jsonl"))
    lines = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
    expected = [line for line in lines if line["stage"] == "evaluate"]
    for record, other in zip(records, expected, strict=True):
        for name in ("run", "score", "interval", "metrics", "parameters", "num_experts_per_layer"):
            assert record[name] == other[name]


def test_what_a_killed_write_leaves_is_not_a_file_of_that_name(tmp_path, uncurl):
    """Atomic files and directories stand under a hidden name until they are whole."""
    leftover = tmp_path / ".plan.json.abc.partial"
    leftover.write_text('{"format": "uncurl_jax pruning plan", ')
    done = uncurl("prune", "--checkpoint", "none", "--plan", leftover, "--out", "pruned")
    assert done.status == 2
    assert "must hold JSON" in done.err
    assert os.listdir(tmp_path) == [leftover.name]
