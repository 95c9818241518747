"""Where a checkpoint's files are, and reading them array by array without building a model.

A checkpoint directory C holds

    C/model_config.json  C/provenance.json  C/vocabulary.json
    C/checkpoint_<step>/state/    OCDBT + zarr v2 of {target: params, state: {step, param_states}}

which is T5X's layout plus three JSON files. Arrays are named by their keys joined with "/", for
example "target/layers_0/moe/experts/wi"; the names of parameters leave out "target/".

Wherever a checkpoint is read, "hf:DIR" is a directory of Hugging Face (`huggingface.checkpoint`).
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from uncurl_jax.artifacts import write_json
from uncurl_jax.checkpoints.parameters import (
    differences,
    expected_parameters,
    is_expert_array,
    listed,
)
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

CHECKPOINT_PREFIX = "checkpoint"
STATE_ITEM = "state"
TARGET = "target"
MODEL_CONFIG_FILE = "model_config.json"
PROVENANCE_FILE = "provenance.json"
VOCABULARY_FILE = "vocabulary.json"
HUGGING_FACE_PREFIX = "hf:"
# Of a checkpoint that was imported: its config.json and tokenizer (see `companions`).
COMPANION_DIRECTORY = "huggingface"

_FINGERPRINT_ELEMENTS = 2**20
_READS_IN_FLIGHT = 4
_CACHE_BYTES = 16 * 2**20
_STEP_NAME = re.compile(rf"{CHECKPOINT_PREFIX}_(\d+)")
_UNFINISHED_NAME = re.compile(rf"{CHECKPOINT_PREFIX}_\d+\.orbax-checkpoint-tmp")

PathLike = str | os.PathLike[str]


class ArrayMetadata(NamedTuple):
    """Shape and dtype of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class CheckpointPath:
    """One finished step of a checkpoint directory; made by `resolve`.

    Attributes:
      directory: C, which holds the JSON files and the steps.
      step: number of the step.
    """

    directory: epath.Path
    step: int

    @property
    def step_directory(self) -> epath.Path:
        """C/checkpoint_<step>."""
        return self.directory / f"{CHECKPOINT_PREFIX}_{self.step}"

    @property
    def state_dir(self) -> epath.Path:
        """C/checkpoint_<step>/state, the directory of arrays."""
        return self.step_directory / STATE_ITEM

    def model_config(self) -> ModelConfig:
        """Returns the architecture; InputError if it is of another version of this package."""
        return ModelConfig.from_dict(read_json_at(self.directory / MODEL_CONFIG_FILE))

    def provenance(self) -> dict[str, Any]:
        """Returns where the checkpoint comes from; InputError if the file is missing."""
        return read_json_at(self.directory / PROVENANCE_FILE)

    def vocabulary(self) -> dict[str, Any]:
        """Returns {name, spec, size, hash}; InputError if the file is missing.

        The spec of an imported checkpoint is the tokenizer that it carries, wherever it is.
        """
        record = read_json_at(self.directory / VOCABULARY_FILE)
        carried = self.directory / COMPANION_DIRECTORY
        if (carried / "tokenizer.json").exists():
            record["spec"] = os.fspath(carried)
        return record

    def __str__(self) -> str:
        """Returns the path of the step's directory."""
        return os.fspath(self.step_directory)


def read_json_at(path: epath.Path) -> Any:
    """Reads a local or gs:// JSON file.

    Raises:
      InputError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"A checkpoint directory needs {path.name}, got none at {path}: give a directory that "
            "this package wrote, or add the file."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must hold JSON, got {error}: write it again.") from None


def write_json_at(path: epath.Path, value: Any) -> None:
    """Writes JSON that appears whole or not at all, locally or at gs:// (objects are atomic)."""
    if is_remote(path):
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    else:
        write_json(path, value)


def is_remote(path: PathLike) -> bool:
    """Whether `path` names an object store (gs://...) instead of a file system."""
    return "://" in os.fspath(path)


def step_of(path: PathLike) -> int | None:
    """Returns the number in the name of a `checkpoint_<step>` directory, None for other names."""
    match = _STEP_NAME.fullmatch(epath.Path(path).name)
    return None if match is None else int(match[1])


