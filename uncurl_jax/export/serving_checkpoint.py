"""`uncurl export --format orbax`: parameters alone, laid out for a serving mesh."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uncurl_jax.artifacts import atomic_directory, write_json
from uncurl_jax.checkpoints import layout, serving
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.errors import InputError
from uncurl_jax.export import runner, scores
from uncurl_jax.export.manifest import (
    ExportOptions,
    Prepared,
    common_fields,
    files_of,
    model_entry,
    prepare,
    summarize,
    write_reference,
    write_vocabulary,
)
from uncurl_jax.export.programs import SCALE_SUFFIX
from uncurl_jax.export.quantization import quantize
from uncurl_jax.export.reference import (
    TOLERANCES,
    checkpoint_outputs,
    checkpoint_params,
    reference_inputs,
)
from uncurl_jax.export.serving_config import LayerLayout, ServingConfig
from uncurl_jax.export.sources import (
    POSITIONS,
    Progress,
    Source,
    read_parameter,
    stored_dtype,
)
from uncurl_jax.export.verify import run_check
from uncurl_jax.models.decoder import Params
from uncurl_jax.models.expert_mlp import KERNELS


def export_orbax(
    checkpoints: Mapping[str, layout.PathLike],
    out: str | os.PathLike[str],
    serving_config: ServingConfig,
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Writes OUT/params/state, which Orbax restores array by array, and a manifest beside it.

    Args:
      checkpoints: {name of the model: checkpoint}, one alone.
      out: directory to make.
      serving_config: the mesh, and what is done to layers that it does not divide.
      options: of the export; arrays have its dtype, by default bfloat16, but for routers and
        norms, which are float32.

    Returns:
      A JSON-compatible summary, as `export_stablehlo`, and "layers".

    Raises:
      InputError: As `export_stablehlo`, or if there is more than one checkpoint.
      RuntimeError: If another process, on the mesh, does not reproduce the checkpoint.
    """
    options = options or ExportOptions()
    options = dataclasses.replace(options, dtype=options.dtype or "bfloat16")
    if len(checkpoints) != 1:
        raise InputError(
            f"--format orbax takes one checkpoint, got {len(checkpoints)}: export them apart, or "
            "take --format stablehlo, where models share experts."
        )
    prepared = prepare(checkpoints, out, options)
    serving_config.check_model(prepared.sources[0].config.num_experts)
    with atomic_directory(out) as directory:
        manifest = _write(directory, prepared, options, serving_config)
        run_check(directory, manifest)
    summary = summarize(out, prepared.sources, manifest)
    return {**summary, "layers": manifest["serving"]["layers"]}


def _write(
    directory: Path, prepared: Prepared, options: ExportOptions, serving_config: ServingConfig
) -> dict[str, Any]:
    """Writes everything into a directory; returns the manifest."""
    (source,), vocabulary, caches = prepared
    config, quantization = source.config, options.quantization
    layouts = {
        layer: serving_config.layout(layer, config.num_experts[layer])
        for layer in config.moe_layers
    }
    shapes = _shapes(source, layouts, quantization)
    pieces = _pieces(source, layouts, quantization, options.progress)
    folder = serving.write_arrays(directory, shapes, pieces)
    params = served_params(source, quantization)
    entry = model_entry(source)
    inputs = reference_inputs(config, vocabulary.size)
    # In float32, where a mesh and one device agree closely: what is compared is the arrays.
    wide = dataclasses.replace(source, config=dataclasses.replace(config, dtype="float32"))
    outputs = checkpoint_outputs(wide, inputs, params)
    entry["against_checkpoint"] = runner.compare(outputs, checkpoint_outputs(wide, inputs))
    write_reference(directory / entry["reference"], inputs, outputs)
    options.progress("reference")
    if source.name in caches and options.evaluate is not None:
        cache, model = caches[source.name], scores.in_memory(source, params)
        measure = functools.partial(options.evaluate, model, cache)
        entry |= scores.described(source, cache, measure, options.evaluate)
        options.progress("score")
    manifest = {
        "schema": runner.SCHEMA,
        "format": "orbax",
        "params": folder,
        "models": {source.name: entry},
        "vocabulary": write_vocabulary(vocabulary, directory),
        **common_fields([source], quantization),
        "tolerance": TOLERANCES["float32"],
        "serving": {
            **serving_config.to_dict(),
            "layers": {f"layers_{n}": layout.to_dict() for n, layout in layouts.items()},
            "expert_map": _expert_maps(source, layouts),
        },
        "arrays": {
            name: {"shape": list(shape), "dtype": kind.name}
            for name, (shape, kind) in shapes.items()
        },
        "files": files_of(directory),
    }
    write_json(directory / runner.MANIFEST, manifest)
    return manifest


def _layer_of(name: str) -> int:
    return int(name.split("/")[0].removeprefix("layers_"))


def _is_quantized(name: str, quantization: str | None) -> bool:
    is_kernel = is_expert_array(name) and name.rsplit("/", 1)[1] in KERNELS
    return quantization is not None and is_kernel


def _shapes(
    source: Source, layouts: Mapping[int, LayerLayout], quantization: str | None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of everything that is stored, sorted by name."""
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, (shape, _) in source.reader.parameters().items():
        dtype = stored_dtype(name, source.config)
        if is_expert_array(name):
            shape = (layouts[_layer_of(name)].stored, *shape[1:])
        if name == POSITIONS:
            shape = (source.config.max_length, shape[1])
        if _is_quantized(name, quantization):
            shapes[name] = (shape, np.dtype(np.int8))
            shapes[name + SCALE_SUFFIX] = ((shape[0], shape[-1]), np.dtype(np.float32))
        else:
            shapes[name] = (shape, dtype)
    return dict(sorted(shapes.items()))


def _pieces(
    source: Source,
    layouts: Mapping[int, LayerLayout],
    quantization: str | None,
    progress: Progress,
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields the stored arrays, those of experts one expert at a time."""
    for name in source.reader.parameters():
        if not is_expert_array(name):
            yield name, None, read_parameter(source, name)
            progress(name)
            continue
        places = layouts[_layer_of(name)]
        arrays: dict[str, np.ndarray] = {}
        for expert in range(places.num_experts):
            array = read_parameter(source, name, expert)
            arrays = {name: array}
            if _is_quantized(name, quantization):
                parts = quantize(array)
                arrays = {name: parts.values, name + SCALE_SUFFIX: parts.scale}
            for place in places.places(expert):
                yield from ((key, place, value) for key, value in arrays.items())
        for place in range(places.stored - places.padding, places.stored):
            yield from ((key, place, np.zeros_like(value)) for key, value in arrays.items())
        progress(name)


def _expert_maps(source: Source, layouts: Mapping[int, LayerLayout]) -> dict[str, list[list[int]]]:
    """For each layer and column of its router, the places of its expert's copies."""
    maps = {}
    for layer, places in layouts.items():
        row = source.config.expert_map[layer] if source.config.expert_map else None
        experts = range(places.num_experts) if row is None else row
        maps[f"layers_{layer}"] = [places.places(expert) for expert in experts]
    return maps


def served_params(source: Source, quantization: str | None) -> Params:
    """Returns the checkpoint's parameters as they are after storing, in memory."""

    def stored(path: Any, array: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = stored_dtype(name, source.config)
        array = array.astype(dtype)
        if _is_quantized(name, quantization):
            parts = quantize(np.asarray(array))
            kernel = parts.values.astype(np.float32) * parts.scale[..., None, :]
            array = jax.numpy.asarray(kernel, dtype)
        return array

    return jax.tree_util.tree_map_with_path(stored, checkpoint_params(source))
