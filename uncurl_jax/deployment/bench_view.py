"""Draws a benchmark's record: latency and what it is made of, against experts and devices.

The shape of Figures 4 and 5 of arXiv 2409.01483. PNG and SVG stand beside the record and carry
their description as alternative text; programs read the record.
"""

from __future__ import annotations

import html
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from uncurl_jax.artifacts import atomic_file

Record = Mapping[str, Any]

# What a forward pass is made of, from the bottom of a bar: key of `split`, name, colour (Okabe and
# Ito's, which colour-blind readers tell apart).
_PARTS = (
    ("communication_seconds", "tokens across devices (all-to-all)", "#d55e00"),
    ("experts_seconds", "experts", "#0072b2"),
    ("routing_seconds", "routing, dispatch, combine", "#56b4e9"),
    ("other_seconds", "attention, dense layers, logits", "#b0b5bb"),
)
_WHOLE = "#1b1f24"
_FIGURES = ("experts", "devices")
_MAX_ROWS = 12
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "uncurl_jax",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
# The paper's own measurements, not ours: arXiv 2409.01483, Figures 4 and 5; milliseconds on 8
# NVIDIA A10 with expert parallelism 2, batch 2 per device, 256 tokens, top-1.
_PAPER_SOURCE = "the paper's: 8 A10 GPUs,\narXiv 2409.01483, Figs. 4, 5"
_PAPER_FORWARD = {"354M": {0: 21.0, 8: 40.0, 32: 51.0, 64: 102.0, 128: 174.0}}
_PAPER_LAYER = {
    "124M": {
        "communication": {8: 1.9, 128: 6.6},
        "experts": {8: 0.69, 128: 0.69},
    }
}


def picture_paths(out: str | os.PathLike[str]) -> list[Path]:
    """Returns the pictures that belong to a record."""
    out = Path(out)
    return [
        out.with_name(f"{out.stem}_{name}{suffix}")
        for name in _FIGURES
        for suffix in (".png", ".svg")
    ]


