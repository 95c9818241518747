"""The feed-forward networks of experts, on slots or on blocks of rows sorted by expert.

Axes: e expert, c slot, r row, d embed, f mlp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uncurl_jax.models import grouped_matmul
from uncurl_jax.models.grouped_matmul import Blocks

Activation = Callable[[jax.Array], jax.Array]

# Those of the experts' arrays that may be int8, each then with the scales <name>_scale.
KERNELS = ("wi", "wo", "wg")


class Experts(NamedTuple):
    """The parameters of one layer's experts, in the compute dtype, or kernels in int8.

    Attributes:
      wi: [e, d, f] input (in gated networks: up) projection.
      wo: [e, f, d] output projection.
      wg: [e, d, f] gate projection; None unless gated.
      wi_bias: [e, f]; wo_bias: [e, d]; wg_bias: [e, f]; None without biases.
      wi_scale: [e, f]; wo_scale: [e, d]; wg_scale: [e, f]; float32, of kernels that are int8, None
        of others. `expert_loop.dequantized` multiplies them in.
    """

    wi: jax.Array
    wo: jax.Array
    wg: jax.Array | None = None
    wi_bias: jax.Array | None = None
    wo_bias: jax.Array | None = None
    wg_bias: jax.Array | None = None
    wi_scale: jax.Array | None = None
    wo_scale: jax.Array | None = None
    wg_scale: jax.Array | None = None


def _feed_forward(
    x: jax.Array,
    experts: Experts,
    activation: Activation,
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
    spread: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The network over leading axes that `matmul` and `spread` know: [..., d] -> [..., d].

    Biases and activation are computed in float32 and again in the backward pass, so that what is
    kept of the hidden layer is in the compute dtype.
    """
    dtype = experts.wi.dtype

    @jax.checkpoint
    def hidden(wi: jax.Array, wi_bias: Any, wg: Any, wg_bias: Any) -> jax.Array:
        up = _plus(wi, wi_bias, spread)
        if wg is None:
            return activation(up).astype(dtype)
        return (activation(_plus(wg, wg_bias, spread)) * up).astype(dtype)

    wg = None if experts.wg is None else matmul(x, experts.wg)
    active = hidden(matmul(x, experts.wi), experts.wi_bias, wg, experts.wg_bias)
    return matmul(active, experts.wo)


def _plus(
    x: jax.Array, bias: jax.Array | None, spread: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Adds each expert's bias [e, n], if there is one, in float32."""
    x = x.astype(jnp.float32)
    if bias is None:
        return x
    of_rows = spread(bias.astype(jnp.float32))
    return (x.reshape(of_rows.shape[0], -1, x.shape[-1]) + of_rows).reshape(x.shape)


def apply_experts(
    x: jax.Array, experts: Experts, activation: Activation, *, model_axis: str | None = None
) -> jax.Array:
    """Runs expert i on x[i]: [e, c, d] -> [e, c, d], float32 accumulation.

    With `model_axis`, f is divided over that mesh axis and partial sums are added across it.
    """

    def spread(bias: jax.Array) -> jax.Array:
        return bias[:, None]

    y = _feed_forward(x, experts, activation, grouped_matmul.batched_matmul, spread)
    if model_axis is not None:
        y = jax.lax.psum(y.astype(jnp.float32), model_axis)
    return _plus(y, experts.wo_bias, spread).astype(x.dtype)


def apply_to_blocks(
    x: jax.Array, experts: Experts, blocks: Blocks, activation: Activation
) -> jax.Array:
    """Runs each row through its expert.

    Args:
      x: [r, d] in the experts' dtype, zero where a row of an expert's block is empty.
      experts: all of them.
      blocks: which expert each block of rows belongs to.
      activation: the non-linearity.

    Returns:
      [r, d]; anything in blocks that no expert uses.
    """

    def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_matmul.matmul(x, kernel, blocks)

    def spread(bias: jax.Array) -> jax.Array:
        return grouped_matmul.spread(bias, blocks)

    y = _feed_forward(x, experts, activation, matmul, spread)
    return y if experts.wo_bias is None else _plus(y, experts.wo_bias, spread).astype(x.dtype)


def apply_to_few(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    experts: Experts,
    activation: Activation,
) -> jax.Array:
    """Runs a few tokens, as decoding has them, with no sorting and few operations.

    What it costs is reading kernels: of the chosen experts where tokens are fewer than experts,
    else of all of them, each of which then runs on every token.

    Args:
      x: [t, d].
      expert_index: [t, k].
      gate: [t, k] float32, 0 where an assignment was dropped.
      experts: all of them.
      activation: the non-linearity.

    Returns:
      [t, d] float32, the gate-weighted sums.
    """
    num_experts = experts.wi.shape[0]
    num_tokens, topk = expert_index.shape
    if num_tokens * topk <= max(1, num_experts // 2):
        chosen = jax.tree.map(lambda array: array[expert_index.reshape(-1)], experts)
        y = apply_experts(jnp.repeat(x, topk, axis=0)[:, None], chosen, activation)
        return jnp.einsum("tkd,tk->td", y.reshape(num_tokens, topk, -1).astype(jnp.float32), gate)
    weights = jnp.einsum("tke,tk->te", jax.nn.one_hot(expert_index, num_experts), gate)
    y = apply_experts(jnp.broadcast_to(x, (num_experts, *x.shape)), experts, activation)
    return jnp.einsum("etd,te->td", y.astype(jnp.float32), weights)
