"""What a record of `uncurl bench` says about the latency that a prune gains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.reporting.report_bench import SCHEMA


class Timed(NamedTuple):
    """A gain in latency.

    Attributes:
      gain: fraction of the time of a forward pass that is saved; None if it was not measured.
      text: where it was measured, or why it was not.
    """

    gain: float | None
    text: str


def latency_gain(
    path: str | os.PathLike[str], before: Sequence[int], after: Sequence[int]
) -> Timed:
    """Compares the forward passes of two models on as many devices, each in its fastest layout.

    Args:
      path: record of `uncurl bench`.
      before: experts of each MoE layer before the prune.
      after: likewise after it.

    Returns:
      The gain on the largest number of devices that both were timed on.

    Raises:
      InputError: If the file is missing or of another schema.
    """
    record = artifacts.read_json(path)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f'A benchmark\'s record must have the schema "{SCHEMA}", got {schema!r} in {path}: '
            "measure it again with this version."
        )
    if record["is_functional_only"]:
        return Timed(None, "the record is functional only: host devices of one CPU")
    fastest = [_fastest(record, counts) for counts in (before, after)]
    shared = sorted(set(fastest[0]) & set(fastest[1]))
    if not shared:
        return Timed(None, "the record has no forward pass of both models on as many devices")
    backbone, devices = max(shared, key=lambda key: (key[1], key[0]))
    seconds = [found[backbone, devices] for found in fastest]
    text = (
        f"{1e3 * seconds[0]:.3g} ms before, {1e3 * seconds[1]:.3g} ms after, {devices} x "
        f"{record['device']['kind']}"
    )
    return Timed(1 - seconds[1] / seconds[0], text)


def _fastest(record: Mapping[str, Any], counts: Sequence[int]) -> dict[tuple[str, int], float]:
    """Returns seconds by backbone and number of devices, of models with these experts."""
    names = {
        model["name"]: model["backbone"]
        for model in record["models"]
        if list(model["num_experts"]) == list(counts)
    }
    found: dict[tuple[str, int], float] = {}
    for cell in record["cells"]:
        if cell["model"] in names and cell["status"] == "measured" and cell["forward"]:
            key = (names[cell["model"]], cell["devices"])
            seconds = float(cell["forward"]["seconds"])
            found[key] = min(seconds, found.get(key, seconds))
    return found
