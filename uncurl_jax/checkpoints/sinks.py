"""What checkpoints are built in, piece by piece, and the loop that does so and can be resumed."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from uncurl_jax.checkpoints import companions, layout, pruned
from uncurl_jax.checkpoints.accounting import STEP, Accounts, Piece
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.replay import Replayed, Seconds
from uncurl_jax.checkpoints.state_writer import StateWriter, create_state, remove_unreferenced
from uncurl_jax.checkpoints.work_directory import WorkDirectory
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

FORMATS = ("uncurl", "hf")
# So that a result is never taken for a step that training went on from.
_STEP = 0


class NewCheckpoint(NamedTuple):
    """A checkpoint to be built.

    Attributes:
      source: what it is made from.
      config: its architecture.
      targets: {key: (shape, dtype)} of its arrays, the step included.
      provenance: where it comes from.
      vocabulary: the record of its tokenizer; None takes the source's.
    """

    source: layout.CheckpointPath
    config: ModelConfig
    targets: Mapping[str, layout.ArrayMetadata]
    provenance: Mapping[str, Any]
    vocabulary: Mapping[str, Any] | None = None


class Sink(abc.ABC):
    """Files of a checkpoint that is being built in one format; made by `make_sink`."""

    @abc.abstractmethod
    def create(self, directory: epath.Path) -> None:
        """Makes the files, without values."""

    @abc.abstractmethod
    def reopen(self, directory: epath.Path) -> None:
        """Goes on with files that `create` made before a kill."""

    @abc.abstractmethod
    def write(self, arrays: Mapping[str, np.ndarray], index: int | None) -> Any:
        """Starts to write arrays {key: array}, or entry `index` of each.

        Returns:
          A future whose `result()` returns when they are on disk.
        """

    @abc.abstractmethod
    def finish(self, directory: epath.Path, hashes: Mapping[str, Any]) -> None:
        """Writes what stands beside the arrays; what makes it a checkpoint comes last."""


class StateSink(Sink):
    """This package's own format."""

    def __init__(self, new: NewCheckpoint):
        """Checks what goes beside the arrays; InputError if the source lacks a vocabulary."""
        self._new = new
        self._vocabulary = new.vocabulary or new.source.vocabulary()

    @staticmethod
    def _step_directory(directory: epath.Path) -> epath.Path:
        return directory / f"{layout.CHECKPOINT_PREFIX}_{_STEP}"

    def create(self, directory: epath.Path) -> None:
        """Makes the database, and its step."""
        step_directory = self._step_directory(directory)
        create_state(step_directory, self._new.targets)
        StateWriter(step_directory).write({STEP: np.asarray(_STEP, np.int32)}).result()
        self._writer = StateWriter(step_directory)

    def reopen(self, directory: epath.Path) -> None:
        """Removes what commits that were cut short left."""
        step_directory = self._step_directory(directory)
        if not layout.is_remote(step_directory):
            remove_unreferenced(step_directory)
        self._writer = StateWriter(step_directory)

    def write(self, arrays: Mapping[str, np.ndarray], index: int | None) -> Any:
        """Writes with one atomic commit."""
        return self._writer.write(arrays, index)

    def finish(self, directory: epath.Path, hashes: Mapping[str, Any]) -> None:
        """Writes the JSON files and the companions."""
        companions.carry(self._new.source, directory)
        records = {
            layout.VOCABULARY_FILE: self._vocabulary,
            layout.PROVENANCE_FILE: self._new.provenance,
            pruned.HASHES_FILE: hashes,
            # Last, because it is the one that makes the directory a checkpoint.
            layout.MODEL_CONFIG_FILE: self._new.config.to_dict(),
        }
        for name, value in records.items():
            layout.write_json_at(directory / name, dict(value))


