"""Every file in gin/tasks parses, finalises and builds a token cache."""

from __future__ import annotations

import json
from pathlib import Path

import gin
import pytest

from uncurl_jax.data import registry, synthetic, token_cache
from uncurl_jax.data.jsonl_task import JsonlTask

FOLDER = Path(__file__).parents[2] / "gin" / "tasks"
NAMED = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def parse(name, *bindings):
    """Parses a file as the command line does and returns the configured builder."""
    lines = ["from __gin__ import dynamic_registration", f"include '{FOLDER / name}'", *bindings]
    gin.clear_config()
    gin.parse_config("\n".join(lines) + "\n")
    gin.finalize()
    return gin.get_configurable(token_cache.build_token_cache)


def test_every_file_is_tested_here():
    others = {"synthetic", "language_modeling", "my_jsonl_task", "seqio"}
    assert {path.stem for path in FOLDER.glob("*.gin")} == {*NAMED, *others}


@pytest.mark.parametrize("name", NAMED)
def test_a_superglue_file_names_its_task(name):
    parse(f"{name}.gin")
    assert gin.query_parameter("token_cache.build_token_cache.task") == f"superglue_{name}"
    assert registry.get_task(name).name == f"superglue_{name}"


@pytest.mark.parametrize("task", ["synthetic_topic", "synthetic_entailment", "synthetic_choice"])
def test_the_synthetic_file_builds_each_task(tmp_path, task):
    synthetic.write_tasks(tmp_path / "data", num_train=9, num_validation=9, num_documents=9)
    build = parse("synthetic.gin", f"TASK = '{task}'")
    manifests = build(data_dir=tmp_path / "data", out=tmp_path / "cache")
    assert manifests["validation"]["task"] == task
    assert manifests["train"]["truncated_rows"] == 0


def test_the_language_modelling_file_builds_a_cache(tmp_path):
    (tmp_path / "corpus.txt").write_text("abc\n\ndef\n" * 200, encoding="utf-8")
    build = parse("language_modeling.gin", "TRAIN_FILE = 'corpus.txt'")
    manifests = build(data_dir=tmp_path, vocabulary="bytes", out=tmp_path / "cache")
    assert manifests["train"]["max_row_length"] == 1024 and list(manifests) == ["train"]


@pytest.mark.parametrize(
    ("name", "macro"), [("language_modeling.gin", "TRAIN_FILE"), ("seqio.gin", "TASK")]
)
def test_a_required_value_must_be_given_before_any_work(name, macro):
    with pytest.raises(ValueError, match=f"{macro}/macro.value set to `%gin.REQUIRED`"):
        parse(name)


def test_the_file_for_ones_own_task_builds_a_cache(write_jsonl, tmp_path):
    for name in ("train.jsonl", "val.jsonl"):
        write_jsonl(name, [{"text": "Great fun.", "label": "Good"}])
    build = parse("my_jsonl_task.gin")
    assert isinstance(gin.get_configurable(JsonlTask)(), JsonlTask)
    build(data_dir=tmp_path, vocabulary="bytes", out=tmp_path / "cache")
    line = (tmp_path / "cache" / "train" / "examples.jsonl").read_text()
    assert json.loads(line)["prompt"] == "Review: Great fun. Good or bad?"


def test_the_seqio_file_takes_a_registered_name(tmp_path):
    build = parse("seqio.gin", "TASK = 'seqio:nothing'")
    with pytest.raises(ValueError, match="must be registered before its cache is built"):
        build(vocabulary="bytes", out=tmp_path / "cache")
