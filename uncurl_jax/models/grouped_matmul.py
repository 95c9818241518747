"""Matrix products of rows that are sorted by expert, each with its own expert's kernel.

Rows stand in blocks of a fixed number of rows; a block belongs to one expert, an expert to
consecutive blocks, its last one padded with zero rows. That is the layout of MegaBlocks
(arXiv 2211.15841): the cost follows the rows in use, not experts times rows, and no block needs a
mask. There is one program for each kind of device: Pallas-Triton kernels (CUDA GPUs), JAX's
megablox kernels (TPU), and a loop over blocks (CPU, and shapes that the kernels cannot take).

Where an expert's blocks may be placed at equal distances without running into the next expert's,
which balanced loads allow, one batched product does the same, and faster. The device decides from
the loads.

Axes: r row, b block, e expert, c rows of one expert, k in, n out. Rows of blocks that no expert
uses hold anything afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Tiles of the Triton kernels, found best on an H200 by benchmarks/moe_layer.py --tiles.
_TILE_K = 64
_TILE_N = 256
_TILE_OUTER = (128, 256)
_SUPER_ROWS = 8
_SMALLEST_TILE = 16
# The largest tiles of megablox, which are what its own users choose.
_TPU_TILE = 512


class Blocks(NamedTuple):
    """Which expert each block of rows belongs to.

    Attributes:
      expert: [b] int32; the number of experts where a block is nobody's.
      first: [e] int32, each expert's first block.
      last: [e] int32, one after its last block.
      is_even: bool scalar: expert i owns blocks i * b / e to (i + 1) * b / e, whether it uses them
        or not, and products may be one batched product. None where that can never be. If not even,
        blocks in use stand without gaps, and the others are nobody's.
    """

    expert: jax.Array
    first: jax.Array
    last: jax.Array
    is_even: jax.Array | None


def make_blocks(
    counts: jax.Array, rows: int, num_blocks: int, *, may_be_even: bool = True
) -> Blocks:
    """Gives each expert the blocks that its rows need, in the order of experts.

    Args:
      counts: [e] int32, rows of each expert.
      rows: rows per block.
      num_blocks: b, at least what the counts can need. A multiple of e lets experts have equal
        shares.
      may_be_even: whether to give them equal shares if the counts fit those. Not worth it where
        the counts are known to need a small part of the blocks.

    Returns:
      The blocks.
    """
    num_experts = counts.shape[0]
    needed = -(-counts // rows)
    last = jnp.cumsum(needed).astype(jnp.int32)
    first = last - needed
    places = jnp.arange(num_blocks, dtype=jnp.int32)
    # Comparing with every expert is one fused pass; a search would be a loop on the device.
    expert = jnp.sum(places[:, None] >= last, axis=1, dtype=jnp.int32)
    if not may_be_even or num_blocks % num_experts:
        return Blocks(expert, first, last, None)
    share = num_blocks // num_experts
    is_even = needed.max() <= share
    evenly = jnp.arange(num_experts, dtype=jnp.int32) * share
    first = jnp.where(is_even, evenly, first)
    return Blocks(jnp.where(is_even, places // share, expert), first, first + needed, is_even)


def spread(values: jax.Array, blocks: Blocks) -> jax.Array:
    """Gives each block its expert's values: [e, n] -> [b, 1, n]; zeros where it has none."""
    return values.at[blocks.expert].get(mode="fill", fill_value=0)[:, None]


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array, blocks: Blocks) -> jax.Array:
    """Multiplies each row by its expert's kernel.

    Args:
      x: [r, k], r = b * rows per block; zero in the rows that fill up an expert's blocks.
      kernel: [e, k, n] in x's dtype.
      blocks: of the rows.

    Returns:
      [r, n] in x's dtype, accumulated in float32. So are the gradients.
    """
    return _matmul(x, kernel, blocks, is_transposed=False)


def _matmul_forward(x: jax.Array, kernel: jax.Array, blocks: Blocks) -> tuple[jax.Array, Any]:
    return matmul(x, kernel, blocks), (x, kernel, blocks)


