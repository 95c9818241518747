"""SeqIO tasks made of ours, and token caches made of any SeqIO task.

SeqIO and TensorFlow are imported inside the functions only: machines that train, prune and
evaluate from token caches need neither.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data import cache_writer, language_modeling, metrics
from uncurl_jax.data.cache_writer import LANGUAGE_MODELING, RANK_CLASSIFICATION, TEXT_TO_TEXT
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.seqio_vocabulary import from_seqio_vocabulary, seqio_vocabulary
from uncurl_jax.data.tasks import TRAIN, Example, Task
from uncurl_jax.data.vocabulary import Vocabulary
from uncurl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Registration:
    """What a task was registered with."""

    task: Task | LanguageModelingTask
    data_dir: str
    vocabulary: Vocabulary
    max_length: int

    def examples(self, split: str) -> list[Example]:
        """The examples of a split; needs a task with options."""
        assert isinstance(self.task, Task)
        return list(self.task.read(self.data_dir, split))


_REGISTERED: dict[str, _Registration] = {}


def register_seqio_task(
    task: Task,
    data_dir: str | Path,
    vocabulary: Vocabulary,
    max_length: int,
    *,
    name: str | None = None,
) -> str:
    """Registers a task with SeqIO.

    The training split has one row per right option (one per example, except for ReCoRD): features
    `inputs` (prompt) and `targets` (option and end of text). Any other split has one row per
    (example, option) and besides `idx` [2] int32 (place of the example, option) and `is_correct`.
    `seqio.Evaluator` with a score function then gives the values of `metrics` and "score".

    Args:
      task: the task; its files are read once here, to count rows.
      data_dir: where the files lie.
      vocabulary: tokenises the rows.
      max_length: most tokens of inputs and targets together.
      name: SeqIO's name; None for the task's own.

    Returns:
      The name. Registering the same again does nothing.

    Raises:
      InputError: If the name is taken or a file is missing or malformed.
    """
    import seqio
    import tensorflow as tf

    name = name or task.name
    registration = _Registration(task, str(data_dir), vocabulary, max_length)
    if not _claim(name, registration):
        return name
    row = {
        "inputs": tf.TensorSpec([None], tf.int32),
        "targets": tf.TensorSpec([None], tf.int32),
        "inputs_pretokenized": tf.TensorSpec([], tf.string),
        "targets_pretokenized": tf.TensorSpec([], tf.string),
    }
    scored_row = row | {
        "idx": tf.TensorSpec([2], tf.int32),
        "is_correct": tf.TensorSpec([], tf.bool),
    }

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        del shuffle_files, seed  # One file; SeqIO shuffles the rows.
        rows = functools.partial(_rows, registration, split)
        signature = row if split == TRAIN else scored_row
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    counts = {split: _count_rows(registration, split) for split in task.splits}
    source: Any = seqio.FunctionDataSource(dataset_fn, list(task.splits), num_input_examples=counts)
    feature = seqio.Feature(seqio_vocabulary(vocabulary), add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=source,
        output_features={"inputs": feature, "targets": feature},
        preprocessors=[],
        postprocess_fn=_postprocess,
        metric_fns=[_score_metric(registration)],
    )
    _REGISTERED[name] = registration
    return name


def register_language_modeling_task(
    task: LanguageModelingTask,
    data_dir: str | Path,
    vocabulary: Vocabulary,
    length: int,
    *,
    name: str | None = None,
) -> str:
    """Registers a plain-text task with SeqIO: rows of exactly `length` tokens in `targets`.

    Feed it to `seqio.DecoderFeatureConverter(pack=False)` or `LMFeatureConverter`. The number of
    input examples is the number of documents.

    Args:
      task: the text files; read once here, to count documents.
      data_dir: where the files lie.
      vocabulary: tokenises the documents; each is followed by the end-of-text id.
      length: tokens per row; the remainder is dropped.
      name: SeqIO's name; None for the task's own.

    Returns:
      The name. Registering the same again does nothing.

    Raises:
      InputError: If the name is taken or a file is missing or malformed.
    """
    import seqio
    import tensorflow as tf

    name = name or task.name
    registration = _Registration(task, str(data_dir), vocabulary, length)
    if not _claim(name, registration):
        return name

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        del shuffle_files, seed  # One file; SeqIO shuffles the rows.

        def documents() -> Iterator[np.ndarray]:
            texts = task.read_documents(data_dir, split)
            for ids in language_modeling.encode_documents(texts, vocabulary):
                yield np.array(ids, np.int32)

        return tf.data.Dataset.from_generator(
            documents, output_signature=tf.TensorSpec([None], tf.int32)
        )

    def pack(dataset: Any) -> Any:
        rows = dataset.unbatch().batch(length, drop_remainder=True)
        return rows.map(lambda row: {"targets": row})

    counts = {split: sum(1 for _ in task.read_documents(data_dir, split)) for split in task.splits}
    source: Any = seqio.FunctionDataSource(dataset_fn, list(task.splits), num_input_examples=counts)
    seqio.TaskRegistry.add(
        name,
        source=source,
        output_features={"targets": seqio.Feature(seqio_vocabulary(vocabulary), add_eos=False)},
        preprocessors=[pack],
        metric_fns=[],
    )
    _REGISTERED[name] = registration
    return name


def _claim(name: str, registration: _Registration) -> bool:
    """Returns whether the name is free; False if the same was registered under it already."""
    import seqio

    if name in _REGISTERED and _REGISTERED[name] == registration:
        return False
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise InputError(
            f"A SeqIO task's name must be new, got {name!r}, which stands for another task, "
            f"directory, vocabulary or length: pass another name."
        )
    return True


def _rows(registration: _Registration, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split as SeqIO features."""
    for place, example in enumerate(registration.examples(split)):
        encoded = cache_writer.encode_example(
            example, registration.vocabulary, registration.max_length
        )
        for option, ids in enumerate(encoded.options):
            is_correct = option in example.correct_options
            row = {
                "inputs": np.array(encoded.prompt, np.int32),
                "targets": np.array(ids, np.int32),
                "inputs_pretokenized": example.prompt,
                "targets_pretokenized": example.options[option],
            }
            if split != TRAIN:
                yield row | {"idx": np.array([place, option], np.int32), "is_correct": is_correct}
            elif is_correct:
                yield row


