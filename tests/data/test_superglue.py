"""Tests of superglue.py on hand-made rows in the official layout and in TFDS's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uncurl_jax.data import registry, superglue
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError

ROWS = {
    "BoolQ": {"question": "is tea hot", "passage": "Tea is hot", "idx": 9, "label": True},
    "CB": {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral", "idx": 1},
    "COPA": {
        "premise": "The cup fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": "effect",
        "label": 0,
        "idx": 2,
    },
    "MultiRC": {
        "idx": 4,
        "version": 1.1,
        "passage": {
            "text": "Ann ran.",
            "questions": [
                {
                    "question": "Who ran?",
                    "idx": 7,
                    "answers": [
                        {"text": "Ann", "idx": 70, "label": 1},
                        {"text": "Bob", "idx": 71, "label": 0},
                    ],
                }
            ],
        },
    },
    "ReCoRD": {
        "source": "CNN",
        "idx": 5,
        "passage": {
            "text": "Ann met Bob\n@highlight\nAnn left.",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 23, "end": 25}],
        },
        "qas": [
            {
                "query": "@placeholder went home.",
                "answers": [{"start": 0, "end": 2, "text": "Ann"}],
                "idx": 50,
            }
        ],
    },
    "RTE": {"premise": "A b.", "hypothesis": "A c.", "label": "not_entailment", "idx": 3},
    "WiC": {
        "word": "run",
        "sentence1": "Run far.",
        "sentence2": "She ran a shop.",
        "idx": 6,
        "label": False,
        "start1": 0,
        "end1": 3,
        "start2": 4,
        "end2": 7,
        "version": 1.1,
    },
    "WSC": {
        "text": "Ann told Sue that she won, and she smiled.",
        "target": {
            "span1_index": 0,
            "span1_text": "Ann",
            "span2_index": 4,
            "span2_text": "she",
        },
        "idx": 8,
        "label": True,
    },
}

EXPECTED = {
    "BoolQ": [
        Example(
            "Tea is hot. Question: is tea hot? Yes or no?", ("No", "Yes"), 1, 9, targets=("Yes",)
        )
    ],
    "CB": [
        Example(
            "Given that It rains. Does it follow that it is wet? Yes, no, or maybe?",
            ("Yes", "No", "Maybe"),
            2,
            1,
            targets=("Maybe",),
        )
    ],
    "COPA": [
        Example(
            "The cup fell. What happened as a result?",
            ("It broke.", "It sang."),
            0,
            2,
            targets=("It broke.",),
        )
    ],
    "MultiRC": [
        Example(
            "Ann ran. Question: Who ran? Suggested answer: Ann. Is this answer right? Yes or no?",
            ("No", "Yes"),
            1,
            70,
            (4, 7),
            ("Yes",),
        ),
        Example(
            "Ann ran. Question: Who ran? Suggested answer: Bob. Is this answer right? Yes or no?",
            ("No", "Yes"),
            0,
            71,
            (4, 7),
            ("No",),
        ),
    ],
    "ReCoRD": [
        Example(
            "Ann met Bob. Ann left. Which name does @placeholder stand for in: "
            "@placeholder went home.",
            ("Ann", "Bob"),
            0,
            50,
            targets=("Ann",),
        )
    ],
    "RTE": [
        Example(
            "Given that A b. Does it follow that A c? Yes or no?",
            ("Yes", "No"),
            1,
            3,
            targets=("No",),
        )
    ],
    "WiC": [
        Example(
            'Run far. She ran a shop. Does the word "run" mean the same in both sentences? '
            "Yes or no?",
            ("No", "Yes"),
            0,
            6,
            targets=("No",),
        )
    ],
    "WSC": [
        Example(
            'Ann told Sue that *she* won, and she smiled. Does "*she*" mean "Ann"? Yes or no?',
            ("No", "Yes"),
            1,
            8,
            targets=("Yes",),
        )
    ],
}


def read(write_jsonl, tmp_path, name, *rows):
    write_jsonl(f"{name}/val.jsonl", rows)
    return list(registry.get_task(name).read(tmp_path, "validation"))


@pytest.mark.parametrize("name", ROWS)
def test_an_official_row_becomes_its_example(write_jsonl, tmp_path, name):
    assert read(write_jsonl, tmp_path, name, ROWS[name]) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("MultiRC", "ReCoRD")])
def test_a_row_without_label_has_none(write_jsonl, tmp_path, name):
    row = {key: value for key, value in ROWS[name].items() if key != "label"}
    (example,) = read(write_jsonl, tmp_path, name, row)
    assert example.label is None and example.targets == () and example.correct_options == ()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_lacks_any_needed_field_is_refused_with_its_place(write_jsonl, tmp_path, name):
    optional = {"label", "version", "source", "start1", "start2", "end1", "end2"}
    for field in set(ROWS[name]) - optional:
        if (name, field) == ("ReCoRD", "idx"):
            continue  # A query has its own number.
        row = {key: value for key, value in ROWS[name].items() if key != field}
        with pytest.raises(InputError, match=rf"val\.jsonl:2: a row must have .* '{field}'"):
            read(write_jsonl, tmp_path, name, ROWS[name], row)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("RTE", {"label": "maybe"}, 'must be "entailment" or "not_entailment", got \'maybe\''),
        ("BoolQ", {"label": 1}, "must be false or true, got 1"),
        ("COPA", {"question": "why"}, 'must be "cause" or "effect"'),
        ("COPA", {"idx": "2"}, "'idx' must be an integer"),
        ("MultiRC", {"passage": []}, "'passage' must be an object"),
        (
            "ReCoRD",
            {"passage": {"text": "Ann", "entities": [{"start": 0, "end": 3}]}},
            "'entities' must be spans within 3 characters",
        ),
        (
            "WSC",
            {"target": {"span1_text": "Ann", "span2_text": "he", "span2_index": 4}},
            "'span2_text' must be a word of the text, got 'he'",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(write_jsonl, tmp_path, name, change, message):
    with pytest.raises(InputError, match=rf"val\.jsonl:1: .*{message}"):
        read(write_jsonl, tmp_path, name, {**ROWS[name], **change})


def test_the_pronoun_nearest_to_a_wrong_index_is_marked(write_jsonl, tmp_path):
    row = {**ROWS["WSC"], "target": {**ROWS["WSC"]["target"], "span2_index": 6}}
    (example,) = read(write_jsonl, tmp_path, "WSC", row)
    assert "and *she* smiled" in example.prompt  # Words 4 and 7 are "she"; 6 is nearer to 7.


def test_record_marks_every_entity_that_is_an_answer(write_jsonl, tmp_path):
    answers = [{"text": "Bob"}, {"text": "Ann"}, {"text": "Bob"}, {"text": "Carl"}]
    row = {**ROWS["ReCoRD"], "qas": [{"query": "q", "answers": answers, "idx": 1}]}
    (example,) = read(write_jsonl, tmp_path, "ReCoRD", row)
    assert example.targets == ("Bob", "Ann", "Carl")
    assert example.correct_options == (0, 1) and example.label == 0


def test_metrics_follow_superglues_convention():
    primary = {task.name: task.primary_metric for task in superglue.TASKS}
    assert {name for name, metric in primary.items() if metric == "mean"} == {
        "superglue_cb",
        "superglue_multirc",
        "superglue_record",
    }
    assert all(task.options != () for task in superglue.TASKS)


@pytest.mark.parametrize("name", ROWS)
def test_tfds_rows_become_the_same_examples(tmp_path, name):
    """Writes a data set with TFDS's own row conversion and features, then reads it."""
    import tensorflow_datasets as tfds

    config = name.lower()
    official = tmp_path / "rows.jsonl"
    official.write_text(json.dumps(ROWS[name]) + "\n", encoding="utf-8")
    builder: Any = tfds.builder(f"super_glue/{config}", data_dir=str(tmp_path), try_gcs=False)
    rows = [row for _, row in builder._generate_examples(str(official), "validation")]
    task = superglue.from_tfds(config)
    with pytest.raises(InputError, match=f"super_glue/{config} must be prepared"):
        list(task.read(tmp_path, "validation"))
    Path(builder.info.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=100)
    writer.initialize_splits(["validation"])
    writer.add_examples({"validation": rows})
    writer.close_all()
    got = list(task.read(tmp_path, "validation"))
    if name == "ReCoRD":  # TFDS keeps the entities as a set.
        assert set(got[0].options) == set(EXPECTED[name][0].options)
        assert got[0].targets == EXPECTED[name][0].targets
        assert got[0].prompt == EXPECTED[name][0].prompt
        assert got[0].correct_options == (got[0].options.index("Ann"),)
    else:
        assert got == EXPECTED[name]
    assert all(path.is_file() for path in task.source_files(tmp_path, "validation"))
    with pytest.raises(InputError, match="must be prepared with a train split"):
        list(task.read(tmp_path, "train"))


def test_an_unknown_tfds_config_is_refused():
    with pytest.raises(InputError, match=r"must be one of boolq, .*, got 'axb'"):
        superglue.from_tfds("axb")
