"""Scores answer options by their log-likelihood after the prompt, and picks the best."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import Batch, TokenCache, bucket_length
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import build, read_batch
from uncurl_jax.models.decoder import moe_metrics, token_log_probabilities
from uncurl_jax.partitioning import (
    TOKEN_AXES,
    ExpertAxes,
    axis_size,
    local_rows,
    place_batch,
    replicated,
)


class RowScores(NamedTuple):
    """Log-likelihoods of token rows.

    Attributes:
      log_likelihood: [row] float64, nats, summed over each row's target tokens.
      num_tokens: [row] float64, target tokens per row.
      fraction_tokens_left_behind: tokens that no expert took, averaged over MoE layers and
        weighted by tokens over batches.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray
    fraction_tokens_left_behind: float


@functools.lru_cache(maxsize=16)
def compiled_scores(
    config: ModelConfig,
    mesh: Mesh | None,
    target_length: int | None,
    expert_axes: ExpertAxes | None = None,
) -> Any:
    """Returns the compiled function (params, batch) -> scores of rows, replicated on a mesh."""
    model = build(config, mesh, expert_axes=expert_axes)

    def scores(params: Any, batch: Any) -> dict[str, jax.Array]:
        read = read_batch(config, batch, target_length)
        logits, sown = model.apply({"params": params}, **read.arguments, mutable=["intermediates"])
        log_probability = token_log_probabilities(logits, read.targets)
        left_behind = moe_metrics(sown.get("intermediates", {}))["fraction_tokens_left_behind"]
        return {
            "log_likelihood": jnp.sum(log_probability * read.weights, axis=-1),
            "num_tokens": read.weights.sum(axis=-1),
            "left_behind": left_behind,
        }

    return jax.jit(scores, out_shardings=None if mesh is None else replicated(mesh))


def score_rows(
    model: LoadedModel,
    batches: Iterable[tuple[Batch, np.ndarray]],
    *,
    num_rows: int,
    num_batches: int | None = None,
    target_length: int | None = None,
    quiet: bool = False,
) -> RowScores:
    """Scores rows of a token cache.

    Args:
      model: what to run, with the evaluation capacity factor of its configuration.
      batches: (batch, row ids [b] int, -1 where a row is filling); whole in every process.
      num_rows: rows of the cache.
      num_batches: for the progress bar.
      target_length: the cache's, so that logits are computed for the scored tokens alone.
      quiet: no progress bar.

    Returns:
      Scores of every row; rows that no batch held are NaN with 0 tokens.

    Raises:
      InputError: If a score is not finite because a parameter is not; names parameter and expert.
      RuntimeError: If a score is not finite for another reason.
    """
    log_likelihood = np.full(num_rows, np.nan)
    num_tokens = np.zeros(num_rows)
    left_behind = total = 0.0
    compiled = compiled_scores(model.config, model.mesh, target_length, model.expert_axes)
    bar = tqdm(
        batches,
        total=num_batches,
        desc="evaluate",
        unit="batch",
        file=sys.stderr,
        disable=quiet or jax.process_index() != 0,
        mininterval=1.0,
    )
    for batch, rows in bar:
        out = jax.device_get(compiled(model.params, _place(batch, model.mesh)))
        is_row = rows >= 0
        log_likelihood[rows[is_row]] = out["log_likelihood"][is_row]
        num_tokens[rows[is_row]] = out["num_tokens"][is_row]
        weight = float(batch.mask.sum())
        left_behind += float(out["left_behind"]) * weight
        total += weight
    if not np.isfinite(log_likelihood[num_tokens > 0]).all():
        check_finite(model.checkpoint)
        raise RuntimeError(
            f"Log-likelihoods must be finite, got NaN or infinity from {model.checkpoint}, whose "
            "parameters are finite: its activations overflow; evaluate it in float32."
        )
    return RowScores(log_likelihood, num_tokens, left_behind / max(total, 1.0))


def _place(batch: Batch, mesh: Mesh | None) -> Any:
    return place_batch(batch if mesh is None else local_rows(batch), mesh)


def row_length(config: ModelConfig, cache: TokenCache) -> int:
    """Returns the padded length of a cache's rows.

    Raises:
      InputError: If a row is longer than the model can read, or an encoder has nothing to read.
    """
    if config.has_encoder:
        cache.check_prompts()
    if cache.max_row_length > config.max_length:
        raise InputError(
            f"Rows must fit the model's max_length={config.max_length}, got up to "
            f"{cache.max_row_length} tokens in {cache.directory}: build it with a smaller "
            "--max_length."
        )
    return min(bucket_length(cache.max_row_length), config.max_length)


def examples_that_divide(examples_per_batch: int, mesh: Mesh | None) -> int:
    """Rounds up to a multiple of the devices that hold tokens."""
    shards = axis_size(mesh, TOKEN_AXES) if mesh is not None else 1
    return -(-examples_per_batch // shards) * shards
