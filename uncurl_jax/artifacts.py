"""Files that appear whole or not at all: atomic writes, hashes, refusal to overwrite."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uncurl_jax.errors import InputError

PARTIAL_SUFFIX = ".partial"


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """Returns `path` as a Path, or raises InputError if something stands there already."""
    path = Path(path)
    if path.exists():
        raise InputError(
            f"An output must not exist yet, got {path}: choose another --out or remove it first."
        )
    return path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` if the body succeeds.

    The file is flushed to disk before the rename, so a crash leaves either the old state or the
    whole new file. On an exception the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent
    )
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes files private (0600); results are shared as any other file would be.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary directory beside `path` and renames it to `path` on success.

    Raises:
      InputError: If `path` exists.
    """
    path = refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent)
    )
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: If the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"A file must exist, got nothing at {path}: check the path, or make the file first."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must hold JSON, got {error}: write it again.") from None


def append_json_line(path: str | os.PathLike[str], value: Any) -> None:
    """Appends `value` as one line of JSON with a single write.

    What a killed writer left of a line is cut off first; a file has one writer at a time.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.ftruncate(descriptor, Path(path).read_bytes().rfind(b"\n") + 1)
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: the disk took only part of a line")
    finally:
        os.close(descriptor)


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Reads the whole lines of a JSONL file; a last line cut short by a kill is left out.

    Raises:
      InputError: If a line that ends with a newline is not JSON.
    """
    path = Path(path)
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}:{number} must be a JSON object, got {error}.") from None
    return values


def sha256_of_bytes(data: bytes) -> str:
    """Returns the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Returns the SHA-256 of `value` in canonical JSON (sorted keys, no spaces)."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
