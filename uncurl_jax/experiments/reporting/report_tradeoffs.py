"""Figures of what is lost against what is gained: memory, bytes on the wire, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax.experiments.reporting.report_drawing import (
    INK,
    LINE,
    PANEL_INCHES,
    PAPER,
    PIXELS_PER_INCH,
    SOFT,
    Entry,
    Figure,
    Table,
    key_of,
    new_canvas,
    pad_limits,
    render_panel,
)
from uncurl_jax.experiments.reporting.report_page import format_bytes
from uncurl_jax.experiments.reporting.report_scores import (
    MEAN,
    Row,
    Style,
    series_styles,
    sources,
    trained_small,
    with_mean,
)

SECTION = "What is lost, what is gained"


class Cost(NamedTuple):
    """What a model of so many experts per layer costs, by one measure.

    Attributes:
      name: of the measure, as an axis and a title have it.
      unit: of `values`, "" for bytes, which are written with a prefix.
      values: {experts per MoE layer: cost}.
      origin: where the numbers come from, a sentence.
    """

    name: str
    unit: str
    values: Mapping[int, float]
    origin: str

    def text(self, value: float) -> str:
        """Writes a value with its unit."""
        return f"{value:.3g} {self.unit}" if self.unit else format_bytes(value)


class Point(NamedTuple):
    """A model in the plane of cost and loss.

    Attributes:
      name: of the model.
      kind: "unpruned", "scratch" or "pruned".
      series: (method, router) of a pruned one.
      num_experts: per MoE layer.
      cost: in the unit of the measure.
      loss: points below the unpruned model.
      interval: of the loss, 95 %, or None.
    """

    name: str
    kind: str
    series: tuple[str, str] | None
    num_experts: int
    cost: float
    loss: float
    interval: tuple[float, float] | None


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Says of each (cost, loss) whether no other is at most as large in both and less in one."""
    return [
        not any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
        )
        for point in points
    ]


def memory_cost(rows: Sequence[Row]) -> Cost:
    """Returns the bytes of the stored parameters of every size."""
    values = {row["num_experts"]: float(row["bytes"]) for row in rows}
    return Cost("memory of the parameters", "", values, "Bytes of the stored parameters.")


def draw_tradeoffs(
    rows: Sequence[Row], findings: Sequence[Mapping[str, Any]], costs: Sequence[Cost]
) -> list[Figure]:
    """Draws loss against each cost, a panel per task (and the mean) and Z.

    Args:
      rows: as `report.summarize` returns them.
      findings: as `report.find_thresholds` returns them; they hold the paired losses.
      costs: measures; each needs two sizes of the rows at least to be drawn.
    """
    rows = with_mean(rows)
    figures = (_figure(rows, findings, cost) for cost in costs)
    return [figure for figure in figures if figure is not None]


def _figure(
    rows: Sequence[Row], findings: Sequence[Mapping[str, Any]], cost: Cost
) -> Figure | None:
    styles, key = series_styles(rows), key_of("loss", cost.name)
    panels, lines = [], []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if MEAN in tasks:
        tasks = [MEAN, *(task for task in tasks if task != MEAN)]
    has_scratch = False
    for task in tasks:
        own = [row for row in rows if row["task"] == task]
        finding = next((f for f in findings if f["task"] == task), None)
        for source in sources(own):
            points = _points(own, finding, source, cost)
            if len({point.num_experts for point in points}) < 2:
                continue
            has_scratch |= any(point.kind == "scratch" for point in points)
            best = non_dominated([(point.cost, point.loss) for point in points])
            name = f"{'mean over the tasks' if task == MEAN else task}, from {source} experts"
            canvas = new_canvas(2.5)
            _draw(canvas.add_subplot(), points, best, styles, cost)
            canvas.axes[0].set_title(name)
            label = f"{name}: points lost against {cost.name}; the numbers stand below"
            panels.append(render_panel(canvas, label, f"{key}-{key_of(task)}-{source}"))
            lines += [
                _line(task, source, point, is_best, cost)
                for point, is_best in zip(points, best, strict=True)
            ]
    if not panels:
        return None
    caption = (
        f"Points below the unpruned model (mean and 95 % interval, paired by seed) against "
        f"{cost.name}. Down and to the left is better. Ringed and joined: no other model is at "
        f"least as good in both. {cost.origin}"
    )
    legend = [Entry(f"{m}, {r}", s.colour, s.marker) for (m, r), s in styles.items()]
    if has_scratch:
        legend.append(Entry("same size from scratch", SOFT, "o", None, True))
    legend += [Entry("unpruned", INK, "D"), Entry("not dominated", INK, "ring", None, True)]
    columns = (
        *("task", "Z", "model", "experts", cost.name, "points lost", "95 % interval"),
        "not dominated",
    )
    return Figure(
        SECTION,
        key,
        f"Loss against {cost.name}",
        caption,
        tuple(panels),
        round(PANEL_INCHES * PIXELS_PER_INCH),
        Table(columns, tuple(lines)),
        tuple(legend),
    )


