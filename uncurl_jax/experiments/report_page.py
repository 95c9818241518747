"""Texts, table cells and the HTML page of a report. One file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.experiments.report_drawing import Figure
from uncurl_jax.experiments.report_html import (
    document,
    escape,
    nested_html,
    sections_html,
    table_html,
)

COLUMNS = (
    "task",
    "model",
    "experts",
    "score %",
    "95 % interval",
    "seeds",
    "router",
    "parameters",
    "bytes",
    "tokens dropped",
)
TEXT_COLUMNS = ("task", "model", "router")
_KIND_NAMES = {"unpruned": "unpruned", "scratch": "from scratch", "pruned": "pruned"}


def _scaled(value: float, suffixes: Sequence[str]) -> str:
    for suffix in suffixes:
        if value < 999.5:
            return f"{value:.0f}{suffix}" if value >= 99.95 else f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value * 1000:.0f}{suffixes[-1]}"


def format_count(value: float) -> str:
    """Formats a number of parameters: 1.05B, 354M."""
    return _scaled(value, ("", "K", "M", "B", "T"))


def format_bytes(value: float) -> str:
    """Formats a size in powers of 1000: 4.2 GB."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _points(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the table cells of a row of `report.summarize`, in the order of COLUMNS."""
    model, experts = _KIND_NAMES[row["kind"]], str(row["num_experts"])
    if row["kind"] == "pruned":
        model = f"{model}, {row['method']}"
        experts = f"{row['source_num_experts']} → {experts}"
    low, high = row["interval"]
    return (
        row["task"],
        model,
        experts,
        f"{row['score']:.2f}",
        f"{low:.2f} to {high:.2f}{'' if row['interval_over'] == 'seeds' else '*'}",
        str(row["num_runs"]),
        row["router"] or "–",
        format_count(row["parameters"]),
        format_bytes(row["bytes"]),
        f"{100 * row['fraction_tokens_left_behind']:.1f} %",
    )


def _step(candidate: Mapping[str, Any]) -> str:
    return f"{candidate['source_num_experts']} → {candidate['num_experts']} experts"


