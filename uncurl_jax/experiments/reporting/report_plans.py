"""Figures of a pruning plan: what was merged, why, and what load the experts take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from uncurl_jax.experiments.reporting.report_drawing import (
    COLOURS,
    INK,
    LINE,
    MARKERS,
    PANEL_INCHES,
    PIXELS_PER_INCH,
    SMALL_PANEL_INCHES,
    SMALL_POINTS,
    SOFT,
    Entry,
    Figure,
    Table,
    key_of,
    new_canvas,
    render_panel,
)
from uncurl_jax.pruning.affinity import affinity
from uncurl_jax.pruning.clustering import spectral_embedding
from uncurl_jax.pruning.layer_plan import LayerPlan
from uncurl_jax.pruning.plan_file import PruningPlan
from uncurl_jax.pruning.statistics import LayerStatistics

SECTION = "What was merged"
# Beyond this many experts a cell of the cluster map is too small for its number.
_MAX_LABELLED_EXPERTS = 64
# Most cells along a side of a heat map; more experts are shown as means over blocks.
_MAX_CELLS = 64
_NUM_SHADES = 10
_RECTANGLE = (Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY)


def draw_plan_figures(
    task: str, plan: PruningPlan, layers: Mapping[int, LayerStatistics] | None = None
) -> list[Figure]:
    """Draws everything about one plan.

    Args:
      task: that the plan is for.
      plan: what was decided.
      layers: the statistics that the plan was made from; None leaves out affinities and embedding.
    """
    figures = [draw_clusters(task, plan)]
    if layers is not None:
        figures += [draw_affinities(task, plan, layers), draw_embeddings(task, plan, layers)]
    return [*figures, draw_loads(task, plan)]


def prune_name(plan: PruningPlan) -> str:
    """Says what a plan does: 16 → 4 experts, uncurl."""
    before = _range({layer.num_experts for layer in plan.layers})
    after = _range({layer.num_clusters for layer in plan.layers})
    return f"{before} → {after} experts, {plan.method}"


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}–{high}"


def draw_clusters(task: str, plan: PruningPlan) -> Figure:
    """Draws which experts of each layer were merged: colour is cluster size, text the cluster."""
    widest = max(layer.num_experts for layer in plan.layers)
    is_labelled = widest <= _MAX_LABELLED_EXPERTS
    cell_inches = 0.165 if is_labelled else 0.09
    width = max(PANEL_INCHES, 0.8 + cell_inches * widest)
    canvas = new_canvas(0.55 + 0.25 * len(plan.layers), width)
    axes = canvas.add_subplot()
    largest = max(max(layer.cluster_sizes) for layer in plan.layers)
    for row, layer in enumerate(plan.layers):
        for expert in range(layer.num_experts):
            _draw_cell(axes, expert, row, layer, largest, is_labelled)
    axes.set_xlim(0, widest)
    axes.set_ylim(len(plan.layers), 0)
    step = max(1, 2 ** math.ceil(math.log2(widest / 16)))
    axes.set_xticks(np.arange(0, widest, step) + 0.5, [str(e) for e in range(0, widest, step)])
    axes.set_yticks(
        np.arange(len(plan.layers)) + 0.5, [f"layer {layer.layer}" for layer in plan.layers]
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert before pruning")
    caption = (
        "A number names the cluster an expert became part of; it is bold where the expert is the "
        "reference that the others were aligned to."
        if is_labelled
        else "Each cell is an expert, coloured by the size of its cluster."
    )
    if any(label < 0 for layer in plan.layers for label in layer.labels):
        caption += " × was dropped."
    title = f"{task}: clusters, {prune_name(plan)}"
    sizes = sorted({size for layer in plan.layers for size in layer.cluster_sizes})
    shown = sizes if len(sizes) <= 8 else [sizes[round(i * (len(sizes) - 1) / 7)] for i in range(8)]
    legend = tuple(
        Entry(f"in a cluster of {size}", to_hex(_shade(size, largest)), "block")
        for size in dict.fromkeys(shown)
    )
    rows = [
        (
            str(layer.layer),
            str(cluster),
            str(layer.reference[cluster]),
            ", ".join(str(e) for e, label in enumerate(layer.labels) if label == cluster),
        )
        for layer in plan.layers
        for cluster in range(layer.num_clusters)
    ]
    key = key_of("clusters", task)
    return Figure(
        SECTION,
        key,
        title,
        caption,
        (render_panel(canvas, f"{title}; the numbers stand below", key),),
        round(width * PIXELS_PER_INCH),
        Table(("layer", "cluster", "reference expert", "members"), tuple(rows)),
        legend,
    )


def _shade(size: int, largest: int) -> Any:
    return mpl.colormaps["YlGnBu"](0.16 + 0.74 * (size - 1) / max(largest - 1, 1))


def _draw_cell(
    axes: Any, expert: int, row: int, layer: LayerPlan, largest: int, is_labelled: bool
) -> None:
    cluster = layer.labels[expert]
    is_dropped = cluster < 0
    shade = None if is_dropped else _shade(layer.cluster_sizes[cluster], largest)
    axes.add_patch(
        Rectangle(
            (expert + 0.04, row + 0.05),
            0.92,
            0.9,
            lw=0.6,
            fc="none" if shade is None else shade,
            ec=LINE if shade is None else "none",
        )
    )
    if not is_labelled and not is_dropped:
        return
    is_dark = shade is not None and np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
    axes.text(
        expert + 0.5,
        row + 0.52,
        "×" if is_dropped else str(cluster),
        ha="center",
        va="center",
        fontsize=SMALL_POINTS,
        color=SOFT if is_dropped else "#ffffff" if is_dark else "#000000",
        weight="bold" if not is_dropped and layer.reference[cluster] == expert else "normal",
    )


def _cluster_order(layer: LayerPlan) -> np.ndarray:
    """Experts by cluster, the busiest of a cluster first, dropped ones last."""
    labels = np.array(layer.labels)
    place = np.where(labels < 0, layer.num_clusters, labels)
    return np.lexsort((np.arange(len(labels)), -np.array(layer.selected), place))


def draw_affinities(task: str, plan: PruningPlan, layers: Mapping[int, LayerStatistics]) -> Figure:
    """Draws each layer's affinities in cluster order, clusters framed along the diagonal."""
    kind = plan.grouping.affinity
    key, title = key_of("affinity", task), f"{task}: affinity in cluster order"
    panels, rows, blocks = [], [], 1
    for layer in plan.layers:
        order = _cluster_order(layer)
        values = affinity(layers[layer.layer], kind)[np.ix_(order, order)]
        blocks = max(blocks, math.ceil(len(values) / _MAX_CELLS))
        canvas = new_canvas(SMALL_PANEL_INCHES + 0.12, SMALL_PANEL_INCHES)
        axes = canvas.add_subplot()
        _draw_heat_map(axes, values, layer)
        axes.set_title(f"layer {layer.layer}", pad=3)
        label = f"{task}, layer {layer.layer}: affinity between experts in cluster order"
        panels.append(render_panel(canvas, label, f"{key}-{layer.layer}"))
        inside, outside = _mean_affinities(values, np.array(layer.labels)[order])
        rows.append((str(layer.layer), _number(inside), _number(outside)))
    caption = (
        f"How alike ({kind} of their router logits on the task, scaled to 0 to 1) the experts of a "
        "layer are: the stronger the colour, the more alike, on a scale of each layer's own. "
        "Frames are clusters, dropped experts last. Good clusters are strong blocks along the "
        "diagonal."
    )
    if blocks > 1:
        caption += f" A cell is the mean over up to {blocks} by {blocks} pairs of experts."
    table = Table(("layer", "mean inside clusters", "mean between clusters"), tuple(rows))
    return Figure(SECTION, key, title, caption, tuple(panels), _small_width(), table)


