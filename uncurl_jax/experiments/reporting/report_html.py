"""The HTML of a report: one self-contained page, nothing fetched, no script.

For screens from 390 pixels up, light and dark, for keyboards and screen readers, and for paper.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uncurl_jax.experiments.reporting.report_drawing import PIXELS_PER_INCH, Figure, swatch

# Up to this width a panel fits a page of 390 pixels and its area needs no scrolling.
_NARROW_PIXELS = round(3.45 * PIXELS_PER_INCH)

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a;
  --line: #d0d7de; --panel: #f6f8fa; --accent: #0072b2; --c0: #0072b2; --c1: #c25500;
  --c2: #00805d; --c3: #b0568a; --c4: #a87400; --c5: #3f97c8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e8eaed; --soft: #a4adb8; --line: #3a424c; --panel: #1d2228;
    --accent: #6cbcf0; --c0: #58b0ee; --c1: #f0813a; --c2: #35c497; --c3: #e39cc6;
    --c4: #f0b93c; --c5: #9bd4f5; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; background: var(--paper); padding: .5rem 1rem; }
.skip:focus { left: 1rem; top: .5rem; z-index: 1; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; overflow-wrap: anywhere; }
p, ul { margin: .4rem 0; } ul { padding-left: 1.2rem; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
.headline { font-size: 1.3rem; line-height: 1.4; font-weight: 600; margin: 0 0 1rem;
  padding-left: .8rem; border-left: .3rem solid var(--accent); }
.recommendation { font-size: 1.08rem; line-height: 1.5; margin: 0 0 1rem; padding: .7rem .9rem;
  background: var(--panel); border-left: .3rem solid var(--accent);
  border-radius: 0 .4rem .4rem 0; }
.recommendation p:first-child { font-weight: 600; font-size: 1.2rem; line-height: 1.4; }
.recommendation > * { max-width: none; }
.recommendation > :first-child { margin-top: 0; } .recommendation > :last-child { margin: 0; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; white-space: nowrap; border-bottom: 1px solid var(--line); }
.text { text-align: left; } .number { text-align: right; }
thead th { font-weight: 600; color: var(--soft); }
tbody th { font-weight: 600; background: var(--panel); }
tbody tr:last-child > * { border-bottom: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: stretch; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem;
  min-width: 0; max-width: 100%; display: flex; flex-direction: column; }
figure.single { flex: 0 0 calc((100% - 2rem) / 3); min-width: min(100%, 21.7rem); }
figure.several { flex: 1 1 100%; }
figure h3, figure h4 { font-size: .95rem; line-height: 1.4; margin: 0; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: .4rem; overflow-wrap: anywhere; }
.plot { overflow-x: auto; margin: .4rem 0; }
.panels { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr)); }
figure svg { display: block; height: auto; }
.panels svg { width: 100%; max-width: var(--most); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0; padding: 0;
  list-style: none; font-size: .85rem; }
.legend svg { display: inline-block; width: 28px; height: 14px; vertical-align: -2px;
  margin-right: .35rem; }
figure details { margin-top: auto; padding-top: .4rem; font-size: .88rem; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .2rem .8rem;
  font-size: .88rem; margin: .4rem 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 47rem) { figure.single { flex: 1 1 100%; } }
@media (max-width: 30rem) {
  .headline, .recommendation p:first-child { font-size: 1.12rem; }
  .recommendation { font-size: 1rem; }
  dl { grid-template-columns: minmax(0, 1fr); } dl dl { padding-left: .8rem; } }
@media print {
  @page { margin: 12mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  .skip { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h1, h2, h3, h4 { break-after: avoid; }
  .plot, .legend, tr, p, li { break-inside: avoid; }
  .scroll, .plot { overflow: visible; }
  .figures, figure { display: block; }
  figure { margin-bottom: 1rem; }
  .plot > .panels { min-width: 0 !important; }
  .panels svg { max-width: 100% !important; min-width: 0 !important; }
  .panels svg, .panels > * { break-inside: avoid; }
  table { font-size: 7.5pt; } th, td { white-space: normal; padding: .15rem .3rem;
    overflow-wrap: anywhere; }
  details::details-content { display: block; content-visibility: visible; height: auto; }
}
"""


