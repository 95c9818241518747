from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from uncurl_jax import artifacts
from uncurl_jax.cli import main
from uncurl_jax.data import metrics
from uncurl_jax.data.metrics import Score
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import compare
from uncurl_jax.experiments.evidence.answers import TaskExamples

# (right option, what A chooses, what B chooses, B's margin less A's)
CASES = (
    *((0, 0, 0, -0.5), (0, 0, 1, -2.0), (0, 0, 1, -3.0), (1, 1, 0, -1.5)),
    *((1, 0, 1, 4.0), (1, 1, 1, 0.5), (1, 0, 0, -0.25), (0, 1, 1, 0.0)),
)


def make_task(prompt="What? " * 3) -> TaskExamples:
    examples = tuple(
        Example(f"{prompt}{i}", ("yes", "no"), case[0], 10 + i, extra={"slice": "ab"[i % 2]})
        for i, case in enumerate(CASES)
    )
    return TaskExamples("rte", examples, np.arange(8), Score((metrics.accuracy,), "accuracy"))


def make_answers(which: int, name: str, **summary) -> compare.Answers:
    rows = []
    for i, (label, *chosen, change) in enumerate(CASES):
        pair = [0.0, 0.0]
        # Of A the margin is 0.1 either way; B's is that plus the change.
        pair[label] = (0.1 if chosen[0] == label else -0.1) + (change if which else 0.0)
        row = {"idx": 10 + i, "group": [], "label": label, "prediction": chosen[which]}
        rows.append({**row, "log_likelihoods": pair})
    right = sum(case[0] == case[1 + which] for case in CASES)
    values = {
        **{"task": "rte", "split": "validation", "score": 100 * right / len(CASES)},
        **{"interval": [0.0, 100.0], "token_cache_hash": "h", "settings": {"mode": "rank"}},
        "checkpoint": {"path": "gone", "num_experts": [4]},
    }
    return compare.Answers(name, {**values, **summary}, rows)


def write(path: Path, answers: compare.Answers) -> Path:
    artifacts.write_json(path, dict(answers.summary))
    lines = "".join(json.dumps(row) + "\n" for row in answers.predictions)
    path.with_name(f"{path.stem}.predictions.jsonl").write_text(lines)
    return path


def both():
    return make_answers(0, "A"), make_answers(1, "B")


def test_flips_classes_and_slices_are_counted():
    result = compare.compare(*both(), make_task(), cache_hash="h")
    assert result["flips"] == {
        **{"right_to_wrong": 3, "wrong_to_right": 1, "both_right": 2, "both_wrong": 2},
        "mcnemar_p_value": pytest.approx(stats.binomtest(1, 4).pvalue),
    }
    assert (result["a"]["score"], result["b"]["score"]) == (62.5, 37.5)
    assert result["classes"] == [
        {
            **{"name": "no", "num_examples": 4, "a": 50.0, "b": 50.0},
            **{"right_to_wrong": 1, "wrong_to_right": 1},
        },
        {
            **{"name": "yes", "num_examples": 4, "a": 75.0, "b": 25.0},
            **{"right_to_wrong": 2, "wrong_to_right": 0},
        },
    ]
    slices = {part["name"]: part for part in result["slices"]}
    # Examples 0, 2, 4, 6 and 1, 3, 5, 7; and thirds of the prompt lengths 0 to 7.
    assert slices["a"]["right_to_wrong"] == 1 and slices["b"]["right_to_wrong"] == 2
    assert len(slices) == 5


def test_the_interval_of_the_difference_is_that_of_paired_draws_of_examples():
    result = compare.compare(*both(), make_task(), cache_hash="h")
    assert result["difference"]["points"] == -25.0
    generator = np.random.default_rng(0)
    changes = np.array([0, -1, -1, -1, 1, 0, 0, 0])
    draws = 100 * changes[generator.integers(8, size=(100_000, 8))].mean(axis=1)
    # One example is 12.5 points, and two bootstraps may differ by one.
    assert result["difference"]["interval"] == pytest.approx(
        np.percentile(draws, [2.5, 97.5]), abs=12.5
    )


def test_regressions_are_those_that_turned_wrong_then_those_whose_margin_fell_most():
    result = compare.compare(*both(), make_task(), cache_hash="h")
    found = [(r["idx"], r["turned_wrong"], r["margin_change"]) for r in result["regressions"]]
    assert found == [
        *((12, True, -3.0), (11, True, -2.0), (13, True, -1.5)),
        *((10, False, -0.5), (16, False, -0.25)),
    ]
    first = result["regressions"][0]
    assert (first["right"], first["a_text"], first["b_text"]) == (["yes"], "yes", "no")
    assert first["prompt"].endswith(" 2") and first["options"] == ["yes", "no"]


