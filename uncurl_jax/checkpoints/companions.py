"""Files of a Hugging Face checkpoint beside its weights, which follow it through every step.

A checkpoint C of this package that was imported holds them in C/huggingface; pruning and training
copy them, so that an export writes config.json and the tokenizer back.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from uncurl_jax.checkpoints import layout

# What a tokenizer, a configuration or a licence is made of. Python files are never copied.
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
)
_MODEL_CONFIG = "config.json"


def companion_files(checkpoint: layout.CheckpointPath) -> dict[str, epath.Path]:
    """Returns {name: path} of the files that belong to a checkpoint; empty for our own models."""
    is_hugging_face = str(checkpoint).startswith(layout.HUGGING_FACE_PREFIX)
    directory = checkpoint.directory
    if not is_hugging_face:
        directory = directory / layout.COMPANION_DIRECTORY
        if not directory.is_dir():
            return {}
    return {
        path.name: path
        for path in sorted(directory.iterdir(), key=os.fspath)
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _PATTERNS)
    }


def original_config(checkpoint: layout.CheckpointPath) -> Mapping[str, Any] | None:
    """Returns the config.json that a checkpoint was imported with, None for our own models."""
    path = companion_files(checkpoint).get(_MODEL_CONFIG)
    return None if path is None else layout.read_json_at(path)


def carry(checkpoint: layout.CheckpointPath, directory: layout.PathLike) -> None:
    """Copies the files of a checkpoint into another checkpoint of this package."""
    copy(checkpoint, epath.Path(directory) / layout.COMPANION_DIRECTORY)


def copy(
    checkpoint: layout.CheckpointPath, directory: epath.Path, leave_out: tuple[str, ...] = ()
) -> None:
    """Copies the files of a checkpoint into a directory, which is made if there are any."""
    for name, path in companion_files(checkpoint).items():
        if name not in leave_out:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(path.read_bytes())
