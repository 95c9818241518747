"""The quality gate: may a pruned model of a report be deployed, by limits set beforehand?

A gate is a JSON file of rules (docs/thresholds.md, configs/gates/default.json). `judge` returns
what gate.json holds; who signs it off, and when, is left to people.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence.answers import CLASS, SLICE
from uncurl_jax.experiments.evidence.thresholds import IDENTITY, MEAN_TASK
from uncurl_jax.experiments.gate_bench import Timed, latency_gain
from uncurl_jax.experiments.reporting.report import SCHEMA as REPORT_SCHEMA

GATE_SCHEMA = "uncurl_jax gate 1"
VERDICT_SCHEMA = "uncurl_jax gate verdict 1"
INTERVAL, MEAN = "interval", "mean"
# Losses in points, judged by the upper end of their interval or by their mean.
DROP_RULES = ("max_drop_per_task", "max_mean_drop", "max_class_drop", "max_slice_drop")
GAIN_RULES = ("min_memory_gain", "min_latency_gain")
_NUMBER_RULES = (
    *("max_drop_fraction", "min_seeds", "min_slice_examples", "min_over_guessing"),
    *GAIN_RULES,
)
RULES = (*DROP_RULES, *_NUMBER_RULES)
_PER_TASK = tuple(rule for rule in RULES if rule not in ("max_mean_drop", *GAIN_RULES))
_SETTINGS = ("schema", "judged_by", "tasks")
_SUBSET_RULES = {"max_class_drop": CLASS, "max_slice_drop": SLICE}
_DEFAULT_MIN_EXAMPLES = 50


class Limit(NamedTuple):
    """A rule's limit.

    Attributes:
      value: points, fraction or count, as the rule's name says.
      judged_by: INTERVAL or MEAN.
    """

    value: float
    judged_by: str


class Gate(NamedTuple):
    """The rules of a gate.

    Attributes:
      limits: by rule.
      tasks: by task, the rules that replace those.
    """

    limits: Mapping[str, Limit]
    tasks: Mapping[str, Mapping[str, Limit]]

    def limit(self, rule: str, task: str | None = None) -> Limit | None:
        """Returns the limit of a rule for a task, None if there is none."""
        return self.tasks.get(task or "", {}).get(rule) or self.limits.get(rule)


def load_gate(path: str | os.PathLike[str]) -> Gate:
    """Reads a gate.

    Raises:
      InputError: If the file is missing or of another schema, a rule is not known or its limit is
        not a number at least 0, or there is no rule.
    """
    values = artifacts.read_json(path)
    if not isinstance(values, dict) or values.get("schema") != GATE_SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else values
        raise InputError(
            f'A gate must be an object with the schema "{GATE_SCHEMA}", got {found!r} in {path}: '
            "see configs/gates/default.json."
        )
    default = values.get("judged_by", INTERVAL)
    _check_judged_by(default, path)
    limits = _limits(values, RULES, default, str(path), _SETTINGS)
    tasks = values.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(own, dict) for own in tasks.values()):
        raise InputError(f"{path}: tasks must map a task's name to rules, got {tasks!r}.")
    by_task = {
        name: _limits(own, _PER_TASK, default, f"{path}, task {name}")
        for name, own in tasks.items()
    }
    judging = [rule for own in (limits, *by_task.values()) for rule in own]
    if not any(rule != "min_slice_examples" for rule in judging):
        raise InputError(f"A gate must have at least one rule of {', '.join(RULES)}, got {path}.")
    return Gate(limits, by_task)


def _check_judged_by(value: Any, where: Any) -> None:
    if value not in (INTERVAL, MEAN):
        raise InputError(f'{where}: judged_by must be "{INTERVAL}" or "{MEAN}", got {value!r}.')


def _limits(
    values: Mapping[str, Any],
    rules: Sequence[str],
    judged_by: str,
    where: str,
    others: Sequence[str] = (),
) -> dict[str, Limit]:
    limits = {}
    for name, value in values.items():
        if name in others:
            continue
        if name not in rules:
            near = difflib.get_close_matches(name, rules, n=2) or list(rules)
            raise InputError(
                f"{where}: a rule must be a known one, got {name!r}: nearest {', '.join(near)}."
            )
        own, number = judged_by, value
        if isinstance(value, dict) and name in DROP_RULES:
            if set(value) - {"limit", "judged_by"} or "limit" not in value:
                raise InputError(
                    f"{where}: {name} must be a number or hold limit and judged_by, got {value!r}."
                )
            own, number = value.get("judged_by", judged_by), value["limit"]
            _check_judged_by(own, f"{where}, {name}")
        limits[name] = Limit(_checked_number(name, number, where), own)
    return limits


def _checked_number(name: str, value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise InputError(f"{where}: {name} must be a number of at least 0, got {value!r}.")
    if name in (*GAIN_RULES, "max_drop_fraction") and value > 1:
        raise InputError(f"{where}: {name} must be a fraction of at most 1, got {value!r}.")
    return value


def load_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a report.json.

    Raises:
      InputError: If it is missing or of another schema, or holds no pruned model.
    """
    report = artifacts.read_json(path)
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != REPORT_SCHEMA:
        raise InputError(
            f'A report must have the schema "{REPORT_SCHEMA}", got {schema!r} in {path}: write it '
            "again with uncurl report."
        )
    if not candidate_names(report):
        raise InputError(f"A gate judges pruned models, got none in {path}: run a study first.")
    return report


