"""What a study's models answered, example by example: read, checked, scored and resampled.

From DIR/tasks/<task>.json and the predictions that runs name, also for the classes and slices of a
task. A task without its file, or a run without predictions, has no evidence of examples; reports
then compare seeds alone and say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data import metrics
from uncurl_jax.data.metrics import Score
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence.paired import Sample, is_additive, sample_scores

CLASS, SLICE = "class", "slice"
# Options that are texts of their own (COPA, ReCoRD) are not classes.
_MAX_CLASSES = 10
_TOLERANCE_POINTS = 1e-6
# Within classes and slices: the percentage of examples answered right, whatever the task's metric,
# which may not be defined on a class alone (F1) or be of groups that a slice cuts.
_SUBSET_SCORE = Score((metrics.accuracy,), "accuracy")


@dataclasses.dataclass(frozen=True)
class TaskExamples:
    """The examples that a task's models were scored on.

    Attributes:
      task: name.
      examples: labelled, in the order of the predictions.
      prompt_tokens: [example] int.
      score: of the task; None if one of its metrics is not registered here.
    """

    task: str
    examples: tuple[Example, ...]
    prompt_tokens: np.ndarray
    score: Score | None


class Subset(NamedTuple):
    """Some examples of a task, and the share of them that each run answers right.

    Attributes:
      kind: CLASS or SLICE.
      name: of a class the text of the right option.
      num_examples: how many.
      samples: by run; percent right.
    """

    kind: str
    name: str
    num_examples: int
    samples: Mapping[str, Sample]


class Guess(NamedTuple):
    """What always giving the same answer scores; who does not beat it has not learned the task.

    Attributes:
      option: index of the option that scores best so.
      text: of the option; None if each example has its own.
      sample: its score, and on other draws of the examples.
    """

    option: int
    text: str | None
    sample: Sample


class Evidence(NamedTuple):
    """What is known of a task's runs beyond their scores.

    Attributes:
      samples: by run, of the task's own score.
      subsets: classes, then slices.
      guess: None if the task's metrics cannot be resampled.
    """

    samples: Mapping[str, Sample]
    subsets: tuple[Subset, ...]
    guess: Guess | None = None


def load_task(path: Path) -> TaskExamples:
    """Reads DIR/tasks/<task>.json.

    Raises:
      InputError: If the file is missing, or a field is.
    """
    values = artifacts.read_json(path)
    try:
        examples = tuple(Example.from_dict(value) for value in values["examples"])
        tokens = np.array([int(value["prompt_tokens"]) for value in values["examples"]])
        names, primary, task = list(values["metrics"]), values["primary_metric"], values["task"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} must hold a task's name, metrics and examples, got none of {error}: run the "
            "study again."
        ) from None
    if not examples:
        raise InputError(f"{path} must hold at least one example, got none: run the study again.")
    try:
        score = Score(tuple(metrics.get_metric(name) for name in names), primary)
    except InputError:
        score = None
    return TaskExamples(task, examples, tokens, score)


def load_predictions(path: Path, task: TaskExamples) -> list[int]:
    """Reads the predicted options of one run.

    Raises:
      InputError: If the file is missing or is not of the task's examples.
    """
    if not path.is_file():
        raise InputError(f"A run's predictions must exist, got nothing at {path}: run it again.")
    rows = artifacts.read_json_lines(path)
    found = [row.get("idx") if isinstance(row, dict) else None for row in rows]
    wanted = [example.idx for example in task.examples]
    if found != wanted:
        place = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
            min(len(found), len(wanted)),
        )
        raise InputError(
            f"{path}:{place + 1}: predictions must be of the {len(wanted)} examples of task "
            f"{task.task} in their order, got {len(found)} that differ here: run it again."
        )
    predicted = [row.get("prediction") for row in rows]
    for place, value in enumerate(predicted):
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(
                f"{path}:{place + 1}: prediction must be the index of an option, got {value!r}: "
                "run it again."
            )
    return predicted


def gather_evidence(directory: Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, Evidence]:
    """Reads what the runs of a study answered, task by task.

    Args:
      directory: that the runs' paths are relative to.
      runs: as `report.load_study` returns them.

    Returns:
      By task; without those whose examples or predictions are not there.

    Raises:
      InputError: If a file is malformed or does not belong to its run.
    """
    evidence = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        own = [run for run in runs if run["task"] == task and run.get("predictions")]
        shards = sorted(directory.glob(f"shard_*_of_*/tasks/{task}.json"))
        files = [directory / "tasks" / f"{task}.json", *shards]
        file = next((file for file in files if file.is_file()), None)
        if not own or file is None:
            continue
        examples = load_task(file)
        predictions = {
            run["run"]: load_predictions(directory / run["predictions"], examples) for run in own
        }
        _check_scores(own, predictions, examples, directory)
        evidence[task] = Evidence(
            _samples(examples.score, examples.examples, predictions),
            tuple(_subsets(examples, predictions)),
            _best_guess(examples),
        )
    return evidence


def _best_guess(task: TaskExamples) -> Guess | None:
    """Returns the option that scores best when it is the answer to every example."""
    count = min(len(example.options) for example in task.examples)
    constant = {str(option): [option] * len(task.examples) for option in range(count)}
    samples = _samples(task.score, task.examples, constant)
    if not samples:
        return None
    best = max(samples, key=lambda name: (samples[name].score, -int(name)))
    texts = {example.options[int(best)] for example in task.examples}
    return Guess(int(best), texts.pop() if len(texts) == 1 else None, samples[best])


def _check_scores(
    runs: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, list[int]],
    task: TaskExamples,
    directory: Path,
) -> None:
    """Refuses predictions that do not give the score of their record."""
    if task.score is None:
        return
    for run in runs:
        found = task.score(task.examples, predictions[run["run"]])
        if abs(found - run["score"]) > _TOLERANCE_POINTS:
            raise InputError(
                f"A run's predictions must give its score {run['score']:.4f}, got {found:.4f} from "
                f"{directory / run['predictions']}: run {run['run']} again."
            )


def _samples(
    score: Score | None, examples: Sequence[Example], predictions: Mapping[str, list[int]]
) -> dict[str, Sample]:
    if score is None or not is_additive(score):
        return {}
    samples = sample_scores(score, examples, list(predictions.values()))
    return dict(zip(predictions, samples, strict=True))


def _subsets(task: TaskExamples, predictions: Mapping[str, list[int]]) -> list[Subset]:
    subsets = []
    members = [*class_members(task.examples), *slice_members(task.examples, task.prompt_tokens)]
    for kind, name, places in members:
        chosen = [task.examples[place] for place in places]
        answers = {run: [p[place] for place in places] for run, p in predictions.items()}
        samples = _samples(_SUBSET_SCORE, chosen, answers)
        subsets.append(Subset(kind, name, len(places), samples))
    return subsets


def class_members(examples: Sequence[Example]) -> list[tuple[str, str, list[int]]]:
    """Places of the examples with each right option, if the options recur."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if example.label is not None:
            places.setdefault(example.options[example.label], []).append(place)
    if not 2 <= len(places) <= _MAX_CLASSES:
        return []
    return [(CLASS, text, places[text]) for text in sorted(places)]


def slice_members(
    examples: Sequence[Example], prompt_tokens: np.ndarray
) -> list[tuple[str, str, list[int]]]:
    """Places of the thirds by prompt length, and of the slices that examples name themselves."""
    first, second = (int(np.quantile(prompt_tokens, q, method="lower")) for q in (1 / 3, 2 / 3))
    thirds = {
        f"prompts of at most {first} tokens": prompt_tokens <= first,
        f"prompts of {first + 1} to {second} tokens": (prompt_tokens > first)
        & (prompt_tokens <= second),
        f"prompts of {second + 1} tokens or more": prompt_tokens > second,
    }
    slices = [
        (SLICE, name, np.flatnonzero(is_member).tolist())
        for name, is_member in thirds.items()
        if 0 < is_member.sum() < len(examples)
    ]
    named: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        value = example.extra.get("slice", ())
        for name in [value] if isinstance(value, str) else value:
            named.setdefault(str(name), []).append(place)
    return slices + [(SLICE, name, named[name]) for name in sorted(named)]
