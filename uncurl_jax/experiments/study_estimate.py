"""What a study will cost: tokens, and time from what its finished stages took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from uncurl_jax.experiments import stages as stages_lib
from uncurl_jax.experiments.stages import Stage
from uncurl_jax.experiments.study import StudyConfig
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.training import throughput

# What a training step of a small model reaches of the matrix product's speed; a rough guess that
# finished stages replace.
_SHARE_OF_PEAK = 0.2


def remaining_seconds(left: Sequence[Stage], records: Sequence[Mapping[str, Any]]) -> float | None:
    """Estimates the time of stages from records of the same kind; None without any record.

    Trained stages cost by their tokens, others as much as the mean of their kind. Kinds that have
    no record yet cost, by tokens or by number, what all stages together did.
    """
    timed = [record for record in records if record["seconds"] > 0]
    if not timed:
        return None
    mean = sum(record["seconds"] for record in timed) / len(timed)
    rates: dict[str, float] = {}
    means: dict[str, float] = {}
    for kind in stages_lib.KINDS:
        same = [record for record in timed if record["stage"] == kind]
        if same:
            means[kind] = sum(record["seconds"] for record in same) / len(same)
            tokens = sum(record["tokens"] for record in same)
            if kind in stages_lib.TRAINED and tokens:
                rates[kind] = sum(record["seconds"] for record in same) / tokens
    any_rate = max(rates.values(), default=None)
    total = 0.0
    for stage in left:
        rate = rates.get(stage.kind, any_rate)
        if stage.tokens and rate is not None:
            total += rate * stage.tokens
        else:
            total += means.get(stage.kind, mean)
    return total


def describe(
    config: StudyConfig,
    left: Sequence[Stage],
    done: Sequence[Stage],
    records: Sequence[Mapping[str, Any]],
    models: Sequence[str],
) -> dict[str, Any]:
    """Returns what `sweep.dry_run` says."""
    seconds = remaining_seconds(left, records)
    basis = "finished stages of this study"
    if seconds is None:
        seconds = _seconds_by_flops(config, left)
        basis = (
            f"training FLOPs at {100 * _SHARE_OF_PEAK:.0f} % of a matrix product's speed on this "
            "machine, compilation and evaluation not counted: a rough guess until a stage is done"
        )
    kinds = stages_lib.count_by_kind([*left, *done])
    names = {stage.name for stage in left}
    return {
        "stages": {
            kind: {
                "done": sum(stage.name not in names for stage in members),
                "left": sum(stage.name in names for stage in members),
                "tokens": sum(stage.tokens for stage in members if stage.name in names),
            }
            for kind, members in kinds.items()
        },
        "tokens": sum(stage.tokens for stage in left),
        "seconds": round(seconds, 1),
        "basis": basis,
        "models": list(models),
    }


def _seconds_by_flops(config: StudyConfig, left: Sequence[Stage]) -> float:
    active = count_parameters(config.model).active
    flops = throughput.training_flops_per_token(config.model, active, config.row_length)
    return sum(stage.tokens for stage in left) * flops / (_SHARE_OF_PEAK * _product_speed(config))


def _product_speed(config: StudyConfig) -> float:
    """FLOP/s of one matrix product of 1024 rows in the model's compute type, on all devices."""
    size = 1024
    x = jnp.ones((size, size), config.model.dtype)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    begin = time.perf_counter()
    calls = 0
    while time.perf_counter() - begin < 0.2:
        product(x, x).block_until_ready()
        calls += 1
    return 2.0 * size**3 * calls / (time.perf_counter() - begin) * jax.device_count()


def format_seconds(seconds: float) -> str:
    """Formats a duration: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_plan(plan: Mapping[str, Any]) -> str:
    """Formats what `sweep.dry_run` returns for a terminal."""
    lines = [f"{'stage':18}{'done':>6}{'left':>6}{'tokens to train':>18}"]
    lines += [
        f"{kind:18}{row['done']:>6}{row['left']:>6}{row['tokens']:>18,}"
        for kind, row in plan["stages"].items()
    ]
    lines.append(
        f"{len(plan['models'])} models, {plan['tokens']:,} tokens, about "
        f"{format_seconds(plan['seconds'])} (from {plan['basis']})"
    )
    return "\n".join(lines)
