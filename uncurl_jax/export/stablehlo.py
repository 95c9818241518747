"""`uncurl export --format stablehlo`: exported programs with the weights beside them."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from uncurl_jax.artifacts import atomic_directory, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.export import runner, scores
from uncurl_jax.export.manifest import (
    ExportOptions,
    common_fields,
    files_of,
    model_entry,
    prepare,
    shared_entry,
    summarize,
    write_reference,
    write_vocabulary,
)
from uncurl_jax.export.programs import PLATFORMS, export_programs
from uncurl_jax.export.reference import TOLERANCES, checkpoint_outputs, reference_inputs
from uncurl_jax.export.sources import Progress, SharedWeights, Source, write_weights
from uncurl_jax.export.tensor_file import TensorWriter

RUN_FILE = "run.py"


def export_stablehlo(
    checkpoints: Mapping[str, layout.PathLike],
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Writes one artifact of one or more models; `runner` and docs/serving.md describe it.

    Args:
      checkpoints: {name of the model: checkpoint}.
      out: directory to make.
      options: of the export.

    Returns:
      A JSON-compatible summary: "out", "format", "bytes", "checkpoint_bytes" {"parameters",
      "on_disk"}, "saved_by_sharing_bytes", and of "models" task, difference and scores.

    Raises:
      InputError: As `manifest.prepare`, or if a parameter is not finite.
      RuntimeError: If the programs do not reproduce the checkpoints.
    """
    options = options or ExportOptions()
    sources, vocabulary, caches = prepare(checkpoints, out, options)
    progress, quantization = options.progress, options.quantization
    with atomic_directory(out) as directory:
        writer = TensorWriter(directory / "weights")
        weights = write_weights(sources, writer, quantization=quantization, progress=progress)
        programs = _write_programs(sources, weights, writer, directory, progress)
        shutil.copyfile(Path(runner.__file__), directory / RUN_FILE)
        entries = {
            source.name: {
                **model_entry(source),
                **shared_entry(source, weights),
                "programs": programs[source.name],
            }
            for source in sources
        }
        manifest = {
            "schema": runner.SCHEMA,
            "format": "stablehlo",
            "models": entries,
            "vocabulary": write_vocabulary(vocabulary, directory),
            **common_fields(sources, quantization),
            "platforms": list(PLATFORMS),
            "saved_by_sharing_bytes": weights.num_shared_bytes,
            "files": files_of(directory),
        }
        # The programs are tried as a server loads them; their results complete the manifest.
        write_json(directory / runner.MANIFEST, manifest)
        artifact = runner.Artifact(directory)
        for source in sources:
            entry, model = entries[source.name], artifact.load(source.name)
            path = directory / entry["reference"]
            found = _write_reference(source, model, path, vocabulary.size, quantization)
            entry["against_checkpoint"] = found
            progress(f"reference of {source.name}")
            if source.name in caches:
                cache = caches[source.name]
                measure = functools.partial(scores.rank_score, model, cache)
                entry |= scores.described(source, cache, measure, options.evaluate)
                progress(f"score of {source.name}")
        manifest["files"] = files_of(directory)
        write_json(directory / runner.MANIFEST, manifest)
    return summarize(out, sources, manifest)


def _write_programs(
    sources: list[Source],
    weights: SharedWeights,
    writer: TensorWriter,
    directory: Path,
    progress: Progress,
) -> dict[str, dict[str, str]]:
    """Writes programs, one set for models whose weights have the same shapes."""
    (directory / "programs").mkdir()
    known: dict[Any, dict[str, str]] = {}
    files: dict[str, dict[str, str]] = {}
    for source in sources:
        config = dataclasses.replace(source.config, num_experts=weights.pools, expert_map=None)
        tensors = weights.tensors[source.name]
        shapes = {
            path: jax.ShapeDtypeStruct(*writer.shapes[tensor]) for path, tensor in tensors.items()
        }
        key = (config, tuple((path, shape.shape) for path, shape in sorted(shapes.items())))
        if key not in known:
            known[key] = {}
            for kind, exported in export_programs(config, shapes).items():
                name = f"programs/{source.name}.{kind}.stablehlo"
                (directory / name).write_bytes(exported.serialize())
                known[key][kind] = name
                progress(name)
        files[source.name] = known[key]
    return files


def _write_reference(
    source: Source,
    model: runner.Model,
    path: Path,
    vocabulary_size: int,
    quantization: str | None,
) -> dict[str, float]:
    """Writes reference inputs and outputs; returns how the model differs from the checkpoint.

    The outputs are the checkpoint's own, or the artifact's where int8 changes them.
    """
    inputs = reference_inputs(source.config, vocabulary_size)
    expected = checkpoint_outputs(source, inputs)
    outputs = runner.run_reference(model, inputs)
    found = runner.compare(outputs, expected)
    limits = TOLERANCES[source.config.dtype]["same_platform"]
    if quantization is None and not runner.is_alike(found, limits):
        raise RuntimeError(
            f"The programs of {source.name} must reproduce {source.checkpoint}"
            f"{runner.said(found, limits)}"
        )
    kept = expected if quantization is None else outputs
    write_reference(path, inputs, kept)
    return found
