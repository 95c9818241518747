"""Times of collectives: worked by hand on small slices, and what must hold on any."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.deployment.interconnect import (
    KINDS,
    MeshShape,
    collective_seconds,
    wire_bytes,
)
from uncurl_jax.deployment.slices import Slice, load_slice

DIRECTORY = Path(__file__).parents[2] / "configs" / "slices"
POD = load_slice("v5e-256", DIRECTORY)
V5E = load_slice("v5e-16", DIRECTORY)
ALL = ("data", "expert")


def without_latency(slice_: Slice) -> Slice:
    return dataclasses.replace(slice_, ici_hop_seconds=1e-30)


def ring(size: int, *, wraps: bool = True) -> Slice:
    """Chips in one line, each with a link to the next, of 1 byte/s each way."""
    return dataclasses.replace(
        without_latency(V5E),
        topology=(size,),
        num_chips=size,
        num_hosts=size,
        chips_per_host=1,
        host_topology=(1,),
        ici_wraparound=(wraps,),
        ici_ports_per_chip=2,
        interconnect_bytes_per_second_per_chip=4,
    )


def test_wire_bytes_of_each_kind():
    """800 bytes among 8: seven parts of 100 leave a device, twice for an all-reduce."""
    assert [wire_bytes(kind, 800, 8) for kind in KINDS] == [700, 1400, 700, 700]
    assert all(wire_bytes(kind, 800, 1) == 0 for kind in KINDS)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_an_all_to_all_on_a_ring_takes_a_quarter_of_an_all_gather(size):
    """The book: V / (4 W) and V / W, V bytes on all chips together, W = 2 links. The first is exact
    on an even ring, the second counts only what is missing."""
    whole = 1000.0
    mesh = MeshShape(1, size, 1)
    exchange = collective_seconds(ring(size), mesh, ("expert",), "all_to_all", whole / size)
    gather = collective_seconds(ring(size), mesh, ("expert",), "all_gather", whole)
    assert exchange == pytest.approx(whole / (4 * 2))
    assert gather == pytest.approx(whole / 2 * (size - 1) / size)


def test_without_wraparound_the_middle_link_is_the_bottleneck():
    """Two halves of 4 on a line of 8 exchange 4 * 4 parts of 1/8 each way over one link."""
    line = ring(8, wraps=False)
    seconds = collective_seconds(line, MeshShape(1, 8, 1), ("expert",), "all_to_all", 800.0)
    assert seconds == pytest.approx(4 * 4 * 100)
    # An end of the line receives all but its own part over its one link.
    seconds = collective_seconds(line, MeshShape(1, 8, 1), ("expert",), "all_gather", 800.0)
    assert seconds == pytest.approx(700)


def test_an_all_to_all_over_a_torus_is_bound_by_its_bisection():
    """b bytes per chip on 16x16: half of the chips send b/2 each over 32 links."""
    seconds = collective_seconds(without_latency(POD), MeshShape(16, 16, 1), ALL, "all_to_all", 1e6)
    by_hand = 128 * 0.5e6 / (32 * 50e9)
    assert seconds == pytest.approx(by_hand)
    assert seconds == pytest.approx(1e6 * 16 / (8 * 50e9))


def test_groups_that_share_links_wait_for_each_other():
    """On 4x4 without wraparound one link per row and place. Expert groups of 4 are hosts of 2x2:
    two chips send a quarter twice over two links. Data groups of 4 hold one chip of each host:
    through the middle (4 links) go four groups, of each 2 * 2 quarters."""
    mesh, slice_ = MeshShape(4, 4, 1), without_latency(V5E)
    hosts = collective_seconds(slice_, mesh, ("expert",), "all_to_all", 4e6)
    strided = collective_seconds(slice_, mesh, ("data",), "all_to_all", 4e6)
    assert hosts == pytest.approx(2 * 2 * 1e6 / 2 / 50e9)
    assert strided == pytest.approx(4 * 2 * 2 * 1e6 / 4 / 50e9)


def test_an_all_reduce_waits_for_the_corner_of_a_slice_without_wraparound():
    """15/16 of the payload, twice, through a corner's two links; a pod's chips have four."""
    corner = collective_seconds(
        without_latency(V5E), MeshShape(16, 1, 1), ("data",), "all_reduce", 1e6
    )
    inside = collective_seconds(
        without_latency(POD), MeshShape(256, 1, 1), ("data",), "all_reduce", 1e6
    )
    assert corner == pytest.approx(2 * 15 / 16 * 1e6 / (2 * 50e9))
    assert inside == pytest.approx(2 * 255 / 256 * 1e6 / (4 * 50e9))


def test_latency_counts_the_hops_of_the_largest_group():
    """From a corner of 4x4 to the other: six links; an all-reduce goes there and back."""
    seconds = [
        collective_seconds(V5E, MeshShape(1, 16, 1), ("expert",), kind, 1e-9)
        for kind in ("all_to_all", "all_reduce")
    ]
    assert seconds == pytest.approx([6e-6, 12e-6])
    # Around a torus of 16x16 it is eight links each way.
    assert collective_seconds(
        POD, MeshShape(1, 256, 1), ("expert",), "all_to_all", 1e-9
    ) == pytest.approx(16e-6)


def test_behind_a_switch_a_chip_sends_at_its_own_bandwidth():
    """8 bytes at 2 bytes/s one way: 3/4 of them among four, half among two; a second's latency."""
    host = dataclasses.replace(ring(8), is_switched=True, ici_hop_seconds=1.0)
    four = [collective_seconds(host, MeshShape(2, 4, 1), ("expert",), kind, 8.0) for kind in KINDS]
    two = [collective_seconds(host, MeshShape(2, 4, 1), ("data",), kind, 8.0) for kind in KINDS]
    assert four == [1 + 6 / 2, 1 + 12 / 2, 1 + 6 / 2, 1 + 6 / 2]
    assert two == [1 + 4 / 2, 1 + 8 / 2, 1 + 4 / 2, 1 + 4 / 2]


def test_groups_of_one_device_cost_nothing():
    assert collective_seconds(V5E, MeshShape(16, 1, 1), ("expert",), "all_to_all", 1e9) == 0
    assert collective_seconds(V5E, MeshShape(16, 1, 1), (), "all_reduce", 1e9) == 0


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([MeshShape(4, 4, 1), MeshShape(2, 4, 2), MeshShape(1, 16, 1)]),
    st.floats(1, 1e12),
    st.floats(1, 1e12),
)
def test_more_bytes_never_take_less_time(kind, mesh, one, other):
    seconds = [
        collective_seconds(V5E, mesh, ("expert",), kind, payload)
        for payload in sorted((one, other))
    ]
    assert 0 < seconds[0] <= seconds[1]


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([2, 4, 8, 16]), st.floats(1, 1e9))
def test_no_time_is_shorter_than_all_of_a_chips_links_need(kind, group, payload):
    mesh = MeshShape(16 // group, group, 1)
    ports = V5E.ici_ports_per_chip * V5E.link_bytes_per_second
    seconds = collective_seconds(without_latency(V5E), mesh, ("expert",), kind, payload)
    assert seconds >= wire_bytes(kind, payload, group) / ports * (1 - 1e-9)


@settings(deadline=None)
@given(st.floats(0, 1e12), st.integers(1, 512), st.integers(1, 512))
def test_larger_groups_send_more_of_the_same_payload(payload, one, other):
    for kind in KINDS:
        small, large = (wire_bytes(kind, payload, group) for group in sorted((one, other)))
        assert small <= large
