"""Writing token caches: rows of tokens, one file per column, and a manifest.

A cache directory holds one split:

| file | content |
|---|---|
| manifest.json | what it is: task, split, kind, vocabulary, counts, metrics, sources, hashes |
| tokens.npy | [token] uint16 or int32, all rows end to end |
| offsets.npy | [row + 1] int64, row r is tokens[offsets[r]:offsets[r + 1]] |
| prompt_lengths.npy | [row] int32, tokens of the prompt, which carry no loss |
| example.npy, option.npy | [row] int32, place of the example in examples.jsonl, its option |
| is_target.npy | [row] bool, whether the option is a right one |
| examples.jsonl | one example per line: prompt, options, label, targets, group |
"""

from __future__ import annotations

import array
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data.tasks import Example
from uncurl_jax.data.vocabulary import PAD_ID, Vocabulary
from uncurl_jax.errors import InputError

FORMAT = "uncurl_jax token cache"
FORMAT_VERSION = 1
RANK_CLASSIFICATION = "rank_classification"
LANGUAGE_MODELING = "language_modeling"
TEXT_TO_TEXT = "text_to_text"

COLUMNS: dict[str, type[np.generic]] = {
    "offsets": np.int64,
    "prompt_lengths": np.int32,
    "example": np.int32,
    "option": np.int32,
    "is_target": np.bool_,
}
_TYPE_CODES = {np.int64: "q", np.int32: "i", np.bool_: "b"}


class EncodedExample(NamedTuple):
    """An example as token ids; every option follows the same prompt.

    Attributes:
      prompt: ids of the prompt, shortened from the left.
      options: ids of each option, end of text included.
      num_dropped: ids that the prompt lost.
    """

    prompt: list[int]
    options: list[list[int]]
    num_dropped: int


def encode_example(example: Example, vocabulary: Vocabulary, max_length: int) -> EncodedExample:
    """Encodes prompt and options apart and fits the longest row into `max_length`.

    All options of an example keep the same prompt, so that their scores can be compared: the
    prompt loses as many ids from the left as the longest option needs.

    Args:
      example: a prompt and at least one option.
      vocabulary: encodes the prompt, and each option as text after a space.
      max_length: most ids of prompt, option and end of text together.

    Raises:
      InputError: If there is no option, or one does not fit into `max_length` by itself; or if the
        prompt is empty although nothing else stands before the options.
    """
    if not example.options:
        raise InputError(
            f"An example needs at least one option, got none for example {example.idx}."
        )
    options = [
        [*vocabulary.encode_after_space(text), vocabulary.eos_id] for text in example.options
    ]
    longest = max(len(ids) for ids in options)
    # Without a BOS the last token of the prompt is what the first one of an option follows.
    least = 1 if vocabulary.bos_id is None else 0
    if longest + least > max_length:
        raise InputError(
            f"An option and its end of text must fit into max_length={max_length}, got {longest} "
            f"tokens in example {example.idx}: raise max_length."
        )
    prompt = vocabulary.encode(example.prompt)
    if len(prompt) < least:
        raise InputError(
            f"A prompt must have a token where {vocabulary.name} begins no row by itself, got an "
            f"empty prompt in example {example.idx}: give it a text."
        )
    num_dropped = max(len(prompt) + longest - max_length, 0)
    return EncodedExample(prompt[num_dropped:], options, num_dropped)


