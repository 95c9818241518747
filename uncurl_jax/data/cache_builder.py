"""Builds token caches: reads a task, tokenises it and writes one directory per split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.data import cache_writer, language_modeling, metrics, registry
from uncurl_jax.data.cache_writer import LANGUAGE_MODELING, RANK_CLASSIFICATION
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import Task
from uncurl_jax.data.vocabulary import Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError

SEQIO_PREFIX = "seqio:"
_PROGRESS_ROWS = 1000

Progress = Callable[[str, int], None]


def build_token_cache(
    task: Task | LanguageModelingTask | JsonlTask | str,
    *,
    out: str | Path,
    vocabulary: Vocabulary | str = "bytes",
    max_length: int = 512,
    data_dir: str | Path = ".",
    splits: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokenises a task into <out>/<split>, all splits or nothing.

    Rank-classification rows are prompt + option + end of text, one per (example, option), wrong
    options included; `is_target` marks the right ones. Language-modelling rows are cut from the
    stream of documents; the remainder that does not fill a row is dropped and counted.

    Args:
      task: a task, the name of a registered one, or "seqio:<name>" for a registered SeqIO task
        or mixture (`seqio_tasks.build_seqio_cache`).
      out: the directory to write; it must not exist.
      vocabulary: a vocabulary or its spec.
      max_length: most tokens per row; longer rows lose tokens from the left of the prompt.
      data_dir: where the task's files lie.
      splits: which splits; None for all that the task has.
      progress: called with (split, rows so far) every 1000 rows and at the end of a split.

    Returns:
      The manifest of each split.

    Raises:
      InputError: If the output exists, a file is missing or malformed, or a row does not fit.
    """
    out = artifacts.refuse_existing(out)
    if max_length < 2:
        raise InputError(f"max_length must be at least 2, got {max_length}.")
    if isinstance(vocabulary, str):
        vocabulary = load_vocabulary(vocabulary)
    if isinstance(task, str) and task.startswith(SEQIO_PREFIX):
        from uncurl_jax.data import seqio_tasks

        return seqio_tasks.build_seqio_cache(
            task.removeprefix(SEQIO_PREFIX),
            out=out,
            max_length=max_length,
            vocabulary=vocabulary,
            splits=splits,
            progress=progress,
        )
    if isinstance(task, str):
        task = registry.find_task(task)
    elif isinstance(task, JsonlTask):
        task = task.to_task()
    splits = tuple(splits or task.splits)
    sources = {split: task.source_files(data_dir, split) for split in splits}
    manifests = {}
    with artifacts.atomic_directory(out) as partial:
        for split in splits:
            writer = cache_writer.CacheWriter(partial / split, vocabulary)
            try:
                report = _reporter(split, writer, progress)
                fields = _write_rows(writer, task, data_dir, split, vocabulary, max_length, report)
                fields["sources"] = cache_writer.describe_sources(sources[split], data_dir)
                manifests[split] = writer.finish(fields)
            finally:
                writer.close()
            if progress:
                progress(split, writer.num_rows)
    return manifests


def _reporter(
    split: str, writer: cache_writer.CacheWriter, progress: Progress | None
) -> Callable[[], None]:
    """Returns a function to call after each example; it reports every 1000 rows."""
    reported = 0

    def report() -> None:
        nonlocal reported
        if progress and writer.num_rows // _PROGRESS_ROWS > reported:
            reported = writer.num_rows // _PROGRESS_ROWS
            progress(split, writer.num_rows)

    return report


def _write_rows(
    writer: cache_writer.CacheWriter,
    task: Task | LanguageModelingTask,
    data_dir: str | Path,
    split: str,
    vocabulary: Vocabulary,
    max_length: int,
    report: Callable[[], None],
) -> dict[str, Any]:
    """Writes all rows of a split and returns the manifest's fields, all but the sources."""
    fields = {"task": task.name, "split": split, "max_length": max_length}
    if isinstance(task, LanguageModelingTask):
        documents = language_modeling.encode_documents(
            task.read_documents(data_dir, split), vocabulary
        )
        dropped = 0
        for tokens in language_modeling.pack(documents, max_length):
            if len(tokens) < max_length:
                dropped = len(tokens)
            else:
                writer.add_row(tokens, example=writer.num_rows)
                report()
        return {
            **fields,
            "kind": LANGUAGE_MODELING,
            "metrics": [],
            "primary_metric": "",
            "dropped_tokens": dropped,
        }
    dropped = 0
    for example in task.read(data_dir, split):
        encoded = cache_writer.encode_example(example, vocabulary, max_length)
        writer.add_example(example, encoded)
        dropped += encoded.num_dropped * len(encoded.options)
        report()
    return {
        **fields,
        "kind": RANK_CLASSIFICATION,
        "metrics": [metrics.metric_name(metric) for metric in task.metrics],
        "primary_metric": task.primary_metric,
        "dropped_tokens": dropped,
    }
