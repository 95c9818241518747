from __future__ import annotations

import functools
import math
import re
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


@given(num_assignments=st.integers(1, 10**6), num_experts=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_blocks_are_powers_of_two_of_16_to_128_rows(num_assignments: int, num_experts: int):
    rows = expert_parallel.block_rows(num_assignments, num_experts)
    assert 16 <= rows <= 128
    assert rows & (rows - 1) == 0
    assert rows == 16 or rows <= num_assignments / (4 * num_experts)


def test_block_rows_worked_by_hand():
    # Mean loads of 1/8, 64, 256, 300 and 1024 rows.
    loads = ((1, 8), (512, 8), (32768, 128), (2400, 8), (32768, 32))
    assert [expert_parallel.block_rows(*load) for load in loads] == [16, 16, 64, 64, 128]


def test_dispatch_leaves_empty_slots_zero_and_combine_weighs():
    x = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    slots = expert_parallel.invert(jnp.asarray([[2, 0], [4, 1], [4, 4]], jnp.int32), 4)
    np.testing.assert_array_equal(slots.assignment, [1, 3, 0, 6])  # 6: empty
    rows = jax.jit(expert_parallel.dispatch)(x, slots)
    np.testing.assert_array_equal(rows, [[1, 2], [3, 4], [1, 2], [0, 0]])
    gate = np.asarray([[0.5, 0.25], [1.0, 2.0], [1.0, 1.0]], np.float32)
    y = jax.jit(expert_parallel.combine)(rows, gate, slots)
    np.testing.assert_allclose(y, [[0.75, 1.5], [6.0, 8.0], [0.0, 0.0]], rtol=TOLERANCE)


@pytest.mark.parametrize("topk", [1, 2])
def test_the_gradients_of_dispatch_and_combine_are_those_of_plain_indexing(topk):
    generator = np.random.default_rng(topk)
    tokens, num_slots = 5, 7
    order = generator.permutation(num_slots + 3)[: tokens * topk].reshape(tokens, topk)
    of_assignment = jnp.asarray(np.minimum(order, num_slots), jnp.int32)
    slots = expert_parallel.invert(of_assignment, num_slots)
    x, gate, weight = (
        generator.normal(size=shape).astype(np.float32)
        for shape in ((tokens, DIM), (tokens, topk), (tokens, DIM))
    )

    def ours(x, gate):
        rows = jnp.tanh(expert_parallel.dispatch(x, slots))
        return jnp.sum(expert_parallel.combine(rows, gate, slots) * weight)

    def plain(x, gate):
        kept = (of_assignment < num_slots)[..., None]
        rows = jnp.where(kept, jnp.tanh(x)[:, None], 0.0)
        return jnp.sum(jnp.sum(rows * gate[..., None], axis=1) * weight)

    for got, expected in zip(
        jax.grad(ours, argnums=(0, 1))(x, gate),
        jax.grad(plain, argnums=(0, 1))(x, gate),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("expert_axes", "num_experts", "capacity", "all_to_alls"),
    [
        ((), 5, 2, 0),
        ((), 5, None, 0),
        (("data",), 5, 2, 2),
        (("data", "expert"), 9, 3, 2),
        (("data", "expert"), 4, 2, 2),
        (("data", "expert"), 9, None, 0),
        (("data",), 3, None, 0),
    ],
)
def test_the_axes_that_divide_a_layers_experts_are_free_to_choose(
    expert_axes, num_experts, capacity, all_to_alls, random_experts, reference_experts
):
    mesh = make_mesh(expert_partitions=2, model_partitions=2, devices=jax.devices()[:8])
    tokens = make_tokens(num_experts, topk=2)
    experts = random_experts(num_experts, DIM, MLP)
    apply = jax.jit(apply_moe, static_argnames=(*STATIC, "expert_axes"))
    options = {"activation": gelu, "capacity": capacity, "mesh": mesh, "expert_axes": expert_axes}
    out = apply(**tokens, experts=experts, **options)
    for group in range(GROUPS):
        arrays = {name: array[group] for name, array in tokens.items()}
        y, is_kept = reference_experts(**arrays, experts=experts, capacity=capacity)
        np.testing.assert_allclose(out.y[group], y, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_array_equal(out.is_kept[group], is_kept)
    program = apply.lower(**tokens, experts=experts, **options).compile().as_text() or ""
    assert len(re.findall(r" all-to-all(?:-start)?\(", program)) == all_to_alls


def skewed_tokens(num_experts: int, topk: int, tokens: int, skew: float) -> dict[str, Any]:
    """Enough tokens for full blocks; with a skew, the first experts get most of them."""
    generator = np.random.default_rng(num_experts)
    weights = np.exp(-skew * np.arange(num_experts))
    index = np.argsort(-np.log(weights) - generator.gumbel(size=(1, tokens, num_experts)), axis=-1)[
        ..., :topk
    ]
    return {
        "x": generator.normal(size=(1, tokens, DIM)).astype(np.float32),
        "expert_index": index.astype(np.int32),
        "gate": generator.random((1, tokens, topk)).astype(np.float32),
        "mask": generator.random((1, tokens)) < 0.9,
    }


@pytest.mark.parametrize("is_gated", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_even_and_uneven_loads_give_the_loops_outputs_and_gradients(
    skew, capacity, is_gated, random_experts, reference_experts
):
    # 200 tokens * 2 on 4 experts: blocks of 16 rows.
    num_experts, topk, num_tokens = 4, 2, 200
    tokens = skewed_tokens(num_experts, topk, num_tokens, skew)
    chosen = tokens["expert_index"][tokens["mask"]]
    counts = np.bincount(chosen.ravel(), minlength=num_experts)
    assert (counts.max() > 1.5 * counts.mean()) == (skew > 0)
    experts = jax.tree.map(jnp.asarray, random_experts(num_experts, DIM, MLP, is_gated=is_gated))
    check(tokens, experts, capacity, None, reference_experts)
    cotangent = np.random.default_rng(0).normal(size=tokens["x"].shape).astype(np.float32)
    is_kept = apply_moe(
        **tokens, experts=experts, activation=gelu, capacity=capacity, mesh=None
    ).is_kept

    def ours(x, gate, experts):
        arrays: dict[str, Any] = {**tokens, "x": x, "gate": gate}
        out = apply_moe(**arrays, experts=experts, activation=gelu, capacity=capacity, mesh=None)
        return jnp.sum(out.y * cotangent)

    def every_expert(x, gate, experts):
        every = expert_parallel.apply_experts(
            jnp.broadcast_to(x[0], (num_experts, *x[0].shape)), experts, gelu
        )
        chosen = jax.nn.one_hot(tokens["expert_index"][0], num_experts)
        weight = jnp.einsum("tke,tk->te", chosen, jnp.where(is_kept[0], gate[0], 0.0))
        return jnp.sum(jnp.einsum("etd,te->td", every, weight) * cotangent[0])

    inputs = (tokens["x"], tokens["gate"], experts)
    for got, expected in zip(
        jax.tree.leaves(jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*inputs)),
        jax.tree.leaves(jax.jit(jax.grad(every_expert, argnums=(0, 1, 2)))(*inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("tokens", "num_experts", "topk"), [(1, 8, 1), (3, 8, 2), (5, 2, 1)])
def test_a_few_tokens_need_no_sorting(tokens, num_experts, topk, random_experts, reference_experts):
    arrays = {name: array[:1, :tokens] for name, array in make_tokens(num_experts, topk).items()}
    experts = random_experts(num_experts, DIM, MLP)
    wanted = np.broadcast_to(arrays["mask"][..., None], arrays["expert_index"].shape)
    for capacity in (None, 1):
        out = jax.jit(expert_parallel._apply_few, static_argnames=("activation", "capacity"))(
            expert_parallel.Tokens._make(
                map(jnp.asarray, (arrays["x"], arrays["expert_index"], arrays["gate"], wanted))
            ),
            experts,
            activation=gelu,
            capacity=capacity,
        )
        one = {name: array[0] for name, array in arrays.items()}
        y, is_kept = reference_experts(**one, experts=experts, capacity=capacity)
        np.testing.assert_allclose(out.y[0], y, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_array_equal(out.is_kept[0], is_kept)


def gradients(tokens, experts, capacity, mesh, expert_axes=("expert",)):
    cotangent = np.random.default_rng(0).normal(size=tokens["x"].shape).astype(np.float32)

    def loss(x, gate, experts):
        arrays: dict[str, Any] = {**tokens, "x": x, "gate": gate}
        out = apply_moe(
            **arrays,
            experts=experts,
            activation=gelu,
            capacity=capacity,
            mesh=mesh,
            expert_axes=expert_axes,
        )
        return jnp.sum(out.y * cotangent)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(tokens["x"], tokens["gate"], experts)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize(
    "expert_axes", [(), ("expert",), ("data",), ("data", "expert")], ids="-".join
)
def test_gradients_on_a_data_expert_model_mesh_equal_one_devices(
    expert_axes, capacity, random_experts
):
    mesh = make_mesh(expert_partitions=2, model_partitions=2, devices=jax.devices()[:8])
    tokens = make_tokens(5, topk=2)
    experts = jax.tree.map(jnp.asarray, random_experts(5, DIM, MLP, is_gated=True))
    expected = gradients(tokens, experts, capacity, None)
    for got, want in zip(
        jax.tree.leaves(gradients(tokens, experts, capacity, mesh, expert_axes)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("capacity", "shape"), [(None, None), (3, None), (3, (2, 2, 2))])
def test_bfloat16_stays_within_its_rounding(capacity, shape, random_experts, reference_experts):
    mesh = None
    if shape is not None:
        mesh = make_mesh(expert_partitions=2, model_partitions=2, devices=jax.devices()[:8])
    tokens = make_tokens(6, topk=2)
    low = {**tokens, "x": jnp.asarray(tokens["x"], jnp.bfloat16)}
    experts = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.bfloat16), random_experts(6, DIM, MLP)
    )
    apply = jax.jit(apply_moe, static_argnames=STATIC)
    out = apply(**low, experts=experts, activation=gelu, capacity=capacity, mesh=mesh)
    assert out.y.dtype == jnp.float32
    exact = jax.tree.map(lambda array: np.asarray(array, np.float32), experts)
    for group in range(GROUPS):
        arrays = {name: np.asarray(array[group], array.dtype) for name, array in tokens.items()}
        arrays["x"] = np.asarray(low["x"][group], np.float32)
        y, is_kept = reference_experts(**arrays, experts=exact, capacity=capacity)
        np.testing.assert_array_equal(out.is_kept[group], is_kept)
        error = np.linalg.norm(out.y[group] - y) / np.linalg.norm(y)
        assert error < 0.01
