"""Saving checkpoints while training goes on, and restoring them on any set of devices.

Works the same in one process and under `jax.distributed`: then every process makes the store and
calls `save` at the same steps, the directory is shared, and arrays may span processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from uncurl_jax.checkpoints import layout, parameters
from uncurl_jax.checkpoints.record import Record
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

# Orbax moves the steps to delete here with one rename; the files go afterwards. Deleted in place,
# a step would keep its name while its files disappear, and a kill would leave such a step behind.
_DELETED_DIRECTORY = ".deleted"


class Restored(NamedTuple):
    """A checkpoint in memory.

    Attributes:
      step: number of the step.
      params: tree of arrays like `abstract_params`.
      param_states: tree like `abstract_param_states`, None if that was None.
    """

    step: int
    params: Any
    param_states: Any


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves the question of preemption to the training loop.

    Every question is counted by JAX's preemption service (see training.preemption). Orbax asks too,
    with the number of the step and partly from a background thread of the first process: processes
    would disagree on where to stop.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class CheckpointStore:
    """A checkpoint directory that a training run writes to; a context manager.

    Saves run in the background. A step appears under its name by one rename when it is whole, so
    a kill leaves either the step or a directory that `layout.resolve` does not accept (the next
    store that is made on the directory removes it). Arrays [expert, ...] are stored with one
    chunk per expert, so that one expert can be read without the others.
    """

    def __init__(
        self,
        directory: layout.PathLike,
        *,
        model_config: ModelConfig,
        provenance: Mapping[str, Any],
        vocabulary: Mapping[str, Any],
        max_to_keep: int | None = None,
    ):
        """Opens or makes the directory.

        Args:
          directory: C, local or gs://; made if it does not exist. If it holds a checkpoint of the
            same model and vocabulary, saving goes on there.
          model_config: the architecture; `save` accepts its parameters only.
          provenance: JSON-compatible record of where the weights come from; kept as first written
            when saving goes on in an existing directory.
          vocabulary: {"name", "spec", "size", "hash"} of the tokeniser.
          max_to_keep: how many of the latest steps stay; None keeps all.

        Raises:
          InputError: If the directory holds something else, or another model or vocabulary.
        """
        if max_to_keep is not None and max_to_keep < 1:
            raise InputError(f"max_to_keep must be at least 1, or None for all, got {max_to_keep}.")
        record = Record(model_config, provenance, vocabulary)
        self.directory = epath.Path(directory)
        if not layout.is_remote(self.directory):
            self.directory = self.directory.resolve()
        self._expected = parameters.expected_parameters(model_config)
        is_new = record.check_directory(self.directory)
        # No process may look at the directory after another one has begun to fill it.
        ocp.multihost.sync_global_processes("uncurl_jax:checkpoint_store:checked")
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            if is_new:
                record.write(self.directory)
            for leftover in layout.unfinished_directories(self.directory):
                leftover.rmtree(missing_ok=True)
            self._purge_deleted()
        ocp.multihost.sync_global_processes("uncurl_jax:checkpoint_store:ready")
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                step_prefix=layout.CHECKPOINT_PREFIX,
                max_to_keep=max_to_keep,
                todelete_subdir=_DELETED_DIRECTORY,
                save_root_metadata=False,
            ),
            item_names=(layout.STATE_ITEM,),
            item_handlers={layout.STATE_ITEM: _handler()},
        )

    def save(self, step: int, params: Any, param_states: Any = None) -> None:
        """Starts to save a step and returns when the arrays have been copied off the devices.

        Waits for the save before, if that is still running, and raises what went wrong in it.

        Args:
          step: number of the step, above every step that the directory holds.
          params: nested dicts of jax or numpy arrays, in the shapes of the model configuration.
          param_states: nested dicts of arrays, scalars and empty dicts: the optimizer's state.

        Raises:
          InputError: If the parameters are not the model's, or the step is not a new one.
        """
        _check_parameters(params, self._expected)
        latest = self._manager.latest_step()
        if step < 0 or (latest is not None and step <= latest):
            raise InputError(
                f"A step to save must be at least 0 and above the steps saved before, got {step} "
                f"for {self.directory} which holds step {latest}: use another directory."
            )
        state: dict[str, Any] = {"step": np.int32(step)}
        if param_states is not None:
            state["param_states"] = param_states
        tree = {layout.TARGET: params, "state": state}
        arguments = ocp.args.PyTreeSave(
            tree, save_args=jax.tree_util.tree_map_with_path(_save_args, tree)
        )
        # `force`: every call saves, also during a preemption or at any interval.
        self._manager.save(
            step, args=ocp.args.Composite(**{layout.STATE_ITEM: arguments}), force=True
        )
        self._purge_deleted()

    def wait(self) -> None:
        """Returns when every save has been committed; raises what went wrong in one."""
        self._manager.wait_until_finished()
        self._purge_deleted()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self.wait()
        self._manager.close()
        deleted = self.directory / _DELETED_DIRECTORY
        if jax.process_index() == 0 and deleted.exists():
            deleted.rmdir()

    def latest_step(self) -> int | None:
        """Returns the latest step that is saved to the end, None if there is none."""
        steps = layout.finished_steps(self.directory)
        return steps[-1] if steps else None

    def _purge_deleted(self) -> None:
        deleted = self.directory / _DELETED_DIRECTORY
        if jax.process_index() == 0 and deleted.exists():
            for step_directory in deleted.iterdir():
                step_directory.rmtree(missing_ok=True)

    def __enter__(self) -> CheckpointStore:
        """Returns the store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the running save and closes the store."""
        self.close()


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _save_args(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
    if parameters.is_expert_array(_name(path)) and np.ndim(leaf) > 1:
        return ocp.SaveArgs(shard_axes=(0,))
    return ocp.SaveArgs()


def _check_parameters(params: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {
        _name(path): tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    problems = parameters.differences(shapes, expected)
    if problems:
        raise InputError(
            "Parameters to save must be those of the model configuration (experts without "
            f"padding), got {parameters.listed(problems)}."
        )


def restore(
    path: layout.PathLike | layout.CheckpointPath,
    *,
    abstract_params: Any,
    abstract_param_states: Any = None,
) -> Restored:
    """Reads a checkpoint, whatever devices it was written from.

    Args:
      path: as for `layout.resolve`.
      abstract_params: tree of `jax.ShapeDtypeStruct` (or arrays). A leaf with a `sharding` becomes
        a `jax.Array` on it, each process reading only its own parts; one without becomes a numpy
        array, whole in every process. Values are cast to the leaf's dtype.
      abstract_param_states: the same for the optimizer's state, may hold Python scalars and
        empty dicts; None leaves the state unread.

    Raises:
      InputError: If the checkpoint's arrays are not those of the trees; lists the differences.
    """
    reader = layout.open_reader(path)
    wanted: dict[str, Any] = {layout.TARGET: abstract_params}
    if abstract_param_states is not None:
        wanted["state"] = {"param_states": abstract_param_states}
    entries, structure = jax.tree_util.tree_flatten_with_path(wanted)
    leaves = {_name(path): leaf for path, leaf in entries}
    _check_restorable(reader, leaves, with_states=abstract_param_states is not None)

    if isinstance(reader, layout.StateReader):
        values = _restore_with_orbax(reader, leaves)
    else:
        arrays = reader.stream((name, None) for name in leaves)
        values = [_placed(*pair) for pair in zip(arrays, leaves.values(), strict=True)]
    tree = jax.tree_util.tree_unflatten(structure, values)
    param_states = tree["state"]["param_states"] if abstract_param_states is not None else None
    return Restored(reader.checkpoint.step, tree[layout.TARGET], param_states)


def _restore_with_orbax(reader: layout.StateReader, leaves: Mapping[str, Any]) -> list[Any]:
    # Orbax sees the arrays alone; empty dicts come back with the tree's structure.
    item: dict[str, Any] = {}
    restore_args: dict[str, Any] = {}
    for name, leaf in leaves.items():
        _set(item, name, leaf)
        _set(restore_args, name, _restore_args(leaf))
    with ocp.Checkpointer(_handler()) as checkpointer:
        restored = checkpointer.restore(
            reader.checkpoint.state_dir,
            args=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True),
        )
    return [_get(restored, name) for name in leaves]


def _placed(array: np.ndarray, leaf: Any) -> Any:
    """Casts an array, and puts it where the leaf says it is to be."""
    array = array.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def _check_restorable(
    reader: layout.ArrayReader, leaves: Mapping[str, Any], *, with_states: bool
) -> None:
    prefixes = (f"{layout.TARGET}/", "state/param_states/" if with_states else f"{layout.TARGET}/")
    stored = {
        name: entry.shape for name, entry in reader.metadata.items() if name.startswith(prefixes)
    }
    expected = {name: tuple(np.shape(leaf)) for name, leaf in leaves.items()}
    problems = parameters.differences(stored, expected)
    if problems:
        raise InputError(
            f"A checkpoint must hold the arrays of the model to restore, got {reader.checkpoint} "
            f"with {parameters.listed(problems)}: use the configuration that it was trained with."
        )


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, bool | int | float):
        return ocp.RestoreArgs(restore_type=type(leaf))
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _get(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for key in name.split("/"):
        value = value[key]
    return value
