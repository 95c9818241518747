"""A Hugging Face directory as a checkpoint: "hf:DIR" wherever a checkpoint is read.

Arrays are read from the directory itself, under the names and in the shapes that they would have in
this package's own format, so that fingerprints, statistics and plans of the two are the same.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from uncurl_jax.artifacts import sha256_of_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.accounting import STEP
from uncurl_jax.checkpoints.huggingface.directory import (
    CONFIG_FILE,
    TensorDirectory,
    open_directory,
)
from uncurl_jax.checkpoints.huggingface.families import find_family
from uncurl_jax.checkpoints.huggingface.family import Entry, Family, HfConfig
from uncurl_jax.checkpoints.huggingface.tensor_files import read_tensor
from uncurl_jax.checkpoints.parameters import (
    differences,
    expected_parameters,
    is_expert_array,
    listed,
)
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.huggingface_vocabulary import TOKENIZER_FILE, HuggingFaceVocabulary
from uncurl_jax.errors import InputError

_READS_IN_FLIGHT = 4
_TIED = "lm_head.weight"
_NO_TOKENIZER = sha256_of_json({"kind": "none"})


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint(layout.CheckpointPath):
    """A directory in the format of transformers; made by `layout.resolve("hf:DIR")`.

    Attributes:
      files: what the directory holds.
      max_length: longest sequence, below the model's own; None for that.
    """

    files: TensorDirectory = dataclasses.field(compare=False, repr=False, kw_only=True)
    max_length: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def hf_config(self) -> HfConfig:
        """config.json."""
        return HfConfig(self.files.config, f"{self.directory / CONFIG_FILE}")

    @property
    def family(self) -> Family:
        """Which models it belongs to; InputError if it is none that is known."""
        return find_family(self.hf_config)

    def model_config(self) -> ModelConfig:
        """Returns the architecture; InputError if our decoder cannot express it."""
        return self.family.to_model_config(self.hf_config, self.max_length)

    def vocabulary(self) -> dict[str, Any]:
        """Returns the record of the tokenizer, one that no token cache has if there is none.

        Raises:
          InputError: If the tokenizer has more ids than the model, or is damaged.
        """
        return dict(self._vocabulary)

    # Reading a tokenizer of 150,000 pieces takes a second.
    @functools.cached_property
    def _vocabulary(self) -> dict[str, Any]:
        size = self.hf_config.integer("vocab_size")
        if not (self.directory / TOKENIZER_FILE).exists():
            return {"name": f"no {TOKENIZER_FILE}", "spec": "", "size": size, "hash": _NO_TOKENIZER}
        vocabulary = HuggingFaceVocabulary(Path(self.directory))
        ids = [vocabulary.size - 1, vocabulary.bos_id or 0, *_end_ids(self.hf_config)]
        if max(ids) >= size or any(number >= vocabulary.size for number in ids[2:]):
            raise InputError(
                f"A tokenizer must belong to its model, got ids up to {max(ids)} in "
                f"{self.directory}, with {vocabulary.size} in {TOKENIZER_FILE} and vocab_size "
                f"{size} in {CONFIG_FILE}: download both from one revision."
            )
        return vocabulary.describe()

    def provenance(self) -> dict[str, Any]:
        """Returns where it comes from: what an export recorded, else what config.json says."""
        if (self.directory / layout.PROVENANCE_FILE).exists():
            return super().provenance()
        return {
            "created_by": "transformers",
            "model_type": self.files.config.get("model_type"),
            "config_hash": sha256_of_json(self.files.config),
        }

    def __str__(self) -> str:
        """Returns what `layout.resolve` takes."""
        return f"{layout.HUGGING_FACE_PREFIX}{os.fspath(self.directory)}"


def _end_ids(config: HfConfig) -> list[int]:
    """Returns the ids that end a text, as config.json has them."""
    value = config.get("eos_token_id", [])
    value = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in value):
        raise config.refuse("eos_token_id", "an id or a list of ids", "download the file again")
    return value


def resolve(path: str | os.PathLike[str], max_length: int | None = None) -> HuggingFaceCheckpoint:
    """Opens a directory, with or without "hf:" before it.

    Raises:
      InputError: If it is not a whole Hugging Face checkpoint.
    """
    directory = Path(os.fspath(path).removeprefix(layout.HUGGING_FACE_PREFIX)).expanduser()
    directory = directory.resolve()
    return HuggingFaceCheckpoint(
        epath.Path(directory), 0, files=open_directory(directory), max_length=max_length
    )


class HuggingFaceReader(layout.ArrayReader):
    """Reads parameters, or single experts, out of a Hugging Face directory."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint):
        """Checks that config and weights agree; InputError if not."""
        self.checkpoint = checkpoint
        self._files = checkpoint.files
        config = checkpoint.model_config()
        entries = _stored_entries(checkpoint, config)
        self._entries = {(entry.parameter, entry.expert): entry for entry in entries}
        self.metadata = self._metadata(config)

    def _metadata(self, config: ModelConfig) -> dict[str, layout.ArrayMetadata]:
        tensors = self._files.tensors
        found = {STEP: layout.ArrayMetadata((), np.dtype(np.int32))}
        dtypes: dict[str, set[np.dtype]] = {}
        for (parameter, _), entry in self._entries.items():
            dtypes.setdefault(parameter, set()).add(tensors[entry.tensor].dtype)
        for name, shape in expected_parameters(config).items():
            dtype, *others = sorted(dtypes[name], key=str)
            if others:
                raise InputError(
                    f"The experts of a layer must have one dtype, got {dtype} and {others[0]} for "
                    f"{name} in {self.checkpoint}: save it again in one."
                )
            found[f"{layout.TARGET}/{name}"] = layout.ArrayMetadata(shape, dtype)
        return found

    def identity(self) -> str:
        """Returns a hash of the files' names, sizes and times, and of config.json."""
        paths = sorted({info.path for info in self._files.tensors.values()})
        stats = [(path.name, path.stat()) for path in paths]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return sha256_of_json([files, self._files.config])

    def stream(self, requests: Iterable[tuple[str, int | None]]) -> Iterator[np.ndarray]:
        """Reads many arrays in order, a few ahead of the consumer; arguments as for `read`."""
        iterator = iter(requests)
        with concurrent.futures.ThreadPoolExecutor(1, "uncurl-read") as pool:
            pending = [
                pool.submit(self._read, *request)
                for request in itertools.islice(iterator, _READS_IN_FLIGHT)
            ]
            while pending:
                array = pending.pop(0).result()
                pending += [
                    pool.submit(self._read, *request) for request in itertools.islice(iterator, 1)
                ]
                yield array

    def _read(self, name: str, index: int | None) -> np.ndarray:
        if name not in self.metadata:
            raise self._no_such_array(name)
        if name == STEP:
            return np.zeros((), np.int32)
        parameter, shape = name.removeprefix(f"{layout.TARGET}/"), self.metadata[name].shape
        if not is_expert_array(name):
            array = self._read_entry(self._entries[parameter, None], shape)
            return array if index is None else array[index]
        if index is not None:
            return self._read_entry(self._entries[parameter, index], shape[1:])
        out = np.empty(shape, self.metadata[name].dtype)
        for expert in range(shape[0]):
            out[expert] = self._read_entry(self._entries[parameter, expert], shape[1:])
        return out

    def _read_entry(self, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
        array = read_tensor(self._files.tensors[entry.tensor], entry.part)
        array = array.swapaxes(-1, -2) if entry.is_transposed else array
        return np.ascontiguousarray(array).reshape(shape)


def _stored_entries(checkpoint: HuggingFaceCheckpoint, config: ModelConfig) -> list[Entry]:
    """Returns the entries in those names of the family that the directory's tensors have.

    Raises:
      InputError: If the tensors are not those of the configuration; lists the differences.
    """
    family = checkpoint.family
    found = {
        name: info.shape
        for name, info in checkpoint.files.tensors.items()
        if not name.endswith(family.ignored)
    }
    for name in (*family.aliases, *([_TIED] if config.has_tied_embeddings else [])):
        if name in found:
            _check_tied(checkpoint, config, name)
            del found[name]
    best: list[str] | None = None
    for entries_of in (family.entries, *family.other_entries):
        entries = list(entries_of(config))
        problems = differences(found, {entry.tensor: entry.shape for entry in entries})
        if not problems:
            return entries
        if best is None or len(problems) < len(best):
            best = problems
    assert best is not None
    raise InputError(
        f"{CONFIG_FILE} and the weights must agree, got {checkpoint.directory} with "
        f"{listed(best, 8)}: download both again, from one revision."
    )


def _check_tied(checkpoint: HuggingFaceCheckpoint, config: ModelConfig, name: str) -> None:
    """Refuses a tensor that is not the token embedding although they are one."""
    tensors = checkpoint.files.tensors
    embedding = next(
        entry.tensor
        for entry in checkpoint.family.entries(config)
        if entry.parameter == "token_embedder/embedding"
    )
    # Without it the directory is refused for that reason.
    stored = tensors.get(embedding)
    if stored is not None and not np.array_equal(
        read_tensor(tensors[name]).view(np.uint8), read_tensor(stored).view(np.uint8)
    ):
        if name != _TIED:
            raise InputError(
                f"{name} must be the token embedding, which both stacks share, got another in "
                f"{checkpoint.directory}: models with embeddings for each stack are not read."
            )
        raise InputError(
            f"tie_word_embeddings must be false where {_TIED} is not the token embedding, got true "
            f"in {checkpoint.directory / CONFIG_FILE}: correct {CONFIG_FILE}, or remove the tensor."
        )
