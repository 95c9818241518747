"""Token losses: masked cross-entropy in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from uncurl_jax.models.decoder import token_log_probabilities


class BatchTotals(NamedTuple):
    """What the sums over the parts of a batch are divided by.

    Attributes:
      weight: float32 scalar, of the loss's tokens.
      tokens: for each layer a float32 scalar, the real tokens that it sees.
    """

    weight: jax.Array
    tokens: tuple[jax.Array, ...]


class TokenLoss(NamedTuple):
    """Sums over the target tokens of a batch; divide by `weight` for means.

    Attributes:
      cross_entropy: nats.
      correct: weight of the tokens whose argmax is right.
      weight: sum of the loss weights.
    """

    cross_entropy: jax.Array
    correct: jax.Array
    weight: jax.Array


def token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
    """Cross-entropy of the weighted targets.

    Args:
      logits: [b, l, vocab] float32.
      targets: [b, l] int32.
      weights: [b, l] float32, 0 where a token does not count.

    Returns:
      Sums, not means, so that parts of a batch add up to the whole.
    """
    log_probability = token_log_probabilities(logits, targets)
    is_correct = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    return TokenLoss(
        -jnp.sum(log_probability * weights), jnp.sum(is_correct * weights), weights.sum()
    )
