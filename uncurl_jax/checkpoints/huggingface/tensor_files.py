"""Files of the safetensors format: checked headers, single tensors, and files written in any order.

A file is the length N of a header (8 bytes, little-endian), N bytes of JSON {tensor name: {dtype,
shape, data_offsets}, "__metadata__": {text: text}}, and the tensors' bytes, row-major and without
gaps (https://huggingface.co/docs/safetensors). Nothing of it is executed.
"""

from __future__ import annotations

import collections
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from uncurl_jax.errors import InputError

# The limit of the format's own library.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# Numpy has no bfloat16 of its own.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Written to new headers, so that readers know how tensors are laid out.
_WRITTEN_METADATA = {"format": "pt"}


class TensorInfo(NamedTuple):
    """Where a tensor is.

    Attributes:
      path: its file.
      dtype: float32, float16 or bfloat16.
      shape: as stored.
      start: byte of the file at which it begins.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads where the tensors of a file are; the tensors themselves are not read.

    Raises:
      InputError: If the file is cut off, or its header is not one, disagrees with the file's
        length, or names a type of number other than float32, float16 and bfloat16.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise _damaged(path, f"{size} bytes in all and a header of {length}")
        header = _parse(path, stream.read(length))
    begin = _LENGTH_BYTES + length
    tensors, spans = {}, []
    for name, entry in header.items():
        if name != _METADATA:
            tensors[name], span = _tensor(path, name, entry, begin)
            spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _damaged(path, f"{name} at byte {start} of the data where {end} is due")
        end = stop
    if begin + end != size:
        raise _damaged(path, f"{size} bytes where its header describes {begin + end}")
    return tensors


def _damaged(path: Path, got: str) -> InputError:
    return InputError(
        f"A safetensors file must be whole, got {path} with {got}: download or copy it again."
    )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = collections.Counter(name for name, _ in pairs)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=once)
    # RecursionError: of brackets within brackets.
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "a header that is no JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, begin: int) -> tuple[TensorInfo, tuple[int, int]]:
    """Returns a header's entry, and the bytes of the data that it says the tensor takes up."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not (_are_counts(shape) and _are_counts(span) and len(span) == 2):
        raise _damaged(path, f"{name} described as {str(entry)[:80]}")
    if dtype not in DTYPES:
        raise InputError(
            f"Tensors must be of type {', '.join(DTYPES)}, got {dtype} for {name} in {path}: "
            "quantised checkpoints are not read; take the original one."
        )
    info = TensorInfo(path, DTYPES[dtype], tuple(shape), begin + span[0])
    if span[1] - span[0] != info.num_bytes:
        raise _damaged(
            path, f"{span[1] - span[0]} bytes for {name}, {dtype} {list(shape)}, in its header"
        )
    return info, (span[0], span[1])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_tensor(info: TensorInfo, part: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a tensor, or a part of it; of the first axis only what is wanted is read.

    Raises:
      InputError: If the file has become shorter.
    """
    shape, start = info.shape, info.start
    if part:
        rows = range(*part[0].indices(shape[0]))
        start += rows.start * (info.num_bytes // shape[0])
        shape = (len(rows), *shape[1:])
    # Bytes, because numpy cannot fill an array of bfloat16 from a file.
    data = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
    with info.path.open("rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < data.nbytes:
            count = stream.readinto(data[done:].data)
            if not count:
                raise _damaged(info.path, "fewer bytes than when it was opened")
            done += count
    array = data.view(info.dtype).reshape(shape)
    return array[(slice(None), *part[1:])] if part else array


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Divides tensors, in order, into files of at most `max_bytes` each; a larger one is alone."""
    found: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if found[-1] and size + spec.num_bytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append(spec)
        size += spec.num_bytes
    return found


def create_file(path: Path, specs: Sequence[TensorSpec]) -> dict[str, TensorInfo]:
    """Makes a file whose tensors have no values yet; the disk's space is taken at once.

    Returns:
      Where each tensor is to be written.

    Raises:
      OSError: If the disk is too small.
    """
    header: dict[str, Any] = {_METADATA: _WRITTEN_METADATA}
    begin = 0
    for spec in specs:
        offsets = [begin, begin + spec.num_bytes]
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        begin = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begin at a multiple of 8, as the format's library has it.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.flush()
        os.posix_fallocate(stream.fileno(), 0, _LENGTH_BYTES + len(text) + begin)
    return read_header(path)


class TensorWriter:
    """Writes tensors of files that `create_file` made, in any order."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        """Opens files when they are first written."""
        self._tensors = tensors
        self._files: dict[Path, int] = {}

    def write(self, name: str, array: np.ndarray, part: tuple[slice, ...] = ()) -> None:
        """Writes a tensor, or a part of it; of the tensor's dtype."""
        info = self._tensors[name]
        assert array.dtype == info.dtype, name
        if part:
            # As integers, because numpy cannot map bfloat16.
            kind = np.dtype(f"u{info.dtype.itemsize}")
            place = np.memmap(info.path, kind, "r+", info.start, info.shape)
            place[part] = np.ascontiguousarray(array).view(kind)
            place.flush()
            return
        if info.path not in self._files:
            self._files[info.path] = os.open(info.path, os.O_WRONLY)
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        place = info.start
        while data:
            done = os.pwrite(self._files[info.path], data, place)
            data, place = data[done:], place + done

    def sync(self) -> None:
        """Returns when everything written is on disk."""
        for descriptor in self._files.values():
            os.fdatasync(descriptor)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
