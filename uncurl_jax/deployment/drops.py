"""Which share of tokens a capacity drops, expected from how often each expert was selected."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import stats

from uncurl_jax.config import ModelConfig

# Per MoE layer, how often each expert was (or after a prune will be) selected.
Loads = Mapping[int, npt.ArrayLike]


def merged_load(labels: npt.ArrayLike, selected: npt.ArrayLike) -> np.ndarray:
    """Loads of clusters; those of dropped experts (label -1) spread in proportion."""
    labels, selected = np.asarray(labels), np.asarray(selected, np.float64)
    return np.bincount(labels[labels >= 0], weights=selected[labels >= 0])


def drop_fraction(load: npt.ArrayLike, capacity: int, num_tokens: int, topk: int) -> float:
    """Expected share of assignments beyond the slots of their expert, in a group of tokens.

    Tokens are taken to choose independently, each with the frequencies of `load`: what an expert
    receives is binomial. Tokens of one text agree more than that, so more may be dropped. For large
    groups this becomes `pruning.plan.expected_drop`.

    Args:
      load: [expert] how often each was selected.
      capacity: slots of each expert in the group.
      num_tokens: of the group.
      topk: experts per token.

    Returns:
      A fraction in [0, 1).
    """
    load = np.asarray(load, np.float64)
    if not load.sum():
        return 0.0
    chance = np.minimum(topk * load / load.sum(), 1.0)
    mean = num_tokens * chance
    # E[(N - c)+] for a binomial N, by E[N; N > c] = mean * P(N' >= c), N' of one token less.
    beyond = mean * stats.binom.sf(capacity - 1, num_tokens - 1, chance)
    beyond -= capacity * stats.binom.sf(capacity, num_tokens, chance)
    return float(np.maximum(beyond, 0.0).sum() / (num_tokens * topk))


def needed_factor(load: npt.ArrayLike, limit: float, num_tokens: int, topk: int) -> float:
    """The smallest capacity factor, to two decimals up, that drops no more than `limit`."""
    low, high = 1, num_tokens
    while low < high:
        middle = (low + high) // 2
        if drop_fraction(load, middle, num_tokens, topk) <= limit:
            high = middle
        else:
            low = middle + 1
    exact = low * len(np.asarray(load)) / (num_tokens * topk)
    return math.ceil(exact * 100 - 1e-9) / 100


def layer_drops(
    model: ModelConfig, loads: Loads, capacities: Mapping[int, int | None], num_tokens: int
) -> dict[int, float]:
    """Returns {layer: expected share} for the layers whose loads are known."""
    return {
        layer: 0.0
        if capacities[layer] is None
        else drop_fraction(load, capacities[layer] or 0, num_tokens, model.num_selected_experts)
        for layer, load in loads.items()
    }
