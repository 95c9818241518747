"""What the cells of a recipe study say: means, paired differences, a winner or none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from uncurl_jax.experiments.recipes.recipe_study import CHOOSE, CONFIRM, PRUNED, WHOLE

Record = Mapping[str, Any]

STANDARD_ERRORS = 2.0
"""How many standard errors a difference must be away from zero to count."""


def summarize(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Puts the seeds of each model together.

    Args:
      records: lines of recipe_runs.jsonl; those of other stages than "cell" are left out.

    Returns:
      One row per (arm, kind, counts, recipe, fine-tuning steps) with `losses` by seed, mean and
      standard deviation of loss, accuracy and cloze accuracy. Steps "before" and "warmed_up" are
      rows too.
    """
    groups: dict[tuple[Any, ...], dict[int, Record]] = {}
    for record in records:
        if record["stage"] != "cell":
            continue
        measured = {name: record[name] for name in ("before", "warmed_up") if name in record}
        measured |= {int(steps): found for steps, found in record["finetuned"].items()}
        for steps, found in measured.items():
            key = (
                *(record[k] for k in ("role", "arm", "kind", "source_num_experts", "num_experts")),
                record["recipe"],
                steps,
            )
            groups.setdefault(key, {})[record["seed"]] = found
    rows = []
    for (role, arm, kind, source, count, recipe, steps), by_seed in groups.items():
        row: dict[str, Any] = {
            "role": role,
            "arm": arm,
            "kind": kind,
            "source_num_experts": source,
            "num_experts": count,
            "recipe": recipe,
            "steps": steps,
            "losses": {str(seed): by_seed[seed]["loss"] for seed in sorted(by_seed)},
        }
        for name in ("loss", "accuracy", "cloze_accuracy", "fraction_tokens_left_behind"):
            values = [found[name] for found in by_seed.values()]
            row[name] = float(np.mean(values))
            row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def difference(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Compares paired losses: one - other, so that negative is better.

    Returns:
      `mean`; `standard_error` of it over pairs and Student's 95 % `interval`, None with fewer than
      two pairs; `pairs`.
    """
    values = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "standard_error": None, "interval": None, "pairs": len(values)}
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {
        "mean": mean,
        "standard_error": error,
        "interval": [mean - half, mean + half],
        "pairs": len(values),
    }


def is_better(compared: Mapping[str, Any]) -> bool:
    """Whether a difference is below zero by more than two standard errors."""
    error = compared["standard_error"]
    return error is not None and compared["mean"] < -STANDARD_ERRORS * error


class Evidence:
    """Comparisons of the rows of a study.

    Attributes:
      rows: of `summarize`.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]):
        """Indexes the rows."""
        self.rows = rows
        self._losses = {
            (
                r["arm"],
                r["kind"],
                r["source_num_experts"],
                r["num_experts"],
                r["recipe"],
                r["steps"],
            ): r["losses"]
            for r in rows
        }
        self.arms = {
            role: list(dict.fromkeys(r["arm"] for r in rows if r["role"] == role))
            for role in (CHOOSE, CONFIRM)
        }
        self.pairs = sorted(
            {(r["source_num_experts"], r["num_experts"]) for r in rows if r["kind"] == PRUNED},
            reverse=True,
        )
        self.recipes = list(dict.fromkeys(r["recipe"] for r in rows if r["kind"] == PRUNED))
        self.lengths = sorted({r["steps"] for r in rows if isinstance(r["steps"], int)})

    def pruned(self, arm: str, pair: tuple[int, int], recipe: str, steps: Any) -> dict[str, float]:
        """Losses by seed of a pruned model; {} if there is none."""
        return self._losses.get((arm, PRUNED, *pair, recipe, steps), {})

    def whole(self, arm: str, count: int, steps: Any) -> dict[str, float]:
        """Losses by seed of a model that was not pruned; {} if there is none."""
        return self._losses.get((arm, WHOLE, count, count, None, steps), {})

    def against(
        self, arms: Sequence[str], pair: tuple[int, int], recipe: str, other: str, steps: Any
    ) -> dict[str, Any] | None:
        """Compares two recipes over the seeds that both have in some arms; None without any."""
        one: list[float] = []
        two: list[float] = []
        for arm in arms:
            mine = self.pruned(arm, pair, recipe, steps)
            theirs = self.pruned(arm, pair, other, steps)
            shared = sorted(mine.keys() & theirs.keys())
            one += [mine[seed] for seed in shared]
            two += [theirs[seed] for seed in shared]
        return difference(one, two) if one else None

    def against_scratch(
        self, arms: Sequence[str], pair: tuple[int, int], recipe: str, steps: Any
    ) -> dict[str, Any] | None:
        """Compares a pruned model with the whole model of its size."""
        one: list[float] = []
        two: list[float] = []
        for arm in arms:
            mine = self.pruned(arm, pair, recipe, steps)
            theirs = self.whole(arm, pair[1], steps)
            shared = sorted(mine.keys() & theirs.keys())
            one += [mine[seed] for seed in shared]
            two += [theirs[seed] for seed in shared]
        return difference(one, two) if one else None


