from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.models import grouped_matmul
from uncurl_jax.models.grouped_matmul import Blocks, make_blocks

ROWS, NUM_IN, NUM_OUT = 16, 32, 64
COUNTS = ((16, 0, 40, 7), (0, 0, 0, 0), (0, 0, 0, 64), (1, 1, 1, 1), (33, 16, 15, 0))


def make_rows(counts, num_out: int, dtype=np.float32):
    """Rows in blocks, zero where empty, junk in blocks that are not used; and their kernels."""
    generator = np.random.default_rng(sum(counts))
    num_blocks = sum(counts) // ROWS + len(counts)
    num_blocks += num_blocks % len(counts) == 0  # never even
    blocks = jax.jit(make_blocks, static_argnums=(1, 2))(jnp.asarray(counts), ROWS, num_blocks)
    x = np.full((num_blocks * ROWS, NUM_IN), 7.0)
    owner = np.full(num_blocks * ROWS, -1)
    for expert, count in enumerate(counts):
        first, last = int(blocks.first[expert]) * ROWS, int(blocks.last[expert]) * ROWS
        x[first:last] = 0
        x[first : first + count] = generator.normal(size=(count, NUM_IN))
        owner[first:last] = expert
    kernel = generator.normal(size=(len(counts), NUM_IN, num_out))
    return blocks, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), owner


def platforms(dtype=np.float32):
    return {
        "loop": (grouped_matmul._matmul_loop, grouped_matmul._outer_loop, {}),
        "triton": (
            grouped_matmul._matmul_triton,
            grouped_matmul._outer_triton,
            {"interpret": True},
        ),
        "megablox": (
            grouped_matmul._matmul_megablox,
            grouped_matmul._outer_megablox,
            {"interpret": True},
        ),
    }


def test_blocks_worked_by_hand():
    blocks = make_blocks(jnp.asarray([16, 0, 33]), 16, 6)
    np.testing.assert_array_equal(blocks.first, [0, 1, 1])
    np.testing.assert_array_equal(blocks.last, [1, 1, 4])
    np.testing.assert_array_equal(blocks.expert, [0, 2, 2, 2, 3, 3])


