"""A Hugging Face checkpoint directory: config.json, and weights in safetensors files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uncurl_jax.artifacts import read_json
from uncurl_jax.checkpoints.huggingface.tensor_files import TensorInfo, read_header
from uncurl_jax.checkpoints.parameters import listed
from uncurl_jax.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Python objects that are executed when they are read.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclasses.dataclass(frozen=True)
class TensorDirectory:
    """What a directory holds, read from its headers; made by `open_directory`.

    Attributes:
      path: the directory.
      config: config.json.
      tensors: {name: where it is} of all files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json of a directory.

    Raises:
      InputError: If there is no such directory, or no config.json that is a JSON object.
    """
    if not path.is_dir():
        raise InputError(
            f"A Hugging Face checkpoint must be an existing directory, got {path}: download it "
            "first, and give the directory that holds config.json."
        )
    if not (path / CONFIG_FILE).is_file():
        raise InputError(
            f"A Hugging Face checkpoint directory holds {CONFIG_FILE} and safetensors files, got "
            f"{path} without {CONFIG_FILE}: give a directory that save_pretrained wrote."
        )
    config = read_json(path / CONFIG_FILE)
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG_FILE} must hold a JSON object: download it again.")
    return config


def open_directory(path: Path) -> TensorDirectory:
    """Reads config.json, the index and the headers of all files; no tensor is read.

    Raises:
      InputError: If something is missing or damaged, index and files disagree, a file's name leads
        out of the directory, or the weights are pickled.
    """
    config = read_config(path)
    # As transformers does, one file goes before many.
    if (path / WEIGHTS_FILE).is_file():
        return TensorDirectory(path, config, read_header(path / WEIGHTS_FILE))
    if not (path / INDEX_FILE).is_file():
        raise _without_weights(path)
    tensors: dict[str, TensorInfo] = {}
    by_shard: dict[str, list[str]] = {}
    for name, shard in _weight_map(path).items():
        by_shard.setdefault(shard, []).append(name)
    missing = sorted(shard for shard in by_shard if not (path / shard).is_file())
    if missing:
        raise InputError(
            f"Every file that {INDEX_FILE} names must be there, got {path} without "
            f"{listed(missing)}: download {'it' if len(missing) == 1 else 'them'}."
        )
    for shard, names in sorted(by_shard.items()):
        found = read_header(path / shard)
        different = sorted(set(names) ^ set(found))
        if different:
            raise InputError(
                f"{INDEX_FILE} and the files must agree on what is where, got {path / shard} which "
                f"differs in {listed(different, 5)}: download both again, from one revision."
            )
        tensors |= found
    return TensorDirectory(path, config, tensors)


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{path / INDEX_FILE} must hold weight_map, the file of each tensor: download it again."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InputError(
                f"{INDEX_FILE} must name files of its own directory that end in .safetensors, got "
                f"{shard!r} for {name} in {path}: do not use this directory, it is not what "
                "save_pretrained writes."
            )
    return weight_map


def _without_weights(path: Path) -> InputError:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return InputError(
            f"Weights must be safetensors, got {path} with the pickled {listed(pickled, 3)}, whose "
            "reading can run any code: load it where you trust it and save_pretrained it again."
        )
    return InputError(
        f"A Hugging Face checkpoint directory holds {WEIGHTS_FILE} or {INDEX_FILE}, got {path} "
        "with neither: download the weights too."
    )
