"""Prints the tables of several devices in docs/performance.md from the records of uncurl bench.

python benchmarks/multi_tables.py benchmarks/results/multi

The planner's estimates stand beside what was measured: once with the data sheet's numbers and a
microsecond of latency, and once with those of configs/hosts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tables import table

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import costs, layouts
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.slices import Slice, load_slice

HOSTS = Path(__file__).resolve().parents[1] / "configs" / "hosts"
# Per direction 450 GB/s of NVLink, 3.35 TB/s, 989 TFLOP/s: NVIDIA's data sheet of the H100 SXM.
DATA_SHEET = {
    "hbm_bytes_per_second_per_chip": 3.35e12,
    "peak_bf16_flops_per_second_per_chip": 989e12,
    "interconnect_bytes_per_second_per_chip": 900e9,
    "ici_hop_seconds": 1e-6,
    "step_seconds": 0.0,
    "block_seconds": 0.0,
    "expert_block_seconds": 0.0,
}
# arXiv 2409.01483, Figures 4 and 5: 8 A10 GPUs, expert parallelism 2.
PAPER_FORWARD = {0: 21, 8: 40, 32: 51, 64: 102, 128: 174}
PAPER_LAYER = {8: (1.9, 0.69), 128: (6.6, 0.69)}


class Cell(NamedTuple):
    """One measurement of a record."""

    model: ModelConfig
    name: str
    experts: int
    values: dict[str, Any]
    file: str

    @property
    def layout(self) -> str:
        return self.values["layout"]


def read_cells(directory: Path) -> Iterator[Cell]:
    for path in sorted(directory.glob("bench_*.json")):
        record = json.loads(path.read_text())
        models = {model["name"]: model for model in record["models"]}
        placement = record["settings"]["placement"] or {}
        for values in record["cells"]:
            model = models[values["model"]]
            experts = max(model["num_experts"], default=0)
            axes = {"expert_axes": placement.get("expert_axes")}
            config = ModelConfig.from_dict(model["config"])
            yield Cell(config, model["backbone"], experts, {**values, **axes}, path.stem)


def milliseconds(timing: dict[str, Any] | None, digits: int = 2) -> str:
    if timing is None:
        return "-"
    low, high = (1e3 * end for end in timing["interval"])
    middle = f"{1e3 * timing['seconds']:.{digits}f}"
    return f"{middle} ({low:.{digits}f} to {high:.{digits}f})"


def found(cells: list[Cell], experts: int, devices: int, layout: str) -> Cell | None:
    return next(
        (
            cell
            for cell in cells
            if (cell.experts, cell.values["devices"], cell.layout) == (experts, devices, layout)
        ),
        None,
    )


def forward_table(cells: list[Cell]) -> str:
    header = ["experts", "1 GPU", "2, sharded", "2, replicated", "weak scaling", "the paper's"]
    rows = []
    for experts in sorted({cell.experts for cell in cells}):
        one = found(cells, experts, 1, "single")
        several = [found(cells, experts, 2, name) for name in ("sharded", "replicated")]
        times = [cell.values["forward"]["seconds"] for cell in several if cell]
        paper = PAPER_FORWARD.get(experts) if cells[0].name == "354M" else None
        rows.append(
            [
                str(experts) if experts else "dense",
                *(
                    milliseconds(cell.values["forward"]) if cell else "-"
                    for cell in (one, *several)
                ),
                f"{one.values['forward']['seconds'] / min(times):.2f}" if one and times else "-",
                f"{paper} ms" if paper else "-",
            ]
        )
    return table(header, rows)


def layer_table(cells: list[Cell]) -> str:
    header = ["experts", "all-to-all", "experts", "layer, sharded", "layer, replicated"]
    header += ["the paper's all-to-all, experts"]
    rows = []
    for experts in sorted({cell.experts for cell in cells} - {0}):
        pair = [found(cells, experts, 2, name) for name in ("sharded", "replicated")]
        parts = [cell.values["moe_layers"][0] if cell else None for cell in pair]
        paper = PAPER_LAYER.get(experts) if cells[0].name == "124M" else None
        divided, whole = parts
        rows.append(
            [
                str(experts),
                milliseconds(divided["communication"], 3) if divided else "-",
                milliseconds(divided["experts"], 3) if divided else "-",
                milliseconds(divided["layer"], 3) if divided else "-",
                milliseconds(whole["layer"], 3) if whole else "-",
                f"{paper[0]}, {paper[1]} ms" if paper else "-",
            ]
        )
    return table(header, rows)


def gains_table(of_sizes: dict[str, list[Cell]]) -> str:
    """How many times as fast as 128 sharded experts, and what of it is placement."""
    header = ["experts"]
    for size in of_sizes:
        header += [f"{size} sharded", f"{size} replicated", "of which placement"]
    rows = []
    for experts in (128, 64, 32, 8, 0):
        row = [str(experts) if experts else "dense"]
        for cells in of_sizes.values():
            places = ((128, "sharded"), (experts, "sharded"), (experts, "replicated"))
            base, divided, whole = (
                None if cell is None else cell.values["forward"]["seconds"]
                for cell in (found(cells, count, 2, layout) for count, layout in places)
            )
            pairs = ((base, divided), (base, whole), (divided, whole))
            row += [f"{slow / fast:.2f}" if slow and fast else "-" for slow, fast in pairs]
        rows.append(row)
    return table(header, rows)


def estimate(cell: Cell, job: Job, slice_: Slice) -> float:
    """Seconds by the planner for the very layout that was measured."""
    mesh = MeshShape(*(cell.values["mesh"][axis] for axis in ("data", "expert", "model")))
    request = layouts.Request(model=cell.model, job=job, slice=slice_)

    def axes(layer: int) -> tuple[str, ...]:
        if cell.layout == "placement":
            return tuple(cell.values["expert_axes"][layer])
        return ("expert",) if cell.layout == "sharded" else ()

    parts = [
        costs.rest_cost(cell.model, mesh, job),
        *(
            costs.expert_cost(cell.model, layer, mesh, axes(layer), job).cost
            for layer in cell.model.moe_layers
        ),
    ]
    return sum(layouts.estimate_times(request, mesh, part).total for part in parts)


def all_logits(cell: Cell, slice_: Slice) -> float:
    """The planner counts one place of each row; a benchmark's forward pass computes them all."""
    values = cell.values
    places = (values["tokens"] - values["batch"]) / values["devices"]
    flops = 2 * places * cell.model.embed_dim * cell.model.vocab_size
    return flops / slice_.peak_bf16_flops_per_second_per_chip


