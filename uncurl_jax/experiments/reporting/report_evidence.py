"""What a study's directory holds beside its scores: statistics, curves, costs, measurements.

Whatever is not there is left out of the report, and a sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.reporting import report_figures
from uncurl_jax.experiments.reporting.report_bench import Bench, where
from uncurl_jax.experiments.reporting.report_course import CURVES, Curve, StageCost, sum_costs
from uncurl_jax.experiments.reporting.report_drawing import Figure
from uncurl_jax.experiments.reporting.report_plans import SECTION as PLANS
from uncurl_jax.experiments.reporting.report_recommendation import recommend
from uncurl_jax.experiments.reporting.report_scores import DROPPED
from uncurl_jax.experiments.reporting.report_tradeoffs import SECTION as TRADEOFFS
from uncurl_jax.experiments.reporting.report_tradeoffs import Cost
from uncurl_jax.pruning.plan_file import PruningPlan
from uncurl_jax.pruning.statistics import RouterStatistics

STAGES = (
    *("cache", "pretrain", "prefinetune_cache", "prefinetune", "calibrate", "plan", "prune"),
    *("warmup", "trial", "tune", "finetune", "zero_shot", "evaluate"),
)
_PLACEMENT_FAMILY = "uncurl_jax placement"


class Evidence(NamedTuple):
    """What was found beside the scores.

    Attributes:
      statistics: by task, those that the plan shown was made from.
      curves: of training, by stage.
      costs: of the stages, from the records.
      measures: bytes on the wire and latency by size.
      notes: by section of the page, sentences about what was not found.
    """

    statistics: dict[str, RouterStatistics]
    curves: list[Curve]
    costs: list[StageCost]
    measures: list[Cost]
    notes: dict[str, list[str]]


class Illustrated(NamedTuple):
    """A report with what its directory adds to it.

    Attributes:
      report: what report.json holds, with "recommendation".
      figures: in the order of the page.
      notes: by section, sentences about what is left out.
    """

    report: dict[str, Any]
    figures: list[Figure]
    notes: dict[str, list[str]]


def illustrate(
    directory: Path,
    report: Mapping[str, Any],
    plans: Mapping[str, PruningPlan],
    benches: Sequence[Bench],
) -> Illustrated:
    """Adds the recommendation and draws all figures.

    Args:
      directory: of the study.
      report: what report.json holds so far.
      plans: by task, the plan that is shown.
      benches: records of `uncurl bench` in the directory.
    """
    if not report["rows"]:
        return Illustrated(dict(report), [], {})
    evidence = gather(directory, report, plans, benches)
    measures = [measure.name for measure in evidence.measures]
    advice = recommend(report["rows"], report["findings"], measures)
    figures = report_figures.draw_figures(report, plans, evidence)
    if not any(figure.section == DROPPED for figure in figures):
        evidence.notes[DROPPED] = ["No model dropped a token, or none was pruned."]
    advised: dict[str, Any] = {}
    for name, value in report.items():
        advised[name] = value
        if name == "headline":
            advised["recommendation"] = advice
    return Illustrated(advised, figures, evidence.notes)


def gather(
    directory: Path,
    report: Mapping[str, Any],
    plans: Mapping[str, PruningPlan],
    benches: Sequence[Bench],
) -> Evidence:
    """Reads what figures need beside the scores, and notes what is not there."""
    notes: dict[str, list[str]] = {}
    parts = [directory, *sorted(path for path in directory.glob("shard_*_of_*") if path.is_dir())]
    records = [r for part in parts for r in _records(part)]
    statistics = {}
    for task, plan in plans.items():
        found = _statistics(directory, parts, records, report["plans_shown"][task]["plan"], plan)
        if isinstance(found, str):
            notes.setdefault(PLANS, []).append(f"{task}: {found}")
        else:
            statistics[task] = found
    curves = [curve for part in parts for curve in _curves(part)]
    curves.sort(key=lambda c: (_stage_order(c.stage), c.name))
    if not curves:
        notes[CURVES] = ["No training curves: the study has no curves/*.jsonl."]
    sizes = {row["num_experts"] for row in report["rows"]}
    measures = _latencies(benches, sizes) + _wires(directory, benches, sizes)
    for name, found in (
        ("measured latency", any(not m.name.startswith("bytes") for m in measures)),
        ("bytes on the wire per token", any(m.name.startswith("bytes") for m in measures)),
    ):
        if not found:
            source = "bench*.json" if name == "measured latency" else "bench*.json or placement"
            notes.setdefault(TRADEOFFS, []).append(
                f"Loss against {name} is left out: the directory has no {source} record of at "
                "least two of the study's sizes."
            )
    return Evidence(statistics, curves, sum_costs(records, STAGES), measures, notes)


def _stage_order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _records(part: Path) -> list[dict[str, Any]]:
    path = part / "runs.jsonl"
    values = artifacts.read_json_lines(path) if path.is_file() else []
    return [value for value in values if isinstance(value, dict)]


def _statistics(
    directory: Path,
    parts: Iterable[Path],
    records: Sequence[Mapping[str, Any]],
    plan_path: str,
    plan: PruningPlan,
) -> RouterStatistics | str:
    """Returns the statistics that a plan was made from, or why there are none."""
    left_out = "affinities and embedding are left out, because "
    for record in records:
        own, name = record.get("plan"), record.get("statistics")
        if not isinstance(own, str) or not isinstance(name, str):
            continue
        for part in parts:
            path = part / name
            if (part / own) == directory / plan_path and path.is_file():
                try:
                    statistics = RouterStatistics.load(path)
                except InputError as error:
                    return f"{left_out}{error}"
                if statistics.hash != plan.source.statistics_hash:
                    return f"{left_out}{name} is not what the plan was made from."
                return statistics
    return f"{left_out}the statistics that the plan was made from are not in the directory."


def _curves(part: Path) -> list[Curve]:
    stages = {
        str(r["name"]).replace("/", "__"): str(r["stage"])
        for r in _records(part)
        if "name" in r and "stage" in r
    }
    curves = []
    for path in sorted((part / "curves").glob("*.jsonl")):
        points = [
            (float(line["tokens"]), float(line["loss"]))
            for line in artifacts.read_json_lines(path)
            if isinstance(line, dict) and _is_finite(line.get("tokens"), line.get("loss"))
        ]
        if points:
            tokens, loss = zip(*sorted(points), strict=True)
            stage = stages.get(path.stem) or _stage_of(path.stem)
            curves.append(Curve(stage, path.stem.replace("__", "/"), tokens, loss))
    return curves


def _is_finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _stage_of(name: str) -> str:
    """Finds the stage in a curve's name if no record tells it."""
    words = name.replace("__", "/").split("/")
    return next((word for word in reversed(words) if word in STAGES), words[0])


