"""Evaluates a checkpoint on a task: metrics with intervals, predictions, and tokens dropped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from uncurl_jax import __version__
from uncurl_jax.artifacts import atomic_file, refuse_existing, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.data import metrics
from uncurl_jax.data.cache_writer import LANGUAGE_MODELING, RANK_CLASSIFICATION
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation import generation, rank_classification
from uncurl_jax.evaluation.rank_classification import examples_that_divide, row_length
from uncurl_jax.evaluation.seqio_evaluator import check_seqio_task, seqio_metrics
from uncurl_jax.partitioning import make_mesh

RANK, GENERATE = "rank", "generate"
_NO_MATCH = -1


class Evaluation(NamedTuple):
    """The result of one evaluation.

    Attributes:
      summary: JSON-compatible content of metrics.json.
      predictions: JSON-compatible rows of the predictions file, one per example.
    """

    summary: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate_model(
    model: LoadedModel,
    cache: TokenCache,
    *,
    mode: str = RANK,
    examples_per_batch: int = 16,
    is_length_normalized: bool = False,
    vocabulary: Vocabulary | None = None,
    max_new_tokens: int = 16,
    seqio_task: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluates a loaded model on one split.

    Args:
      model: what to run.
      cache: a task with options, or plain text (then the loss is measured).
      mode: "rank" picks the option of largest log-likelihood; "generate" decodes greedily and
        matches the text, without case and punctuation, with the options.
      examples_per_batch: examples whose options share a batch. With a capacity factor, which
        tokens are dropped depends on it.
      is_length_normalized: in "rank", divide log-likelihoods by the tokens of the option.
      vocabulary: needed by "generate".
      max_new_tokens: in "generate".
      seqio_task: name of the SeqIO task that the cache was built from; its own metric functions
        are applied by SeqIO's Evaluator and replace those of the cache.
      quiet: no progress bar.

    Returns:
      Summary and predictions; scores in percent, losses in nats per token.

    Raises:
      InputError: If the mode, the split's labels, the row lengths or the parameters do not permit
        it.
    """
    started = time.perf_counter()
    if examples_per_batch < 1:
        raise InputError(f"examples_per_batch must be at least 1, got {examples_per_batch}.")
    if cache.kind == RANK_CLASSIFICATION:
        # Before the work: the split must have labels, and the task metrics.
        metrics.check_predictions(cache.examples(), [0] * cache.manifest["examples"])
        cache.score()
    settings: dict[str, Any] = {
        "mode": mode,
        "is_length_normalized": is_length_normalized,
        "examples_per_batch": examples_that_divide(examples_per_batch, model.mesh),
        "eval_capacity_factor": model.config.eval_capacity_factor,
    }
    own: dict[str, Any]
    if mode == GENERATE:
        if cache.kind == LANGUAGE_MODELING:
            raise InputError(
                f"Generation needs a task with prompts, got the plain text {cache.task}: leave out "
                "--mode to measure its loss."
            )
        if vocabulary is None:
            raise InputError("Generation needs a vocabulary to decode with: pass --vocabulary.")
        outputs = _generate(model, cache, vocabulary, examples_per_batch, max_new_tokens, quiet)
        part, predictions = _matched(cache, vocabulary, outputs)
        settings |= {"eval_capacity_factor": None, "max_new_tokens": max_new_tokens}
        room = generation.prompt_room(model.config, max_new_tokens)
        part["num_shortened_prompts"] = int(np.sum(_prompt_lengths(cache) > room))
        own = {"generate": lambda _: outputs}
    elif cache.kind == RANK_CLASSIFICATION:
        part, predictions, scores = _rank(
            model, cache, examples_per_batch, is_length_normalized, quiet
        )
        own = {"row_scores": scores}
    else:
        settings["mode"] = "loss"
        part, predictions, scores = _loss(model, cache, examples_per_batch, quiet)
        own = {"row_scores": scores}
    if seqio_task is not None:
        step = model.checkpoint.step
        values = seqio_metrics(seqio_task, split=cache.split, step=step, **own)
        part["score"] = values.pop("score", next(iter(values.values())))
        part |= {"metrics": values, "metrics_by": "seqio.Evaluator"}
    summary = {
        "task": cache.task,
        "split": cache.split,
        **part,
        "settings": settings,
        "checkpoint": {
            "path": str(model.checkpoint),
            "step": model.checkpoint.step,
            "fingerprint": layout.fingerprint(model.checkpoint),
            "num_experts": list(model.config.num_experts),
        },
        "token_cache_hash": cache.hash,
        "seconds": round(time.perf_counter() - started, 3),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {"uncurl_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    return Evaluation(summary, predictions)


def validation_score(
    model: LoadedModel,
    cache: TokenCache,
    *,
    examples_per_batch: int = 16,
    is_length_normalized: bool = False,
) -> float:
    """Scores a model that is being trained; higher is better.

    Args:
      model: with its current parameters.
      cache: a task with options (the score in percent) or plain text (minus the loss, nats a
        token).
      examples_per_batch: see `evaluate_model`.
      is_length_normalized: see `evaluate_model`.
    """
    if cache.kind == RANK_CLASSIFICATION:
        part, _, _ = _rank(model, cache, examples_per_batch, is_length_normalized, True)
        return float(part["score"])
    part, _, _ = _loss(model, cache, examples_per_batch, True)
    return -float(part["score"])


def _rank(
    model: LoadedModel, cache: TokenCache, examples_per_batch: int, normalize: bool, quiet: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
    size = examples_that_divide(examples_per_batch, model.mesh)
    scores = rank_classification.score_rows(
        model,
        cache.option_batches(size, length=row_length(model.config, cache)),
        num_rows=cache.num_rows,
        target_length=cache.target_length,
        num_batches=-(-cache.num_rows // (size * cache.max_options)),
        quiet=quiet,
    )
    values = scores.log_likelihood
    if normalize:
        values = values / np.maximum(scores.num_tokens, 1.0)
    predicted = cache.predictions(values)
    rows = []
    for index, example in enumerate(cache.examples()):
        places = list(cache.rows_of(index))
        rows.append(
            {
                "idx": example.idx,
                "group": list(example.group),
                "label": example.label,
                "prediction": predicted[index],
                "predicted_text": example.options[predicted[index]],
                "log_likelihoods": [round(float(scores.log_likelihood[row]), 6) for row in places],
            }
        )
    part = _scored(cache, predicted)
    part["fraction_tokens_left_behind"] = scores.fraction_tokens_left_behind
    return part, rows, values


def _scored(cache: TokenCache, predicted: list[int]) -> dict[str, Any]:
    """Metrics, interval and counts of rank classification or matched generation."""
    examples, score = cache.examples(), cache.score()
    values = score.values(examples, predicted)
    low, high = metrics.confidence_interval(examples, predicted, score)
    counts: dict[str, int] = {}
    for example, option in zip(examples, predicted, strict=True):
        text = example.options[option]
        counts[text] = counts.get(text, 0) + 1
    total = values.pop("score")
    part: dict[str, Any] = {
        "score": total,
        "interval": [low, high],
        "metrics": values,
        "num_examples": len(examples),
    }
    if len(counts) <= 10:
        part["prediction_counts"] = dict(sorted(counts.items()))
    return part


def _loss(
    model: LoadedModel, cache: TokenCache, rows_per_batch: int, quiet: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
    size = examples_that_divide(rows_per_batch, model.mesh)
    batches = cache.sequential_batches(size, length=row_length(model.config, cache))
    rows = np.flatnonzero(cache.is_target)
    ids = (
        np.pad(
            rows[start : start + size], (0, max(0, start + size - len(rows))), constant_values=-1
        )
        for start in range(0, len(rows), size)
    )
    scores = rank_classification.score_rows(
        model,
        zip(batches, ids, strict=True),
        num_rows=cache.num_rows,
        target_length=cache.target_length,
        num_batches=-(-len(rows) // size),
        quiet=quiet,
    )
    negative, tokens = -scores.log_likelihood[rows], scores.num_tokens[rows]
    loss = float(negative.sum() / tokens.sum())
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(rows), (1000, len(rows)))
    samples = negative[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    part = {
        "score": loss,
        "interval": [float(bound) for bound in np.percentile(samples, [2.5, 97.5])],
        "metrics": {"cross_entropy": loss, "perplexity": float(np.exp(loss))},
        "num_examples": len(rows),
        "num_tokens": int(tokens.sum()),
        "fraction_tokens_left_behind": scores.fraction_tokens_left_behind,
    }
    return part, [], scores.log_likelihood


def _normalize(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def match_option(text: str, options: tuple[str, ...]) -> int:
    """Returns the option that a generated text equals, or begins with; -1 if none.

    Case, punctuation and white space do not count; a whole match wins over a prefix, a longer
    prefix over a shorter one.
    """
    normal = _normalize(text)
    candidates = [_normalize(option) for option in options]
    if normal in candidates:
        return candidates.index(normal)
    prefixes = [
        (len(option), -index)
        for index, option in enumerate(candidates)
        if option and normal.startswith(option + " ")
    ]
    return -max(prefixes)[1] if prefixes else _NO_MATCH


def _generate(
    model: LoadedModel,
    cache: TokenCache,
    vocabulary: Vocabulary,
    examples_per_batch: int,
    max_new_tokens: int,
    quiet: bool,
) -> list[list[int]]:
    """Continues the prompt of every example greedily; long prompts lose tokens from the left."""
    cache.check_vocabulary(vocabulary.hash)
    room = generation.prompt_room(model.config, max_new_tokens)
    if max_new_tokens < 1 or room < 1:
        raise InputError(
            f"max_new_tokens must be at least 1 and below max_length={model.config.max_length}, "
            f"got {max_new_tokens}: choose another."
        )
    if not all(bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(model.params)):
        check_finite(model.checkpoint)
    prompts = [cache.prompt(index)[-room:] for index in range(cache.manifest["examples"])]
    outputs: list[list[int]] = []
    starts = tqdm(
        range(0, len(prompts), examples_per_batch),
        desc="generate",
        unit="batch",
        file=sys.stderr,
        disable=quiet,
        mininterval=1.0,
    )
    for start in starts:
        part = prompts[start : start + examples_per_batch]
        # One batch shape, one compiled program: the last batch repeats its last prompt.
        filled = part + part[-1:] * (examples_per_batch - len(part))
        tokens = generation.generate(
            model,
            filled,
            max_new_tokens=max_new_tokens,
            eos_id=vocabulary.eos_id,
            bos_id=vocabulary.bos_id,
        )
        outputs.extend(tokens[: len(part)])
    return outputs


def _prompt_lengths(cache: TokenCache) -> np.ndarray:
    """Returns the tokens of each example's prompt, [example] int."""
    firsts = [cache.rows_of(index)[0] for index in range(cache.manifest["examples"])]
    return cache.prompt_lengths[firsts]


def _matched(
    cache: TokenCache, vocabulary: Vocabulary, outputs: list[list[int]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Matches generated texts with the options and scores them."""
    rows, predicted, unmatched = [], [], 0
    for example, tokens in zip(cache.examples(), outputs, strict=True):
        text = vocabulary.decode(tokens)
        option = match_option(text, example.options)
        unmatched += option == _NO_MATCH
        # A text that matches no option is wrong: it counts as an option that is not right.
        wrong = next(
            (i for i in range(len(example.options)) if i not in example.correct_options), 0
        )
        predicted.append(wrong if option == _NO_MATCH else option)
        rows.append(
            {
                "idx": example.idx,
                "group": list(example.group),
                "label": example.label,
                "prediction": option,
                "text": text,
            }
        )
    # Decoding is dropless (generation.prefill), so no token is left behind.
    summary: dict[str, Any] = {"num_unmatched": unmatched, "fraction_tokens_left_behind": 0.0}
    if cache.kind == RANK_CLASSIFICATION:
        summary = _scored(cache, predicted) | summary
        summary.pop("prediction_counts", None)
    else:
        right = [row["prediction"] != _NO_MATCH for row in rows]
        draws = np.random.default_rng(0).integers(0, len(right), (1000, len(right)))
        samples = 100.0 * np.mean(np.asarray(right)[draws], axis=1)
        score = 100.0 * float(np.mean(right))
        summary |= {
            "score": score,
            "interval": [float(bound) for bound in np.percentile(samples, [2.5, 97.5])],
            "metrics": {"exact_match": score},
            "num_examples": len(right),
        }
    return summary, rows


def evaluate_checkpoint(
    checkpoint: str | os.PathLike[str],
    cache: TokenCache,
    *,
    out: str | os.PathLike[str],
    mode: str = RANK,
    examples_per_batch: int = 16,
    is_length_normalized: bool = False,
    is_dropless: bool = False,
    vocabulary: str | None = None,
    max_new_tokens: int = 16,
    seqio_task: str | None = None,
    expert_partitions: int = 1,
    model_partitions: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint and writes metrics.json and, beside it, <name>.predictions.jsonl.

    Args:
      checkpoint: a directory that `uncurl train` or `uncurl prune` wrote.
      cache: the split to evaluate.
      out: metrics file to write.
      mode: see `evaluate_model`.
      examples_per_batch: see `evaluate_model`.
      is_length_normalized: see `evaluate_model`.
      is_dropless: no capacity limit, whatever the model's evaluation capacity factor.
      vocabulary: spec for "generate"; the checkpoint's own by default.
      max_new_tokens: in "generate".
      seqio_task: see `evaluate_model`.
      expert_partitions: of the device mesh.
      model_partitions: of the device mesh.
      quiet: no progress bar.

    Returns:
      The content of metrics.json.

    Raises:
      InputError: If an output exists, vocabularies differ, or rows do not fit the model.
    """
    out = refuse_existing(out)
    predictions_file = refuse_existing(out.with_name(f"{out.stem}.predictions.jsonl"))
    if mode not in (RANK, GENERATE):
        raise InputError(f'mode must be "{RANK}" or "{GENERATE}", got {mode!r}.')
    if seqio_task is not None:
        check_seqio_task(seqio_task, is_generating=mode == GENERATE)
    path = layout.resolve(checkpoint)
    record = path.vocabulary()
    cache.check_vocabulary(record["hash"], record["name"])
    loaded = load_vocabulary(vocabulary or record["spec"]) if mode == GENERATE else None
    mesh = make_mesh(expert_partitions=expert_partitions, model_partitions=model_partitions)
    is_sharded = mesh.size > 1 and mode == RANK
    model = load_model(path, mesh if is_sharded else None)
    if is_dropless:
        config = dataclasses.replace(model.config, eval_capacity_factor=None)
        model = model._replace(config=config)
    evaluation = evaluate_model(
        model,
        cache,
        mode=mode,
        examples_per_batch=examples_per_batch,
        is_length_normalized=is_length_normalized,
        vocabulary=loaded,
        max_new_tokens=max_new_tokens,
        seqio_task=seqio_task,
        quiet=quiet,
    )
    if jax.process_index() == 0:
        write_evaluation(evaluation, out, predictions_file)
    return evaluation.summary


def write_evaluation(evaluation: Evaluation, out: Path, predictions_file: Path) -> None:
    """Writes predictions first, so that metrics.json never stands without them."""
    with atomic_file(predictions_file) as partial:
        text = "".join(json.dumps(row) + "\n" for row in evaluation.predictions)
        partial.write_text(text, encoding="utf-8")
    write_json(out, evaluation.summary)
