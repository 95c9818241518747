"""What a study says: runs.jsonl and the plans in, report.json and a report.html for people out.

`write_report` does it all. The parts, each usable alone: `load_runs` reads and checks, `summarize`
puts the seeds of a model together, `find_thresholds` says how far one can prune, `format_table`
prints. Figures and page are in `report_figures` and `report_page`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import report_bench, report_evidence, report_page
from uncurl_jax.pruning.plan import PruningPlan

FORMAT_VERSION = 1
KINDS = ("unpruned", "scratch", "pruned")
# Fewer paired seeds than this say nothing about the next seed, whatever their interval.
MIN_SEEDS = 3
# Points (percent) a pruned model may lose and still count as lossless.
LOSSLESS_TOLERANCE = 1.0
_NUM_RESAMPLES = 10_000

_NUMBER, _COUNT, _TEXT = (int, float), (int,), (str,)
_FIELDS: dict[str, tuple[type, ...]] = {
    "run": _TEXT,
    "kind": _TEXT,
    "task": _TEXT,
    "seed": _COUNT,
    "num_experts": _COUNT,
    "score": _NUMBER,
    "interval": (list,),
    "num_examples": _COUNT,
    "fraction_tokens_left_behind": _NUMBER,
    "parameters": _COUNT,
    "active_parameters": _COUNT,
    "bytes": _COUNT,
}
_PRUNED_FIELDS: dict[str, tuple[type, ...]] = {
    "source_num_experts": _COUNT,
    "method": _TEXT,
    "router": _TEXT,
}


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def load_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a study's runs.jsonl, one evaluated model a line.

    Raises:
      InputError: If the file is missing, holds no run, or a line lacks a field, has one of the
        wrong type, or repeats a run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A study must have a runs.jsonl, found none at {path}: run it first.")
    runs = artifacts.read_json_lines(path)
    if not runs:
        raise InputError(f"{path} must hold at least one run, got none: run the study first.")
    seen: dict[str, int] = {}
    for number, run in enumerate(runs, start=1):
        problem = _problem(run)
        if not problem and run["run"] in seen:
            problem = f"run must be unique, got {run['run']!r} again after line {seen[run['run']]}"
        if problem:
            raise InputError(f"{path}:{number}: {problem}: remove the line and run it again.")
        seen[run["run"]] = number
    return runs


def load_study(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the runs and settings of a study, of all its shards if it was run in shards.

    Args:
      directory: holds runs.jsonl and study.json, or shard_<i>_of_<n>/ that do.

    Returns:
      The runs, their plans relative to `directory`, and the content of study.json.

    Raises:
      InputError: If a file is missing or malformed, shards are of different studies, or a run is
        there twice.
    """
    parts = _study_parts(directory)
    runs: list[dict[str, Any]] = []
    studies: list[dict[str, Any]] = []
    for part in parts or [directory]:
        for run in load_runs(part / "runs.jsonl"):
            if run.get("plan") is not None:
                run["plan"] = (part / run["plan"]).relative_to(directory).as_posix()
            runs.append(run)
        study = artifacts.read_json(part / "study.json")
        if not isinstance(study, dict) or not isinstance(study.get("title"), str):
            raise InputError(f"{part / 'study.json'} must be an object with a title: run it again.")
        studies.append(study)
        if _compared(study) != _compared(studies[0]):
            raise InputError(
                f"The shards of a study must have the same settings, got others in {part} than in "
                f"{parts[0]}: put them into different directories."
            )
    names = [run["run"] for run in runs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(
            f"A run must be in one shard only, got {doubles[0]} in several of {directory}: remove "
            "the shards of an earlier division."
        )
    return runs, studies[0]


def _study_parts(directory: Path) -> list[Path]:
    """Directories that hold runs: this one, its shards, or none."""
    parts = [directory] if (directory / "runs.jsonl").exists() else []
    return parts + sorted(path.parent for path in directory.glob("shard_*_of_*/runs.jsonl"))


def _compared(study: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change a study's numbers; whether checkpoints are kept does not."""
    config = study.get("config") or {}
    return {name: value for name, value in config.items() if name != "keep_checkpoints"}


def _problem(run: Any) -> str | None:
    if not isinstance(run, dict):
        return f"a run must be a JSON object, got {run!r}"
    required = _FIELDS | (_PRUNED_FIELDS if run.get("kind") == "pruned" else {})
    for name, types in required.items():
        value = run.get(name)
        if not isinstance(value, types) or isinstance(value, bool):
            return f"{name} must be {' or '.join(t.__name__ for t in types)}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} must be finite, got {value!r}"
    if run["kind"] not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}, got {run['kind']!r}"
    interval = run["interval"]
    if len(interval) != 2 or not all(isinstance(end, _NUMBER) for end in interval):
        return f"interval must be [low, high], got {interval!r}"
    plan = run.get("plan")
    if plan is not None and not isinstance(plan, str):
        return f"plan must be a path or null, got {plan!r}"
    return None


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


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of paired differences and its 95 % bootstrap interval over the pairs (seeded)."""
    array = np.asarray(differences, np.float64)
    picks = np.random.default_rng(0).integers(len(array), size=(_NUM_RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))


def summarize(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Puts the seeds of each model together.

    Args:
      runs: as `load_runs` returns them.

    Returns:
      One row per (task, kind, experts before and after, method, router), in reading order. `score`
      and the ends of `interval` are percent; the interval is over seeds, or with one seed over that
      run's examples (`interval_over`). `scores` maps each seed to its score.

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
                "num_runs": len(members),
                "parameters": members[0]["parameters"],
                "active_parameters": members[0]["active_parameters"],
                "bytes": members[0]["bytes"],
                "fraction_tokens_left_behind": float(
                    np.mean([run["fraction_tokens_left_behind"] for run in members])
                ),
                "plans": [run["plan"] for run in members if run.get("plan")],
            }
        )
    return rows


def _compare(row: Mapping[str, Any], other: Mapping[str, Any] | None, sign: int) -> dict[str, Any]:
    """Paired difference sign * (row - other) over the seeds that both have, in points."""
    seeds = sorted(set(row["scores"]) & set(other["scores"])) if other else []
    if not other or not seeds:
        return {"seeds": 0}
    mean, low, high = paired_interval(
        [sign * (row["scores"][seed] - other["scores"][seed]) for seed in seeds]
    )
    return {"seeds": len(seeds), "mean": mean, "interval": [low, high]}


def _verdict(
    candidates: list[dict[str, Any]], name: str, holds: Callable[[dict[str, Any]], bool]
) -> tuple[str, dict[str, Any] | None]:
    """Status and the candidate of the largest factor that holds, ties by the larger score."""
    compared = [candidate for candidate in candidates if candidate[name]["seeds"]]
    judged = [candidate for candidate in compared if candidate[name]["seeds"] >= MIN_SEEDS]
    if not judged:
        return ("too_few_seeds" if compared else "nothing_to_compare"), None
    holding = [candidate for candidate in judged if holds(candidate[name])]
    if not holding:
        return "not_reached", None
    return "reached", max(holding, key=lambda c: (c["factor"], c["score"], c["label"]))


def find_thresholds(rows: Sequence[Mapping[str, Any]], *, margin: float = 0.0) -> list[dict]:
    """Says for each task how far one can prune on the evidence of `rows`.

    Beneficial: the largest Z/D at which pruned minus from-scratch of the same size, paired by seed,
    has a 95 % bootstrap lower bound of at least -margin. Lossless: the largest Z/D at which
    unpruned minus pruned has an upper bound of at most one point. Both need three paired seeds.

    Args:
      rows: as `summarize` returns them.
      margin: points that a pruned model may be worse than one from scratch.

    Returns:
      Per task: `beneficial` and `lossless`, each with a status ("reached", "not_reached",
      "too_few_seeds", "nothing_to_compare") and the candidate reached, and all `candidates` with
      their `gap` to scratch and `drop` from unpruned.
    """
    findings = []
    for task in dict.fromkeys(row["task"] for row in rows):
        models = [row for row in rows if row["task"] == task]
        known = {
            (row["kind"], row["num_experts"]): row for row in models if row["kind"] != "pruned"
        }
        candidates = []
        for row in models:
            if row["kind"] == "pruned":
                source, experts = row["source_num_experts"], row["num_experts"]
                candidates.append(
                    {
                        "label": f"{row['method']} (router {row['router']})",
                        "factor": source / experts,
                        **{name: row[name] for name in _IDENTITY},
                        "score": row["score"],
                        "gap": _compare(row, known.get(("scratch", experts)), 1),
                        "drop": _compare(row, known.get(("unpruned", source)), -1),
                    }
                )
        finding: dict[str, Any] = {"task": task, "candidates": candidates}
        for name, key, holds in (
            ("beneficial", "gap", lambda gap: gap["interval"][0] >= -margin),
            ("lossless", "drop", lambda drop: drop["interval"][1] <= LOSSLESS_TOLERANCE),
        ):
            status, reached = _verdict(candidates, key, holds)
            finding[name] = {"status": status, "reached": reached}
        findings.append(finding)
    return findings


_IDENTITY = ("source_num_experts", "num_experts", "method", "router")


def featured_row(
    rows: Sequence[Mapping[str, Any]], finding: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Returns the pruned model of a task whose plan is worth showing.

    The one that reached the beneficial or else the lossless threshold, or else the best score.
    """
    pruned = [row for row in rows if row["task"] == finding["task"] and row["plans"]]
    for name in ("beneficial", "lossless"):
        reached = finding[name]["reached"]
        if reached:
            return next((r for r in pruned if all(r[k] == reached[k] for k in _IDENTITY)), None)
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


def write_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes report.json and report.html into a study's directory; equal input, equal bytes.

    Args:
      directory: holds runs.jsonl, study.json and the plans that the runs name, or records of
        `uncurl bench` (bench*.json, also one level down), or both.

    Returns:
      What report.json holds: title, headline, findings (per task), rows (per model), plans shown,
      benches.

    Raises:
      InputError: If a file is missing, empty or malformed.
    """
    directory = Path(directory)
    benches = report_bench.load_benches(directory)
    if benches and not _study_parts(directory):
        runs, study = [], {"title": "Benchmarks"}
    else:
        runs, study = load_study(directory)
    rows = summarize(runs)
    findings = find_thresholds(rows)
    shown: dict[str, dict[str, Any]] = {}
    plans: dict[str, PruningPlan] = {}
    for finding in findings:
        row = featured_row(rows, finding)
        if row is not None:
            path = row["plans"][0]
            plans[finding["task"]] = PruningPlan.load(directory / path)
            shown[finding["task"]] = {"plan": path, **{name: row[name] for name in _IDENTITY}}
            shown[finding["task"]]["warnings"] = list(plans[finding["task"]].warnings)
    report = {
        "format_version": FORMAT_VERSION,
        "title": study["title"],
        "headline": report_page.headline(findings) if runs else report_bench.headline(benches),
        "findings": [{**f, "sentences": report_page.sentences(f)} for f in findings],
        "rows": rows,
        "plans_shown": shown,
        "num_runs": len(runs),
        "benches": report_bench.describe(benches),
        "study": study,
    }
    report, figures, notes = report_evidence.illustrate(directory, report, plans, benches)
    section = report_bench.render_section(benches, directory)
    page = report_page.render(report, figures, section, notes)
    artifacts.write_json(directory / "report.json", report)
    with artifacts.atomic_file(directory / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return report
