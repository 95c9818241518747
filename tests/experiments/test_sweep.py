"""Running a study: what is checked before any work, what a directory must hold, a whole run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from uncurl_jax import __version__
from uncurl_jax.config import EarlyStoppingConfig, ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data import synthetic
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.mixtures import MixtureConfig
from uncurl_jax.data.token_cache import build_token_cache
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import stage_runner
from uncurl_jax.experiments.study import FinetuneGrid, StudyConfig
from uncurl_jax.experiments.sweep import dry_run, run_sweep

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
    with pytest.raises(InputError, match=r"got other values of seeds, title than .*study\.json"):
        run_sweep(other, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)


def record_of(name: str, **values) -> dict:
    return {
        "schema": "uncurl_jax run 2",
        "stage": "evaluate",
        "name": f"runs/{name}/metrics.json",
        "versions": {"uncurl_jax": __version__},
        "seconds": 1.0,
        "tokens": 0,
        **values,
    }


def test_a_record_cut_short_by_a_kill_is_removed_and_not_joined_to_the_next(data, tmp_path):
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    runs = tmp_path / "shard_0_of_100" / "runs.jsonl"
    whole = json.dumps(record_of("a")) + "\n"
    runs.write_text(whole + '{"run": "b", "sco')
    records = run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    assert records == [record_of("a")]
    assert runs.read_text() == whole


def test_models_that_are_recorded_are_not_made_again(data, tmp_path):
    shard = (0, 2)
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    folder = (tmp_path / "shard_0_of_100").rename(tmp_path / "shard_0_of_2")
    record = record_of("4-unpruned-synthetic_choice-seed0")
    (folder / "runs.jsonl").write_text(json.dumps(record) + "\n")
    assert run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=shard, quiet=True) == [record]
    found = {path.name for path in folder.iterdir()}
    assert found == {"study.json", "runs.jsonl", "progress.json"}
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["done"], progress["left"], progress["running"]) == (1, 0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "uncurl_jax run 1"}, r"runs.jsonl:1: .* got a record of 'uncurl_jax run 1'"),
        ({"versions": {"uncurl_jax": "0.0.9"}}, r"runs.jsonl:1: .* got a record of '0.0.9' for"),
    ],
)
def test_records_of_another_version_are_refused(change, message, data, tmp_path):
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    runs = tmp_path / "shard_0_of_100" / "runs.jsonl"
    runs.write_text(json.dumps({**record_of("a"), **change}) + "\n")
    with pytest.raises(InputError, match=message):
        run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)


def test_a_study_of_another_version_is_refused(data, tmp_path):
    run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)
    path = tmp_path / "shard_0_of_100" / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": "uncurl_jax study 1"}))
    with pytest.raises(InputError, match=r"A study must be of this version \(uncurl_jax study 2"):
        run_sweep(CONFIG, out=tmp_path, data_dir=data, shard=NOTHING, quiet=True)


def test_a_validation_split_without_labels_is_refused(data, tmp_path):
    rows = [{"text": "x", "label": 0}, {"text": "y"}]
    for name in ("train", "val"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "SyntheticCorpus").symlink_to(data / "SyntheticCorpus")
    task = JsonlTask("own", "train.jsonl", "val.jsonl", "{text}", ("a", "b"))
    config = dataclasses.replace(CONFIG, tasks=(task,))
    with pytest.raises(InputError, match="must have labels, got example 1 of own without one"):
        run_sweep(config, out=tmp_path / "study", data_dir=tmp_path, quiet=True)
    assert not (tmp_path / "study").exists()


def test_a_dry_run_counts_stages_and_tokens_and_writes_nothing(data, tmp_path):
    """By hand: one unpruned, one pruned, one scratch model; 2 steps x 8 rows x 96 tokens each."""
    plan = dry_run(CONFIG, out=tmp_path / "study", data_dir=data)
    tokens = 2 * 8 * 96
    assert {kind: (row["left"], row["tokens"]) for kind, row in plan["stages"].items()} == {
        "cache": (2, 0),
        "pretrain": (2, 2 * tokens),
        "calibrate": (1, 0),
        "plan": (1, 0),
        "prune": (1, 0),
        "warmup": (1, tokens),
        "finetune": (3, 3 * tokens),
        "evaluate": (3, 0),
    }
    assert plan["tokens"] == 6 * tokens
    assert "rough guess" in plan["basis"]
    assert not (tmp_path / "study").exists()


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
    task = JsonlTask(
        "own", "SyntheticTopic/train.jsonl", "missing.jsonl", "{text}", synthetic.TOPIC_OPTIONS
    )
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


def content(path: Path) -> list[dict]:
    """Records without what a clock says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_study_killed_anywhere_goes_on_to_the_same_records(data, tmp_path, monkeypatch):
    """Killed after the result of a stage and before its record."""
    config = dataclasses.replace(CONFIG, target_num_experts=(2,), has_zero_shot=True)
    whole = run_sweep(config, out=tmp_path / "whole", data_dir=data, quiet=True)
    names = [line["name"] for line in content(tmp_path / "whole" / "runs.jsonl")]
    assert len(names) == len(set(names)) == 17
    kills = iter([3, 1, 5, 2, 4])
    append = stage_runner.append_json_line
    left = [next(kills)]

    def kill_before_record(path, value):
        left[0] -= 1
        if not left[0]:
            raise KilledError
        append(path, value)

    monkeypatch.setattr(stage_runner, "append_json_line", kill_before_record)
    for count in kills:
        with pytest.raises(KilledError):
            run_sweep(config, out=tmp_path / "killed", data_dir=data, quiet=True)
        left[0] = count
    left[0] = 100
    assert len(run_sweep(config, out=tmp_path / "killed", data_dir=data, quiet=True)) == len(whole)
    runs = [content(tmp_path / part / "runs.jsonl") for part in ("whole", "killed")]
    assert runs[0] == runs[1]
    before = (tmp_path / "killed" / "runs.jsonl").read_text()
    run_sweep(config, out=tmp_path / "killed", data_dir=data, quiet=True)
    assert (tmp_path / "killed" / "runs.jsonl").read_text() == before


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
        assert record["seconds"] > 0
    lines = (tmp_path / "runs.jsonl").read_text()
    found = [json.loads(line) for line in lines.splitlines()]
    assert [record for record in found if record["stage"] == "evaluate"] == records
    assert run_sweep(config, out=tmp_path, data_dir=data, quiet=True) == records
    assert (tmp_path / "runs.jsonl").read_text() == lines


