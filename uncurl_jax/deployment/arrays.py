"""The arrays of a model by name, shape and logical axes, and how much of each a device holds."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from uncurl_jax.checkpoints.parameters import expected_parameters, is_expert_array
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.models.architecture import logical_axes
from uncurl_jax.partitioning import MESH_AXES, parameter_spec

Axes = tuple[str, ...]


class Parameter(NamedTuple):
    """One array of a model.

    Attributes:
      name: as checkpoints have it.
      layer: its decoder layer, None outside of them.
      shape: of the whole.
      axes: logical names of its dimensions.
      is_expert: whether the first dimension counts experts.
      is_float32: whether it is used, and its gradient summed over devices, in float32 (norms,
        routers); the others are cast to the compute dtype.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    is_expert: bool
    is_float32: bool

    def local_size(self, mesh: MeshShape, expert_axes: Axes) -> int:
        """Elements that one device holds."""
        spec = parameter_spec(self.axes, self.shape, _named(mesh), expert_axes)
        names = [() if axes is None else axes for axes in spec]
        return math.prod(self.shape) // math.prod(
            mesh.size_of((axes,) if isinstance(axes, str) else axes) for axes in names
        )


@functools.lru_cache(maxsize=1024)
def _named(mesh: MeshShape) -> Any:
    """A mesh without devices, of which `parameter_spec` reads the sizes."""
    return AbstractMesh(tuple(mesh), MESH_AXES)


@functools.lru_cache(maxsize=64)
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Returns all parameters of a model."""
    # One layer of each kind has all the names; tracing a deep model takes seconds.
    moe = (model.num_selected_experts, 0) if model.moe_layers else (0,)
    names = _logical_names(dataclasses.replace(model, num_experts=moe, expert_map=None))
    of_layer = {
        name.partition("/")[2]: axes for name, axes in names.items() if name.startswith("layers_")
    }
    found = []
    for name, shape in expected_parameters(model).items():
        top, _, rest = name.partition("/")
        is_layer = top.startswith("layers_")
        found.append(
            Parameter(
                name=name,
                layer=int(top.removeprefix("layers_")) if is_layer else None,
                shape=shape,
                axes=of_layer[rest] if is_layer else names[name],
                is_expert=is_expert_array(name),
                is_float32="norm" in name or "router" in name or "shared_gate" in name,
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _logical_names(model: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Returns {name of a parameter: logical axes}."""
    tree = jax.tree_util.tree_flatten_with_path(
        logical_axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )[0]
    return {"/".join(entry.key for entry in path): tuple(axes) for path, axes in tree}


def expert_parameters(model: ModelConfig, layer: int) -> tuple[Parameter, ...]:
    """The arrays of one layer's experts."""
    return tuple(p for p in parameters(model) if p.is_expert and p.layer == layer)
