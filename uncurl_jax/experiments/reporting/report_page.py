"""Texts, table cells and the HTML page of a report. One file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.experiments.evidence.effects import effect_tables
from uncurl_jax.experiments.evidence.thresholds import MEAN_TASK, MIN_SEEDS, MIN_TASKS
from uncurl_jax.experiments.reporting.report_drawing import Figure
from uncurl_jax.experiments.reporting.report_html import (
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


def _limit(points: float) -> str:
    return f"{points:g} point" if points == 1 else f"{points:g} points"


def _measured(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["interval"]
    return (
        f"{_points(comparison['mean'])} points, 95 % interval {_points(low)} to {_points(high)} "
        f"over {comparison['over']}, {_plural(comparison['seeds'], 'seed')}"
    )


def _too_few(candidates: Sequence[Mapping[str, Any]], key: str, other: str, sign: int) -> str:
    compared = [c for c in candidates if c[key]["seeds"]]
    best = max(compared, key=lambda c: sign * c[key]["mean"])
    return (
        f"{_plural(best[key]['seeds'], 'seed')} in common{other} where {MIN_SEEDS} are needed. So "
        f"far {_step(best)} with {best['label']}: {_points(best[key]['mean'])} points."
    )


def sentences(finding: Mapping[str, Any]) -> list[str]:
    """Says in words what one finding of `thresholds.find_thresholds` holds."""
    if not finding["candidates"]:
        return ["No pruned model was run."]
    unlearned = _unlearned_sentences(finding)
    if any(finding[name]["status"] == "unlearned" for name in ("beneficial", "lossless")):
        return [*unlearned, *_missing_sentences(finding)]
    return [
        _beneficial_sentence(finding),
        _lossless_sentence(finding),
        *unlearned,
        *_hole_sentences(finding),
        *_holm_sentences(finding),
        *_missing_sentences(finding),
    ]


def _unlearned_sentences(finding: Mapping[str, Any]) -> list[str]:
    """Says where no unpruned model beats always giving the same answer."""
    guessing = finding.get("guessing")
    if guessing is None:
        return []
    if not guessing["is_beaten"]:
        answer = f' ("{guessing["option"]}")' if guessing["option"] else ""
        return [
            "No model that was not pruned is shown to be better than always giving the same answer"
            f"{answer}, which scores {guessing['score']:.2f} %: the task was not learned, so "
            "nothing can be said about pruning for it."
        ]
    tasks = guessing.get("tasks_not_beaten", [])
    if not tasks:
        return []
    return [
        f"Of the tasks in the mean {', '.join(tasks)} {'was' if len(tasks) == 1 else 'were'} not "
        "learned; verdicts on the mean rest on the others."
    ]


def _beneficial_sentence(finding: Mapping[str, Any]) -> str:
    candidates, status = finding["candidates"], finding["beneficial"]["status"]
    best, margin = finding["beneficial"]["reached"], finding["margin"]
    slack = f", give or take {_limit(margin)}" if margin else ""
    if status == "reached":
        return (
            f"{_step(best)} ({best['factor']:.3g} times fewer) with {best['label']} is at least as "
            f"good as {best['num_experts']} experts trained from scratch{slack}: "
            f"{_measured(best['gap'])}."
        )
    if status == "not_reached":
        return (
            f"No pruned model is shown to be as good as one of its size trained from scratch"
            f"{slack}; closest is " + _closest(candidates, "gap", 1)
        )
    if status == "too_few_seeds":
        return "Whether pruning is better than training small from scratch cannot be said: " + (
            _too_few(candidates, "gap", " with a model from scratch", 1)
        )
    can = "" if finding["lossless"]["status"] == "nothing_to_compare" else "; the lossless one can"
    return (
        f"{_lacking(finding, 'gap', 'model of a pruned size was trained from scratch')}, so "
        "whether pruning is better than training small cannot be said: the beneficial threshold "
        f"cannot be given{can}."
    )


def _lossless_sentence(finding: Mapping[str, Any]) -> str:
    candidates, status = finding["candidates"], finding["lossless"]["status"]
    best, tolerance = finding["lossless"]["reached"], _limit(finding["tolerance"])
    if status == "reached":
        return (
            f"{_step(best)} ({best['factor']:.3g} times fewer) with {best['label']} stays within "
            f"{tolerance} of the unpruned model; unpruned minus pruned: {_measured(best['drop'])}."
        )
    if status == "not_reached":
        return (
            f"No pruned model is shown to stay within {tolerance} of the unpruned one; closest, as "
            "unpruned minus pruned, is " + _closest(candidates, "drop", -1)
        )
    if status == "too_few_seeds":
        text = _too_few(candidates, "drop", "", -1).replace("points.", "points lost.")
        return "What pruning loses against the unpruned model cannot be said: " + text
    return (
        f"{_lacking(finding, 'drop', 'unpruned model was evaluated')}, so what pruning loses "
        "cannot be said: the lossless threshold cannot be given."
    )


def _lacking(finding: Mapping[str, Any], key: str, what: str) -> str:
    """Says what a comparison lacks; for the mean over tasks, in which of them."""
    missing = [c[key].get("tasks_missing") for c in finding["candidates"]]
    if all(missing):
        fewest = min((tasks for tasks in missing if tasks), key=len)
        return f"Not every task has such a comparison (without: {', '.join(fewest)})"
    return f"No {what} with the same seed"


def _hole_sentences(finding: Mapping[str, Any]) -> list[str]:
    """Says where a larger factor holds and a smaller one does not."""
    said = []
    for name in ("beneficial", "lossless"):
        holes = finding[name]["smaller_not_holding"]
        if holes:
            steps = ", ".join(_step(hole) for hole in holes)
            said.append(
                f"The {name} threshold is reached at {finding[name]['reached']['factor']:.3g} "
                f"times, but with the same method {steps} is not shown to hold: take the "
                "threshold with care."
            )
    return said


def _holm_sentences(finding: Mapping[str, Any]) -> list[str]:
    """Says which verdicts remain when all comparisons of the study are counted."""
    reached = {
        name: finding[name]["survives_holm"]
        for name in ("beneficial", "lossless")
        if finding[name]["status"] == "reached"
    }
    if not reached or finding["comparisons"] < 2:
        return []
    kept = [f"the {name} threshold" for name, survives in reached.items() if survives]
    lost = [f"the {name} threshold" for name, survives in reached.items() if not survives]
    parts = [
        f"{' and '.join(names)} {verb}{'s' if len(names) == 1 else ''}"
        for names, verb in ((kept, "remain"), (lost, "do not remain"))
        if names
    ]
    text = ", ".join(parts).replace("do not remains", "does not remain")
    return [f"Counting all {finding['comparisons']} comparisons of this study (Holm, 5 %), {text}."]


def _missing_sentences(finding: Mapping[str, Any]) -> list[str]:
    """Names the seeds that have no partner."""
    missing = []
    for candidate in finding["candidates"]:
        for key in ("gap", "drop"):
            for lacking, seeds in candidate[key]["missing_seeds"].items():
                partner = "the pruned model" if lacking == "pruned" else f"the {lacking} model"
                partner = partner.replace("the scratch model", "the model from scratch")
                listed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
                missing.append(
                    f"{listed} of {_step(candidate)} with {candidate['label']}, where {partner} is "
                    "missing"
                )
    if not missing:
        return []
    return [f"Left out for want of a pair: {'; '.join(dict.fromkeys(missing))}."]


def _closest(candidates: Sequence[Mapping[str, Any]], key: str, sign: int) -> str:
    compared = [c for c in candidates if c[key]["seeds"] >= MIN_SEEDS]
    best = max(compared, key=lambda c: sign * c[key]["mean"])
    return f"{_step(best)} with {best['label']}: {_measured(best[key])}."


def _short_verdict(finding: Mapping[str, Any]) -> str:
    beneficial, lossless = finding["beneficial"], finding["lossless"]
    if beneficial["reached"]:
        best = beneficial["reached"]
        return f"{best['factor']:.3g} times ({_step(best)})"
    if beneficial["status"] == "unlearned" or lossless["status"] == "unlearned":
        return "undecided, not learned"
    if beneficial["status"] == "not_reached":
        return "at none of the sizes tried"
    if lossless["reached"]:
        best = lossless["reached"]
        return (
            f"{best['factor']:.3g} times within {_limit(finding['tolerance'])} of unpruned "
            f"({_step(best)})"
        )
    if beneficial["status"] == "too_few_seeds" or lossless["status"] == "too_few_seeds":
        return "undecided, too few seeds"
    if lossless["status"] == "not_reached":
        return f"at no size tried within {_limit(finding['tolerance'])} of unpruned"
    return "undecided, nothing to compare with"


def headline(findings: Sequence[Mapping[str, Any]]) -> str:
    """Returns one sentence saying how far one can prune, over all tasks."""
    verdicts = {finding["task"]: _short_verdict(finding) for finding in findings}
    if len(set(verdicts.values())) == 1 and "too few seeds" in next(iter(verdicts.values())):
        return (
            f"Too few seeds to say how far one can prune: each size needs {MIN_SEEDS} seeds in "
            "common with a model trained from scratch, so read the scores below as single runs."
        )
    if all(not finding["candidates"] for finding in findings):
        return "No pruned model was run, so nothing can be said about how far one can prune."
    listed = "; ".join(
        f"{'mean over the tasks' if task == MEAN_TASK else task}: {verdict}"
        for task, verdict in verdicts.items()
    )
    if all(finding["beneficial"]["status"] == "nothing_to_compare" for finding in findings):
        return (
            "Whether a smaller model trained from scratch is better cannot be said, for there is "
            f"none; how far one can prune against the unpruned model, on this evidence: {listed}."
        )
    return (
        "How far one can prune and still be as good as a model of that size trained from scratch, "
        f"on this evidence: {listed}."
    )


_READING = (
    "Scores are percent of the task's own metric on its validation split; higher is better.",
    "Intervals are 95 %: of a model, Student's over seeds, or with an asterisk the bootstrap over "
    "the examples of a single run, which does not cover the variation between seeds.",
    "Comparisons are paired by seed and example, in points. Their intervals cover other seeds and "
    f"other examples, or what they name. Fewer than {MIN_SEEDS} pairs decide nothing.",
    f"The interval of the mean over {MIN_TASKS} tasks or more is about tasks such as these; of "
    "fewer, about these tasks alone. All seeds share their pretraining, which no interval covers.",
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
{_effects_html(report["effects"])}
{sections_html(figures[len(first) :], notes or {})}
{f"<h2>Warnings in the plans shown</h2><ul>{warnings}</ul>" if warnings else ""}
{benches}
<h2>How to read this</h2>
<ul>{reading}</ul>
{_provenance(report["study"])}"""
    return document(report["title"], body)


def _effects_html(effects: Mapping[str, Any]) -> str:
    """Pruned minus other models, and the paper's own effects beside them."""
    parts = ["<h2>Effects of pruning</h2>"]
    for table in effect_tables(effects):
        parts.append(f"<p>{escape(table.title)}</p>")
        if table.lines:
            parts.append(
                table_html(
                    table.head,
                    {"": table.lines},
                    text_columns=("experts", "method", "router"),
                    label=table.title,
                )
            )
        if table.note:
            parts.append(f'<p class="note">{escape(table.note)}</p>')
    return "\n".join(parts)


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
