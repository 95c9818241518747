"""What a study says: runs.jsonl, plans and predictions in, report.json and report.html out.

`write_report` does it all. The parts, each usable alone: `load_study` reads and checks, `summarize`
puts the seeds of a model together, `find_thresholds` says how far one can prune, `format_table`
prints. Figures and page are in `report_figures` and `report_page`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence import effects, thresholds
from uncurl_jax.experiments.evidence.answers import CLASS, Evidence, gather_evidence
from uncurl_jax.experiments.evidence.study_records import KINDS, load_runs, load_study, study_parts
from uncurl_jax.experiments.evidence.thresholds import IDENTITY, TOLERANCE, find_thresholds
from uncurl_jax.experiments.reporting import report_bench, report_evidence, report_page
from uncurl_jax.pruning.plan import PruningPlan

__all__ = [
    "SCHEMA",
    "Interval",
    "featured_row",
    "find_thresholds",
    "format_table",
    "load_runs",
    "load_study",
    "seed_interval",
    "summarize",
    "write_report",
]

SCHEMA = "uncurl_jax report 2"


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def _model(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the seeds of one row have in common."""
    pruned = run["kind"] == "pruned"
    return (
        run["task"],
        run["kind"],
        run["source_num_experts"] if pruned else None,
        run["num_experts"],
        run["method"] if pruned else None,
        run["router"] if pruned else None,
    )


def _row_order(model: tuple[Any, ...]) -> tuple[Any, ...]:
    task, kind, source, experts, method, router = model
    return (task, KINDS.index(kind), -(source or 0), -experts, method or "", router or "")


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds and Student's 95 % interval of it; two values at least."""
    array = np.asarray(values, np.float64)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half))


def summarize(
    runs: Iterable[Mapping[str, Any]], evidence: Mapping[str, Evidence] | None = None
) -> list[dict[str, Any]]:
    """Puts the seeds of each model together.

    Args:
      runs: as `load_runs` returns them.
      evidence: by task, as `answers.gather_evidence` returns it.

    Returns:
      One row per (task, kind, experts before and after, method, router), in reading order. `score`
      and the ends of `interval` are percent; the interval is over seeds, or with one seed over that
      run's examples (`interval_over`). `scores` maps each seed to its score, `runs` to its run;
      `guessing_score` is what always giving the same answer scores; `classes` and `slices` map a
      name to the percentage of its examples that is answered right.

    Raises:
      InputError: If two runs have the same model and seed.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_model(run), []).append(run)
    rows = []
    for model in sorted(groups, key=_row_order):
        members = sorted(groups[model], key=lambda run: run["seed"])
        seeds = [run["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"A study must have one run per model and seed, got runs "
                f"{[run['run'] for run in members]} with seeds {seeds}: give variants different "
                "methods or routers, or put them into another study."
            )
        scores = [float(run["score"]) for run in members]
        if len(scores) > 1:
            score = seed_interval(scores)
        else:
            score = Interval(scores[0], *map(float, members[0]["interval"]))
        task, kind, source, experts, method, router = model
        rows.append(
            {
                "task": task,
                "kind": kind,
                "source_num_experts": source,
                "num_experts": experts,
                "method": method,
                "router": router,
                "score": score.mean,
                "interval": [score.low, score.high],
                "interval_over": "seeds" if len(scores) > 1 else "examples",
                "scores": {str(run["seed"]): float(run["score"]) for run in members},
                "runs": {str(run["seed"]): run["run"] for run in members},
                "num_runs": len(members),
                "num_experts_per_layer": members[0]["num_experts_per_layer"],
                "parameters": members[0]["parameters"],
                "active_parameters": members[0]["active_parameters"],
                "bytes": members[0]["bytes"],
                "fraction_tokens_left_behind": float(
                    np.mean([run["fraction_tokens_left_behind"] for run in members])
                ),
                "plans": [run["plan"] for run in members if run.get("plan")],
                "guessing_score": _guessing_score((evidence or {}).get(task)),
                **_subset_scores(members, (evidence or {}).get(task)),
            }
        )
    return rows


def _guessing_score(evidence: Evidence | None) -> float | None:
    """What always giving the same answer scores, if that is known."""
    return None if evidence is None or evidence.guess is None else evidence.guess.sample.score


def _subset_scores(
    members: Sequence[Mapping[str, Any]], evidence: Evidence | None
) -> dict[str, dict[str, Any]]:
    """Percent right within classes and slices: the mean over seeds and each seed's own."""
    found: dict[str, dict[str, Any]] = {"classes": {}, "slices": {}}
    for subset in evidence.subsets if evidence else ():
        scores = {
            str(run["seed"]): subset.samples[run["run"]].score
            for run in members
            if run["run"] in subset.samples
        }
        if scores:
            found["classes" if subset.kind == CLASS else "slices"][subset.name] = {
                "num_examples": subset.num_examples,
                "score": float(np.mean(list(scores.values()))),
                "scores": scores,
            }
    return found


