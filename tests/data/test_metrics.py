"""Tests of metrics.py: worked by hand, against scikit-learn, and properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from uncurl_jax.data import metrics
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError

f1_score: Any = sklearn.metrics.f1_score  # Its annotation of zero_division leaves out 0.
CLASSES = ("Yes", "No", "Maybe")


def examples_of(labels, options=CLASSES, groups=None):
    groups = groups or [()] * len(labels)
    return [
        Example("p", options, label, i, group, (options[label],))
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def test_accuracy_of_three_right_in_four_is_75_percent():
    assert metrics.accuracy(examples_of([0, 1, 2, 0]), [0, 1, 2, 1]) == {"accuracy": 75.0}


def test_cb_reports_accuracy_and_macro_f1_and_scores_their_mean():
    # Class 0: tp 1 fp 0 fn 1 -> 2/3; class 1: tp 1 fp 1 fn 0 -> 2/3; class 2: 1. Mean 7/9.
    score = metrics.Score((metrics.accuracy, metrics.macro_f1), "mean")
    values = score.values(examples_of([0, 0, 1, 2]), [0, 1, 1, 2])
    assert values["accuracy"] == 75.0
    assert values["macro_f1"] == pytest.approx(700 / 9)
    assert values["score"] == pytest.approx((75 + 700 / 9) / 2)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_accuracy_and_macro_f1_equal_scikit_learn(pairs):
    labels, predictions = map(list, zip(*pairs, strict=True))
    examples = examples_of(labels)
    assert metrics.accuracy(examples, predictions)["accuracy"] == pytest.approx(
        100 * accuracy_score(labels, predictions)
    )
    assert metrics.macro_f1(examples, predictions)["macro_f1"] == pytest.approx(
        100 * f1_score(labels, predictions, average="macro", zero_division=0)
    )


def test_multirc_f1a_counts_answers_and_exact_match_counts_questions():
    # Question (0, 0): right, right. Question (0, 1): right, wrong, right (a missed Yes).
    groups = [(0, 0), (0, 0), (0, 1), (0, 1), (0, 1)]
    examples = examples_of([1, 0, 1, 1, 0], ("No", "Yes"), groups)
    predictions = [1, 0, 1, 0, 0]
    # tp 2, fp 0, fn 1: F1 = 4 / 5.
    assert metrics.f1a(examples, predictions) == {"f1a": pytest.approx(80.0)}
    assert metrics.exact_match(examples, predictions) == {"exact_match": 50.0}
    score = metrics.Score((metrics.f1a, metrics.exact_match), "mean")
    assert score(examples, predictions) == pytest.approx(65.0)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_f1a_equals_scikit_learn(pairs):
    labels, predictions = map(list, zip(*pairs, strict=True))
    got = metrics.f1a(examples_of(labels, ("No", "Yes")), predictions)["f1a"]
    assert got == pytest.approx(100 * f1_score(labels, predictions, zero_division=0))


def test_record_takes_the_best_accepted_answer():
    options = ("Benazir Bhutto", "Bhutto", "the Pakistan!")
    examples = [
        Example("p", options, 0, 0, targets=("Benazir Bhutto",)),
        Example("p", options, 0, 1, targets=("Benazir Bhutto", "Bhutto")),
        Example("p", options, None, 2, targets=("Pakistan",)),
    ]
    # Words shared with the nearest target: 1 of 1 and 2 -> 2/3; all; all after normalisation.
    assert metrics.max_token_f1(examples, [1, 1, 2]) == {"token_f1": pytest.approx(800 / 9)}
    assert metrics.max_exact_match(examples, [1, 1, 2]) == {
        "token_exact_match": pytest.approx(200 / 3)
    }


def test_answers_are_normalised_by_squads_rule():
    assert metrics.normalize_answer("The  U.S. of a theory") == "us of theory"
    assert metrics.token_f1("no word", "is shared") == 0.0


def test_the_interval_of_all_right_is_a_point():
    examples = examples_of([0, 1, 2])
    score = metrics.Score((metrics.accuracy,), "accuracy")
    assert metrics.confidence_interval(examples, [0, 1, 2], score) == (100.0, 100.0)


def test_the_interval_is_near_the_normal_approximation():
    labels = [0] * 400
    predictions = [0] * 300 + [1] * 100
    score = metrics.Score((metrics.accuracy,), "accuracy")
    low, high = metrics.confidence_interval(examples_of(labels), predictions, score, 2000)
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)  # 4.24 points
    assert low == pytest.approx(75 - half, abs=0.6)
    assert high == pytest.approx(75 + half, abs=0.6)


@pytest.mark.parametrize(
    ("functions", "options"),
    [
        ((metrics.accuracy, metrics.macro_f1), CLASSES),
        ((metrics.f1a, metrics.exact_match), ("No", "Yes")),
        ((metrics.max_token_f1, metrics.max_exact_match), ("New York", "York City")),
    ],
)
def test_the_fast_interval_equals_resampling_examples(functions, options):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, len(options), 30).tolist()
    predictions = generator.integers(0, len(options), 30).tolist()
    examples = examples_of(labels, options, [(i // 3,) for i in range(30)])
    score = metrics.Score(functions, "mean")
    fast = metrics.confidence_interval(examples, predictions, score, 50, seed=3)
    slow = metrics.confidence_interval(
        examples, predictions, lambda chosen, answers: score(chosen, answers), 50, seed=3
    )
    assert fast == pytest.approx(slow)
    assert fast.low < score(examples, predictions) < fast.high


def test_one_seed_gives_one_interval_and_groups_are_drawn_whole():
    groups = [(0,)] * 5 + [(1,)] * 5
    examples = examples_of([0] * 10, CLASSES, groups)
    score = metrics.Score((metrics.accuracy,), "accuracy")
    predictions = [0] * 5 + [1] * 5
    # Two groups, one all right and one all wrong: 0, 50 or 100 percent are all that can be drawn.
    interval = metrics.confidence_interval(examples, predictions, score, 200, seed=1)
    assert interval == (0.0, 100.0)
    assert interval == metrics.confidence_interval(examples, predictions, score, 200, seed=1)


def test_the_best_option_has_the_largest_score_and_ties_go_to_the_first():
    example_index = np.array([0, 0, 1, 1, 1])
    option_index = np.array([1, 0, 2, 1, 0])
    scores = np.array([-1.0, -2.0, -3.0, -3.0, -4.0])
    assert metrics.best_options(example_index, option_index, scores, 2) == [1, 1]


def test_scores_must_be_complete_and_finite():
    with pytest.raises(RuntimeError, match="1 of 2 option scores are NaN"):
        metrics.best_options(np.array([0, 0]), np.array([0, 1]), np.array([1, np.nan]), 1)
    with pytest.raises(InputError, match="got none for example 1 and 1 more"):
        metrics.best_options(np.array([0]), np.array([0]), np.array([1.0]), 3)


@pytest.mark.parametrize(
    ("examples", "predictions", "message"),
    [
        ([], [], "needs at least one example"),
        (examples_of([0, 1]), [0], "got 1 predictions for 2 examples"),
        (examples_of([0]), [3], "got 3 for example 0, which has 3 options"),
        ([Example("p", CLASSES, None, 4)], [0], "got example 4 without a label"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(examples, predictions, message):
    with pytest.raises(InputError, match=message):
        metrics.accuracy(examples, predictions)
    with pytest.raises(InputError, match=message):
        metrics.confidence_interval(examples, predictions, lambda *_: 0.0)


def test_other_wrong_uses_are_refused():
    examples = examples_of([0])
    unlabelled = [Example("p", CLASSES, None, 5, targets=("Other",))]
    with pytest.raises(InputError, match="got example 5 without: use accuracy"):
        metrics.macro_f1(unlabelled, [0])
    with pytest.raises(InputError, match="num_resamples must be at least 1, got 0"):
        metrics.confidence_interval(examples, [0], lambda *_: 0.0, 0)
    with pytest.raises(InputError, match=r"must be one of \['accuracy'\] or 'mean', got 'f1'"):
        metrics.Score((metrics.accuracy,), "f1")(examples, [0])
    with pytest.raises(InputError, match="got 'acuracy': nearest accuracy"):
        metrics.get_metric("acuracy")
    with pytest.raises(InputError, match="must be registered"):
        metrics.metric_name(lambda examples, predictions: {})


def test_a_metric_of_the_callers_is_found_by_name(monkeypatch):
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))

    def half(examples, predictions):
        return {"half": 50.0}

    metrics.register_metric("half", half)
    assert metrics.get_metric("half") is half and metrics.metric_name(half) == "half"
    assert metrics.metric_name(metrics.accuracy) == metrics.accuracy.__name__ == "accuracy"
    with pytest.raises(InputError, match="name must be new, got 'half'"):
        metrics.register_metric("half", half)
