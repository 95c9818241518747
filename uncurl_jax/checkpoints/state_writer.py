"""Writes the arrays of a checkpoint one expert at a time, in the files that Orbax makes.

Orbax saves trees of whole arrays. Here it saves the tree once with one number for each array, which
gives all files and the settings that it and T5X read; then tensorstore puts the arrays in place,
each piece with one atomic commit to the same OCDBT database.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore as ts
from etils import epath

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.parameters import is_expert_array


def create_state(step_directory: epath.Path, targets: Mapping[str, layout.ArrayMetadata]) -> None:
    """Makes the files of a step whose arrays have no values yet.

    Args:
      step_directory: `checkpoint_<step>`; must not exist.
      targets: {key: (shape, dtype)} of the arrays. [expert, ...] arrays get one chunk per expert.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = True
    context.array.saving.use_zarr3 = False
    with context:
        ocp.partial.save(
            step_directory,
            nested({key: np.zeros((1,) * len(e.shape), e.dtype) for key, e in targets.items()}),
        )
        ocp.partial.finalize(step_directory)
    store = ts.KvStore.open(_kvstore(step_directory)).result()
    headers = {key: store.read(f"{_path(key)}.zarray") for key in targets}
    transaction = ts.Transaction()
    store = store.with_transaction(transaction)
    for key, (shape, _) in targets.items():
        chunks = list(shape)
        if is_expert_array(key) and len(shape) > 1:
            chunks[0] = 1
        header = {**json.loads(headers[key].result().value), "shape": list(shape), "chunks": chunks}
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))  # as tensorstore does
        store.write(f"{_path(key)}.zarray", text.encode()).result()
        store.write(_path(key) + (".".join("0" * len(shape)) or "0"), None).result()
    transaction.commit_async().result()


class StateWriter:
    """Puts values into the arrays of a step that `create_state` made."""

    def __init__(self, step_directory: epath.Path):
        """Opens the step."""
        # Nothing that has been written is read again.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._kvstore = _kvstore(step_directory)
        self._arrays: dict[str, Any] = {}

    def write(self, arrays: Mapping[str, np.ndarray], index: int | None = None) -> Any:
        """Starts to write arrays with one atomic commit; they must not be changed meanwhile.

        Args:
          arrays: {key: array}.
          index: the entry of the first axis that they are, None for whole arrays.

        Returns:
          A future that is done when the values are on disk; `result()` raises what went wrong.
        """
        return self.write_pieces((key, index, array) for key, array in arrays.items())

    def write_pieces(self, pieces: Iterable[tuple[str, int | None, np.ndarray]]) -> Any:
        """The same for pieces (key, index, array) of any arrays."""
        transaction = ts.Transaction()
        for key, index, array in pieces:
            target = self._open(key).with_transaction(transaction)
            target = target if index is None else target[index]
            target.write(array, can_reference_source_data_indefinitely=True).copy.result()
        return transaction.commit_async()

    def _open(self, key: str) -> Any:
        if key not in self._arrays:
            spec = {
                "driver": "zarr",
                "kvstore": {**self._kvstore, "path": _path(key)},
                # As Orbax does: a chunk of zeros is there like any other.
                "store_data_equal_to_fill_value": True,
            }
            opened = ts.open(spec, open=True, write=True, context=self._context)
            self._arrays[key] = opened.result()
        return self._arrays[key]


def remove_unreferenced(step_directory: epath.Path) -> int:
    """Removes the data files that interrupted commits left; returns their bytes.

    No other process may write to the step. Earlier versions of the database can then no longer be
    read; nobody does.
    """
    state = step_directory / layout.STATE_ITEM
    base = ts.KvStore.open(f"file://{os.fspath(state)}/").result()
    manifest = ts.ocdbt.dump(base).result()
    files: set[str] = set()
    # Versions: their nodes stay, since the next commit may read them, but not what they hold.
    nodes = list(_locations(manifest))
    while nodes:
        location = nodes.pop()
        files.add(_file_of(location))
        if location.startswith("versionnode:"):
            nodes += _locations(ts.ocdbt.dump(base, location).result())
    nodes = [manifest["versions"][-1]["root"]["location"]] if manifest["versions"] else []
    while nodes:
        location = nodes.pop()
        files.add(_file_of(location))
        if location.startswith("btreenode:"):
            nodes += _locations(ts.ocdbt.dump(base, location).result())
    removed = 0
    for path in [*(state / "d").iterdir(), *state.glob("*.__lock")]:
        if f"d/{path.name}" not in files:
            removed += path.stat().length
            path.unlink()
    return removed


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def num_elements(targets: Mapping[str, layout.ArrayMetadata]) -> int:
    """Returns how many numbers the arrays hold."""
    return sum(math.prod(entry.shape) for entry in targets.values())


def num_bytes(targets: Mapping[str, layout.ArrayMetadata]) -> int:
    """Returns the bytes of the arrays, uncompressed."""
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in targets.values())


def _kvstore(step_directory: epath.Path) -> dict[str, Any]:
    state = os.fspath(step_directory / layout.STATE_ITEM)
    return {
        "driver": "ocdbt",
        "base": f"{state if layout.is_remote(state) else f'file://{state}'}/",
    }


def _path(key: str) -> str:
    return f"{key.replace('/', '.')}/"


def _locations(value: Any) -> list[str]:
    """Returns all locations in a dumped node, such as "btreenode::d/<file>:<offset>:<bytes>"."""
    if isinstance(value, dict):
        names = ("location", "indirect_value")
        found = [value[name] for name in names if isinstance(value.get(name), str)]
        return found + [item for child in value.values() for item in _locations(child)]
    if isinstance(value, list | tuple):
        return [item for child in value for item in _locations(child)]
    return []


def _file_of(location: str) -> str:
    return location.split(":", 2)[2].rsplit(":", 2)[0]
