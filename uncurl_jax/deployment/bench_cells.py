"""Measures one model on some devices: everything that takes turns, as the cells of a record."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import bench_programs, collectives
from uncurl_jax.deployment.bench_build import Built, Subject, build, make_all
from uncurl_jax.deployment.bench_decoding import padded_rows
from uncurl_jax.deployment.bench_programs import Forward, LayerKind, Reference
from uncurl_jax.deployment.bench_settings import Layout
from uncurl_jax.deployment.timing import Timing, time_alternatives

# Largest relative error (L2, over the vocabulary) of a token's logits on several devices against
# one, and the share of tokens that must keep it. In bfloat16 a rounding can turn a router's choice
# between two experts that are almost equal, and such a token differs by all of its expert.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5}
SHARE_WITHIN_TOLERANCE = {"bfloat16": 0.95, "float32": 1.0}
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_ENDS = ("", "-start")
# What carries tokens to experts and back in a compiled program, inside the layer's shard_map.
_TOKEN_COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter")


class OutOfMemoryError(Exception):
    """The devices could not hold a program or its arrays."""


def measure(
    subject: Subject, layouts: Sequence[Layout], reference: Reference
) -> list[dict[str, Any]]:
    """Measures layouts taking turns; one by one if they do not fit into memory together.

    Args:
      subject: the model and its devices.
      layouts: of its experts.
      reference: a product that takes turns with everything.

    Returns:
      A cell for each layout, as docs/bench.md describes it.
    """
    try:
        cells = in_memory(lambda: _measure_together(subject, layouts, reference))
    except OutOfMemoryError as error:
        if len(layouts) == 1:
            base = _cell_base(subject, layouts[0])
            return [{**base, "status": "out_of_memory", "message": str(error)}]
        return [cell for layout in layouts for cell in measure(subject, [layout], reference)]
    if subject.settings.has_training:
        for cell, found in zip(cells, _measure_training(subject, layouts), strict=True):
            cell["training"] = found
    return cells


def in_memory(work: Callable[[], Any]) -> Any:
    """Calls `work`; running out of device memory becomes OutOfMemoryError, with all freed."""
    message = None
    try:
        return work()
    except jax.errors.JaxRuntimeError as error:
        if _NO_MEMORY not in str(error):
            raise
        message = str(error).splitlines()[0]
    # Outside the handler: its traceback held the arrays.
    gc.collect()
    raise OutOfMemoryError(message)


def _measure_together(
    subject: Subject, layouts: Sequence[Layout], reference: Reference
) -> list[dict[str, Any]]:
    settings, expected = subject.settings, None
    is_compared = "equality" in settings.measure and subject.count > 1
    built, one_device = build(subject, layouts, is_compared=is_compared)
    if is_compared:
        expected = _logits_of_one_device(subject, one_device)
    turns = {"reference": reference.alternative}
    for place, cell in enumerate(built):
        for name, alternative in cell.alternatives.items():
            turns[f"{place}/{name}"] = alternative
    timings = time_alternatives(
        turns, repeats=settings.repeats, warmup=settings.warmup, seed=settings.seed
    )
    cells = []
    for place, cell in enumerate(built):
        own = {
            name.partition("/")[2]: timing
            for name, timing in timings.items()
            if name.startswith(f"{place}/")
        }
        product = timings["reference"]
        cells.append(
            {
                **_cell_base(subject, cell.layout),
                "status": "measured",
                **_timed(subject, cell, own),
                "reference": {
                    **product.to_json(),
                    "product": reference.text,
                    "flops_per_second": reference.flops / product.seconds,
                },
                "communication": _communication(subject, cell),
                "equality": _equality(subject, cell, expected),
                "memory": _memory(cell),
                "training": None,
            }
        )
    return cells


def _cell_base(subject: Subject, layout: Layout) -> dict[str, Any]:
    length = subject.settings.length
    return {
        "model": subject.model.name,
        "devices": subject.count,
        "layout": layout.name,
        "mesh": {"data": layout.data, "expert": layout.expert, "model": layout.model},
        "batch": subject.batch,
        "length": length,
        "tokens": subject.batch * length,
    }


def _timed(subject: Subject, built: Built, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The parts of a cell that hold times."""

    def step(name: str, tokens: int) -> dict[str, Any] | None:
        if name not in timings:
            return None
        return {**timings[name].to_json(), "tokens_per_second": tokens / timings[name].seconds}

    tokens = subject.batch * subject.settings.length
    per_shard = subject.tokens_per_shard(built.layout)
    return {
        "forward": step("forward", tokens),
        "prefill": step("prefill", tokens),
        "decode": [
            {"batch": rows, "rows": padded_rows(rows, built.layout), **found}
            for rows in subject.settings.decode_batches
            if (found := step(f"decode {rows}", rows)) is not None
        ],
        "moe_layers": [
            _layer_json(subject.model.config, built, place, timings, per_shard)
            for place in range(len(built.kinds))
        ],
        "split": _split(built.kinds, timings),
        "launch": timings["launch"].to_json(),
    }


