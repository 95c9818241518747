"""Where a prune or a conversion builds its result, so that a killed one goes on where it stopped.

    .<out>.<key>.partial/
        lock            held while a process works here
        journal.jsonl   first what is built, then one line for each piece that is on disk
        checkpoint/     the result; renamed to <out> when it is whole

An object store has no rename and no locks: there the result is built in place, is not resumed, and
its model_config.json, without which no checkpoint resolves, is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from uncurl_jax.artifacts import (
    PARTIAL_SUFFIX,
    append_json_line,
    read_json_lines,
    refuse_existing,
)
from uncurl_jax.checkpoints import layout
from uncurl_jax.errors import InputError

_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_RESULT = "checkpoint"
_CREATED = "created"


class WorkDirectory:
    """The result while it is being built; made by `open_work_directory`.

    Attributes:
      result: directory to fill.
      is_created: whether `mark_created` was called, now or before a kill.
      done: {name: record} of the pieces that are on disk.
    """

    def __init__(self, result: epath.Path, journal: Path | None, lines: list[dict[str, Any]]):
        self.result = result
        self.is_created = any(line.get(_CREATED) for line in lines)
        self.done = {line["piece"]: line for line in lines if "piece" in line}
        self._journal = journal

    def mark_created(self) -> None:
        """Records that the files without values are on disk."""
        self._append({_CREATED: True})
        self.is_created = True

    def record(self, piece: str, **values: Any) -> None:
        """Records that a piece is on disk, with what a later run needs to know of it."""
        self.done[piece] = {"piece": piece, **values}
        self._append(self.done[piece])

    def _append(self, line: dict[str, Any]) -> None:
        if self._journal is not None:
            append_json_line(self._journal, line)


@contextlib.contextmanager
def open_work_directory(
    out: epath.Path, header: Mapping[str, Any], *, key: str, work_name: str = "prune"
) -> Iterator[WorkDirectory]:
    """Yields the directory to build `out` in, and gives it its name when the body succeeds.

    After a kill, or an error of the environment (a full disk), what has been built stays and the
    next call with the same header goes on with it. After an InputError nothing stays.

    Args:
      out: the result's place; must not exist.
      header: JSON-compatible; what decides the result.
      key: hash of what the user decided, as a plan's.
      work_name: what is done, for messages.

    Raises:
      InputError: If `out` exists, another process is building it, or what a killed prune left is
        of another plan or source.
    """
    if layout.is_remote(out):
        out.mkdir(parents=True)
        yield WorkDirectory(out, None, [])
        return
    place = Path(out)
    work = place.parent / f".{place.name}.{key[:12]}{PARTIAL_SUFFIX}"
    _refuse_others(place, work, work_name)
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"One process at a time may {work_name} to {place}, got another one at work in "
                f"{work}: wait for it."
            ) from None
        journal = work / _JOURNAL
        if not (work / _RESULT).exists():
            journal.unlink(missing_ok=True)
        lines = read_json_lines(journal) if journal.exists() else []
        if not lines:
            append_json_line(journal, dict(header))
        elif lines[0] != header:
            raise InputError(_other_header(work, lines[0], header, work_name))
        directory = WorkDirectory(epath.Path(work / _RESULT), journal, lines[1:])
        if not directory.is_created:
            shutil.rmtree(work / _RESULT, ignore_errors=True)
            (work / _RESULT).mkdir()
        try:
            yield directory
            refuse_existing(place)
        except InputError:
            shutil.rmtree(work)
            raise
        (work / _RESULT).rename(place)
        shutil.rmtree(work)


def _refuse_others(place: Path, work: Path, work_name: str) -> None:
    if not place.parent.is_dir():
        return
    for entry in place.parent.iterdir():
        if (
            entry != work
            and entry.name.startswith(f".{place.name}.")
            and entry.name.endswith(PARTIAL_SUFFIX)
            # A kill after the last rename leaves a directory without a result.
            and (entry / _RESULT).exists()
        ):
            raise InputError(
                f"An interrupted {work_name} goes on with the plan and options it began with, got "
                f"a plan other than that of {entry}: give the same again, or remove that directory."
            )


def _other_header(
    work: Path, found: Mapping[str, Any], header: Mapping[str, Any], work_name: str
) -> str:
    names = sorted(n for n in found.keys() | header.keys() if found.get(n) != header.get(n))
    return (
        f"An interrupted {work_name} goes on with the source and packages it began with, got "
        f"another {', '.join(names)} than {work}: give the same again, or remove that directory."
    )