def choose(evidence: Evidence, baselines: Sequence[str]) -> dict[str, Any]:
    """Picks the recipe with the smallest mean loss where recipes are chosen, and judges it.

    The mean is over the pairs of counts, at the longest fine-tuning, over recipes that have every
    pair in every arm to choose in. The winner is confirmed if it beats every baseline at every pair
    by more than two standard errors in the arms that confirm.

    Returns:
      `candidate` (None if there is none), `steps`, `scores` by recipe, `chosen_on` and
      `confirmed_on` (arms), `comparisons` (pair, baseline, where, difference, is_better),
      `is_confirmed`, and a `sentence`.
    """
    arms, confirming = evidence.arms[CHOOSE], evidence.arms[CONFIRM]
    steps = evidence.lengths[-1] if evidence.lengths else None
    scores = {}
    for recipe in evidence.recipes:
        found = [
            evidence.pruned(arm, pair, recipe, steps) for arm in arms for pair in evidence.pairs
        ]
        if found and all(found):
            scores[recipe] = float(np.mean([np.mean(list(losses.values())) for losses in found]))
    others = {name: score for name, score in scores.items() if name not in baselines}
    result: dict[str, Any] = {
        "candidate": None,
        "steps": steps,
        "scores": dict(sorted(scores.items(), key=lambda item: item[1])),
        "chosen_on": arms,
        "confirmed_on": confirming,
        "comparisons": [],
        "is_confirmed": False,
    }
    if not others:
        return result | {"sentence": "No recipe has been run at every size yet."}
    candidate = min(others, key=others.__getitem__)
    result["candidate"] = candidate
    for role, where in ((CHOOSE, arms), (CONFIRM, confirming)):
        for pair in evidence.pairs:
            for baseline in baselines:
                compared = evidence.against(where, pair, candidate, baseline, steps)
                if compared is not None:
                    result["comparisons"].append(
                        {
                            "where": role,
                            "pair": list(pair),
                            "baseline": baseline,
                            **compared,
                            "is_better": is_better(compared),
                        }
                    )
    needed = len(evidence.pairs) * len(baselines)
    confirmed = [c for c in result["comparisons"] if c["where"] == CONFIRM]
    result["is_confirmed"] = len(confirmed) == needed and all(c["is_better"] for c in confirmed)
    return result | {"sentence": _sentence(result, confirmed, needed)}


def _sentence(result: Mapping[str, Any], confirmed: Sequence[Any], needed: int) -> str:
    name = result["candidate"]
    if len(confirmed) < needed:
        return (
            f"{name} has the smallest loss where recipes are chosen; it has not been confirmed on "
            "other pretrainings yet."
        )
    if result["is_confirmed"]:
        return (
            f"{name} beats every baseline at every size by more than two standard errors, on "
            "pretrainings that it was not chosen on."
        )
    failed = [
        f"{c['pair'][0]} to {c['pair'][1]} against {c['baseline']}"
        for c in confirmed
        if not c["is_better"]
    ]
    return (
        f"Nothing wins: {name}, the best where recipes are chosen, is not better by two standard "
        f"errors on other pretrainings at {'; '.join(failed)}."
    )


def scratch_lengths(evidence: Evidence) -> list[dict[str, Any]]:
    """Says at which lengths of fine-tuning pruned models beat their size from scratch.

    Returns:
      A row per pair, recipe and length: difference over all arms, and whether it is better.
    """
    arms = [*evidence.arms[CHOOSE], *evidence.arms[CONFIRM]]
    found = []
    for pair in evidence.pairs:
        for recipe in evidence.recipes:
            for steps in evidence.lengths:
                compared = evidence.against_scratch(arms, pair, recipe, steps)
                if compared is not None:
                    found.append(
                        {
                            "pair": list(pair),
                            "recipe": recipe,
                            "steps": steps,
                            **compared,
                            "is_better": is_better(compared),
                        }
                    )
    return found
