"""Loss, accuracy and a cloze test on held-out text: numbers that move little from seed to seed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import build
from uncurl_jax.models.decoder import Params, moe_metrics

_MAX_PARTS = 64


class HeldOut(NamedTuple):
    """What a model makes of a split of plain text.

    Attributes:
      loss: nats per token.
      accuracy: share of tokens that are the most likely one.
      cloze_accuracy: share of tokens that are likelier than each of their distractors, which are
        drawn from the tokens of the same split.
      fraction_tokens_left_behind: tokens that no expert took, a mean over MoE layers.
      part_losses: losses of consecutive parts of the text, for comparisons in pairs.
      num_tokens: scored.
    """

    loss: float
    accuracy: float
    cloze_accuracy: float
    fraction_tokens_left_behind: float
    part_losses: list[float]
    num_tokens: int


@functools.lru_cache(maxsize=16)
def _compiled(config: ModelConfig) -> Any:
    """Returns the compiled function (params, batch, distractors) -> sums over each row."""
    decoder = build(config)

    def sums(params: Params, batch: Any, distractors: jax.Array) -> dict[str, jax.Array]:
        logits, sown = decoder.apply(
            {"params": params}, batch.inputs, batch.mask, mutable=["intermediates"]
        )
        target = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)
        others = jnp.take_along_axis(logits, distractors, axis=-1)
        # A distractor that is the target itself says nothing.
        is_other = distractors != batch.targets[..., None]
        wins = jnp.all((target > others) | ~is_other, axis=-1)
        log_likelihood = target[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        weights = batch.weights
        return {
            "loss": -jnp.sum(log_likelihood * weights, axis=-1),
            "right": jnp.sum((logits.argmax(axis=-1) == batch.targets) * weights, axis=-1),
            "cloze": jnp.sum(wins * weights, axis=-1),
            "tokens": weights.sum(axis=-1),
            "left_behind": moe_metrics(sown.get("intermediates", {}))[
                "fraction_tokens_left_behind"
            ],
        }

    return jax.jit(sums)


def held_out(
    config: ModelConfig,
    params: Params,
    cache: TokenCache,
    *,
    rows_per_batch: int = 32,
    num_distractors: int = 9,
) -> HeldOut:
    """Scores every row of a cache of plain text on one device.

    Args:
      config: the model, with its evaluation capacity factor.
      params: its parameters.
      cache: the split; the same distractors are drawn for every model.
      rows_per_batch: rows at a time.
      num_distractors: other tokens that each token is compared with.

    Raises:
      InputError: If the model is no decoder, or the cache's rows are longer than it can read.
      RuntimeError: If the loss is not finite.
    """
    if config.has_encoder:
        raise InputError(
            "Held-out text is scored by decoders, got an encoder-decoder: evaluate it on a task."
        )
    length = cache.max_row_length
    if length > config.max_length:
        raise InputError(
            f"Rows must fit the model's max_length={config.max_length}, got {length} tokens in "
            f"{cache.directory}: build it with a smaller --max_length."
        )
    compiled = _compiled(config)
    generator = np.random.default_rng(0)
    found: list[dict[str, np.ndarray]] = []
    left_behind = 0.0
    for batch in cache.sequential_batches(rows_per_batch, length=length):
        tokens = batch.targets[batch.weights > 0]
        distractors = generator.choice(tokens, (*batch.targets.shape, num_distractors))
        out = jax.device_get(compiled(params, batch, distractors.astype(np.int32)))
        left_behind += float(out.pop("left_behind")) * float(out["tokens"].sum())
        found.append(out)
    rows = {name: np.concatenate([out[name] for out in found]) for name in found[0]}
    total = float(rows["tokens"].sum())
    loss = float(rows["loss"].sum()) / total
    if not np.isfinite(loss):
        raise RuntimeError(f"A held-out loss must be finite, got {loss} on {cache.directory}.")
    is_row = rows["tokens"] > 0
    parts = np.array_split(np.flatnonzero(is_row), min(_MAX_PARTS, int(is_row.sum())))
    return HeldOut(
        loss,
        float(rows["right"].sum()) / total,
        float(rows["cloze"].sum()) / total,
        left_behind / total,
        [round(float(rows["loss"][p].sum() / rows["tokens"][p].sum()), 6) for p in parts],
        int(total),
    )
