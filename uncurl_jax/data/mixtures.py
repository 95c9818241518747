"""Mixtures of token caches: instruction data and a share of plain text, for one training stage.

What tasks that will be evaluated have in common with the mixture is left out, by name and by exact
text, and counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data.cache_writer import TEXT_TO_TEXT, CacheWriter
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import Vocabulary
from uncurl_jax.errors import InputError

# Shorter lines ("Question:", a verb's two options) say nothing about where a text comes from.
_MIN_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What a stage of instruction tuning is trained on.

    Attributes:
      tasks: registered names, JsonlTasks, or "seqio:<name>" of SeqIO tasks and mixtures.
      max_rows_per_task: rows that one task gives at most, drawn at random: the cap of T5's
        examples-proportional mixing (arXiv 1910.10683, section 3.5.2).
      corpus_share: share of the rows that is plain text of the pretraining corpus, in [0, 1).
      seed: of the draws.
    """

    tasks: tuple[Any, ...]
    max_rows_per_task: int = 100_000
    corpus_share: float = 0.0
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise InputError("A mixture must name at least one task, got none: name some.")
        if self.max_rows_per_task < 1 or not 0 <= self.corpus_share < 1:
            raise InputError(
                "max_rows_per_task must be at least 1 and corpus_share in [0, 1), got "
                f"{self.max_rows_per_task} and {self.corpus_share}."
            )


def passages(text: str) -> set[str]:
    """Returns the lines of a text that are long enough to be recognised, case and space apart."""
    lines = (re.sub(r"\s+", " ", line).strip().lower() for line in text.split("\n"))
    return {line for line in lines if len(line) >= _MIN_CHARACTERS}


def texts_of(caches: Iterable[TokenCache]) -> set[str]:
    """Returns prompts and passages of all examples of some caches, to look for overlap."""
    found: set[str] = set()
    for cache in caches:
        for example in cache.examples():
            found |= passages(example.prompt)
            found.add(_whole(example.prompt))
    return found


def _whole(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()


def build_mixture_cache(
    tasks: Sequence[TokenCache],
    corpus: TokenCache | None,
    config: MixtureConfig,
    *,
    evaluated: set[str],
    vocabulary: Vocabulary,
    max_length: int,
    out: str | Path,
) -> dict[str, Any]:
    """Writes <out>/train: right-option rows of the tasks and rows of plain text.

    Args:
      tasks: training splits; tasks that are evaluated must have been left out by name.
      corpus: plain text, if config.corpus_share is above 0.
      config: how much of what.
      evaluated: texts of the evaluated tasks, as `texts_of` returns them; an example with one of
        them as its prompt, or as a line of it, is left out.
      vocabulary: of all caches.
      max_length: most tokens of a row; longer rows are left out and counted.
      out: directory to write; it must not exist.

    Returns:
      The manifest; its "mixture" holds for each source how many rows it gave, how many were left
      out for overlapping, and whether its text could be looked at.

    Raises:
      InputError: If the output exists, vocabularies differ, or no row is left.
    """
    out = artifacts.refuse_existing(out)
    generator = np.random.default_rng(config.seed)
    parts: list[tuple[TokenCache, np.ndarray]] = []
    report: list[dict[str, Any]] = []
    for cache in tasks:
        cache.check_vocabulary(vocabulary.hash, vocabulary.name)
        rows, line = _task_rows(cache, evaluated, max_length)
        if len(rows) > config.max_rows_per_task:
            rows = np.sort(generator.choice(rows, config.max_rows_per_task, replace=False))
        parts.append((cache, rows))
        report.append({**line, "rows": len(rows)})
    count = sum(len(rows) for _, rows in parts)
    if corpus is not None and config.corpus_share > 0:
        corpus.check_vocabulary(vocabulary.hash, vocabulary.name)
        wanted = round(config.corpus_share / (1 - config.corpus_share) * count)
        taken = min(wanted, corpus.num_rows)
        rows = np.sort(generator.choice(corpus.num_rows, taken, replace=False))
        parts.append((corpus, rows))
        report.append(
            {"task": corpus.task, "rows": taken, "overlapping": 0, "is_text_compared": False}
        )
    with artifacts.atomic_directory(out) as partial:
        writer = CacheWriter(partial / "train", vocabulary)
        try:
            for cache, rows in parts:
                for row in rows.tolist():
                    writer.add_row(
                        cache.tokens[cache.offsets[row] : cache.offsets[row + 1]],
                        prompt_length=int(cache.prompt_lengths[row]),
                        example=writer.num_rows,
                    )
            manifest = writer.finish(
                {
                    "task": "mixture",
                    "split": "train",
                    "max_length": max_length,
                    "kind": TEXT_TO_TEXT,
                    "metrics": [],
                    "primary_metric": "",
                    "dropped_tokens": 0,
                    "mixture": report,
                    "sources": [
                        {
                            "file": cache.task,
                            "bytes": cache.manifest["tokens"],
                            "sha256": cache.hash,
                        }
                        for cache, _ in parts
                    ],
                }
            )
        finally:
            writer.close()
    return manifest


def _task_rows(
    cache: TokenCache, evaluated: set[str], max_length: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the right-option rows that may be used, and what to report of them."""
    examples = cache.examples()
    is_overlapping = np.array(
        [
            _whole(example.prompt) in evaluated or bool(passages(example.prompt) & evaluated)
            for example in examples
        ],
        bool,
    )
    is_used = np.array(cache.is_target)
    if len(examples):
        is_used &= ~is_overlapping[cache.example]
    is_long = np.diff(cache.offsets) > max_length
    line = {
        "task": cache.task,
        "overlapping": int(is_overlapping.sum()),
        "too_long": int((is_used & is_long).sum()),
        "is_text_compared": bool(examples),
    }
    return np.flatnonzero(is_used & ~is_long), line
