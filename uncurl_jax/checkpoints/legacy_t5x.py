"""Reads steps in T5X's older layout, array by array, without T5X.

T5X wrote it before it saved through Orbax (t5x.checkpoints.Checkpointer, versions 2 and 3):

    checkpoint_<step>/checkpoint                  msgpack: {version, optimizer: {target, state}}
    checkpoint_<step>/target.<name>.<name>/       a zarr v2 array for each larger parameter

The msgpack file holds small arrays themselves, and for the others the tensorstore spec with which
they were written. The names of its tree are the parameters' names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from uncurl_jax.checkpoints import layout
from uncurl_jax.errors import InputError

_FILE = "checkpoint"
_VERSIONS = (2, 3)


def is_legacy_step(step_directory: epath.Path) -> bool:
    """Whether a `checkpoint_<step>` directory is in the older layout."""
    return (step_directory / _FILE).is_file()


class LegacyReader:
    """The parameters of one step in the older layout; the optimizer's state stays unread.

    Attributes:
      metadata: {name without "target/": (shape, dtype)}, sorted by name.
    """

    def __init__(self, step_directory: epath.Path):
        """Opens the step.

        Raises:
          InputError: If its file is damaged or of another version.
        """
        self._directory = step_directory
        contents = self._read_file()
        self._version = int(contents.get("version", 0))
        if self._version not in _VERSIONS:
            raise InputError(
                f"A step in T5X's older layout must be of version 2 or 3, got {self._version} in "
                f"{step_directory}: restore and save it with T5X."
            )
        target = contents.get("optimizer", {}).get("target")
        if not isinstance(target, dict):
            raise InputError(
                f"A step in T5X's older layout must hold optimizer/target, got "
                f"{sorted(contents)} in {step_directory}: it is of another program."
            )
        self._leaves = dict(sorted(_flat(target).items()))
        self.metadata = {name: self._describe(name) for name in self._leaves}

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Reads one parameter, or its part `index` along the first axis.

        Raises:
          InputError: If its files are damaged or missing.
        """
        leaf = self._leaves[name]
        array: Any = self._open(name) if _is_spec(leaf) else np.asarray(leaf)
        array = array if index is None else array[index]
        array = np.asarray(array.read().result() if _is_spec(leaf) else array)
        return array.view(ml_dtypes.bfloat16) if self._is_disguised(array.dtype) else array

    def _read_file(self) -> dict[str, Any]:
        path = self._directory / _FILE
        try:
            contents = flax.serialization.msgpack_restore(path.read_bytes())
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise InputError(
                f"{path} must be the msgpack file that T5X wrote, got {error or 'another file'}: "
                "copy it again."
            ) from None
        if not isinstance(contents, dict):
            raise InputError(f"{path} must hold a dictionary, got {type(contents).__name__}.")
        return contents

    def _describe(self, name: str) -> layout.ArrayMetadata:
        leaf = self._leaves[name]
        if _is_spec(leaf):
            array = self._open(name)
            shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
        else:
            shape, dtype = np.shape(leaf), np.asarray(leaf).dtype
        if self._is_disguised(dtype):
            dtype = np.dtype(ml_dtypes.bfloat16)
        return layout.ArrayMetadata(tuple(shape), dtype)

    def _is_disguised(self, dtype: np.dtype) -> bool:
        """Version 2 wrote the bits of bfloat16 as uint16."""
        return self._version == 2 and dtype == np.uint16

    def _open(self, name: str) -> Any:
        # Where the array was when it was written does not count: it lies beside the file.
        folder = str(self._leaves[name]["kvstore"].get("path", "")).rstrip("/").split("/")[-1]
        place = os.fspath(self._directory / folder)
        url = place if layout.is_remote(place) else f"file://{place}"
        try:
            return ts.open({"driver": "zarr", "kvstore": f"{url}/"}, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise InputError(
                f"Every array of a checkpoint must be readable, got {name} of {self._directory} "
                f"with {str(error).splitlines()[0]}: copy it again."
            ) from error


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, dict)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a/b": leaf}; a tensorstore spec is a leaf."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not {"driver", "kvstore"} <= value.keys():
            found |= _flat(value, f"{name}/")
        else:
            found[name] = value
    return found