def make_sink(new: NewCheckpoint, file_format: str, max_shard_bytes: int | None = None) -> Sink:
    """Returns the sink of a format.

    Args:
      new: what is to be built.
      file_format: "uncurl" or "hf".
      max_shard_bytes: of "hf", the largest file; None is the sink's own.

    Raises:
      InputError: If the format is unknown, or cannot express the model.
    """
    if file_format not in FORMATS:
        raise InputError(f'--format must be "uncurl" or "hf", got {file_format!r}: choose one.')
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"--max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    if file_format == "uncurl":
        if max_shard_bytes is not None:
            raise InputError(
                f"--max_shard_bytes goes with --format hf, got {max_shard_bytes}: leave it out."
            )
        return StateSink(new)
    from uncurl_jax.checkpoints.huggingface.sink import MAX_SHARD_BYTES, HuggingFaceSink

    return HuggingFaceSink(new, max_shard_bytes or MAX_SHARD_BYTES)


def build(
    sink: Sink,
    work: WorkDirectory,
    accounts: Accounts,
    make: Callable[[Sequence[Piece]], Generator[Replayed]],
    *,
    seconds: Seconds,
    report: Callable[[int, int], None],
) -> None:
    """Makes and writes every piece that is not on disk yet.

    Args:
      sink: where to.
      work: the directory, and what of it is done.
      accounts: all pieces.
      make: pieces -> the pieces made, in order.
      seconds: gets what writing takes.
      report: called with (experts and batches of arrays done, in all).
    """
    if work.is_created:
        sink.reopen(work.result)
    else:
        sink.create(work.result)
        work.mark_created()
    total = sum(piece.size for piece in accounts.pieces)
    missing = [piece for piece in accounts.pieces if piece.name not in work.done]
    done = total - sum(piece.size for piece in missing)
    report(done, total)
    writer = _RecordingWriter(sink, work, seconds)
    pieces = make(missing)
    with contextlib.closing(pieces), contextlib.closing(writer):
        for made in pieces:
            writer.write(made)
            done += made.piece.size
            report(done, total)
    left = [piece.name for piece in accounts.pieces if piece.name not in work.done]
    assert not left, f"pieces that were not made: {left}"


class _RecordingWriter:
    """Writes pieces, each while the next is being made, and records those that are on disk."""

    def __init__(self, sink: Sink, work: WorkDirectory, seconds: Seconds):
        self._sink = sink
        self._work = work
        self._seconds = seconds
        self._unrecorded: tuple[Any, str, dict[str, Any]] | None = None

    def write(self, made: Replayed) -> None:
        with self._seconds.add("write"):
            record = {
                "hashes": {key: pruned.array_hash(array) for key, array in made.arrays.items()},
                "similarities": [list(similarity) for similarity in made.similarities],
            }
            self._record()
            future = self._sink.write(made.arrays, made.piece.cluster)
            self._unrecorded = future, made.piece.name, record

    def close(self) -> None:
        """Returns when all is on disk and recorded; also after an error nothing is under way."""
        with self._seconds.add("write"):
            self._record()

    def _record(self) -> None:
        if self._unrecorded is not None:
            future, name, record = self._unrecorded
            future.result()
            self._work.record(name, **record)
            self._unrecorded = None


def recorded_hashes(pieces: Iterable[Piece], work: WorkDirectory) -> dict[str, Any]:
    """Returns {key: hash}, for expert arrays a list with one for each expert."""
    hashes: dict[str, Any] = {STEP: pruned.array_hash(np.asarray(_STEP, np.int32))}
    for piece in pieces:
        for key, value in work.done[piece.name]["hashes"].items():
            if is_expert_array(key):
                hashes.setdefault(key, []).append(value)
            else:
                hashes[key] = value
    return hashes


def open_result(out: epath.Path, file_format: str, config: ModelConfig) -> layout.ArrayReader:
    """Opens what was built in a format."""
    if file_format == "uncurl":
        return layout.open_reader(out)
    from uncurl_jax.checkpoints.huggingface import checkpoint

    length = None if config.position_embedding == "learned" else config.max_length
    return checkpoint.HuggingFaceReader(checkpoint.resolve(out, length))


def peak_resident_bytes() -> int | None:
    """Returns the largest memory that this process has had, None where the system does not tell."""
    # Not resource.getrusage: its maximum includes what the parent had before the exec.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None