def _measured(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["interval"]
    return (
        f"{_points(comparison['mean'])} points, 95 % interval {_points(low)} to {_points(high)}, "
        f"{_plural(comparison['seeds'], 'seed')}"
    )


def _too_few(candidates: Sequence[Mapping[str, Any]], key: str, other: str, sign: int) -> str:
    best = max(candidates, key=lambda c: sign * c[key]["mean"] if c[key]["seeds"] else -1e9)
    return (
        f"{_plural(best[key]['seeds'], 'seed')} in common{other} where 3 are needed. So far "
        f"{_step(best)} with {best['label']}: {_points(best[key]['mean'])} points."
    )


def sentences(finding: Mapping[str, Any]) -> list[str]:
    """Says in words what one finding of `report.find_thresholds` holds."""
    candidates = finding["candidates"]
    if not candidates:
        return ["No pruned model was run."]
    beneficial, lossless = finding["beneficial"], finding["lossless"]
    best = beneficial["reached"]
    texts = {
        "reached": lambda: (
            f"{_step(best)} ({best['factor']:.3g} times fewer) with {best['label']} is at least as "
            f"good as {best['num_experts']} experts trained from scratch: {_measured(best['gap'])}."
        ),
        "not_reached": lambda: (
            "No pruned model is shown to be as good as one of its size trained from scratch; "
            "closest is " + _closest(candidates, "gap", 1)
        ),
        "too_few_seeds": lambda: (
            "Whether pruning is better than training small from scratch cannot be said: "
            + _too_few(candidates, "gap", " with a model from scratch", 1)
        ),
        "nothing_to_compare": lambda: (
            "No model of a pruned size was trained from scratch with the same seed, so whether "
            "pruning is better than training small cannot be said."
        ),
    }
    kept = lossless["reached"]
    losses = {
        "reached": lambda: (
            f"{_step(kept)} ({kept['factor']:.3g} times fewer) with {kept['label']} stays within 1 "
            f"point of the unpruned model; unpruned minus pruned: {_measured(kept['drop'])}."
        ),
        "not_reached": lambda: (
            "No pruned model is shown to stay within 1 point of the unpruned one; closest, as "
            "unpruned minus pruned, is " + _closest(candidates, "drop", -1)
        ),
        "too_few_seeds": lambda: (
            "What pruning loses against the unpruned model cannot be said: "
            + _too_few(candidates, "drop", "", -1).replace("points.", "points lost.")
        ),
        "nothing_to_compare": lambda: (
            "No unpruned model was evaluated with the same seed, so what pruning loses cannot be "
            "said."
        ),
    }
    return [texts[beneficial["status"]](), losses[lossless["status"]]()]


def _closest(candidates: Sequence[Mapping[str, Any]], key: str, sign: int) -> str:
    compared = [c for c in candidates if c[key]["seeds"] >= 3]
    best = max(compared, key=lambda c: sign * c[key]["mean"])
    return f"{_step(best)} with {best['label']}: {_measured(best[key])}."


def _short_verdict(finding: Mapping[str, Any]) -> str:
    beneficial, lossless = finding["beneficial"], finding["lossless"]
    if beneficial["reached"]:
        best = beneficial["reached"]
        return f"{best['factor']:.3g} times ({_step(best)})"
    if beneficial["status"] == "not_reached":
        return "at none of the sizes tried"
    if lossless["reached"]:
        best = lossless["reached"]
        return f"{best['factor']:.3g} times within 1 point of unpruned ({_step(best)})"
    if beneficial["status"] == "too_few_seeds" or lossless["status"] == "too_few_seeds":
        return "undecided, too few seeds"
    return "undecided, nothing to compare with"


def headline(findings: Sequence[Mapping[str, Any]]) -> str:
    """Returns one sentence saying how far one can prune, over all tasks."""
    verdicts = {finding["task"]: _short_verdict(finding) for finding in findings}
    if len(set(verdicts.values())) == 1 and "too few seeds" in next(iter(verdicts.values())):
        return (
            "Too few seeds to say how far one can prune: each size needs 3 seeds in common with a "
            "model trained from scratch, so read the scores below as single runs."
        )
    if all(not finding["candidates"] for finding in findings):
        return "No pruned model was run, so nothing can be said about how far one can prune."
    listed = "; ".join(f"{task}: {verdict}" for task, verdict in verdicts.items())
    return (
        "How far one can prune and still be as good as a model of that size trained from scratch, "
        f"on this evidence: {listed}."
    )


_READING = (
    "Scores are percent of the task's own metric on its validation split; higher is better.",
    "Intervals are 95 %: Student's over seeds, or with an asterisk the bootstrap over the examples "
    "of a single run, which does not cover the variation between seeds.",
    "Comparisons are paired by seed, in points, with a bootstrap over the pairs. Fewer than 3 "
    "pairs decide nothing.",
    "Parameters count the whole model, active those that one token passes through. Bytes are those "
    "of the stored parameters (1 GB = 10⁹).",
    "Tokens dropped had no free slot in a chosen expert and passed that layer by.",
)


def _models_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of all models, a body with a heading for each task."""
    groups = {
        str(task): [cells(row)[1:] for row in rows if row["task"] == task]
        for task in dict.fromkeys(row["task"] for row in rows)
    }
    return table_html(COLUMNS[1:], groups, text_columns=TEXT_COLUMNS, label="All models")


def render(
    report: Mapping[str, Any],
    figures: Sequence[Figure],
    benches: str = "",
    notes: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Returns the whole page.

    Args:
      report: what report.json holds.
      figures: in the order of the page.
      benches: the section of benchmarks, as HTML.
      notes: by section, sentences about what is left out of it.
    """
    if not report["rows"]:
        headline = f'<p class="headline">{escape(report["headline"])}</p>'
        return document(report["title"], f"{headline}\n{benches}")
    findings = "\n".join(
        f"<h3>{escape(finding['task'])}</h3><ul>"
        + "".join(f"<li>{escape(sentence)}</li>" for sentence in finding["sentences"])
        + "</ul>"
        for finding in report["findings"]
    )
    warnings = "".join(
        f"<li>{escape(task)}: {escape(warning)}</li>"
        for task, shown in report["plans_shown"].items()
        for warning in shown["warnings"]
    )
    advice = report.get("recommendation")
    reading = "".join(f"<li>{escape(text)}</li>" for text in _READING)
    # The key pictures stand before the table of all models, the others after it.
    first = [figure for figure in figures if figure.section == figures[0].section]
    body = f"""{_advice_html(advice) if advice else ""}
<h2>Findings</h2>
<p>{escape(report["headline"])}</p>
{findings}
{sections_html(first, {})}
<h2>Models</h2>
{_models_table(report["rows"])}
<p class="note">{_plural(report["num_runs"], "run")}. * interval over the examples of one run.</p>
{sections_html(figures[len(first) :], notes or {})}
{f"<h2>Warnings in the plans shown</h2><ul>{warnings}</ul>" if warnings else ""}
{benches}
<h2>How to read this</h2>
<ul>{reading}</ul>
{_provenance(report["study"])}"""
    return document(report["title"], body)


def _advice_html(advice: Mapping[str, Any]) -> str:
    """The recommendation: what to deploy, then why for each task, then what was not shown."""
    reasons = "".join(f"<li>{escape(text)}</li>" for text in advice["reasons"])
    return (
        f'<div class="recommendation"><p>{escape(advice["lead"])}</p><ul>{reasons}</ul>'
        f"<p>{escape(' '.join(advice['not_shown']))}</p></div>"
    )


def _provenance(study: Mapping[str, Any]) -> str:
    """Device and versions in sight, the configuration to be unfolded."""
    shown = {key: study[key] for key in ("device", "versions") if study.get(key)}
    rest = {key: value for key, value in study.items() if key not in ("title", *shown)}
    return (
        f"<h2>Provenance</h2>{nested_html(shown) if shown else ''}"
        f"<details><summary>Configuration</summary>{nested_html(rest)}</details>"
    )


def render_plan(
    title: str,
    verdict: str,
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    figures: Sequence[Figure],
) -> str:
    """Returns a plan's page.

    Args:
      title: heading.
      verdict: sentence below it.
      table: rows of cells, the first is the head.
      notes: sentences about layers.
      figures: clusters and loads.
    """
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    layers = table_html(
        table[0], {"": table[1:]}, text_columns=("method",), label="Diagnostics of every layer"
    )
    body = f"""<p class="headline">{escape(verdict)}</p>
{layers}
<ul>{items}</ul>
{sections_html(figures, {})}"""
    return document(title, body)
