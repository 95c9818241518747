"""Times compiled programs against each other: warm, in shuffled order, with intervals.

One clock (`time.perf_counter` of the host) stops when the device has finished. A program that takes
less time than the host needs to launch it is repeated inside one launch (`Alternative.calls`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from uncurl_jax.errors import InputError

CONFIDENCE = 0.95


class Timing(NamedTuple):
    """Seconds that one call takes.

    Attributes:
      seconds: median over the samples.
      low, high: ends of an interval of that median.
      confidence: how often an interval made so holds the true median. With fewer than six samples
        it is the range of all of them, which holds it less often than 95 %.
      samples: number of measurements.
      calls: calls that each measurement was divided by.
    """

    seconds: float
    low: float
    high: float
    confidence: float
    samples: int
    calls: int

    def to_json(self) -> dict[str, Any]:
        """Returns the object that records hold."""
        return {
            "seconds": self.seconds,
            "interval": [self.low, self.high],
            "confidence": round(self.confidence, 4),
            "samples": self.samples,
            "calls_per_sample": self.calls,
        }


class Alternative(NamedTuple):
    """Something to time.

    Attributes:
      run: does it and returns the arrays to wait for.
      calls: how often `run` does it; its time is divided by this.
    """

    run: Callable[[], Any]
    calls: int = 1


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Returns an interval of the median from order statistics, and its confidence.

    Free of any distribution (Conover, Practical Nonparametric Statistics, section 3.2): the k-th
    smallest and k-th largest of n independent samples hold the median unless fewer than k of them
    fall on one side, which has probability 2 * P(Binomial(n, 1/2) < k). k is the largest that keeps
    95 %.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    num_samples = len(ordered)
    ranks = np.arange(1, num_samples // 2 + 1)
    confidences = 1.0 - 2.0 * stats.binom.cdf(ranks - 1, num_samples, 0.5)
    holding = np.flatnonzero(confidences >= CONFIDENCE)
    place = int(holding[-1]) if len(holding) else 0
    confidence = float(confidences[place]) if len(confidences) else 0.0
    return float(ordered[place]), float(ordered[num_samples - 1 - place]), confidence


def summarize(samples: Sequence[float], calls: int = 1) -> Timing:
    """Summarises measured seconds, each of `calls` calls."""
    if not len(samples):
        raise InputError(
            "A timing needs at least one sample, got none: choose --repeats 1 or more."
        )
    each = np.asarray(samples, np.float64) / calls
    low, high, confidence = median_interval(each.tolist())
    return Timing(float(np.median(each)), low, high, confidence, len(each), calls)


def time_alternatives(
    alternatives: Mapping[str, Alternative],
    *,
    repeats: int,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times several programs in rounds: each round runs every one of them once, in a new order.

    So drift of the machine meets all of them alike, and none always follows the same other.

    Args:
      alternatives: what to time, by name.
      repeats: rounds that are measured.
      warmup: rounds before them that are not; the first may compile.
      seed: of the orders.
      clock: seconds.

    Returns:
      The timing of each.
    """
    names = list(alternatives)
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for place in range(warmup + repeats):
            for index in generator.permutation(len(names)):
                name = names[index]
                start = clock()
                jax.block_until_ready(alternatives[name].run())
                seconds = clock() - start
                if place >= warmup:
                    samples[name].append(seconds)
    finally:
        if was_enabled:
            gc.enable()
    return {name: summarize(samples[name], alternatives[name].calls) for name in names}
