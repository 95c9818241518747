"""Writes safetensors files: eight bytes of length, a JSON header, then the arrays' bytes.

The format is that of https://github.com/huggingface/safetensors#format; `runner.read_tensors`
reads it back with numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax.export.runner import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
SHARD_BYTES = 2**30


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of the dtypes bfloat16, float32, int8 and int32 to one file."""
    header: dict[str, Any] = {}
    place = 0
    for name, array in tensors.items():
        entry = {"dtype": _NAMES[array.dtype], "shape": list(array.shape)}
        header[name] = {**entry, "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for array in tensors.values():
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class TensorWriter:
    """Writes arrays as they come, to files of about a gibibyte; holds one file in memory.

    Attributes:
      shapes: {name: (shape, dtype)} of everything added.
      num_bytes: of all arrays.
    """

    def __init__(self, directory: Path):
        """Makes the directory."""
        self._directory = directory
        directory.mkdir(parents=True)
        self._pending: dict[str, np.ndarray] = {}
        self._num_files = 0
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.num_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds an array under a new name."""
        self._pending[name] = array
        self.shapes[name] = (array.shape, array.dtype)
        self.num_bytes += array.nbytes
        if sum(held.nbytes for held in self._pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added since the last file."""
        if self._pending:
            self._num_files += 1
            path = self._directory / f"{self._num_files:05}.safetensors"
            write_tensors(path, self._pending)
            self._pending = {}


class MemoryWriter:
    """Takes arrays as `TensorWriter` does and keeps them.

    Attributes:
      arrays: {name: array}.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self.arrays: dict[str, np.ndarray] = {}

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{name: (shape, dtype)} of everything added."""
        return {name: (array.shape, array.dtype) for name, array in self.arrays.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds an array under a new name."""
        self.arrays[name] = array

    def flush(self) -> None:
        """Does nothing: everything is where it stays."""
