"""The report of a recipe study: report.json, report.html and tables.md from recipe_runs.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.recipes.recipe_evidence import (
    Evidence,
    choose,
    scratch_lengths,
    summarize,
)
from uncurl_jax.experiments.recipes.recipe_runner import RUNS_FILE, SCHEMA, STUDY_FILE
from uncurl_jax.experiments.recipes.recipe_study import CHOOSE, CONFIRM
from uncurl_jax.experiments.reporting.report_drawing import (
    COLOURS,
    MARKERS,
    PANEL_INCHES,
    PIXELS_PER_INCH,
    Entry,
    Figure,
    Table,
    drawing_style,
    key_of,
    new_canvas,
    render_panel,
)
from uncurl_jax.experiments.reporting.report_html import (
    document,
    escape,
    nested_html,
    sections_html,
    table_html,
)

REPORT_SCHEMA = "uncurl_jax recipe report 1"
_NONE = "–"

Tables = dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]


def is_recipe_study(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a recipe study."""
    return (Path(directory) / STUDY_FILE).exists()


def write_recipe_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes report.json, report.html and tables.md; equal input, equal bytes.

    Args:
      directory: of `recipe_runner.run_recipes`, of which the two JSON files are needed alone.

    Returns:
      What report.json holds: title, headline, choice, rows, lengths (against scratch),
      pretraining, devices, study.

    Raises:
      InputError: If a file is missing, of another version, or holds no cell.
    """
    directory = Path(directory)
    study = artifacts.read_json(directory / STUDY_FILE)
    if study.get("schema") != SCHEMA:
        raise InputError(
            f"A recipe study must have schema {SCHEMA!r}, got {study.get('schema')!r} in "
            f"{directory / STUDY_FILE}: it is of another version."
        )
    records = artifacts.read_json_lines(directory / RUNS_FILE)
    rows = summarize(records)
    if not rows:
        raise InputError(
            f"A report needs measured models, got none in {directory / RUNS_FILE}: run more of "
            "the study."
        )
    evidence = Evidence(rows)
    choice = choose(evidence, study["settings"]["baselines"])
    report = {
        "schema": REPORT_SCHEMA,
        "title": study["title"],
        "headline": choice["sentence"],
        "choice": choice,
        "rows": rows,
        "lengths": scratch_lengths(evidence),
        "pretraining": [record for record in records if record["stage"] == "pretrain"],
        "devices": sorted({record["device"] for record in records}),
        "study": study,
        "inputs": {
            name: artifacts.sha256_of_file(directory / name) for name in (STUDY_FILE, RUNS_FILE)
        },
    }
    tables = make_tables(report, evidence)
    with drawing_style():
        figures = _draw(evidence)
    artifacts.write_json(directory / "report.json", report)
    with artifacts.atomic_file(directory / "tables.md") as partial:
        partial.write_text(_markdown(tables), encoding="utf-8")
    with artifacts.atomic_file(directory / "report.html") as partial:
        partial.write_text(_page(report, tables, figures), encoding="utf-8")
    return report


def make_tables(report: Mapping[str, Any], evidence: Evidence) -> Tables:
    """Returns the tables of a report: title -> (columns, rows)."""
    tables: Tables = {}
    for arm in [*evidence.arms[CHOOSE], *evidence.arms[CONFIRM]]:
        for steps in evidence.lengths:
            title = f"Held-out loss after {steps} steps, {arm}"
            tables[title] = _losses(evidence, arm, steps, report["study"]["settings"]["baselines"])
    compared = [
        (
            comparison["where"],
            _pair(comparison["pair"]),
            comparison["baseline"],
            *_difference(comparison),
            "yes" if comparison["is_better"] else "no",
        )
        for comparison in report["choice"]["comparisons"]
    ]
    if compared:
        tables[f"{report['choice']['candidate']} against the baselines"] = (
            (
                "where",
                "experts",
                "baseline",
                "difference",
                "95 % interval",
                "pairs",
                "better by 2 SE",
            ),
            compared,
        )
    tables["Pruned against its size from scratch, all arms"] = (
        ("experts", "recipe", "steps", "difference", "95 % interval", "pairs", "better by 2 SE"),
        [
            (
                _pair(row["pair"]),
                row["recipe"],
                str(row["steps"]),
                *_difference(row),
                "yes" if row["is_better"] else "no",
            )
            for row in report["lengths"]
        ],
    )
    tables["Pretraining"] = (
        ("experts", "seed", "parameters", "tokens", "loss", "tokens/s", "MFU", "device"),
        [
            (
                str(record["num_experts"]),
                str(record["pretrain_seed"]),
                f"{record['parameters'] / 1e6:.0f}M",
                f"{record['tokens'] / 1e6:.1f}M",
                f"{record['loss']:.3f}",
                f"{record['tokens_per_second']:,.0f}",
                _NONE if record["mfu"] is None else f"{record['mfu']:.1%}",
                record["device"],
            )
            for record in report["pretraining"]
        ],
    )
    return tables


def _losses(
    evidence: Evidence, arm: str, steps: int, baselines: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Rows of one arm and length: whole models, then each recipe at each pair of counts."""
    rows = [row for row in evidence.rows if row["arm"] == arm]
    before = {_key(row): row["loss"] for row in rows if row["steps"] == "before"}
    found = []
    for row in (row for row in rows if row["steps"] == steps):
        if row["recipe"] is None:
            experts, name = str(row["num_experts"]), "not pruned"
            against = (_NONE, _NONE)
        else:
            pair = (row["source_num_experts"], row["num_experts"])
            experts, name = _pair(pair), row["recipe"]
            compared = evidence.against([arm], pair, name, baselines[0], steps)
            scratch = evidence.against_scratch([arm], pair, name, steps)
            against = tuple(_plus_minus(part) for part in (compared, scratch))
        found.append(
            (
                experts,
                name,
                f"{before[_key(row)]:.3f}",
                f"{row['loss']:.4f}{_spread(row['loss_sd'])}",
                f"{100 * row['accuracy']:.2f}",
                f"{100 * row['cloze_accuracy']:.2f}",
                str(len(row["losses"])),
                *against,
            )
        )
    columns = (
        "experts",
        "recipe",
        "before",
        "loss",
        "accuracy %",
        "cloze %",
        "seeds",
        f"minus {baselines[0]}",
        "minus scratch",
    )
    return columns, found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "source_num_experts", "num_experts", "recipe"))