def _layer_json(
    config: ModelConfig,
    built: Built,
    place: int,
    timings: Mapping[str, Timing],
    tokens: int,
) -> dict[str, Any]:
    kind = built.kinds[place]

    def found(name: str) -> dict[str, Any] | None:
        timing = timings.get(f"{name} {place}")
        return None if timing is None else timing.to_json()

    communication = None
    if kind.communication is not None:
        communication = {
            "kind": kind.communication,
            "bytes_per_device": kind.bytes_per_device(config, tokens),
            "collectives": built.num_collectives.get(place),
            **(found("communication") or {}),
        }
    return {
        "layers": list(kind.layers),
        "num_experts": kind.num_experts,
        "padded_experts": kind.padded_experts,
        "expert_axes": list(kind.expert_axes),
        "group_size": kind.group_size,
        "capacity": kind.capacity,
        "slots_per_expert": kind.slots(tokens, config.num_selected_experts),
        "communication": communication,
        "experts": found("experts"),
        "layer": found("layer"),
    }


def _split(kinds: Sequence[LayerKind], timings: Mapping[str, Timing]) -> dict[str, float] | None:
    """Divides the forward pass by what its parts take alone; a device may overlap them."""
    if "forward" not in timings or any(
        f"layer {place}" not in timings for place in range(len(kinds))
    ):
        return None
    totals = dict.fromkeys(("communication", "experts", "layer"), 0.0)
    for place, kind in enumerate(kinds):
        for name in totals:
            timing = timings.get(f"{name} {place}")
            totals[name] += 0.0 if timing is None else len(kind.layers) * timing.seconds
    routing = totals["layer"] - totals["communication"] - totals["experts"]
    other = timings["forward"].seconds - totals["layer"]
    return {
        "communication_seconds": totals["communication"],
        "experts_seconds": totals["experts"],
        # Below zero where a device overlaps in the whole what was timed apart.
        "routing_seconds": routing,
        "other_seconds": other,
    }


def _logits_of_one_device(
    subject: Subject, programs: Mapping[int, Forward]
) -> dict[int, np.ndarray] | str:
    """Logits to compare with, by number of token groups; a sentence if one device is too small.

    One device takes the groups one after the other, so that its products have the shapes that each
    of several devices has: compilers choose kernels by shape, and kernels round differently.
    """

    def compute() -> dict[int, np.ndarray]:
        params = bench_programs.serving_params(subject.model, None, None, subject.settings.seed)
        found = {}
        for shards, forward in programs.items():
            parts = [
                forward._replace(params=params, inputs=jnp.asarray(rows)).compared_logits()
                for rows in np.split(subject.tokens, shards)
            ]
            found[shards] = np.concatenate(parts)
        return found

    try:
        return in_memory(compute)
    except OutOfMemoryError as error:
        return f"not compared: one device cannot hold the model ({error})"


def _equality(
    subject: Subject, built: Built, expected: dict[int, np.ndarray] | str | None
) -> dict[str, Any] | None:
    if expected is None or built.forward is None:
        return None
    if isinstance(expected, str):
        return {"is_equal": None, "message": expected}
    one = expected[built.layout.token_shards]
    return compare_logits(built.forward.compared_logits(), one, subject.model.config.dtype)


