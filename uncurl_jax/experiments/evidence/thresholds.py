"""How far one can prune: beneficial and lossless thresholds, per task and for the mean over tasks.

gap = pruned - from scratch of the same size, drop = unpruned - pruned, in points, paired by task
and seed. Beneficial: the largest Z/D whose gap has a 95 % lower bound >= -margin. Lossless: the
largest Z/D whose drop has an upper bound <= tolerance. How the intervals are made is in `paired`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence import paired
from uncurl_jax.experiments.evidence.answers import Evidence
from uncurl_jax.experiments.evidence.paired import Estimate, Sample

# Fewer paired seeds than this say nothing about the next seed, whatever their interval.
MIN_SEEDS = 3
# Fewer tasks than this say nothing about other tasks; verdicts are then of these tasks alone.
MIN_TASKS = 3
# Points (percent) a pruned model may lose and still count as lossless.
TOLERANCE = 1.0
# Family-wise error of the verdicts after Holm's correction. An end of a 95 % interval tests at
# half of it on its side, so one-sided p-values are compared with half.
FAMILY_ERROR = 0.05
MEAN_TASK = "mean"
"""Name of the finding for the mean over tasks, beside those of single tasks."""
IDENTITY = ("source_num_experts", "num_experts", "method", "router")
GAP, DROP = "gap", "drop"
VERDICTS = {"beneficial": GAP, "lossless": DROP}


@dataclasses.dataclass
class Comparison:
    """A paired difference between two models of a study.

    Attributes:
      seeds: in common; of several tasks, the fewest.
      estimate: None if there is nothing to compare, or one seed without predictions.
      mean: points; None without seeds in common.
      against: kind and experts of the other model; None if the study has none.
      missing: seeds that only one of the two has, by the one that lacks them.
      fixed_tasks: of the mean over tasks, the interval for these very tasks.
      tasks_missing: of the mean over tasks, those without a comparison.
      p_value: one-sided, of its threshold.
      holm: the same, adjusted for all comparisons that are judged.
    """

    seeds: int
    estimate: Estimate | None = None
    mean: float | None = None
    against: dict[str, Any] | None = None
    missing: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    fixed_tasks: Estimate | None = None
    tasks_missing: list[str] = dataclasses.field(default_factory=list)
    p_value: float | None = None
    holm: float | None = None

    @property
    def is_judged(self) -> bool:
        """Whether there are seeds enough for a verdict."""
        return self.estimate is not None and self.seeds >= MIN_SEEDS

    def to_dict(self) -> dict[str, Any]:
        """Returns what report.json holds of it."""
        result: dict[str, Any] = {"seeds": self.seeds, "against": self.against}
        if self.mean is not None:
            result |= {"mean": self.mean, "interval": None, "over": None}
        if self.estimate is not None:
            result |= describe(self.estimate)
        if self.fixed_tasks is not None:
            result["fixed_tasks"] = describe(self.fixed_tasks)
        if self.tasks_missing:
            result["tasks_missing"] = self.tasks_missing
        return result | {
            "missing_seeds": self.missing,
            "p_value": self.p_value,
            "p_value_holm": self.holm,
        }


def describe(estimate: Estimate) -> dict[str, Any]:
    """Returns an estimate as JSON: points, and points squared for the variances."""
    return {
        "mean": estimate.mean,
        "interval": [estimate.low, estimate.high],
        "over": estimate.over,
        "standard_error": estimate.standard_error,
        "df": estimate.df,
        "variances": {
            "seed": estimate.seed_variance,
            "example": estimate.example_variance,
            "interaction": estimate.interaction_variance,
        },
    }


@dataclasses.dataclass
class _Candidate:
    """A pruned model of one task, or of all tasks together."""

    identity: dict[str, Any]
    score: float
    comparisons: dict[str, Comparison]
    subsets: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def factor(self) -> float:
        return self.identity["source_num_experts"] / self.identity["num_experts"]

    @property
    def label(self) -> str:
        return f"{self.identity['method']} (router {self.identity['router']})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "factor": self.factor,
            **self.identity,
            "score": self.score,
            **{name: comparison.to_dict() for name, comparison in self.comparisons.items()},
            "drop_by_subset": self.subsets,
        }


def find_thresholds(
    rows: Sequence[Mapping[str, Any]],
    evidence: Mapping[str, Evidence] | None = None,
    *,
    margin: float = 0.0,
    tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:
    """Says for each task, and for their mean, how far one can prune on the evidence of `rows`.

    Verdicts need three paired seeds. A model of D experts from scratch is one of kind "scratch", or
    the unpruned model where D is also a source count. With three tasks or more the verdicts of the
    mean are about tasks such as these, else about these tasks.

    Args:
      rows: as `report.summarize` returns them.
      evidence: by task, as `answers.gather_evidence` returns it; without it intervals are over
        seeds alone.
      margin: points that a pruned model may be worse than one from scratch.
      tolerance: points that it may be worse than the unpruned one.

    Returns:
      Per task, then for the mean if there are several: `beneficial` and `lossless`, each with a
      status ("reached", "not_reached", "too_few_seeds", "nothing_to_compare", "unlearned"), the
      candidate reached, candidates of smaller factors that do not hold, and whether the verdict
      survives Holm's correction; all `candidates` with their `gap` and `drop`; the number of
      `comparisons` judged in the whole study; under `guessing` what always giving the same answer
      scores and whether an unpruned or from-scratch model is shown to beat it (None if that is not
      known).
      Where none does, the status of both verdicts is "unlearned": models that give one answer
      whatever they read lose nothing when they are pruned.

    Raises:
      InputError: If margin or tolerance is negative or not finite.
    """
    for name, value in (("margin", margin), ("tolerance", tolerance)):
        if not math.isfinite(value) or value < 0:
            raise InputError(f"--{name} must be points of at least 0, got {value}: choose another.")
    limits = {GAP: -margin, DROP: tolerance}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {task: _candidates(task, rows, (evidence or {}).get(task)) for task in tasks}
    if len(tasks) > 1 and MEAN_TASK not in tasks:
        found[MEAN_TASK] = _mean_candidates({task: found[task] for task in tasks})
    judged = []
    for candidates in found.values():
        for candidate in candidates:
            for name, comparison in candidate.comparisons.items():
                if comparison.is_judged:
                    comparison.p_value = _p_value(comparison, name, limits[name])
                    judged.append(comparison)
    adjusted = paired.holm([comparison.p_value or 0.0 for comparison in judged])
    for comparison, value in zip(judged, adjusted, strict=True):
        comparison.holm = value
    guessing = {task: _guessing(task, rows, (evidence or {}).get(task)) for task in tasks}
    if MEAN_TASK in found and MEAN_TASK not in tasks:
        guessing[MEAN_TASK] = _mean_guessing(guessing)
    return [
        {
            "task": task,
            "tasks": tasks if task == MEAN_TASK else [task],
            "margin": margin,
            "tolerance": tolerance,
            "comparisons": len(judged),
            "guessing": guessing[task],
            **{
                verdict: _verdict(found[task], name, limits, guessing[task])
                for verdict, name in VERDICTS.items()
            },
            "candidates": [candidate.to_dict() for candidate in found[task]],
        }
        for task in found
    ]


def _guessing(
    task: str, rows: Sequence[Mapping[str, Any]], evidence: Evidence | None
) -> dict[str, Any] | None:
    """Says whether a model that was not pruned is shown to beat always giving the same answer."""
    if evidence is None or evidence.guess is None:
        return None
    guess = evidence.guess
    is_beaten = False
    for row in rows:
        samples = [evidence.samples.get(run) for run in row["runs"].values()]
        known = [sample for sample in samples if sample is not None]
        if row["task"] != task or row["kind"] == "pruned" or len(known) < len(samples):
            continue
        is_beaten |= paired.paired_difference(known, [guess.sample] * len(known)).low > 0
    return {"option": guess.text, "score": guess.sample.score, "is_beaten": is_beaten}


def _mean_guessing(tasks: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of the mean over tasks: beaten if it is in one of them; names those where it is not."""
    if any(guessing is None for guessing in tasks.values()):
        return None
    known = {task: guessing for task, guessing in tasks.items() if guessing is not None}
    return {
        "option": None,
        "score": float(np.mean([guessing["score"] for guessing in known.values()])),
        "is_beaten": any(guessing["is_beaten"] for guessing in known.values()),
        "tasks_not_beaten": [task for task, g in known.items() if not g["is_beaten"]],
    }


