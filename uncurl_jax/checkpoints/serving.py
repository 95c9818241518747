"""Arrays for other servers: an Orbax directory of parameters alone, restored array by array.

The directory is what `orbax.checkpoint.PyTreeCheckpointer` reads (OCDBT and zarr v2), with one
chunk per expert; keys are the parameters' names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.state_writer import (
    StateWriter,
    create_state,
    nested,
    remove_unreferenced,
)

_FOLDER = "params"
_COMMIT_BYTES = 2**28


def write_arrays(
    directory: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, int | None, np.ndarray]],
) -> str:
    """Writes arrays a piece at a time.

    Args:
      directory: gets the folder that is returned.
      shapes: {name: (shape, dtype)}, names with "/" between their parts.
      arrays: (name, place along the first axis or None for the whole array, values); must give
        every array whole.

    Returns:
      The folder for Orbax, relative to the directory.
    """
    step = epath.Path(os.path.abspath(directory / _FOLDER))
    targets = {name: layout.ArrayMetadata(*shape) for name, shape in shapes.items()}
    create_state(step, targets)
    writer = StateWriter(step)
    # Each commit rewrites a part of the database's index, so one takes many pieces.
    pending: list[tuple[str, int | None, np.ndarray]] = []
    for piece in arrays:
        pending.append(piece)
        if sum(array.nbytes for _, _, array in pending) >= _COMMIT_BYTES:
            writer.write_pieces(pending).result()
            pending = []
    writer.write_pieces(pending).result()
    remove_unreferenced(step)
    return f"{_FOLDER}/{layout.STATE_ITEM}"


def restore_arrays(
    directory: str | os.PathLike[str], abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """Restores arrays, each device reading its own parts.

    Args:
      directory: the folder for Orbax.
      abstract: {name: ShapeDtypeStruct with a sharding}.

    Returns:
      The tree of arrays, nested by the parts of their names.
    """
    tree = nested(abstract)

    def arguments(leaf: Any) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        return checkpointer.restore(
            os.path.abspath(directory),
            args=ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(arguments, tree)),
        )