def featured_row(
    rows: Sequence[Mapping[str, Any]], finding: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Returns the pruned model of a task whose plan is worth showing.

    The one that reached the beneficial or else the lossless threshold, or else the best score; None
    for the mean over tasks, where each task has a plan of its own.
    """
    pruned = [row for row in rows if row["task"] == finding["task"] and row["plans"]]
    for name in ("beneficial", "lossless"):
        reached = finding[name]["reached"]
        if reached:
            return next((r for r in pruned if all(r[k] == reached[k] for k in IDENTITY)), None)
    return max(pruned, key=lambda row: row["score"], default=None)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows of `summarize` for a terminal, a line each."""
    lines = [report_page.COLUMNS, *(report_page.cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    is_text = [name in report_page.TEXT_COLUMNS for name in report_page.COLUMNS]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def write_report(
    directory: str | os.PathLike[str], *, margin: float = 0.0, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Writes report.json and report.html into a study's directory; equal input, equal bytes.

    Args:
      directory: holds runs.jsonl, study.json and the plans and predictions that the runs name, or
        records of `uncurl bench` (bench*.json, also one level down), or both.
      margin: points that a pruned model may be worse than one from scratch, see `thresholds`.
      tolerance: points that it may be worse than the unpruned one.

    Returns:
      What report.json holds: title, headline, findings (per task), rows (per model), effects, plans
      shown, benches and what it was made from.

    Raises:
      InputError: If a file is missing, empty or malformed.
    """
    directory = Path(directory)
    benches = report_bench.load_benches(directory)
    if benches and not study_parts(directory):
        runs, study = [], {"title": "Benchmarks"}
    else:
        runs, study = load_study(directory)
    evidence = gather_evidence(directory, runs)
    rows = summarize(runs, evidence)
    findings = find_thresholds(rows, evidence, margin=margin, tolerance=tolerance)
    shown: dict[str, dict[str, Any]] = {}
    plans: dict[str, PruningPlan] = {}
    for finding in findings:
        row = featured_row(rows, finding)
        if row is not None:
            path = row["plans"][0]
            plans[finding["task"]] = PruningPlan.load(directory / path)
            shown[finding["task"]] = {"plan": path, **{name: row[name] for name in IDENTITY}}
            shown[finding["task"]]["warnings"] = list(plans[finding["task"]].warnings)
    report = {
        "schema": SCHEMA,
        "title": study["title"],
        "headline": report_page.headline(findings) if runs else report_bench.headline(benches),
        "findings": [{**f, "sentences": report_page.sentences(f)} for f in findings],
        "multiple_comparisons": thresholds.multiple_comparisons(findings),
        "effects": effects.effect_table(findings),
        "rows": rows,
        "plans_shown": shown,
        "num_runs": len(runs),
        "benches": report_bench.describe(benches),
        "study": study,
        "inputs": _hashes(directory),
    }
    report, figures, notes = report_evidence.illustrate(directory, report, plans, benches)
    section = report_bench.render_section(benches, directory)
    page = report_page.render(report, figures, section, notes)
    artifacts.write_json(directory / "report.json", report)
    with artifacts.atomic_file(directory / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return report


def _hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the records that a report was made from."""
    files = [
        part / name for part in study_parts(directory) for name in ("runs.jsonl", "study.json")
    ]
    return {
        file.relative_to(directory).as_posix(): artifacts.sha256_of_file(file) for file in files
    }
