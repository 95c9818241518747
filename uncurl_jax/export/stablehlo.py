"""`uncurl export --format stablehlo`: exported programs with the weights beside them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uncurl_jax import __version__
from uncurl_jax.artifacts import atomic_directory, refuse_existing, sha256_of_file, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.export import runner, scores
from uncurl_jax.export.programs import PLATFORMS, export_programs
from uncurl_jax.export.quantization import INT8
from uncurl_jax.export.reference import TOLERANCES, checkpoint_outputs, reference_inputs
from uncurl_jax.export.sources import (
    Progress,
    SharedWeights,
    Source,
    checkpoint_bytes,
    open_sources,
    write_weights,
)
from uncurl_jax.export.tensor_file import TensorWriter

RUN_FILE = "run.py"


def export_stablehlo(
    checkpoints: Mapping[str, layout.PathLike],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_length: int | None = None,
    quantization: str | None = None,
    caches: Mapping[str, TokenCache] | None = None,
    evaluate: Callable[[layout.CheckpointPath, TokenCache], Mapping[str, Any]] | None = None,
    vocabulary: str | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Writes one artifact of one or more models; `runner` and docs/serving.md describe it.

    Args:
      checkpoints: {name of the model: checkpoint}.
      out: directory to make.
      dtype: compute dtype of the models when they are served; their own by default.
      max_length: most tokens of a prompt and its continuation; the models' own by default.
      quantization: "int8" for the kernels of experts, None for none.
      caches: {name of the model: token cache} to score the artifact on.
      evaluate: scores a checkpoint itself on a token cache, for the score before.
      vocabulary: spec of the vocabulary, if its files have moved.
      progress: called with what has been done.

    Returns:
      A JSON-compatible summary: "out", "bytes", "checkpoint_bytes", "models".

    Raises:
      InputError: If the output exists, the checkpoints cannot share an artifact, a parameter is
        not finite, or the vocabulary's files are not there.
      RuntimeError: If the programs do not reproduce the checkpoints.
    """
    refuse_existing(out)
    if quantization not in (None, INT8):
        raise InputError(f'quantization must be "{INT8}", or None, got {quantization!r}.')
    sources = open_sources(checkpoints, dtype=dtype, max_length=max_length)
    caches = dict(caches or {})
    loaded = artifact_vocabulary(sources[0], vocabulary)
    for cache in caches.values():
        cache.check_vocabulary(loaded.hash)
    with atomic_directory(out) as directory:
        writer = TensorWriter(directory / "weights")
        weights = write_weights(sources, writer, quantization=quantization, progress=progress)
        programs = _write_programs(sources, weights, writer, directory, progress)
        shutil.copyfile(Path(runner.__file__), directory / RUN_FILE)
        (directory / "reference").mkdir()
        manifest = {
            "schema": runner.SCHEMA,
            "format": "stablehlo",
            "models": {
                source.name: _entry(source, weights, programs[source.name]) for source in sources
            },
            "vocabulary": write_vocabulary(loaded, directory),
            "max_length": sources[0].config.max_length,
            "dtype": sources[0].config.dtype,
            "quantization": quantization,
            "tolerance": TOLERANCES[sources[0].config.dtype],
            "platforms": list(PLATFORMS),
            "versions": versions(),
            "bytes": {
                "weights": weights.num_bytes,
                "saved_by_sharing": weights.num_shared_bytes,
            },
            "files": files_of(directory),
        }
        # The programs are tried as a server loads them; their results complete the manifest.
        write_json(directory / runner.MANIFEST, manifest)
        artifact = runner.Artifact(directory)
        for source in sources:
            entry = manifest["models"][source.name]
            model = artifact.load(source.name)
            entry["against_checkpoint"] = _write_reference(
                source, model, directory / entry["reference"], loaded.size, quantization
            )
            progress(f"reference of {source.name}")
            if source.name in caches:
                entry |= scores.described(model, source.checkpoint, caches[source.name], evaluate)
                progress(f"score of {source.name}")
        manifest["files"] = files_of(directory)
        write_json(directory / runner.MANIFEST, manifest)
    return summarize(out, sources, manifest)


