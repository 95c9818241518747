"""Device mesh, logical axis names, and the one table that maps names to mesh axes.

Logical axes are T5X's words: batch, length, embed, mlp, heads, kv, vocab, expert, expert_mlp,
unmodeled. Mesh axes are (data, expert, model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uncurl_jax.errors import InputError

MESH_AXES = ("data", "expert", "model")
TOKEN_AXES = ("data", "expert")

# Mesh axes over which each layer's experts are divided, one entry per layer (dense ones too):
# ("expert",), ("data", "expert"), ("data",), or () for experts that every device holds whole.
# None stands for ("expert",) everywhere.
ExpertAxes = tuple[tuple[str, ...], ...]

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": TOKEN_AXES,
    "length": None,
    "embed": None,
    "mlp": "model",
    "heads": "model",
    "kv": None,
    "vocab": "model",
    "expert": "expert",
    "expert_mlp": "model",
    "unmodeled": None,
}


def make_mesh(
    *, expert_partitions: int = 1, model_partitions: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a (data, expert, model) mesh; what the two counts leave over goes to data.

    Args:
      expert_partitions: devices among which the experts of a layer are divided.
      model_partitions: devices among which heads and hidden units are divided.
      devices: all devices of all processes by default. They are ordered by process, so that each
        process holds a contiguous part of the batch.

    Raises:
      InputError: If the two counts do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: device.process_index)
    group = expert_partitions * model_partitions
    if expert_partitions < 1 or model_partitions < 1 or len(devices) % group:
        raise InputError(
            "expert_partitions * model_partitions must divide the number of devices, got "
            f"{expert_partitions} * {model_partitions} on {len(devices)} devices: choose divisors."
        )
    shape = (len(devices) // group, expert_partitions, model_partitions)
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of devices along one mesh axis or a product of several."""
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[name] for name in names]))


def layer_expert_axes(expert_axes: ExpertAxes | None, layer: int) -> tuple[str, ...]:
    """The mesh axes over which one layer's experts are divided."""
    return ("expert",) if expert_axes is None else expert_axes[layer]


def check_expert_axes(expert_axes: ExpertAxes | None, num_layers: int) -> None:
    """Checks that there is an entry for each layer, made of token axes in the mesh's order.

    Raises:
      InputError: If not.
    """
    if expert_axes is None:
        return
    if len(expert_axes) != num_layers:
        raise InputError(
            f"expert_axes must have one entry per layer, got {len(expert_axes)} for {num_layers} "
            "layers: make the placement for this model."
        )
    for layer, axes in enumerate(expert_axes):
        if tuple(axes) != tuple(axis for axis in TOKEN_AXES if axis in axes):
            raise InputError(
                f"expert_axes[{layer}] must hold some of {', '.join(TOKEN_AXES)} in this order, "
                f"got {', '.join(axes)}."
            )


def parameter_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    expert_axes: tuple[str, ...] = ("expert",),
) -> PartitionSpec:
    """Maps one array's logical axis names to a PartitionSpec that its shape can take.

    A mesh axis that does not divide its dimension is left out there. If that was the experts'
    dimension (5 experts on 4 devices), `expert_axes` divide another dimension instead, so that
    storage stays divided; the layer pads the experts when it computes.
    """
    mapped = {**LOGICAL_TO_MESH, "expert": expert_axes or None}
    wanted = [mapped[name] if name else None for name in names]
    spec: list[Any] = [
        axes if axes and size % axis_size(mesh, axes) == 0 else None
        for axes, size in zip(wanted, shape, strict=True)
    ]
    if expert_axes and expert_axes in wanted and expert_axes not in spec:
        for dimension in range(len(shape) - 1, 0, -1):
            if spec[dimension] is None and shape[dimension] % axis_size(mesh, expert_axes) == 0:
                spec[dimension] = expert_axes
                break
    return PartitionSpec(*(_bare(axes) for axes in spec))


def _bare(axes: Any) -> Any:
    """One axis by its name alone: a spec compares equal only to one written the same way."""
    return axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(TOKEN_AXES))


def check_batch_size(batch_size: int, mesh: Mesh | None) -> None:
    """Checks that a global batch of so many rows can be put on the mesh, each process its part.

    Raises:
      InputError: If the rows do not divide evenly among the devices that hold tokens, or devices
        that hold the same rows belong to different processes.
    """
    if mesh is None:
        return
    shards = axis_size(mesh, TOKEN_AXES)
    if batch_size % shards:
        raise InputError(
            f"batch_size must be a multiple of data * expert partitions, got {batch_size} on "
            f"{shards}: choose a multiple of {shards}."
        )
    for devices in mesh.devices.reshape(shards, -1):
        if len({device.process_index for device in devices}) > 1:
            raise InputError(
                f"model_partitions must divide the devices of each process, got "
                f"{mesh.shape['model']} across processes: choose a divisor."
            )


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a pytree of numpy arrays [batch, ...] on the mesh, divided by its first axis.

    With several processes each passes its own contiguous part of the global batch.

    Raises:
      InputError: As `check_batch_size`.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = batch_sharding(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})

    def place(array: np.ndarray) -> jax.Array:
        check_batch_size(array.shape[0] * processes, mesh)
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(place, batch)


def local_rows(batch: Any) -> Any:
    """Returns this process's contiguous part of a batch that every process holds whole.

    Raises:
      InputError: If the rows do not divide evenly among the processes.
    """
    count, index = jax.process_count(), jax.process_index()

    def part(array: np.ndarray) -> np.ndarray:
        rows = len(array)
        if rows % count:
            raise InputError(
                f"A batch must divide evenly among processes, got {rows} rows for {count}: choose "
                "a multiple."
            )
        return array[index * rows // count : (index + 1) * rows // count]

    return jax.tree.map(part, batch)