class Program(NamedTuple):
    """A measured program with the planner's job for it."""

    name: str
    seconds: float
    job: Job
    extra: Callable[[Cell, Slice], float]


def programs(cell: Cell) -> Iterator[Program]:
    values, cache = cell.values, cell.model.max_length
    batch, length = values["batch"], values["length"]
    if values["forward"]:
        job = Job("serve", batch, length)
        yield Program("forward", values["forward"]["seconds"], job, all_logits)
    if values["prefill"]:
        job = Job("serve", batch, length, cache_length=cache)
        yield Program("prefill", values["prefill"]["seconds"], job, lambda *_: 0.0)
    for step in values["decode"]:
        job = Job("serve", step["rows"], 1, cache_length=cache)
        yield Program(f"decode {step['batch']}", step["seconds"], job, lambda *_: 0.0)
    if values["training"]:
        job = Job("train", batch, length, "float32")
        yield Program("training", values["training"]["seconds"], job, lambda *_: 0.0)


def planner_table(cells: list[Cell], slice_: Slice, wanted: Callable[[str], bool]) -> str:
    sheet = dataclasses.replace(slice_, **DATA_SHEET)
    header = ["model", "GPUs", "layout", "program", "measured"]
    header += ["by the data sheet (ratio)", "by configs/hosts (ratio)"]
    rows = []
    for cell in cells:
        for program in programs(cell):
            if not wanted(program.name):
                continue
            guesses = [
                estimate(cell, program.job, of) + program.extra(cell, of) for of in (sheet, slice_)
            ]
            rows.append(
                [
                    f"{cell.values['model']}",
                    str(cell.values["devices"]),
                    cell.layout,
                    program.name,
                    f"{1e3 * program.seconds:.2f} ms",
                    *(f"{1e3 * g:.2f} ({g / program.seconds:.2f})" for g in guesses),
                ]
            )
    return table(header, rows)


