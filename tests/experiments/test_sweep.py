"""Running a study: what is checked before any work, what a directory must hold, a whole run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.token_cache import build_token_cache
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.report import write_report
from uncurl_jax.experiments.study import StudyConfig
from uncurl_jax.experiments.sweep import run_sweep

MODEL = ModelConfig(
    num_experts=(4,),
    vocab_size=260,
    embed_dim=8,
    num_heads=2,
    mlp_dim=16,
    max_length=96,
    eval_capacity_factor=None,
    dtype="float32",
)
STAGE = TrainConfig(OptimizerConfig(1e-2), num_steps=2, batch_size=8)
CONFIG = StudyConfig(
    title="Tiny",
    model=MODEL,
    pretrain=STAGE,
    warmup=dataclasses.replace(STAGE, trainable="router"),
    finetune=STAGE,
    corpus="synthetic_corpus",
    tasks=("synthetic_choice",),
    source_num_experts=(4,),
    target_num_experts=(2,),
    methods=("frequency",),
)
# A part without models: everything is checked and written but nothing is trained.
NOTHING = (0, 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    synthetic.write_tasks(directory, num_train=16, num_validation=8, num_documents=10)
    return directory


def test_a_shard_writes_into_its_own_directory_alone(data, tmp_path):
    assert run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True) == []
    assert [path.name for path in tmp_path.iterdir()] == ["shard_0_of_100"]
    study = json.loads((tmp_path / "shard_0_of_100" / "study.json").read_text())
    assert study["title"] == "Tiny"
    assert study["config"]["source_num_experts"] == [4]
    assert set(study["versions"]) == {"python", "uncurl_jax", "jax", "numpy"}


def test_a_study_goes_on_with_the_same_settings_only(data, tmp_path):
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    other = dataclasses.replace(CONFIG, seeds=(1,), title="Other")
    with pytest.raises(InputError, match=r"got other values of title, seeds than .*study\.json"):
        run_sweep(other, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)


def test_a_record_cut_short_by_a_kill_is_removed_and_not_joined_to_the_next(data, tmp_path):
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    runs = tmp_path / "shard_0_of_100" / "runs.jsonl"
    runs.write_text('{"run": "a", "score": 1.5}\n{"run": "b", "sco')
    records = run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    assert records == [{"run": "a", "score": 1.5}]
    assert runs.read_text() == '{"run": "a", "score": 1.5}\n'


def test_models_that_are_recorded_are_not_made_again(data, tmp_path):
    shard = (0, 2)
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    folder = (tmp_path / "shard_0_of_100").rename(tmp_path / "shard_0_of_2")
    record = {"run": "4-unpruned-synthetic_choice-seed0", "score": 50.0}
    (folder / "runs.jsonl").write_text(json.dumps(record) + "\n")
    assert run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=shard, quiet=True) == [record]
    assert {path.name for path in folder.iterdir()} == {"study.json", "runs.jsonl"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("uncrl",)}, "method must be one of .*; did you mean uncurl"),
        ({"routers": ("men",)}, "routers must be one of .*; did you mean mean"),
        ({"affinity": "cosin"}, "affinity must be one of .*; did you mean cosine"),
        ({"tasks": ("rtee",)}, "A task must be a registered one, got 'rtee': nearest rte"),
        ({"tasks": ("rte",)}, r"needs the file .*RTE/train\.jsonl for its train split"),
        ({"tasks": ("synthetic_corpus",)}, "must have options to choose from, got synthetic_corp"),
        (
            {"tasks": (LanguageModelingTask("text", "a.txt", ""),)},
            "tasks must have options to choose from, got text, which is plain text",
        ),
        ({"corpus": "corpus"}, "A task must be a registered one, got 'corpus'"),
        ({"vocabulary": "byte"}, 'A vocabulary must be "bytes", a .model file'),
        (
            {"finetune": dataclasses.replace(STAGE, batch_size=12)},
            "finetune.batch_size must be a multiple of the 8 devices that share a batch, got 12",
        ),
        (
            {"pretrain": dataclasses.replace(STAGE, expert_partitions=3)},
            "must divide the number of devices, got 3",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(settings, message, data, tmp_path):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(InputError, match=message):
        run_sweep(config, out=tmp_path / "study", data_dir=data, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_devices_along_the_model_axis_do_not_divide_the_batch(data, tmp_path):
    """Four of eight devices hold other rows, so 12 rows can be shared."""
    stage = dataclasses.replace(STAGE, batch_size=12, model_partitions=2)
    config = dataclasses.replace(CONFIG, finetune=stage)
    assert run_sweep(config, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True) == []


def test_a_task_of_ones_own_is_checked_by_its_files(data, tmp_path):
    task = JsonlTask("own", "SyntheticTopic/train.jsonl", "missing.jsonl", "{text}", ("a", "b"))
    config = dataclasses.replace(CONFIG, tasks=(task,))
    with pytest.raises(InputError, match=r"Task own needs the file .*missing\.jsonl"):
        run_sweep(config, out=tmp_path, data_dir=data, quiet=True)
    whole = dataclasses.replace(task, validation_file="SyntheticTopic/val.jsonl")
    config = dataclasses.replace(CONFIG, tasks=(whole,))
    assert run_sweep(config, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True) == []


def test_caches_that_exist_need_no_data_but_the_studys_vocabulary(data, tmp_path):
    for name in ("synthetic_corpus", "synthetic_choice"):
        out = tmp_path / "caches" / name
        build_token_cache(name, vocabulary="bytes", out=out, max_length=96, data_dir=data)
    arguments = {"out": tmp_path / "study", "shard": NOTHING, "quiet": True}
    assert run_sweep(CONFIG, cache_dir=tmp_path / "caches", **arguments) == []
    manifest = tmp_path / "caches" / "synthetic_choice" / "train" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["vocabulary"]["hash"] = "0" * 64
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match="A token cache must use the model's vocabulary"):
        run_sweep(CONFIG, cache_dir=tmp_path / "caches", **arguments)


def test_without_data_or_caches_the_first_task_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Task synthetic_corpus needs a token cache in .* pass"):
        run_sweep(CONFIG, out=tmp_path, quiet=True)


@pytest.mark.slow
def test_a_whole_study_on_eight_devices_gives_a_record_per_model_and_a_report(data, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        source_num_experts=(4, 2),
        target_num_experts=(3, 2),
        methods=("uncurl", "frequency"),
        routers=("reference", "reinit"),
        gate_compensation=True,
    )
    records = run_sweep(config, out=tmp_path, data_dir=data, quiet=True)
    assert [record["run"] for record in records] == [
        "4-unpruned-synthetic_choice-seed0",
        "4to3-uncurl-reference-synthetic_choice-seed0",
        "4to3-uncurl-reinit-synthetic_choice-seed0",
        "4to3-frequency-reference-synthetic_choice-seed0",
        "4to3-frequency-reinit-synthetic_choice-seed0",
        "4to2-uncurl-reference-synthetic_choice-seed0",
        "4to2-uncurl-reinit-synthetic_choice-seed0",
        "4to2-frequency-reference-synthetic_choice-seed0",
        "4to2-frequency-reinit-synthetic_choice-seed0",
        "2-unpruned-synthetic_choice-seed0",
        "3-scratch-synthetic_choice-seed0",
    ]
    for record in records:
        assert record["num_experts_per_layer"] == [record["num_experts"]]
        assert 0 <= record["interval"][0] <= record["score"] <= record["interval"][1] <= 100
        assert record["num_examples"] == 8
        assert (record["plan"] is not None) == (record["kind"] == "pruned")
        assert record["seconds"]["total"] >= record["seconds"]["finetune"]
    lines = (tmp_path / "runs.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == records
    assert run_sweep(config, out=tmp_path, data_dir=data, quiet=True) == records
    assert (tmp_path / "runs.jsonl").read_text() == lines
    assert len(write_report(tmp_path)["rows"]) == 11