def _matmul_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, blocks = saved
    return _matmul(g, kernel, blocks, is_transposed=True), _outer(x, g, blocks), None


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def batched_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies [e, c, k] by [e, k, n] to [e, c, n], in x's dtype, accumulated in float32.

    So are the gradients, which JAX would compute from float32 cotangents.
    """
    return _batched("eck,ekn->ecn", x, kernel)


def _batched(formula: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # Accelerators accumulate products of bfloat16 in float32. Asking for a float32 result and
    # rounding it takes a pass over memory of its own on GPUs: 1.3 of 5.7 ms at 128 experts.
    return jnp.einsum(formula, x, kernel)


def _batched_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return batched_matmul(x, kernel), (x, kernel)


def _batched_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return _batched("ecn,ekn->eck", g, kernel), _batched("eck,ecn->ekn", x, g)


batched_matmul.defvjp(_batched_forward, _batched_backward)


def _matmul(x: jax.Array, kernel: jax.Array, blocks: Blocks, *, is_transposed: bool) -> jax.Array:
    """The product, with kernels [e, n, k] if transposed."""
    formula = "eck,enk->ecn" if is_transposed else "eck,ekn->ecn"

    def even(x: jax.Array, kernel: jax.Array, _: Blocks) -> jax.Array:
        shares = x.reshape(kernel.shape[0], -1, x.shape[1])
        return _batched(formula, shares, kernel).reshape(x.shape[0], -1)

    loop, on_tpu, on_cuda = (
        functools.partial(function, is_transposed=is_transposed)
        for function in (_matmul_loop, _matmul_megablox, _matmul_triton)
    )
    return jax.lax.platform_dependent(
        x,
        kernel,
        blocks,
        cuda=_even_or(on_cuda, even, blocks),
        tpu=_even_or(on_tpu, even, blocks),
        default=_even_or(loop, even, blocks),
    )


def _outer(x: jax.Array, g: jax.Array, blocks: Blocks) -> jax.Array:
    """Sums the outer products of each expert's rows: x [r, k], g [r, n] -> [e, k, n].

    In x's dtype, accumulated in float32; zero for experts without rows.
    """

    def even(x: jax.Array, g: jax.Array, blocks: Blocks) -> jax.Array:
        num_experts = blocks.first.shape[0]
        shares = (array.reshape(num_experts, -1, array.shape[1]) for array in (x, g))
        return _batched("eck,ecn->ekn", *shares)

    return jax.lax.platform_dependent(
        x,
        g,
        blocks,
        cuda=_even_or(_outer_triton, even, blocks),
        tpu=_even_or(_outer_megablox, even, blocks),
        default=_even_or(_outer_loop, even, blocks),
    )


def _even_or(otherwise: Any, even: Any, blocks: Blocks) -> Any:
    """The batched product if the device finds the loads even."""
    if blocks.is_even is None:
        return otherwise

    def choose(x: jax.Array, other: jax.Array, blocks: Blocks) -> jax.Array:
        return jax.lax.cond(blocks.is_even, even, otherwise, x, other, blocks)

    return choose


@functools.partial(jax.jit, static_argnames="is_transposed")
def _matmul_loop(
    x: jax.Array, kernel: jax.Array, blocks: Blocks, *, is_transposed: bool
) -> jax.Array:
    """One block after the other; only blocks in use are computed."""
    rows = x.shape[0] // blocks.expert.shape[0]
    num_out = kernel.shape[1 if is_transposed else 2]
    formula = "rk,nk->rn" if is_transposed else "rk,kn->rn"

    def add_block(block: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, block * rows, rows)
        of_expert = jax.lax.dynamic_index_in_dim(kernel, blocks.expert[block], keepdims=False)
        y = jnp.einsum(formula, part, of_expert, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(x.dtype), block * rows, 0)

    out = jnp.zeros((x.shape[0], num_out), x.dtype)
    return jax.lax.fori_loop(0, blocks.last[-1], add_block, out)


@jax.jit
def _outer_loop(x: jax.Array, g: jax.Array, blocks: Blocks) -> jax.Array:
    rows = x.shape[0] // blocks.expert.shape[0]

    def add_block(block: jax.Array, out: jax.Array) -> jax.Array:
        parts = [jax.lax.dynamic_slice_in_dim(array, block * rows, rows) for array in (x, g)]
        added = jnp.einsum("rk,rn->kn", *parts, preferred_element_type=jnp.float32)
        expert = blocks.expert[block]
        sums = added + jax.lax.dynamic_index_in_dim(out, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, sums, expert, 0)

    num_experts = blocks.first.shape[0]
    out = jnp.zeros((num_experts, x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.last[-1], add_block, out).astype(x.dtype)


def _tile(size: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides a size."""
    return min(largest, size & -size)


def _super_rows_place(
    program: jax.Array, num_rows: int, num_columns: int
) -> tuple[jax.Array, jax.Array]:
    """Walks tiles in bands of some rows, so that programs at one time share operands in cache."""
    band = program // (_SUPER_ROWS * num_columns)
    height = jnp.minimum(num_rows - band * _SUPER_ROWS, _SUPER_ROWS)
    place = program % (_SUPER_ROWS * num_columns)
    return band * _SUPER_ROWS + place % height, place // height


def _whole(shape: tuple[int, ...], grid_dims: int) -> pl.BlockSpec:
    """An array that every program sees whole, indexed by itself."""
    zeros = (0,) * len(shape)
    if grid_dims == 1:
        return pl.BlockSpec(shape, lambda i: zeros)
    return pl.BlockSpec(shape, lambda i, j: zeros)


