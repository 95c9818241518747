"""Counts of bytes: worked by hand, equal to those of compiled programs, and never falling.

Compiled for eight devices of the CPU in float32: the CPU's compiler widens what bf16 models send.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig, alternating_experts
from uncurl_jax.deployment import programs
from uncurl_jax.deployment.collectives import (
    BACKWARD,
    FORWARD,
    OTHER,
    Collective,
    find_collectives,
)
from uncurl_jax.deployment.costs import Traffic, expert_cost, rest_cost
from uncurl_jax.deployment.interconnect import MeshShape, wire_bytes
from uncurl_jax.deployment.job import Job, make_job
from uncurl_jax.deployment.layouts import wire_bytes_per_token
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import make_mesh

# 354M with 128 experts in 12 of 24 layers; no biases, so that numbers are those of the kernels.
LARGE = ModelConfig(
    num_experts=alternating_experts(24, 128),
    vocab_size=50258,
    embed_dim=1024,
    num_heads=16,
    mlp_dim=4096,
    max_length=1024,
    num_selected_experts=2,
    capacity_factor=1.25,
    eval_capacity_factor=1.25,
    has_mlp_bias=False,
)
SMALL = ModelConfig(
    num_experts=(6, 8),
    vocab_size=36,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=16,
    num_selected_experts=2,
    capacity_factor=1.25,
    eval_capacity_factor=1.0,
    min_capacity=1,
    dtype="float32",
)
X, D, DX = ("expert",), ("data",), ("data", "expert")
ROWS, LENGTH = 16, 16


# Worked by hand


@pytest.mark.parametrize(("experts", "gigabytes"), [(128, 25.8), (32, 6.4), (8, 1.6)])
def test_replicated_experts_of_354m_take_what_the_design_says(experts, gigabytes):
    model = LARGE.with_experts(experts)
    job = Job("serve", 128, 1024)
    cost = expert_cost(model, 0, MeshShape(16, 1, 1), (), job)
    # experts * 2 * 1024 * 4096 numbers of 2 bytes, 12 layers.
    assert cost.weight_bytes == experts * 2 * 1024 * 4096 * 2
    assert 12 * cost.weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("experts", "mesh", "bytes_per_token"),
    [(128, MeshShape(1, 16, 1), 9600), (8, MeshShape(2, 8, 1), 8960)],
)
def test_pruning_alone_saves_almost_no_all_to_all(experts, mesh, bytes_per_token):
    """2 * k * cf * d * bytes * (g-1)/g = 2 * 2 * 1.25 * 1024 * 2 * 15/16, or 7/8 for 8 experts."""
    model = LARGE.with_experts(experts)
    job = Job("serve", 128, 1024)
    cost = expert_cost(model, 0, mesh, X, job).cost
    assert wire_bytes_per_token([cost], mesh, job)["tokens"] == bytes_per_token
    training = dataclasses.replace(job, mode="train")
    cost = expert_cost(model, 0, mesh, X, training).cost
    assert wire_bytes_per_token([cost], mesh, training)["tokens"] == 2 * bytes_per_token
    whole = expert_cost(model.with_experts(8), 0, mesh, (), job).cost
    assert whole.traffic == ()


def test_training_state_is_sixteen_bytes_a_parameter():
    """Float32 parameter, two moments, gradient; of 8 experts on 4 devices two."""
    job = Job("train", 64, 1024, "float32")
    cost = expert_cost(LARGE.with_experts(8), 0, MeshShape(4, 4, 1), X, job)
    assert cost.cost.state_bytes == 16 * 2 * 2 * 1024 * 4096
    assert cost.weight_bytes == 4 * 2 * 2 * 1024 * 4096


def test_expert_parallelism_sends_less_below_the_tokens_that_the_design_says():
    """E * d_ff / (k * cf) tokens a chip: there 4 buffers weigh as much as 2 passes of gradients."""
    model, mesh = LARGE.with_experts(8), MeshShape(1, 8, 1)
    even = 8 * 4096 / (2 * 1.25)
    assert even == 13107.2

    def sent(tokens: int, axes: tuple[str, ...]) -> float:
        # Groups of so many tokens: one row each.
        job = Job("train", 8, tokens, "float32")
        return sum(
            wire_bytes_per_token([expert_cost(model, 0, mesh, axes, job).cost], mesh, job).values()
        )

    assert sent(13000, X) < sent(13000, ())
    assert sent(13200, X) > sent(13200, ())


def test_experts_that_do_not_divide_are_padded():
    """11 experts: on 8 devices 16, on 4 devices 12."""
    model = LARGE.with_experts(11)
    job = Job("serve", 128, 1024)
    padded = [
        expert_cost(model, 0, mesh, X, job).padded_experts
        for mesh in (MeshShape(2, 8, 1), MeshShape(4, 4, 1))
    ]
    assert padded == [16, 12]


def test_the_cache_holds_keys_and_values_of_a_devices_rows_and_heads():
    """24 layers * 2 * 1024 numbers of 2 bytes a position; 8 of 64 rows, half of the heads."""
    job = Job("serve", 64, 1, cache_length=512)
    assert rest_cost(LARGE, MeshShape(8, 1, 2), job).cache_bytes == 24 * 2048 // 2 * 2 * 8 * 512
    assert rest_cost(LARGE, MeshShape(8, 1, 2), Job("train", 64, 512)).cache_bytes == 0


def test_options_of_the_other_mode_are_refused():
    assert make_job("serve", 8, 1, max_length=32) == Job("serve", 8, 1, "bfloat16", 1, 32)
    assert make_job("train", 8, 16, max_length=32) == Job("train", 8, 16, "float32")
    with pytest.raises(InputError, match="accumulation_steps does not belong to mode serve, got 2"):
        make_job("serve", 8, 1, max_length=32, accumulation_steps=2)
    with pytest.raises(InputError, match="param_dtype does not belong to mode train, got bfloat16"):
        make_job("train", 8, 1, max_length=32, param_dtype="bfloat16")


# Compiled programs


class Case(NamedTuple):
    """A model on a mesh; an entry of axes per layer."""

    num_experts: tuple[int, ...]
    mesh: tuple[int, int, int]
    axes: tuple[tuple[str, ...], ...]
    parts: int = 1
    factor: float | None = 1.25


@functools.cache
def compiled(name: str, case: Case) -> list[Collective]:
    model = model_of(case)
    stage = TrainConfig(
        OptimizerConfig(1e-3),
        num_steps=10,
        batch_size=ROWS,
        model=model,
        accumulation_steps=case.parts,
        expert_axes=case.axes,
    )
    mesh = make_mesh(expert_partitions=case.mesh[1], model_partitions=case.mesh[2])
    program = programs.build(name, model, stage, mesh, num_rows=ROWS, length=LENGTH)
    return find_collectives(program.lower().compile().as_text())


def model_of(case: Case) -> ModelConfig:
    return dataclasses.replace(
        SMALL,
        num_experts=case.num_experts,
        capacity_factor=case.factor,
        eval_capacity_factor=None if case.factor is None else 1.0,
    )


def found(
    name: str, case: Case, kind: str, layer: int | None, direction: str, group: int
) -> list[int]:
    """[executions, payload of all of them, bytes on the wire] in a program."""
    counts, payload = 0, 0
    for collective in compiled(name, case):
        parts = [p for p in collective.parts if (p.layer, p.direction) == (layer, direction)]
        if collective.kind == kind.replace("_", "-") and collective.group_size == group and parts:
            counts += collective.times
            payload += collective.times * sum(part.bytes_per_device for part in parts)
    return [counts, payload, int(wire_bytes(kind, payload, group))]


def planned(traffic: tuple[Traffic, ...], kind: str, purpose: str, mesh: MeshShape) -> list[int]:
    """The same as the planner counts it."""
    chosen = [t for t in traffic if (t.kind, t.purpose) == (kind, purpose)]
    payload = sum(t.times * t.payload_bytes for t in chosen)
    wire = sum(t.times * wire_bytes(kind, t.payload_bytes, mesh.size_of(t.axes)) for t in chosen)
    return [sum(t.times for t in chosen), payload, int(wire)]


def case(*arguments, is_slow: bool = False):
    value = Case(*arguments)
    mesh, counts = ("x".join(map(str, sizes)) for sizes in (value.mesh, value.num_experts))
    axes = ".".join("+".join(axes) or "whole" for axes in value.axes)
    marks = pytest.mark.slow if is_slow else ()
    return pytest.param(value, id=f"{mesh}-{counts}-{axes}-{value.parts}", marks=marks)


@pytest.mark.parametrize(
    "case",
    [
        # 6 and 5 experts divide neither 4 nor 8; counts, axes and layers differ.
        case((6, 8), (2, 4, 1), (X, DX)),
        case((5, 8), (4, 2, 1), (X, D)),
        case((6, 4), (2, 2, 2), (DX, X)),
        case((3, 16), (1, 8, 1), (X, X), is_slow=True),
        case((8, 0, 5), (2, 2, 2), ((), (), D), is_slow=True),
        case((7, 2), (1, 4, 2), (X, ()), is_slow=True),
    ],
)
def test_all_to_alls_of_an_evaluation_are_those_that_were_planned(case):
    model, mesh = model_of(case), MeshShape(*case.mesh)
    job = Job("serve", ROWS, LENGTH, "float32")
    for layer in model.moe_layers:
        cost = expert_cost(model, layer, mesh, case.axes[layer], job)
        expected = planned(cost.cost.traffic, "all_to_all", "tokens", mesh)
        assert expected[0] == (2 if case.axes[layer] else 0)
        assert found("evaluate", case, "all_to_all", layer, FORWARD, cost.group) == expected
        if mesh.model > 1 and case.axes[layer]:
            # The experts' partial sums, and those of the layer's attention.
            sums = planned(cost.cost.traffic, "all_reduce", "partial sums", mesh)
            attention = ROWS * LENGTH // mesh.size_of(DX) * model.embed_dim * 4
            total = found("evaluate", case, "all_reduce", layer, FORWARD, mesh.model)
            assert total[:2] == [sums[0] + 1, sums[1] + attention]
    assert all(
        part.layer in model.moe_layers
        for collective in compiled("evaluate", case)
        if collective.kind == "all-to-all"
        for part in collective.parts
    )


@pytest.mark.parametrize(
    "case",
    [
        case((6, 8), (2, 4, 1), (X, ())),
        case((8,), (2, 4, 1), (D,), 2),
        case((5, 0, 16), (4, 2, 1), (DX, (), X), is_slow=True),
        case((3, 8), (1, 8, 1), ((), X), 2, is_slow=True),
    ],
)
def test_all_to_alls_and_gradients_of_a_training_step_are_those_that_were_planned(case):
    model, mesh = model_of(case), MeshShape(*case.mesh)
    job = Job("train", ROWS, LENGTH, "float32", case.parts)
    gradients: dict[int, int] = {1: 0, 2: 0, 4: 0, 8: 0}
    for layer in model.moe_layers:
        cost = expert_cost(model, layer, mesh, case.axes[layer], job)
        expected = planned(cost.cost.traffic, "all_to_all", "tokens", mesh)
        directions = [
            found("train", case, "all_to_all", layer, direction, cost.group)
            for direction in (FORWARD, BACKWARD)
        ]
        assert [sum(pair) for pair in zip(*directions, strict=True)] == expected
        assert directions[0] == directions[1]
        for traffic in cost.cost.traffic:
            if traffic.purpose == "gradients":
                payload = traffic.times * traffic.payload_bytes
                gradients[mesh.size_of(traffic.axes)] += payload
    (rest,) = rest_cost(model, mesh, job).traffic
    gradients[8] += rest.times * rest.payload_bytes
    layers = (*range(model.num_layers), None)
    for group in (2, 4, 8):
        total = sum(
            found("train", case, "all_reduce", layer, BACKWARD, group)[1] for layer in layers
        )
        assert total == gradients[group], f"gradients over {group} devices"


def test_experts_that_do_not_divide_are_gathered_as_planned():
    """6 experts on 4 devices: stored in parts of other dimensions, gathered forward; the gradients
    of all 8 slots backward."""
    case = Case((6, 8), (2, 4, 1), (X, ()))
    mesh = MeshShape(*case.mesh)
    cost = expert_cost(model_of(case), 0, mesh, X, Job("train", ROWS, LENGTH, "float32")).cost
    expected = planned(cost.traffic, "all_gather", "weights", mesh)
    # jax 0.12 does not say that those of the forward pass belong to it.
    gathered = [
        found("train", case, "all_gather", 0, direction, 4)
        for direction in (FORWARD, BACKWARD, OTHER)
    ]
    assert [sum(pair) for pair in zip(*gathered, strict=True)] == expected
    assert expected[0] == 3 + 4  # wi, wo, wo_bias; the gradients of wi_bias too


@pytest.mark.parametrize("name", ["evaluate", "decode"])
def test_dropless_exchanges_are_those_that_were_planned(name):
    """Tokens are gathered and sums scattered. XLA sends the mask of one choice for all."""
    case = Case((6, 8), (2, 4, 1), (DX, X), factor=None)
    model, mesh = model_of(case), MeshShape(*case.mesh)
    job = Job("serve", ROWS, 1 if name == "decode" else LENGTH, "float32")
    for layer, group in ((0, 8), (1, 4)):
        cost = expert_cost(model, layer, mesh, case.axes[layer], job).cost
        sums = planned(cost.traffic, "reduce_scatter", "tokens", mesh)
        assert found(name, case, "reduce_scatter", layer, FORWARD, group) == sums
    # The other layer's group is all devices, over which the CPU also gathers router logits.
    tokens = planned(cost.traffic, "all_gather", "tokens", mesh)
    assert found(name, case, "all_gather", 1, FORWARD, 4)[1] == pytest.approx(tokens[1], rel=0.03)


def test_state_and_arguments_of_a_training_program_agree():
    """12 of the planner's 16 bytes a parameter are the program's arguments: not the gradient."""
    case = Case((6, 8), (2, 4, 1), (X, ()))
    model, mesh = model_of(case), MeshShape(*case.mesh)
    job = Job("train", ROWS, LENGTH, "float32")
    costs = [expert_cost(model, i, mesh, case.axes[i], job).cost for i in model.moe_layers]
    state = sum(cost.state_bytes for cost in (*costs, rest_cost(model, mesh, job)))
    stage = TrainConfig(OptimizerConfig(1e-3), 10, ROWS, model=model, expert_axes=case.axes)
    program = programs.build(
        "train", model, stage, make_mesh(expert_partitions=4), num_rows=ROWS, length=LENGTH
    )
    arguments = program.lower().compile().memory_analysis().argument_size_in_bytes
    # Beside the state: step, seed, schedule counts, and rows of four arrays of at most 4 bytes.
    assert 0 <= arguments - 12 / 16 * state <= 64 + 2 * LENGTH * 4 * 4


# Properties


@settings(deadline=None)
@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from([MeshShape(2, 4, 1), MeshShape(1, 8, 1), MeshShape(2, 2, 2)]),
)
def test_more_experts_never_take_less_memory(one, other, mesh):
    """Of those that divide: of 49 experts on 4 devices each holds all biases, of 52 a quarter."""
    job = Job("train", 64, 16, "float32")
    for axes in ((), X):
        small, large = (
            expert_cost(SMALL.with_experts(8 * count), 0, mesh, axes, job)
            for count in sorted((one, other))
        )
        assert small.weight_bytes <= large.weight_bytes
        assert small.padded_experts <= large.padded_experts


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.5, 2), st.floats(0.5, 2))
def test_more_tokens_or_slots_never_send_fewer_bytes(one, other, factor, other_factor):
    mesh = MeshShape(2, 4, 1)

    def payload(rows: int, factor: float) -> int:
        model = dataclasses.replace(SMALL, capacity_factor=factor)
        job = Job("train", 8 * rows, LENGTH, "float32")
        return expert_cost(model, 0, mesh, X, job).cost.traffic[0].payload_bytes

    small, large = sorted((one, other))
    assert payload(small, factor) <= payload(large, factor)
    low, high = sorted((factor, other_factor))
    assert payload(one, low) <= payload(one, high)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]))
def test_parts_of_a_batch_send_its_gradients_each(parts):
    mesh = MeshShape(8, 1, 1)
    job = Job("train", 64, LENGTH, "float32", parts)
    (traffic,) = expert_cost(SMALL, 1, mesh, (), job).cost.traffic
    assert traffic.times == parts
    whole = dataclasses.replace(job, accumulation_steps=1)
    assert (traffic.payload_bytes,) == tuple(
        t.payload_bytes for t in expert_cost(SMALL, 1, mesh, (), whole).cost.traffic
    )
