"""Writes what a study measured as one JSON: settings, versions, device, every score and interval.

    python benchmarks/study_record.py STUDY --command "uncurl sweep ..." --note "..." --out R.json

Runs nothing itself; takes the study's own records (runs.jsonl, study.json) and what its report says
(report.json: write it first). Paths are cut to names; no text of a data set is taken along.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import environment

from uncurl_jax.artifacts import read_json, read_json_lines, refuse_existing, write_json
from uncurl_jax.experiments.evidence.study_records import load_study

_KEPT = (
    "run",
    "score",
    "interval",
    "metrics",
    "num_examples",
    "zero_shot",
    "fraction_tokens_left_behind",
    "seconds",
)


def main() -> None:
    """Parses the command line and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--command", required=True, help="what made the study")
    parser.add_argument("--note", action="append", default=[], help="a sentence about it")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    out = refuse_existing(arguments.out)
    runs, study = load_study(arguments.study)
    report = read_json(arguments.study / "report.json")
    rows = [{k: v for k, v in row.items() if k != "plans"} for row in report["rows"]]
    parts = sorted({path.parent for path in arguments.study.glob("**/runs.jsonl")})
    stages: dict[str, dict[str, Any]] = {}
    for part in parts:
        for line in read_json_lines(part / "runs.jsonl"):
            total = stages.setdefault(line["stage"], {"number": 0, "tokens": 0, "seconds": 0.0})
            total["number"] += 1
            total["tokens"] += line["tokens"]
            total["seconds"] = round(total["seconds"] + line["seconds"], 3)
    record = {
        "command": arguments.command,
        "title": study["title"],
        "notes": arguments.note,
        "device": environment.describe(())["device"],
        "versions": study["versions"],
        "settings": _without_paths(study["config"]),
        "headline": report["headline"],
        "findings": report["findings"],
        "multiple_comparisons": report["multiple_comparisons"],
        "effects": report["effects"],
        "stages": stages,
        "rows": rows,
        "runs": [{name: run[name] for name in _KEPT if name in run} for run in runs],
    }
    write_json(out, record)
    print(json.dumps({"out": str(out), "runs": len(runs)}))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    main()