def _p_value(comparison: Comparison, name: str, limit: float) -> float:
    assert comparison.estimate is not None
    test = paired.p_value_above if name == GAP else paired.p_value_below
    return test(comparison.estimate, limit)


def _holds(comparison: Comparison, name: str, limits: Mapping[str, float]) -> bool:
    assert comparison.estimate is not None
    if name == GAP:
        return comparison.estimate.low >= limits[GAP]
    return comparison.estimate.high <= limits[DROP]


def _candidates(
    task: str, rows: Sequence[Mapping[str, Any]], evidence: Evidence | None
) -> list[_Candidate]:
    models = [row for row in rows if row["task"] == task]
    known = {(row["kind"], row["num_experts"]): row for row in models if row["kind"] != "pruned"}
    samples = evidence.samples if evidence else {}
    candidates = []
    for row in models:
        if row["kind"] != "pruned":
            continue
        small = known.get(("scratch", row["num_experts"]))
        small = small or known.get(("unpruned", row["num_experts"]))
        large = known.get(("unpruned", row["source_num_experts"]))
        candidates.append(
            _Candidate(
                {name: row[name] for name in IDENTITY},
                row["score"],
                {
                    GAP: _compare(row, small, samples, sign=1, score=_score_of(row, small)),
                    DROP: _compare(row, large, samples, sign=-1, score=_score_of(row, large)),
                },
                _subset_drops(row, large, evidence),
            )
        )
    return candidates


