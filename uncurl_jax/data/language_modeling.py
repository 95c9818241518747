"""Plain text as a language-modelling task: documents, tokens, rows of one length."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import lzma
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from uncurl_jax.data.tasks import TRAIN, VALIDATION, split_file
from uncurl_jax.data.vocabulary import Vocabulary
from uncurl_jax.errors import InputError

_ENCODE_BATCH_DOCUMENTS = 256


@dataclasses.dataclass(frozen=True)
class LanguageModelingTask:
    """Text files, one per split; documents are separated by a blank line.

    Attributes:
      name: unique name.
      train_file: .txt, .txt.gz or .txt.xz file in UTF-8, relative to the data directory.
      validation_file: the same for the validation split; "" if there is none.
    """

    name: str
    train_file: str
    validation_file: str = ""

    @property
    def splits(self) -> Mapping[str, str]:
        """Split name to file."""
        files = {TRAIN: self.train_file, VALIDATION: self.validation_file}
        return {split: file for split, file in files.items() if file}

    def source_files(self, data_dir: str | Path, split: str) -> tuple[Path, ...]:
        """Returns the file of a split.

        Raises:
          InputError: If the task has no such split or the file is missing.
        """
        path = Path(data_dir) / split_file(self.name, self.splits, split)
        if not path.is_file():
            raise InputError(
                f"Task {self.name} needs the text file {path} for its {split} split, which does "
                f"not exist: check the data directory."
            )
        return (path,)

    def read_documents(self, data_dir: str | Path, split: str) -> Iterator[str]:
        """Yields the documents of a split, reading the file as a stream."""
        for path in self.source_files(data_dir, split):
            yield from read_documents(path)


def read_documents(path: str | Path) -> Iterator[str]:
    """Yields the documents of a text file: runs of lines between blank lines, joined by newlines.

    Args:
      path: UTF-8 text; a name ending in .gz or .xz is decompressed while reading.

    Raises:
      InputError: If the file is not UTF-8 text or is damaged.
    """
    path = Path(path)
    lines: list[str] = []
    try:
        with _open_text(path) as stream:
            for line in stream:
                if line.strip():
                    lines.append(line.rstrip("\r\n"))
                elif lines:
                    yield "\n".join(lines)
                    lines = []
    except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise InputError(
            f"A text file must be UTF-8, plain or whole .gz or .xz, got {path} ({error}): "
            f"convert it."
        ) from None
    if lines:
        yield "\n".join(lines)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def encode_documents(documents: Iterable[str], vocabulary: Vocabulary) -> Iterator[list[int]]:
    """Yields the ids of each document followed by the end-of-text id."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _ENCODE_BATCH_DOCUMENTS)):
        for ids in vocabulary.encode_batch(batch):
            yield [*ids, vocabulary.eos_id]


def pack(documents: Iterable[list[int]], length: int) -> Iterator[np.ndarray]:
    """Concatenates token lists and cuts the stream into rows.

    Args:
      documents: ids of each document, end of text included.
      length: tokens per row.

    Yields:
      [length] int32 rows; the last one may be shorter (but is not empty).

    Raises:
      InputError: If length < 1.
    """
    if length < 1:
        raise InputError(f"A packed row must have at least one token, got length {length}.")
    buffer: list[int] = []
    for ids in documents:
        buffer += ids
        if len(buffer) >= length:
            whole = len(buffer) // length * length
            yield from np.array(buffer[:whole], np.int32).reshape(-1, length)
            buffer = buffer[whole:]
    if buffer:
        yield np.array(buffer, np.int32)
