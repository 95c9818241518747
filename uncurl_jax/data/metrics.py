"""SuperGLUE's metrics on predicted options, in percent, and their bootstrap intervals.

Every metric here is a ratio of sums over groups of examples (a group is one example, except for
MultiRC, where it is one question). `AdditiveMetric` keeps the two steps apart, so that a bootstrap
over groups is one matrix product.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from uncurl_jax.data.tasks import Example, Metric
from uncurl_jax.errors import InputError

MEAN = "mean"

ScoreFn = Callable[[Sequence[Example], Sequence[int]], float]


@dataclasses.dataclass(frozen=True)
class AdditiveMetric:
    """A metric that depends on sums over groups only.

    Attributes:
      name: the metric's name, also in manifests.
      statistics: (examples, predictions, groups [example] int) -> [group, statistic] float64.
      value: [..., statistic] sums -> [...] percent.
    """

    name: str
    statistics: Callable[[Sequence[Example], Sequence[int], np.ndarray], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]

    @property
    def __name__(self) -> str:
        """The metric's name, as a plain function would have."""
        return self.name

    def __call__(self, examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, float]:
        """Returns {name: percent}.

        Args:
          examples: at least one example, labelled.
          predictions: index of the predicted option of each example.

        Raises:
          InputError: If the lengths differ, there is no example, or one has no label.
        """
        check_predictions(examples, predictions)
        sums = self.statistics(examples, predictions, group_ids(examples)).sum(axis=0)
        return {self.name: float(self.value(sums))}


class Interval(NamedTuple):
    """A 95 % interval of a score, in percent."""

    low: float
    high: float


def check_predictions(examples: Sequence[Example], predictions: Sequence[int]) -> None:
    """Raises InputError unless there is one prediction per labelled example and one at least."""
    if not examples:
        raise InputError("A metric needs at least one example, got none: check the split.")
    if len(examples) != len(predictions):
        raise InputError(
            f"A metric needs one prediction per example, got {len(predictions)} predictions for "
            f"{len(examples)} examples."
        )
    for example, prediction in zip(examples, predictions, strict=True):
        if not 0 <= prediction < len(example.options):
            raise InputError(
                f"A prediction must be the index of an option, got {prediction} for example "
                f"{example.idx}, which has {len(example.options)} options."
            )
        if example.label is None and not example.targets:
            raise InputError(
                f"A metric needs labelled examples, got example {example.idx} without a label: "
                f"score a split that has labels."
            )


