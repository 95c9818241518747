"""How long a collective must take on a slice: lower bounds from its links, not measurements.

Two bounds, and the larger one counts. Ports: a chip sends what it must through its links; a chip at
a corner of a slice without wraparound has one link per axis, and everyone waits for it. Cuts: every
plane between chips (two planes where an axis wraps around) has so many links, and what groups that
lie on both sides must exchange goes through them, all groups at once. For one all-to-all over a
whole torus the second bound is the known bytes * longest_axis / (8 * link) (bytes per chip, a link
one way), that is a quarter of an all-gather on a ring. Behind a switch there are no cuts: what
counts is the bandwidth of each chip and the latency of a collective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from uncurl_jax.deployment.slices import Slice
from uncurl_jax.partitioning import MESH_AXES

KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")


class MeshShape(NamedTuple):
    """Devices along the axes of the mesh, in the order of `partitioning.MESH_AXES`."""

    data: int
    expert: int
    model: int

    @property
    def size(self) -> int:
        """All devices."""
        return math.prod(self)

    def size_of(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes together."""
        return math.prod(self[MESH_AXES.index(axis)] for axis in axes)


def wire_bytes(kind: str, payload_bytes: float, group: int) -> float:
    """What one device sends, which is also what it receives.

    Args:
      kind: one of KINDS; an all-reduce is a reduce-scatter and an all-gather, as on a ring.
      payload_bytes: of the array before an all-to-all, all-reduce or reduce-scatter, or after an
        all-gather, on one device.
      group: devices that take part.
    """
    passes = 2 if kind == "all_reduce" else 1
    return passes * payload_bytes * (group - 1) / group


def collective_seconds(
    slice_: Slice, mesh: MeshShape, axes: tuple[str, ...], kind: str, payload_bytes: float
) -> float:
    """Shortest time for a collective over mesh axes, all its groups at once.

    Args:
      slice_: where it runs; `mesh` takes its chips in the order of `Slice.coordinates`.
      mesh: shape of the mesh, as many devices as the slice has chips.
      axes: mesh axes over which the devices of a group differ.
      kind: one of KINDS.
      payload_bytes: see `wire_bytes`.

    Returns:
      Seconds, 0 for groups of one device.
    """
    if mesh.size_of(axes) == 1 or not payload_bytes:
        return 0.0
    cost = _cost(slice_, mesh, axes, kind)
    return cost.seconds_per_byte * payload_bytes + cost.latency_seconds


class _Cost(NamedTuple):
    """Of a collective: time per byte of its payload, and time that is lost to hops."""

    seconds_per_byte: float
    latency_seconds: float


@functools.lru_cache(maxsize=4096)
def _cost(slice_: Slice, mesh: MeshShape, axes: tuple[str, ...], kind: str) -> _Cost:
    if slice_.is_switched:
        sent = wire_bytes(kind, 1.0, mesh.size_of(axes))
        one_way = slice_.interconnect_bytes_per_second_per_chip / 2
        return _Cost(sent / one_way, slice_.ici_hop_seconds)
    groups = _group_coordinates(slice_, mesh, axes)
    size = groups.shape[1]
    sides = zip(slice_.topology, slice_.ici_wraparound, strict=True)
    fewest_ports = sum(0 if side == 1 else 2 if wraps else 1 for side, wraps in sides)
    loads = [wire_bytes(kind, 1.0, size) / fewest_ports]
    for is_inside, num_links in _cuts(slice_):
        inside = is_inside[tuple(np.moveaxis(groups, -1, 0))].sum(axis=1)
        loads.append(_crossing(kind, inside, size) / num_links)
    hops = _diameter(slice_, groups) * (2 if kind == "all_reduce" else 1)
    seconds = max(loads) / slice_.link_bytes_per_second
    return _Cost(seconds, hops * slice_.ici_hop_seconds)


def _group_coordinates(slice_: Slice, mesh: MeshShape, axes: tuple[str, ...]) -> np.ndarray:
    """Returns [group, member, axis of the slice]."""
    coordinates = slice_.coordinates()
    grid = coordinates.reshape(*mesh, coordinates.shape[1])
    places = [MESH_AXES.index(axis) for axis in axes]
    last = range(grid.ndim - 1 - len(places), grid.ndim - 1)
    grid = np.moveaxis(grid, places, last)
    return grid.reshape(-1, mesh.size_of(axes), coordinates.shape[1])


def _cuts(slice_: Slice) -> Iterator[tuple[np.ndarray, int]]:
    """Yields every straight part of the slice as a mask over its grid, with the links around it.

    Parts of an axis that wraps around are arcs of at most half of it, with links at both ends.
    """
    for axis, side in enumerate(slice_.topology):
        face = slice_.num_chips // side
        wraps = slice_.ici_wraparound[axis]
        arcs = [
            [(start + step) % side for step in range(length)]
            for start in (range(side) if wraps else (0,))
            for length in range(1, side // 2 + 1 if wraps else side)
        ]
        for arc in arcs:
            mask = np.zeros(slice_.topology, bool)
            mask[(slice(None),) * axis + (arc,)] = True
            yield mask, face * (2 if wraps else 1)


def _crossing(kind: str, inside: np.ndarray, size: int) -> float:
    """Bytes that all groups together send one way through a cut, per byte of payload.

    `inside` [group] says how many of a group's `size` members lie on one side.
    """
    outside = size - inside
    if kind == "all_to_all":
        return float((inside * outside).sum()) / size
    is_cut = (inside > 0) & (outside > 0)
    if kind == "all_reduce":
        # Each side needs the other's sum, whatever their sizes.
        return float(is_cut.sum())
    # Each side needs what the other's members bring, one share each; the fuller direction counts.
    return float(max(inside[is_cut].sum(), outside[is_cut].sum())) / size


def _diameter(slice_: Slice, groups: np.ndarray) -> int:
    """Most links between a group's first chip, which is at a corner of it, and another."""
    apart = np.abs(groups[:, :1] - groups)
    around = np.where(slice_.ici_wraparound, np.array(slice_.topology) - apart, apart)
    return int(np.minimum(apart, around).sum(axis=-1).max())