def candidate_name(model: Mapping[str, Any]) -> str:
    """Names a pruned model: 16to4-uncurl-reference."""
    experts = f"{model['source_num_experts']}to{model['num_experts']}"
    return f"{experts}-{model['method']}-{model['router']}"


def candidate_names(report: Mapping[str, Any]) -> list[str]:
    """Returns the names of a report's pruned models."""
    names = (candidate_name(c) for f in report["findings"] for c in f["candidates"])
    return list(dict.fromkeys(names))


def _chosen(report: Mapping[str, Any], candidate: str | None, path: Any) -> str:
    """Returns the candidate asked for; else the only one, or the one at the lossless threshold."""
    names = candidate_names(report)
    if candidate in names:
        return str(candidate)
    listed = ", ".join(names)
    if candidate is not None:
        raise InputError(
            f"--candidate must be a pruned model of {path}, got {candidate!r}: choose of {listed}."
        )
    if len(names) == 1:
        return names[0]
    findings = report["findings"]
    whole = [f for f in findings if f["task"] == MEAN_TASK] or findings
    if len(whole) == 1 and whole[0]["lossless"]["reached"]:
        return candidate_name(whole[0]["lossless"]["reached"])
    raise InputError(
        f"No model of {path} reached the lossless threshold for all tasks, so --candidate must "
        f"name the one to judge: choose of {listed}."
    )


