"""The effects of pruning as a table like the paper's Table 2, with intervals, and the paper's own.

An effect is pruned minus the other model, in points: against the model of equal size from scratch,
and against the unpruned one. It is (+) or (-) only where its 95 % interval excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax.experiments.evidence.paper_numbers import paper_effects
from uncurl_jax.experiments.evidence.thresholds import DROP, GAP, IDENTITY

AGAINST = {"scratch": "equal size from scratch", "unpruned": "unpruned"}
_SIGNS = {"+": "(+)", "-": "(−)", "0": "(0)", None: "(?)"}
_NONE = "–"


def effect_table(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what report.json holds under "effects".

    Args:
      findings: as `thresholds.find_thresholds` returns them.

    Returns:
      `tasks` (columns, the mean last), `rows` with a cell or None for each task under "scratch" and
      "unpruned", and `paper`, the numbers of the paper. A cell's sign is None where there is one
      seed, whose interval says nothing about seeds.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for finding in findings:
        for candidate in finding["candidates"]:
            key = tuple(candidate[name] for name in IDENTITY)
            row = rows.setdefault(
                key,
                {
                    **{name: candidate[name] for name in IDENTITY},
                    "factor": candidate["factor"],
                    **{against: {} for against in AGAINST},
                },
            )
            row["scratch"][finding["task"]] = _cell(candidate[GAP], 1)
            row["unpruned"][finding["task"]] = _cell(candidate[DROP], -1)
    return {
        "tasks": [finding["task"] for finding in findings],
        "rows": list(rows.values()),
        "paper": paper_effects(),
    }


def _cell(comparison: Mapping[str, Any], turn: int) -> dict[str, Any] | None:
    if comparison.get("mean") is None:
        return None
    interval = comparison["interval"]
    sign = None
    if interval is not None:
        interval = sorted(turn * end for end in interval)
        if comparison["seeds"] > 1:
            sign = "+" if interval[0] > 0 else "-" if interval[1] < 0 else "0"
    return {
        "mean": turn * comparison["mean"],
        "interval": interval,
        "over": comparison["over"],
        "seeds": comparison["seeds"],
        "sign": sign,
    }


class EffectTable(NamedTuple):
    """A table for people.

    Attributes:
      title: what it shows.
      head: names of the columns.
      lines: rows of cells; none if there is nothing to compare with, which the title says.
      note: sentence below it.
    """

    title: str
    head: list[str]
    lines: list[list[str]]
    note: str = ""


def effect_tables(effects: Mapping[str, Any]) -> list[EffectTable]:
    """Returns the tables of a report: against each other model, then the paper's.

    Args:
      effects: as `effect_table` returns them.
    """
    tables = []
    for against, name in AGAINST.items():
        head = ["experts", "method", "router", *effects["tasks"]]
        lines = [[*_names(row), *_cells(row, against, effects["tasks"])] for row in effects["rows"]]
        if not any(cell != _NONE for line in lines for cell in line[3:]):
            title = f"Effect against {name}: there is no such model to compare with."
            tables.append(EffectTable(title, head, []))
            continue
        title = (
            f"Effect against {name}, points [95 % interval]; (+) or (−) where it excludes 0, (?) "
            "one seed"
        )
        tables.append(EffectTable(title, head, lines))
    paper = effects["paper"]
    columns = [*paper["tasks"], "mean"]
    lines = [
        [*_names(row), *(_points(row["scratch"][column]) for column in columns)]
        for row in paper["rows"]
    ]
    title = f"{paper['note']} Effect against {AGAINST['scratch']}, points"
    head = ["experts", "method", "router", *columns]
    return [*tables, EffectTable(title, head, lines, paper["source"])]


def format_effects(effects: Mapping[str, Any]) -> str:
    """Formats the effects for a terminal: a table against each, and the paper's below it.

    Args:
      effects: as `effect_table` returns them.
    """
    texts = []
    for table in effect_tables(effects):
        text = _table([table.head, *table.lines]) if table.lines else ""
        texts.append("\n".join(part for part in (table.title, text, table.note) if part))
    return "\n\n".join(texts)


def _names(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['source_num_experts']} → {row['num_experts']}", row["method"], row["router"]]


def _cells(row: Mapping[str, Any], against: str, tasks: Sequence[str]) -> list[str]:
    return [format_cell(row[against].get(task)) for task in tasks]


def format_cell(cell: Mapping[str, Any] | None) -> str:
    """Formats a cell of an effect table: effect, sign, interval."""
    if cell is None:
        return _NONE
    text = f"{_points(cell['mean'])} {_SIGNS[cell['sign']]}"
    if cell["interval"] is None:
        return text
    low, high = cell["interval"]
    return f"{text} [{_points(low)}, {_points(high)}]"


def _points(value: float) -> str:
    return f"{value + 0.0:+.2f}".replace("-", "−")


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in ruled
    )
