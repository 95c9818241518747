"""Figures of scores: against the pruning factor, with thresholds; sizes; tokens dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from uncurl_jax.experiments.evidence.paired import knee
from uncurl_jax.experiments.reporting.report_drawing import (
    COLOURS,
    INK,
    MARKERS,
    PANEL_INCHES,
    PAPER,
    PIXELS_PER_INCH,
    SMALL_POINTS,
    SOFT,
    Entry,
    Figure,
    Table,
    key_of,
    new_canvas,
    pad_limits,
    render_panel,
)
from uncurl_jax.experiments.reporting.report_page import format_bytes, format_count

Row = Mapping[str, Any]
MEAN = "mean"
SCORES, SIZES, DROPPED = "Score against pruning factor", "Size", "Tokens dropped"
_PANEL_PIXELS = round(PANEL_INCHES * PIXELS_PER_INCH)
_THRESHOLDS = (("beneficial", "-"), ("lossless", ":"))


class Style(NamedTuple):
    """Colour and marker of a series, the same in every figure."""

    colour: str
    marker: str


def series_styles(rows: Sequence[Row]) -> dict[tuple[str, str], Style]:
    """Gives each (method, router) of the pruned models a colour and a marker."""
    names = dict.fromkeys((row["method"], row["router"]) for row in rows if row["kind"] == "pruned")
    return {
        name: Style(
            COLOURS[place % len(COLOURS)],
            MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
        )
        for place, name in enumerate(names)
    }


def with_mean(rows: Sequence[Row]) -> list[Row]:
    """Adds rows of the mean over tasks, unless they are there or there is one task.

    A model has a mean if every task has it; the score of a seed is the mean over tasks, the
    interval Student's over the seeds that all tasks share.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if len(tasks) < 2 or MEAN in tasks:
        return list(rows)
    models: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        names = ("kind", "source_num_experts", "num_experts", "method", "router")
        models.setdefault(tuple(row[name] for name in names), []).append(row)
    means: list[Row] = []
    for members in models.values():
        seeds = set.intersection(*(set(row["scores"]) for row in members))
        if len(members) < len(tasks) or not seeds:
            continue
        scores = {
            seed: float(np.mean([row["scores"][seed] for row in members])) for seed in sorted(seeds)
        }
        values = np.array(list(scores.values()))
        middle, half = float(values.mean()), math.nan
        if len(values) > 1:
            spread = float(values.std(ddof=1)) / math.sqrt(len(values))
            half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
        means.append(
            {
                **members[0],
                "task": MEAN,
                "score": middle,
                "interval": [middle - half, middle + half],
                "interval_over": "seeds",
                "scores": scores,
                "num_runs": len(values),
                "fraction_tokens_left_behind": float(
                    np.mean([row["fraction_tokens_left_behind"] for row in members])
                ),
            }
        )
    return [*rows, *means]


def sources(rows: Sequence[Row]) -> list[int]:
    """Returns the counts of experts that were pruned from, largest first; else the largest."""
    found = {row["source_num_experts"] for row in rows if row["kind"] == "pruned"}
    return sorted(found, reverse=True) or [max(row["num_experts"] for row in rows)]


def trained_small(rows: Sequence[Row], source: int) -> list[Row]:
    """Returns the models of fewer experts than Z that were trained at their size.

    Those from scratch, and for sizes without one the unpruned model, where it is pruned itself.
    """
    small = [r for r in rows if r["kind"] == "scratch" and r["num_experts"] <= source]
    known = {row["num_experts"] for row in small}
    return small + [
        row
        for row in rows
        if row["kind"] == "unpruned"
        and row["num_experts"] < source
        and row["num_experts"] not in known
    ]


