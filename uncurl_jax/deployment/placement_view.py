"""A placement report for people: tables and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from uncurl_jax.artifacts import atomic_file
from uncurl_jax.deployment.layouts import (
    PURPOSES,
    LayerChoice,
    Layout,
    Request,
    wire_bytes_per_token,
)
from uncurl_jax.deployment.planner import FewestChips, Report
from uncurl_jax.errors import InputError

_CANVASES = {".svg": FigureCanvasSVG, ".png": FigureCanvasAgg}
# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")
_MOST_LAYOUTS = 12
_LAYOUT_HEADINGS = (
    *("", "data", "expert", "model", "experts divided over", "state GB", "cache GB"),
    *("activations~ GB", "HBM~ GB", "wire B/token", "compute~ ms", "communication~ ms"),
    *("step~ ms", "drop~ %", ""),
)
_LAYER_HEADINGS = (
    *("", "layers", "experts", "data", "expert", "model", "divided over", "chips", "padded"),
    *("slots", "weights GB", "state GB", "wire B/token", "compute~ ms", "communication~ ms"),
)


def format_report(report: Report) -> str:
    """Returns a report as tables for a terminal; * marks what was chosen, ~ what is an estimate."""
    request = report.request
    lines = [
        _title(request),
        *_table(_LAYOUT_HEADINGS, [_layout_cells(report, layout) for layout in report.layouts]),
        *(
            f"  data {mesh.data} x expert {mesh.expert} x model {mesh.model}: {problem}"
            for mesh, problem in report.refused.items()
        ),
        f"One layer of each kind, on meshes with model {report.chosen.mesh.model}:",
        *_table(_LAYER_HEADINGS, _layer_rows(report)),
        _fewest_text(request, report.fewest_chips),
        "~ estimates: roofline of the slice's rates, nothing overlapping; bytes of state, cache "
        "and on the wire are counted.",
        report.reason,
    ]
    return "\n".join(lines)


def write_picture(report: Report, path: str | os.PathLike[str]) -> None:
    """Draws memory and step time of the layouts, as .svg or .png.

    Raises:
      InputError: If the name ends otherwise.
    """
    check_picture(path)
    suffix = Path(path).suffix
    with mpl.rc_context({**mpl.rcParamsDefault, "svg.hashsalt": "uncurl_jax", "font.size": 9}):
        figure = _draw(report)
        canvas = _CANVASES[suffix](figure)
        with atomic_file(path) as partial:
            metadata: dict[str, Any] = {"metadata": {"Date": None}} if suffix == ".svg" else {}
            canvas.print_figure(partial, format=suffix[1:], bbox_inches="tight", **metadata)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless the name of a picture ends as one that can be drawn."""
    if Path(path).suffix not in _CANVASES:
        raise InputError(f"A picture must be .svg or .png, got {path}: choose one of them.")


def _title(request: Request) -> str:
    job, slice_ = request.job, request.slice
    parts = f" (in {job.accumulation_steps} parts)" if job.accumulation_steps > 1 else ""
    dtype = "float32" if job.is_training else job.param_dtype
    return (
        f"{job.mode} on {slice_.name}: {slice_.num_chips} chips of "
        f"{slice_.hbm_bytes_per_chip / 1e9:.0f} GB, {request.headroom:.0%} of it free; batch "
        f"{job.batch}{parts} x {job.length} tokens, parameters {dtype}"
    )


def _layout_cells(report: Report, layout: Layout) -> list[str]:
    memory, times = layout.memory, layout.times
    communication = sum(times.communication.values())
    drops = layout.drop_fractions.values()
    return [
        "*" if layout is report.chosen else "",
        *(str(count) for count in layout.mesh),
        _axes_summary(layout),
        _gigabytes(memory.state),
        _gigabytes(memory.cache),
        _gigabytes(memory.activations),
        _gigabytes(memory.total),
        f"{sum(layout.wire_bytes_per_token.values()):,.0f}",
        f"{1e3 * (times.compute + times.update + times.overhead):,.2f}",
        f"{1e3 * communication:,.2f}",
        f"{1e3 * times.total:,.2f}",
        f"{100 * max(drops):.2f}" if drops else "-",
        layout.problem or "",
    ]


