"""Affinity between experts from their router logits (arXiv 2409.01483, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.statistics import LayerStatistics

# Batch sums are float32: what subtracting a mean leaves below this share of a column is rounding.
_RESOLUTION = 1e-6


def _cosine(statistics: LayerStatistics) -> tuple[np.ndarray, float]:
    """The paper's choice: <H_i, H_j> over tokens."""
    return np.asarray(statistics.gram, np.float64), 0.0


def _pearson(statistics: LayerStatistics) -> tuple[np.ndarray, float]:
    """Removes each expert's mean logit over the tokens."""
    mean = np.asarray(statistics.logit_sum, np.float64)
    tokens = float(statistics.tokens)
    return np.asarray(statistics.gram, np.float64) - np.outer(mean, mean) / tokens, _RESOLUTION


def _centered(statistics: LayerStatistics) -> tuple[np.ndarray, float]:
    """Removes each token's mean logit over the experts, to which softmax is blind."""
    gram = np.asarray(statistics.gram, np.float64)
    gram = gram - gram.mean(axis=0, keepdims=True)
    return gram - gram.mean(axis=1, keepdims=True), _RESOLUTION


_KINDS: dict[str, Callable[[LayerStatistics], tuple[np.ndarray, float]]] = {
    "cosine": _cosine,
    "pearson": _pearson,
    "centered": _centered,
}
AFFINITIES = tuple(_KINDS)


def affinity(statistics: LayerStatistics, kind: str = "cosine") -> np.ndarray:
    """Returns A = (1 + S) / 2, S the similarity of the experts' logit columns over the tokens.

    Args:
      statistics: one layer's sums.
      kind: "cosine" (S the cosine of the columns), "pearson" (their correlation) or "centered"
        (the cosine after each token's mean logit is removed).

    Returns:
      [expert, expert] float64 in [0, 1], symmetric, 1 on the diagonal. An expert whose column is
      zero (for pearson and centered: constant to float32's resolution) has affinity 0 to others.

    Raises:
      InputError: If `kind` is unknown.
    """
    product, resolution = _KINDS[require_choice("affinity", kind, _KINDS)](statistics)
    power = np.diagonal(product)
    is_dead = power <= resolution * np.diagonal(np.asarray(statistics.gram, np.float64))
    norm = np.sqrt(np.where(is_dead, 1.0, power))
    similarity = np.clip(product / np.outer(norm, norm), -1.0, 1.0)
    result = (1.0 + (similarity + similarity.T) / 2.0) / 2.0
    result[is_dead, :] = 0.0
    result[:, is_dead] = 0.0
    np.fill_diagonal(result, 1.0)
    return result
