"""The figures of a report, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from uncurl_jax.experiments.report_page import format_bytes, format_count
from uncurl_jax.pruning.plan import LayerPlan, PruningPlan

# Stand-ins that no figure uses otherwise; the page's variables take their place in the SVG, so
# that figures follow its light or dark scheme.
_INK, _SOFT, _LINE, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    _PAPER: "var(--paper)",
}
# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "v", "P", "X")
_WIDTH_INCHES = 5.0
_PIXELS_PER_INCH = 96
# Beyond this many experts a cell of the cluster map is too small for its number.
_MAX_LABELLED_EXPERTS = 64

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "uncurl_jax",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}


class Figure(NamedTuple):
    """A drawn figure: page section, caption, SVG element, width in CSS pixels it needs."""

    section: str
    caption: str
    svg: str
    min_width: int


def _svg(canvas: Canvas, label: str) -> str:
    """Returns one inline <svg> element: no prolog, no names of other sites, no unused ids."""
    FigureCanvasSVG(canvas)
    buffer = io.StringIO()
    canvas.savefig(
        buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None}
    )
    text = inline_svg(buffer.getvalue(), label)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def inline_svg(text: str, label: str) -> str:
    """Turns what matplotlib writes into an <svg> element that can stand in a page.

    Args:
      text: an SVG file.
      label: for those who do not see it.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' role="img" aria-label="[^"]*"', "", text, count=1)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", text, count=1)
    text = re.sub(r' height="[^"]*pt"| width="[^"]*pt"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    label = html.escape(label, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _figure(section: str, caption: str, canvas: Canvas) -> Figure:
    label = re.sub(r"[^\w ,.%]", " ", caption)
    width = round(canvas.get_size_inches()[0] * _PIXELS_PER_INCH)
    return Figure(section, caption, _svg(canvas, label), width)


def draw_figures(
    rows: Sequence[Mapping[str, Any]], plans: Mapping[str, PruningPlan]
) -> list[Figure]:
    """Draws all figures of a report.

    Args:
      rows: as `report.summarize` returns them.
      plans: by task, the plan whose clusters and loads are shown.

    Returns:
      Figures in the order of the page.
    """
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        figures = [draw_scores([row for row in rows if row["task"] == task]) for task in tasks]
        figures.append(draw_sizes(rows))
        figures += [draw_clusters(task, plan) for task, plan in plans.items()]
        figures += [draw_loads(task, plan) for task, plan in plans.items()]
    return figures


def draw_plan(task: str, plan: PruningPlan) -> list[Figure]:
    """Draws one plan: its clusters, and the loads before and after."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        return [draw_clusters(task, plan), draw_loads(task, plan)]


def draw_scores(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws score against experts for the rows of one task: pruned, from scratch, unpruned."""
    canvas = Canvas(figsize=(_WIDTH_INCHES, 3.6))
    axes = canvas.add_subplot()
    series: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        series.setdefault((row["kind"], row["method"] or "", row["router"] or ""), []).append(row)
    pruned = [key for key in series if key[0] == "pruned"]
    for key, members in series.items():
        members = sorted(
            members, key=lambda row: (row["source_num_experts"] or 0, row["num_experts"])
        )
        kind, method, router = key
        place = pruned.index(key) if kind == "pruned" else 0
        style: dict[str, Any] = {
            "unpruned": {"color": _INK, "marker": "D", "ls": "none", "label": "unpruned"},
            "scratch": {
                "color": _SOFT,
                "marker": "o",
                "mfc": _PAPER,
                "ls": "--",
                "label": "from scratch",
            },
            "pruned": {
                "color": _COLOURS[place % len(_COLOURS)],
                "marker": _MARKERS[place % len(_MARKERS)],
                "ls": "-",
                "label": f"{method}, {router}",
            },
        }[kind]
        # Series of one size stand beside each other rather than on top of each other.
        middle = len(pruned) / 2
        steps = {"pruned": place - middle + 0.5, "scratch": -middle - 0.5, "unpruned": 0.0}[kind]
        shift = 2 ** (0.06 * steps)
        for source in dict.fromkeys(row["source_num_experts"] for row in members):
            part = [row for row in members if row["source_num_experts"] == source]
            scores = np.array([row["score"] for row in part])
            ends = np.array([row["interval"] for row in part])
            axes.errorbar(
                [row["num_experts"] * shift for row in part],
                scores,
                yerr=np.abs(ends.T - scores),
                capsize=2.5,
                ms=5.5,
                lw=1.4,
                **{**style, "label": style.pop("label", None) or "_"},
            )
    _score_axes(axes, rows)
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.1, -0.0), ncols=2, fontsize=8.5
    )
    task = rows[0]["task"]
    axes.set_title(task)
    single = any(row["interval_over"] == "examples" for row in rows)
    over = "seeds, or over examples where there is one seed" if single else "seeds"
    return _figure("Score against experts", f"{task}: mean and 95 % interval over {over}.", canvas)


