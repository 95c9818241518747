"""Compares two models on one task: scores, examples that flipped, classes, slices, regressions.

A is the model before, B the one after. Either both were just evaluated, or both stand in files
that `uncurl evaluate` wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data.metrics import Score
from uncurl_jax.data.tasks import Example
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence.answers import TaskExamples, class_members, slice_members
from uncurl_jax.experiments.evidence.paired import is_additive, mcnemar, sample_scores

SCHEMA = "uncurl_jax compare 1"
MAX_REGRESSIONS = 20
_PROMPT_CHARACTERS = 600
_TOLERANCE_POINTS = 1e-6


class Answers(NamedTuple):
    """What one model answered.

    Attributes:
      name: of the checkpoint or file.
      summary: content of metrics.json.
      predictions: rows of the predictions file, one per example.
    """

    name: str
    summary: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]


def load_answers(path: Path) -> Answers:
    """Reads a metrics.json and the predictions beside it.

    Raises:
      InputError: If a file is missing, or is not what `uncurl evaluate` writes.
    """
    summary = artifacts.read_json(path)
    names = ("task", "split", "score", "interval", "token_cache_hash", "checkpoint", "settings")
    missing = [n for n in names if not isinstance(summary, dict) or n not in summary]
    if missing:
        raise InputError(
            f"Metrics to compare must be those that uncurl evaluate wrote, got {path} without "
            f"{missing[0]}: evaluate again, or give a checkpoint."
        )
    file = path.with_name(f"{path.stem}.predictions.jsonl")
    if not file.is_file():
        raise InputError(
            f"Metrics to compare must have their predictions beside them, got nothing at {file}: "
            "evaluate again."
        )
    rows = artifacts.read_json_lines(file)
    for place, row in enumerate(rows, start=1):
        prediction = row.get("prediction") if isinstance(row, dict) else None
        if not isinstance(prediction, int) or isinstance(prediction, bool):
            raise InputError(
                f"{file}:{place}: prediction must be the index of an option, got {prediction!r}: "
                "evaluate again."
            )
    return Answers(str(path), summary, rows)


def task_of(cache: TokenCache) -> TaskExamples:
    """Returns the examples of a split of a task.

    Raises:
      InputError: If the task has no options, or an example no label.
    """
    if cache.max_options < 2:
        raise InputError(
            f"A comparison needs a task with options, got {cache.task}: choose another --task."
        )
    examples = cache.examples()
    for example in examples:
        if not example.correct_options:
            raise InputError(
                f"A comparison needs labels, got none for example {example.idx} of {cache.task} "
                f"({cache.split}): choose a split with labels."
            )
    lengths = cache.prompt_lengths[[cache.rows_of(i)[0] for i in range(len(examples))]]
    return TaskExamples(cache.task, tuple(examples), lengths, cache.score())


def compare(
    before: Answers, after: Answers, task: TaskExamples | None = None, *, cache_hash: str = ""
) -> dict[str, Any]:
    """Compares the answers of two models to the same examples.

    Args:
      before: A.
      after: B.
      task: the examples; without them there are no texts, classes and slices.
      cache_hash: of the token cache that the examples come from.

    Returns:
      What compare.json holds. `difference` is B - A in points with a 95 % bootstrap interval over
      examples; `flips` counts examples, with the p-value of McNemar's exact test; `regressions`
      are the examples that turned wrong, then those whose margin fell most. A margin is the
      log-likelihood of the right option less that of the best other one, nats.

    Raises:
      InputError: If the answers are to different examples, or an example has no label.
    """
    _check_same(before, after, task, cache_hash)
    rights = [
        np.array([_is_right(row, i, task) for i, row in enumerate(answers.predictions)])
        for answers in (before, after)
    ]
    lost, won = rights[0] & ~rights[1], ~rights[0] & rights[1]
    changes = [
        _change(a, b, i, task)
        for i, (a, b) in enumerate(zip(before.predictions, after.predictions, strict=True))
    ]
    members: list[tuple[str, str, list[int]]] = []
    if task is not None:
        members = class_members(task.examples)
        members += slice_members(task.examples, task.prompt_tokens)
    parts: dict[str, list[dict[str, Any]]] = {"class": [], "slice": []}
    for kind, name, places in members:
        counts = [int(values[places].sum()) for values in (*rights, lost, won)]
        parts[kind].append(
            {
                "name": name,
                "num_examples": len(places),
                "a": 100 * counts[0] / len(places),
                "b": 100 * counts[1] / len(places),
                "right_to_wrong": counts[2],
                "wrong_to_right": counts[3],
            }
        )
    worst = sorted(
        (i for i, change in enumerate(changes) if lost[i] or (change is not None and change < 0)),
        key=lambda i: (not lost[i], 0.0 if changes[i] is None else changes[i], i),
    )
    return {
        "schema": SCHEMA,
        "task": before.summary["task"],
        "split": before.summary["split"],
        "num_examples": len(changes),
        "a": _describe(before),
        "b": _describe(after),
        "difference": _difference(before, after, task),
        "flips": {
            "right_to_wrong": int(lost.sum()),
            "wrong_to_right": int(won.sum()),
            "both_right": int((rights[0] & rights[1]).sum()),
            "both_wrong": int((~rights[0] & ~rights[1]).sum()),
            "mcnemar_p_value": mcnemar(int(lost.sum()), int(won.sum())),
        },
        "classes": parts["class"],
        "slices": parts["slice"],
        "regressions": [
            _regression(before, after, i, bool(lost[i]), changes[i], task)
            for i in worst[:MAX_REGRESSIONS]
        ],
    }


def _check_same(
    before: Answers, after: Answers, task: TaskExamples | None, cache_hash: str
) -> None:
    for name in ("task", "split", "token_cache_hash"):
        a, b = before.summary[name], after.summary[name]
        if a != b:
            what = "vocabulary or examples" if name == "token_cache_hash" else name
            raise InputError(
                f"Models must be compared on the same examples, got another {what} ({name} {a!r} "
                f"and {b!r}) in {before.name} and {after.name}: evaluate both on one token cache."
            )
    keys = [
        [(row.get("idx"), row.get("group"), row.get("label")) for row in answers.predictions]
        for answers in (before, after)
    ]
    if keys[0] != keys[1]:
        raise InputError(
            f"Models must be compared on the same examples, got {len(keys[0])} in {before.name} "
            f"and {len(keys[1])} in {after.name} that are not those: evaluate both again."
        )
    if task is None:
        if not keys[0] or any(label is None for _, _, label in keys[0]):
            raise InputError(
                f"A comparison needs labelled predictions, got examples without label in "
                f"{before.name}: choose a split with labels."
            )
        return
    is_same = [key[0] for key in keys[0]] == [example.idx for example in task.examples]
    if not is_same or (cache_hash and cache_hash != before.summary["token_cache_hash"]):
        raise InputError(
            f"--task must hold the examples that {before.name} answered, got others in task "
            f"{task.task}: give the token cache that was evaluated."
        )


def _right_options(row: Mapping[str, Any], place: int, task: TaskExamples | None) -> Sequence[int]:
    return (row["label"],) if task is None else task.examples[place].correct_options


def _is_right(row: Mapping[str, Any], place: int, task: TaskExamples | None) -> bool:
    return row["prediction"] in _right_options(row, place, task)


def _margin(row: Mapping[str, Any], right: Sequence[int]) -> float | None:
    values = row.get("log_likelihoods")
    if not values or len(values) <= len(right):
        return None
    others = [value for option, value in enumerate(values) if option not in right]
    return max(values[option] for option in right) - max(others)


def _change(
    a: Mapping[str, Any], b: Mapping[str, Any], place: int, task: TaskExamples | None
) -> float | None:
    margins = [_margin(row, _right_options(row, place, task)) for row in (a, b)]
    return None if margins[0] is None or margins[1] is None else margins[1] - margins[0]


def _describe(answers: Answers) -> dict[str, Any]:
    return {
        "name": answers.name,
        "score": answers.summary["score"],
        "interval": list(answers.summary["interval"]),
        "checkpoint": answers.summary["checkpoint"],
        "settings": answers.summary["settings"],
    }


def _difference(before: Answers, after: Answers, task: TaskExamples | None) -> dict[str, Any]:
    """Returns B - A, with an interval where the score can be computed again from predictions."""
    difference: dict[str, Any] = {
        "points": after.summary["score"] - before.summary["score"],
        "interval": None,
    }
    score: Score | None = None if task is None else task.score
    if task is None or score is None or not is_additive(score):
        return difference
    predictions = [
        [_scored_option(row, example) for row, example in zip(rows, task.examples, strict=True)]
        for rows in (before.predictions, after.predictions)
    ]
    a, b = sample_scores(score, task.examples, predictions)
    is_own = all(
        abs(sample.score - answers.summary["score"]) <= _TOLERANCE_POINTS
        for sample, answers in ((a, before), (b, after))
    )
    # Another metric (of SeqIO's evaluator, say) has another interval.
    if is_own and a.resampled is not None and b.resampled is not None:
        ends = np.percentile(b.resampled - a.resampled, [2.5, 97.5])
        difference["interval"] = [float(end) for end in ends]
    return difference


def _scored_option(row: Mapping[str, Any], example: Example) -> int:
    """A generated text that matches no option counts as a wrong one, as in evaluation."""
    if row["prediction"] >= 0:
        return row["prediction"]
    wrong = (i for i in range(len(example.options)) if i not in example.correct_options)
    return next(wrong, 0)


def _regression(
    before: Answers,
    after: Answers,
    place: int,
    is_flip: bool,
    change: float | None,
    task: TaskExamples | None,
) -> dict[str, Any]:
    a, b = before.predictions[place], after.predictions[place]
    found: dict[str, Any] = {
        "idx": a["idx"],
        "turned_wrong": is_flip,
        "margin_change": None if change is None else round(change, 6),
        "label": a["label"],
        "a": a["prediction"],
        "b": b["prediction"],
    }
    if task is not None:
        example = task.examples[place]
        found |= {
            "prompt": shorten(example.prompt),
            "options": list(example.options),
            "right": [example.options[option] for option in example.correct_options],
            "a_text": _text(a, example),
            "b_text": _text(b, example),
        }
    return found


def _text(row: Mapping[str, Any], example: Example) -> str:
    if row["prediction"] < 0:
        return str(row.get("text", ""))
    return example.options[row["prediction"]]


def shorten(text: str, most: int = _PROMPT_CHARACTERS) -> str:
    """Cuts a text in the middle, at spaces where some are near, to at most `most` characters."""
    if len(text) <= most:
        return text
    mark = " [...] "
    head = (most - len(mark)) // 2
    tail = most - len(mark) - head
    start, end = text[:head], text[-tail:]
    if " " in start[head // 2 :]:
        start = start[: start.rindex(" ")]
    if " " in end[: tail // 2]:
        end = end[end.index(" ") + 1 :]
    return f"{start}{mark}{end}"


def format_comparison(result: Mapping[str, Any]) -> str:
    """Formats a comparison for a terminal."""
    flips, difference = result["flips"], result["difference"]
    interval = difference["interval"]
    change = f"{difference['points']:+.2f} points"
    if interval is not None:
        change += f" (95 % interval over examples {interval[0]:+.2f} to {interval[1]:+.2f})"
    lines = [
        f"{result['task']} ({result['split']}), {result['num_examples']} examples",
        *(
            f"{letter.upper()}  {result[letter]['score']:.2f}  {result[letter]['name']}"
            for letter in "ab"
        ),
        f"B - A: {change}",
        f"{flips['right_to_wrong']} turned wrong, {flips['wrong_to_right']} turned right "
        f"(McNemar's exact test: p = {flips['mcnemar_p_value']:.3g})",
    ]
    table = [("part", "examples", "A %", "B %", "turned wrong", "turned right")]
    for kind in ("classes", "slices"):
        for part in result[kind]:
            name = part["name"] if len(part["name"]) <= 40 else f"{part['name'][:37]}..."
            table.append(
                (
                    *(name, str(part["num_examples"]), f"{part['a']:.1f}", f"{part['b']:.1f}"),
                    *(str(part["right_to_wrong"]), str(part["wrong_to_right"])),
                )
            )
    if len(table) > 1:
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines += [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
    for entry in result["regressions"]:
        fell = entry["margin_change"]
        lines.append(
            f"- example {entry['idx']}{' turned wrong' if entry['turned_wrong'] else ''}"
            + ("" if fell is None or not math.isfinite(fell) else f", margin {fell:+.3f}")
        )
        if "prompt" in entry:
            prompt = " ".join(shorten(entry["prompt"], 160).split())
            right = " or ".join(entry["right"])
            lines.append(f"  {prompt}")
            lines.append(f"  right: {right}; A: {entry['a_text']}; B: {entry['b_text']}")
    return "\n".join(lines)