def _small_width() -> int:
    return math.ceil(SMALL_PANEL_INCHES * PIXELS_PER_INCH)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mean_affinities(values: np.ndarray, labels: np.ndarray) -> tuple[float | None, float | None]:
    """Means over pairs of different experts of one cluster, and of different clusters."""
    same = (labels[:, None] == labels) & (labels[:, None] >= 0)
    other = ~np.eye(len(labels), dtype=bool)
    means = [
        float(values[pairs & other].mean()) if (pairs & other).any() else None
        for pairs in (same, ~same)
    ]
    return means[0], means[1]


def _draw_heat_map(axes: Any, values: np.ndarray, layer: LayerPlan) -> None:
    """Draws cells of one shade as one path, so that a page of many layers stays small."""
    count = len(values)
    size = math.ceil(count / _MAX_CELLS)
    edges = np.append(np.arange(0, count, size), count)
    means = np.add.reduceat(np.add.reduceat(values, edges[:-1], 0), edges[:-1], 1)
    means /= np.outer(np.diff(edges), np.diff(edges))
    apart = values[~np.eye(count, dtype=bool)]
    low, high = (float(apart.min()), float(apart.max())) if count > 1 else (0.0, 1.0)
    levels = np.clip((means - low) / max(high - low, 1e-9), 0, 1)
    shades = np.round(levels * _NUM_SHADES).astype(int)
    for shade in range(1, _NUM_SHADES + 1):
        vertices: list[tuple[float, float]] = []
        codes: list[Any] = []
        for row, line in enumerate(shades == shade):
            changes = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
            for start, end in changes.reshape(-1, 2):
                left, right = float(edges[start]), float(edges[end])
                top, bottom = float(edges[row]), float(edges[row + 1])
                vertices += [(left, top), (right, top), (right, bottom), (left, bottom)]
                vertices.append((left, top))
                codes += _RECTANGLE
        if vertices:
            path = Path(np.array(vertices, float), codes)
            axes.add_patch(PathPatch(path, fc=COLOURS[0], ec="none", alpha=shade / _NUM_SHADES))
    place = 0
    for members in layer.cluster_sizes:
        axes.add_patch(Rectangle((place, place), members, members, fc="none", ec=INK, lw=0.9))
        place += members
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)