@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=9),
    rows=st.sampled_from([1, 16, 32]),
)
@settings(max_examples=50, deadline=None)
def test_every_row_lies_in_a_block_of_its_expert(counts: list[int], rows: int):
    num_blocks = sum(counts) // rows + len(counts)
    blocks: Blocks = jax.device_get(make_blocks(jnp.asarray(counts), rows, num_blocks))
    for expert, count in enumerate(counts):
        assert (blocks.last[expert] - blocks.first[expert]) * rows in range(count, count + rows)
        assert (blocks.expert[blocks.first[expert] : blocks.last[expert]] == expert).all()
    if blocks.is_even:
        share = num_blocks // len(counts)
        np.testing.assert_array_equal(blocks.expert, np.arange(num_blocks) // share)
    else:
        assert (blocks.expert[blocks.last[-1] :] == len(counts)).all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("platform", ["loop", "triton", "megablox"])
def test_every_platforms_product_is_each_experts_own(platform, counts, is_transposed):
    matmul, _, options = platforms()[platform]
    blocks, x, kernel, owner = make_rows(counts, NUM_OUT)
    given_kernel = kernel.swapaxes(1, 2) if is_transposed else kernel
    y = matmul(x, given_kernel, blocks, is_transposed=is_transposed, **options)
    assert y.shape == (len(x), NUM_OUT)
    for expert in range(len(counts)):
        rows = owner == expert
        expected = np.asarray(x, np.float64)[rows] @ np.asarray(kernel[expert], np.float64)
        np.testing.assert_allclose(y[rows], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("platform", ["loop", "triton", "megablox"])
def test_every_platforms_outer_products_are_summed_over_each_experts_rows(platform, counts):
    _, outer, options = platforms()[platform]
    blocks, x, _, owner = make_rows(counts, NUM_OUT)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), NUM_OUT)), jnp.float32)
    sums = outer(x, g, blocks, **options)
    for expert in range(len(counts)):
        rows = owner == expert
        expected = np.asarray(x, np.float64)[rows].T @ np.asarray(g, np.float64)[rows]
        np.testing.assert_allclose(sums[expert], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("platform", ["loop", "triton", "megablox"])
def test_bfloat16_accumulates_in_float32(platform):
    matmul, outer, options = platforms()[platform]
    blocks, x, kernel, owner = make_rows((40, 16), NUM_OUT, jnp.bfloat16)
    y = matmul(x, kernel, blocks, is_transposed=False, **options)
    sums = outer(x, y, blocks, **options)
    assert y.dtype == sums.dtype == jnp.bfloat16
    for expert in range(2):
        rows = owner == expert
        exact = np.asarray(x, np.float64)[rows] @ np.asarray(kernel[expert], np.float64)
        np.testing.assert_allclose(np.asarray(y[rows], np.float64), exact, rtol=2**-7, atol=0.05)
        exact = np.asarray(x, np.float64)[rows].T @ np.asarray(y, np.float64)[rows]
        error = np.linalg.norm(np.asarray(sums[expert], np.float64) - exact)
        assert error < 0.004 * np.linalg.norm(exact)


def test_shapes_that_tiles_do_not_divide_take_the_loop():
    blocks, x, kernel, owner = make_rows((20, 5), 24)
    assert 24 % grouped_matmul._SMALLEST_TILE
    y = grouped_matmul._matmul_triton(x, kernel, blocks, is_transposed=False)  # on no GPU
    rows = owner == 1
    np.testing.assert_allclose(y[rows], x[rows] @ kernel[1], rtol=1e-5, atol=1e-4)


def test_even_loads_stand_at_equal_distances_and_are_one_batched_product():
    counts, num_blocks = jnp.asarray([16, 0, 20]), 6
    blocks = make_blocks(counts, ROWS, num_blocks)
    assert blocks.is_even is not None and bool(blocks.is_even)
    np.testing.assert_array_equal(blocks.first, [0, 2, 4])
    np.testing.assert_array_equal(blocks.last, [1, 2, 6])
    np.testing.assert_array_equal(blocks.expert, [0, 0, 1, 1, 2, 2])
    uneven = make_blocks(jnp.asarray([0, 0, 33]), ROWS, num_blocks)
    assert uneven.is_even is not None and not bool(uneven.is_even)
    np.testing.assert_array_equal(uneven.first, [0, 0, 0])
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(num_blocks * ROWS, NUM_IN)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(3, NUM_IN, NUM_OUT)), jnp.float32)
    program = jax.jit(grouped_matmul.matmul)
    y = program(x, kernel, blocks)
    expected = np.einsum("ecd,edf->ecf", np.reshape(x, (3, -1, NUM_IN)), kernel)
    np.testing.assert_allclose(y, expected.reshape(len(x), -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("counts", [(20, 0, 12), (64, 0, 3)], ids=str)
def test_gradients_of_the_product_are_those_of_each_experts_own(counts):
    num_blocks = 6
    blocks = make_blocks(jnp.asarray(counts), ROWS, num_blocks)
    generator = np.random.default_rng(0)
    owner = np.full(num_blocks * ROWS, -1)
    for expert, count in enumerate(counts):
        first = int(blocks.first[expert]) * ROWS
        owner[first : first + count] = expert
    is_row = (owner >= 0)[:, None]
    x = jnp.asarray(np.where(is_row, generator.normal(size=(len(owner), NUM_IN)), 0), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(3, NUM_IN, NUM_OUT)), jnp.float32)
    weight = np.where(is_row, generator.normal(size=(len(owner), NUM_OUT)), 0)

    def ours(x, kernel):
        return jnp.sum(grouped_matmul.matmul(x, kernel, blocks) * weight)

    def plain(x, kernel):
        return jnp.sum(jnp.einsum("rk,rkn->rn", x, kernel[owner]) * weight)

    got = jax.jit(jax.grad(ours, argnums=(0, 1)))(x, kernel)
    want = jax.jit(jax.grad(plain, argnums=(0, 1)))(x, kernel)
    np.testing.assert_allclose(got[0][owner >= 0], want[0][owner >= 0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-4)


def test_batched_products_have_gradients_in_the_operands_dtype():
    x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((2, 4, 5), jnp.bfloat16)
    y, pull_back = jax.vjp(grouped_matmul.batched_matmul, x, kernel)
    program = str(jax.make_jaxpr(pull_back)(y))
    assert y.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in pull_back(y)] == [jnp.bfloat16] * 2
    assert "convert_element_type[new_dtype=float32" not in program  # products of bfloat16
