"""Sums of what routers chose, kept on the device while a batch runs.

Router logits of a whole batch are large; their sums are not, and they alone come to the host.
Axes: batch (rows), length, expert, topk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uncurl_jax.pruning.statistics import LayerStatistics, layer_statistics

# What a program of an artifact says of one layer: expert_index, gate and router_logits.
Routing = Mapping[str, Mapping[str, Any]]


class LayerSums(NamedTuple):
    """Sums over the counted tokens of one MoE layer; jax arrays on the device, numpy on the host.

    Attributes:
      statistics: over all rows.
      selected: [batch, expert] float32, per row how often an expert was selected.
      probability: [batch, expert] float32, per row the sum of router probabilities.
    """

    statistics: LayerStatistics
    selected: Any
    probability: Any


class RoutingSums(NamedTuple):
    """Sums over the counted tokens of a batch.

    Attributes:
      tokens: [batch] float32, counted tokens of each row.
      layers: by MoE layer.
    """

    tokens: Any
    layers: dict[int, LayerSums]


def layer_number(name: str) -> int:
    """Returns 2 for "layers_2"."""
    return int(name.removeprefix("layers_"))


@jax.jit
def routing_sums(routing: Routing, mask: jax.Array) -> RoutingSums:
    """Reduces the routing of one call of a program.

    Args:
      routing: {"layers_<i>": {"expert_index": [batch, length, topk] int32, "gate": the same shape,
        "router_logits": [batch, length, expert]}}.
      mask: [batch, length] bool, the tokens that count.
    """
    layers = {}
    for name, choice in routing.items():
        logits = choice["router_logits"].astype(jnp.float32)
        index, gate = choice["expert_index"], choice["gate"]
        is_token = mask[..., None]
        chosen = jax.nn.one_hot(index, logits.shape[-1]).sum(axis=2)
        # Rows that do not count may hold anything, also what is not finite.
        probability = jax.nn.softmax(jnp.where(is_token, logits, 0.0), axis=-1)
        layers[layer_number(name)] = LayerSums(
            layer_statistics(logits, index, gate, jnp.ones(index.shape, bool), mask),
            jnp.where(is_token, chosen, 0.0).sum(axis=1),
            jnp.where(is_token, probability, 0.0).sum(axis=1),
        )
    return RoutingSums(mask.sum(axis=1, dtype=jnp.float32), layers)


@jax.jit
def add_routing(sums: RoutingSums, routing: Routing, mask: jax.Array) -> RoutingSums:
    """Adds one more call of a program on the same rows; arguments as `routing_sums`."""
    return jax.tree.map(jnp.add, sums, routing_sums(routing, mask))
