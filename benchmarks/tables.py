"""Prints the tables of docs/performance.md from the records, so that no figure is typed.

python benchmarks/tables.py benchmarks/results/moe_layer_h200.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parts(results: list[dict[str, Any]]) -> str:
    def cell(part: dict[str, Any]) -> str:
        rate = part.get("tflops_per_second")
        return f"{part['milliseconds']['median']:.3f}" + (f" ({rate:.0f} TFLOP/s)" if rate else "")

    header = ["part, ms", *(f"{result['num_experts']} experts" for result in results)]
    rows = [
        [name.replace("_", " "), *(cell(result["parts"][name]) for result in results)]
        for name in results[0]["parts"]
    ]
    return table(header, rows)


def moe_layer(record: dict[str, Any]) -> str:
    results = record["results"]
    if "parts" in results[0]:
        return parts(results)
    names = list(dict.fromkeys(name for result in results for name in result["forward"]))
    header = ["fraction of the dense network's speed, forward / with gradients"]
    header += [f"{result['num_experts']} experts" for result in results]

    def cell(result: dict[str, Any], name: str) -> str:
        if name not in result["forward"]:
            return "-"
        values = [
            result[part][name]["dense_over_this"]["median"]
            for part in ("forward", "forward_backward")
        ]
        return " / ".join(f"{value:.2f}" for value in values)

    rows = [[name, *(cell(result, name) for result in results)] for name in names]
    loads = [
        f"{result['num_experts']} experts: largest load {result['loads']['largest_over_mean']} of "
        f"the mean ({result['loads']['largest_over_mean_skewed']} skewed), "
        f"{100 * result['loads']['dropped_at_capacity']:.1f} % dropped at capacity factor "
        f"{record['layer']['capacity_factor']}"
        for result in results
    ]
    return "\n\n".join([table(header, rows), "; ".join(loads) + "."])


def train_step(record: dict[str, Any]) -> str:
    rows = [
        [
            name.replace("_", " "),
            f"{result['parameters'] / 1e6:.0f}M",
            f"{1e3 * result['seconds_per_step']['median']:.1f} ms",
            f"{result['tokens_per_second']:,}",
            "-" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %",
        ]
        for name, result in record["results"].items()
    ]
    return table(["model", "parameters", "step", "tokens/s", "MFU"], rows)


def decode(record: dict[str, Any]) -> str:
    rows = [
        [
            result["model"].replace("_", " "),
            str(result["batch_size"]),
            f"{result['milliseconds_per_step']['median']:.2f} ms",
            f"{result['tokens_per_second']:,}",
            f"{result['over_dense']['median']:.2f}" if "over_dense" in result else "-",
        ]
        for result in record["results"]
    ]
    return table(["model", "batch", "step", "tokens/s", "time over dense"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    for path in parser.parse_args().records:
        record = json.loads(path.read_text())
        show = next(f for f in (moe_layer, train_step, decode) if f.__name__ in record["command"])
        print(f"{path.name}: {record['backend']}, jax {record['versions']['jax']}\n")
        print(show(record) + "\n")


if __name__ == "__main__":
    main()
