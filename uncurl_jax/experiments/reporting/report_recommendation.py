"""The first paragraph of a report: what to deploy, why, and what was not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.experiments.reporting.report_page import format_bytes
from uncurl_jax.experiments.reporting.report_scores import MEAN

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
      `text` in plain words, made of `lead`, `reasons` (one per task) and `not_shown`; and by task
      under `tasks` the `decision` ("lossless", "beneficial", "unpruned", or "none" where the task
      was not learned) and the `candidate` (None for the unpruned model).
    """
    tasks: dict[str, Any] = {}
    sentences = []
    single = [finding for finding in findings if finding["task"] != MEAN]
    for finding in single:
        lossless, beneficial = (finding[name]["reached"] for name in ("lossless", "beneficial"))
        reached = lossless or beneficial
        decision = "lossless" if lossless else "beneficial" if beneficial else "unpruned"
        if "unlearned" in (finding["lossless"]["status"], finding["beneficial"]["status"]):
            decision = "none"
        tasks[finding["task"]] = {
            "decision": decision,
            "candidate": {name: reached[name] for name in _IDENTITY} if reached else None,
        }
        own = [row for row in rows if row["task"] == finding["task"]]
        said = _deploy(finding, decision, reached, own) if reached else _keep(finding, own)
        sentences.append(f"{finding['task']}: {said}")
    not_shown = _not_shown(measures)
    lead = _lead(single, tasks)
    return {
        "text": " ".join([lead, *sentences, *not_shown]),
        "lead": lead,
        "reasons": sentences,
        "not_shown": not_shown,
        "tasks": tasks,
    }


def _lead(findings: Sequence[Mapping[str, Any]], decided: Mapping[str, Any]) -> str:
    """Says in a sentence or two what to deploy, tasks of one decision together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        choice = decided[finding["task"]]
        name = "the unpruned model"
        if choice["candidate"]:
            reached = finding[choice["decision"]]["reached"]
            name = f"the model pruned from {_step(reached)} by {reached['label']}"
        groups.setdefault((choice["decision"], name), []).append(str(finding["task"]))
    said = []
    for (decision, name), tasks in groups.items():
        where = f"for {_listed(tasks)}" if len(tasks) < len(decided) or len(tasks) < 4 else "always"
        if decision == "none":
            place = "on this evidence" if where == "always" else where
            said.append(f"Decide nothing {place}: no model here has learned the task.")
        elif decision == "beneficial":
            said.append(f"If memory must shrink, deploy {name} {where}; else the unpruned one.")
        else:
            said.append(f"{'Deploy' if decision == 'lossless' else 'Keep'} {name} {where}.")
    return " ".join(said)


def _step(candidate: Mapping[str, Any]) -> str:
    return f"{candidate['source_num_experts']} to {candidate['num_experts']} experts per layer"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _deploy(
    finding: Mapping[str, Any],
    decision: str,
    candidate: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    row = next(r for r in rows if all(r[name] == candidate[name] for name in _IDENTITY))
    low, high = row["interval"]
    score = f"{row['score']:.1f} % (95 % interval {low:.1f} to {high:.1f})"
    drop = _comparison(candidate["drop"])
    memory = _memory(rows, row, candidate["source_num_experts"])
    if decision == "lossless":
        text = f"it scores {score}, loses {drop} against the unpruned model{memory}."
        gap = candidate["gap"]
        if finding["beneficial"]["status"] == "nothing_to_compare" or not gap.get("seeds"):
            return text + " Whether it beats a model of its size from scratch was not tried."
        is_better = gap["interval"][0] >= -finding.get("margin", 0.0)
        verdict = "is" if is_better else "is not shown to be"
        text += f" It {verdict} as good as a model of its size trained from scratch."
        return text + _caution(finding, decision)
    gap = _comparison(candidate["gap"])
    loses = f" It loses {drop} against the unpruned model;" if drop else ""
    text = f"it scores {score}, {gap} more than a model of its size from scratch{memory}."
    tolerance = finding.get("tolerance", 1.0)
    limit = f"{tolerance:.3g} point{'' if tolerance == 1 else 's'}"
    text += f"{loses or ' Here'} a loss within {limit} was not shown."
    return text + _caution(finding, decision)


def _caution(finding: Mapping[str, Any], decision: str) -> str:
    """Says so where a verdict does not survive the correction for many comparisons."""
    if finding[decision].get("survives_holm", True) is not False:
        return ""
    return (
        f" Counting all {finding['comparisons']} comparisons of the study (Holm) this is no longer "
        "certain: run more seeds before relying on it."
    )


def _comparison(comparison: Mapping[str, Any]) -> str:
    """Writes a loss with its interval; "" if it is not known."""
    if not comparison.get("seeds"):
        return ""
    if not comparison["interval"]:
        seeds = "1 seed" if comparison["seeds"] == 1 else f"{comparison['seeds']} seeds"
        return f"{_points(comparison['mean'])} points ({seeds}, interval unknown)"
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
    if "unlearned" in {finding[name]["status"] for name in ("beneficial", "lossless")}:
        guess = finding["guessing"]["score"]
        return (
            "no model that was not pruned is shown to be better than always giving the same answer "
            f"({guess:.1f} %), so these models say nothing about pruning."
        )
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
