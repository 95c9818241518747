"""Layouts: which meshes there are, and that the best choice per layer is found."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.costs import Cost, ExpertCost
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.layouts import (
    LayerChoice,
    Request,
    Times,
    _choose,
    best_layout,
    group_layers,
    layer_axes,
    least_memory,
    mesh_problem,
    mesh_shapes,
)
from uncurl_jax.errors import InputError

MIB = 2**20
MODEL = ModelConfig((8, 0, 4), 32, 16, 2, 24, 16, min_capacity=1)


def request_for(slice_, **changes) -> Request:
    values = {"model": MODEL, "job": Job("train", 16, 16, "float32"), "slice": slice_}
    return Request(**{**values, **changes})


def test_meshes_of_eight_chips():
    shapes = list(mesh_shapes(8))
    assert len(shapes) == len(set(shapes)) == 10
    assert all(mesh.size == 8 for mesh in shapes)
    assert MeshShape(2, 2, 2) in shapes and MeshShape(1, 8, 1) in shapes


def test_measured_overheads_are_counted_for_each_pass(slice_of_eight):
    """Three blocks of which two have experts; training passes three times, in two parts."""
    host = dataclasses.replace(
        slice_of_eight, step_seconds=1.0, block_seconds=10.0, expert_block_seconds=100.0
    )
    mesh = MeshShape(8, 1, 1)
    serving = request_for(host, job=Job("serve", 16, 16))
    training = request_for(host, job=Job("train", 16, 16, "float32", 2))
    assert best_layout(serving, mesh).times.overhead == 1 + 3 * 10 + 2 * 100
    assert best_layout(training, mesh).times.overhead == 1 + 6 * (3 * 10 + 2 * 100)
    assert best_layout(request_for(slice_of_eight), mesh).times.overhead == 0


def test_axes_of_one_device_divide_nothing():
    assert layer_axes(MeshShape(1, 8, 1)) == ((), ("expert",))
    assert layer_axes(MeshShape(2, 4, 1)) == ((), ("data",), ("expert",), ("data", "expert"))
    assert layer_axes(MeshShape(1, 1, 4)) == ((),)


def test_meshes_that_cannot_run_a_job_say_why(slice_of_eight):
    request = request_for(slice_of_eight)
    assert mesh_problem(request, MeshShape(2, 4, 1)) is None
    # Two heads; hosts of four chips; 16 rows in 4 parts.
    assert "2 heads" in str(mesh_problem(request, MeshShape(1, 2, 4)))
    parts = request_for(slice_of_eight, job=Job("train", 16, 16, "float32", 4))
    assert mesh_problem(parts, MeshShape(2, 4, 1)) == (
        "4 rows at a time do not divide among 8 devices"
    )
    wide = request_for(slice_of_eight, model=ModelConfig((8,), 32, 16, 8, 24, 16))
    assert "do not divide a host's 4 chips" in str(mesh_problem(wide, MeshShape(1, 1, 8)))


def choice(kept: int, transient: int, seconds: float) -> LayerChoice:
    cost = Cost(state_bytes=kept * MIB, transient_bytes=transient * MIB)
    return LayerChoice(ExpertCost((), 1, 1, 1, 1, 0, cost), Times(seconds, 0.0, {}))


CHOICES = st.builds(choice, st.integers(0, 9), st.just(0), st.integers(0, 9).map(float))


@settings(deadline=None)
@given(
    st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 40)
)
def test_the_fastest_choices_within_the_budget_are_found(options, budget):
    picks = _choose(options, fixed_bytes=MIB, transient_bytes=0, budget_bytes=budget * MIB)

    def value(picks):
        chosen = [of_layer[pick] for of_layer, pick in zip(options, picks, strict=True)]
        memory = MIB + sum(option.experts.cost.state_bytes for option in chosen)
        return memory, sum(option.times.total for option in chosen)

    every = [
        value(combination) for combination in itertools.product(*map(range, map(len, options)))
    ]
    within = [seconds for memory, seconds in every if memory <= budget * MIB]
    memory, seconds = value(picks)
    if within:
        assert memory <= budget * MIB
        assert seconds == min(within)
    else:
        assert memory == min(memory for memory, _ in every)


def test_what_is_needed_for_a_while_counts_once():
    """Two layers that each gather 4 MiB for a while, beside 1 MiB: 5 MiB, not 9."""
    gathering, slow = choice(0, 4, 1.0), choice(0, 0, 2.0)
    options = [(gathering, slow)] * 2
    assert _choose(options, fixed_bytes=MIB, transient_bytes=0, budget_bytes=5 * MIB) == (0, 0)
    assert _choose(options, fixed_bytes=MIB, transient_bytes=0, budget_bytes=4 * MIB) == (1, 1)


def test_a_layout_adds_up(slice_of_eight):
    request = request_for(slice_of_eight)
    layout = best_layout(request, MeshShape(2, 4, 1))
    assert layout.problem is None
    assert layout.times.total == pytest.approx(
        layout.times.compute + layout.times.update + sum(layout.times.communication.values())
    )
    assert layout.memory.total == sum(layout.memory) >= least_memory(request, layout.mesh)
    assert len(layout.expert_axes(3)) == 3 and layout.expert_axes(3)[1] == ()
    assert group_layers(layout) == [(0,), (2,)]


def test_equal_layers_share_their_options(slice_of_eight):
    model = ModelConfig((8, 8, 4, 8), 32, 16, 2, 24, 16, min_capacity=1)
    layout = best_layout(request_for(slice_of_eight, model=model), MeshShape(2, 4, 1))
    assert layout.options[0] is layout.options[3]
    assert {group[0]: group for group in group_layers(layout)}[0] == (0, 1, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"headroom": 1.0}, r"headroom must lie in \[0, 1\), got 1.0"),
        ({"max_drop_fraction": 2.0, "loads": {}}, "max_drop_fraction must lie in"),
        ({"max_drop_fraction": 0.1}, "got neither --statistics nor --plan"),
        ({"job": Job("train", 0, 16)}, "must be at least 1 and cache_length 0, got 0, 16, 1 and 0"),
        ({"job": Job("train", 16, 16, "float32", 3)}, "must divide batch, got 3 and 16"),
        ({"job": Job("train", 16, 32)}, "max_length=16, got 32 and 0: choose 16"),
        ({"job": Job("run", 16, 16)}, 'mode must be "train" or "serve", got \'run\''),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes, sentence, slice_of_eight):
    with pytest.raises(InputError, match=sentence):
        request_for(slice_of_eight, **changes)
