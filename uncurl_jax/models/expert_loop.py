"""Experts for a number of tokens that is not known when the program is made, and for int8 kernels.

Exported programs (`jax.export`) have symbolic batch and length, and run on any platform, so they
can hold neither the kernels of `grouped_matmul` nor its shapes. Here one loop goes over blocks of
rows, and the number of rounds follows the tokens: only experts that a token chose are read.

Axes: a assignment (t * k), e expert, r row, d embed, f mlp.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from uncurl_jax.models.expert_mlp import KERNELS, Activation, Experts, apply_experts

# Rows per block: a block reads its expert's kernels once, and computes all of its rows. A few
# tokens, as decoding has them, go into small blocks.
_SMALL_BLOCK, _LARGE_BLOCK = 8, 64


def dequantized(experts: Experts, dtype: Any) -> Experts:
    """Multiplies int8 kernels by their scales; experts without scales stay as they are.

    Args:
      experts: with kernels [..., k, n] and scales [..., n], one for each output channel.
      dtype: of the result's kernels.
    """
    arrays = experts._asdict()
    for name in KERNELS:
        scale = arrays.pop(f"{name}_scale")
        if scale is not None:
            kernel = arrays[name].astype(jnp.float32) * scale[..., None, :]
            arrays[name] = kernel.astype(dtype)
    return Experts(**arrays)


def apply_in_loop(
    x: jax.Array,
    expert_index: jax.Array,
    is_wanted: jax.Array,
    gate: jax.Array,
    experts: Experts,
    activation: Activation,
) -> jax.Array:
    """Runs tokens through their experts, whatever their number; drops nothing.

    Args:
      x: [t, d] in the compute dtype.
      expert_index: [t, k] int32.
      is_wanted: [t, k] bool; the other assignments are not computed.
      gate: [t, k] float32.
      experts: all of them, with scales if their kernels are int8.
      activation: their non-linearity.

    Returns:
      [t, d] float32, the gate-weighted sums.
    """
    num_experts, topk = experts.wi.shape[0], expert_index.shape[1]
    flat = jnp.where(is_wanted, expert_index, num_experts).reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    run = functools.partial(_run_blocks, x, order // topk, counts, experts, activation)
    outputs = jax.lax.cond(
        counts.max() <= 2 * _SMALL_BLOCK,
        functools.partial(run, _SMALL_BLOCK),
        functools.partial(run, _LARGE_BLOCK),
    )
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    y = outputs[place.reshape(expert_index.shape)].astype(jnp.float32)
    return jnp.sum(jnp.where(is_wanted[..., None], y * gate[..., None], 0.0), axis=1)


def _run_blocks(
    x: jax.Array,
    token: jax.Array,
    counts: jax.Array,
    experts: Experts,
    activation: Activation,
    rows: int,
) -> jax.Array:
    """Runs assignments that are sorted by expert, `rows` of one expert at a time.

    Args:
      x: [t, d].
      token: [a] int32, the token of each assignment.
      counts: [e] int32; the first counts[0] assignments are expert 0's, and so on.
      experts: all of them.
      activation: their non-linearity.
      rows: of a block.

    Returns:
      [a, d] in x's dtype; anything for assignments beyond the counts.
    """
    starts = _running_sums(counts) - counts
    blocks = -(-counts // rows)
    last = _running_sums(blocks)
    first = last - blocks
    padded = jnp.pad(token, (0, rows))

    def add_block(block: jax.Array, outputs: jax.Array) -> jax.Array:
        expert = jnp.sum(block >= last)
        start = starts[expert] + (block - first[expert]) * rows
        inputs = x[jax.lax.dynamic_slice_in_dim(padded, start, rows)]
        one = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, expert), experts)
        y = apply_experts(inputs[None], dequantized(one, x.dtype), activation)[0]
        # An expert's last block reaches into the next expert's rows, which come later and
        # overwrite it; what it leaves beyond the last expert's is not read.
        return jax.lax.dynamic_update_slice_in_dim(outputs, y, start, 0)

    outputs = jnp.zeros((token.shape[0] + rows, x.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, last[-1], add_block, outputs)[: token.shape[0]]


def _running_sums(counts: jax.Array) -> jax.Array:
    """`jnp.cumsum` of [e], which JAX 0.12 makes an operation that TensorFlow does not have."""
    place = jnp.arange(counts.shape[0])
    return jnp.sum(jnp.where(place <= place[:, None], counts, 0), axis=1)