def _count_rows(registration: _Registration, split: str) -> int:
    examples = registration.examples(split)
    return sum(len(ex.correct_options if split == TRAIN else ex.options) for ex in examples)


def _postprocess(output: Any, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """Turns a target row into (place of the example, option); leaves predictions alone."""
    return tuple(int(value) for value in example["idx"]) if is_target else output


def _score_metric(registration: _Registration) -> Callable[..., dict[str, float]]:
    """Returns SeqIO's score metric: the best option of each example, then the task's metrics."""

    @functools.cache
    def split_with_labels() -> list[Example]:
        split = next(split for split in registration.task.splits if split != TRAIN)
        return registration.examples(split)

    def score(targets: Sequence[tuple[int, int]], scores: Sequence[float]) -> dict[str, float]:
        examples = split_with_labels()
        keys = np.array(targets)
        counts = np.bincount(keys[:, 0], minlength=len(examples))
        whole = [place for place, ex in enumerate(examples) if counts[place] == len(ex.options)]
        is_whole = np.isin(keys[:, 0], whole)
        if not whole or counts[~np.isin(np.arange(len(counts)), whole)].max(initial=0) > 0:
            raise InputError(
                f"Every option of an example must be scored, got {len(keys)} rows that hold only "
                f"{len(whole)} whole examples: choose num_examples as a multiple of the options."
            )
        position = np.searchsorted(whole, keys[is_whole, 0])
        best = metrics.best_options(
            position, keys[is_whole, 1], np.asarray(scores)[is_whole], len(whole)
        )
        task = registration.task
        assert isinstance(task, Task)
        return metrics.Score(task.metrics, task.primary_metric).values(
            [examples[place] for place in whole], best
        )

    return score


def build_seqio_cache(
    name: str,
    *,
    out: str | Path,
    max_length: int,
    vocabulary: Vocabulary | None = None,
    splits: Sequence[str] | None = None,
    sequence_length: Mapping[str, int] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Builds token caches from a registered SeqIO task or mixture.

    Rows with `idx` [2] and `is_correct` become a rank-classification cache; `inputs` and `targets`
    alone a text-to-text cache (one row per example, no options to rank); `targets` alone a
    language-modelling cache. Tokens are taken as SeqIO gives them; rows longer than `max_length`
    lose tokens from the left of the inputs.

    Args:
      name: registered name.
      out: the directory to write, one folder per split; it must not exist.
      max_length: most tokens per row.
      vocabulary: the vocabulary that the task must have; None takes the task's.
      splits: which splits; None for all that the task has.
      sequence_length: given to the preprocessors, which may need it; None for no limit.
      progress: called with (split, rows) at the end of a split.

    Returns:
      The manifest of each split.

    Raises:
      InputError: If there is no such task, its vocabulary differs, or targets are too long.
    """
    import seqio

    out = artifacts.refuse_existing(out)
    if name not in seqio.TaskRegistry.names() and name not in seqio.MixtureRegistry.names():
        raise InputError(
            f"A SeqIO task or mixture must be registered before its cache is built, got {name!r}: "
            f"import the module that registers it."
        )
    provider = seqio.get_mixture_or_task(name)
    own = from_seqio_vocabulary(provider.output_features["targets"].vocabulary)
    if vocabulary is not None and vocabulary != own:
        raise InputError(
            f"The cache of SeqIO task {name} must use the task's vocabulary, got {vocabulary.name} "
            f"({vocabulary.hash[:12]}) and {own.name} ({own.hash[:12]}) in the task: name the same."
        )
    manifests = {}
    with artifacts.atomic_directory(out) as partial:
        for split in splits or provider.splits:
            dataset = provider.get_dataset(
                sequence_length=sequence_length, split=split, shuffle=False, num_epochs=1
            )
            writer = cache_writer.CacheWriter(partial / split, own)
            try:
                fields = _write_dataset(writer, name, split, dataset, max_length)
                fields |= {"task": name, "split": split, "max_length": max_length, "sources": []}
                manifests[split] = writer.finish(fields)
            finally:
                writer.close()
            if progress:
                progress(split, writer.num_rows)
    return manifests


def _write_dataset(
    writer: cache_writer.CacheWriter, name: str, split: str, dataset: Any, max_length: int
) -> dict[str, Any]:
    """Writes the rows of a `tf.data.Dataset` and returns kind, metrics and dropped tokens."""
    rows = dataset.as_numpy_iterator()
    features = set(dataset.element_spec)
    fields: dict[str, Any] = {"metrics": [], "primary_metric": "", "dropped_tokens": 0}
    if "inputs" not in features:
        for row in rows:
            _check_fits(row["targets"], max_length, name, writer.num_rows)
            writer.add_row(row["targets"], example=writer.num_rows)
        return fields | {"kind": LANGUAGE_MODELING}
    is_ranked = {"idx", "is_correct"} <= features and dataset.element_spec["idx"].shape == [2]
    own = _REGISTERED.get(name)
    known = own.examples(split) if is_ranked and own else None
    task = own.task if own else None
    if is_ranked:
        functions = task.metrics if isinstance(task, Task) else (metrics.accuracy,)
        fields["metrics"] = [metrics.metric_name(metric) for metric in functions]
        fields["primary_metric"] = task.primary_metric if isinstance(task, Task) else "accuracy"
    for place, group in enumerate(_groups(rows, is_ranked)):
        example = known[place] if known else _example_of(group, writer, place, is_ranked)
        targets = [row["targets"].tolist() for row in group]
        for ids in targets:
            _check_fits(ids, max_length, name, writer.num_rows)
        prompt = group[0]["inputs"].tolist()
        num_dropped = max(len(prompt) + max(map(len, targets)) - max_length, 0)
        encoded = cache_writer.EncodedExample(prompt[num_dropped:], targets, num_dropped)
        writer.add_example(example, encoded)
        fields["dropped_tokens"] += num_dropped * len(targets)
    return fields | {"kind": RANK_CLASSIFICATION if is_ranked else TEXT_TO_TEXT}


def _groups(rows: Iterator[Any], is_ranked: bool) -> Iterator[list[Any]]:
    """Yields the rows of each example: neighbours with the same first number in `idx`."""
    group: list[Any] = []
    for row in rows:
        if group and not (is_ranked and row["idx"][0] == group[0]["idx"][0]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _example_of(
    group: list[Any], writer: cache_writer.CacheWriter, place: int, is_ranked: bool
) -> Example:
    """Returns an example with the texts of its rows."""
    options = tuple(_text(row, "targets", writer.vocabulary) for row in group)
    correct = [bool(row["is_correct"]) if is_ranked else True for row in group]
    return Example(
        prompt=_text(group[0], "inputs", writer.vocabulary),
        options=options,
        label=correct.index(True) if any(correct) else None,
        idx=place,
        targets=tuple(text for text, right in zip(options, correct, strict=True) if right),
    )


def _text(row: Mapping[str, Any], feature: str, vocabulary: Vocabulary) -> str:
    text = row.get(f"{feature}_pretokenized")
    return text.decode("utf-8") if isinstance(text, bytes) else vocabulary.decode(row[feature])


def _check_fits(targets: Sequence[int], max_length: int, name: str, row: int) -> None:
    if len(targets) > max_length:
        raise InputError(
            f"The targets of a row must fit into max_length={max_length}, got {len(targets)} "
            f"tokens in row {row} of {name}: raise max_length or pass sequence_length."
        )
