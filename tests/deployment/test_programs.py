"""Whole programs on eight devices of the CPU: what they are given, and what they exchange.

The model has MoE layers 0 (8 experts) and 2 (4 experts) and a dense layer 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.deployment import programs
from uncurl_jax.deployment.collectives import Collective, count, find_collectives
from uncurl_jax.deployment.programs import CALIBRATE, DECODE, EVALUATE, TRAIN
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.partitioning import make_mesh

ROWS, LENGTH = 16, 8


@pytest.fixture(scope="module")
def exchanged(small_model: ModelConfig, stage) -> Callable[..., list[Collective]]:
    """Returns exchanged(program, expert_partitions=1, expert_axes=None), compiled once each."""

    @functools.cache
    def compile_and_find(
        name: str, expert_partitions: int = 1, expert_axes: tuple | None = None
    ) -> list[Collective]:
        config: TrainConfig = stage(expert_axes=expert_axes)
        mesh = make_mesh(expert_partitions=expert_partitions)
        program = programs.build(name, small_model, config, mesh, num_rows=ROWS, length=LENGTH)
        return find_collectives(program.lower().compile().as_text())

    return compile_and_find


def test_divided_experts_take_two_all_to_alls_forward_and_two_backward(exchanged):
    found = exchanged(TRAIN, expert_partitions=4)
    assert count(found, "all-to-all", direction="forward") == {0: 2, 2: 2}
    assert count(found, "all-to-all", direction="backward") == {0: 2, 2: 2}
    # 8 * 2 or 4 * 4 slots of 16 numbers, 4 bytes each, whichever way.
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert {(c.group_size, c.bytes_per_device) for c in exchanges} == {(4, 1024)}


def test_replicated_experts_take_none(exchanged):
    found = exchanged(TRAIN, expert_partitions=4, expert_axes=((), (), ()))
    assert count(found, "all-to-all") == {}
    # Their gradients are added up instead, as those of the dense layer are.
    assert set(count(found, "all-reduce", direction="backward")) >= {0, 1, 2}
    # A mesh without an expert axis replicates them too.
    assert count(exchanged(EVALUATE), "all-to-all") == {}


def test_each_layer_may_be_placed_otherwise(exchanged):
    found = exchanged(EVALUATE, expert_partitions=4, expert_axes=(("data", "expert"), (), ()))
    assert count(found, "all-to-all") == {0: 2}
    assert {c.group_size for c in found if c.kind == "all-to-all"} == {8}


def test_evaluation_and_calibration_go_forward_alone(exchanged):
    evaluated = exchanged(EVALUATE, expert_partitions=4)
    assert count(evaluated, "all-to-all", direction="forward") == {0: 2, 2: 2}
    assert count(evaluated, "all-to-all", direction="backward") == {}
    # Nothing is gathered after the last router, so its experts need not run.
    assert count(exchanged(CALIBRATE, expert_partitions=4), "all-to-all") == {0: 2}


def test_a_decode_step_with_replicated_experts_exchanges_no_tokens(exchanged):
    assert count(exchanged(DECODE), "all-to-all") == {}


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_programs_take_what_they_say(small_model, stage, name):
    mesh = make_mesh(expert_partitions=4)
    program = programs.build(name, small_model, stage(), mesh, num_rows=ROWS, length=LENGTH)
    assert program.num_rows == ROWS
    assert program.num_tokens == (ROWS if name == DECODE else ROWS * LENGTH)
    sizes = programs.argument_bytes(program)
    total = count_parameters(small_model).total
    # 12 experts of 2 * 16 * 24 weights and 24 + 16 biases, a quarter of them on each device.
    experts = 12 * (2 * 16 * 24 + 24 + 16)
    assert sizes["expert_parameters"] == 4 * experts / 4
    assert sizes["other_parameters"] == 4 * (total - experts)
    is_train = name == TRAIN
    assert sizes["expert_optimizer"] == is_train * 2 * sizes["expert_parameters"]
    # Two moments, and the step counters of Adam and of the schedule.
    assert sizes["other_optimizer"] == is_train * (2 * sizes["other_parameters"] + 8)
    # Keys and values of 3 layers, 2 rows of 8 positions, 16 numbers of 4 bytes.
    assert sizes["cache"] == (name == DECODE) * 2 * 3 * 2 * 8 * 16 * 4
    # Two rows: 8 tokens of 4 + 4 + 4 + 1 bytes; or token, position and flag.
    extra = 8 if is_train else 0
    assert sizes["batch"] == (2 * 9 if name == DECODE else 2 * LENGTH * 13 + extra)


def test_model_flops_are_six_per_parameter_and_a_third_forward(small_model, stage):
    model = dataclasses.replace(small_model, num_experts=(0, 0, 0))
    mesh = make_mesh()

    def flops(name: str) -> float | None:
        program = programs.build(name, model, stage(), mesh, num_rows=ROWS, length=LENGTH)
        return programs.model_flops(program, model, LENGTH)

    multiplied = count_parameters(model).total - 8 * 16
    assert flops(TRAIN) == 6 * ROWS * LENGTH * (multiplied + 3 * LENGTH * 16)
    assert flops(EVALUATE) == flops(CALIBRATE) == pytest.approx((flops(TRAIN) or 0) / 3)
    assert flops(DECODE) is None