@functools.partial(jax.jit, static_argnames=("is_transposed", "interpret"))
def _matmul_triton(
    x: jax.Array,
    kernel: jax.Array,
    blocks: Blocks,
    *,
    is_transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    """One program for each tile [rows per block, _TILE_N] of the result."""
    num_blocks, num_experts = blocks.expert.shape[0], kernel.shape[0]
    rows, num_in = x.shape[0] // num_blocks, x.shape[1]
    num_out = kernel.shape[1 if is_transposed else 2]
    tile_k, tile_n = _tile(num_in, _TILE_K), _tile(num_out, _TILE_N)
    if min(rows, tile_k, tile_n) < _SMALLEST_TILE:
        return _matmul_loop(x, kernel, blocks, is_transposed=is_transposed)
    columns = num_out // tile_n

    def body(expert_ref, x_ref, kernel_ref, out_ref):
        block, column = _super_rows_place(pl.program_id(0), num_blocks, columns)
        expert = expert_ref[block]
        at_rows, at_columns = pl.ds(block * rows, rows), pl.ds(column * tile_n, tile_n)

        @pl.when(expert < num_experts)
        def _():
            def add_step(step, total):
                steps = pl.ds(step * tile_k, tile_k)
                if is_transposed:
                    part = kernel_ref[expert, at_columns, steps].T
                else:
                    part = kernel_ref[expert, steps, at_columns]
                return total + triton.dot(x_ref[at_rows, steps], part)

            total = jnp.zeros((rows, tile_n), jnp.float32)
            total = jax.lax.fori_loop(0, num_in // tile_k, add_step, total)
            out_ref[at_rows, at_columns] = total.astype(out_ref.dtype)

    operands = (blocks.expert, x, kernel)
    return pl.pallas_call(
        body,
        grid=(num_blocks * columns,),
        in_specs=[_whole(array.shape, 1) for array in operands],
        out_specs=_whole((x.shape[0], num_out), 1),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_out), x.dtype),
        compiler_params=_triton_options(x.dtype),
        interpret=interpret,
        name="grouped_matmul",
    )(*operands)


@functools.partial(jax.jit, static_argnames="interpret")
def _outer_triton(
    x: jax.Array, g: jax.Array, blocks: Blocks, *, interpret: bool = False
) -> jax.Array:
    """One program for each expert and tile of its [k, n], over the expert's rows."""
    num_experts = blocks.first.shape[0]
    rows = x.shape[0] // blocks.expert.shape[0]
    tile_k, tile_n = _tile(x.shape[1], _TILE_OUTER[0]), _tile(g.shape[1], _TILE_OUTER[1])
    if min(rows, tile_k, tile_n) < _SMALLEST_TILE:
        return _outer_loop(x, g, blocks)
    step_rows = _tile(rows, _TILE_K)
    columns = g.shape[1] // tile_n
    tiles = x.shape[1] // tile_k * columns

    def body(first_ref, last_ref, x_ref, g_ref, out_ref):
        tile, expert = pl.program_id(0), pl.program_id(1)
        at_k, at_n = pl.ds(tile // columns * tile_k, tile_k), pl.ds(tile % columns * tile_n, tile_n)
        steps = rows // step_rows

        def add_step(step, total):
            at = pl.ds(step * step_rows, step_rows)
            return total + triton.dot(x_ref[at, at_k].T, g_ref[at, at_n])

        total = jnp.zeros((tile_k, tile_n), jnp.float32)
        total = jax.lax.fori_loop(
            first_ref[expert] * steps, last_ref[expert] * steps, add_step, total
        )
        out_ref[expert, at_k, at_n] = total.astype(out_ref.dtype)

    out_shape = (num_experts, x.shape[1], g.shape[1])
    return pl.pallas_call(
        body,
        grid=(tiles, num_experts),
        in_specs=[_whole(array.shape, 2) for array in (blocks.first, blocks.last, x, g)],
        out_specs=_whole(out_shape, 2),
        out_shape=jax.ShapeDtypeStruct(out_shape, x.dtype),
        compiler_params=_triton_options(x.dtype),
        interpret=interpret,
        name="grouped_outer",
    )(blocks.first, blocks.last, x, g)


def _triton_options(dtype: jnp.dtype) -> triton.CompilerParams:
    # float32 tiles take twice the shared memory, so they are pipelined half as deep.
    return triton.CompilerParams(num_warps=8, num_stages=4 if dtype.itemsize < 4 else 2)


@functools.partial(jax.jit, static_argnames=("is_transposed", "interpret"))
def _matmul_megablox(
    x: jax.Array,
    kernel: jax.Array,
    blocks: Blocks,
    *,
    is_transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    rows = x.shape[0] // blocks.expert.shape[0]
    num_out = kernel.shape[1 if is_transposed else 2]
    return gmm(
        x,
        kernel,
        (blocks.last - blocks.first) * rows,
        x.dtype,
        (_tile(x.shape[0], _TPU_TILE), min(x.shape[1], _TPU_TILE), min(num_out, _TPU_TILE)),
        transpose_rhs=is_transposed,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames="interpret")
def _outer_megablox(
    x: jax.Array, g: jax.Array, blocks: Blocks, *, interpret: bool = False
) -> jax.Array:
    rows = x.shape[0] // blocks.expert.shape[0]
    return tgmm(
        x.T,
        g,
        (blocks.last - blocks.first) * rows,
        x.dtype,
        (_tile(x.shape[0], _TPU_TILE), min(x.shape[1], _TPU_TILE), min(g.shape[1], _TPU_TILE)),
        interpret=interpret,
    )
