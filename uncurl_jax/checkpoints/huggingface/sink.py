"""Builds a Hugging Face directory piece by piece."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from uncurl_jax.artifacts import write_json
from uncurl_jax.checkpoints import companions, layout, pruned
from uncurl_jax.checkpoints.huggingface.directory import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from uncurl_jax.checkpoints.huggingface.family import Entry
from uncurl_jax.checkpoints.huggingface.tensor_files import (
    TensorSpec,
    TensorWriter,
    create_file,
    read_header,
    shards,
)
from uncurl_jax.checkpoints.huggingface.translate import translate
from uncurl_jax.checkpoints.sinks import NewCheckpoint, Sink
from uncurl_jax.errors import InputError

# As save_pretrained of transformers 4 divides checkpoints.
MAX_SHARD_BYTES = 5 * 10**9


class _Synced(NamedTuple):
    """Stands for what has been written but may not be on disk yet."""

    writer: TensorWriter

    def result(self) -> None:
        self.writer.sync()


class HuggingFaceSink(Sink):
    """A directory of transformers."""

    def __init__(self, new: NewCheckpoint, max_shard_bytes: int):
        """Decides all names and sizes.

        Raises:
          InputError: If config.json cannot express the model, or one tensor would need two dtypes.
        """
        self._new = new
        original = companions.original_config(new.source)
        dtypes = {
            key: entry.dtype
            for key, entry in new.targets.items()
            if key.startswith(f"{layout.TARGET}/")
        }
        translated = translate(new.config, original, _usual_dtype(new))
        self._config = translated.hf_config
        entries = list(translated.family.entries(new.config))
        self._entries = {(entry.parameter, entry.expert): entry for entry in entries}
        self._shards = self._plan(entries, dtypes, max_shard_bytes)

    def _plan(
        self, entries: list[Entry], dtypes: Mapping[str, np.dtype], max_shard_bytes: int
    ) -> dict[str, list[TensorSpec]]:
        specs: dict[str, TensorSpec] = {}
        for entry in entries:
            dtype = dtypes[f"{layout.TARGET}/{entry.parameter}"]
            spec = specs.setdefault(entry.tensor, TensorSpec(entry.tensor, dtype, entry.shape))
            if spec.dtype != dtype:
                raise InputError(
                    f"Parameters that share a tensor must have one dtype, got {spec.dtype} and "
                    f"{dtype} in {entry.tensor} of {self._new.source}: export with --dtype."
                )
        ordered = sorted(specs.values(), key=lambda spec: _natural(spec.name))
        groups = shards(ordered, max_shard_bytes)
        if len(groups) == 1:
            return {WEIGHTS_FILE: groups[0]}
        return {
            f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
            for number, group in enumerate(groups, start=1)
        }

    def create(self, directory: epath.Path) -> None:
        """Makes the safetensors files and takes their space on the disk."""
        if layout.is_remote(directory):
            raise InputError(
                f"A Hugging Face directory is written to a file system, got {directory}: write it "
                "here and copy it."
            )
        found = {}
        for name, group in self._shards.items():
            found |= create_file(Path(directory) / name, group)
        self._writer = TensorWriter(found)

    def reopen(self, directory: epath.Path) -> None:
        """Goes on with the files that are there."""
        found = {}
        for name in self._shards:
            found |= read_header(Path(directory) / name)
        self._writer = TensorWriter(found)

    def write(self, arrays: Mapping[str, np.ndarray], index: int | None) -> Any:
        """Writes each array, turned to the way it is stored."""
        for key, array in arrays.items():
            entry = self._entries[key.removeprefix(f"{layout.TARGET}/"), index]
            shape = entry.part_shape
            if entry.is_transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            turned = array.reshape(shape)
            turned = turned.swapaxes(-1, -2) if entry.is_transposed else turned
            self._writer.write(entry.tensor, turned, entry.part)
        return _Synced(self._writer)

    def finish(self, directory: epath.Path, hashes: Mapping[str, Any]) -> None:
        """Writes the index, the companions and, last, config.json."""
        self._writer.close()
        path = Path(directory)
        if len(self._shards) > 1:
            specs = [(spec, name) for name, group in self._shards.items() for spec in group]
            index = {
                "metadata": {"total_size": sum(spec.num_bytes for spec, _ in specs)},
                "weight_map": {spec.name: name for spec, name in specs},
            }
            write_json(path / INDEX_FILE, index)
        companions.copy(self._new.source, directory, leave_out=(CONFIG_FILE,))
        write_json(path / layout.PROVENANCE_FILE, dict(self._new.provenance))
        write_json(path / pruned.HASHES_FILE, dict(hashes))
        write_json(path / CONFIG_FILE, dict(self._config))


def _usual_dtype(new: NewCheckpoint) -> str:
    """Returns the dtype of most numbers."""
    sizes: dict[str, int] = {}
    for key, (shape, dtype) in new.targets.items():
        if key.startswith(f"{layout.TARGET}/"):
            sizes[dtype.name] = sizes.get(dtype.name, 0) + math.prod(shape)
    return max(sizes, key=lambda name: sizes[name])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
