"""Slices: their files, where chips stand, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from uncurl_jax.deployment.slices import Slice, load_slice
from uncurl_jax.errors import InputError

DIRECTORY = Path(__file__).parents[2] / "configs" / "slices"
HOSTS = DIRECTORY.parent / "hosts"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.json"))
EVERY = sorted([*DIRECTORY.glob("*.json"), *HOSTS.glob("*.json")])


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_number_of_a_slice_has_its_source_in_the_file(path):
    name = path.stem
    loaded = load_slice(name, DIRECTORY, HOSTS)
    values = json.loads(path.read_text())
    numbers = {
        field.name
        for field in dataclasses.fields(Slice)
        if field.name not in ("name", "topology", "num_chips", "num_hosts", "chips_per_host")
        and (field.default is dataclasses.MISSING or field.name in values)
    }
    assert set(values["sources"]) == numbers
    assert all(values["sources"].values()) and values["source"]
    assert loaded.name == name and loaded.num_chips in loaded.chip_counts
    assert list(loaded.chip_counts) == sorted(loaded.chip_counts)


@pytest.mark.parametrize("name", NAMES)
def test_chips_stand_one_in_each_place_and_hosts_are_blocks(name):
    loaded = load_slice(name, DIRECTORY)
    coordinates = loaded.coordinates()
    assert len({tuple(place) for place in coordinates}) == loaded.num_chips
    assert coordinates.max(axis=0).tolist() == [side - 1 for side in loaded.topology]
    hosts = coordinates.reshape(loaded.num_hosts, loaded.chips_per_host, -1)
    extent = hosts.max(axis=1) - hosts.min(axis=1) + 1
    assert {tuple(sides) for sides in extent.tolist()} == {loaded.host_topology}


def test_chips_of_a_v5e_16_stand_where_libtpu_says():
    """`get_topology_desc("tpu", "v5e:4x4")`, devices by process: coords of the first ten."""
    expected = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1), (0, 2), (1, 2)]
    found = load_slice("v5e-16", DIRECTORY).coordinates()[:10]
    assert [tuple(place) for place in found.tolist()] == expected


def test_chips_of_a_v5p_slice_stand_where_libtpu_says():
    """`v5p:4x4x4`: hosts of 2x2x1, the first axis fastest; chips 16 and 20."""
    found = load_slice("v5p-128", DIRECTORY).coordinates()
    assert found[[8, 16, 20]].tolist() == [[0, 2, 0], [0, 0, 1], [2, 0, 1]]


def test_the_links_of_a_pod_carry_what_google_prints():
    """v5e: bisection 1.6 TB/s a pod of 16x16 (32 links), all-reduce 51.2 TB/s (4 ports a chip)."""
    pod = load_slice("v5e-256", DIRECTORY)
    assert 2 * 16 * pod.link_bytes_per_second == 1.6e12
    assert pod.num_chips * pod.ici_ports_per_chip * pod.link_bytes_per_second == 51.2e12
    v6e = load_slice("v6e-16", DIRECTORY)
    assert 2 * 16 * v6e.link_bytes_per_second == 3.2e12


@pytest.mark.parametrize(
    "given", ["v5e-16", "v5e-16.json", "configs/slices/v5e-16.json", DIRECTORY / "v5e-16.json"]
)
def test_a_slice_is_found_by_name_or_path(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_slice(given, DIRECTORY).topology == (4, 4)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("v5e-15", "nearest v5e-16"), ("v6e16", "nearest v6e-16"), ("else/v5e-16.json", "v5e-16")],
)
def test_an_unknown_slice_is_refused_with_the_nearest(given, nearest):
    with pytest.raises(InputError, match=r"A slice must be one of v5e-16, .*, got ") as caught:
        load_slice(given, DIRECTORY)
    assert nearest in str(caught.value) and given in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_chips": 8}, "topology, hosts and chips must agree, got topology (4, 4), 4 hosts"),
        ({"host_topology": "2x4"}, "hosts must tile its topology, got hosts of (2, 4) in (4, 4)"),
        ({"host_topology": "1x4", "topology": "16x1"}, "hosts must tile its topology"),
        ({"hbm_bytes_per_chip": 0}, "numbers must be positive, got hbm_bytes_per_chip 0"),
        ({"topology": 16}, "must have fields of the types of configs/slices"),
        ({"ici_hop_seconds": None}, "without ici_hop_seconds: add them"),
        ({"block_seconds": -1e-6}, "numbers must be positive, got block_seconds -1e-06"),
        ({"is_switched": True}, "behind a switch must be a topology of one axis, got (4, 4)"),
    ],
)
def test_a_file_of_ones_own_is_checked(change, sentence, tmp_path):
    values = json.loads((DIRECTORY / "v5e-16.json").read_text())
    values |= change
    values = {name: value for name, value in values.items() if value is not None}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        load_slice(path, DIRECTORY)
    assert sentence in str(caught.value)


def test_a_slice_of_ones_own_is_read(tmp_path):
    values = json.loads((DIRECTORY / "v5e-16.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values | {"topology": "2x8", "name": "mine"}))
    loaded = load_slice(path, DIRECTORY)
    assert math.prod(loaded.topology) == 16 and loaded.name == "mine"


def test_a_host_of_gpus_is_found_only_where_hosts_may_stand():
    host = load_slice("h100-2", DIRECTORY, HOSTS)
    assert host.is_switched and host.num_chips == 2
    assert load_slice("configs/hosts/h100-2.json", DIRECTORY, HOSTS) == host
    with pytest.raises(InputError, match="A slice must be one of v5e-16"):
        load_slice("h100-2", DIRECTORY)
