"""Token caches as SeqIO tasks, so that T5X reads the very rows that `uncurl train` reads.

gin files name these functions; a task of another origin is named by its SeqIO name instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from uncurl_jax.data import metrics
from uncurl_jax.data.cache_builder import build_token_cache
from uncurl_jax.data.cache_writer import LANGUAGE_MODELING, RANK_CLASSIFICATION
from uncurl_jax.data.seqio_vocabulary import seqio_vocabulary
from uncurl_jax.data.tasks import TRAIN
from uncurl_jax.data.token_cache import TokenCache, bucket_length
from uncurl_jax.data.vocabulary import PAD_ID, Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError

_HASH_LETTERS = 8

Caches = Mapping[str, TokenCache]

_REGISTERED: dict[str, Caches] = {}


def token_cache_task(
    directory: str | None,
    data_dir: str | None = None,
    build: Callable[..., Any] = build_token_cache,
) -> str:
    """Registers a token cache with SeqIO and returns the task's name.

    The training split has the rows that `uncurl train` draws from (right options alone); other
    splits have every row, with `idx` [2] int32 (example, option), and score metrics that give the
    values of `uncurl evaluate`. Plain text is scored by its loss.

    Args:
      directory: what `uncurl cache` wrote, with one folder per split, or one of these.
      data_dir: where the task's files lie: the cache is built first if it does not exist. None
        needs it to exist.
      build: builds it, as a file of gin/tasks binds it.

    Returns:
      SeqIO's name; the same for the same content.

    Raises:
      InputError: If there is no cache, or it cannot be built.
    """
    if directory is None:
        raise InputError(
            "CACHE must be set, got nothing: add --gin.CACHE=\"'DIRECTORY'\" with what uncurl "
            "cache wrote, or --gin.MIXTURE_OR_TASK_NAME=\"'a_registered_seqio_task'\"."
        )
    path = Path(directory)
    if not path.exists() and data_dir is not None:
        if jax.process_count() > 1:
            raise InputError(
                f"A token cache is built by one process, got {jax.process_count()} and no {path}: "
                "run uncurl cache first."
            )
        build(out=path, data_dir=data_dir)
    return _register(_open_splits(path))


def row_length(task: str) -> int | None:
    """Returns the tokens of a row as `uncurl train` pads it, None for tasks of another origin."""
    caches = _REGISTERED.get(task)
    return None if caches is None else bucket_length(_longest_row(caches))


def feature_lengths(task: str) -> dict[str, int]:
    """Returns T5X's TASK_FEATURE_LENGTHS of a token cache.

    Raises:
      InputError: If the task has another origin; its lengths are the user's choice.
    """
    caches = _REGISTERED.get(task)
    length = row_length(task)
    if caches is None or length is None:
        raise InputError(
            f"TASK_FEATURE_LENGTHS must be set for a task that is no token cache, got none for "
            f"{task}: add --gin.TASK_FEATURE_LENGTHS=\"{{'inputs': 224, 'targets': 32}}\"."
        )
    if _is_text(caches):
        return {"targets": _longest_row(caches)}
    # More than any row's inputs: `features.RowConverter` keeps rows to `row_length`.
    targets = max(cache.target_length for cache in caches.values())
    return {"inputs": length, "targets": targets}


def check_fits(task: str, max_length: int) -> None:
    """Checks that the rows of a token cache fit a model.

    Raises:
      InputError: If one does not.
    """
    longest = _longest_row(_REGISTERED.get(task, {}))
    if longest > max_length:
        raise InputError(
            f"Rows must fit the model's max_length={max_length}, got up to {longest} tokens in "
            f"{task}: build the token cache with a smaller --max_length."
        )


def vocabulary(task: str) -> seqio.Vocabulary:
    """Returns the vocabulary of a registered task's targets.

    Raises:
      InputError: If no task or mixture has that name.
    """
    if task not in seqio.TaskRegistry.names() and task not in seqio.MixtureRegistry.names():
        raise InputError(
            f"MIXTURE_OR_TASK_NAME must be a registered SeqIO task or mixture, got {task!r}: "
            "import the module that registers it in a gin file."
        )
    return seqio.get_mixture_or_task(task).output_features["targets"].vocabulary


def _open_splits(path: Path) -> dict[str, TokenCache]:
    inner = sorted(file.parent for file in path.glob("*/manifest.json"))
    caches = [TokenCache.open(folder) for folder in inner or [path]]
    return {cache.split: cache for cache in caches}


def _longest_row(caches: Caches) -> int:
    return max((cache.max_row_length for cache in caches.values()), default=0)


def _is_text(caches: Caches) -> bool:
    return all(cache.kind == LANGUAGE_MODELING for cache in caches.values())


def _load_vocabulary(cache: TokenCache) -> Vocabulary:
    loaded = load_vocabulary(cache.manifest["vocabulary"]["spec"])
    cache.check_vocabulary(loaded.hash, f"the file {loaded.spec}")
    return loaded


def _register(caches: Caches) -> str:
    digest = "_".join(sorted(cache.hash[:_HASH_LETTERS] for cache in caches.values()))
    first = next(iter(caches.values()))
    task = first.task.replace(":", "_")
    name = f"{task}_{digest}"
    if name in _REGISTERED:
        return name
    if first.bos_id != PAD_ID:
        begins = "their first token" if first.bos_id is None else f"id {first.bos_id}"
        raise InputError(
            f"Rows begin with padding (id {PAD_ID}) in T5X, got rows of {first.directory} that "
            f"begin with {begins}, as their vocabulary has it: train and score this model with "
            "uncurl train and uncurl evaluate."
        )
    own = _load_vocabulary(first)
    feature = seqio.Feature(seqio_vocabulary(own), add_eos=False)
    is_text = _is_text(caches)
    names = ("targets",) if is_text else ("inputs", "targets")

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        del shuffle_files, seed  # One file; SeqIO shuffles the rows.
        signature = {key: tf.TensorSpec([None], tf.int32) for key in names}
        signature |= {f"{key}_pretokenized": tf.TensorSpec([], tf.string) for key in names}
        signature["idx"] = tf.TensorSpec([2], tf.int32)
        rows = functools.partial(_rows, caches[split], names, own)
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    source: Any = seqio.FunctionDataSource(
        dataset_fn,
        list(caches),
        num_input_examples={split: len(_row_numbers(cache)) for split, cache in caches.items()},
    )
    seqio.TaskRegistry.add(
        name,
        source=source,
        output_features={key: feature for key in names},
        preprocessors=[],
        postprocess_fn=_postprocess,
        metric_fns=_metrics(caches),
    )
    _REGISTERED[name] = dict(caches)
    return name


def _row_numbers(cache: TokenCache) -> np.ndarray:
    if cache.kind == RANK_CLASSIFICATION and cache.split != TRAIN:
        return np.arange(cache.num_rows)
    return np.flatnonzero(cache.is_target)


def _rows(
    cache: TokenCache, names: Sequence[str], vocabulary: Vocabulary
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split as SeqIO features."""
    for row in _row_numbers(cache).tolist():
        tokens = np.asarray(cache.tokens[cache.offsets[row] : cache.offsets[row + 1]], np.int32)
        prompt = int(cache.prompt_lengths[row]) if "inputs" in names else 0
        parts = {"targets": tokens[prompt:], "inputs": tokens[:prompt]}
        features: dict[str, Any] = {name: parts[name] for name in names}
        # What T5X writes beside a prediction.
        features |= {f"{name}_pretokenized": vocabulary.decode(parts[name]) for name in names}
        yield {**features, "idx": np.array([cache.example[row], cache.option[row]], np.int32)}