def serving_table(cells: list[Cell]) -> str:
    header = ["model", "GPUs", "layout", "prefill", "prefill tokens/s"]
    header += ["decoding 1 row", "decoding 64 rows", "tokens/s of 64"]
    rows = []
    for cell in cells:
        values = cell.values
        if not values["prefill"]:
            continue
        steps = {step["batch"]: step for step in values["decode"]}
        rows.append(
            [
                values["model"],
                str(values["devices"]),
                cell.layout,
                milliseconds(values["prefill"]),
                f"{values['prefill']['tokens_per_second']:,.0f}",
                milliseconds(steps.get(1)),
                milliseconds(steps.get(64)),
                f"{steps[64]['tokens_per_second']:,.0f}" if 64 in steps else "-",
            ]
        )
    return table(header, rows)


def training_table(cells: list[Cell]) -> str:
    rows = [
        [
            cell.values["model"],
            str(cell.values["devices"]),
            cell.layout,
            milliseconds(cell.values["training"], 1),
            f"{cell.values['training']['tokens_per_second']:,.0f}",
            f"{100 * cell.values['training']['mfu']:.1f} %",
        ]
        for cell in cells
        if cell.values["training"] and cell.values["training"]["status"] == "measured"
    ]
    return table(["model", "GPUs", "layout", "step", "tokens/s", "MFU"], rows)


def checks_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        sent, equality = cell.values["communication"], cell.values["equality"]
        if sent is None or equality is None:
            continue
        rows.append(
            [
                cell.file,
                cell.values["model"],
                cell.layout,
                f"{sent['expected_bytes_per_device']:,}",
                f"{sent['compiled_bytes_per_device']:,}",
                f"{equality['largest_relative_error']:.4f}",
                f"{100 * equality['share_within_tolerance']:.1f} %",
                "yes" if equality["is_equal"] else "no",
            ]
        )
    header = ["record", "model", "layout", "bytes by arithmetic", "compiled"]
    return table([*header, "largest error", "tokens within 2e-2", "as one device"], rows)


def rates_table(record: dict[str, Any]) -> str:
    names = list(record["collectives"])
    sizes = [row["payload_bytes"] for row in record["collectives"][names[0]]]
    rows = [
        [
            f"{size / 1024:,.0f} KiB",
            *(f"{1e6 * record['collectives'][name][place]['seconds']:.0f}" for name in names),
        ]
        for place, size in enumerate(sizes)
    ]
    rates = "; ".join(
        f"{name.replace('_', ' ')}: {1e6 * fit['latency_seconds']:.0f} microseconds and "
        f"{fit['bytes_per_second_one_way'] / 1e9:.0f} GB/s (off by {fit['largest_deviation']:+.0%} "
        "at most between)"
        for name, fit in record["fits"].items()
    )
    return (
        table(["payload, microseconds", *(name.replace("_", " ") for name in names)], rows)
        + f"\n\n{rates}. Product {record['product']['flops_per_second'] / 1e12:.0f} TFLOP/s, copy "
        f"{record['copy']['bytes_per_second'] / 1e12:.2f} TB/s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="h100-2", help="of configs/hosts")
    args = parser.parse_args()
    host = load_slice(args.host, HOSTS)
    cells = list(read_cells(args.directory))
    measured = [cell for cell in cells if cell.values["status"] == "measured"]

    def of(stem: str) -> list[Cell]:
        return [cell for cell in measured if cell.file == stem]

    sections, forward = {}, {}
    for size in ("354m", "124m"):
        own = of(f"bench_forward_{size}")
        if not found(own, 128, 2, "sharded"):
            missing = of(f"bench_forward_{size}_7_rounds")
            own += [c for c in missing if c.experts == 128 and c.values["devices"] == 2]
        sections[f"Forward pass, {size}, ms"] = forward_table(own)
        forward[size] = own
        sections[f"One layer, {size}, ms"] = layer_table(own)
    sections["Times as fast as 128 sharded experts"] = gains_table(forward)
    estimated = of("bench_forward_354m") + of("bench_forward_124m")
    served = of("bench_serve_354m_8") + of("bench_serve_354m_32")
    sections["The planner, forward"] = planner_table(
        estimated, host, lambda name: name == "forward"
    )
    sections["The planner, other programs"] = planner_table(
        served + of("bench_training_354m"), host, lambda name: True
    )
    sections["Serving"] = serving_table(of("bench_forward_354m") + served)
    sections["Training"] = training_table(measured)
    sections["Checks"] = checks_table(measured)
    rates = json.loads((args.directory / "device_rates.json").read_text())
    sections["Rates"] = rates_table(rates)
    for title, text in sections.items():
        print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main()
