"""Token caches: a task's rows as arrays on disk, read with numpy alone.

Built once where the data is (`build_token_cache`), then copied to the accelerator machines, where
training, calibration and evaluation open it (`TokenCache.open`) without TensorFlow or SeqIO.
The files are listed in `cache_writer`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data import cache_writer, metrics
from uncurl_jax.data.cache_builder import build_token_cache
from uncurl_jax.data.tasks import Example
from uncurl_jax.data.vocabulary import PAD_ID
from uncurl_jax.errors import InputError

__all__ = ["Batch", "OptionBatch", "TokenCache", "bucket_length", "build_token_cache"]


class Batch(NamedTuple):
    """Rows for the model; b rows of length l, filled up on the right.

    Attributes:
      inputs: [b, l] int32, targets shifted right, starting with the vocabulary's bos_id (padding,
        id 0, for all but Hugging Face's); without one, with the row's first token, which is then
        no target.
      targets: [b, l] int32, tokens, then padding.
      weights: [b, l] float32, 1 where a token counts in the loss: option and end of text.
      mask: [b, l] bool, True where the target is a real token, prompt included.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    mask: np.ndarray


class OptionBatch(NamedTuple):
    """A batch that holds whole examples.

    Attributes:
      batch: the rows.
      row_ids: [b] int64, each row's number in the cache, -1 for filling.
    """

    batch: Batch
    row_ids: np.ndarray


