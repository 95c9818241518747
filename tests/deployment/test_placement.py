"""The placement file: what is in it, that it is checked, and that its bytes are the program's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.deployment import bench_settings, programs
from uncurl_jax.deployment.collectives import find_collectives, wire_bytes
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.layouts import Request, least_memory, mesh_shapes
from uncurl_jax.deployment.placement import (
    Placement,
    describe,
    load_placement,
    model_hash,
    save_report,
    summarize,
)
from uncurl_jax.deployment.planner import make_placement
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import make_mesh

ROWS, LENGTH = 16, 16
MODEL = ModelConfig(
    num_experts=(6, 0, 16),
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    mlp_dim=64,
    max_length=16,
    num_selected_experts=2,
    min_capacity=1,
    dtype="float32",
)


@pytest.fixture(scope="module")
def report(slice_of_eight):
    """Of a slice so small that not all experts can be whole."""
    request = Request(
        MODEL,
        Job("train", ROWS, LENGTH, "float32"),
        slice_of_eight,
        num_experts_before=(64, 0, 64),
        model_partitions=1,
    )
    least = min(least_memory(request, mesh) for mesh in mesh_shapes(8) if mesh.model == 1)
    small = dataclasses.replace(slice_of_eight, hbm_bytes_per_chip=int(1.05 * least / 0.9))
    return make_placement(dataclasses.replace(request, slice=small))


def test_the_bytes_of_the_chosen_layout_are_those_of_its_compiled_program(report):
    chosen = report.chosen
    axes = chosen.expert_axes(3)
    assert any(axes), "the case must divide experts"
    stage = TrainConfig(OptimizerConfig(1e-3), 10, ROWS, model=MODEL, expert_axes=axes)
    mesh = make_mesh(expert_partitions=chosen.mesh.expert)
    program = programs.build("train", MODEL, stage, mesh, num_rows=ROWS, length=LENGTH)
    found = find_collectives(program.lower().compile().as_text())
    exchanged = sum(
        c.times * wire_bytes(c.kind, c.bytes_per_device, c.group_size)
        for c in found
        if c.kind == "all-to-all"
    )
    tokens = ROWS * LENGTH // 8
    assert exchanged > 0
    assert chosen.wire_bytes_per_token["tokens"] == exchanged / tokens
    gradients = sum(
        c.times * wire_bytes(c.kind, part.bytes_per_device, c.group_size)
        for c in found
        if c.kind == "all-reduce"
        for part in c.parts
        if part.direction == "backward"
    )
    assert chosen.wire_bytes_per_token["gradients"] == gradients / tokens


def test_a_placement_is_read_as_it_was_chosen(report, tmp_path):
    save_report(report, tmp_path / "placement.json", fingerprint="f" * 64)
    placed = load_placement(tmp_path / "placement.json")
    mesh = report.chosen.mesh
    assert placed == Placement(
        slice="v5e-8",
        num_devices=8,
        mode="train",
        batch=ROWS,
        length=LENGTH,
        accumulation_steps=1,
        num_experts=MODEL.num_experts,
        model_hash=model_hash(MODEL),
        expert_partitions=mesh.expert,
        model_partitions=mesh.model,
        expert_axes=report.chosen.expert_axes(3),
    )
    assert placed.data_partitions == mesh.data
    # The benchmarks read the same file.
    theirs = bench_settings.load_placement(tmp_path / "placement.json")
    assert theirs.expert_axes == placed.expert_axes
    # And the trainer's configuration takes the values.
    TrainConfig(OptimizerConfig(1e-3), 1, ROWS, expert_axes=placed.expert_axes)


def test_a_file_holds_what_the_choice_was_made_from(report):
    values = describe(report, fingerprint="f" * 64)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["model"] == {
        "hash": model_hash(MODEL),
        "fingerprint": "f" * 64,
        "num_experts": [6, 0, 16],
        "num_experts_before": [64, 0, 64],
    }
    assert set(values["fewest_chips"]) == {"before", "after"}
    assert len(values["alternatives"]) == len(report.layouts) - 1
    assert values["reason"] == report.reason
    estimates = values["estimates"]
    assert estimates["hbm_bytes"] == (
        estimates["state_bytes"] + estimates["cache_bytes"] + estimates["activation_bytes"]
    )
    layers = {tuple(kind["layers"]): kind["options"] for kind in values["layers"]}
    assert set(layers) == {(0,), (2,)}
    for kind, options in layers.items():
        assert [option["chosen_for"] for option in options if option["chosen_for"]] == [list(kind)]
        for option in options:
            assert set(option["wire_bytes_per_token"]) == {
                *("tokens", "weights", "gradients", "partial_sums", "total")
            }
    assert "estimates" in values["note"]


def test_the_summary_is_the_choice_alone(report):
    summary = summarize(report)
    assert "alternatives" not in summary and "layers" not in summary
    assert summary["expert_axes"] == [list(axes) for axes in report.chosen.expert_axes(3)]
    assert summary["feasible_layouts"] >= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "another"}, "must be an object with schema"),
        ({"expert_axes": [["expert"]]}, "expert_axes must have one entry per layer, got 1 for 3"),
        ({"expert_axes": [["expert", "data"], [], []]}, "must hold some of data, expert in this"),
        ({"expert_partitions": 3}, "must divide its devices, got 3 * 1 on 8"),
        ({"batch": 0}, "sizes must be whole numbers of at least 1"),
        ({"model": {}}, "must have the fields of this version"),
        ({"expert_axes": None}, "must have the fields of this version"),
    ],
)
def test_a_file_that_was_changed_is_refused(change, sentence, report, tmp_path):
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(describe(report) | change))
    with pytest.raises(InputError) as caught:
        load_placement(path)
    assert sentence in str(caught.value) and "placement.json" in str(caught.value)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="A file must exist, got nothing at"):
        load_placement(tmp_path / "placement.json")


@pytest.mark.parametrize(
    ("change", "run", "sentence"),
    [
        ({"mode": "serve"}, {}, 'must be made with --mode train, got "serve"'),
        ({}, {"num_devices": 4}, "= 8 for 4 devices: nearest is a slice of 4 chips"),
        ({}, {"num_experts": (6, 0, 8)}, "got num_experts [6, 0, 16] for a model of [6, 0, 8]"),
        ({}, {"batch_size": 32}, "got batch 16 in 1 parts for batch_size 32 in 1"),
        ({}, {"parts": 2}, "got batch 16 in 1 parts for batch_size 16 in 2"),
    ],
)
def test_a_placement_of_another_run_is_refused(change, run, sentence, report, tmp_path):
    save_report(report, tmp_path / "placement.json")
    placed = dataclasses.replace(load_placement(tmp_path / "placement.json"), **change)
    right = {"num_devices": 8, "num_experts": (6, 0, 16), "batch_size": 16, "parts": 1}
    with pytest.raises(InputError) as caught:
        placed.check_training(**{**right, **run})
    assert sentence in str(caught.value)
    if not change:
        placed.check_training(**right)