def _score_axes(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    means = [row["score"] for row in rows]
    low = max(min(row["interval"][0] for row in rows), min(means) - 15)
    high = min(max(row["interval"][1] for row in rows), max(means) + 15)
    pad = max(0.06 * (high - low), 0.5)
    axes.set_ylim(low - pad, high + pad)
    sizes = sorted({row["num_experts"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(axis="y", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("experts per MoE layer")
    axes.set_ylabel("score (%)")


def draw_sizes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws parameters (all and active) and bytes of each size of model."""
    sizes: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        sizes.setdefault(row["num_experts"], row)
    counts = sorted(sizes)
    canvas = Canvas(figsize=(_WIDTH_INCHES, 1.0 + 0.42 * len(counts)))
    left, right = canvas.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.12})
    places = np.arange(len(counts))
    total = [sizes[count]["parameters"] for count in counts]
    active = [sizes[count]["active_parameters"] for count in counts]
    stored = [sizes[count]["bytes"] for count in counts]
    left.barh(places, total, height=0.62, color=_COLOURS[5], label="all")
    left.barh(places, active, height=0.26, color=_COLOURS[0], label="active per token")
    right.barh(places, stored, height=0.62, color=_COLOURS[4])
    for axes, values, text in ((left, total, format_count), (right, stored, format_bytes)):
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {text(value)}", va="center", fontsize=8.5)
        axes.set_xlim(0, 1.32 * max(values))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    left.set_yticks(places, [f"{count} experts" for count in counts])
    left.set_title("parameters")
    right.set_title("bytes stored")
    handles, labels = left.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.1, 0.08), ncols=2, fontsize=8.5
    )
    return _figure(
        "Size", "Parameters and bytes of a model with that many experts per MoE layer.", canvas
    )


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}–{high}"


def _prune_name(plan: PruningPlan) -> str:
    before = _range({layer.num_experts for layer in plan.layers})
    after = _range({layer.num_clusters for layer in plan.layers})
    return f"{before} → {after} experts, {plan.method}"


def draw_clusters(task: str, plan: PruningPlan) -> Figure:
    """Draws which experts of each layer were merged: colour is cluster size, text the cluster."""
    widest = max(layer.num_experts for layer in plan.layers)
    cell_inches = 0.2 if widest <= _MAX_LABELLED_EXPERTS else 0.09
    width = max(_WIDTH_INCHES, 0.9 + cell_inches * widest)
    canvas = Canvas(figsize=(width, 1.1 + 0.27 * len(plan.layers)))
    axes = canvas.add_subplot()
    largest = max(max(layer.cluster_sizes) for layer in plan.layers)
    colours = mpl.colormaps["cividis_r"]
    for row, layer in enumerate(plan.layers):
        for expert, cluster in enumerate(layer.labels):
            _draw_cell(axes, expert, row, layer, cluster, colours, largest, widest)
    axes.set_xlim(0, widest)
    axes.set_ylim(len(plan.layers), 0)
    step = max(1, 2 ** math.ceil(math.log2(widest / 16)))
    axes.set_xticks(np.arange(0, widest, step) + 0.5, [str(e) for e in range(0, widest, step)])
    axes.set_yticks(
        np.arange(len(plan.layers)) + 0.5, [f"layer {layer.layer}" for layer in plan.layers]
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("expert before pruning")
    axes.set_title(f"{task}: {_prune_name(plan)}")
    norm = Normalize(0.5, largest + 0.5)
    bar = canvas.colorbar(
        ScalarMappable(
            norm,
            ListedColormap([_shade(colours, size, largest) for size in range(1, largest + 1)]),
        ),
        ax=axes,
        fraction=0.04,
        pad=0.02,
        aspect=12,
    )
    bar.set_label("experts in the cluster")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_ticks(sorted({1, (1 + largest) // 2, largest}))
    dropped = any(label < 0 for layer in plan.layers for label in layer.labels)
    caption = (
        f"{task}: clusters of each MoE layer. A number names the cluster an expert became part of; "
        "it is bold where the expert is the reference that the others were aligned to."
        if widest <= _MAX_LABELLED_EXPERTS
        else f"{task}: clusters of each MoE layer, by the size of the cluster an expert is in."
    )
    caption += " × was dropped." if dropped else ""
    return _figure("What was merged", caption, canvas)


def _shade(colours: Any, size: int, largest: int) -> Any:
    return colours(0.08 + 0.84 * (size - 1) / max(largest - 1, 1))


def _draw_cell(
    axes: Any,
    expert: int,
    row: int,
    layer: LayerPlan,
    cluster: int,
    colours: Any,
    largest: int,
    widest: int,
) -> None:
    is_dropped = cluster < 0
    shade = None if is_dropped else _shade(colours, layer.cluster_sizes[cluster], largest)
    axes.add_patch(
        Rectangle(
            (expert + 0.04, row + 0.05),
            0.92,
            0.9,
            lw=0.6,
            fc="none" if shade is None else shade,
            ec=_LINE if shade is None else "none",
        )
    )
    if widest > _MAX_LABELLED_EXPERTS and not is_dropped:
        return
    is_dark = shade is not None and np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
    axes.text(
        expert + 0.5,
        row + 0.52,
        "×" if is_dropped else str(cluster),
        ha="center",
        va="center",
        fontsize=7.5,
        color=_SOFT if is_dropped else "#ffffff" if is_dark else "#000000",
        weight="bold" if not is_dropped and layer.reference[cluster] == expert else "normal",
    )


def draw_loads(task: str, plan: PruningPlan) -> Figure:
    """Draws the share of a layer's tokens that each expert takes, before and after pruning.

    After is what the plan predicts: an expert takes the tokens of all members of its cluster, and
    the tokens of dropped experts are left out.
    """
    rows = len(plan.layers)
    canvas = Canvas(figsize=(_WIDTH_INCHES, 0.7 + 0.72 * rows))
    grid = canvas.subplots(
        rows, 2, squeeze=False, gridspec_kw={"wspace": 0.28, "hspace": 0.38}, sharex="col"
    )
    for (left, right), layer in zip(grid, plan.layers, strict=True):
        labels, selected = np.array(layer.labels), np.array(layer.selected)
        merged = np.array([selected[labels == c].sum() for c in range(layer.num_clusters)])
        for axes, values, colour in ((left, selected, _COLOURS[5]), (right, merged, _COLOURS[0])):
            shares = 100 * np.sort(values)[::-1] / max(values.sum(), 1.0)
            axes.bar(np.arange(len(shares)), shares, width=0.84, color=colour)
            axes.axhline(100 / len(shares), color=_INK, lw=0.9, ls=":")
            axes.set_ylim(0, 1.18 * shares.max() or 1)
            axes.set_yticks([round(float(shares.max()), 1 if shares.max() < 10 else None)])
            axes.set_xticks([])
            axes.tick_params(length=2)
        left.set_ylabel(f"layer {layer.layer}", rotation=0, ha="right", va="center", labelpad=14)
    grid[0, 0].set_title(f"before: {_range({p.num_experts for p in plan.layers})} experts")
    grid[0, 1].set_title(f"after: {_range({p.num_clusters for p in plan.layers})} experts")
    # Three tenths of an inch below the lowest axes, which end at 0.11 of the height.
    canvas.supxlabel(
        "experts, busiest first; height is % of the layer's tokens",
        fontsize=9,
        y=0.11 - 0.3 / canvas.get_size_inches()[1],
    )
    caption = (
        f"{task}, {_prune_name(plan)}: load per expert on the task's tokens, before pruning and as "
        "the plan predicts after. Dotted: equal load. The number is the busiest expert's share."
    )
    return _figure("Load per expert", caption, canvas)
