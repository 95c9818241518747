"""A pilot: what it refuses before any work, and the whole way to a decision."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from uncurl_jax.artifacts import read_json
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.cli import main
from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.pilot import find_task, run_pilot
from uncurl_jax.models.architecture import init_params

MODEL = ModelConfig(
    num_experts=(4, 0),
    vocab_size=260,
    embed_dim=8,
    num_heads=2,
    mlp_dim=16,
    max_length=64,
    eval_capacity_factor=None,
    dtype="float32",
)
STAGE = TrainConfig(OptimizerConfig(1e-2), num_steps=2, batch_size=8)
WARMUP = dataclasses.replace(STAGE, trainable="router")


def make_checkpoint(path: Path, model: ModelConfig = MODEL) -> str:
    with CheckpointStore(
        path,
        model_config=model,
        provenance={"created_by": "test"},
        vocabulary=load_vocabulary("bytes").describe(),
    ) as store:
        store.save(0, init_params(model, 0))
    return str(path)


@pytest.fixture
def data(tmp_path) -> Path:
    for name, count in (("train", 24), ("val", 12)):
        rows = [
            {"prompt": f"Is {i} even?", "options": ["yes", "no"], "label": i % 2}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_a_task_is_registered_or_lies_in_files_of_the_plain_form(data):
    assert find_task("rte", None) == "superglue_rte"
    found = find_task("parity", data)
    assert isinstance(found, JsonlTask)
    assert (found.name, found.options_field, found.template) == ("parity", "options", "{prompt}")
    with pytest.raises(InputError, match="A task must be a registered one, got 'parity'"):
        find_task("parity", data / "nowhere")


def test_layers_of_different_counts_are_refused(data, tmp_path):
    uneven = dataclasses.replace(MODEL, num_experts=(4, 3))
    with pytest.raises(InputError, match=r"one number of experts in all MoE layers, got \[4, 3\]"):
        run_pilot(
            checkpoint=make_checkpoint(tmp_path / "uneven", uneven),
            task="parity",
            target_num_experts=(2,),
            out=tmp_path / "out",
            data_dir=data,
            warmup=WARMUP,
            finetune=STAGE,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_experts", "4"], "target_num_experts must be .* below the largest source count"),
        (["--target_experts", "2", "--gate", "missing.json"], "missing.json"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, message, data, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "source")
    common = ["--checkpoint", checkpoint, "--task", "parity", "--data_dir", str(data)]
    out = tmp_path / "out"
    assert main(["pilot", *common, *arguments, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("uncurl pilot: error: ")
    assert not out.exists()
    assert re.search(message, lines[0])


@pytest.mark.slow
def test_a_pilot_from_checkpoint_and_rows_to_report_and_gates(data, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "source")
    gate = tmp_path / "gate.json"
    rules = {"schema": "uncurl_jax gate 1", "max_mean_drop": 100, "min_memory_gain": 0.1}
    gate.write_text(json.dumps(rules))
    out = tmp_path / "out"
    arguments = [
        *("pilot", "--checkpoint", checkpoint, "--task", "parity", "--data_dir", str(data)),
        *("--target_experts", "3,2", "--gate", str(gate), "--out", str(out)),
        *("--gin.FINETUNE_STEPS=2", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=8"),
    ]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_json(out / "pilot.json")
    assert "not the beneficial one" in printed["thresholds"]
    assert set(printed["gates"]) == {"4to3-uncurl-reference", "4to2-uncurl-reference"}
    report = read_json(out / "report.json")
    finding = report["findings"][0]
    assert finding["beneficial"]["status"] == "nothing_to_compare"
    assert len(finding["candidates"]) == 2
    assert all(candidate["drop"]["seeds"] == 3 for candidate in finding["candidates"])
    # The same command again makes nothing new and says the same.
    before = (out / "runs.jsonl").read_text()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert (out / "runs.jsonl").read_text() == before
