"""Times alternatives in shuffled rounds, so that ratios between them are paired."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def time_rounds(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds_per_measurement: float,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Times each variant once a round, in an order drawn anew for each round.

    Args:
      variants: functions without arguments, already compiled and run once.
      rounds: how many.
      seconds_per_measurement: a variant is called so often that one measurement takes about this
        long; calls are queued, and the last one is waited for.
      seed: of the orders.

    Returns:
      Seconds per call, one entry a round.
    """
    repeats = {}
    for name, function in variants.items():
        jax.block_until_ready(function())
        begin = time.perf_counter()
        for _ in range(3):
            result = function()
        jax.block_until_ready(result)
        once = (time.perf_counter() - begin) / 3
        repeats[name] = max(1, round(seconds_per_measurement / once))
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                result = variants[name]()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return seconds


def summary(values: list[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": round(values[0], digits)}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": round(middle, digits),
        "quartiles": [round(low, digits), round(high, digits)],
    }


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median and quartiles of the rounds' ratios over / under."""
    return summary([a / b for a, b in zip(over, under, strict=True)])
