"""Tests of tasks.py and registry.py."""

from __future__ import annotations

import dataclasses

import pytest

from uncurl_jax.data import metrics, registry
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import Example, Row, Task, read_jsonl
from uncurl_jax.errors import InputError


def test_correct_options_are_the_label_and_every_accepted_text():
    example = Example("p", ("a", "b", "c"), 1, 7, targets=("b", "c"))
    assert example.correct_options == (1, 2)
    assert Example("p", ("a", "b"), None, 7).correct_options == ()


def test_an_example_survives_json():
    example = Example("p", ("a", "b"), 1, 7, (3, 4), ("b",), {"source": "x"})
    assert Example.from_dict(example.to_dict()) == example


def test_a_row_returns_typed_fields():
    row = Row({"t": " x ", "n": 3, "o": {"k": 1}, "l": [{"k": 2}], "label": True}, "f:1")
    assert (row.text("t"), row.text("t", strip=False), row.integer("n")) == ("x", " x ", 3)
    assert row.row("o").integer("k") == 1 and row.rows("l")[0].integer("k") == 2
    assert row.label((False, True)) == 1
    assert Row({}, "f:1").label((0, 1)) is None


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda row: row.text("no"), r"f:3: a row must have the field 'no', got only \['b', 't'\]"),
        (lambda row: row.text("b"), "f:3: field 'b' must be a string, got True"),
        (lambda row: row.integer("b"), "f:3: field 'b' must be an integer, got True"),
        (lambda row: row.items("t"), "field 't' must be a list"),
        (lambda row: row.row("t"), "field 't' must be an object"),
        (lambda row: row.label((0, 1), "b"), "field 'b' must be 0 or 1, got True"),
        (lambda row: Row({"l": [1]}, "f:3").rows("l"), "must be a list of objects, got 1"),
    ],
)
def test_a_bad_field_is_refused_with_its_place(read, message):
    with pytest.raises(InputError, match=message):
        read(Row({"b": True, "t": "x" * 100}, "f:3"))


def test_jsonl_rows_carry_their_place_and_blank_lines_are_skipped(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"a": 1}, "", {"a": 2}])
    assert [row.where for row in read_jsonl(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"a": 1} {"b": 2}'])
def test_a_line_that_is_no_object_is_refused(write_jsonl, line):
    path = write_jsonl("rows.jsonl", [{"a": 1}, line])
    with pytest.raises(InputError, match=r"rows\.jsonl:2 must hold one JSON object, got"):
        list(read_jsonl(path))


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1 must hold one JSON object"):
        list(read_jsonl(path))


def test_a_missing_file_or_split_is_refused(tmp_path):
    task = registry.get_task("rte")
    with pytest.raises(InputError, match=r"superglue_rte needs the file .*RTE.train\.jsonl"):
        list(task.read(tmp_path, "train"))
    with pytest.raises(InputError, match="has the splits train, validation, got 'test'"):
        list(task.read(tmp_path, "test"))


def test_short_and_long_names_give_one_task():
    assert registry.get_task("RTE") is registry.get_task("superglue_rte")
    assert "superglue_record" in registry.task_names()
    assert len(registry.task_names()) >= 12


def test_an_unknown_task_is_refused_with_the_nearest_names():
    with pytest.raises(InputError, match="got 'boolqq': nearest boolq"):
        registry.get_task("boolqq")
    with pytest.raises(InputError, match=r"nearest .*superglue_wsc"):
        registry.get_task("###")


def test_plain_text_is_not_a_task_with_options():
    assert isinstance(registry.find_task("synthetic_corpus"), LanguageModelingTask)
    with pytest.raises(InputError, match="'synthetic_corpus', which is plain text"):
        registry.get_task("synthetic_corpus")


def test_a_registered_task_is_found_and_its_name_is_taken(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    task = Task("mine", {"train": "t"}, lambda path: iter(()), (metrics.accuracy,), "accuracy")
    registry.register_task(task)
    registry.register_task(task)
    assert registry.get_task("mine") is task
    for taken in (dataclasses.replace(task, primary_metric="mean"), _renamed(task, "rte")):
        with pytest.raises(InputError, match="A task's name must be new"):
            registry.register_task(taken)


def _renamed(task, name):
    return dataclasses.replace(task, name=name)