def _points(
    rows: Sequence[Row], finding: Mapping[str, Any] | None, source: int, cost: Cost
) -> list[Point]:
    """Returns the models whose cost is known, with what they lose against the unpruned one."""
    unpruned = next(
        (r for r in rows if r["kind"] == "unpruned" and r["num_experts"] == source), None
    )
    if unpruned is None:
        return []
    points = []
    if source in cost.values:
        points.append(Point("unpruned", "unpruned", None, source, cost.values[source], 0.0, None))
    for row in trained_small(rows, source):
        count = row["num_experts"]
        if count < source and count in cost.values:
            loss = unpruned["score"] - row["score"]
            points.append(
                Point("from scratch", "scratch", None, count, cost.values[count], loss, None)
            )
    candidates = finding["candidates"] if finding else _candidates(rows, unpruned)
    for candidate in candidates:
        count, drop = candidate["num_experts"], candidate["drop"]
        known = drop.get("seeds") and count in cost.values
        if candidate["source_num_experts"] == source and known:
            series = (candidate["method"], candidate["router"])
            ends = drop["interval"] or ()
            interval = (ends[0], ends[1]) if ends and _are_finite(*ends) else None
            points.append(
                Point(
                    *(", ".join(series), "pruned", series, count),
                    *(cost.values[count], drop["mean"], interval),
                )
            )
    return points


def _candidates(rows: Sequence[Row], unpruned: Row) -> list[dict[str, Any]]:
    """Returns the pruned models with their loss, without interval, where no finding tells it."""
    pruned = [row for row in rows if row["kind"] == "pruned"]
    names = ("source_num_experts", "num_experts", "method", "router")
    found = []
    for row in pruned:
        seeds = sorted(set(row["scores"]) & set(unpruned["scores"]))
        losses = [unpruned["scores"][seed] - row["scores"][seed] for seed in seeds]
        mean = sum(losses) / max(len(losses), 1)
        drop = {"seeds": len(seeds), "mean": mean, "interval": [None, None]}
        found.append({**{name: row[name] for name in names}, "drop": drop})
    return found


def _are_finite(*values: Any) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def _draw(
    axes: Any,
    points: Sequence[Point],
    best: Sequence[bool],
    styles: Mapping[tuple[str, str], Style],
    cost: Cost,
) -> None:
    axes.axhline(0, color=INK, lw=0.9, ls=(0, (2, 2)))
    front = sorted((p.cost, p.loss) for p, is_best in zip(points, best, strict=True) if is_best)
    axes.plot(*zip(*front, strict=True), color=INK, lw=0.9, alpha=0.55, drawstyle="steps-post")
    for point, is_best in zip(points, best, strict=True):
        style = styles[point.series] if point.series else Style(INK, "D")
        if point.kind == "scratch":
            style = Style(SOFT, "o")
        if is_best:
            axes.plot([point.cost], [point.loss], "o", ms=11, mfc="none", mec=INK, mew=1.2)
        errors = None
        if point.interval:
            low, high = point.interval
            errors = [[max(point.loss - low, 0.0)], [max(high - point.loss, 0.0)]]
        axes.errorbar(
            [point.cost],
            [point.loss],
            yerr=errors,
            color=style.colour,
            marker=style.marker,
            mfc=PAPER if point.kind == "scratch" else style.colour,
            ms=5.5,
            elinewidth=0.8,
        )
    losses = [point.loss for point in points]
    reach = [end for p in points if p.interval for end in p.interval]
    ends = [min(max(end, min(losses) - 12), max(losses) + 12) for end in reach]
    axes.set_ylim(*pad_limits([0.0, *losses, *ends]))
    costs = [point.cost for point in points]
    room = 0.09 * (max(costs) - min(costs) or max(costs))
    axes.set_xlim(min(costs) - room, max(costs) + room)
    ticks = _spread(sorted(set(costs)), (max(costs) - min(costs)) / 5)
    axes.set_xticks(ticks, [cost.text(tick) for tick in ticks])
    axes.grid(color=LINE)
    axes.set_xlabel(cost.name)
    axes.set_ylabel("points lost")


def _spread(values: Sequence[float], least: float) -> list[float]:
    """Returns the ends of rising values, and those between that are at least so far apart."""
    kept = [values[0]]
    for value in values[1:-1]:
        if value - kept[-1] >= least and values[-1] - value >= least:
            kept.append(value)
    return [*kept, *values[1:][-1:]]


def _line(task: str, source: int, point: Point, is_best: bool, cost: Cost) -> tuple[str, ...]:
    interval = "–"
    if point.interval:
        interval = f"{_number(point.interval[0])} to {_number(point.interval[1])}"
    return (
        *(task, str(source), point.name, str(point.num_experts), cost.text(point.cost)),
        *(_number(point.loss), interval, "yes" if is_best else ""),
    )


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