def draw_embeddings(task: str, plan: PruningPlan, layers: Mapping[int, LayerStatistics]) -> Figure:
    """Draws the experts of each layer in the plane of the spectral embedding (section 6.3)."""
    key, title = key_of("embedding", task), f"{task}: experts in the spectral embedding"
    panels, rows = [], []
    for layer in plan.layers:
        points = _plane(affinity(layers[layer.layer], plan.grouping.affinity), layer)
        canvas = new_canvas(SMALL_PANEL_INCHES + 0.12, SMALL_PANEL_INCHES)
        axes = canvas.add_subplot()
        _scatter(axes, points, layer)
        axes.set_title(f"layer {layer.layer}", pad=3)
        label = f"{task}, layer {layer.layer}: experts in the plane of the spectral embedding"
        panels.append(render_panel(canvas, label, f"{key}-{layer.layer}"))
        rows += [
            (
                *(str(layer.layer), str(expert), "dropped" if cluster < 0 else str(cluster)),
                *(f"{value:.3f}" for value in points[expert]),
            )
            for expert, cluster in enumerate(layer.labels)
        ]
    caption = (
        "Each mark is an expert, in the first two dimensions that tell experts apart of the "
        "embedding that is clustered (its very first is nearly constant). Colour and shape are the "
        "cluster, whose number stands beside it; grey rings are experts alone in theirs, crosses "
        "were dropped."
    )
    columns = ("layer", "expert", "cluster", "first", "second")
    return Figure(
        SECTION, key, title, caption, tuple(panels), _small_width(), Table(columns, tuple(rows))
    )


