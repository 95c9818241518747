"""Intervals of paired score differences over seeds, examples and tasks, and the tests beside them.

Two models are scored on the same examples, once per seed. Their difference varies because another
seed would have trained other models (seed), because other examples would have been asked (example),
and because a seed changes some answers and not others (interaction). The percentile bootstrap over
three seeds covers 75 % at most, so variances are estimated part by part, the examples' by a
bootstrap over groups of examples, and Student's distribution gives the interval. docs/thresholds.md
states the method and the coverage measured in a simulation.

Axes: seed, group (of examples), draw (of the bootstrap), statistic, point. Scores are percent,
differences are points, variances are points squared. Pure numpy and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from uncurl_jax.data.metrics import MEAN, AdditiveMetric, Score, check_predictions, group_ids
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError

CONFIDENCE = 0.95
_LEVEL = 0.5 + CONFIDENCE / 2
NUM_DRAWS = 2000
# Bootstrap draws that are in memory at the same time hold this many counts at most (32 MiB).
_COUNTS_AT_ONCE = 4_000_000

SEEDS_AND_EXAMPLES, SEEDS, EXAMPLES = "seeds and examples", "seeds", "examples"
TASKS, TASKS_FIXED = "tasks", "seeds and examples of fixed tasks"


class Sample(NamedTuple):
    """The score of one run, and what it would be on other draws of the examples.

    Attributes:
      score: percent.
      resampled: [draw] float64, percent; None if the predictions are not known.
      num_groups: groups of examples, the units that are drawn.
    """

    score: float
    resampled: np.ndarray | None
    num_groups: int


class Estimate(NamedTuple):
    """A mean difference in points, and how well it is known.

    Attributes:
      mean: points.
      low, high: ends of the 95 % interval.
      standard_error: points.
      df: degrees of freedom of Student's distribution.
      num_seeds: seeds in every pair; of several tasks, the fewest.
      over: what the interval covers, one of this module's constants.
      seed_variance: of the mean, from seeds and their interaction with examples.
      example_variance: of the mean, from examples alone.
      interaction_variance: of the mean, from the interaction; part of `seed_variance`.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    df: float
    num_seeds: int
    over: str
    seed_variance: float = 0.0
    example_variance: float = 0.0
    interaction_variance: float = 0.0


def is_additive(score: Score) -> bool:
    """Whether a score can be resampled: all of its metrics are sums over groups of examples."""
    return all(isinstance(metric, AdditiveMetric) for metric in score.metrics)


def sample_scores(
    score: Score,
    examples: Sequence[Example],
    predictions: Sequence[Sequence[int]],
    *,
    num_draws: int = NUM_DRAWS,
) -> list[Sample]:
    """Scores several runs on their examples and on the same bootstrap draws of these.

    Args:
      score: of additive metrics.
      examples: labelled.
      predictions: of each run, the index of the predicted option of each example.
      num_draws: bootstrap draws of groups with replacement; fixed by the number of groups, so two
        calls with equally many groups draw the same.

    Returns:
      A sample per run.

    Raises:
      InputError: If predictions do not fit the examples, or a metric is not additive.
    """
    if not is_additive(score):
        raise InputError(
            f"Scores that are resampled must be of additive metrics, got "
            f"{[getattr(metric, '__name__', repr(metric)) for metric in score.metrics]}: use "
            "AdditiveMetric, or compare seeds alone."
        )
    for predicted in predictions:
        check_predictions(examples, predicted)
    if not predictions:
        return []
    groups = group_ids(examples)
    num_groups = int(groups.max()) + 1
    plain = np.zeros(len(predictions))
    resampled = np.zeros((num_draws, len(predictions)))
    metrics = [
        metric
        for metric in score.metrics
        if isinstance(metric, AdditiveMetric) and score.primary in (MEAN, metric.name)
    ]
    for metric in metrics:
        # [group, run, statistic]
        table = np.stack([metric.statistics(examples, p, groups) for p in predictions], axis=1)
        plain += metric.value(table.sum(axis=0)) / len(metrics)
        resampled += metric.value(_resampled_sums(table, num_draws)) / len(metrics)
    return [Sample(float(plain[r]), resampled[:, r], num_groups) for r in range(len(predictions))]