def _score_of(*rows: Mapping[str, Any] | None) -> dict[str, float]:
    """Scores by run of the rows."""
    return {run: row["scores"][seed] for row in rows if row for seed, run in row["runs"].items()}


def _compare(
    row: Mapping[str, Any],
    other: Mapping[str, Any] | None,
    samples: Mapping[str, Sample],
    *,
    sign: int,
    score: Mapping[str, float],
) -> Comparison:
    """Compares sign * (row - other) over the seeds that both have."""
    if other is None:
        return Comparison(0)
    against = {"kind": other["kind"], "num_experts": other["num_experts"]}
    own, theirs = row["runs"], other["runs"]
    seeds = sorted(set(own) & set(theirs), key=int)
    missing = {
        name: sorted(map(int, set(a) - set(b)))
        for name, a, b in (("pruned", theirs, own), (other["kind"], own, theirs))
        if set(a) - set(b)
    }
    if not seeds:
        return Comparison(0, against=against, missing=missing)
    pair = [
        [samples.get(runs[seed]) or Sample(score[runs[seed]], None, 0) for seed in seeds]
        for runs in (own, theirs)
    ]
    first, second = pair if sign > 0 else pair[::-1]
    mean = float(np.mean([a.score - b.score for a, b in zip(first, second, strict=True)]))
    has_draws = all(sample.resampled is not None for sample in (*first, *second))
    estimate = paired.paired_difference(first, second) if has_draws or len(seeds) > 1 else None
    return Comparison(len(seeds), estimate, mean, against, missing)


def _subset_drops(
    row: Mapping[str, Any], large: Mapping[str, Any] | None, evidence: Evidence | None
) -> list[dict[str, Any]]:
    """Drops from the unpruned model within classes and slices, in points of examples right."""
    if evidence is None or large is None:
        return []
    drops = []
    for subset in evidence.subsets:
        scores = {run: sample.score for run, sample in subset.samples.items()}
        own, other = (
            {**model, "runs": {s: run for s, run in model["runs"].items() if run in scores}}
            for model in (row, large)
        )
        found = _compare(own, other, subset.samples, sign=-1, score=scores).to_dict()
        drops.append(
            {
                "kind": subset.kind,
                "name": subset.name,
                "num_examples": subset.num_examples,
                **{k: found[k] for k in ("seeds", "mean", "interval", "over") if k in found},
            }
        )
    return drops


