from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from uncurl_jax.models import expert_parallel
from uncurl_jax.models.expert_parallel import Experts, apply_moe
from uncurl_jax.partitioning import make_mesh

TOLERANCE = 1e-5
GROUPS, TOKENS, DIM, MLP = 4, 6, 8, 8


def make_tokens(num_experts: int, topk: int, groups: int = GROUPS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(num_experts)
    index = np.argsort(generator.random((groups, TOKENS, num_experts)))[..., :topk]
    return {
        "x": generator.normal(size=(groups, TOKENS, DIM)).astype(np.float32),
        "expert_index": index.astype(np.int32),
        "gate": generator.random((groups, TOKENS, topk)).astype(np.float32),
        "mask": generator.random((groups, TOKENS)) < 0.8,
    }


gelu = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {"gelu": gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
STATIC = ("activation", "capacity", "mesh")


def check(
    tokens,
    experts: Experts,
    capacity: int | None,
    mesh: Mesh | None,
    reference,
    activation: str = "gelu",
) -> None:
    apply = jax.jit(apply_moe, static_argnames=STATIC)
    function = ACTIVATIONS[activation]
    out = apply(**tokens, experts=experts, activation=function, capacity=capacity, mesh=mesh)
    for group in range(len(tokens["x"])):
        arrays = {name: array[group] for name, array in tokens.items()}
        y, is_kept = reference(**arrays, experts=experts, capacity=capacity, activation=activation)
        np.testing.assert_allclose(out.y[group], y, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_array_equal(out.is_kept[group], is_kept)


@pytest.mark.parametrize("num_experts", range(1, 17))
def test_every_expert_count_works_on_a_4_way_expert_axis(
    num_experts, random_experts, reference_experts
):
    mesh = make_mesh(expert_partitions=4, devices=jax.devices()[:4])
    tokens = make_tokens(num_experts, topk=min(2, num_experts))
    experts = random_experts(num_experts, DIM, MLP)
    check(tokens, experts, 2, mesh, reference_experts)


@pytest.mark.parametrize(
    ("num_experts", "capacity", "shape"),
    [
        (5, None, (1, 4, 1)),  # dropless across the all-to-all
        (5, None, (4, 1, 2)),  # dropless blocks on each device, hidden units divided
        (3, 2, (2, 2, 2)),
        (3, 2, (4, 1, 1)),
    ],
)
def test_other_meshes_equal_the_loop(
    num_experts, capacity, shape, random_experts, reference_experts
):
    data, expert, model = shape
    mesh = make_mesh(
        expert_partitions=expert,
        model_partitions=model,
        devices=jax.devices()[: data * expert * model],
    )
    tokens = make_tokens(num_experts, topk=2)
    check(tokens, random_experts(num_experts, DIM, MLP), capacity, mesh, reference_experts)


@pytest.mark.parametrize(
    ("is_gated", "has_bias", "activation", "capacity", "shape"),
    [
        (True, True, "silu", None, None),
        (True, True, "silu", 2, (2, 2, 2)),
        (True, False, "silu", None, (1, 4, 2)),
        (True, False, "gelu", 2, (1, 8, 1)),
        (False, False, "relu", None, (4, 1, 2)),
        (False, False, "relu", 2, (2, 4, 1)),
        (True, True, "relu", 3, None),
    ],
)
def test_gated_and_plain_experts_with_and_without_biases_equal_the_loop(
    is_gated, has_bias, activation, capacity, shape, random_experts, reference_experts
):
    mesh = None
    if shape is not None:
        mesh = make_mesh(
            expert_partitions=shape[1],
            model_partitions=shape[2],
            devices=jax.devices()[: math.prod(shape)],
        )
    groups = 8 if shape == (1, 8, 1) or shape == (2, 4, 1) else GROUPS
    experts = random_experts(5, DIM, MLP, is_gated=is_gated, has_bias=has_bias)
    assert (experts.wg is not None) == is_gated and (experts.wi_bias is not None) == has_bias
    tokens = make_tokens(5, topk=2, groups=groups)
    check(tokens, experts, capacity, mesh, reference_experts, activation)


def test_hidden_units_that_the_model_axis_does_not_divide_stay_whole(
    random_experts, reference_experts
):
    mesh = make_mesh(expert_partitions=2, model_partitions=2, devices=jax.devices()[:4])
    tokens = make_tokens(3, topk=1, groups=2)
    check(tokens, random_experts(3, DIM, 7), 2, mesh, reference_experts)


@pytest.mark.parametrize(("num_experts", "topk"), [(1, 1), (4, 2), (24, 1), (2, 2)])
def test_one_device_without_drops_equals_the_loop(
    num_experts, topk, random_experts, reference_experts
):
    # 24 tokens: blocks of 8, 4, 1 and 8 rows.
    tokens = make_tokens(num_experts, topk)
    check(tokens, random_experts(num_experts, DIM, MLP), None, None, reference_experts)


def test_all_tokens_may_choose_the_last_expert(random_experts, reference_experts):
    tokens = make_tokens(6, topk=1)
    tokens["expert_index"][:] = 5
    tokens["mask"][:] = True
    experts = random_experts(6, DIM, MLP)
    check(tokens, experts, None, None, reference_experts)
    check(tokens, experts, 2, None, reference_experts)


def test_dropless_gradients_equal_those_with_a_slot_for_every_token(random_experts):
    tokens = make_tokens(4, topk=2, groups=1)
    experts = jax.tree.map(jnp.asarray, random_experts(4, DIM, MLP))
    cotangent = np.random.default_rng(0).normal(size=(1, TOKENS, DIM)).astype(np.float32)

    def gradients(capacity: int | None):
        def loss(x, gate, experts):
            arrays: dict[str, Any] = {**tokens, "x": x, "gate": gate}
            out = apply_moe(
                **arrays, experts=experts, activation=gelu, capacity=capacity, mesh=None
            )
            return jnp.sum(out.y * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(tokens["x"], tokens["gate"], experts)

    for dropless, slots in zip(
        jax.tree.leaves(gradients(None)), jax.tree.leaves(gradients(TOKENS)), strict=True
    ):
        np.testing.assert_allclose(dropless, slots, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_compiled_program_exchanges_tokens_by_all_to_all(random_experts):
    mesh = make_mesh(expert_partitions=4, devices=jax.devices()[:4])
    apply = jax.jit(apply_moe, static_argnames=STATIC)

    def program(num_experts: int, mesh: Mesh | None) -> str:
        tokens = make_tokens(num_experts, topk=1)
        experts = random_experts(num_experts, DIM, MLP)
        options = {"activation": gelu, "capacity": 2, "mesh": mesh}
        return apply.lower(**tokens, experts=experts, **options).compile().as_text() or ""

    assert "all-to-all" in program(8, mesh)
    assert "all-to-all" not in program(8, make_mesh(devices=jax.devices()[:4]))
    assert "all-to-all" not in program(8, None)


@given(
    num_assignments=st.integers(1, 5000),
    num_experts=st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_blocks_are_powers_of_two_below_the_mean_load(num_assignments: int, num_experts: int):
    rows = expert_parallel.block_size(num_assignments, num_experts)
    mean = num_assignments // num_experts
    assert 1 <= rows <= 256
    assert rows & (rows - 1) == 0
    assert rows <= max(1, mean)


def test_block_sizes_worked_by_hand():
    sizes = [expert_parallel.block_size(*pair) for pair in ((1, 8), (32, 8), (100, 8), (10**6, 8))]
    assert sizes == [1, 2, 4, 256]


def test_dispatch_leaves_empty_slots_zero_and_combine_weighs():
    x = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    slot = np.asarray([[2, 0], [4, 1], [4, 4]], np.int32)  # 4: dropped
    slots = jax.jit(expert_parallel.dispatch, static_argnums=2)(x, slot, 4)
    np.testing.assert_array_equal(slots, [[1, 2], [3, 4], [1, 2], [0, 0]])
    gate = np.asarray([[0.5, 0.25], [1.0, 2.0], [1.0, 1.0]], np.float32)
    y = jax.jit(expert_parallel.combine)(slots, slot, gate)
    np.testing.assert_allclose(y, [[0.75, 1.5], [6.0, 8.0], [0.0, 0.0]], rtol=TOLERANCE)
