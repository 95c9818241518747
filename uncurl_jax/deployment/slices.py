"""TPU slices: what configs/slices says about them, and where each chip stands."""

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


@dataclasses.dataclass(frozen=True)
class Slice:
    """One kind of slice; every number is given with its source in the file.

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
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and value <= 0:
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


def load_slice(name: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Slice:
    """Reads a slice's file.

    Args:
      name: a path to a JSON file, or the name of one in `directory`, with or without .json.
      directory: where the package's files lie (configs/slices).

    Raises:
      InputError: If there is no such file, or a field is missing or of another type.
    """
    path = Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in Path(directory).glob("*.json"))
        stem = path.name.removesuffix(".json")
        # Only a bare name, or the package's own folder, may stand for a file of the package.
        is_ours = path.parent in (Path("."), Path("configs/slices"))
        if stem not in known or not is_ours:
            near = difflib.get_close_matches(stem, known, n=2, cutoff=0.4)
            nearest = f"nearest {', '.join(near)}; " if near else ""
            raise InputError(
                f"A slice must be one of {', '.join(known)} or a file like those, got {name}: "
                f"{nearest}see configs/slices."
            )
        path = Path(directory) / f"{stem}.json"
    return _from_dict(read_json(path), path)


def _from_dict(values: Any, path: Path) -> Slice:
    names = [field.name for field in dataclasses.fields(Slice)]
    missing = [name for name in names if not isinstance(values, dict) or name not in values]
    if missing:
        raise InputError(
            f"A slice's file must have the fields of configs/slices, got {path} without "
            f"{', '.join(missing)}: add them."
        )
    fields = {name: values[name] for name in names}
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
