from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from uncurl_jax.data.metrics import Score, accuracy, confidence_interval, f1a, macro_f1
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence import paired

ACCURACY, MACRO_F1 = Score((accuracy,), "accuracy"), Score((macro_f1,), "macro_f1")


def make_examples(labels, groups=None):
    return [
        Example(f"q{i}", ("no", "yes"), int(label), i, () if groups is None else (groups[i],))
        for i, label in enumerate(labels)
    ]


# A study with a known truth. A model answers 1 where `center of the label + seed + example + own`
# is positive. The seed's part is skill: away from 0 on the label's side. The example's part is half
# common to both models; "own" is the interaction of seed and example.
CENTERS = ((-0.9, 0.9), (-0.6, 0.6))
EXAMPLE_SD = 0.7


def true_score(metric, centers, seed_sd, interaction_sd):
    """Expected score of a model on infinitely many examples, over seeds; by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = np.sqrt(2 * EXAMPLE_SD**2 + interaction_sd**2)
    negatives = stats.norm.cdf((centers[0] - seed_sd * nodes) / spread)
    positives = stats.norm.cdf((centers[1] + seed_sd * nodes) / spread)
    if metric is ACCURACY:
        values = 50 * (positives + 1 - negatives)
    else:
        yes = 2 * positives / (2 * positives + negatives + 1 - positives)
        no = 2 * (1 - negatives) / (2 * (1 - negatives) + negatives + 1 - positives)
        values = 50 * (yes + no)
    return float(weights @ values / weights.sum())


def one_study(generator, num_groups, num_seeds, seed_sd, interaction_sd):
    """Labels [group] and answers [model * seed, group] of two models."""
    labels = generator.integers(2, size=num_groups)
    common = generator.normal(0, EXAMPLE_SD, num_groups)
    answers = []
    for centers in CENTERS:
        fixed = np.array(centers)[labels] + common
        fixed = fixed + generator.normal(0, EXAMPLE_SD, num_groups)
        own = generator.normal(0, interaction_sd, (num_seeds, num_groups))
        skill = seed_sd * generator.normal(size=(num_seeds, 1)) * (2 * labels - 1)
        answers.append(fixed + skill + own > 0)
    return labels, np.concatenate(answers).astype(np.int64)


def statistics_of(metric, labels, answers):
    """The metric's own statistics, [group, run, statistic], for options 0 and 1."""
    if metric is ACCURACY:
        parts = [answers == labels, np.ones_like(answers)]
    else:
        parts = []
        for option in (0, 1):
            is_label, is_answer = labels == option, answers == option
            parts += [is_label & is_answer, ~is_label & is_answer, is_label & ~is_answer]
    return np.stack(parts, axis=-1).astype(np.float64).transpose(1, 0, 2)


