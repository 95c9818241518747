"""The first paragraph of a report: what to deploy, why, and what was not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.experiments.report_page import format_bytes
from uncurl_jax.experiments.report_scores import MEAN

_IDENTITY = ("source_num_experts", "num_experts", "method", "router")


def recommend(
    rows: Sequence[Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]],
    measures: Sequence[str] = (),
) -> dict[str, Any]:
    """Says what to deploy for each task on the evidence of the findings.

    The model that reached the lossless threshold; else, for those who must save memory, the one
    that reached the beneficial threshold; else the unpruned model.

    Args:
      rows: as `report.summarize` returns them.
      findings: as `report.find_thresholds` returns them; one of the mean over tasks is left out.
      measures: names of what was measured beside scores and size.

    Returns:
      `text` in plain words, and by task under `tasks` the `decision` ("lossless", "beneficial" or
      "unpruned") and the `candidate` (None for the unpruned model).
    """
    tasks: dict[str, Any] = {}
    sentences = []
    single = [finding for finding in findings if finding["task"] != MEAN]
    for finding in single:
        lossless, beneficial = (finding[name]["reached"] for name in ("lossless", "beneficial"))
        reached = lossless or beneficial
        decision = "lossless" if lossless else "beneficial" if beneficial else "unpruned"
        tasks[finding["task"]] = {
            "decision": decision,
            "candidate": {name: reached[name] for name in _IDENTITY} if reached else None,
        }
        own = [row for row in rows if row["task"] == finding["task"]]
        said = _deploy(finding, decision, reached, own) if reached else _keep(finding, own)
        sentences.append(f"For {finding['task']}, {said}")
    not_shown = _not_shown(measures)
    return {"text": " ".join([*sentences, *not_shown]), "tasks": tasks, "not_shown": not_shown}


def _deploy(
    finding: Mapping[str, Any],
    decision: str,
    candidate: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    row = next(r for r in rows if all(r[name] == candidate[name] for name in _IDENTITY))
    source, count = candidate["source_num_experts"], candidate["num_experts"]
    low, high = row["interval"]
    name = f"the model pruned from {source} to {count} experts per layer by {candidate['label']}"
    score = f"it scores {row['score']:.1f} % (95 % interval {low:.1f} to {high:.1f})"
    drop = _comparison(candidate["drop"])
    memory = _memory(rows, row, source)
    if decision == "lossless":
        text = f"deploy {name}: {score}, loses {drop} against the unpruned model{memory}."
        gap = candidate["gap"]
        if finding["beneficial"]["status"] == "nothing_to_compare" or not gap.get("seeds"):
            return text + " Whether it beats a model of its size from scratch was not tried."
        is_better = gap["interval"][0] >= 0
        verdict = "is" if is_better else "is not shown to be"
        return f"{text} It {verdict} as good as a model of its size trained from scratch."
    text = f"if memory must shrink, deploy {name} rather than train a small model: {score}{memory}"
    loses = f", and loses {drop} against the unpruned model" if drop else ""
    return f"{text}{loses}. That it loses less than a point was not shown."


def _comparison(comparison: Mapping[str, Any]) -> str:
    """Writes a loss with its interval; "" if it is not known."""
    if not comparison.get("seeds"):
        return ""
    low, high = (_points(end) for end in comparison["interval"])
    return f"{_points(comparison['mean'])} points ({low} to {high}, {comparison['seeds']} seeds)"


def _points(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _memory(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], source: int) -> str:
    full = next((r for r in rows if r["kind"] == "unpruned" and r["num_experts"] == source), None)
    if full is None:
        return f", in {format_bytes(row['bytes'])}"
    saved = 100 * (1 - row["bytes"] / full["bytes"])
    return (
        f", and takes {format_bytes(row['bytes'])} in place of {format_bytes(full['bytes'])} "
        f"({saved:.0f} % less memory)"
    )


def _keep(finding: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    unpruned = [row for row in rows if row["kind"] == "unpruned"]
    best = max(unpruned, key=lambda row: row["score"], default=None)
    kept = "keep the unpruned model"
    if best is not None:
        low, high = best["interval"]
        kept += (
            f" of {best['num_experts']} experts per layer, which scores {best['score']:.1f} % "
            f"(95 % interval {low:.1f} to {high:.1f})"
        )
    if not finding["candidates"]:
        return f"{kept}: no pruned model was run."
    statuses = {finding[name]["status"] for name in ("beneficial", "lossless")}
    if "not_reached" in statuses:
        return (
            f"{kept}: no pruned model is shown to stay within the limit against it or to be as "
            "good as a model of its own size from scratch."
        )
    if "too_few_seeds" in statuses:
        return f"{kept} until more seeds are run: too few are paired to judge any pruned model."
    return f"{kept}: there is nothing to compare the pruned models with."


def _not_shown(measures: Sequence[str]) -> list[str]:
    missing = []
    if not any("latency" in name for name in measures):
        missing.append("latency")
    if not any("wire" in name for name in measures):
        missing.append("communication between devices")
    said = "Scores are those of validation splits; how other data fares was not shown."
    if missing:
        return [f"Not measured here: {' and '.join(missing)}.", said]
    return [said]