def _plane(A: np.ndarray, layer: LayerPlan) -> np.ndarray:
    """Returns [expert, 2] columns of the embedding: the second and third where there are three."""
    count = len(A)
    points = spectral_embedding(A, min(max(layer.num_clusters, 3), count))
    points = points[:, 1:3] if points.shape[1] > 2 else points[:, :2]
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _scatter(axes: Any, points: np.ndarray, layer: LayerPlan) -> None:
    labels = np.array(layer.labels)
    shared = [c for c, size in enumerate(layer.cluster_sizes) if size > 1]
    alone = np.isin(labels, [c for c, size in enumerate(layer.cluster_sizes) if size == 1])
    if alone.any():
        axes.plot(*points[alone].T, "o", ms=4.5, mfc="none", mec=SOFT, mew=1.0)
    if (labels < 0).any():
        axes.plot(*points[labels < 0].T, "x", ms=4, color=SOFT)
    middle = points.mean(axis=0)
    for place, cluster in enumerate(shared):
        own = points[labels == cluster]
        # Another shape once the colours are used up, so that pairs of the two do not repeat soon.
        marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(*own.T, marker, ms=4.8, color=colour, mew=0, alpha=0.85)
        away = own.mean(axis=0) - middle
        away = away / (np.linalg.norm(away) or 1.0)
        axes.annotate(
            str(cluster), own.mean(axis=0), away * 9, textcoords="offset points",
            ha="center", va="center", fontsize=SMALL_POINTS, color=INK,
        )  # fmt: skip
    axes.margins(0.16)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)


def draw_loads(task: str, plan: PruningPlan) -> Figure:
    """Draws the share of a layer's tokens that each expert takes, before and after pruning.

    After is what the plan predicts: an expert takes the tokens of all members of its cluster, and
    the tokens of dropped experts are left out.
    """
    count = len(plan.layers)
    canvas = new_canvas(0.5 + 0.52 * count)
    grid = canvas.subplots(count, 2, squeeze=False, sharex="col")
    rows = []
    for (left, right), layer in zip(grid, plan.layers, strict=True):
        labels, selected = np.array(layer.labels), np.array(layer.selected)
        merged = np.array([selected[labels == c].sum() for c in range(layer.num_clusters)])
        shares = []
        for axes, values, colour in ((left, selected, COLOURS[5]), (right, merged, COLOURS[0])):
            shares.append(100 * np.sort(values)[::-1] / max(values.sum(), 1.0))
            axes.bar(np.arange(len(values)), shares[-1], width=0.84, color=colour)
            axes.axhline(100 / len(values), color=INK, lw=0.9, ls=":")
            most = float(shares[-1].max())
            axes.set_ylim(0, 1.18 * most or 1)
            axes.set_yticks([most], [f"{most:.0f} %" if most >= 10 else f"{most:.1f} %"])
            axes.set_xticks([])
            axes.tick_params(length=2)
        left.set_ylabel(f"layer {layer.layer}", rotation=0, ha="right", va="center")
        rows.append(
            (
                str(layer.layer),
                f"{shares[0][0]:.1f} %",
                f"{100 / layer.num_experts:.1f} %",
                f"{shares[1][0]:.1f} %",
                f"{100 / layer.num_clusters:.1f} %",
                f"{100 * layer.expected_drop_fraction:.1f} %",
            )
        )
    grid[0, 0].set_title(f"before: {_range({p.num_experts for p in plan.layers})} experts")
    grid[0, 1].set_title(f"after: {_range({p.num_clusters for p in plan.layers})} experts")
    title = f"{task}: load per expert, {prune_name(plan)}"
    caption = (
        "Share of the layer's tokens of the task that each expert takes, busiest first, before "
        "pruning and as the plan predicts after. Dotted: equal load. The number is the busiest "
        "expert's share."
    )
    columns = (
        *("layer", "busiest before", "equal before", "busiest after", "equal after"),
        "predicted overflow",
    )
    key = key_of("load", task)
    return Figure(
        "Load per expert",
        key,
        title,
        caption,
        (render_panel(canvas, f"{title}; the numbers stand below", key),),
        round(PANEL_INCHES * PIXELS_PER_INCH),
        Table(columns, tuple(rows)),
    )
