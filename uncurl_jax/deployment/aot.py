"""Compiles a model's programs for a TPU slice, without a TPU, and says whether they fit.

libtpu serves as the compiler alone. That proves that a program lowers, how much memory a chip
needs and what it communicates; not how fast it is, nor that its numbers are right.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from uncurl_jax import __version__
from uncurl_jax.deployment import collectives, programs
from uncurl_jax.deployment.aot_request import Request
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.partitioning import (
    TOKEN_AXES,
    axis_size,
    check_batch_size,
    make_mesh,
)

SCHEMA = "uncurl_jax aot 1"
_UNKNOWN = {"totals": {"all-to-all": {"count": None}}}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def slice_mesh(request: Request) -> Mesh:
    """Returns the mesh of a slice's devices, described by libtpu; they need not exist.

    Raises:
      InputError: If there is no libtpu, or it does not know the slice.
    """
    if not importlib.util.find_spec("libtpu") and "TPU_LIBRARY_PATH" not in os.environ:
        wanted = [name for name in importlib.metadata.requires("jax") or () if "libtpu" in name]
        raise InputError(
            "aot compiles with libtpu, got no such package in this environment: install the extra, "
            f"pip install 'uncurl_jax[aot]', or pip install '{wanted[0].partition(';')[0]}'."
        )
    generation = request.slice.name.partition("-")[0]
    name = f"{generation}:{'x'.join(map(str, request.slice.topology))}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"libtpu must know the topology {name} of {request.slice.name}, got "
            f"{str(error).splitlines()[0].rstrip('.')}: name the slice's file after a generation, "
            "as v5e-16.json."
        ) from None
    mesh = make_mesh(
        expert_partitions=request.config.expert_partitions,
        model_partitions=request.config.model_partitions,
        devices=devices,
    )
    check_batch_size(request.config.batch_size, mesh)
    return mesh


def check(
    request: Request, mesh: Mesh, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Compiles the programs for the mesh and describes them.

    Args:
      request: what to compile.
      mesh: devices, from `slice_mesh`.
      say: is told what is being done, and each result in one line.

    Returns:
      JSON-compatible content of the report; "fits" says whether every program does, and "sentence"
      why not and what would help.
    """
    started = time.perf_counter()
    results: dict[str, Any] = {}
    for name in request.programs:
        say(f"{name}: compiling for {request.slice.name} (seconds to minutes)")
        results[name] = _compile(request, mesh, name)
        say(f"{name}: {_one_line(results[name])}")
    refused = [name for name in request.programs if not results[name]["fits"]]
    parameters = count_parameters(request.model)
    return {
        "schema": SCHEMA,
        "slice": dataclasses.asdict(request.slice),
        "mesh": dict(mesh.shape),
        "model": request.model.to_dict(),
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "batch_size": request.config.batch_size,
        "accumulation_steps": request.config.accumulation_steps,
        "length": request.length,
        "trainable": request.config.trainable,
        "expert_axes": request.config.expert_axes,
        "fits": not refused,
        "sentence": _refusal(request, mesh, results, refused) if refused else None,
        "programs": results,
        "notes": [
            "Bytes and FLOPs are of one chip and one call of the program.",
            "flops_per_chip and bytes_accessed_per_chip are the compiler's count: a custom kernel "
            "counts 0, a loop one pass (one part of a batch with accumulation_steps above 1).",
            "bytes_on_the_wire: (g-1)/g of the payload for all-to-all and all-gather, 2(g-1)/g "
            "for all-reduce.",
            "Nothing was run: no times, no numerics.",
        ],
        "seconds": round(time.perf_counter() - started, 1),
        "versions": _versions(),
    }


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the few numbers of a report that fit on one line."""
    return {
        "slice": report["slice"]["name"],
        "fits": report["fits"],
        "programs": {
            name: {
                "fits": result["fits"],
                "hbm_gib": round(result["hbm"]["needed_bytes"] / 2**30, 2),
                "all_to_alls": (result["collectives"] or _UNKNOWN)["totals"]["all-to-all"]["count"],
            }
            for name, result in report["programs"].items()
        },
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "uncurl_jax": __version__}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _compile(request: Request, mesh: Mesh, name: str) -> dict[str, Any]:
    """Compiles one program and returns its part of the report."""
    is_train = name == programs.TRAIN
    program = programs.build(
        name,
        request.model,
        request.config,
        mesh,
        num_rows=request.config.batch_size if is_train else request.rows_at_a_time,
        length=request.length,
    )
    arguments = programs.argument_bytes(program)
    flops = programs.model_flops(program, request.model, request.length)
    started = time.perf_counter()
    lowered = program.lower()
    lowered_at = time.perf_counter()
    refusal = compiled = None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error)
        if not refusal.startswith("RESOURCE_EXHAUSTED"):
            raise
    seconds = {
        "lower": round(lowered_at - started, 1),
        "compile": round(time.perf_counter() - lowered_at, 1),
    }
    available = request.slice.hbm_bytes_per_chip
    if compiled is None:
        hbm = hbm_of_refusal(refusal or "", sum(arguments.values()), available)
    else:
        hbm = _hbm_of_program(compiled.memory_analysis(), available)
    costs = {} if compiled is None else _costs(compiled)
    return {
        "num_rows": program.num_rows,
        "num_tokens": program.num_tokens,
        "rows_per_chip_at_a_time": request.rows_at_a_time // axis_size(mesh, TOKEN_AXES),
        "fits": compiled is not None and hbm["needed_bytes"] <= available,
        "hbm": hbm,
        "argument_bytes": arguments,
        "flops_per_chip": costs.get("flops"),
        "bytes_accessed_per_chip": costs.get("bytes accessed"),
        "model_flops_per_chip": None if flops is None else flops / mesh.size,
        "collectives": None
        if compiled is None
        else collectives.summarize(collectives.find_collectives(compiled.as_text())),
        "seconds": seconds,
        "compiler_says": refusal,
    }


def _costs(compiled: Any) -> dict[str, float]:
    costs = compiled.cost_analysis() or {}
    return costs[0] if isinstance(costs, list) else costs


def _hbm_of_program(stats: Any, available: int) -> dict[str, Any]:
    parts = {
        "arguments_bytes": stats.argument_size_in_bytes,
        "outputs_bytes": stats.output_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "temporaries_bytes": stats.temp_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }
    needed = sum(parts.values()) - 2 * parts["aliased_bytes"]
    return {
        "needed_bytes": needed,
        "available_bytes": available,
        "is_lower_bound": False,
        **parts,
    }


def hbm_of_refusal(message: str, arguments: int, available: int) -> dict[str, Any]:
    """Reads the sizes that XLA names when it finds that a program does not fit."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    # All of a program, its arguments among it; or its temporaries alone.
    whole = re.search(rf"Used {size} of {size} hbm", message)
    part = re.search(rf"required for HLO temporaries \({size}\)", message)
    temporaries = None
    if whole:
        needed = _bytes(whole[1], whole[2])
    elif part:
        temporaries = _bytes(part[1], part[2])
        needed = temporaries + arguments
    else:
        needed = max(arguments, available)
    return {
        "needed_bytes": needed,
        "available_bytes": available,
        "is_lower_bound": True,
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
    }


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _one_line(result: dict[str, Any]) -> str:
    hbm, found = result["hbm"], result["collectives"]
    text = f"{_gib(hbm['needed_bytes'])} of {_gib(hbm['available_bytes'])} GiB per chip"
    if not result["fits"]:
        text += ", does not fit"
    if found is not None:
        totals = ", ".join(
            f"{total['count']} {kind} ({total['bytes_per_device'] / 2**20:.1f} MiB)"
            for kind, total in found["totals"].items()
            if total["count"]
        )
        text += f"; {totals or 'no communication'}"
    return f"{text}; compiled in {result['seconds']['compile']:.0f} s"


