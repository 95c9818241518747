"""What follows from the cells of a record: scaling, speedups, and the line that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.deployment.bench_settings import SINGLE


def weak_scaling(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compares equal work per device: time on one device / time on several, 1 being perfect.

    Args:
      cells: of a record.

    Returns:
      One entry for each model and layout that has a forward pass on one device too.
    """
    timed = [cell for cell in cells if cell["status"] == "measured" and cell.get("forward")]
    alone = {
        cell["model"]: cell["forward"]["seconds"] for cell in timed if cell["layout"] == SINGLE
    }
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in timed:
        if cell["model"] in alone and cell["layout"] != SINGLE:
            seconds = cell["forward"]["seconds"]
            found.setdefault((cell["model"], cell["layout"]), []).append(
                {
                    "devices": cell["devices"],
                    "seconds": seconds,
                    "tokens_per_second": cell["forward"]["tokens_per_second"],
                    "efficiency": alone[cell["model"]] / seconds,
                }
            )
    return [
        {
            "model": name,
            "layout": layout,
            "points": [
                {
                    "devices": 1,
                    "seconds": alone[name],
                    "tokens_per_second": next(
                        cell["forward"]["tokens_per_second"]
                        for cell in timed
                        if cell["model"] == name and cell["layout"] == SINGLE
                    ),
                    "efficiency": 1.0,
                },
                *points,
            ],
        }
        for (name, layout), points in found.items()
    ]


def speedups(
    models: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compares each model and layout with the largest model of its backbone, on as many devices.

    Args:
      models: of a record.
      cells: of the same record.

    Returns:
      How many times as fast as the largest model, in the layout that is best for that one; its
      own entry for that layout says 1.
    """
    found = []
    by_name = {model["name"]: model for model in models}
    timed = [cell for cell in cells if cell["status"] == "measured" and cell.get("forward")]
    for cell in timed:
        backbone = by_name[cell["model"]]["backbone"]
        rivals = [
            other
            for other in timed
            if other["devices"] == cell["devices"]
            and by_name[other["model"]]["backbone"] == backbone
        ]
        largest = max(by_name[other["model"]]["parameters"] for other in rivals)
        base = min(
            (other for other in rivals if by_name[other["model"]]["parameters"] == largest),
            key=lambda other: other["forward"]["seconds"],
        )
        found.append(
            {
                "model": cell["model"],
                "layout": cell["layout"],
                "devices": cell["devices"],
                "against": {"model": base["model"], "layout": base["layout"]},
                "forward": base["forward"]["seconds"] / cell["forward"]["seconds"],
                "prefill": _ratio(base["prefill"], cell["prefill"]),
                "decode": [
                    {"batch": slow["batch"], "speedup": _ratio(slow, fast)}
                    for slow, fast in zip(base["decode"], cell["decode"], strict=True)
                ],
            }
        )
    return found


def _ratio(slow: Mapping[str, Any] | None, fast: Mapping[str, Any] | None) -> float | None:
    return None if slow is None or fast is None else slow["seconds"] / fast["seconds"]


def summarize(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the command prints of a record."""
    cells = record["cells"]
    measured = [cell for cell in cells if cell["status"] == "measured"]
    checks = [cell["equality"]["is_equal"] for cell in measured if cell["equality"]]
    compared = [is_equal for is_equal in checks if is_equal is not None]
    sent = [cell["communication"] for cell in measured if cell["communication"]]
    return {
        "pictures": [picture["png"] for picture in record["pictures"]],
        "device": record["device"]["kind"],
        "is_functional_only": record["is_functional_only"],
        "cells": len(cells),
        "out_of_memory": len(cells) - len(measured),
        "equal_to_one_device": all(compared) if compared else None,
        "bytes_as_expected": all(entry["is_equal"] for entry in sent) if sent else None,
    }
