"""Routing as pure functions: which experts a token goes to, which slot, which losses.

Axes: t token, e expert, k topk, c slot. Everything here is float32 or int32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterChoice(NamedTuple):
    """What the router decides for each token.

    Attributes:
      logits: [..., e] float32, before the softmax, without jitter noise in evaluation.
      probabilities: [..., e] float32 softmax.
      expert_index: [..., k] int32, distinct experts, best first.
      gate: [..., k] float32, what scales each expert's output.
    """

    logits: jax.Array
    probabilities: jax.Array
    expert_index: jax.Array
    gate: jax.Array


def choose_experts(logits: jax.Array, num_selected: int, *, normalize_gates: bool) -> RouterChoice:
    """Top-k routing. With k = 1 the gate is the Switch probability (arXiv 2101.03961, eq. 2)."""
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    # TensorFlow cannot run the top_k of an exported program whose batch is not known.
    is_symbolic = any(map(jax.export.is_symbolic_dim, logits.shape))
    top_k = _top_k_by_rounds if is_symbolic else jax.lax.top_k
    gate, expert_index = top_k(probabilities, num_selected)
    if normalize_gates:
        gate = gate / gate.sum(axis=-1, keepdims=True)
    return RouterChoice(logits, probabilities, expert_index.astype(jnp.int32), gate)


def _top_k_by_rounds(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of values [..., e] that are at least 0, one maximum after the other."""
    left, chosen = values, []
    for _ in range(k):
        chosen.append(left.argmax(axis=-1))
        is_chosen = jnp.arange(values.shape[-1]) == chosen[-1][..., None]
        left = jnp.where(is_chosen, -1.0, left)
    index = jnp.stack(chosen, axis=-1)
    return jnp.take_along_axis(values, index, axis=-1), index


def ranks_within_expert(
    expert_index: jax.Array, mask: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Numbers the tokens of each expert: first choices of all tokens first, then second, ...

    Args:
      expert_index: [t, k] int32.
      mask: [t] or [t, k] bool; assignments outside it belong to no expert and count nowhere.
      num_experts: e.

    Returns:
      ranks [t, k] int32, the number of earlier assignments to the same expert (any number outside
      the mask); and counts [e] int32, assignments per expert.
    """
    num_tokens, topk = expert_index.shape
    mask = mask.reshape(num_tokens, -1)
    # k-major: all first choices come before any second choice, so they win slots.
    flat = jnp.where(mask, expert_index, num_experts).astype(jnp.int32).T.reshape(-1)
    # Sorting is cheaper than e columns of sums on a CPU; an accelerator does those in one pass.
    ranks, counts = jax.lax.platform_dependent(
        flat,
        cpu=functools.partial(_ranks_by_sorting, num_experts=num_experts),
        default=functools.partial(_ranks_by_sums, num_experts=num_experts),
    )
    return ranks.reshape(topk, num_tokens).T, counts


def _ranks_by_sorting(flat: jax.Array, *, num_experts: int) -> tuple[jax.Array, jax.Array]:
    counts = jnp.bincount(flat, length=num_experts + 1).astype(jnp.int32)
    starts = jnp.cumsum(counts) - counts
    order = jnp.argsort(flat, stable=True)
    position = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=flat.dtype))
    return position - starts[flat], counts[:num_experts]


def _ranks_by_sums(flat: jax.Array, *, num_experts: int) -> tuple[jax.Array, jax.Array]:
    is_chosen = (flat[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    up_to_here = jnp.cumsum(is_chosen, axis=0)
    return jnp.sum((up_to_here - is_chosen) * is_chosen, axis=1), up_to_here[-1]


def load_balancing_loss(
    probabilities: jax.Array, expert_index: jax.Array, mask: jax.Array
) -> jax.Array:
    """Switch load-balancing loss E * sum_i f_i P_i (arXiv 2101.03961, eq. 4), 1 if balanced.

    Args:
      probabilities: [t, e] float32.
      expert_index: [t, k] int32; for k > 1, f_i counts all k choices and is divided by k.
      mask: [t] bool, tokens that count.

    Returns:
      A float32 scalar; its gradient flows through the probabilities alone.
    """
    num_experts = probabilities.shape[-1]
    weight = mask.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32).mean(axis=-2)
    fraction = jnp.einsum("te,t->e", chosen, weight) / total
    mean_probability = jnp.einsum("te,t->e", probabilities, weight) / total
    return num_experts * jnp.sum(jax.lax.stop_gradient(fraction) * mean_probability)


def router_z_loss(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5)."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    weight = mask.astype(jnp.float32)
    return jnp.sum(weight * log_z**2) / jnp.maximum(weight.sum(), 1.0)