def finished_steps(directory: PathLike) -> list[int]:
    """Returns the steps of a checkpoint directory that were saved to the end, rising."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    steps = sorted(int(match[1]) for match in matches if match)
    return [step for step in steps if _is_finished(directory / f"{CHECKPOINT_PREFIX}_{step}")]


def unfinished_directories(directory: PathLike) -> list[epath.Path]:
    """Returns what saves that were killed left in a checkpoint directory; never finished steps."""
    directory = epath.Path(directory)
    if is_remote(directory):
        steps = [entry for entry in directory.iterdir() if _STEP_NAME.fullmatch(entry.name)]
        return [entry for entry in steps if not (entry / "commit_success.txt").exists()]
    return [entry for entry in directory.iterdir() if _UNFINISHED_NAME.match(entry.name)]


def _is_finished(step_directory: epath.Path) -> bool:
    # Locally a step gets its name by one rename when everything is in it. An object store has no
    # rename: there Orbax writes in place and adds commit_success.txt last.
    needed = [f"{STATE_ITEM}/_METADATA", f"{STATE_ITEM}/manifest.ocdbt"]
    if is_remote(step_directory):
        needed.append("commit_success.txt")
    return all((step_directory / name).exists() for name in needed)


def resolve(path: PathLike | CheckpointPath) -> CheckpointPath:
    """Finds the checkpoint that a user means.

    Args:
      path: a checkpoint directory (its latest finished step is taken) or one of its
        `checkpoint_<step>` directories; local or gs://. Or "hf:DIR".

    Raises:
      InputError: If nothing is there, if it was not written by this package, or if the step (or
        every step) was not saved to the end.
    """
    if isinstance(path, CheckpointPath):
        return path
    if os.fspath(path).startswith(HUGGING_FACE_PREFIX):
        from uncurl_jax.checkpoints.huggingface import checkpoint

        return checkpoint.resolve(path)
    path = epath.Path(path)
    if not path.is_dir():
        raise InputError(f"A checkpoint must be an existing directory, got {path}: check the path.")
    if not is_remote(path):
        path = path.resolve()
    match = _STEP_NAME.fullmatch(path.name)
    # A directory of checkpoints may itself be named checkpoint_<n>; its model_config.json tells.
    is_step = match is not None and not (path / MODEL_CONFIG_FILE).exists()
    directory = path.parent if is_step else path
    if not (directory / MODEL_CONFIG_FILE).exists():
        raise InputError(
            f"A checkpoint directory holds {MODEL_CONFIG_FILE} and checkpoint_<step> directories, "
            f"got {path} without {MODEL_CONFIG_FILE}: give a directory that this package wrote."
        )
    if match is not None and is_step:
        if not _is_finished(path):
            raise InputError(
                f"A checkpoint must have been saved to the end, got {path} which was not: use "
                f"another step (finished: {finished_steps(directory)})."
            )
        return CheckpointPath(directory, int(match[1]))
    steps = finished_steps(directory)
    if not steps:
        raise InputError(
            f"A checkpoint directory must hold a step that was saved to the end, got {path} with "
            "none: train again or give another directory."
        )
    return CheckpointPath(directory, steps[-1])


class ArrayReader(abc.ABC):
    """Reads single arrays, or single experts, of a checkpoint; made by `open_reader`.

    Attributes:
      checkpoint: what is read.
      metadata: {name: (shape, dtype)} of all arrays.
    """

    checkpoint: CheckpointPath
    metadata: dict[str, ArrayMetadata]

    def parameters(self) -> dict[str, ArrayMetadata]:
        """Returns {name without "target/": (shape, dtype)} of the parameters, sorted by name."""
        prefix = f"{TARGET}/"
        return {
            name.removeprefix(prefix): entry
            for name, entry in self.metadata.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Reads one array, or its part `index` along the first axis.

        Raises:
          InputError: If there is no such array, or the files are damaged.
        """
        return next(iter(self.stream([(name, index)])))

    @abc.abstractmethod
    def stream(self, requests: Iterable[tuple[str, int | None]]) -> Iterator[np.ndarray]:
        """Reads many arrays in order, a few ahead of the consumer; arguments as for `read`."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Returns a hash that differs between two saves, whatever the arrays; cheap."""

    def _no_such_array(self, name: str) -> InputError:
        return InputError(
            f"An array must be one of the checkpoint's, got {name!r} for {self.checkpoint}: "
            f"it holds {len(self.metadata)} arrays such as {list(self.metadata)[:3]}."
        )


def open_reader(path: PathLike | CheckpointPath | ArrayReader) -> ArrayReader:
    """Opens a checkpoint of either format; InputError as in `resolve`, or if it is damaged."""
    if isinstance(path, ArrayReader):
        return path
    checkpoint = resolve(path)
    if str(checkpoint).startswith(HUGGING_FACE_PREFIX):
        from uncurl_jax.checkpoints.huggingface.checkpoint import (
            HuggingFaceCheckpoint,
            HuggingFaceReader,
        )

        assert isinstance(checkpoint, HuggingFaceCheckpoint)
        return HuggingFaceReader(checkpoint)
    return StateReader(checkpoint)


