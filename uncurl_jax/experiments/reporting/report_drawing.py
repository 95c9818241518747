"""What the figures of a report share: colours that follow the page, sizes, SVG, legends, numbers.

matplotlib writes SVG that needs no script and no network, which is why a report uses it. A panel
is drawn at the size it has on the narrowest page, so that its text is never below 10 CSS pixels.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

# Stand-ins that no figure uses otherwise; the page's variables take their place in the SVG, so
# that figures follow its light or dark scheme.
INK, SOFT, LINE, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "v", "P", "X")
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--c{place})" for place, colour in enumerate(COLOURS)},
}
PIXELS_PER_INCH = 96
# A panel that a page of 390 pixels holds whole, and one of which it holds two side by side.
PANEL_INCHES, SMALL_PANEL_INCHES = 3.4, 1.62
# 10.1 CSS pixels at natural size, the least that text may have.
SMALL_POINTS = 7.6

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "uncurl_jax",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
# Shapes of legend swatches, around (0, 0).
_SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4L4.2 3.4H-4.2z",
    "v": "M0 4.4L4.2-3.4H-4.2z",
    "P": "M-1.5-4.2h3v2.7h2.7v3h-2.7v2.7h-3v-2.7h-2.7v-3h2.7z",
    "X": "M-4-2.2l1.8-1.8l2.2 2.2l2.2-2.2l1.8 1.8l-2.2 2.2l2.2 2.2l-1.8 1.8l-2.2-2.2l-2.2 2.2"
    "l-1.8-1.8l2.2-2.2z",
    "D": "M0-4.8L4.8 0L0 4.8L-4.8 0z",
    "block": "M-7-5h14v10h-14z",
    "ring": "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z",
}


class Entry(NamedTuple):
    """A line of a legend.

    Attributes:
      label: what it says.
      colour: of the swatch: one of this module's, or of CSS.
      marker: a marker of matplotlib, "block", "ring" or "".
      line: dashes of SVG, "" for a solid line, None for no line.
      is_hollow: whether the marker is not filled.
    """

    label: str
    colour: str
    marker: str = ""
    line: str | None = None
    is_hollow: bool = False


class Table(NamedTuple):
    """The numbers of a figure; the first column names the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Figure(NamedTuple):
    """A drawn figure.

    Attributes:
      section: heading on the page that it stands under.
      key: names it on the page; letters, digits and dashes.
      title: a few words.
      caption: what is to be seen and how to read it.
      panels: <svg> elements.
      panel_width: CSS pixels that a panel needs for its text to be readable.
      table: its numbers.
      legend: of all panels.
    """

    section: str
    key: str
    title: str
    caption: str
    panels: tuple[str, ...]
    panel_width: int
    table: Table
    legend: tuple[Entry, ...] = ()


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Draws in the report's style, whatever the user's matplotlibrc says."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        yield


def new_canvas(height: float, width: float = PANEL_INCHES) -> Canvas:
    """Returns an empty panel of that many inches."""
    return Canvas(figsize=(width, height), layout="constrained")


def key_of(*words: str) -> str:
    """Returns a key of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def render_panel(canvas: Canvas, label: str, key: str) -> str:
    """Returns one inline <svg> element that takes its colours from the page.

    Args:
      canvas: what was drawn.
      label: for those who do not see it.
      key: of this panel alone; ids in the SVG begin with it.
    """
    FigureCanvasSVG(canvas)
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = inline_svg(buffer.getvalue(), label)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    for place, name in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', text))):
        text = re.sub(rf'(id="|#){re.escape(name)}(?=["\)])', rf"\g<1>{key}-{place}", text)
    return re.sub(r' d="([^"]*)"', lambda found: f' d="{_compact(found[1])}"', text)


def inline_svg(text: str, label: str) -> str:
    """Turns what matplotlib writes into an <svg> element that can stand in a page.

    Args:
      text: an SVG file.
      label: for those who do not see it.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' role="img" aria-label="[^"]*"', "", text, count=1)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", text, count=1)
    text = re.sub(r' height="[^"]*pt"| width="[^"]*pt"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    label = html.escape(label, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _compact(path: str) -> str:
    """Rounds a path's numbers to hundredths and shortens its horizontal and vertical lines."""
    words = path.split()
    shorter: list[str] = []
    place, command, at = 0, "", ("", "")
    while place < len(words):
        if words[place].isalpha():
            command = words[place]
            place += 1
            if command in "zZ":
                shorter.append(command)
            continue
        count = {"C": 6, "Q": 4}.get(command, 2)
        numbers = [f"{float(word):.2f}" for word in words[place : place + count]]
        numbers = [number.rstrip("0").rstrip(".") for number in numbers]
        place += count
        end = (numbers[-2], numbers[-1])
        if command == "L" and end[1] == at[1]:
            shorter.append(f"H{end[0]}")
        elif command == "L" and end[0] == at[0]:
            shorter.append(f"V{end[1]}")
        else:
            shorter.append(command + " ".join(numbers))
        at = end
    return "".join(shorter)


def swatch(entry: Entry) -> str:
    """Returns the small picture of a legend's line."""
    colour = _VARIABLES.get(entry.colour, entry.colour)
    parts = []
    if entry.line is not None:
        dashes = f' stroke-dasharray="{entry.line}"' if entry.line else ""
        parts.append(f'<path d="M-13 0H13" stroke="{colour}" stroke-width="2"{dashes}/>')
    if entry.marker:
        fill = "var(--paper)" if entry.is_hollow and entry.marker != "ring" else colour
        if entry.marker == "ring":
            fill = "none"
        stroke = f' stroke="{colour}" stroke-width="1.5"' if entry.is_hollow else ""
        parts.append(f'<path d="{_SHAPES[entry.marker]}" fill="{fill}"{stroke}/>')
    return f'<svg viewBox="-14 -7 28 14" aria-hidden="true">{"".join(parts)}</svg>'


def pad_limits(values: Sequence[float], *, share: float = 0.08, least: float = 0.5) -> Any:
    """Returns the limits of an axis that leave some room around the values."""
    low, high = min(values), max(values)
    room = max(share * (high - low), least)
    return low - room, high + room
