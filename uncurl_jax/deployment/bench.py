"""Measures models on the devices present: `uncurl bench`. One record, described in docs/bench.md.

Every model is measured on every number of devices. There its layouts, the whole steps, the parts of
a layer and a fixed reference product take turns in shuffled rounds (`timing`); models follow each
other, and the reference product tells whether the machine kept its speed meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from uncurl_jax import artifacts
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import bench_machine, bench_programs, bench_view
from uncurl_jax.deployment.bench_build import Subject
from uncurl_jax.deployment.bench_cells import measure as measure_cells
from uncurl_jax.deployment.bench_settings import (
    MEASURES,
    PLACEMENT,
    REPLICATED,
    SHARDED,
    BenchModel,
    BenchSettings,
    Layout,
    Placement,
    check_settings,
    default_devices,
    find_models,
    load_placement,
)
from uncurl_jax.deployment.bench_summary import speedups, weak_scaling
from uncurl_jax.errors import InputError

SCHEMA = "uncurl_jax.bench/1"
FUNCTIONAL_ONLY = (
    "These devices are parts of one CPU: the figures are functional, not performance; they show "
    "that the programs run and how they are made up, not how fast devices are."
)
_PARAMETERS = "compute dtype; routers and norms float32"

Progress = Callable[[str], None]


def run_bench(
    *,
    out: str | os.PathLike[str],
    model: ModelConfig | None = None,
    num_experts: Sequence[int] = (),
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    devices: Sequence[int] = (),
    layouts: Sequence[str] = (),
    placement: str | os.PathLike[str] | None = None,
    batch_per_device: int = 2,
    length: int = 256,
    decode_batches: Sequence[int] = (1, 64),
    decode_steps: int = 16,
    layer_calls: int = 16,
    repeats: int = 20,
    warmup: int = 2,
    seed: int = 0,
    measure: Sequence[str] = MEASURES,
    has_training: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measures models and writes the record with two pictures beside it.

    What is measured already stays in `<out>.partial` until all is; the same call goes on with it.

    Args:
      out: the JSON file; pictures are named after it.
      model: architecture for models with random parameters.
      num_experts: counts of experts to give its MoE layers in turn; as it is by default.
      checkpoints: measured too, before and after pruning for example.
      devices: numbers of devices; 1, 2, 4, ... and all by default.
      layouts: "sharded", "group:G", "replicated", "placement"; sharded and replicated by default,
        and the placement if there is one.
      placement: file with expert_partitions, model_partitions and expert_axes.
      batch_per_device: rows. 2, with 256 tokens, is the setting of arXiv 2409.01483.
      length: tokens per row, and of the prompt that decoding continues.
      decode_batches: rows over all devices.
      decode_steps: decoding steps that are timed together.
      layer_calls: repetitions in one launch of a layer and its parts.
      repeats: measured rounds.
      warmup: rounds before them.
      seed: of random parameters, tokens and orders.
      measure: what to measure, of MEASURES.
      has_training: measure the training step too.
      progress: called with sentences.

    Returns:
      The record.

    Raises:
      InputError: If an input is wrong; nothing is written then.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"uncurl bench runs in one process, got {jax.process_count()}: use the devices of one "
            "host."
        )
    plan = _plan(
        BenchSettings(
            devices=tuple(devices) or default_devices(jax.device_count()),
            layouts=tuple(layouts)
            or (SHARDED, REPLICATED, *((PLACEMENT,) if placement is not None else ())),
            placement=None if placement is None else load_placement(placement),
            batch_per_device=batch_per_device,
            length=length,
            decode_batches=tuple(decode_batches),
            decode_steps=decode_steps,
            layer_calls=layer_calls,
            repeats=repeats,
            warmup=warmup,
            seed=seed,
            measure=tuple(measure),
            has_training=has_training,
        ),
        find_models(model, num_experts, checkpoints),
        Path(out),
    )
    if plan.record["is_functional_only"]:
        progress(FUNCTIONAL_ONLY)
    record = _write_record(plan.record, _measure_all(plan, progress), plan.out)
    plan.partial.unlink(missing_ok=True)
    return record


def record_so_far(partial: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the record of what an interrupted benchmark has measured; it can still go on.

    No device is needed: the machine may have been given back.

    Args:
      partial: what the benchmark left, `<its out>.partial`.
      out: the JSON file, another than the benchmark's own; pictures are named after it.

    Returns:
      The record; `unmeasured` says how many measurements are missing.

    Raises:
      InputError: If the file holds no measurement, or an output exists.
    """
    partial, out = Path(partial), Path(out)
    lines = artifacts.read_json_lines(partial) if partial.is_file() else []
    if len(lines) < 2 or lines[0].get("schema") != SCHEMA:
        raise InputError(
            f"--so_far must be what a benchmark of schema {SCHEMA} left with measurements in it, "
            f"got {partial}: repeat the benchmark's command instead."
        )
    if partial.name == out.name + artifacts.PARTIAL_SUFFIX:
        raise InputError(
            f"--out must be another file than the benchmark's own, which is to go on, got {out}: "
            f"choose {out.with_name(out.stem + '_so_far.json')}."
        )
    for path in (out, *bench_view.picture_paths(out)):
        artifacts.refuse_existing(path)
    begun, *cells = lines
    unmeasured = _number_of_cells(begun) - len(cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    return _write_record({**begun, "unmeasured": unmeasured}, cells, out)


def _number_of_cells(begun: dict[str, Any]) -> int:
    """How many measurements the benchmark of a record's head was to make."""
    settings = dict(begun["settings"])
    settings.pop("inference_parameters")
    if settings["placement"] is not None:
        settings["placement"] = Placement(**settings["placement"])
    models = [
        BenchModel(model["name"], ModelConfig.from_dict(model["config"]), None)
        for model in begun["models"]
    ]
    layouts = check_settings(BenchSettings(**settings), models, begun["device"]["count"])
    return sum(map(len, layouts.values()))


def _write_record(head: dict[str, Any], cells: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    record = {**head, "cells": cells, "weak_scaling": weak_scaling(cells)}
    record["speedups"] = speedups(record["models"], cells)
    record["pictures"] = bench_view.write_pictures(record, out)
    artifacts.write_json(out, record)
    return record


class _Plan(NamedTuple):
    """A benchmark after its inputs were checked."""

    settings: BenchSettings
    models: list[BenchModel]
    layouts: dict[tuple[str, int], list[Layout]]
    record: dict[str, Any]
    out: Path
    has_begun: bool
    done: list[dict[str, Any]]

    @property
    def partial(self) -> Path:
        """Where measured cells are kept meanwhile."""
        return self.out.with_name(self.out.name + artifacts.PARTIAL_SUFFIX)


def _plan(settings: BenchSettings, models: list[BenchModel], out: Path) -> _Plan:
    """Checks everything that can be wrong before any work, and writes nothing."""
    layouts = check_settings(settings, models, jax.device_count())
    if settings.has_training and importlib.util.find_spec("threadpoolctl") is None:
        raise InputError(
            "The training step needs all packages that uncurl_jax asks for, got none named "
            "threadpoolctl: install it, or leave out --training."
        )
    artifacts.refuse_existing(out)
    devices = bench_machine.describe_devices()
    record = {
        "schema": SCHEMA,
        "command": bench_machine.command_line(),
        "versions": bench_machine.versions(),
        "device": devices,
        "is_functional_only": devices["platform"] == "cpu",
        "note": FUNCTIONAL_ONLY if devices["platform"] == "cpu" else None,
        "settings": {**settings.to_json(), "inference_parameters": _PARAMETERS},
        "models": [entry.to_json() for entry in models],
    }
    # As it will be read back: tuples become lists.
    record = json.loads(json.dumps(record))
    plan = _Plan(settings, models, layouts, record, out, has_begun=False, done=[])
    if not plan.partial.exists():
        for picture in bench_view.picture_paths(out):
            artifacts.refuse_existing(picture)
        return plan
    lines = artifacts.read_json_lines(plan.partial)
    if not lines:
        return plan
    begun, *done = lines
    compared = ("schema", "versions", "settings", "models")
    changed = [name for name in compared if begun.get(name) != record[name]]
    # Not all of it: the memory that a GPU has free differs a little from start to start.
    of_device = ("platform", "kind", "count")
    if any(begun.get("device", {}).get(name) != devices[name] for name in of_device):
        changed.append("devices")
    if changed:
        raise InputError(
            f"A benchmark goes on as it began, got other {' and '.join(changed)} than in "
            f"{plan.partial.name}: choose another --out, or remove that file."
        )
    return plan._replace(has_begun=True, done=done, record=begun)


def _measure_all(plan: _Plan, progress: Progress) -> list[dict[str, Any]]:
    """Measures what is not measured yet; returns the cells in the order of the plan."""
    settings = plan.settings
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    if not plan.has_begun:
        artifacts.append_json_line(plan.partial, plan.record)
    cells = {(cell["model"], cell["devices"], cell["layout"]): cell for cell in plan.done}
    total = sum(len(layouts) for layouts in plan.layouts.values())
    reference = bench_programs.reference_product()
    if cells:
        progress(f"{len(cells)} of {total} measurements were there already.")
    for model in plan.models:
        for count in settings.devices:
            names = [layout.name for layout in plan.layouts[model.name, count]]
            missing = [
                layout
                for layout in plan.layouts[model.name, count]
                if (model.name, count, layout.name) not in cells
            ]
            if not missing:
                continue
            start = time.perf_counter()
            subject = Subject(model, count, settings)
            for cell in measure_cells(subject, missing, reference):
                cells[model.name, count, cell["layout"]] = cell
                artifacts.append_json_line(plan.partial, cell)
            progress(
                f"{model.name} on {count} ({', '.join(names)}): "
                f"{time.perf_counter() - start:.0f} s; {len(cells)} of {total} done."
            )
    return [
        cells[model.name, count, layout.name]
        for model in plan.models
        for count in settings.devices
        for layout in plan.layouts[model.name, count]
    ]


def print_progress(sentence: str) -> None:
    """Writes a sentence to stderr, as the command does."""
    print(f"uncurl bench: {sentence}", file=sys.stderr)