def _postprocess(output: Any, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """Turns a target row into (example, option, tokens); leaves predictions alone."""
    if not is_target:
        return output
    return (*(int(value) for value in example["idx"]), len(example["targets"]))


def _metrics(caches: Caches) -> list[Callable[..., dict[str, float]]]:
    """Returns the score metrics of the split that is not for training."""
    scored = next((cache for split, cache in caches.items() if split != TRAIN), None)
    if scored is None:
        return []
    cache = scored

    def score(targets: Sequence[tuple[int, int, int]], scores: Sequence[float]) -> dict[str, float]:
        """The best option of each example, then the task's metrics."""
        places = np.asarray(targets)
        if len(places) != cache.num_rows:
            raise InputError(
                f"Every option of every example must be scored, got {len(places)} rows of "
                f"{cache.num_rows}: set EVALUATOR_NUM_EXAMPLES = None."
            )
        best = metrics.best_options(
            places[:, 0], places[:, 1], np.asarray(scores), cache.manifest["examples"]
        )
        return cache.score().values(cache.examples(), best)

    def loss(targets: Sequence[tuple[int, int, int]], scores: Sequence[float]) -> dict[str, float]:
        """Nats per token, and perplexity."""
        tokens = sum(count for _, _, count in targets)
        value = -float(np.sum(scores)) / max(tokens, 1)
        return {"cross_entropy": value, "perplexity": float(np.exp(value))}

    if cache.kind == RANK_CLASSIFICATION and cache.manifest["metrics"]:
        return [score]
    return [loss] if cache.kind == LANGUAGE_MODELING else []
