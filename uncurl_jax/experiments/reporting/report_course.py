"""Figures of how a study went: training curves and what each stage cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax.experiments.reporting.report_drawing import (
    COLOURS,
    PANEL_INCHES,
    PIXELS_PER_INCH,
    Entry,
    Figure,
    Table,
    new_canvas,
    render_panel,
)
from uncurl_jax.experiments.reporting.report_page import format_count

CURVES, COSTS = "Training", "What the study cost"
# More lines or points than these are thinned out, so that a page of a large study stays small.
_MAX_LINES, _MAX_POINTS, _MAX_NAMED = 60, 80, 6


class Curve(NamedTuple):
    """The training loss of one stage.

    Attributes:
      stage: pretrain, prefinetune, finetune, ...
      name: of the work item.
      tokens: trained on, rising.
      loss: at each.
    """

    stage: str
    name: str
    tokens: tuple[float, ...]
    loss: tuple[float, ...]


class StageCost(NamedTuple):
    """What all work items of a stage took together."""

    stage: str
    items: int
    seconds: float
    tokens: int


def draw_curves(curves: Sequence[Curve], tasks: Sequence[str]) -> Figure | None:
    """Draws loss against tokens, a panel per stage; None without a curve.

    Args:
      curves: in the order of their stages.
      tasks: names that tell curves of one stage apart by colour, where the curves' names hold them.
    """
    if not curves:
        return None
    panels, rows, thinned = [], [], False
    coloured: dict[str, str] = {}
    for stage in dict.fromkeys(curve.stage for curve in curves):
        own = [curve for curve in curves if curve.stage == stage]
        shown = _evenly(own, _MAX_LINES)
        thinned |= len(shown) < len(own)
        canvas = new_canvas(2.3)
        axes = canvas.add_subplot()
        unit, suffix = _unit(max(curve.tokens[-1] for curve in own))
        for curve in shown:
            name = next((t for t in tasks if t in curve.name.split("/")), None)
            name = name or next((t for t in tasks if t in curve.name), None)
            if name is None and 1 < len(shown) <= _MAX_NAMED:
                name = _short(curve, shown)
            if name is None:
                colour = COLOURS[0]
            else:
                colour = coloured.setdefault(name, COLOURS[len(coloured) % len(COLOURS)])
            points = _evenly(list(zip(curve.tokens, curve.loss, strict=True)), _MAX_POINTS)
            tokens, loss = zip(*points, strict=True)
            thin = len(shown) > _MAX_NAMED
            axes.plot(
                np.array(tokens) / unit,
                loss,
                color=colour,
                lw=0.7 if thin else 1.2,
                alpha=0.55 if thin else 1.0,
            )
        axes.set_title(f"{stage} ({len(own)} {'run' if len(own) == 1 else 'runs'})")
        axes.set_xlabel(f"tokens{suffix}")
        axes.set_ylabel("training loss")
        axes.grid(axis="y")
        label = f"{stage}: training loss against tokens of {len(own)} runs; numbers stand below"
        panels.append(render_panel(canvas, label, f"curves-{stage}"))
        rows += [
            (
                *(stage, curve.name, format_count(curve.tokens[-1])),
                *(f"{loss:.3f}" for loss in (curve.loss[0], min(curve.loss), curve.loss[-1])),
            )
            for curve in own
        ]
    caption = "Loss on the training batches as logged, a line per run and a panel per stage."
    if thinned:
        caption += f" At most {_MAX_LINES} runs of a stage are drawn, evenly chosen."
    return Figure(
        CURVES,
        "curves",
        "Training loss",
        caption,
        tuple(panels),
        round(PANEL_INCHES * PIXELS_PER_INCH),
        Table(("stage", "run", "tokens", "first", "lowest", "last"), tuple(rows)),
        tuple(Entry(name, colour, "", "") for name, colour in coloured.items()),
    )


def _evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Returns at most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = np.round(np.linspace(0, len(values) - 1, most)).astype(int)
    return [values[place] for place in places]


def _unit(largest: float) -> tuple[float, str]:
    for unit, suffix in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if largest >= unit:
            return unit, suffix
    return 1.0, ""


def _short(curve: Curve, others: Sequence[Curve]) -> str:
    """Returns the parts of a curve's name that not all of its panel share."""
    shared = set.intersection(*(set(other.name.split("/")) for other in others))
    parts = [part for part in curve.name.split("/") if part not in shared]
    return " ".join(parts).replace("_", " ")


def draw_costs(costs: Sequence[StageCost]) -> Figure | None:
    """Draws seconds and tokens of each stage; None if nothing is known."""
    if not any(cost.seconds or cost.tokens for cost in costs):
        return None
    canvas = new_canvas(0.45 + 0.24 * len(costs))
    left, right = canvas.subplots(1, 2, sharey=True)
    places = np.arange(len(costs))
    for axes, values, text, colour, title in (
        (left, [cost.seconds for cost in costs], format_seconds, COLOURS[0], "time"),
        (right, [cost.tokens for cost in costs], format_count, COLOURS[4], "tokens"),
    ):
        axes.barh(places, values, height=0.62, color=colour)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {text(value) if value else '–'}", va="center", fontsize=8)
        axes.set_xlim(0, 1.6 * max(values) or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title)
    left.set_yticks(places, [cost.stage for cost in costs])
    left.set_ylim(len(costs) - 0.5, -0.5)
    total = StageCost(
        "all",
        sum(cost.items for cost in costs),
        sum(cost.seconds for cost in costs),
        sum(cost.tokens for cost in costs),
    )
    rows = tuple(
        (cost.stage, str(cost.items), format_seconds(cost.seconds), f"{cost.tokens:,}")
        for cost in [*costs, total]
    )
    return Figure(
        COSTS,
        "costs",
        "Time and tokens of each stage",
        "All work items of a stage together, as their records say; "
        f"{format_seconds(total.seconds)} and {format_count(total.tokens)} tokens in "
        "all. Tokens are those trained on or read.",
        (render_panel(canvas, "Time and tokens of each stage; the numbers stand below", "costs"),),
        round(PANEL_INCHES * PIXELS_PER_INCH),
        Table(("stage", "work items", "time", "tokens"), rows),
    )


def format_seconds(seconds: float) -> str:
    """Formats a duration: 42 s, 3.5 min, 2.1 h."""
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 1e6 else f"{seconds / 86400:.3g} days"


def sum_costs(records: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[StageCost]:
    """Adds up the records of runs.jsonl by stage.

    Args:
      records: with "stage", "seconds" and "tokens"; others do not count.
      order: of the stages; unknown ones follow.
    """
    known = [r for r in records if isinstance(r.get("stage"), str) and _is_number(r.get("seconds"))]
    stages = sorted(
        {record["stage"] for record in known},
        key=lambda stage: (order.index(stage) if stage in order else len(order), stage),
    )
    costs = []
    for stage in stages:
        own = [record for record in known if record["stage"] == stage]
        tokens = sum(int(r["tokens"]) for r in own if _is_number(r.get("tokens")))
        costs.append(StageCost(stage, len(own), float(sum(r["seconds"] for r in own)), tokens))
    return costs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
