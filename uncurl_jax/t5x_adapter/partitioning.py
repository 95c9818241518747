"""T5X's partitioner on our (data, expert, model) mesh, with our table of logical axes."""

# T5X is on no package index, so the type checker may not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh
from t5x import partitioning as t5x_partitioning

from uncurl_jax.partitioning import LOGICAL_TO_MESH, make_mesh, parameter_spec


class SmoePartitioner(t5x_partitioning.PjitPartitioner):
    """Rows over data and expert, experts over expert, heads and hidden units over model.

    What the two counts leave over goes to data, as in `uncurl train`. Any number of experts goes
    on any mesh: an axis that does not divide a dimension divides another one, or none.
    """

    def __init__(self, expert_partitions: int = 1, model_partitions: int = 1):
        """Makes the mesh of all devices.

        Args:
          expert_partitions: devices among which the experts of a layer are divided.
          model_partitions: devices among which heads and hidden units are divided.

        Raises:
          InputError: If the two do not divide the number of devices.
        """
        self._smoe_mesh = make_mesh(
            expert_partitions=expert_partitions, model_partitions=model_partitions
        )
        super().__init__(
            # T5X asks for one of its own two ways to say so; the mesh below is what counts.
            model_parallel_submesh=(1, 1, 1, model_partitions),
            logical_axis_rules=tuple(LOGICAL_TO_MESH.items()),
        )

    @property
    def mesh(self) -> Mesh:
        """The (data, expert, model) mesh."""
        return self._smoe_mesh

    def describe(self) -> dict[str, int]:
        """Returns the sizes of the mesh axes, for people."""
        return dict(self.mesh.shape)

    def get_mesh_axes(self, train_state: Any) -> Any:
        """Returns a copy of a train state with PartitionSpecs, or None, as leaves."""
        logical = self.get_logical_axes(train_state)
        names: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(
            logical.state_dict(), keep_empty_nodes=True
        )
        arrays: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(
            train_state.state_dict(), keep_empty_nodes=True
        )

        def spec(key: tuple[str, ...], axes: Any) -> Any:
            if axes is None or axes is traverse_util.empty_node:
                return axes
            return parameter_spec(tuple(axes), jax.numpy.shape(arrays[key]), self.mesh)

        specs = {key: spec(key, axes) for key, axes in names.items()}
        return logical.restore_state(traverse_util.unflatten_dict(specs))


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree, keep_empty_nodes=True)
