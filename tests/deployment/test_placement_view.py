"""Tables and pictures of a placement."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.layouts import Request
from uncurl_jax.deployment.placement_view import format_report, write_picture
from uncurl_jax.deployment.planner import make_placement
from uncurl_jax.errors import InputError

MODEL = ModelConfig((8, 0, 4, 8, 8, 8), 32, 16, 2, 24, 16, min_capacity=1)


@pytest.fixture(scope="module")
def report(slice_of_eight):
    return make_placement(
        Request(
            MODEL,
            Job("train", 16, 16, "float32"),
            slice_of_eight,
            num_experts_before=(64, 0, 64, 64, 64, 64),
            loads={0: [8, 1, 1, 1, 1, 1, 1, 1]},
        )
    )


def test_the_table_shows_layouts_layers_and_what_was_chosen(report):
    lines = format_report(report).splitlines()
    assert lines[0] == (
        "train on v5e-8: 8 chips of 16 GB, 10% of it free; batch 16 x 16 tokens, parameters float32"
    )
    for heading in ("HBM~ GB", "wire B/token", "communication~ ms", "drop~ %"):
        assert heading in lines[1]
    chosen = [line for line in lines[2:] if line.lstrip().startswith("*")]
    assert len(chosen) == 1 + 2  # the layout, and one option for each kind of layer
    assert any("0,3..5 (4)" in line for line in lines)
    assert any("heads and 24 hidden units do not divide" in line for line in lines)
    assert "Fewest chips that hold the model and one row each: 1 before pruning, 1 after." in lines
    assert lines[-2].startswith("~ estimates")
    assert lines[-1] == report.reason


def test_columns_stand_below_their_headings(report):
    lines = format_report(report).splitlines()
    end = lines[1].index("HBM~ GB") + len("HBM~ GB")
    rows = lines[2 : 2 + len(report.layouts)]
    assert all(line[end - 1].isdigit() and line[end : end + 1] == " " for line in rows)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn_the_same_each_time(suffix, report, tmp_path):
    for name in ("one", "two"):
        write_picture(report, tmp_path / f"{name}.{suffix}")
    data = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two")]
    assert data[0] == data[1] and len(data[0]) > 5000
    if suffix == "svg":
        ElementTree.fromstring(data[0])
    assert {path.suffix for path in tmp_path.iterdir()} == {f".{suffix}"}


def test_a_picture_of_another_kind_is_refused(report, tmp_path):
    with pytest.raises(InputError, match=r"must be .svg or .png, got .*x.gif"):
        write_picture(report, tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())