def write_pictures(record: Record, out: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Draws a record's pictures beside it, over those of an earlier attempt.

    Args:
      record: with models and cells.
      out: the record's path, which pictures are named after.

    Returns:
      For each picture its `title`, its files' names (`png`, `svg`) and its text (`alt`); none if
      no forward pass was measured.
    """
    out = Path(out)
    if not any(cell["status"] == "measured" and cell["forward"] for cell in record["cells"]):
        return []
    written = []
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        for name, draw in zip(_FIGURES, (draw_experts, draw_devices), strict=True):
            title, alt, figure = draw(record)
            files = {suffix: out.with_name(f"{out.stem}_{name}.{suffix}") for suffix in _SAVERS}
            for suffix, path in files.items():
                with atomic_file(path) as partial:
                    partial.write_bytes(_SAVERS[suffix](figure, title, alt))
            written.append({"title": title, "alt": alt, **{s: p.name for s, p in files.items()}})
    return written


def _png(figure: Figure, title: str, alt: str) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    metadata = {"Title": title, "Description": alt}
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


def _svg(figure: Figure, title: str, alt: str) -> bytes:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    metadata = {"Date": None, "Title": title, "Description": alt}
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=metadata)
    label = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"'
    return buffer.getvalue().replace("<svg", label, 1).encode()


_SAVERS = {"png": _png, "svg": _svg}


def _measured(record: Record) -> list[Record]:
    return [c for c in record["cells"] if c["status"] == "measured" and c["forward"]]


def _counts(model: Record) -> tuple[int, int]:
    """Fewest and most experts of a model's layers, (0, 0) if it has none."""
    return (min(model["num_experts"], default=0), max(model["num_experts"], default=0))


def _count_text(model: Record) -> str:
    low, high = _counts(model)
    text = "dense" if not high else str(low) if low == high else f"{low}-{high}"
    return text if model["parameters_from"] == "random" else f"{text}\n{model['name']}"


def _where(record: Record, count: int) -> str:
    """Names the devices of a measurement."""
    device = record["device"]
    if record["is_functional_only"]:
        return f"{count} host device{'s' if count > 1 else ''} of one CPU"
    return f"{count} x {device['kind']}"


def _suffix(record: Record) -> str:
    return " (functional, not performance)" if record["is_functional_only"] else ""


def _bar(axes: Any, place: float, cell: Record) -> None:
    """Stacks what a forward pass is made of; parts below zero, which overlap, are left out."""
    split, bottom = cell["split"], 0.0
    for key, _, colour in _PARTS if split else ():
        height = 1e3 * max(split[key], 0.0)
        axes.bar(place, height, 0.7, bottom=bottom, color=colour)
        bottom += height
    forward = cell["forward"]
    middle = 1e3 * forward["seconds"]
    low, high = (1e3 * end for end in forward["interval"])
    axes.errorbar(
        place, middle, [[middle - low], [high - middle]], color=_WHOLE, marker="_", ms=12, capsize=3
    )


def _top(cells: Sequence[Record]) -> float:
    """Upper limit of an axis of forward passes; long intervals are cut off."""
    middle = max(1e3 * cell["forward"]["seconds"] for cell in cells)
    high = max(1e3 * cell["forward"]["interval"][1] for cell in cells)
    return max(1.15 * middle, min(1.05 * high, 1.5 * middle))


def _part_legend(figure: Figure) -> None:
    handles = [Patch(color=colour, label=name) for _, name, colour in _PARTS]
    whole = Line2D([], [], color=_WHOLE, marker="_", ms=10, label="forward pass, whole")
    figure.legend(handles=[*handles, whole], loc="outside lower left", ncols=2, fontsize=8)


def _preferred(cells: Sequence[Record], count: int) -> str:
    """The layout to show against experts: sharded, if it was measured."""
    names = list(dict.fromkeys(cell["layout"] for cell in cells if cell["devices"] == count))
    return "sharded" if "sharded" in names else names[0]


def draw_experts(record: Record) -> tuple[str, str, Figure]:
    """Draws the forward pass and one MoE layer against experts, on the most devices measured."""
    cells = _measured(record)
    count = max(cell["devices"] for cell in cells)
    layout = _preferred(cells, count)
    models = {model["name"]: model for model in record["models"]}
    chosen = [c for c in cells if c["devices"] == count and c["layout"] == layout]
    backbones = list(dict.fromkeys(models[cell["model"]]["backbone"] for cell in chosen))
    has_paper = any(name in _PAPER_FORWARD or name in _PAPER_LAYER for name in backbones)
    size = (9.0 if has_paper else 6.2, 1.0 + 2.6 * len(backbones))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(backbones), 3 if has_paper else 2, squeeze=False)
    for row, backbone in zip(grid, backbones, strict=True):
        own = [cell for cell in chosen if models[cell["model"]]["backbone"] == backbone]
        own.sort(key=lambda cell: _counts(models[cell["model"]])[::-1])
        labels = [_count_text(models[cell["model"]]) for cell in own]
        for place, cell in enumerate(own):
            _bar(row[0], place, cell)
        _draw_layers(row[1], own)
        for axes in row[:2]:
            axes.set_xticks(range(len(own)), labels, fontsize=8)
            axes.set_xlabel("experts per MoE layer")
        row[0].set_ylim(0, _top(own))
        row[1].set_xlim(row[0].get_xlim())
        # Room for the legend above the lines.
        row[1].set_ylim(0, 1.45 * row[1].get_ylim()[1])
        row[0].set_ylabel("milliseconds")
        row[0].set_title(f"{backbone}: forward pass")
        row[1].set_title("one MoE layer, parts alone")
        if has_paper:
            _draw_paper(row[2], backbone)
    _part_legend(figure)
    title = f"Latency against experts, {layout} on {_where(record, count)}{_suffix(record)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    told = [
        f"{cell['model']} {1e3 * cell['forward']['seconds']:.3g} ms{_told_split(cell)}"
        for cell in chosen
    ]
    return title, f"{title}: {'; '.join(told)}.", figure


def _told_split(cell: Record) -> str:
    if not cell["split"]:
        return ""
    communication = 1e3 * cell["split"]["communication_seconds"]
    experts = 1e3 * cell["split"]["experts_seconds"]
    return f" (communication {communication:.3g}, experts {experts:.3g})"