def test_no_more_than_twenty_regressions_are_shown():
    a, b = both()
    many = 20
    task = make_task()
    rows = [[{**row, "idx": i} for i, row in enumerate(list(x.predictions) * many)] for x in (a, b)]
    examples = tuple(
        Example(e.prompt, e.options, e.label, i) for i, e in enumerate(task.examples * many)
    )
    longer = TaskExamples("rte", examples, np.arange(len(examples)), task.score)
    result = compare.compare(
        a._replace(predictions=rows[0]), b._replace(predictions=rows[1]), longer
    )
    assert len(result["regressions"]) == compare.MAX_REGRESSIONS
    assert {r["margin_change"] for r in result["regressions"]} == {-3.0}


def test_without_a_task_there_are_flips_but_no_texts():
    result = compare.compare(*both())
    assert result["flips"]["right_to_wrong"] == 3 and result["difference"]["interval"] is None
    assert result["classes"] == result["slices"] == []
    assert "prompt" not in result["regressions"][0]


def test_a_text_that_matched_no_option_is_wrong_and_has_no_margin():
    a, b = both()
    rows = [{**row, "prediction": -1, "text": "perhaps"} for row in b.predictions]
    for row in rows:
        del row["log_likelihoods"]
    silent = b._replace(predictions=rows, summary={**b.summary, "score": 0.0})
    result = compare.compare(a, silent, make_task())
    assert result["flips"]["right_to_wrong"] == 5 and result["flips"]["wrong_to_right"] == 0
    assert result["regressions"][0]["b_text"] == "perhaps"
    assert result["regressions"][0]["margin_change"] is None
    assert result["difference"]["interval"] is not None


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        ({"token_cache_hash": "other"}, "got another vocabulary or examples"),
        ({"task": "cb"}, "got another task"),
        ({"split": "train"}, "got another split"),
    ],
)
def test_answers_to_something_else_are_refused(summary, sentence):
    with pytest.raises(InputError, match=sentence):
        compare.compare(make_answers(0, "A"), make_answers(1, "B", **summary))


def test_other_examples_and_missing_labels_are_refused():
    a, b = both()
    with pytest.raises(InputError, match="got 8 in A and 7 in B"):
        compare.compare(a, b._replace(predictions=b.predictions[:-1]))
    unlabelled = [{**row, "label": None} for row in a.predictions]
    with pytest.raises(InputError, match="needs labelled predictions"):
        compare.compare(a._replace(predictions=unlabelled), b._replace(predictions=unlabelled))
    with pytest.raises(InputError, match="--task must hold the examples that A answered"):
        compare.compare(a, b, make_task(), cache_hash="another")


def test_texts_are_cut_in_the_middle_at_spaces():
    text = " ".join(f"word{i}" for i in range(200))
    short = compare.shorten(text, 100)
    assert len(short) <= 100 and short.startswith("word0 word1") and short.endswith("word199")
    assert all(word in text.split() for word in short.replace("[...]", "").split())
    assert compare.shorten("short", 100) == "short"
    assert len(compare.shorten("x" * 500, 100)) == 100


def test_the_table_names_every_part():
    text = compare.format_comparison(compare.compare(*both(), make_task()))
    assert "B - A: -25.00 points (95 % interval over examples" in text
    assert "3 turned wrong, 1 turned right (McNemar's exact test: p = 0.625)" in text
    assert "right: yes; A: yes; B: no" in text and "example 12 turned wrong, margin -3.000" in text


def test_the_command_compares_two_files(tmp_path, capsys):
    a, b = (write(tmp_path / f"{n}.json", x) for n, x in zip("ab", both(), strict=True))
    out = tmp_path / "compare.json"
    assert main(["compare", str(a), str(b), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["flips"]["right_to_wrong"] == 3
    assert "3 turned wrong" in printed.err
    assert artifacts.read_json(out)["regressions"][0]["idx"] == 12
    # It is not overwritten.
    assert main(["compare", str(a), str(b), "--out", str(out)]) == 2


def test_the_command_refuses_what_it_cannot_compare(tmp_path, capsys):
    a = write(tmp_path / "a.json", make_answers(0, "A"))
    out = tmp_path / "compare.json"

    def refused(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments), "--out", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "two checkpoints or of two metrics.json files" in refused(a, tmp_path)
    assert "got no --task" in refused(tmp_path, tmp_path)
    lonely = tmp_path / "lonely.json"
    artifacts.write_json(lonely, dict(make_answers(0, "A").summary))
    assert "must have their predictions beside them" in refused(a, lonely)
    artifacts.write_json(lonely, {"task": "rte"})
    assert "without split" in refused(a, lonely)
    (tmp_path / "a.predictions.jsonl").write_text('{"prediction": "yes"}\n')
    assert "prediction must be the index of an option, got 'yes'" in refused(a, a)