class StateReader(ArrayReader):
    """Reads a checkpoint of this package's format through tensorstore."""

    def __init__(self, path: PathLike | CheckpointPath):
        """Opens the checkpoint; InputError as in `resolve`, or if it is not OCDBT + zarr v2."""
        self.checkpoint = resolve(path)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        state_dir = os.fspath(self.checkpoint.state_dir)
        base = state_dir if is_remote(state_dir) else f"file://{state_dir}"
        self._kvstore = {"driver": "ocdbt", "base": f"{base.rstrip('/')}/"}
        self._keys = self._stored_keys()
        self.metadata = self._read_metadata()

    def _stored_keys(self) -> dict[str, str]:
        """Maps "a/b/c" to the name in the store, "a.b.c", for every array (not empty dicts)."""
        entries = read_json_at(self.checkpoint.state_dir / "_METADATA").get("tree_metadata", {})
        keys = {}
        for entry in entries.values():
            if not entry["value_metadata"].get("skip_deserialize", False):
                parts = [str(part["key"]) for part in entry["key_metadata"]]
                keys["/".join(parts)] = ".".join(parts)
        return dict(sorted(keys.items()))

    def _read_metadata(self) -> dict[str, ArrayMetadata]:
        opened = ts.KvStore.open(self._kvstore, context=self._context)
        store = self._result(opened, "manifest.ocdbt")
        futures = {name: store.read(f"{key}/.zarray") for name, key in self._keys.items()}
        metadata = {}
        for name, future in futures.items():
            result = self._result(future, name)
            if result.state != "value":
                raise InputError(
                    f"Arrays must be stored as OCDBT + zarr v2, got {self.checkpoint} without a "
                    f"zarr v2 entry for {name}: save it again with this package."
                )
            header = json.loads(result.value)
            metadata[name] = ArrayMetadata(tuple(header["shape"]), _numpy_dtype(header["dtype"]))
        return metadata

    def identity(self) -> str:
        """Returns the hash of the database's manifest."""
        manifest = (self.checkpoint.state_dir / "manifest.ocdbt").read_bytes()
        return hashlib.sha256(manifest).hexdigest()

    def stream(self, requests: Iterable[tuple[str, int | None]]) -> Iterator[np.ndarray]:
        """Reads many arrays in order, a few ahead of the consumer; arguments as for `read`."""
        iterator = iter(requests)
        pending = collections.deque(
            self._start_read(*request) for request in itertools.islice(iterator, _READS_IN_FLIGHT)
        )
        while pending:
            name, future = pending.popleft()
            array = np.asarray(self._result(future, name))
            # Before `yield`, so that the disk works while the consumer does.
            pending.extend(self._start_read(*request) for request in itertools.islice(iterator, 1))
            yield array

    def _start_read(self, name: str, index: int | None) -> tuple[str, Any]:
        if name not in self._keys:
            raise self._no_such_array(name)
        spec = {"driver": "zarr", "kvstore": {**self._kvstore, "path": f"{self._keys[name]}/"}}
        array = self._result(ts.open(spec, open=True, read=True, context=self._context), name)
        return name, (array if index is None else array[index]).read()

    def _result(self, future: Any, name: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise InputError(
                f"Every array of a checkpoint must be readable, got {name} of {self.checkpoint} "
                f"with {str(error).splitlines()[0]}: copy it again."
            ) from error


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ts.dtype(name).numpy_dtype) if name.isalnum() else np.dtype(name)


def array_metadata(path: PathLike | CheckpointPath) -> dict[str, ArrayMetadata]:
    """Returns {name: (shape, dtype)} of all arrays, without reading any of them."""
    return open_reader(path).metadata


def read_array(path: PathLike | CheckpointPath, name: str, index: int | None = None) -> np.ndarray:
    """Reads the array `name` ("target/..."), or only its expert `index`."""
    return open_reader(path).read(name, index)


def fingerprint(path: PathLike | CheckpointPath | ArrayReader) -> str:
    """Identifies a checkpoint's parameters at the cost of a small part of its bytes.

    SHA-256 over the names, shapes and dtypes of all parameters, the bytes of every parameter of
    at most 2**20 elements, and expert 0 of each larger expert array. The step, the optimizer's
    state and the JSON files do not count. Two checkpoints that differ in nothing but a large
    dense matrix, or in experts other than the first, get the same value; steps of a training
    run do not, because norms, biases and routers differ too.
    """
    reader = open_reader(path)
    parameters = reader.parameters()
    digest = hashlib.sha256()
    for name, (shape, dtype) in parameters.items():
        digest.update(json.dumps([name, shape, dtype.name]).encode())
    requests: list[tuple[str, int | None]] = []
    for name, (shape, _) in parameters.items():
        if np.prod(shape, dtype=np.int64) <= _FINGERPRINT_ELEMENTS:
            requests.append((f"{TARGET}/{name}", None))
        elif is_expert_array(name):
            requests.append((f"{TARGET}/{name}", 0))
    for array in reader.stream(requests):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def check_architecture(
    path: PathLike | CheckpointPath | ArrayReader, model_config: ModelConfig
) -> None:
    """Checks that a checkpoint holds the parameters of a model, each with its shape, and no other.

    Raises:
      InputError: If not; lists the missing, the unknown and the misshapen parameters.
    """
    reader = open_reader(path)
    stored = {name: entry.shape for name, entry in reader.parameters().items()}
    expected = expected_parameters(model_config)
    problems = differences(stored, expected)
    if problems:
        raise InputError(
            f"A checkpoint must hold the parameters of its architecture, got {reader.checkpoint} "
            f"with {listed(problems)}: use the model configuration that it was trained with."
        )