def artifact_vocabulary(source: Source, spec: str | None) -> Vocabulary:
    """Loads the vocabulary that a checkpoint was trained with.

    Raises:
      InputError: If its files are not there, or are others.
    """
    record = source.checkpoint.vocabulary()
    try:
        loaded = load_vocabulary(spec or record["spec"])
    except InputError as error:
        raise InputError(
            f"An artifact carries its vocabulary, got {source.checkpoint} with "
            f"{record['spec']!r} ({error}): give its files with --vocabulary."
        ) from None
    if loaded.hash != record["hash"]:
        raise InputError(
            f"An artifact needs the vocabulary of its checkpoint ({record['hash'][:12]}), got "
            f"{loaded.spec} ({loaded.hash[:12]}): give its files with --vocabulary."
        )
    return loaded


def write_vocabulary(vocabulary: Vocabulary, directory: Path) -> dict[str, Any]:
    """Copies a vocabulary's files into an artifact; returns its record, `spec` relative to it."""
    record = {**vocabulary.describe(), "eos_id": vocabulary.eos_id, "pad_id": vocabulary.pad_id}
    if vocabulary.spec == "bytes":
        return record
    folder = directory / "vocabulary"
    folder.mkdir()
    names = []
    for path in map(Path, vocabulary.spec.split(",")):
        shutil.copyfile(path, folder / path.name)
        names.append(f"vocabulary/{path.name}")
    return {**record, "spec": ",".join(names)}


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


def _entry(source: Source, weights: SharedWeights, programs: dict[str, str]) -> dict[str, Any]:
    """What the manifest says of a model before it has run."""
    checkpoint = source.checkpoint
    return {
        "task": scores.task_of(checkpoint),
        "prompt": None,
        "config": source.config.to_dict(),
        "checkpoint": {
            "name": Path(checkpoint.directory).name,
            "step": checkpoint.step,
            "fingerprint": layout.fingerprint(source.reader),
            "bytes": checkpoint_bytes(source),
        },
        "provenance": checkpoint.provenance(),
        "scores": None,
        "programs": programs,
        "weights": weights.tensors[source.name],
        "expert_map": {
            f"layers_{layer}": row for layer, row in weights.expert_maps[source.name].items()
        },
        "reference": f"reference/{source.name}.npz",
    }


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
    limit = TOLERANCES[source.config.dtype]["same_platform"]
    if quantization is None and not runner.is_alike(found, limit):
        raise RuntimeError(
            f"The programs of {source.name} must reproduce {source.checkpoint} to {limit:g}, got a "
            f"difference of {found['difference']:g} with the same experts in "
            f"{100 * found['same_rows']:.0f} % of the rows."
        )
    kept = expected if quantization is None else outputs
    arrays: dict[str, Any] = {f"in/{name}": array for name, array in inputs.items()}
    arrays |= {f"out/{name}": array for name, array in kept.items()}
    np.savez(path, **arrays)
    return found


def versions() -> dict[str, Any]:
    """Returns what an artifact was made with."""
    return {
        "uncurl_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "platform": jax.default_backend(),
    }


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns {path: {"sha256", "bytes"}} of an artifact's files but the manifest."""
    return {
        path.relative_to(directory).as_posix(): {
            "sha256": sha256_of_file(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != runner.MANIFEST
    }


def summarize(
    out: str | os.PathLike[str], sources: list[Source], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Returns what the command prints of an artifact: sizes before and after, and scores."""
    before = [manifest["models"][source.name]["checkpoint"]["bytes"] for source in sources]
    return {
        "out": os.fspath(out),
        "format": manifest["format"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "checkpoint_bytes": {
            kind: sum(sizes[kind] for sizes in before) for kind in ("parameters", "on_disk")
        },
        "saved_by_sharing_bytes": manifest["bytes"]["saved_by_sharing"],
        "models": {
            name: {
                key: entry[key] for key in ("task", "against_checkpoint", "scores") if key in entry
            }
            for name, entry in manifest["models"].items()
        },
    }