def _resampled_sums(table: np.ndarray, num_draws: int) -> np.ndarray:
    """Sums over drawn groups; [group, run, statistic] -> [draw, run, statistic]."""
    num_groups = len(table)
    flat = table.reshape(num_groups, -1)
    generator = np.random.default_rng(0)
    sums = np.empty((num_draws, flat.shape[1]))
    chunk = max(1, _COUNTS_AT_ONCE // num_groups)
    for start in range(0, num_draws, chunk):
        rows = min(chunk, num_draws - start)
        picks = generator.integers(num_groups, size=(rows, num_groups))
        picks += num_groups * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * num_groups)
        sums[start : start + rows] = counts.reshape(rows, num_groups).astype(np.float64) @ flat
    return sums.reshape(num_draws, *table.shape[1:])


def _student(mean: float, variance: float, df: float) -> tuple[float, float, float]:
    """Ends of the interval and the standard error."""
    error = math.sqrt(variance)
    half = float(stats.t.ppf(_LEVEL, df)) * error if error else 0.0
    return mean - half, mean + half, error


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, given as (variance, its degrees of freedom)."""
    total = sum(variance for variance, _ in parts)
    if not total:
        return min(df for _, df in parts)
    return total**2 / sum(variance**2 / df for variance, df in parts)


def _cochran(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom whose quantile is the mean of the parts' own, weighted by variance.

    Cochran and Cox's rule (Experimental Designs, 1950). Satterthwaite's covers 92 to 93 % where a
    variance of 2 degrees of freedom is a large part of the sum, this one 95.

    Args:
      parts: (variance, its degrees of freedom), one variance above 0 at least.
    """
    total = sum(variance for variance, _ in parts)
    ends = [float(stats.t.ppf(_LEVEL, df)) for _, df in parts]
    wanted = sum(v * end for (v, _), end in zip(parts, ends, strict=True)) / total
    least, most = min(df for _, df in parts), max(df for _, df in parts)
    if wanted >= max(ends) or wanted <= min(ends):
        return least if wanted >= max(ends) else most
    found: Any = optimize.brentq(lambda df: stats.t.ppf(_LEVEL, df) - wanted, least, most)
    return float(found)


def seed_difference(differences: Sequence[float]) -> Estimate:
    """Student's interval of the mean of paired differences over seeds alone.

    Examples are taken as fixed: the interval says nothing about other examples.

    Args:
      differences: points, one per seed, two at least.

    Raises:
      InputError: If there are fewer than two.
    """
    if len(differences) < 2:
        raise InputError(
            f"An interval over seeds needs at least 2 of them, got {len(differences)}: run more."
        )
    values = np.asarray(differences, np.float64)
    mean, df = float(values.mean()), len(values) - 1
    variance = float(values.var(ddof=1)) / len(values)
    low, high, error = _student(mean, variance, df)
    return Estimate(mean, low, high, error, df, len(values), SEEDS, seed_variance=variance)


