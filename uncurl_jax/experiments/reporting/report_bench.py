"""The section of a report that shows benchmarks: records of `uncurl bench` in the directory."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.reporting.report_drawing import inline_svg
from uncurl_jax.experiments.reporting.report_html import table_html

SCHEMA = "uncurl_jax.bench/1"
_FAMILY = SCHEMA.partition("/")[0]
_REQUIRED = (
    *("device", "versions", "settings", "models", "cells"),
    *("is_functional_only", "note", "weak_scaling", "speedups", "pictures"),
)
COLUMNS = (
    "model",
    "devices",
    "layout of experts",
    "forward, ms",
    "interval",
    "all-to-all, ms",
    "experts, ms",
    "tokens/s",
    "prefill tokens/s",
    "decode tokens/s",
    "training tokens/s",
    "MFU, %",
    "MiB sent",
    "as one device",
)
_TEXT_COLUMNS = ("model", "layout of experts", "as one device")
_READING = (
    "Forward is the pass over all rows with logits of every token; its interval is that of the "
    "median, 95 % or as near as the samples allow.",
    "All-to-all and experts are sums over the MoE layers of what these parts take alone; a device "
    "may overlap them.",
    "MiB sent: by one device in one forward pass to carry tokens to experts and back, counted in "
    "the compiled program; with an asterisk where that is not what the layout's arithmetic gives.",
    "As one device: whether the logits on several devices are those of one.",
)


class Bench(NamedTuple):
    """A record and where it lies, relative to the report."""

    file: str
    record: dict[str, Any]


def load_benches(directory: Path) -> list[Bench]:
    """Reads the records called bench*.json in a directory and those directly inside it.

    Raises:
      InputError: If one is of another version.
    """
    found = []
    for path in sorted([*directory.glob("bench*.json"), *directory.glob("*/bench*.json")]):
        record = artifacts.read_json(path)
        schema = record.get("schema") if isinstance(record, dict) else None
        if not isinstance(schema, str) or schema.partition("/")[0] != _FAMILY:
            continue
        if schema != SCHEMA:
            raise InputError(
                f'A benchmark\'s record must have the schema "{SCHEMA}", got "{schema}" in {path}: '
                "measure it again with this version, or move the file."
            )
        missing = [name for name in _REQUIRED if name not in record]
        if missing:
            raise InputError(
                f"A benchmark's record must hold {', '.join(_REQUIRED)}, got {path} without "
                f"{missing[0]}: measure it again, or move the file."
            )
        found.append(Bench(path.relative_to(directory).as_posix(), record))
    return found


def where(record: Mapping[str, Any]) -> str:
    """Names the devices of a record."""
    device = record["device"]
    if record["is_functional_only"]:
        return f"{device['count']} host devices of one CPU"
    return f"{device['count']} x {device['kind']}"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Says in words what matters most in a record."""
    measured = [cell for cell in record["cells"] if cell["status"] == "measured"]
    said = [record["note"]] if record["note"] else []
    if record.get("unmeasured"):
        said.append(f"The benchmark was cut short; cells that are missing: {record['unmeasured']}.")
    lost = len(record["cells"]) - len(measured)
    if lost:
        said.append(f"{lost} of {len(record['cells'])} did not fit into the devices' memory.")
    timed = [cell for cell in measured if cell["forward"]]
    if not timed:
        return said
    count = max(cell["devices"] for cell in timed)
    best: dict[str, Mapping[str, Any]] = {}
    for entry in record["speedups"]:
        against = entry["against"]["model"]
        is_better = against not in best or entry["forward"] > best[against]["forward"]
        if entry["devices"] == count and is_better:
            best[against] = entry
    for entry in best.values():
        own, base = (
            next(
                cell
                for cell in timed
                if (cell["model"], cell["layout"], cell["devices"])
                == (which["model"], which["layout"], count)
            )
            for which in (entry, entry["against"])
        )
        text = f"{_named(base)} takes {_ms(base['forward'])} ms for a forward pass"
        if own is not base:
            text += (
                f", {_named(own)} {_ms(own['forward'])} ms: {entry['forward']:.3g} times as fast"
            )
        said.append(f"On {count} devices, {text}.")
    checks = [cell["equality"]["is_equal"] for cell in measured if cell["equality"]]
    wrong = sum(is_equal is False for is_equal in checks)
    if checks:
        said.append(
            "Every layout that was compared gives the logits of one device."
            if not wrong
            else f"{wrong} of {len(checks)} layouts do not give the logits of one device."
        )
    return said


def _named(cell: Mapping[str, Any]) -> str:
    return f"{cell['model']} ({cell['layout']})"


def _ms(timing: Mapping[str, Any]) -> str:
    return f"{1e3 * timing['seconds']:.3g}"