def _refusal(request: Request, mesh: Mesh, results: dict[str, Any], refused: Sequence[str]) -> str:
    """Says which program does not fit, by how much, and what would help most."""
    name = max(refused, key=lambda name: results[name]["hbm"]["needed_bytes"])
    result = results[name]
    hbm = result["hbm"]
    state = sum(result["argument_bytes"].values())
    others = [other for other in refused if other != name]
    also = f" (neither do{'es' if len(others) == 1 else ''} {', '.join(others)})" if others else ""
    changes = list(remedies(request, mesh, name, result))[:3]
    return (
        f"{name} must fit {request.slice.name}'s {_gib(hbm['available_bytes'])} GiB of HBM per "
        f"chip, got {'at least ' if hbm['is_lower_bound'] else ''}{_gib(hbm['needed_bytes'])} "
        f"GiB{also}, of which {_gib(state)} are parameters, optimizer and inputs and the rest "
        f"what it computes for {result['rows_per_chip_at_a_time']} row"
        f"{'s' if result['rows_per_chip_at_a_time'] != 1 else ''} per chip: try "
        f"{', or '.join(changes)}."
    )


def remedies(request: Request, mesh: Mesh, name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yields the smallest changes that would make a program fit, as far as one compilation tells.

    What is computed is taken to grow in proportion with the rows of a chip, and in training, where
    much of it is gradients, with parameters and optimizer when experts are divided or pruned.
    """
    config, sizes = request.config, result["argument_bytes"]
    needed, available = result["hbm"]["needed_bytes"], result["hbm"]["available_bytes"]
    state = sum(sizes.values()) - sizes["cache"]
    # The key-value cache grows with the rows too.
    computed, rows = needed - state, result["rows_per_chip_at_a_time"]
    for part in (d for d in range(2, rows + 1) if rows % d == 0):
        if state + computed / part <= available:
            if name == programs.TRAIN:
                steps = config.accumulation_steps * part
                yield f"--gin.config.TrainConfig.accumulation_steps={steps}"
            yield f"--batch {config.batch_size // part}"
            break
    experts = sizes["expert_parameters"] + sizes["expert_optimizer"]
    most = max(request.model.num_experts)
    now = math.ceil(most / config.expert_partitions)

    def fits(on_each: int) -> bool:
        """Whether it would fit with so many experts of each layer on a chip in place of `now`."""
        rest = state - experts + experts * on_each / now
        scale = rest / state if name == programs.TRAIN else 1.0
        return on_each < now and rest + computed * scale <= available

    places = mesh.size // config.model_partitions if config.expert_axes is None else 1
    divisors = [d for d in range(1, min(most, places) + 1) if places % d == 0]
    enough = [d for d in divisors if fits(math.ceil(most / d))] if experts else []
    if enough:
        yield f"--expert_partitions {enough[0]}"
    fewer = most // 2
    while experts and fewer >= request.model.num_selected_experts:
        divided = max(d for d in divisors if d <= fewer)
        if fits(math.ceil(fewer / config.expert_partitions)):
            yield f"pruning to {fewer} experts (--num_experts {fewer})"
            break
        if not enough and fits(math.ceil(fewer / divided)):
            yield (
                f"pruning to {fewer} experts and dividing them "
                f"(--num_experts {fewer} --expert_partitions {divided})"
            )
            break
        fewer //= 2
    yield "a slice with more chips or more memory per chip"