def coverage(metric, *, num_groups, num_seeds, seed_sd, interaction_sd, num_studies, seed=1):
    """Share of studies whose 95 % interval holds the true difference."""
    generator = np.random.default_rng(seed)
    truth = true_score(metric, CENTERS[0], seed_sd, interaction_sd) - true_score(
        metric, CENTERS[1], seed_sd, interaction_sd
    )
    hits, runs, at_once = 0, 2 * num_seeds, 50
    for _ in range(num_studies // at_once):
        studies = [
            one_study(generator, num_groups, num_seeds, seed_sd, interaction_sd)
            for _ in range(at_once)
        ]
        table = np.concatenate([statistics_of(metric, *study) for study in studies], axis=1)
        value = metric.metrics[0].value
        scores = value(table.sum(axis=0))
        resampled = value(paired._resampled_sums(table, 300))
        for start in range(0, at_once * runs, runs):
            samples = [
                paired.Sample(float(scores[run]), resampled[:, run], num_groups)
                for run in range(start, start + runs)
            ]
            found = paired.paired_difference(samples[:num_seeds], samples[num_seeds:])
            hits += found.low <= truth <= found.high
    return hits / (num_studies // at_once * at_once)


@pytest.mark.parametrize("metric", [ACCURACY, MACRO_F1], ids=["accuracy", "macro_f1"])
def test_the_simulation_makes_the_statistics_and_the_truth_of_the_metric(metric):
    generator = np.random.default_rng(0)
    labels, answers = one_study(generator, 200_000, 1, 0.0, 0.5)
    table = statistics_of(metric, labels, answers)
    examples = make_examples(labels[:500])
    (sample, _) = paired.sample_scores(metric, examples, answers[:, :500].tolist())
    value = metric.metrics[0].value
    assert float(value(table[:500].sum(axis=0))[0]) == pytest.approx(sample.score)
    scores = value(table.sum(axis=0))
    for centers, score in zip(CENTERS, scores, strict=True):
        assert true_score(metric, centers, 0.0, 0.5) == pytest.approx(float(score), abs=0.4)


def test_intervals_cover_the_truth_with_three_seeds_that_differ():
    rate = coverage(
        ACCURACY, num_groups=60, num_seeds=3, seed_sd=0.4, interaction_sd=0.5, num_studies=3000
    )
    assert 0.93 <= rate <= 0.97


def test_intervals_cover_the_truth_when_seeds_do_not_differ():
    rate = coverage(
        MACRO_F1, num_groups=60, num_seeds=3, seed_sd=0.0, interaction_sd=0.5, num_studies=3000
    )
    assert 0.93 <= rate <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("metric", [ACCURACY, MACRO_F1], ids=["accuracy", "macro_f1"])
@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("num_groups", [60, 250])
@pytest.mark.parametrize("seed_sd", [0.0, 0.15, 0.4, 0.8])
def test_intervals_cover_93_to_97_percent(metric, num_seeds, num_groups, seed_sd):
    rate = coverage(
        metric,
        num_groups=num_groups,
        num_seeds=num_seeds,
        seed_sd=seed_sd,
        interaction_sd=0.5,
        num_studies=3000,
    )
    assert 0.93 <= rate <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("metric", [ACCURACY, MACRO_F1], ids=["accuracy", "macro_f1"])
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_where_seeds_change_most_answers_intervals_are_a_little_too_wide(metric, num_seeds):
    rate = coverage(
        metric,
        num_groups=60,
        num_seeds=num_seeds,
        seed_sd=0.0,
        interaction_sd=2.0,
        num_studies=3000,
    )
    assert 0.93 <= rate <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks",
    [
        ((60, 2.0), (100, 0.5), (250, 1.0)),
        ((60, 2.0), (250, 2.0)),
        ((250, 4.0), (250, 0.0)),
        ((60, 0.0), (60, 0.0)),
    ],
    ids=lambda tasks: "-".join(f"{size}x{spread}" for size, spread in tasks),
)
def test_the_mean_over_fixed_tasks_covers(tasks):
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(4000):
        estimates = []
        for size, spread in tasks:
            example = generator.normal(0, 20, size)
            own = generator.normal(0, 15, (3, size))
            values = example + own + generator.normal(0, spread, (3, 1))
            alone = float(values.var(axis=1, ddof=1).mean()) / size
            together = float(values.mean(axis=0).var(ddof=1)) / size
            estimates.append(paired._joined(values.mean(axis=1), together, alone, size - 1))
        found = paired.mean_over_fixed_tasks(estimates)
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / 4000 <= 0.975


def test_degrees_of_freedom_are_between_those_of_the_parts():
    ends = stats.t.ppf(0.975, [2, 200])
    found = paired._cochran([(3.0, 2), (1.0, 200)])
    assert stats.t.ppf(0.975, found) == pytest.approx((3 * ends[0] + ends[1]) / 4)
    assert paired._cochran([(1.0, 2), (0.0, 200)]) == 2
    assert paired._cochran([(0.0, 2), (1.0, 200)]) == 200
    assert paired._cochran([(1.0, 4), (1.0, 4)]) == 4


def test_variance_parts_are_those_of_a_two_way_analysis():
    """With accuracy every part has a closed form: the mean of 0/1/-1 differences."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=400)
    runs = [
        np.where(generator.random(400) < p, labels, 1 - labels).tolist()
        for p in (0.8, 0.7, 0.75, 0.6, 0.55, 0.65)
    ]
    samples = paired.sample_scores(ACCURACY, make_examples(labels), runs, num_draws=20_000)
    found = paired.paired_difference(samples[:3], samples[3:])
    right = 100.0 * (np.array(runs) == labels)
    difference = right[:3] - right[3:]
    together = difference.mean(axis=0).var(ddof=1) / 400
    alone = difference.var(axis=1, ddof=1).mean() / 400
    interaction = (alone - together) / 2
    seed = max(difference.mean(axis=1).var(ddof=1) / 3, interaction)
    assert found.mean == pytest.approx(difference.mean())
    assert found.seed_variance == pytest.approx(seed, rel=1e-6)
    assert found.interaction_variance == pytest.approx(interaction, rel=0.05)
    assert found.standard_error**2 == pytest.approx(seed + together - interaction, rel=0.05)
    assert found.over == paired.SEEDS_AND_EXAMPLES and found.num_seeds == 3


def test_one_seed_gives_the_paired_t_interval_over_examples():
    generator = np.random.default_rng(3)
    labels = generator.integers(2, size=300)
    runs = [np.where(generator.random(300) < p, labels, 1 - labels).tolist() for p in (0.8, 0.7)]
    ours, theirs = paired.sample_scores(ACCURACY, make_examples(labels), runs, num_draws=20_000)
    found = paired.paired_difference([ours], [theirs])
    right = 100.0 * (np.array(runs) == labels)
    expected = stats.ttest_rel(*right).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.15)
    assert found.over == paired.EXAMPLES


def test_without_predictions_the_interval_is_students_over_seeds():
    ours = [paired.Sample(score, None, 100) for score in (61.0, 63.0, 68.0)]
    theirs = [paired.Sample(score, None, 100) for score in (60.0, 61.0, 64.0)]
    found = paired.paired_difference(ours, theirs)
    test: Any = stats.ttest_1samp([1.0, 2.0, 4.0], 0.0)
    expected = test.confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.over, found.df) == (paired.SEEDS, 2)
    assert 2 * paired.p_value_above(found, 0.0) == pytest.approx(test.pvalue)


def test_one_sided_p_values_are_scipys():
    found = paired.seed_difference([1.0, 2.0, 4.0, 0.5])
    values = [1.0, 2.0, 4.0, 0.5]
    above: Any = stats.ttest_1samp(values, 0.3, alternative="greater")
    below: Any = stats.ttest_1samp(values, 2.5, alternative="less")
    assert paired.p_value_above(found, 0.3) == pytest.approx(above.pvalue)
    assert paired.p_value_below(found, 2.5) == pytest.approx(below.pvalue)


def test_a_bound_on_the_limit_has_a_p_value_of_one_fortieth():
    found = paired.seed_difference([1.0, 2.0, 4.0])
    assert paired.p_value_above(found, found.low) == pytest.approx(0.025)
    assert paired.p_value_below(found, found.high) == pytest.approx(0.025)


def test_without_any_variance_the_mean_decides():
    found = paired.seed_difference([1.0, 1.0, 1.0])
    assert (found.low, found.high) == (1.0, 1.0)
    assert paired.p_value_above(found, 1.0) == 0.0 and paired.p_value_above(found, 1.1) == 1.0
    assert paired.p_value_below(found, 1.0) == 0.0 and paired.p_value_below(found, 0.9) == 1.0


def test_the_mean_over_tasks_is_students_on_their_means():
    estimates = [paired.seed_difference([m - 1, m, m + 1]) for m in (0.5, 2.0, -1.0, 3.0)]
    found = paired.mean_over_tasks(estimates)
    expected = stats.ttest_1samp([0.5, 2.0, -1.0, 3.0], 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.over == paired.TASKS


def test_the_mean_over_fixed_tasks_adds_their_variances():
    estimates = [paired.seed_difference([0.0, 1.0, 2.0]), paired.seed_difference([3.0, 5.0, 4.0])]
    found = paired.mean_over_fixed_tasks(estimates)
    # Each mean has variance 1/3; of the mean of two, (1/3 + 1/3) / 4, with 2 + 2 degrees.
    assert found.standard_error**2 == pytest.approx(1 / 6)
    assert found.df == pytest.approx(4.0)
    half = stats.t.ppf(0.975, 4) * np.sqrt(1 / 6)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_all_runs_of_a_task_are_resampled_on_the_same_draws():
    examples = make_examples([0, 1, 1, 0, 1])
    first, second = paired.sample_scores(ACCURACY, examples, [[0, 1, 0, 0, 1]] * 2)
    (alone,) = paired.sample_scores(ACCURACY, examples, [[0, 1, 0, 0, 1]])
    assert first.resampled is not None and second.resampled is not None
    assert alone.resampled is not None
    assert np.array_equal(first.resampled, second.resampled)
    assert np.array_equal(first.resampled, alone.resampled)


@pytest.mark.parametrize("score", [ACCURACY, MACRO_F1, Score((f1a, accuracy), "mean")])
def test_samples_agree_with_the_interval_of_a_single_evaluation(score):
    generator = np.random.default_rng(7)
    labels = generator.integers(2, size=200)
    predictions = np.where(generator.random(200) < 0.7, labels, 1 - labels).tolist()
    examples = make_examples(labels, groups=(np.arange(200) // 4).tolist())
    (sample,) = paired.sample_scores(score, examples, [predictions])
    assert sample.num_groups == 50
    assert sample.score == pytest.approx(score(examples, predictions))
    ends = confidence_interval(examples, predictions, score, num_resamples=2000, seed=3)
    assert sample.resampled is not None
    assert np.percentile(sample.resampled, [2.5, 97.5]) == pytest.approx(list(ends), abs=1.0)


def test_draws_do_not_depend_on_how_many_fit_into_memory(monkeypatch):
    examples = make_examples([0, 1] * 20)
    whole = paired.sample_scores(ACCURACY, examples, [[0] * 40], num_draws=50)[0].resampled
    monkeypatch.setattr(paired, "_COUNTS_AT_ONCE", 120)
    parts = paired.sample_scores(ACCURACY, examples, [[0] * 40], num_draws=50)[0].resampled
    assert whole is not None and parts is not None and np.array_equal(whole, parts)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_is_statsmodels(p_values):
    expected: Any = multipletests(p_values, method="holm")[1]
    assert paired.holm(p_values) == pytest.approx(expected.tolist())


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 12), (12, 3), (7, 7), (40, 61)])
def test_mcnemar_is_statsmodels_and_the_binomial_test(b, c):
    expected: Any = statsmodels_mcnemar([[50, b], [c, 20]], exact=True)
    assert paired.mcnemar(b, c) == pytest.approx(expected.pvalue)
    if b + c:
        assert paired.mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue)


def test_the_knee_is_farthest_from_the_chord():
    assert paired.knee({1: 70.0, 2: 69.8, 4: 69.5, 8: 60.0}) == 4
    assert paired.knee({1: 3.0, 2: 2.0, 3: 1.0}) is None
    assert paired.knee({1: 3.0, 2: 2.0}) is None
    assert paired.knee({1: 3.0, 2: 3.0, 3: 3.0}) is None


def test_pairs_that_do_not_match_are_refused():
    sample = paired.Sample(60.0, np.zeros(5), 10)
    with pytest.raises(InputError, match="the same seeds twice, got 1 and 2"):
        paired.paired_difference([sample], [sample] * 2)
    with pytest.raises(InputError, match=r"on the same examples, got \[10, 11\] groups"):
        paired.paired_difference([sample], [sample._replace(num_groups=11)])
    with pytest.raises(InputError, match="at least 2 of them, got 1"):
        paired.seed_difference([1.0])
    with pytest.raises(InputError, match="at least 2 of them, got 1"):
        paired.mean_over_tasks([paired.seed_difference([1.0, 2.0])])
    with pytest.raises(InputError, match="must be of additive metrics"):
        paired.sample_scores(Score((lambda e, p: {"own": 1.0},), "own"), [], [])
