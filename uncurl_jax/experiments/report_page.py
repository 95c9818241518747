"""Texts, table cells and the HTML page of a report. One file, no scripts, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

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


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a;
  --line: #d0d7de; --panel: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e8eaed; --soft: #a4adb8; --line: #3a424c;
    --panel: #1d2228; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; overflow-wrap: anywhere; }
p, ul { margin: .4rem 0; } ul { padding-left: 1.2rem; }
.headline { font-size: 1.35rem; line-height: 1.35; font-weight: 600; margin: 0 0 1rem;
  padding-left: .8rem; border-left: .3rem solid var(--accent); overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; white-space: nowrap; border-bottom: 1px solid var(--line); }
.text { text-align: left; } .number { text-align: right; }
thead th { font-weight: 600; color: var(--soft); }
tbody th { font-weight: 600; background: var(--panel); }
tbody:last-child tr:last-child td { border-bottom: 0; }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem;
  min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure .plot { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: .4rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .2rem .8rem;
  font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
"""

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


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of all models, a body with a heading for each task."""
    classes = ["text" if name in TEXT_COLUMNS else "number" for name in COLUMNS[1:]]
    head = "".join(
        f'<th scope="col" class="{kind}">{html.escape(name)}</th>'
        for kind, name in zip(classes, COLUMNS[1:], strict=True)
    )
    bodies = []
    for task in dict.fromkeys(row["task"] for row in rows):
        heading = (
            f'<th scope="rowgroup" class="text" colspan="{len(classes)}">{html.escape(task)}</th>'
        )
        lines = [f"<tr>{heading}</tr>"]
        for row in rows:
            if row["task"] == task:
                texts = zip(classes, cells(row)[1:], strict=True)
                line = "".join(
                    f'<td class="{kind}">{html.escape(cell)}</td>' for kind, cell in texts
                )
                lines.append(f"<tr>{line}</tr>")
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        + "\n".join(bodies)
        + "</table></div>"
    )


def _details(values: Any) -> str:
    if isinstance(values, Mapping):
        items = "".join(
            f"<dt>{html.escape(str(key))}</dt><dd>{_details(value)}</dd>"
            for key, value in values.items()
        )
        return f"<dl>{items}</dl>"
    if isinstance(values, list | tuple):
        return ", ".join(_details(value) for value in values) or "–"
    return html.escape(str(values))


def _figure(figure: Any) -> str:
    wide = ' class="wide"' if figure.min_width > 640 else ""
    return (
        f'<figure{wide}><div class="plot" tabindex="0"><div style="min-width: '
        f"{min(figure.min_width, 340) if not wide else figure.min_width}px; "
        f'max-width: {max(figure.min_width, 640)}px; margin: auto">{figure.svg}</div></div>'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def render(report: Mapping[str, Any], figures: Sequence[Any], benches: str = "") -> str:
    """Returns the whole page.

    Args:
      report: what report.json holds.
      figures: as `report_figures.draw_figures` returns them.
      benches: the section of benchmarks, as HTML.
    """
    if not report["rows"]:
        headline = f'<p class="headline">{html.escape(report["headline"])}</p>'
        return _document(report["title"], f"{headline}\n{benches}")
    findings = "\n".join(
        f"<h3>{html.escape(finding['task'])}</h3><ul>"
        + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in finding["sentences"])
        + "</ul>"
        for finding in report["findings"]
    )
    warnings = "".join(
        f"<li>{html.escape(task)}: {html.escape(warning)}</li>"
        for task, shown in report["plans_shown"].items()
        for warning in shown["warnings"]
    )
    reading = "".join(f"<li>{html.escape(text)}</li>" for text in _READING)
    study = {key: value for key, value in report["study"].items() if key != "title"}
    body = f"""<p class="headline">{html.escape(report["headline"])}</p>
{findings}
<h2>Models</h2>
{_table(report["rows"])}
<p class="note">{_plural(report["num_runs"], "run")}. * interval over the examples of one run.</p>
{_plots(figures)}
{f"<h3>Warnings in the plans shown</h3><ul>{warnings}</ul>" if warnings else ""}
{benches}
<h2>How to read this</h2>
<ul>{reading}</ul>
<details><summary>Device, versions and configuration</summary>{_details(study)}</details>"""
    return _document(report["title"], body)


def render_plan(
    title: str,
    verdict: str,
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    figures: Sequence[Any],
) -> str:
    """Returns a plan's page.

    Args:
      title: heading.
      verdict: sentence below it.
      table: rows of cells, the first is the head.
      notes: sentences about layers.
      figures: clusters and loads.
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table[0])
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table[1:]
    )
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    body = f"""<p class="headline">{html.escape(verdict)}</p>
<div class="figures"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<ul>{items}</ul>
{_plots(figures)}"""
    return _document(title, body)


def _plots(figures: Sequence[Any]) -> str:
    sections = {
        section: "\n".join(_figure(figure) for figure in figures if figure.section == section)
        for section in dict.fromkeys(figure.section for figure in figures)
    }
    return "\n".join(
        f'<h2>{html.escape(section)}</h2>\n<div class="figures">{content}</div>'
        for section, content in sections.items()
    )


def _document(title: str, body: str) -> str:
    """Returns a self-contained page: nothing is fetched, no script runs."""
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