def group_ids(examples: Sequence[Example]) -> np.ndarray:
    """Returns [example] int64: 0.. in order of first appearance; an example alone is a group."""
    known: dict[tuple, int] = {}
    keys = (ex.group or ("alone", place) for place, ex in enumerate(examples))
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def _sum_by_group(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums [example, statistic] rows into [group, statistic] float64."""
    sums = np.zeros((int(groups.max()) + 1, rows.shape[1]), np.float64)
    np.add.at(sums, groups, rows)
    return sums


def _percent(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns 100 * numerator / denominator, 0 where the denominator is 0."""
    safe = np.where(denominator > 0, denominator, 1)
    return 100.0 * np.where(denominator > 0, numerator / safe, 0.0)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return _percent(sums[..., 0], sums[..., 1])


def _is_correct(examples: Sequence[Example], predictions: Sequence[int]) -> np.ndarray:
    pairs = zip(examples, predictions, strict=True)
    return np.array([prediction in ex.correct_options for ex, prediction in pairs], np.float64)


def _accuracy(examples, predictions, groups):
    correct = _is_correct(examples, predictions)
    return _sum_by_group(np.stack([correct, np.ones_like(correct)], axis=1), groups)


def _confusion(examples, predictions, groups):
    """Per class: true positives, false positives and false negatives; [group, class * 3]."""
    labels = np.array([_required_label(ex) for ex in examples])
    predicted = np.asarray(predictions)
    num_classes = max(len(ex.options) for ex in examples)
    is_label = labels[:, None] == np.arange(num_classes)
    is_predicted = predicted[:, None] == np.arange(num_classes)
    counts = [is_label & is_predicted, ~is_label & is_predicted, is_label & ~is_predicted]
    rows = np.stack(counts, axis=2).astype(np.float64)
    return _sum_by_group(rows.reshape(len(examples), -1), groups)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur among labels or predictions (as scikit-learn's)."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    hits, misses = counts[..., 0], counts[..., 1] + counts[..., 2]
    occurs = hits + misses > 0
    f1 = _percent(2 * hits, 2 * hits + misses)
    return f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def _positive_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of class 1 (the second option, "Yes") over all examples; 0 if it never occurs."""
    hits, misses = sums[..., 3], sums[..., 4] + sums[..., 5]
    return _percent(2 * hits, 2 * hits + misses)


def _exact_match_of_groups(examples, predictions, groups):
    wrong = _sum_by_group(1.0 - _is_correct(examples, predictions)[:, None], groups)
    return np.concatenate([wrong == 0, np.ones_like(wrong)], axis=1).astype(np.float64)


def _best_over_targets(compare: Callable[[str, str], float]):
    def statistics(examples, predictions, groups):
        scores = [
            max(compare(ex.options[prediction], target) for target in ex.targets)
            for ex, prediction in zip(examples, predictions, strict=True)
        ]
        rows = np.stack([np.array(scores, np.float64), np.ones(len(scores))], axis=1)
        return _sum_by_group(rows, groups)

    return statistics


def _required_label(example: Example) -> int:
    if example.label is None:
        raise InputError(
            f"Macro-averaged F1 needs one label per example, got example {example.idx} without: "
            f"use accuracy."
        )
    return example.label


def normalize_answer(text: str) -> str:
    """Lower-cases, drops punctuation and articles, and joins words by one space (SQuAD's rule)."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def token_f1(prediction: str, target: str) -> float:
    """F1 of the bags of normalised words, in [0, 1]; 0 if they share none."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(target).split()
    common = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def _same_answer(prediction: str, target: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(target))


accuracy = AdditiveMetric("accuracy", _accuracy, _ratio)
"""Percent of examples whose predicted option is right."""

macro_f1 = AdditiveMetric("macro_f1", _confusion, _macro_f1)
"""F1 per class, averaged over the classes (CB)."""

f1a = AdditiveMetric("f1a", _confusion, _positive_f1)
"""F1 of "Yes", the second option, over all answers of all questions (MultiRC)."""

exact_match = AdditiveMetric("exact_match", _exact_match_of_groups, _ratio)
"""Percent of groups (MultiRC: questions) all of whose examples are right."""

max_token_f1 = AdditiveMetric("token_f1", _best_over_targets(token_f1), _ratio)
"""Word F1 with the nearest accepted text, averaged over examples (ReCoRD)."""

max_exact_match = AdditiveMetric("token_exact_match", _best_over_targets(_same_answer), _ratio)
"""Percent of examples whose answer equals an accepted text after normalisation (ReCoRD)."""

_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (accuracy, macro_f1, f1a, exact_match, max_token_f1, max_exact_match)
}


def register_metric(name: str, metric: Metric) -> None:
    """Adds a metric of the caller's; caches of tasks that use it name it in their manifest.

    Args:
      name: a name that is not taken.
      metric: (examples, predictions) -> {name: percent}.

    Raises:
      InputError: If the name is taken.
    """
    if name in _METRICS:
        raise InputError(f"A metric's name must be new, got {name!r}: choose another.")
    _METRICS[name] = metric


def get_metric(name: str) -> Metric:
    """Returns a metric by name, or raises InputError with the nearest names."""
    if name not in _METRICS:
        near = difflib.get_close_matches(name, _METRICS, n=3) or sorted(_METRICS)
        raise InputError(f"A metric must be a known one, got {name!r}: nearest {', '.join(near)}.")
    return _METRICS[name]


def metric_name(metric: Metric) -> str:
    """Returns the registered name of a metric.

    Raises:
      InputError: If it is not registered.
    """
    for name, known in _METRICS.items():
        if known is metric:
            return name
    raise InputError(
        f"A task's metrics must be registered, got {metric!r}: call register_metric first."
    )


@dataclasses.dataclass(frozen=True)
class Score:
    """A task's metrics and the one number that stands for them.

    Attributes:
      metrics: the metrics, in order.
      primary: the name of one of their values, or "mean" for the mean of all values.
    """

    metrics: tuple[Metric, ...]
    primary: str

    def values(self, examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, float]:
        """Returns every value in percent and "score", the primary one.

        Raises:
          InputError: If the predictions do not fit the examples, or `primary` names no value.
        """
        check_predictions(examples, predictions)
        values: dict[str, float] = {}
        for metric in self.metrics:
            values |= metric(examples, predictions)
        if self.primary != MEAN and self.primary not in values:
            raise InputError(
                f"The primary metric must be one of {sorted(values)} or {MEAN!r}, "
                f"got {self.primary!r}: correct the task."
            )
        mean = sum(values.values()) / len(values)
        return {**values, "score": mean if self.primary == MEAN else values[self.primary]}

    def __call__(self, examples: Sequence[Example], predictions: Sequence[int]) -> float:
        """Returns the score in percent."""
        return self.values(examples, predictions)["score"]


def confidence_interval(
    examples: Sequence[Example],
    predictions: Sequence[int],
    score_fn: ScoreFn,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Returns the 95 % percentile bootstrap interval of a score.

    Groups (MultiRC: questions; otherwise examples) are drawn with replacement.

    Args:
      examples: labelled examples.
      predictions: index of the predicted option of each.
      score_fn: (examples, predictions) -> percent; a `Score` of this module's metrics is fast,
        any other function is called `num_resamples` times.
      num_resamples: bootstrap samples.
      seed: of the resampling; one seed gives one interval.

    Returns:
      The 2.5 and 97.5 percentiles, in percent.

    Raises:
      InputError: If the predictions do not fit the examples or num_resamples < 1.
    """
    check_predictions(examples, predictions)
    if num_resamples < 1:
        raise InputError(f"num_resamples must be at least 1, got {num_resamples}.")
    groups = group_ids(examples)
    num_groups = int(groups.max()) + 1
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, num_groups, num_groups) for _ in range(num_resamples))
    metrics = score_fn.metrics if isinstance(score_fn, Score) else ()
    additive = [metric for metric in metrics if isinstance(metric, AdditiveMetric)]
    if isinstance(score_fn, Score) and len(additive) == len(metrics):
        chosen = [m for m in additive if score_fn.primary in (MEAN, m.name)]
        statistics = [m.statistics(examples, predictions, groups) for m in chosen]
        counts = np.stack([np.bincount(draw, minlength=num_groups) for draw in draws])
        values = [m.value(counts @ s) for m, s in zip(chosen, statistics, strict=True)]
        scores = np.mean(values, axis=0)
    else:
        members: list[list[int]] = [[] for _ in range(num_groups)]
        for place, group in enumerate(groups.tolist()):
            members[group].append(place)
        scores = np.array(
            [_resampled(examples, predictions, score_fn, members, draw) for draw in draws]
        )
    low, high = np.percentile(scores, [2.5, 97.5])
    return Interval(float(low), float(high))


def _resampled(
    examples: Sequence[Example],
    predictions: Sequence[int],
    score_fn: ScoreFn,
    members: list[list[int]],
    draw: np.ndarray,
) -> float:
    """Scores the examples of the drawn groups; a group drawn twice is two groups."""
    chosen, answers = [], []
    for copy, group in enumerate(draw.tolist()):
        for place in members[group]:
            chosen.append(dataclasses.replace(examples[place], group=(copy,)))
            answers.append(predictions[place])
    return score_fn(chosen, answers)


def best_options(
    example_index: np.ndarray, option_index: np.ndarray, scores: np.ndarray, num_examples: int
) -> list[int]:
    """Returns the option with the largest score of each example; ties go to the lowest index.

    Args:
      example_index: [row] int in [0, num_examples).
      option_index: [row] int, the option that a row scores.
      scores: [row] float, its log-likelihood.
      num_examples: number of examples; each needs one row at least.

    Raises:
      InputError: If an example has no row.
      RuntimeError: If a score is NaN.
    """
    if np.isnan(scores).any():
        raise RuntimeError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} option scores are NaN: the model "
            f"diverged or its weights are not finite."
        )
    order = np.lexsort((option_index, -np.asarray(scores, np.float64), example_index))
    ordered = np.asarray(example_index)[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = order[is_first]
    if len(first) != num_examples:
        missing = sorted(set(range(num_examples)) - set(ordered.tolist()))
        raise InputError(
            f"Every example needs a score for each option, got none for example {missing[0]} "
            f"and {len(missing) - 1} more: score all rows."
        )
    return [int(option) for option in np.asarray(option_index)[first]]