def draw_scores(rows: Sequence[Row], findings: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draws a figure per task, and one of the mean: score against Z/D, a panel per Z.

    Args:
      rows: as `report.summarize` returns them.
      findings: as `report.find_thresholds` returns them.
    """
    rows = with_mean(rows)
    by_task = {finding["task"]: finding for finding in findings}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if MEAN in tasks:
        tasks = [MEAN, *(task for task in tasks if task != MEAN)]
    return [_score_figure([r for r in rows if r["task"] == t], by_task.get(t)) for t in tasks]


def _score_figure(rows: Sequence[Row], finding: Mapping[str, Any] | None) -> Figure:
    task, styles = rows[0]["task"], series_styles(rows)
    key = key_of("score", task)
    limits = _score_limits(rows)
    panels, has_knee = [], False
    for source in sources(rows):
        canvas = new_canvas(2.75)
        axes = canvas.add_subplot()
        has_knee |= _draw_score_panel(axes, rows, source, styles, finding)
        axes.set_ylim(*limits)
        label = f"{task}, {source} experts: score against pruning factor; the numbers stand below"
        panels.append(render_panel(canvas, label, f"{key}-{source}"))
    legend = [Entry(f"{m}, {r}", s.colour, s.marker, "") for (m, r), s in styles.items()]
    if any(trained_small(rows, source) for source in sources(rows)):
        legend.append(Entry("same size from scratch", SOFT, "o", "5 3", True))
    if any(row["kind"] == "unpruned" for row in rows):
        legend.append(Entry("unpruned", INK, "D", "2 2"))
    over = "seeds"
    if any(row["interval_over"] == "examples" for row in rows):
        over = "seeds, or over examples where there is one seed"
    caption = f"Mean score and 95 % interval over {over}. {_threshold_text(finding)}"
    if has_knee:
        caption += " The small mark “knee” at the axis is an aid to the eye and decides nothing."
    return Figure(
        SCORES,
        key,
        "Mean over the tasks" if task == MEAN else str(task),
        caption,
        tuple(panels),
        _PANEL_PIXELS,
        _score_table(rows),
        tuple(legend),
    )


def _threshold_text(finding: Mapping[str, Any] | None) -> str:
    if finding is None:
        return "No thresholds were computed."
    parts = []
    for name, _ in _THRESHOLDS:
        reached = finding[name]["reached"]
        status = str(finding[name]["status"]).replace("_", " ")
        said = f"{reached['factor']:.3g}×, {reached['label']}" if reached else status
        parts.append(f"{name} threshold: {said}")
    return f"{'; '.join(parts)}.".capitalize()


def _score_limits(rows: Sequence[Row]) -> Any:
    means = [row["score"] for row in rows]
    ends = [end for row in rows for end in row["interval"] if math.isfinite(end)]
    low = max(min([*ends, *means]), min(means) - 15)
    high = min(max([*ends, *means]), max(means) + 15)
    low, high = pad_limits([low, high])
    # Room above for the names of the thresholds.
    return low, high + 0.16 * (high - low)


def _draw_score_panel(
    axes: Any,
    rows: Sequence[Row],
    source: int,
    styles: Mapping[tuple[str, str], Style],
    finding: Mapping[str, Any] | None,
) -> bool:
    """Draws the models of one Z; returns whether a knee is marked."""
    unpruned = [r for r in rows if r["kind"] == "unpruned" and r["num_experts"] == source]
    scratch = trained_small(rows, source)
    pruned = {
        name: [
            row
            for row in rows
            if (row["kind"], row["source_num_experts"]) == ("pruned", source)
            and (row["method"], row["router"]) == name
        ]
        for name in styles
    }
    for row in unpruned:
        axes.axhspan(*row["interval"], color=INK, alpha=0.07, lw=0)
        axes.axhline(row["score"], color=INK, lw=1, ls=(0, (2, 2)))
        axes.plot([1], [row["score"]], "D", color=INK, ms=5)
    _draw_series(axes, scratch, source, Style(SOFT, "o"), is_reference=True)
    for name, members in pruned.items():
        _draw_series(axes, members, source, styles[name])
    factors = sorted({source / r["num_experts"] for r in [*unpruned, *scratch, *_all(pruned)]})
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(factors) / 1.2, max(factors) * 1.2)
    axes.set_xticks(factors, [f"{factor:.3g}×\n{source / factor:.0f}" for factor in factors])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel(f"Z/D, and experts per layer (Z = {source})")
    axes.set_ylabel("score (%)")
    _draw_thresholds(axes, source, finding)
    return _draw_knee(axes, source, unpruned, pruned, styles)


def _all(pruned: Mapping[Any, Sequence[Row]]) -> list[Row]:
    """Returns the members of all series."""
    return [row for members in pruned.values() for row in members]


def _draw_series(
    axes: Any, members: Sequence[Row], source: int, style: Style, is_reference: bool = False
) -> None:
    members = sorted(members, key=lambda row: -row["num_experts"])
    if not members:
        return
    factors = [source / row["num_experts"] for row in members]
    scores = np.array([row["score"] for row in members])
    ends = np.array([row["interval"] for row in members], float)
    ends = np.where(np.isfinite(ends), ends, scores[:, None])
    if len(members) > 1:
        axes.fill_between(factors, *ends.T, color=style.colour, alpha=0.15, lw=0)
    axes.errorbar(
        factors,
        scores,
        yerr=np.abs(ends.T - scores),
        color=style.colour,
        marker=style.marker,
        mfc=PAPER if is_reference else style.colour,
        ls="--" if is_reference else "-",
        ms=5,
        lw=1.5,
        elinewidth=0.9,
    )


def _draw_thresholds(axes: Any, source: int, finding: Mapping[str, Any] | None) -> None:
    """Draws the thresholds that a model pruned from this Z reached, as lines with a name."""
    reached = {
        name: (finding[name]["reached"]["factor"], line)
        for name, line in _THRESHOLDS
        if finding
        and finding[name]["reached"]
        and finding[name]["reached"]["source_num_experts"] == source
    }
    is_same = len({factor for factor, _ in reached.values()}) < len(reached)
    for place, (name, (factor, line)) in enumerate(reached.items()):
        # Two at one factor stand side by side.
        factor *= 2 ** (0.05 * (2 * place - 1)) if is_same else 1
        axes.axvline(factor, color=COLOURS[2], lw=1.6, ls=line, zorder=1)
        is_left = (is_same and not place) or factor > 0.6 * axes.get_xlim()[1]
        axes.annotate(
            name,
            (factor, 0.985 if not place or is_same else 0.915),
            (-3 if is_left else 3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="top",
            fontsize=8,
            color=COLOURS[2],
            weight="bold",
        )


def _draw_knee(
    axes: Any,
    source: int,
    unpruned: Sequence[Row],
    pruned: Mapping[tuple[str, str], Sequence[Row]],
    styles: Mapping[tuple[str, str], Style],
) -> bool:
    """Marks the knee of the series with the best mean score; returns whether there is one."""
    full = {name: members for name, members in pruned.items() if len(members) >= 3}
    if not full:
        return False
    best = max(full, key=lambda name: float(np.mean([row["score"] for row in full[name]])))
    points = sorted((source / r["num_experts"], r["score"]) for r in [*unpruned[:1], *full[best]])
    place = knee({math.log2(factor): score for factor, score in points})
    if place is None or len(points) < 4:
        return False
    at = 2**place
    on_axis = axes.get_xaxis_transform()
    axes.plot([at], [0.03], "^", transform=on_axis, color=SOFT, ms=4)
    axes.annotate(
        "knee", (at, 0.005), (-5, 0), xycoords=on_axis, textcoords="offset points", ha="right",
        va="bottom", fontsize=SMALL_POINTS, color=SOFT,
    )  # fmt: skip
    return True


def _score_table(rows: Sequence[Row]) -> Table:
    names = {"unpruned": "unpruned", "scratch": "from scratch"}
    return Table(
        ("model", "Z", "D", "Z/D", "score %", "95 % interval", "seeds"),
        tuple(
            (
                names.get(row["kind"]) or f"{row['method']}, {row['router']}",
                str(row["source_num_experts"] or "–"),
                str(row["num_experts"]),
                f"{(row['source_num_experts'] or row['num_experts']) / row['num_experts']:.3g}",
                f"{row['score']:.2f}",
                "–"
                if not math.isfinite(row["interval"][0])
                else f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
                str(row["num_runs"]),
            )
            for row in rows
        ),
    )


def draw_sizes(rows: Sequence[Row]) -> Figure:
    """Draws parameters (all and active) and bytes of each size of model."""
    sizes: dict[int, Row] = {}
    for row in rows:
        sizes.setdefault(row["num_experts"], row)
    counts = sorted(sizes)
    canvas = new_canvas(0.5 + 0.36 * len(counts))
    left, right = canvas.subplots(1, 2, sharey=True)
    places = np.arange(len(counts))
    total = [sizes[count]["parameters"] for count in counts]
    active = [sizes[count]["active_parameters"] for count in counts]
    stored = [sizes[count]["bytes"] for count in counts]
    left.barh(places, total, height=0.62, color=COLOURS[5])
    left.barh(places, active, height=0.26, color=COLOURS[0])
    right.barh(places, stored, height=0.62, color=COLOURS[4])
    for axes, values, text in ((left, total, format_count), (right, stored, format_bytes)):
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {text(value)}", va="center", fontsize=8)
        axes.set_xlim(0, 1.55 * max(values))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    left.set_yticks(places, [str(count) for count in counts])
    left.set_ylabel("experts per layer")
    left.set_title("parameters")
    right.set_title("bytes stored")
    rows_ = zip(counts, total, active, stored, strict=True)
    return Figure(
        SIZES,
        "sizes",
        "Size of the models",
        "Parameters and bytes of a model with that many experts per MoE layer.",
        (render_panel(canvas, "Size of the models; the numbers stand below", "sizes"),),
        _PANEL_PIXELS,
        Table(
            ("experts", "parameters", "active per token", "bytes"),
            tuple(
                (str(n), format_count(a), format_count(b), format_bytes(c)) for n, a, b, c in rows_
            ),
        ),
        (
            Entry("all parameters", COLOURS[5], "block"),
            Entry("active per token", COLOURS[0], "block"),
        ),
    )


def draw_dropped(rows: Sequence[Row]) -> Figure | None:
    """Draws the share of tokens that capacity dropped, before and after pruning, per model.

    Returns:
      None if no model dropped a token, or none was pruned.
    """
    pruned = [row for row in rows if row["kind"] == "pruned" and row["task"] != MEAN]
    if not pruned or not any(row["fraction_tokens_left_behind"] for row in rows):
        return None
    before = {
        (row["task"], row["num_experts"]): 100 * row["fraction_tokens_left_behind"]
        for row in rows
        if row["kind"] == "unpruned"
    }
    panels, lines = [], []
    most = max(100 * row["fraction_tokens_left_behind"] for row in rows)
    for task in dict.fromkeys(row["task"] for row in pruned):
        own = [row for row in pruned if row["task"] == task]
        canvas = new_canvas(0.6 + 0.2 * len(own))
        axes = canvas.add_subplot()
        for place, row in enumerate(own):
            after = 100 * row["fraction_tokens_left_behind"]
            was = before.get((task, row["source_num_experts"]))
            if was is not None:
                axes.plot([was, after], [place, place], color=SOFT, lw=1)
                axes.plot([was], [place], "o", mfc=PAPER, mec=SOFT, ms=5)
            axes.plot([after], [place], "o", color=COLOURS[1], ms=5)
            lines.append((task, *_model_name(row), "–" if was is None else f"{was:.2f}"))
            lines[-1] += (f"{after:.2f}",)
        names = ["{1} {0}".format(*_model_name(row)) for row in own]
        axes.set_yticks(range(len(own)), names)
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.set_xlim(-0.04 * most, 1.06 * most)
        axes.grid(axis="x")
        axes.set_title(task)
        axes.set_xlabel("tokens dropped (%)")
        label = f"{task}: tokens dropped before and after pruning; the numbers stand below"
        panels.append(render_panel(canvas, label, key_of("dropped", task)))
    return Figure(
        DROPPED,
        "dropped",
        "Tokens dropped before and after pruning",
        "A token that found no free slot in a chosen expert passed that layer by. Measured when "
        "the fine-tuned models were evaluated.",
        tuple(panels),
        _PANEL_PIXELS,
        Table(("task", "model", "experts", "before %", "after %"), tuple(lines)),
        (Entry("unpruned", SOFT, "o", None, True), Entry("pruned", COLOURS[1], "o")),
    )


def _model_name(row: Row) -> tuple[str, str]:
    return f"{row['method']}, {row['router']}", f"{row['source_num_experts']}→{row['num_experts']}"