def _draw_layers(axes: Any, cells: Sequence[Record]) -> None:
    """Draws the mean over a model's MoE layers of what a layer and its parts take."""
    for name, colour, label, marker in (
        ("communication", _PARTS[0][2], "all-to-all", "o"),
        ("experts", _PARTS[1][2], "experts", "s"),
        ("layer", _WHOLE, "whole layer", "^"),
    ):
        places, middles, lows, highs = [], [], [], []
        for place, cell in enumerate(cells):
            kinds = [k for k in cell["moe_layers"] if k[name] and "seconds" in k[name]]
            if kinds:
                weights = [len(kind["layers"]) for kind in kinds]

                def mean(values: Sequence[float], weights: Sequence[int] = weights) -> float:
                    total = sum(w * v for w, v in zip(weights, values, strict=True))
                    return 1e3 * total / sum(weights)

                places.append(place)
                middles.append(mean([kind[name]["seconds"] for kind in kinds]))
                lows.append(mean([kind[name]["interval"][0] for kind in kinds]))
                highs.append(mean([kind[name]["interval"][1] for kind in kinds]))
        if places:
            below = [m - low for m, low in zip(middles, lows, strict=True)]
            above = [high - m for m, high in zip(middles, highs, strict=True)]
            axes.errorbar(
                places, middles, [below, above], color=colour, marker=marker, ms=4, capsize=3,
                lw=1.3, label=label,
            )  # fmt: skip
    if axes.has_data():
        axes.legend(fontsize=8, loc="upper left")
    else:
        axes.set_axis_off()


def _draw_paper(axes: Any, backbone: str) -> None:
    """Draws what the paper measured of this size, marked as the paper's."""
    forward, layer = _PAPER_FORWARD.get(backbone), _PAPER_LAYER.get(backbone)
    if forward is None and layer is None:
        axes.set_axis_off()
        return
    axes.set_title(_PAPER_SOURCE, color="#57606a", fontsize=8)
    sizes = [0, 8, 32, 64, 128]
    if forward is not None:
        values = [forward[size] for size in sizes]
        axes.bar(range(len(sizes)), values, 0.7, fill=False, ec=_WHOLE, hatch="//", lw=0.8)
        axes.set_ylabel("forward pass, milliseconds")
    elif layer is not None:
        for name, colour, label in (
            ("communication", _PARTS[0][2], "all-to-all"),
            ("experts", _PARTS[1][2], "experts"),
        ):
            places = [sizes.index(size) for size in layer[name]]
            values = list(layer[name].values())
            axes.plot(places, values, "o", color=colour, mfc="white", label=label)
        axes.set_ylabel("one layer, milliseconds")
        axes.legend(fontsize=8)
    axes.set_xticks(range(len(sizes)), ["dense", *map(str, sizes[1:])], fontsize=8)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("experts per MoE layer")


def draw_devices(record: Record) -> tuple[str, str, Figure]:
    """Draws the forward pass against devices, a row for each model and a column for each layout."""
    cells = _measured(record)
    names = list(dict.fromkeys(cell["model"] for cell in cells))[:_MAX_ROWS]
    layouts = [n for n in dict.fromkeys(c["layout"] for c in cells) if n != "single"] or ["single"]
    counts = sorted({cell["devices"] for cell in cells})
    size = (max(4.6, 1.2 + 2.0 * len(layouts)), 1.4 + 1.25 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(names), len(layouts), squeeze=False, sharex=True, sharey="row")
    for row, name in zip(grid, names, strict=True):
        own = [cell for cell in cells if cell["model"] == name]
        for axes, layout in zip(row, layouts, strict=True):
            for cell in own:
                if cell["layout"] in (layout, "single"):
                    _bar(axes, counts.index(cell["devices"]), cell)
            axes.set_xticks(range(len(counts)), list(map(str, counts)))
            axes.set_title(f"{name}, {layout}", fontsize=8)
            axes.set_ylim(0, _top(own))
        row[0].set_ylabel("ms")
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    _part_legend(figure)
    batch = record["settings"]["batch_per_device"]
    title = (
        f"Latency against devices, {batch} rows of {record['settings']['length']} tokens on each, "
        f"{_where(record, max(counts))}{_suffix(record)}"
    )
    figure.suptitle(textwrap.fill(title, 24 + 30 * len(layouts)), x=0.01, ha="left", fontsize=9)
    told = []
    for name in names:
        for layout in layouts:
            points = [
                f"{cell['devices']}: {1e3 * cell['forward']['seconds']:.3g} ms"
                for cell in sorted(cells, key=lambda cell: cell["devices"])
                if cell["model"] == name and cell["layout"] in (layout, "single")
            ]
            told.append(f"{name} {layout} {', '.join(points)}")
    return title, f"{title}. Devices and forward pass: {'; '.join(told)}.", figure