def judge(
    report: str | os.PathLike[str],
    gate: str | os.PathLike[str],
    *,
    candidate: str | None = None,
    bench: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Judges a pruned model of a report by a gate.

    Args:
      report: report.json.
      gate: file of rules.
      candidate: as `candidate_name` names it; by default the report's only pruned model, or the one
        at the lossless threshold.
      bench: record of `uncurl bench`, for min_latency_gain.

    Returns:
      What gate.json holds: `passed`, a verdict for each rule, task, class and slice, what was
      `not_judged` and why, limits, and hashes of the inputs.

    Raises:
      InputError: If a file is malformed or of another schema, the candidate is not in the report,
        or the gate names a task that is not.
    """
    content, rules = load_report(report), load_gate(gate)
    tasks = [f["task"] for f in content["findings"] if f["task"] != MEAN_TASK]
    unknown = sorted(set(rules.tasks) - set(tasks))
    if unknown:
        raise InputError(
            f"{gate}: tasks must be of the report, got {unknown[0]!r}: {report} has "
            f"{', '.join(tasks)}."
        )
    name = _chosen(content, candidate, report)
    model = _Model(content, name)
    timed = None if bench is None else latency_gain(bench, *model.counts())
    verdicts = [*_drops(model, rules, tasks), *_others(model, rules, tasks)]
    subset_verdicts, not_judged = _subsets(model, rules, tasks)
    gains = _gains(model, rules, tasks, timed)
    verdicts += subset_verdicts
    passed = all(v["passed"] for v in verdicts)
    if gains:
        passed = passed and any(v["passed"] for v in gains)
    files = {"report": report, "gate": gate, **({"bench": bench} if bench is not None else {})}
    return {
        "schema": VERDICT_SCHEMA,
        "passed": passed,
        "candidate": {"name": name, **model.identity},
        "verdicts": [*verdicts, *gains],
        "not_judged": not_judged,
        "limits": artifacts.read_json(gate),
        "inputs": {
            role: {"file": Path(file).name, "sha256": artifacts.sha256_of_file(file)}
            for role, file in files.items()
        },
        "study_inputs": content["inputs"],
        "signed_off_by": None,
        "signed_off_at": None,
    }


class _Model:
    """What a report holds of one pruned model."""

    def __init__(self, report: Mapping[str, Any], name: str):
        self._rows = report["rows"]
        self.candidates: dict[str, Mapping[str, Any]] = {
            finding["task"]: candidate
            for finding in report["findings"]
            for candidate in finding["candidates"]
            if candidate_name(candidate) == name
        }
        first = next(iter(self.candidates.values()))
        self.identity = {name: first[name] for name in IDENTITY}

    def row(self, task: str, kind: str) -> Mapping[str, Any] | None:
        """Returns the row of the pruned model on a task, or of the model it was pruned from."""
        wanted = dict(self.identity)
        if kind == "unpruned":
            wanted = {"num_experts": wanted["source_num_experts"]}
        wanted |= {"task": task, "kind": kind}
        return next((r for r in self._rows if all(r[k] == v for k, v in wanted.items())), None)

    def counts(self) -> tuple[list[int], list[int]]:
        """Returns the experts of each MoE layer, before and after."""
        for task in self.candidates:
            before, after = self.row(task, "unpruned"), self.row(task, "pruned")
            if before and after:
                return (
                    [count for count in before["num_experts_per_layer"] if count],
                    [count for count in after["num_experts_per_layer"] if count],
                )
        return [], []


def _verdict(
    rule: str, limit: Limit, value: float | None, reason: str | None = None, **others: Any
) -> dict[str, Any]:
    """One entry of gate.json; fails where there is no value."""
    is_most = rule.startswith("max_")
    passed = value is not None and (value <= limit.value if is_most else value >= limit.value)
    return {
        "rule": rule,
        "task": None,
        "where": None,
        **others,
        "limit": limit.value,
        "value": value,
        "passed": passed,
        "reason": reason,
    }


def _drop_verdict(
    rule: str, limit: Limit, drop: Mapping[str, Any] | None, **others: Any
) -> dict[str, Any]:
    """Judges a drop by the upper end of its interval or its mean."""
    if drop is None:
        return _verdict(rule, limit, None, "the model was not run on this task", **others)
    known = {"judged_by": limit.judged_by, "mean": drop.get("mean"), "seeds": drop["seeds"]}
    known |= {name: drop.get(name) for name in ("interval", "over")}
    if drop.get("mean") is None:
        reason = "there is no unpruned model with the same seed"
        return _verdict(rule, limit, None, reason, **others, **known)
    if limit.judged_by == MEAN:
        return _verdict(rule, limit, drop["mean"], **others, **known)
    if drop["interval"] is None:
        reason = "one seed without predictions has no interval"
        return _verdict(rule, limit, None, reason, **others, **known)
    return _verdict(rule, limit, drop["interval"][1], **others, **known)


def _drops(model: _Model, gate: Gate, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        limit = gate.limit("max_drop_per_task", task)
        if limit is not None:
            candidate = model.candidates.get(task)
            drop = candidate["drop"] if candidate else None
            yield _drop_verdict("max_drop_per_task", limit, drop, task=task)
    limit = gate.limit("max_mean_drop")
    if limit is not None:
        candidate = model.candidates.get(MEAN_TASK if len(tasks) > 1 else tasks[0])
        drop = candidate["drop"] if candidate else None
        yield _drop_verdict("max_mean_drop", limit, drop)


def _others(model: _Model, gate: Gate, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        limit, row = gate.limit("max_drop_fraction", task), model.row(task, "pruned")
        if limit is not None:
            value = row["fraction_tokens_left_behind"] if row else None
            reason = None if row else "the model was not run on this task"
            yield _verdict("max_drop_fraction", limit, value, reason, task=task)
        limit = gate.limit("min_over_guessing", task)
        if limit is not None:
            guess = row["guessing_score"] if row else None
            value = row["score"] - guess if row and guess is not None else None
            reason = None if value is not None else "the report has no predictions of this model"
            yield _verdict("min_over_guessing", limit, value, reason, task=task)
        limit, candidate = gate.limit("min_seeds", task), model.candidates.get(task)
        if limit is not None:
            seeds = candidate["drop"]["seeds"] if candidate else 0
            yield _verdict("min_seeds", limit, seeds, task=task)


def _subsets(
    model: _Model, gate: Gate, tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Verdicts on classes and slices, and what was too small to be judged."""
    verdicts, not_judged = [], []
    for task in tasks:
        candidate = model.candidates.get(task)
        drops = candidate["drop_by_subset"] if candidate else []
        fewest = gate.limit("min_slice_examples", task)
        fewest_examples = fewest.value if fewest else _DEFAULT_MIN_EXAMPLES
        for rule, kind in _SUBSET_RULES.items():
            limit = gate.limit(rule, task)
            if limit is None:
                continue
            own = [drop for drop in drops if drop["kind"] == kind]
            if not drops:
                reason = "the report has no predictions of this model and the unpruned one"
                verdicts.append(_verdict(rule, limit, None, reason, task=task))
            elif not own:
                reason = f"the task has no {kind}"
                not_judged.append({"rule": rule, "task": task, "where": None, "reason": reason})
            for drop in own:
                where = {"task": task, "where": drop["name"], "num_examples": drop["num_examples"]}
                if drop["num_examples"] < fewest_examples:
                    reason = f"fewer than {fewest_examples:g} examples"
                    known = {"mean": drop.get("mean"), "interval": drop.get("interval")}
                    not_judged.append({"rule": rule, **where, **known, "reason": reason})
                else:
                    verdicts.append(_drop_verdict(rule, limit, drop, **where))
    return verdicts, not_judged


def _gains(
    model: _Model, gate: Gate, tasks: Sequence[str], timed: Timed | None
) -> list[dict[str, Any]]:
    """Verdicts on memory and latency; one of those that are set must hold."""
    verdicts = []
    limit = gate.limit("min_memory_gain")
    if limit is not None:
        pairs = [(model.row(task, "unpruned"), model.row(task, "pruned")) for task in tasks]
        saved = [
            1 - after["bytes"] / before["bytes"] for before, after in pairs if before and after
        ]
        reason = None if saved else "there is no unpruned model to compare with"
        verdicts.append(_verdict("min_memory_gain", limit, min(saved) if saved else None, reason))
    limit = gate.limit("min_latency_gain")
    if limit is not None:
        value = timed.gain if timed else None
        reason = timed.text if timed else "no record of uncurl bench was given (--bench)"
        verdicts.append(_verdict("min_latency_gain", limit, value, reason))
    return verdicts


def format_verdicts(result: Mapping[str, Any]) -> str:
    """Formats what `judge` returned for a terminal."""
    lines = [("rule", "task", "where", "limit", "found", "mean [95 % interval]", "verdict")]
    for verdict in result["verdicts"]:
        value, mean = verdict["value"], verdict.get("mean")
        told = "" if mean is None else f"{mean:+.2f}"
        if verdict.get("interval"):
            told += " [{:+.2f}, {:+.2f}]".format(*verdict["interval"])
        lines.append(
            (
                verdict["rule"],
                verdict["task"] or "",
                verdict["where"] or "",
                f"{verdict['limit']:g}",
                "–" if value is None else f"{value:.4g}",
                told,
                f"{'pass' if verdict['passed'] else 'FAIL'}"
                + (f": {verdict['reason']}" if verdict["reason"] else ""),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if sum(verdict["rule"] in GAIN_RULES for verdict in result["verdicts"]) > 1:
        text.append(f"Of {' and '.join(GAIN_RULES)} one must hold.")
    for entry in result["not_judged"]:
        where = f" {entry['where']}" if entry["where"] else ""
        text.append(f"Not judged: {entry['rule']}, {entry['task']}{where}: {entry['reason']}.")
    name = result["candidate"]["name"]
    return "\n".join([*text, f"{name}: {'passed' if result['passed'] else 'FAILED'}."])
