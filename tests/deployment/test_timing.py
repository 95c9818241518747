from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.deployment import timing
from uncurl_jax.deployment.timing import Alternative, median_interval, summarize
from uncurl_jax.errors import InputError


def test_the_interval_of_twenty_samples_is_the_sixth_and_the_fifteenth():
    """P(Binomial(20, 1/2) < 6) = 0.0207, so ranks 6 and 15 hold the median with 0.9586."""
    low, high, confidence = median_interval([float(value) for value in range(1, 21)])
    assert (low, high) == (6.0, 15.0)
    assert confidence == pytest.approx(0.9586, abs=1e-4)


def test_six_samples_are_the_fewest_whose_range_holds_the_median_with_95_percent():
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0, pytest.approx(0.96875))
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0, pytest.approx(0.9375))
    assert median_interval([2.0]) == (2.0, 2.0, 0.0)


def test_the_interval_holds_the_median_as_often_as_it_says():
    """1000 sets of 15 lognormal samples; the share of hits has a standard error of 0.6 %."""
    generator = np.random.default_rng(0)
    hits, confidence = 0, 0.0
    for _ in range(1000):
        low, high, confidence = median_interval(generator.lognormal(size=15).tolist())
        hits += low <= 1.0 <= high
    assert confidence >= 0.95
    assert hits / 1000 == pytest.approx(confidence, abs=0.02)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.integers(1, 9))
def test_a_median_lies_in_its_interval_and_calls_divide_all(samples, calls):
    one, many = summarize(samples), summarize(samples, calls)
    assert one.low <= one.seconds <= one.high
    assert many.seconds == pytest.approx(one.seconds / calls)
    assert (many.low, many.high) == (
        pytest.approx(one.low / calls),
        pytest.approx(one.high / calls),
    )


def test_every_round_runs_each_alternative_once_in_an_order_of_its_own():
    order: list[str] = []
    alternatives = {
        name: Alternative(lambda name=name: order.append(name)) for name in ("a", "b", "c", "d")
    }
    timing.time_alternatives(alternatives, repeats=10, warmup=2, seed=1)
    rounds = [tuple(order[place : place + 4]) for place in range(0, 48, 4)]
    assert len(rounds) == 12
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in rounds)
    assert len(set(rounds)) > 6
    again: list[str] = list(order)
    order.clear()
    timing.time_alternatives(alternatives, repeats=10, warmup=2, seed=1)
    assert order == again


def test_warm_up_rounds_are_left_out_and_calls_share_the_time():
    """A clock that advances by 1 within a call; the first two rounds would count as 100."""
    ticks = itertools.chain([0.0, 100.0, 100.0, 200.0], itertools.count(200.0, 1.0))
    result = timing.time_alternatives(
        {"step": Alternative(lambda: None, calls=4)},
        repeats=7,
        warmup=2,
        clock=lambda: next(ticks),
    )
    assert result["step"].seconds == 0.25
    assert (result["step"].samples, result["step"].calls) == (7, 4)


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="needs at least one sample, got none"):
        summarize([])