class CacheWriter:
    """Writes one split as a stream; memory is a few bytes per row."""

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        """Opens the files in `directory`, which is created."""
        self._directory = directory
        self.vocabulary = vocabulary
        self._dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
        self._columns = {name: array.array(_TYPE_CODES[kind]) for name, kind in COLUMNS.items()}
        self._columns["offsets"].append(0)
        self._max_row_length = 0
        self._max_options = 0
        self.num_examples = 0
        self.num_truncated_rows = 0
        directory.mkdir(parents=True)
        self._raw_path = directory / "tokens.raw"
        self._raw = self._raw_path.open("wb")
        self._examples = (directory / "examples.jsonl").open("w", encoding="utf-8")

    @property
    def num_rows(self) -> int:
        """Rows written so far."""
        return len(self._columns["option"])

    def add_row(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        prompt_length: int = 0,
        example: int,
        option: int = 0,
        is_target: bool = True,
    ) -> None:
        """Writes one row.

        Raises:
          InputError: If the row is empty or an id lies outside the vocabulary.
        """
        ids = np.asarray(tokens, np.int64)
        if not len(ids) or ids.min() < 0 or ids.max() >= self.vocabulary.size:
            got = f"ids {ids.min()}..{ids.max()}" if len(ids) else "an empty row"
            raise InputError(
                f"Row {self.num_rows} must hold ids of {self.vocabulary.name} (0.."
                f"{self.vocabulary.size - 1}), got {got}: check the vocabulary of the task."
            )
        self._raw.write(ids.astype(self._dtype).tobytes())
        columns = self._columns
        columns["offsets"].append(columns["offsets"][-1] + len(ids))
        columns["prompt_lengths"].append(prompt_length)
        columns["example"].append(example)
        columns["option"].append(option)
        columns["is_target"].append(is_target)
        self._max_row_length = max(self._max_row_length, len(ids))

    def add_example(self, example: Example, encoded: EncodedExample) -> None:
        """Writes an example and a row for each of its options."""
        correct = example.correct_options
        for option, ids in enumerate(encoded.options):
            self.add_row(
                [*encoded.prompt, *ids],
                prompt_length=len(encoded.prompt),
                example=self.num_examples,
                option=option,
                is_target=option in correct,
            )
        self._examples.write(json.dumps(example.to_dict(), ensure_ascii=False) + "\n")
        self._max_options = max(self._max_options, len(encoded.options))
        self.num_examples += 1
        if encoded.num_dropped:
            self.num_truncated_rows += len(encoded.options)

    def close(self) -> None:
        """Closes the files; `finish` does so too."""
        self._raw.close()
        self._examples.close()

    def finish(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Writes the columns and the manifest.

        Args:
          fields: task, split, kind, max_length, metrics, primary_metric and sources.

        Returns:
          The manifest.

        Raises:
          InputError: If no row was written.
        """
        self.close()
        if not self.num_rows:
            raise InputError(
                f"A split must give at least one row, got none from {fields['split']} of "
                f"{fields['task']}: check its files and max_length={fields['max_length']}."
            )
        num_tokens = self._columns["offsets"][-1]
        _write_flat_array(self._directory / "tokens.npy", self._raw_path, self._dtype, num_tokens)
        for name, kind in COLUMNS.items():
            column = np.array(self._columns[name]).astype(kind)
            np.save(self._directory / f"{name}.npy", column, allow_pickle=False)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **fields,
            "vocabulary": self.vocabulary.describe(),
            # Left out where it is padding, as in caches of earlier versions.
            **({} if self.vocabulary.bos_id == PAD_ID else {"bos_id": self.vocabulary.bos_id}),
            "rows": self.num_rows,
            "target_rows": sum(self._columns["is_target"]),
            "examples": self.num_examples,
            "tokens": num_tokens,
            "truncated_rows": self.num_truncated_rows,
            "max_row_length": self._max_row_length,
            "max_options": self._max_options or 1,
            "files": {
                path.name: artifacts.sha256_of_file(path)
                for path in sorted(self._directory.iterdir())
            },
        }
        manifest["hash"] = manifest_hash(manifest)
        artifacts.write_json(self._directory / "manifest.json", manifest)
        return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's content, which names every file by its hash.

    Where things lie (vocabulary spec, source file names) does not count.
    """
    content = {key: value for key, value in manifest.items() if key != "hash"}
    content["vocabulary"] = manifest["vocabulary"]["hash"]
    content["sources"] = [source["sha256"] for source in manifest["sources"]]
    return artifacts.sha256_of_json(content)


def describe_sources(paths: Sequence[Path], data_dir: str | Path) -> list[dict[str, Any]]:
    """Returns {"file", "bytes", "sha256"} of each source file, relative to `data_dir`."""
    sources = []
    for path in paths:
        inside = path.is_relative_to(data_dir)
        name = path.relative_to(data_dir).as_posix() if inside else path.name
        digest = artifacts.sha256_of_file(path)
        sources.append({"file": name, "bytes": path.stat().st_size, "sha256": digest})
    return sources


def _write_flat_array(path: Path, raw: Path, dtype: np.dtype, size: int) -> None:
    """Puts a .npy header before raw data and removes the raw file."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (size,),
    }
    with path.open("wb") as stream, raw.open("rb") as data:
        np.lib.format.write_array_header_1_0(stream, header)
        shutil.copyfileobj(data, stream, 1 << 20)
    raw.unlink()