def _axes_summary(layout: Layout) -> str:
    counts: dict[str, int] = {}
    for choice in layout.layers.values():
        name = _axes_text(choice)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "-"


def _axes_text(choice: LayerChoice) -> str:
    return "+".join(choice.experts.axes) or "none"


def _layer_rows(report: Report) -> list[list[str]]:
    request, rows = report.request, []
    for kind in report.kinds:
        for mesh, choice in kind.options:
            if mesh.model != report.chosen.mesh.model:
                continue
            experts, times = choice.experts, choice.times
            chosen_for = kind.chosen_for(report.chosen, choice)
            is_for_all = len(chosen_for) == len(kind.layers)
            traffic = wire_bytes_per_token([experts.cost], mesh, request.job)
            rows.append(
                [
                    "" if not chosen_for else "*" if is_for_all else f"* {_range_text(chosen_for)}",
                    _range_text(kind.layers),
                    str(request.model.num_experts[kind.layers[0]]),
                    *(str(count) for count in mesh),
                    _axes_text(choice),
                    str(experts.group),
                    str(experts.padded_experts),
                    "all" if experts.capacity is None else str(experts.capacity),
                    _gigabytes(experts.weight_bytes),
                    _gigabytes(experts.cost.state_bytes),
                    f"{sum(traffic.values()):,.0f}",
                    f"{1e3 * (times.compute + times.update + times.overhead):,.3f}",
                    f"{1e3 * sum(times.communication.values()):,.3f}",
                ]
            )
    return rows


def _range_text(layers: Sequence[int]) -> str:
    if len(layers) > 3:
        return f"{layers[0]},{layers[1]}..{layers[-1]} ({len(layers)})"
    return ",".join(map(str, layers))


def _fewest_text(request: Request, fewest: FewestChips) -> str:
    def count(chips: int | None) -> str:
        most = request.slice.chip_counts[-1]
        return f"more than {most}" if chips is None else str(chips)

    before = ""
    if request.num_experts_before is not None:
        before = f"{count(fewest.before)} before pruning, {count(fewest.after)} after"
    return f"Fewest chips that hold the model and one row each: {before or count(fewest.after)}."


def _mesh_text(layout: Layout) -> str:
    return " x ".join(map(str, layout.mesh))


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.2f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    everything = [headings, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(headings))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]


def _draw(report: Report) -> Figure:
    request, layouts = report.request, report.layouts[:_MOST_LAYOUTS]
    figure = Figure(figsize=(9.0, 1.6 + 0.32 * len(layouts)))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    places = list(range(len(layouts)))
    memory = {
        "state": [layout.memory.state / 1e9 for layout in layouts],
        "key-value cache": [layout.memory.cache / 1e9 for layout in layouts],
        "activations (estimate)": [layout.memory.activations / 1e9 for layout in layouts],
    }
    times = {
        "compute": [1e3 * layout.times.compute for layout in layouts],
        "optimizer": [1e3 * layout.times.update for layout in layouts],
        "launches, small kernels": [1e3 * layout.times.overhead for layout in layouts],
        **{
            purpose: [1e3 * layout.times.communication[purpose] for layout in layouts]
            for purpose in PURPOSES
        },
    }
    _stack(left, places, memory)
    _stack(right, places, times)
    left.axvline(request.budget_bytes / 1e9, color="black", lw=1, ls="--", label="limit")
    left.set_title("GB of HBM per chip", loc="left")
    right.set_title("ms per step, estimated", loc="left")
    labels = [
        f"{'* ' if layout is report.chosen else ''}{_mesh_text(layout)}" for layout in layouts
    ]
    left.set_yticks(places, labels)
    left.set_ylabel("data x expert x model")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False)
    figure.suptitle(_title(request), x=0.02, y=1.06, ha="left", fontsize=9)
    return figure


def _stack(axes: Any, places: Sequence[int], parts: dict[str, list[float]]) -> None:
    """Draws horizontal bars of parts that add up; what is zero everywhere is left out."""
    begin = [0.0] * len(places)
    for colour, (name, values) in zip(_COLOURS, parts.items(), strict=False):
        if any(values):
            axes.barh(places, values, left=begin, height=0.7, color=colour, label=name)
            begin = [left + value for left, value in zip(begin, values, strict=True)]
