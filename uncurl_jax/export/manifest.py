"""What the manifests of all formats say, and the files that all of them hold."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from uncurl_jax import __version__
from uncurl_jax.artifacts import refuse_existing, sha256_of_file
from uncurl_jax.checkpoints import layout
from uncurl_jax.data.huggingface_vocabulary import SETTINGS_FILES, TOKENIZER_FILE
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.export import runner, scores
from uncurl_jax.export.quantization import INT8
from uncurl_jax.export.reference import TOLERANCES
from uncurl_jax.export.sources import (
    Progress,
    SharedWeights,
    Source,
    checkpoint_bytes,
    open_sources,
)

_VOCABULARY = "vocabulary"


class Prepared(NamedTuple):
    """What an export works on, checked.

    Attributes:
      sources: the checkpoints.
      vocabulary: of all of them.
      caches: {name of the model: token cache} to score on.
    """

    sources: list[Source]
    vocabulary: Vocabulary
    caches: dict[str, TokenCache]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What all formats know.

    Attributes:
      dtype: compute dtype of the models when they are served; their own by default.
      max_length: most tokens of a prompt and its continuation; the models' own by default.
      quantization: "int8" for the kernels of experts, None for none.
      caches: {name of the model: token cache} to score what is exported on.
      evaluate: scores a model in memory, for the score of the checkpoint itself.
      vocabulary: spec of the vocabulary, if its files have moved.
      progress: called with the name of each part that is done.
    """

    dtype: str | None = None
    max_length: int | None = None
    quantization: str | None = None
    caches: Mapping[str, TokenCache] = dataclasses.field(default_factory=dict)
    evaluate: scores.Evaluate | None = None
    vocabulary: str | None = None
    progress: Progress = lambda _: None

    def __post_init__(self):
        if self.quantization not in (None, INT8):
            raise InputError(f'quantization must be "{INT8}", or None, got {self.quantization!r}.')


def prepare(
    checkpoints: Mapping[str, layout.PathLike], out: str | os.PathLike[str], options: ExportOptions
) -> Prepared:
    """Opens and checks everything before any work.

    Args:
      checkpoints: {name of the model: checkpoint}.
      out: directory to make.
      options: of the export.

    Raises:
      InputError: If the output exists, the checkpoints cannot share an artifact, or vocabulary or
        token caches do not belong to them.
    """
    refuse_existing(out)
    sources = open_sources(checkpoints, dtype=options.dtype, max_length=options.max_length)
    vocabulary = artifact_vocabulary(sources[0], options.vocabulary)
    for cache in options.caches.values():
        scores.check_cache(cache, sources[0].config.max_length, vocabulary.hash)
    return Prepared(sources, vocabulary, dict(options.caches))


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
    """Copies a vocabulary's files into an artifact.

    Returns:
      Its record: `spec` relative to the artifact, and the ids that pad, begin (None if nothing
      does) and end a text.
    """
    record = {
        **vocabulary.describe(),
        "pad_id": vocabulary.pad_id,
        "bos_id": vocabulary.bos_id,
        "eos_id": vocabulary.eos_id,
    }
    if vocabulary.spec == "bytes":
        return record
    folder = directory / _VOCABULARY
    folder.mkdir()
    if Path(vocabulary.spec).is_dir():
        for name in (TOKENIZER_FILE, *SETTINGS_FILES):
            if (Path(vocabulary.spec) / name).is_file():
                shutil.copyfile(Path(vocabulary.spec) / name, folder / name)
        return {**record, "spec": _VOCABULARY}
    names = []
    for path in map(Path, vocabulary.spec.split(",")):
        shutil.copyfile(path, folder / path.name)
        names.append(f"{_VOCABULARY}/{path.name}")
    return {**record, "spec": ",".join(names)}


def model_entry(source: Source) -> dict[str, Any]:
    """Returns what every format's manifest says of a model before it has run."""
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
        "reference": f"reference/{source.name}.npz",
    }


def shared_entry(source: Source, weights: SharedWeights) -> dict[str, Any]:
    """Returns where a model's weights are among those that models share."""
    maps = weights.expert_maps[source.name]
    return {
        "weights": weights.tensors[source.name],
        "expert_map": {f"layers_{layer}": row for layer, row in maps.items()},
    }


def common_fields(sources: Sequence[Source], quantization: str | None) -> dict[str, Any]:
    """Returns the fields of a manifest that do not depend on the format."""
    config = sources[0].config
    return {
        "max_length": config.max_length,
        "dtype": config.dtype,
        "quantization": quantization,
        "tolerance": TOLERANCES[config.dtype],
        "versions": versions(),
    }


def write_reference(
    path: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> None:
    """Writes the reference inputs and outputs of a model."""
    path.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {f"in/{name}": array for name, array in inputs.items()}
    arrays |= {f"out/{name}": array for name, array in outputs.items()}
    np.savez(path, **arrays)


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
        "saved_by_sharing_bytes": manifest.get("saved_by_sharing_bytes", 0),
        "models": {
            name: {
                key: entry[key] for key in ("task", "against_checkpoint", "scores") if key in entry
            }
            for name, entry in manifest["models"].items()
        },
    }