def escape(value: Any) -> str:
    """Returns a value as text of HTML."""
    return html.escape(str(value))


def scroll_area(content: str, label: str) -> str:
    """Returns an area that scrolls by itself, also with the keyboard."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"{content}</div>"
    )


def table_html(
    columns: Sequence[str],
    groups: Mapping[str, Iterable[Sequence[str]]],
    *,
    text_columns: Sequence[str] = (),
    label: str,
) -> str:
    """Returns a table in an area that scrolls.

    Args:
      columns: headings.
      groups: rows under a heading of their own each; under the heading "" without one.
      text_columns: headings of columns that stand left; the first one does anyway.
      label: names the area.
    """
    kinds = [
        "text" if not place or name in text_columns else "number"
        for place, name in enumerate(columns)
    ]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>'
        for kind, name in zip(kinds, columns, strict=True)
    )
    bodies = []
    for heading, rows in groups.items():
        lines = []
        if heading:
            lines.append(
                f'<tr><th scope="rowgroup" class="text" colspan="{len(columns)}">'
                f"{escape(heading)}</th></tr>"
            )
        for row in rows:
            cells = zip(kinds, row, strict=True)
            lines.append(
                "<tr>"
                + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in cells)
                + "</tr>"
            )
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    return scroll_area(
        f"<table><thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "</table>", label
    )


def figure_html(figure: Figure) -> str:
    """Returns a figure: title, panels, legend, caption, and its numbers to be unfolded."""
    is_wide = figure.panel_width > _NARROW_PIXELS
    kind = "single" if len(figure.panels) == 1 and not is_wide else "several"
    focus = (
        f' tabindex="0" role="region" aria-label="{escape(figure.title)}, scrolls"'
        if is_wide
        else ""
    )
    # A wide panel keeps its size and scrolls; others share the width.
    width = f"{figure.panel_width}px"
    most = figure.panel_width if is_wide else round(1.15 * figure.panel_width)
    style = f"--width: {width}; --most: {most}px" + (f"; min-width: {width}" if is_wide else "")
    legend = "".join(f"<li>{swatch(entry)}{escape(entry.label)}</li>" for entry in figure.legend)
    numbers = table_html(
        figure.table.columns,
        {"": figure.table.rows},
        label=f"{figure.title}: numbers",
    )
    return (
        f'<figure id="{figure.key}" class="{kind}">'
        f"<h3>{escape(figure.title)}</h3>"
        f'<div class="plot"{focus}><div class="panels" style="{style}">'
        f"{''.join(figure.panels)}</div></div>"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f"<figcaption>{escape(figure.caption)}</figcaption>"
        f"<details><summary>Numbers of this figure</summary>{numbers}</details></figure>"
    )


def sections_html(figures: Sequence[Figure], notes: Mapping[str, Sequence[str]]) -> str:
    """Returns the figures under their headings, each heading followed by its notes.

    Args:
      figures: in the order of the page.
      notes: by section, sentences about what is left out of it.
    """
    parts = []
    for section in dict.fromkeys([*(figure.section for figure in figures), *notes]):
        drawn = "\n".join(figure_html(figure) for figure in figures if figure.section == section)
        said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes.get(section, ()))
        content = f'\n<div class="figures">{drawn}</div>' if drawn else ""
        parts.append(f"<h2>{escape(section)}</h2>{said}{content}")
    return "\n".join(parts)


def nested_html(values: Any) -> str:
    """Returns nested settings as definition lists."""
    if isinstance(values, Mapping):
        items = "".join(
            f"<dt>{escape(key)}</dt><dd>{nested_html(value)}</dd>" for key, value in values.items()
        )
        return f"<dl>{items}</dl>" if items else "–"
    if isinstance(values, list | tuple):
        return ", ".join(nested_html(value) for value in values) or "–"
    return escape(values)


def document(title: str, body: str) -> str:
    """Returns a self-contained page: nothing is fetched, no script runs."""
    title = escape(title)
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
<a class="skip" href="#content">Skip to the findings</a>
<header><h1>{title}</h1></header>
<main id="content" tabindex="-1">
{body}
</main>
</body>
</html>
"""