def compare_logits(several: np.ndarray, one: np.ndarray, dtype: str) -> dict[str, Any]:
    """Compares logits [..., vocab] of several devices with those of one."""
    several, one = several.astype(np.float64), one.astype(np.float64)
    norms = np.maximum(np.linalg.norm(one, axis=-1), 1e-30)
    errors = np.linalg.norm(several - one, axis=-1) / norms
    is_within = errors <= TOLERANCE[dtype]
    return {
        "is_equal": bool(is_within.mean() >= SHARE_WITHIN_TOLERANCE[dtype]),
        "tolerance": TOLERANCE[dtype],
        "share_within_tolerance": float(is_within.mean()),
        "required_share": SHARE_WITHIN_TOLERANCE[dtype],
        "median_relative_error": float(np.median(errors)),
        "largest_relative_error": float(errors.max()),
        "compared_tokens": int(errors.size),
    }


def _communication(subject: Subject, built: Built) -> dict[str, Any] | None:
    """Bytes that cross the mesh in one forward pass: by arithmetic, and in the compiled program."""
    if "bytes" not in subject.settings.measure or built.forward is None or built.mesh is None:
        return None
    config, tokens = subject.model.config, subject.tokens_per_shard(built.layout)
    expected = sum(len(kind.layers) * kind.bytes_per_device(config, tokens) for kind in built.kinds)
    text = built.forward.compiled.as_text() or ""
    found = collectives.summarize(collectives.find_collectives(text))
    own = collectives.summarize(collectives.find_collectives(_in_shard_maps(text)))
    compiled = sum(
        own["totals"].get(kind, {}).get("bytes_on_the_wire_per_device", 0)
        for kind in _TOKEN_COLLECTIVES
    )
    on_the_wire = sum(kind["bytes_on_the_wire_per_device"] for kind in found["totals"].values())
    return {
        "expected_bytes_per_device": expected,
        "compiled_bytes_per_device": compiled,
        "is_equal": math.isclose(expected, compiled, rel_tol=1e-3, abs_tol=0.5),
        "other_bytes_per_device": on_the_wire - compiled,
        "compiled_totals": found["totals"],
    }


def _in_shard_maps(text: str) -> str:
    """Leaves out of a program's text the collectives that its compiler added by itself."""

    def is_kept(line: str) -> bool:
        is_collective = any(f" {kind}{end}(" in line for kind in collectives.KINDS for end in _ENDS)
        return not is_collective or "/shard_map/" in line

    return "\n".join(line for line in text.splitlines() if is_kept(line))


def _memory(built: Built) -> dict[str, Any] | None:
    """Bytes of the forward program on one device, as its compiler counts them."""
    if built.forward is None:
        return None
    analysis = built.forward.compiled.memory_analysis()
    if analysis is None:
        return None
    return {
        "argument_bytes": int(analysis.argument_size_in_bytes),
        "output_bytes": int(analysis.output_size_in_bytes),
        "temporary_bytes": int(analysis.temp_size_in_bytes),
    }


def _measure_training(subject: Subject, layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """Compiles the steps of all layouts at once and times one after the other: states are large."""
    # Not above: its imports need packages that nothing else here does.
    from uncurl_jax.deployment.bench_training import compile_step, training_step

    model, count, settings = subject
    meshes = {layout: layout.make_mesh(jax.devices()[:count]) for layout in layouts}
    compiled = make_all(
        {
            layout: functools.partial(
                _or_message,
                functools.partial(compile_step, model, layout, mesh, count, settings),
            )
            for layout, mesh in meshes.items()
        }
    )

    def work(layout: Layout) -> dict[str, Any]:
        step = training_step(compiled[layout], model, layout, meshes[layout], count, settings)
        timing = time_alternatives(
            {"training": step.alternative},
            repeats=settings.repeats,
            warmup=settings.warmup,
            seed=settings.seed,
        )["training"]
        return {"status": "measured", **timing.to_json(), **step.rates(timing.seconds)}

    found = []
    for layout in layouts:
        result = compiled[layout]
        if not isinstance(result, str):
            result = _or_message(functools.partial(work, layout))
        is_lost = isinstance(result, str)
        found.append({"status": "out_of_memory", "message": result} if is_lost else result)
    return found


def _or_message(work: Callable[[], Any]) -> Any:
    """Returns what `work` does, or the message of running out of device memory."""
    try:
        return in_memory(work)
    except OutOfMemoryError as error:
        return str(error)