def _mean_candidates(by_task: Mapping[str, list[_Candidate]]) -> list[_Candidate]:
    """Averages each pruned model over the tasks."""
    groups: dict[tuple[Any, ...], dict[str, _Candidate]] = {}
    for task, candidates in by_task.items():
        for candidate in candidates:
            groups.setdefault(tuple(candidate.identity.values()), {})[task] = candidate
    return [
        _Candidate(
            next(iter(members.values())).identity,
            float(np.mean([candidate.score for candidate in members.values()])),
            {name: _mean_comparison(by_task, members, name) for name in (GAP, DROP)},
        )
        for members in groups.values()
    ]


def _mean_comparison(
    tasks: Mapping[str, Any], members: Mapping[str, _Candidate], name: str
) -> Comparison:
    parts = {task: member.comparisons[name] for task, member in members.items()}
    estimates = [part.estimate for part in parts.values() if part.estimate is not None]
    means = [part.mean for part in parts.values() if part.mean is not None]
    missing = [task for task in tasks if task not in parts or parts[task].mean is None]
    fewest = min((part.seeds for part in parts.values()), default=0)
    if missing:
        return Comparison(0, tasks_missing=missing)
    against = next(iter(parts.values())).against
    mean = float(np.mean(means))
    if len(estimates) < len(parts):
        return Comparison(fewest, None, mean, against)
    fixed = paired.mean_over_fixed_tasks(estimates)
    judged = paired.mean_over_tasks(estimates) if len(estimates) >= MIN_TASKS else fixed
    return Comparison(fewest, judged, mean, against, fixed_tasks=fixed)


def _verdict(
    candidates: Sequence[_Candidate],
    name: str,
    limits: Mapping[str, float],
    guessing: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Status and the candidate of the largest factor that holds, ties by the larger score."""
    compared = [c for c in candidates if c.comparisons[name].seeds]
    judged = [c for c in compared if c.comparisons[name].is_judged]
    verdict: dict[str, Any] = {
        "status": "too_few_seeds" if compared else "nothing_to_compare",
        "reached": None,
        "smaller_not_holding": [],
        "survives_holm": None,
    }
    if not judged:
        return verdict
    if guessing is not None and not guessing["is_beaten"]:
        return verdict | {"status": "unlearned"}
    holding = [c for c in judged if _holds(c.comparisons[name], name, limits)]
    if not holding:
        return verdict | {"status": "not_reached"}
    best = max(holding, key=lambda c: (c.factor, c.score, c.label))
    weaker = [
        c.identity
        for c in judged
        if c not in holding
        and c.factor < best.factor
        and all(c.identity[k] == best.identity[k] for k in ("method", "router"))
    ]
    adjusted = best.comparisons[name].holm
    return {
        "status": "reached",
        "reached": best.to_dict(),
        "smaller_not_holding": weaker,
        "survives_holm": adjusted is not None and adjusted <= FAMILY_ERROR / 2,
    }


def multiple_comparisons(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Says how many comparisons were judged, and which verdicts survive Holm's correction.

    Args:
      findings: as `find_thresholds` returns them.

    Returns:
      Number of comparisons, the error of the whole family, and the verdicts that were reached as
      {task, verdict, survives}.
    """
    return {
        "comparisons": findings[0]["comparisons"] if findings else 0,
        "family_error": FAMILY_ERROR,
        "verdicts": [
            {
                "task": finding["task"],
                "verdict": verdict,
                "survives": finding[verdict]["survives_holm"],
            }
            for finding in findings
            for verdict in VERDICTS
            if finding[verdict]["status"] == "reached"
        ],
    }