@pytest.mark.slow
def test_a_study_with_every_optional_stage(data, tmp_path):
    """Mixture, grid, early stopping, prunes during pretraining; checkpoints removed at the end."""
    config = dataclasses.replace(
        CONFIG,
        prefinetune=STAGE,
        mixture=MixtureConfig(tasks=("synthetic_choice", "synthetic_entailment"), corpus_share=0.2),
        finetune=dataclasses.replace(STAGE, early_stopping=EarlyStoppingConfig(1, patience=1)),
        finetune_grid=FinetuneGrid(learning_rates=(1e-2, 1e-3)),
        pretraining_prunes=(0.5,),
        keep_checkpoints=False,
    )
    records = run_sweep(config, out=tmp_path, data_dir=data, quiet=True)
    assert [record["run"] for record in records] == [
        "4-unpruned-synthetic_choice-seed0",
        "4to2-frequency-reference-synthetic_choice-seed0",
        "4to2-during_pretraining-reference-synthetic_choice-seed0",
        "2-scratch-synthetic_choice-seed0",
    ]
    for record in records:
        tuned = record["tuned"]
        best = max(tuned["trials"], key=lambda trial: trial["score"])
        assert tuned["chosen"]["peak_learning_rate"] == best["peak_learning_rate"]
        assert {trial["peak_learning_rate"] for trial in tuned["trials"]} == {1e-2, 1e-3}
        assert (tmp_path / record["predictions"]).exists()
        assert record["checkpoint"] is None
        assert not (tmp_path / "runs" / record["run"] / "finetuned").exists()
    assert records[2]["num_experts_per_layer"] == [2]
    assert records[2]["plan"] == "pretrained/4to2-during_pretraining/pruning_plan_1.json"
    lines = {line["name"]: line for line in content(tmp_path / "runs.jsonl")}
    # 2 steps x 8 rows x 96 tokens, in two parts.
    parts = ("pretrained/4_experts-until1", "pretrained/4to2-during_pretraining/until2")
    assert [lines[name]["tokens"] for name in parts] == [768, 768]
    mixture = json.loads(
        (tmp_path / "caches" / "prefinetune_mixture" / "train" / "manifest.json").read_text()
    )
    assert [line["task"] for line in mixture["mixture"]] == [
        "synthetic_entailment",
        "synthetic_corpus",
    ]
    assert (tmp_path / "curves" / "pretrained__4_experts.jsonl").exists()
    examples = json.loads((tmp_path / "tasks" / "synthetic_choice.json").read_text())["examples"]
    assert len(examples) == 8
    assert all(example["prompt_tokens"] > 0 for example in examples)
