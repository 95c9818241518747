"""TPU slices and hosts of GPUs: what configs says about them, and where each chip stands."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax.artifacts import read_json
from uncurl_jax.errors import InputError

# Seconds that were measured, or are left out.
_MEASURED = ("step_seconds", "block_seconds", "expert_block_seconds")


@dataclasses.dataclass(frozen=True)
class Slice:
    """One kind of slice, or host of GPUs; every number is given with its source in the file.

    The last four were measured where they are given; 0 leaves the time out.

    Attributes:
      name: of the file.
      topology: chips along each axis of the interconnect.
      num_chips, num_hosts, chips_per_host: a host is one JAX process.
      host_topology: chips of one host along each axis.
      hbm_bytes_per_chip, hbm_bytes_per_second_per_chip: memory and its bandwidth.
      peak_bf16_flops_per_second_per_chip: dense, bf16.
      interconnect_bytes_per_second_per_chip: of all ports together, both ways.
      ici_ports_per_chip: links of a chip, two for each axis.
      ici_wraparound: whether the last chip of an axis is linked to the first.
      ici_hop_seconds: latency of one link.
      chip_counts: sizes in which slices of this kind of chip come, rising.
      is_switched: whether every chip reaches every other through a switch at its full bandwidth, as
        GPUs on NVSwitch do; `ici_hop_seconds` is then the latency of a collective.
      step_seconds: that a step takes beside its work: its launch.
      block_seconds: that a block of the decoder takes in one pass however few its tokens: kernels
        too small to be bound by FLOPs or memory.
      expert_block_seconds: the same of routing, dispatch and combine, in a block with experts.
    """

    name: str
    topology: tuple[int, ...]
    num_chips: int
    num_hosts: int
    chips_per_host: int
    host_topology: tuple[int, ...]
    hbm_bytes_per_chip: int
    hbm_bytes_per_second_per_chip: float
    peak_bf16_flops_per_second_per_chip: float
    interconnect_bytes_per_second_per_chip: float
    ici_ports_per_chip: int
    ici_wraparound: tuple[bool, ...]
    ici_hop_seconds: float
    chip_counts: tuple[int, ...]
    is_switched: bool = False
    step_seconds: float = 0.0
    block_seconds: float = 0.0
    expert_block_seconds: float = 0.0

    def __post_init__(self):
        sides = self.topology
        if math.prod(sides) != self.num_chips or self.num_chips != (
            self.num_hosts * self.chips_per_host
        ):
            raise InputError(
                f"A slice's topology, hosts and chips must agree, got topology {sides}, "
                f"{self.num_hosts} hosts of {self.chips_per_host} and {self.num_chips} chips in "
                f"{self.name}: correct the file."
            )
        same = len(sides) == len(self.host_topology) == len(self.ici_wraparound)
        if (
            not same
            or math.prod(self.host_topology) != self.chips_per_host
            or any(side % part for side, part in zip(sides, self.host_topology, strict=True))
        ):
            raise InputError(
                f"A slice's hosts must tile its topology, got hosts of {self.host_topology} in "
                f"{sides} with wraparound {self.ici_wraparound} in {self.name}: correct the file."
            )
        if self.is_switched and len(sides) != 1:
            raise InputError(
                f"Chips behind a switch must be a topology of one axis, got {sides} in "
                f'{self.name}: write "{self.num_chips}".'
            )
        for name, value in dataclasses.asdict(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and (value < 0 or (value == 0 and name not in _MEASURED)):
                raise InputError(
                    f"A slice's numbers must be positive, got {name} {value} in {self.name}: "
                    "correct the file."
                )

    @property
    def link_bytes_per_second(self) -> float:
        """What one link carries one way."""
        return self.interconnect_bytes_per_second_per_chip / (2 * self.ici_ports_per_chip)

    def coordinates(self) -> np.ndarray:
        """Returns [chip, axis] int, chips in the order in which JAX lists devices by process.

        libtpu counts the chips of a host with the first axis fastest, and hosts likewise.
        """
        hosts = [side // part for side, part in zip(self.topology, self.host_topology, strict=True)]
        return np.array(
            [
                host * self.host_topology + chip
                for host in _counted(tuple(hosts))
                for chip in _counted(self.host_topology)
            ]
        )


def _counted(sides: tuple[int, ...]) -> np.ndarray:
    """All points of a grid, the first axis fastest: [point, axis]."""
    grid = np.indices(sides[::-1]).reshape(len(sides), -1)
    return grid[::-1].T


def load_slice(name: str | os.PathLike[str], *directories: str | os.PathLike[str]) -> Slice:
    """Reads a slice's file.

    Args:
      name: a path to a JSON file, or the name of one in `directories`, with or without .json.
      *directories: where the package's files lie (configs/slices; configs/hosts for GPUs).

    Raises:
      InputError: If there is no such file, or a field is missing or of another type.
    """
    path = Path(name)
    if not path.is_file():
        files = {
            file.stem: file
            for folder in directories
            for file in sorted(Path(folder).glob("*.json"))
        }
        known = list(files)
        stem = path.name.removesuffix(".json")
        # Only a bare name, or the package's own folder, may stand for a file of the package.
        ours = [Path("configs") / Path(folder).name for folder in directories]
        is_ours = path.parent in (Path("."), *ours)
        if stem not in known or not is_ours:
            near = difflib.get_close_matches(stem, known, n=2, cutoff=0.4)
            nearest = f"nearest {', '.join(near)}; " if near else ""
            raise InputError(
                f"A slice must be one of {', '.join(known)} or a file like those, got {name}: "
                f"{nearest}see {' and '.join(map(str, ours))}."
            )
        path = files[stem]
    return _from_dict(read_json(path), path)


def _from_dict(values: Any, path: Path) -> Slice:
    every = dataclasses.fields(Slice)
    needed = [field.name for field in every if field.default is dataclasses.MISSING]
    missing = [name for name in needed if not isinstance(values, dict) or name not in values]
    if missing:
        raise InputError(
            f"A slice's file must have the fields of configs/slices, got {path} without "
            f"{', '.join(missing)}: add them."
        )
    fields = {field.name: values[field.name] for field in every if field.name in values}
    try:
        for name in ("topology", "host_topology"):
            fields[name] = tuple(int(side) for side in fields[name].split("x"))
        for name in ("ici_wraparound", "chip_counts"):
            fields[name] = tuple(fields[name])
        return Slice(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"A slice's file must have fields of the types of configs/slices, got {error} in "
            f"{path}: correct it."
        ) from None