def _uniform(counts: Iterable[Any]) -> int | None:
    """Returns the experts of every MoE layer, None if layers differ or there are none."""
    found = {int(count) for count in counts if count}
    return found.pop() if len(found) == 1 else None


def _fullest(found: Mapping[str, dict[int, float]], sizes: set[int]) -> tuple[str, dict] | None:
    """Returns the source that covers most of the study's sizes, two at least."""
    kept = {
        name: {size: value for size, value in sorted(values.items()) if size in sizes}
        for name, values in found.items()
    }
    best = max(sorted(kept), key=lambda name: len(kept[name]), default=None)
    return (best, kept[best]) if best is not None and len(kept[best]) > 1 else None


def _cells(bench: Bench) -> Iterable[tuple[str, int, Mapping[str, Any]]]:
    """Yields where a cell was measured, the experts of its model, and the cell."""
    models = {m["name"]: _uniform(m.get("num_experts", ())) for m in bench.record["models"]}
    suffix = ", functional only, not performance" if bench.record["is_functional_only"] else ""
    for cell in bench.record["cells"]:
        experts = models.get(cell["model"])
        if cell["status"] == "measured" and experts:
            place = f"{bench.file}, layout {cell['layout']}, {cell['devices']} devices"
            yield f"{place} ({where(bench.record)}{suffix})", experts, cell


def _latencies(benches: Sequence[Bench], sizes: set[int]) -> list[Cost]:
    found: dict[str, dict[int, float]] = {}
    for bench in benches:
        for place, experts, cell in _cells(bench):
            if cell["forward"]:
                found.setdefault(place, {})[experts] = 1e3 * cell["forward"]["seconds"]
    best = _fullest(found, sizes)
    if best is None:
        return []
    return [Cost("latency of a forward pass", "ms", best[1], f"Measured: {best[0]}.")]


def _wires(directory: Path, benches: Sequence[Bench], sizes: set[int]) -> list[Cost]:
    found: dict[str, dict[int, float]] = {}
    for bench in benches:
        for place, experts, cell in _cells(bench):
            sent = cell.get("communication")
            if sent and cell.get("tokens"):
                # A device sends this for its own share of the tokens.
                per_token = sent["compiled_bytes_per_device"] * cell["devices"] / cell["tokens"]
                found.setdefault(f"Counted in the compiled program: {place}.", {})[experts] = (
                    per_token
                )
    for path in sorted([*directory.glob("placement*.json"), *directory.glob("*/placement*.json")]):
        record = artifacts.read_json(path)
        schema = record.get("schema") if isinstance(record, dict) else None
        if not isinstance(schema, str) or not schema.startswith(_PLACEMENT_FAMILY):
            continue
        try:
            experts = _uniform(record["model"]["num_experts"])
            per_token = float(record["estimates"]["wire_bytes_per_token"]["total"])
            place = (
                f"Counted by uncurl placement: {record['mode']} on {record['slice']}, batch "
                f"{record['batch']} of {record['length']} tokens."
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"A placement must have the fields of this version, got {path} with "
                f"{type(error).__name__} {error}: make the placement again."
            ) from None
        if experts:
            found.setdefault(place, {})[experts] = per_token
    # Where nothing is sent at all there is nothing to compare.
    found = {place: values for place, values in found.items() if any(values.values())}
    best = _fullest(found, sizes)
    return [Cost("bytes on the wire per token", "", best[1], best[0])] if best else []
