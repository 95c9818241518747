"""Layouts of experts for meshes, and files of configs/serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.export.serving_config import ServingConfig, load_serving_config

FOLDER = Path(__file__).parents[2] / "configs" / "serving"


@pytest.mark.parametrize(
    ("size", "experts", "count", "copies", "padding"),
    [
        (8, "auto", 2, 4, 0),  # a device for each copy
        (8, "auto", 3, 1, 5),  # 3 does not divide 8
        (8, "auto", 8, 1, 0),
        (8, "auto", 16, 1, 0),  # two experts a device
        (8, "auto", 12, 1, 4),
        (8, "pad", 2, 1, 6),
        (8, "replicate", 3, 8, 0),  # 24 experts, three a device
        (8, "replicate", 12, 2, 0),
        (6, "replicate", 4, 3, 0),
        (1, "pad", 5, 1, 0),
    ],
)
def test_layouts_worked_by_hand(size, experts, count, copies, padding):
    layout = ServingConfig("test", (1, size, 1), experts).layout(0, count)
    assert (layout.copies, layout.padding) == (copies, padding)
    assert layout.stored == count * copies + padding
    assert layout.stored % size == 0


def test_copies_of_an_expert_are_on_different_devices():
    layout = ServingConfig("test", (1, 4, 1), "replicate").layout(0, 6)
    # Twelve stored, three on each of four devices.
    assert layout.places(1) == [1, 7]
    for expert in range(6):
        devices = [place // 3 for place in layout.places(expert)]
        assert len(set(devices)) == len(devices)
    places = sorted(place for expert in range(6) for place in layout.places(expert))
    assert places == list(range(12))


def test_a_layer_may_have_a_treatment_of_its_own(tmp_path):
    path = tmp_path / "mine.json"
    mesh = {"data": 2, "expert": 4, "model": 1}
    values = {"schema": "uncurl_jax serving 1", "mesh": mesh, "layers": {"2": "pad"}}
    path.write_text(json.dumps(values))
    config = load_serving_config(path, FOLDER)
    assert (config.name, config.mesh, config.num_devices) == ("mine", (2, 4, 1), 8)
    assert config.layout(0, 2).copies == 2
    assert config.layout(2, 2).padding == 2


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_that_is_shipped_loads(path):
    assert load_serving_config(path.stem, FOLDER) == load_serving_config(path, FOLDER)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "x"}, "must be an object with the schema"),
        ({"shape": 1}, "no fields but"),
        ({"mesh": {"data": 1, "expert": 0, "model": 1}}, "as positive numbers"),
        ({"mesh": {"data": 1, "expert": 2}}, "mesh must give data, expert, model"),
        ({"experts": "copy"}, "experts must be auto, pad, replicate, got 'copy'"),
        ({"layers": {"0": "copy"}}, "got 'copy'"),
        ({"layers": {"first": "pad"}}, "layers must go from layer numbers"),
    ],
)
def test_files_that_break_a_rule_are_refused(change, sentence, tmp_path):
    mesh = {"data": 1, "expert": 2, "model": 1}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"schema": "uncurl_jax serving 1", "mesh": mesh, **change}))
    with pytest.raises(InputError, match=sentence):
        load_serving_config(path, FOLDER)


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="or one of expert4_model2, expert8, one_device, got x"):
        load_serving_config("x", FOLDER)
