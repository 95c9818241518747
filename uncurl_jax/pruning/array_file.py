"""One .npz file of arrays and a JSON header with a format, a hash of the content and a manifest."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError

_HEADER = "header"


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> None:
    """Writes arrays and a header atomically; the same content gives the same bytes.

    Args:
      path: file to write.
      arrays: by name.
      header: JSON-compatible, with "format", "format_version", "hash" and "manifest".
    """
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    content: dict[str, Any] = {_HEADER: text, **arrays}
    with artifacts.atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **content)


def read_arrays(
    path: str | os.PathLike[str], *, file_format: str, version: int, name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `write_arrays` wrote.

    Args:
      path: the file.
      file_format: what its header must say.
      version: its format version.
      name: what users call such a file.

    Returns:
      The header, and the arrays by name.

    Raises:
      InputError: If the file is missing, something else, damaged or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A {name} file must exist, got {path}: run calibration first.")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        if header["format"] != file_format:
            raise ValueError(header["format"])
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile):
        raise InputError(
            f"{path} must be a whole {name} file (.npz written by calibration), got something "
            "else: run calibration again."
        ) from None
    if header.get("format_version") != version:
        raise InputError(
            f"{path} must be of format version {version}, got {header.get('format_version')}: "
            "calibrate again with this version."
        )
    return header, arrays


def check_hash(path: str | os.PathLike[str], header: Mapping[str, Any], found: str) -> None:
    """Raises InputError unless the hash of the content is the one in the header."""
    if found != header.get("hash"):
        raise InputError(
            f"{path} must match the hash stored in it, got another content: calibrate again."
        )