def cells(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the table cells of one measurement, in the order of COLUMNS."""
    place = (cell["model"], str(cell["devices"]), cell["layout"])
    if cell["status"] != "measured":
        return (*place, "out of memory", *("–",) * (len(COLUMNS) - len(place) - 1))
    forward, split, sent = cell["forward"], cell["split"], cell["communication"]
    training = cell.get("training")
    if training is not None and training["status"] != "measured":
        training = None
    equality = cell["equality"]
    interval = "–"
    if forward:
        low, high = (1e3 * end for end in forward["interval"])
        interval = f"{low:.3g} to {high:.3g}"
    is_equal = None if equality is None else equality["is_equal"]
    return (
        *place,
        _ms(forward) if forward else "–",
        interval,
        f"{1e3 * split['communication_seconds']:.3g}" if split else "–",
        f"{1e3 * split['experts_seconds']:.3g}" if split else "–",
        _rate(forward),
        _rate(cell["prefill"]),
        ", ".join(f"{_rate(step)} ({step['batch']})" for step in cell["decode"]) or "–",
        _rate(training),
        "–" if training is None or training["mfu"] is None else f"{100 * training['mfu']:.1f}",
        "–"
        if sent is None
        else f"{sent['compiled_bytes_per_device'] / 2**20:.3g}{'' if sent['is_equal'] else '*'}",
        {None: "–", True: "yes", False: "no"}[is_equal],
    )


def _rate(timing: Mapping[str, Any] | None) -> str:
    return "–" if timing is None else f"{timing['tokens_per_second']:,.0f}"


def describe(benches: Sequence[Bench]) -> list[dict[str, Any]]:
    """Returns what report.json holds of them."""
    return [
        {
            "file": bench.file,
            "device": where(bench.record),
            "is_functional_only": bench.record["is_functional_only"],
            "sentences": sentences(bench.record),
            "columns": list(COLUMNS),
            "rows": [list(cells(cell)) for cell in bench.record["cells"]],
            "weak_scaling": bench.record["weak_scaling"],
            "speedups": bench.record["speedups"],
        }
        for bench in benches
    ]


def headline(benches: Sequence[Bench]) -> str:
    """Returns one sentence for a report that has benchmarks and no study."""
    said = []
    for bench in benches:
        suffix = " (functional, not performance)" if bench.record["is_functional_only"] else ""
        told = [text for text in sentences(bench.record) if text != bench.record["note"]]
        said.append(f"{where(bench.record)}{suffix}: {told[0] if told else 'nothing was timed.'}")
    return " ".join(said)


def render_section(benches: Sequence[Bench], directory: Path) -> str:
    """Returns the section as HTML, "" if there are no benchmarks; pictures become part of it."""
    if not benches:
        return ""
    reading = "".join(f"<li>{html.escape(text)}</li>" for text in _READING)
    return (
        "<h2>Latency and communication</h2>\n"
        + "\n".join(_render(bench, directory) for bench in benches)
        + f"\n<ul>{reading}</ul>"
    )


def _render(bench: Bench, directory: Path) -> str:
    record = bench.record
    said = "".join(f"<li>{html.escape(text)}</li>" for text in sentences(record))
    table = table_html(
        COLUMNS,
        {"": [cells(cell) for cell in record["cells"]]},
        text_columns=_TEXT_COLUMNS,
        label=f"Measurements on {where(record)}",
    )
    return (
        f"<h3>{html.escape(where(record))}</h3><ul>{said}</ul>\n"
        f"{table}\n"
        f'<p class="note">{html.escape(bench.file)}; {html.escape(_setting(record))}</p>\n'
        f'<div class="figures">{_pictures(bench, directory)}</div>'
    )


def _setting(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    random = any(model["parameters_from"] == "random" for model in record["models"])
    return (
        f"{settings['batch_per_device']} rows of {settings['length']} tokens on each device, "
        f"{settings['repeats']} rounds{', random parameters' if random else ''}, "
        f"jax {record['versions']['jax']}."
    )


def _pictures(bench: Bench, directory: Path) -> str:
    figures = []
    for picture in bench.record["pictures"]:
        # By its last part alone: a record names files beside it, and no others are read.
        path = (directory / bench.file).with_name(Path(picture["svg"]).name)
        if path.is_file():
            svg = inline_svg(path.read_text(encoding="utf-8"), picture["alt"])
            caption = html.escape(picture["title"])
            figures.append(
                f'<figure class="several"><h4>{caption}</h4>'
                f'<div class="plot" tabindex="0" role="region" aria-label="{caption}, scrolls">'
                f'<div style="min-width: {_natural_pixels(svg)}px">{svg}</div></div></figure>'
            )
    return "\n".join(figures)


def _natural_pixels(svg: str) -> int:
    """Width at which an SVG's text has the size that it was drawn with: 96 pixels an inch."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    return round(float(found[1]) * 96 / 72) if found else 0