def bucket_length(length: int, multiple: int = 32) -> int:
    """Returns `length` rounded up to a multiple, so that few shapes are compiled."""
    if length < 1 or multiple < 1:
        raise InputError(f"length and multiple must be positive, got {length} and {multiple}.")
    return -(-length // multiple) * multiple


class TokenCache:
    """One split of a task as arrays; open it with `TokenCache.open`.

    Attributes:
      directory: where it lies.
      manifest: the manifest as read.
      tokens: [token] uint16 or int32, all rows end to end.
      offsets: [row + 1] int64.
      prompt_lengths: [row] int32.
      example: [row] int32, place of the row's example in `examples()`.
      option: [row] int32.
      is_target: [row] bool.
    """

    def __init__(
        self, directory: Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        """Use `TokenCache.open`."""
        self.directory = directory
        self.manifest = manifest
        self.tokens = arrays["tokens"]
        self.offsets = arrays["offsets"]
        self.prompt_lengths = arrays["prompt_lengths"]
        self.example = arrays["example"]
        self.option = arrays["option"]
        self.is_target = arrays["is_target"]

    @classmethod
    def open(cls, directory: str | Path) -> TokenCache:
        """Opens the cache of one split; tokens are memory-mapped.

        Raises:
          InputError: If the directory holds no cache of this version, or its files disagree.
        """
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            inner = sorted(path.parent.name for path in directory.glob("*/manifest.json"))
            remedy = f"name one split, as {directory / inner[0]}" if inner else "build one first"
            raise InputError(
                f"A token cache must hold manifest.json, got {directory} without it: {remedy}."
            )
        manifest = artifacts.read_json(directory / "manifest.json")
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != cache_writer.FORMAT_VERSION or manifest.get("format") != cache_writer.FORMAT:
            raise InputError(
                f"{directory} must be a token cache of format version "
                f"{cache_writer.FORMAT_VERSION}, got version {version}: build it again."
            )
        arrays = {
            name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", *cache_writer.COLUMNS)
        }
        rows = manifest["rows"]
        expected = {name: rows for name in cache_writer.COLUMNS}
        expected |= {"tokens": manifest["tokens"], "offsets": rows + 1}
        for name, size in expected.items():
            if arrays[name].shape != (size,):
                raise InputError(
                    f"{directory / name}.npy must have shape ({size},) as the manifest says, got "
                    f"{arrays[name].shape}: copy or build the cache again."
                )
        return cls(directory, manifest, arrays)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.manifest["task"]

    @property
    def split(self) -> str:
        """The split's name."""
        return self.manifest["split"]

    @property
    def kind(self) -> str:
        """One of "rank_classification", "language_modeling" and "text_to_text"."""
        return self.manifest["kind"]

    @property
    def hash(self) -> str:
        """SHA-256 of the content."""
        return self.manifest["hash"]

    @property
    def vocabulary_hash(self) -> str:
        """Hash of the vocabulary that the tokens belong to."""
        return self.manifest["vocabulary"]["hash"]

    @property
    def bos_id(self) -> int | None:
        """The id that rows begin with where they are read, None if with their first token."""
        return self.manifest.get("bos_id", PAD_ID)

    @property
    def num_rows(self) -> int:
        """Rows, wrong options included."""
        return self.manifest["rows"]

    @property
    def num_target_rows(self) -> int:
        """Rows that `train_batches` draws from, an epoch."""
        return self.manifest["target_rows"]

    @property
    def max_row_length(self) -> int:
        """Tokens of the longest row."""
        return self.manifest["max_row_length"]

    @property
    def target_length(self) -> int:
        """Most tokens of a row that follow its prompt, rounded up to 8: what the loss can count."""
        return bucket_length(int((np.diff(self.offsets) - self.prompt_lengths).max(initial=1)), 8)

    @property
    def max_options(self) -> int:
        """Most options of an example; 1 for language modelling."""
        return self.manifest["max_options"]

    def verify(self) -> None:
        """Reads every file and compares it with the manifest's hashes.

        Raises:
          InputError: If a file or the manifest was changed.
        """
        for name, digest in self.manifest["files"].items():
            if artifacts.sha256_of_file(self.directory / name) != digest:
                raise InputError(
                    f"{self.directory / name} differs from its hash in the manifest: "
                    f"copy or build the cache again."
                )
        if cache_writer.manifest_hash(self.manifest) != self.hash:
            raise InputError(
                f"{self.directory / 'manifest.json'} differs from its own hash: "
                f"copy or build the cache again."
            )

    def check_vocabulary(self, vocabulary_hash: str, name: str = "the model's vocabulary") -> None:
        """Checks that the tokens belong to the model's vocabulary.

        Raises:
          InputError: If the hashes differ.
        """
        if vocabulary_hash != self.vocabulary_hash:
            own = self.manifest["vocabulary"]
            raise InputError(
                f"A token cache must use the model's vocabulary, got {own['name']} "
                f"({own['hash'][:12]}) in {self.directory} and {name} ({vocabulary_hash[:12]}) in "
                f"the model: build the cache with the model's vocabulary."
            )

    def check_prompts(self) -> None:
        """Checks that there are prompts, which is what an encoder reads, and that they are whole.

        Raises:
          InputError: If no row has one, or nothing stands before a row.
        """
        if self.bos_id is None:
            raise InputError(
                "A model with an encoder needs a vocabulary whose rows begin with an id of their "
                f"own (T5's is padding), got {self.manifest['vocabulary']['name']} in "
                f"{self.directory}: set decoder_start_token_id in its config.json and build the "
                "cache again."
            )
        if not self.prompt_lengths.any():
            raise InputError(
                f"A model with an encoder needs rows with a prompt and an answer, got {self.task} "
                f"({self.kind}) without prompts in {self.directory}: use a task with prompts."
            )

    def examples(self) -> list[Example]:
        """Returns the examples in order; empty for language modelling."""
        return list(self._examples)

    @functools.cached_property
    def _examples(self) -> list[Example]:
        text = (self.directory / "examples.jsonl").read_text(encoding="utf-8")
        return [Example.from_dict(json.loads(line)) for line in text.split("\n") if line]

    def rows_of(self, example: int) -> range:
        """Returns the row numbers of the options of `examples()[example]`, in option order."""
        low, high = np.searchsorted(self.example, [example, example + 1])
        return range(int(low), int(high))

    def prompt(self, example: int) -> list[int]:
        """Returns the token ids of the prompt of `examples()[example]`, as its rows hold them."""
        row = self.rows_of(example)[0]
        start = int(self.offsets[row])
        return self.tokens[start : start + int(self.prompt_lengths[row])].tolist()

    def predictions(self, row_scores: np.ndarray) -> list[int]:
        """Returns the option with the largest score of each example; ties go to the first.

        Args:
          row_scores: [row] float, log-likelihood of each row's option.
        """
        if np.shape(row_scores) != (self.num_rows,):
            raise InputError(
                f"Scores must be one per row, ({self.num_rows},), got {np.shape(row_scores)}."
            )
        return metrics.best_options(
            self.example, self.option, np.asarray(row_scores), self.manifest["examples"]
        )

    def score(self) -> metrics.Score:
        """Returns the task's metrics; `.values(examples, predictions)` gives all, in percent.

        Raises:
          InputError: If the task has no metrics, or one is not registered.
        """
        if not self.manifest["metrics"]:
            raise InputError(
                f"Task {self.task} ({self.kind}) has no metrics on options: evaluate its loss."
            )
        functions = tuple(metrics.get_metric(name) for name in self.manifest["metrics"])
        return metrics.Score(functions, self.manifest["primary_metric"])

    def train_batches(
        self,
        batch_size: int,
        *,
        length: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Returns endless batches of right-option rows, shuffled anew in each epoch.

        The batch of step s depends on `seed` and s only, so a run resumes exactly; it does not
        depend on numpy's version either (sorted PCG64 output). Epochs follow one another without
        a gap: a batch may hold the end of one and the start of the next.

        Args:
          batch_size: rows of the global batch; a multiple of `process_count`.
          length: tokens per row, at least the longest row's.
          seed: of the order.
          start_step: step of the first batch returned.
          process_index: gets rows [index * b / count, (index + 1) * b / count) of each batch.
          process_count: number of processes.

        Raises:
          InputError: If no row is a target, a row is longer than `length`, or the sizes disagree.
        """
        local = _local_slice(batch_size, process_index, process_count)
        rows = np.flatnonzero(self.is_target)
        if not len(rows):
            raise InputError(
                f"Training needs rows with a right option, got none in {self.directory}: "
                f"use a split with labels."
            )
        self._check_length(rows, length)
        if start_step < 0 or seed < 0:
            raise InputError(f"start_step and seed must be >= 0, got {start_step} and {seed}.")

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(len(rows))
            return rows[np.argsort(bits, kind="stable")]

        def batches() -> Iterator[Batch]:
            step = start_step
            while True:
                samples = step * batch_size + np.arange(local.start, local.stop)
                epochs, places = np.divmod(samples, len(rows))
                chosen = np.empty_like(samples)
                for epoch in np.unique(epochs):
                    is_here = epochs == epoch
                    chosen[is_here] = order(int(epoch))[places[is_here]]
                yield self._gather(chosen, length)
                step += 1

        return batches()

    def sequential_batches(
        self,
        batch_size: int,
        *,
        length: int,
        rows: str = "targets",
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Returns each row once, in order; the last batch is filled up with empty rows.

        Args:
          batch_size: rows of the global batch; a multiple of `process_count`.
          length: tokens per row, at least the longest used row's.
          rows: "targets" for right options only, "all" for every row.
          process_index: as in `train_batches`.
          process_count: number of processes.

        Raises:
          InputError: If a row is longer than `length` or an argument is not allowed.
        """
        local = _local_slice(batch_size, process_index, process_count)
        if rows not in ("targets", "all"):
            raise InputError(f'rows must be "targets" or "all", got {rows!r}.')
        chosen = np.flatnonzero(self.is_target) if rows == "targets" else np.arange(self.num_rows)
        self._check_length(chosen, length)

        def batches() -> Iterator[Batch]:
            for start in range(0, len(chosen), batch_size):
                yield self._gather(_filled(chosen[start:][:batch_size], batch_size)[local], length)

        return batches()

    def option_batches(
        self,
        examples_per_batch: int,
        *,
        length: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[OptionBatch]:
        """Returns every row once, all options of an example in one (global) batch.

        A batch has examples_per_batch * max_options rows. Examples with fewer options leave room
        for more examples; what remains is filled with empty rows.

        Args:
          examples_per_batch: examples that fit in any case.
          length: tokens per row, at least the longest row's.
          process_index: as in `train_batches`; the options of an example may be on two processes.
          process_count: number of processes.

        Raises:
          InputError: If the cache has no examples, or a row is longer than `length`.
        """
        if not self.manifest["examples"]:
            raise InputError(
                f"Ranking needs examples with options, got {self.kind} in {self.directory}: "
                f"use sequential_batches."
            )
        if examples_per_batch < 1:
            raise InputError(f"examples_per_batch must be at least 1, got {examples_per_batch}.")
        size = examples_per_batch * self.max_options
        local = _local_slice(size, process_index, process_count)
        self._check_length(np.arange(self.num_rows), length)
        counts = np.bincount(self.example, minlength=self.manifest["examples"])

        def batches() -> Iterator[OptionBatch]:
            start = stop = 0
            for count in [*counts.tolist(), size + 1]:
                if stop + count - start > size:
                    row_ids = _filled(np.arange(start, stop), size)[local]
                    yield OptionBatch(self._gather(row_ids, length), row_ids)
                    start = stop
                stop += count

        return batches()

    def _check_length(self, rows: np.ndarray, length: int) -> None:
        lengths = np.diff(self.offsets)[rows]
        if len(rows) and lengths.max() > length:
            raise InputError(
                f"length={length} is below the longest row of {self.directory}, which has "
                f"{lengths.max()} tokens: choose length >= {lengths.max()}."
            )

    def _gather(self, rows: np.ndarray, length: int) -> Batch:
        """Copies rows ([b] int, -1 for an empty one) into arrays of [b, length]."""
        # What is read and what is predicted are two views of it, one place apart.
        ids = np.full((len(rows), length + 1), PAD_ID, np.int32)
        bos_id = self.bos_id
        is_shifted = bos_id is not None
        if bos_id is not None:
            ids[:, 0] = bos_id
        sizes = np.zeros(len(rows), np.int64)
        prompts = np.zeros(len(rows), np.int64)
        for place, row in enumerate(rows.tolist()):
            if row >= 0:
                tokens = self.tokens[self.offsets[row] : self.offsets[row + 1]]
                ids[place, is_shifted : is_shifted + len(tokens)] = tokens
                sizes[place], prompts[place] = len(tokens), self.prompt_lengths[row]
        if not is_shifted:
            sizes, prompts = np.maximum(sizes - 1, 0), np.maximum(prompts - 1, 0)
        inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
        positions = np.arange(length)
        mask = positions < sizes[:, None]
        weights = (mask & (positions >= prompts[:, None])).astype(np.float32)
        return Batch(inputs, targets, weights, mask)


def _local_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the slice of a global batch that belongs to a process."""
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index must be in [0, process_count), got {process_index} of {process_count}."
        )
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"A global batch must be a positive multiple of the processes, got {batch_size} rows "
            f"on {process_count} processes: change the batch size."
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Fills row numbers up to `size` with -1."""
    return np.concatenate([rows, np.full(size - len(rows), -1, np.int64)])