def paired_difference(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Estimate:
    """Interval of the mean of (ours - theirs) over seeds and examples.

    With d the difference of a seed, k seeds and n groups, three parts add up to the variance of the
    mean: seeds s, examples e, and their interaction i. var(d) / k estimates s + i; the bootstrap
    variance of the seeds' mean difference estimates e + i; the mean bootstrap variance of a single
    seed, e + k i. So i = (alone - together) / (k - 1), and the variance is
    (together - i) + max(var(d) / k, i): whatever few seeds happen to say, they vary at least as
    much as the examples' answers to them do. Degrees of freedom are Cochran's, of k - 1 for
    var(d) / k where it is the larger, n - 1 for the rest.

    Args:
      ours: samples of the seeds.
      theirs: samples of the same seeds in the same order, on the same examples.

    Returns:
      The estimate in points. Without resampled scores it is over seeds alone, with one seed over
      examples alone (`over` says so).

    Raises:
      InputError: If the numbers of seeds or examples differ, or one seed has no resampled score.
    """
    if len(ours) != len(theirs) or not ours:
        raise InputError(
            f"A paired comparison needs the same seeds twice, got {len(ours)} and {len(theirs)}: "
            "leave out those that one lacks."
        )
    differences = np.array([a.score - b.score for a, b in zip(ours, theirs, strict=True)])
    drawn = [sample.resampled for sample in (*ours, *theirs)]
    known = [scores for scores in drawn if scores is not None]
    if len(known) < len(drawn):
        return seed_difference(differences.tolist())
    sizes = {sample.num_groups for sample in (*ours, *theirs)}
    if len(sizes) > 1:
        raise InputError(
            f"Compared models must be scored on the same examples, got {sorted(sizes)} groups of "
            "them: evaluate them on one split."
        )
    (num_groups,) = sizes
    # [seed, draw]
    resampled = np.stack(known[: len(ours)]) - np.stack(known[len(ours) :])
    # A bootstrap's variance of a mean is (n - 1) / n of the unbiased one.
    unbiased = num_groups / max(num_groups - 1, 1)
    together = unbiased * float(resampled.mean(axis=0).var(ddof=1))
    alone = unbiased * float(resampled.var(axis=1, ddof=1).mean())
    return _joined(differences, together, alone, max(num_groups - 1, 1))


def _joined(differences: np.ndarray, together: float, alone: float, example_df: int) -> Estimate:
    """Joins the parts, see `paired_difference`."""
    mean, k = float(differences.mean()), len(differences)
    if k == 1:
        low, high, error = _student(mean, together, example_df)
        return Estimate(mean, low, high, error, example_df, 1, EXAMPLES, 0.0, together)
    interaction = max(0.0, (alone - together) / (k - 1))
    seed = float(differences.var(ddof=1)) / k
    example = max(0.0, together - interaction)
    if seed > interaction:
        df = _cochran([(seed, k - 1), (example, example_df)])
    else:
        seed, df = interaction, float(example_df)
    low, high, error = _student(mean, seed + example, df)
    return Estimate(mean, low, high, error, df, k, SEEDS_AND_EXAMPLES, seed, example, interaction)


def mean_over_fixed_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Interval of the mean over tasks for these very tasks, whose estimates are independent.

    Args:
      estimates: one per task, at least one.
    """
    count = len(estimates)
    mean = float(np.mean([estimate.mean for estimate in estimates]))
    variances = [estimate.standard_error**2 / count**2 for estimate in estimates]
    df = _satterthwaite([(v, e.df) for v, e in zip(variances, estimates, strict=True)])
    low, high, error = _student(mean, sum(variances), df)
    fewest = min(estimate.num_seeds for estimate in estimates)
    return Estimate(mean, low, high, error, df, fewest, TASKS_FIXED)


def mean_over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Interval of the mean over tasks such as these: Student's, on the means of the tasks.

    Args:
      estimates: one per task, at least two.

    Raises:
      InputError: If there are fewer than two.
    """
    if len(estimates) < 2:
        raise InputError(
            f"An interval over tasks needs at least 2 of them, got {len(estimates)}: add tasks."
        )
    values = np.array([estimate.mean for estimate in estimates])
    mean, df = float(values.mean()), len(values) - 1
    low, high, error = _student(mean, float(values.var(ddof=1)) / len(values), df)
    fewest = min(estimate.num_seeds for estimate in estimates)
    return Estimate(mean, low, high, error, df, fewest, TASKS)


def p_value_above(estimate: Estimate, limit: float) -> float:
    """One-sided p-value of "the difference is `limit` at most" against "it is larger"."""
    if not estimate.standard_error:
        return float(estimate.mean < limit)
    return float(stats.t.sf((estimate.mean - limit) / estimate.standard_error, estimate.df))


def p_value_below(estimate: Estimate, limit: float) -> float:
    """One-sided p-value of "the difference is `limit` at least" against "it is smaller"."""
    if not estimate.standard_error:
        return float(estimate.mean > limit)
    return float(stats.t.cdf((estimate.mean - limit) / estimate.standard_error, estimate.df))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted by Holm's step-down rule, in the order given."""
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    result = np.empty_like(values)
    result[order] = adjusted
    return result.tolist()


def mcnemar(only_first_right: int, only_second_right: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    Args:
      only_first_right: examples that the first model alone answers right.
      only_second_right: those that the second alone does.
    """
    flips = only_first_right + only_second_right
    if not flips:
        return 1.0
    fewer = min(only_first_right, only_second_right)
    return min(1.0, 2 * float(stats.binom.cdf(fewer, flips, 0.5)))


def knee(points: Mapping[float, float]) -> float | None:
    """Returns the place where a curve bends most: farthest from the chord between its ends.

    An aid for pictures; no verdict rests on it.

    Args:
      points: place to value. Both are scaled to [0, 1] first.

    Returns:
      The place, or None with fewer than three points or where none lies off the chord.
    """
    if len(points) < 3:
        return None
    x = np.array(sorted(points), np.float64)
    y = np.array([points[place] for place in sorted(points)], np.float64)
    height = float(np.ptp(y))
    if not height:
        return None
    scaled_x, scaled_y = (x - x[0]) / (x[-1] - x[0]), (y - y[0]) / height
    distance = np.abs(scaled_y - scaled_y[-1] * scaled_x)
    return float(x[distance.argmax()]) if distance.max() > 1e-9 else None