def _pair(pair: Sequence[int]) -> str:
    return f"{pair[0]} to {pair[1]}"


def _spread(deviation: float | None) -> str:
    return "" if deviation is None else f" ± {deviation:.4f}"


def _plus_minus(compared: Mapping[str, Any] | None) -> str:
    if compared is None:
        return _NONE
    error = compared["standard_error"]
    return f"{compared['mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _difference(compared: Mapping[str, Any]) -> tuple[str, str, str]:
    interval = compared["interval"]
    ends = _NONE if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
    return _plus_minus(compared), ends, str(compared["pairs"])


def _draw(evidence: Evidence) -> list[Figure]:
    """Draws one figure per arm: recipes against each other, a panel per pair of counts."""
    if not evidence.pairs:
        return []
    return [_draw_arm(evidence, arm) for arm in [*evidence.arms[CHOOSE], *evidence.arms[CONFIRM]]]


def _draw_arm(evidence: Evidence, arm: str) -> Figure:
    panels, numbers = [], []
    for pair in evidence.pairs:
        recipes = [
            name
            for name in evidence.recipes
            if any(evidence.pruned(arm, pair, name, steps) for steps in evidence.lengths)
        ]
        canvas = new_canvas(0.8 + 0.24 * max(len(recipes), 1))
        axes = canvas.add_subplot()
        for place, steps in enumerate(evidence.lengths):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            scratch = evidence.whole(arm, pair[1], steps)
            if scratch:
                axes.axvline(float(np.mean(list(scratch.values()))), color=colour, lw=1, ls="--")
            for line, name in enumerate(recipes):
                losses = list(evidence.pruned(arm, pair, name, steps).values())
                if not losses:
                    continue
                axes.plot(losses, [line] * len(losses), marker, color=colour, ms=3.5, alpha=0.5)
                axes.plot(np.mean(losses), line, marker, color=colour, ms=6.5)
                numbers.append(
                    (_pair(pair), name, str(steps), *(f"{loss:.4f}" for loss in _ends(losses)))
                )
        axes.set_yticks(range(len(recipes)), recipes)
        axes.invert_yaxis()
        axes.set_xlabel("held-out loss (nats per token)")
        axes.set_title(f"{_pair(pair)} experts")
        axes.grid(axis="x")
        label = f"{arm}: held-out loss of each recipe, {_pair(pair)} experts; numbers stand below"
        panels.append(render_panel(canvas, label, key_of("recipes", arm, _pair(pair))))
    return Figure(
        "Recipes",
        key_of("recipes", arm),
        arm,
        "Small marks are seeds, large ones their means; the dashed lines are models of the smaller "
        "size from scratch with the same fine-tuning. Left is better.",
        tuple(panels),
        round(PANEL_INCHES * PIXELS_PER_INCH),
        Table(("experts", "recipe", "steps", "mean", "least", "most"), tuple(numbers)),
        tuple(
            Entry(f"{steps} steps", COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
            for place, steps in enumerate(evidence.lengths)
        ),
    )


def _ends(losses: Sequence[float]) -> tuple[float, float, float]:
    return float(np.mean(losses)), min(losses), max(losses)


def _markdown(tables: Tables) -> str:
    parts = []
    for title, (columns, rows) in tables.items():
        lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + " --- |" * len(columns))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _page(report: Mapping[str, Any], tables: Tables, figures: Sequence[Figure]) -> str:
    shown = "\n".join(
        f"<h3>{escape(title)}</h3>"
        + table_html(
            columns, {"": rows}, text_columns=("recipe", "baseline", "device"), label=title
        )
        for title, (columns, rows) in tables.items()
    )
    body = (
        f'<p class="headline">{escape(report["headline"])}</p>\n'
        f'<p class="note">Differences are of losses, paired by seed, with their standard errors: '
        f"below zero is better. Measured on {escape(', '.join(report['devices']))}.</p>\n"
        f"{sections_html(figures, {})}\n<h2>Tables</h2>\n{shown}\n"
        f"<h2>Settings</h2>\n<details><summary>All settings</summary>"
        f"{nested_html(report['study']['settings'])}</details>"
    )
    return document(report["title"], body)
