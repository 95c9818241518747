"""Scores of an exported model on a token cache, by the programs that are served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.checkpoints.provenance import provenance_chain
from uncurl_jax.data import metrics
from uncurl_jax.data.cache_writer import RANK_CLASSIFICATION
from uncurl_jax.data.token_cache import Batch, TokenCache, bucket_length
from uncurl_jax.errors import InputError
from uncurl_jax.export.reference import checkpoint_params
from uncurl_jax.export.runner import Model
from uncurl_jax.export.sources import Source
from uncurl_jax.models.decoder import Params

_EXAMPLES_PER_BATCH = 16


def check_cache(cache: TokenCache, max_length: int, vocabulary_hash: str) -> None:
    """Checks, before any work, that an artifact can be scored on a token cache.

    Raises:
      InputError: If the cache has no options or labels, another vocabulary or longer rows.
    """
    cache.check_vocabulary(vocabulary_hash)
    if cache.kind != RANK_CLASSIFICATION:
        raise InputError(
            f"An artifact is scored on a task with options, got {cache.kind} in "
            f"{cache.directory}: give another --cache."
        )
    if cache.max_row_length > max_length:
        raise InputError(
            f"Rows must fit the artifact's max_length={max_length}, got up to "
            f"{cache.max_row_length} tokens in {cache.directory}: raise --max_length."
        )
    examples = cache.examples()
    cache.score()
    metrics.check_predictions(examples, [0] * len(examples))


def rank_score(model: Model, cache: TokenCache) -> dict[str, Any]:
    """Ranks the options of every example by their log-likelihood.

    Returns:
      {"score" in percent, "interval" of 95 %, "metrics", "num_examples"}.
    """
    examples, score = cache.examples(), cache.score()
    log_likelihood = np.full(cache.num_rows, np.nan)
    length = min(bucket_length(cache.max_row_length), model.max_length)
    for batch, rows in cache.option_batches(_EXAMPLES_PER_BATCH, length=length):
        is_row = rows >= 0
        log_likelihood[rows[is_row]] = _row_scores(model, batch, cache.target_length)[is_row]
    predicted = cache.predictions(log_likelihood)
    values = score.values(examples, predicted)
    low, high = metrics.confidence_interval(examples, predicted, score)
    return {
        "score": values.pop("score"),
        "interval": [low, high],
        "metrics": values,
        "num_examples": len(examples),
    }


def _row_scores(model: Model, batch: Batch, target_length: int) -> np.ndarray:
    """Log-likelihoods of the weighted targets of rows, [b]."""
    length = batch.inputs.shape[1]
    width = min(target_length, length)
    start = np.minimum(np.argmax(batch.weights != 0, axis=1), length - width)
    places = start[:, None] + np.arange(width)
    result = model.score(
        batch.inputs,
        np.maximum(batch.mask.sum(axis=1), 1),
        np.take_along_axis(batch.targets, places, axis=1),
        places,
        np.take_along_axis(batch.weights, places, axis=1) > 0,
    )
    return np.asarray(result["log_likelihood"], np.float64)


Evaluate = Callable[[LoadedModel, TokenCache], Mapping[str, Any]]


def in_memory(source: Source, params: Params) -> LoadedModel:
    """Returns a checkpoint's model, as it is served, with these parameters."""
    checkpoint = source.checkpoint
    return LoadedModel(source.config, params, checkpoint.vocabulary(), checkpoint, None)


def described(
    source: Source,
    cache: TokenCache,
    measure: Callable[[], Mapping[str, Any]],
    evaluate: Evaluate | None,
) -> dict[str, Any]:
    """Returns a model's "task", "prompt" and "scores" for the manifest.

    Args:
      source: what is exported.
      cache: what both are scored on.
      measure: scores what is exported.
      evaluate: scores the checkpoint, in its own dtype; None leaves that out.
    """
    example = cache.examples()[0]
    options = {example.options for example in cache.examples()}
    found = {"artifact": measure()}
    if evaluate is not None:
        own = source.checkpoint.model_config()
        config = dataclasses.replace(source.config, dtype=own.dtype)
        model = in_memory(source, checkpoint_params(source))
        found["checkpoint"] = evaluate(model._replace(config=config), cache)
    names = ("score", "interval", "metrics", "num_examples")
    return {
        "task": cache.task,
        "prompt": {
            "example": {"prompt": example.prompt, "options": list(example.options)},
            "options": list(example.options) if len(options) == 1 else None,
        },
        "scores": {
            "token_cache": {"task": cache.task, "split": cache.split, "hash": cache.hash},
            "is_dropless": True,
            **{which: {name: values[name] for name in names} for which, values in found.items()},
        },
    }


def task_of(checkpoint: layout.CheckpointPath) -> str | None:
    """Returns the task of the token cache that a checkpoint was last trained on."""
    for link in provenance_chain(checkpoint):
        found = (link.provenance or {}).get("token_cache")
        if isinstance(found, dict) and "task" in found:
            return found["task"]
    return None
