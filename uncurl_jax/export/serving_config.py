"""How the experts of each layer are laid out for a serving mesh: padded, or in several copies.

A server that divides an array's first axis over devices needs as many experts as a multiple of the
devices. After a prune layers often have fewer, or an odd number.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncurl_jax.artifacts import read_json
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import (
    MESH_AXES,
    ExpertAxes,
    check_expert_axes,
    layer_expert_axes,
)

SCHEMA = "uncurl_jax serving 1"
AUTO, PAD, REPLICATE = "auto", "pad", "replicate"
_TREATMENTS = (AUTO, PAD, REPLICATE)


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """A file of configs/serving.

    Attributes:
      name: of the file.
      mesh: devices along data, expert and model.
      experts: what is done to layers whose experts the expert axis does not divide: "pad" adds
        experts of zeros that no router can choose; "replicate" stores each expert so often that
        it does; "auto" replicates where that gives each device one expert, else pads.
      layers: the same for single layers, by index.
      expert_axes: mesh axes that divide each layer's experts, as a placement chooses them; None is
        the expert axis everywhere. A layer that none divides is stored as it is.
    """

    name: str
    mesh: tuple[int, int, int]
    experts: str = AUTO
    layers: tuple[tuple[int, str], ...] = ()
    expert_axes: ExpertAxes | None = None

    def check_model(self, num_experts: Sequence[int]) -> None:
        """Checks that the layers with settings of their own are layers of the model with experts.

        Raises:
          InputError: If not.
        """
        check_expert_axes(self.expert_axes, len(num_experts))
        wrong = [n for n, _ in self.layers if n >= len(num_experts) or not num_experts[n]]
        if wrong:
            raise InputError(
                f"layers of a serving configuration must have experts, got {wrong} in {self.name} "
                f"for a model with num_experts {list(num_experts)}: correct the file."
            )

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh)

    def layout(self, layer: int, num_experts: int) -> LayerLayout:
        """Returns how a layer's experts are stored."""
        axes = layer_expert_axes(self.expert_axes, layer)
        size = math.prod(self.mesh[MESH_AXES.index(axis)] for axis in axes)
        treatment = dict(self.layers).get(layer, self.experts)
        if treatment == AUTO:
            treatment = PAD if size % num_experts else REPLICATE
        if num_experts % size == 0:
            return LayerLayout(num_experts, 1, 0)
        if treatment == REPLICATE:
            return LayerLayout(num_experts, size // math.gcd(size, num_experts), 0)
        return LayerLayout(num_experts, 1, -num_experts % size)

    def to_dict(self) -> dict[str, Any]:
        """Returns what the manifest says of it."""
        return {
            "config": self.name,
            "mesh": dict(zip(MESH_AXES, self.mesh, strict=True)),
            "num_devices": self.num_devices,
            "expert_axes": self.expert_axes and [list(axes) for axes in self.expert_axes],
        }


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """How one layer's experts are stored: all of them `copies` times, then `padding` of zeros.

    Attributes:
      num_experts: of the model.
      copies: of each; copy c of expert e stands at c * num_experts + e, so that the copies of an
        expert are on different devices.
      padding: experts of zeros.
    """

    num_experts: int
    copies: int
    padding: int

    @property
    def stored(self) -> int:
        """Experts that are stored."""
        return self.num_experts * self.copies + self.padding

    def places(self, expert: int) -> list[int]:
        """Where an expert's copies stand."""
        return [copy * self.num_experts + expert for copy in range(self.copies)]

    def to_dict(self) -> dict[str, int]:
        """Returns what the manifest says of a layer."""
        return {**dataclasses.asdict(self), "stored": self.stored}


def load_serving_config(name: str | os.PathLike[str], folder: Path) -> ServingConfig:
    """Reads a file of configs/serving.

    Args:
      name: a file, or the name of one in `folder`, without ".json".
      folder: configs/serving.

    Raises:
      InputError: If there is no such file or it breaks a rule.
    """
    path = Path(name)
    if not path.is_file():
        path = folder / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.json"))
        raise InputError(
            f"--serving must be a file, or one of {', '.join(known)}, got {name}: check the path."
        )
    return _parse(read_json(path), path)


def _parse(values: Any, path: Path) -> ServingConfig:
    fields = {"schema", "mesh", "experts", "layers"}
    if not isinstance(values, dict) or values.get("schema") != SCHEMA or set(values) - fields:
        raise InputError(
            f'{path} must be an object with the schema "{SCHEMA}" and no fields but '
            f"{', '.join(sorted(fields))}: correct the file."
        )
    mesh = values.get("mesh")
    if (
        not isinstance(mesh, dict)
        or set(mesh) != set(MESH_AXES)
        or not all(type(size) is int and size > 0 for size in mesh.values())
    ):
        raise InputError(
            f"{path}: mesh must give {', '.join(MESH_AXES)} as positive numbers, got {mesh}."
        )
    layers = values.get("layers", {})
    if not isinstance(layers, dict) or not all(key.isdigit() for key in layers):
        raise InputError(f"{path}: layers must go from layer numbers to treatments, got {layers}.")
    treatments = [values.get("experts", AUTO), *layers.values()]
    wrong = [treatment for treatment in treatments if treatment not in _TREATMENTS]
    if wrong:
        raise InputError(
            f"{path}: experts must be {', '.join(_TREATMENTS)}, got {wrong[0]!r}: correct the file."
        )
    return ServingConfig(
        name=path.stem,
        mesh=(mesh["data"], mesh["expert"], mesh["model"]),
        experts=values.get("experts", AUTO),
        layers=tuple((int(key), treatment) for key, treatment in sorted(layers.items())),
    )
