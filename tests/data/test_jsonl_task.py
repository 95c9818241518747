"""Tests of jsonl_task.py."""

from __future__ import annotations

import pytest

from uncurl_jax.data.jsonl_task import JsonlTask, template_fields
from uncurl_jax.errors import InputError

REVIEWS = {
    "name": "reviews",
    "train_file": "train.jsonl",
    "validation_file": "",
    "template": "Review: {text} Good or bad?",
    "options": ["Bad", "Good"],
}


def read(write_jsonl, rows, **fields):
    path = write_jsonl("train.jsonl", rows)
    return list(JsonlTask(**(REVIEWS | fields)).to_task().read(path.parent, "train"))


def test_a_row_fills_the_template(write_jsonl):
    rows = [{"text": "Fun.", "label": 1}, {"text": "Dull.", "label": "Bad"}]
    first, second = read(write_jsonl, rows)
    assert first.prompt == "Review: Fun. Good or bad?"
    assert (first.options, first.label, first.idx) == (("Bad", "Good"), 1, 0)
    assert (second.label, second.targets, second.idx) == (0, ("Bad",), 1)


@pytest.mark.parametrize(
    ("label", "place", "targets"),
    [(0, 0, ("Bad",)), ("Good", 1, ("Good",)), (True, 1, ("Good",)), (["Good"], 1, ("Good",))],
)
def test_a_label_is_an_index_a_text_a_truth_value_or_a_list(write_jsonl, label, place, targets):
    (example,) = read(write_jsonl, [{"text": "x", "label": label}])
    assert (example.label, example.targets) == (place, targets)


def test_options_may_differ_by_row_and_numbers_and_braces_are_written_out(write_jsonl):
    rows = [{"n": 3, "choices": ["a", "b"], "key": 41, "right": ["b", "c"]}]
    (example,) = read(
        write_jsonl,
        rows,
        template="{{{n}}} is",
        options=(),
        options_field="choices",
        label_field="right",
        idx_field="key",
    )
    assert (example.prompt, example.options, example.idx) == ("{3} is", ("a", "b"), 41)
    assert (example.label, example.targets, example.correct_options) == (1, ("b", "c"), (1,))


def test_a_row_without_label_has_none(write_jsonl):
    (example,) = read(write_jsonl, [{"text": "x"}])
    assert example.label is None


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"label": 0}, {}, r"train\.jsonl:2: a row must have the field 'text'"),
        ({"text": "x", "label": 2}, {}, r"train\.jsonl:2: field 'label' must be the text or index"),
        ({"text": "x", "label": "Meh"}, {}, r"\['Bad', 'Good'\], got 'Meh'"),
        ({"text": "x", "label": []}, {}, "field 'label' must be"),
        ({"text": "x", "label": [1]}, {}, "field 'label' must be"),
        ({"text": True, "label": 0}, {}, "field 'text' must be a string"),
        ({"text": "x"}, {"idx_field": "key"}, "must have the field 'key'"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(write_jsonl, row, fields, message):
    good = {"text": "x", "label": 0, "key": 0}
    with pytest.raises(InputError, match=message):
        read(write_jsonl, [good, row], **fields)


def test_a_rows_own_options_must_be_texts(write_jsonl):
    rows = [{"text": "x", "o": ["a", ""]}]
    with pytest.raises(InputError, match="field 'o' must be a list of texts that are not empty"):
        read(write_jsonl, rows, options=(), options_field="o")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "my task"}, "must consist of letters, digits and _"),
        ({"options": ()}, "must have either options or options_field"),
        ({"options_field": "o"}, "must have either options or options_field"),
        ({"options": ("a", " ")}, "must be texts that are not empty"),
        ({"template": "no field"}, "must use at least one field"),
        ({"template": "{a"}, "must have matching braces"),
        ({"template": "{0}"}, "must hold plain field names"),
        ({"template": "{a.b}"}, "must hold plain field names"),
        ({"template": "{a!r}"}, "must hold plain field names"),
        ({"metrics": ("f1",)}, "A metric must be a known one, got 'f1'"),
    ],
)
def test_a_bad_description_is_refused_before_any_file_is_read(fields, message):
    with pytest.raises(InputError, match=message):
        JsonlTask(**(REVIEWS | fields))


def test_template_fields_are_listed_once():
    assert template_fields("{b} {a} {b} {{c}}") == ("b", "a")


def test_a_task_without_validation_file_has_one_split():
    task = JsonlTask(**REVIEWS).to_task()
    assert dict(task.splits) == {"train": "train.jsonl"} and task.options == ("Bad", "Good")
