"""Checkpoints that go into one artifact, and the weights that they share."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from uncurl_jax.artifacts import sha256_of_bytes
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.export.programs import EXPERT_MAP, SCALE_SUFFIX
from uncurl_jax.export.quantization import quantize
from uncurl_jax.export.tensor_file import MemoryWriter, TensorWriter
from uncurl_jax.models.expert_mlp import KERNELS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What the model computes with in float32, whatever its compute dtype.
_FLOAT32 = re.compile(r"(^|/)\w*norm/(scale|bias)$|/(router|shared_gate)/kernel$")

# As long as the longest sequence that is served.
POSITIONS = "position_embedder/embedding"

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint to export.

    Attributes:
      name: of the model in the artifact.
      reader: of the checkpoint.
      config: the model as it is served: without capacity limits, in the dtype of the artifact.
    """

    name: str
    reader: layout.ArrayReader
    config: ModelConfig

    @property
    def checkpoint(self) -> layout.CheckpointPath:
        """Where it lies."""
        return self.reader.checkpoint


def open_sources(
    checkpoints: Mapping[str, layout.PathLike],
    *,
    dtype: str | None = None,
    max_length: int | None = None,
) -> list[Source]:
    """Opens checkpoints that may share an artifact.

    Args:
      checkpoints: {name: path}.
      dtype: compute dtype of the models when they are served; their own by default.
      max_length: most tokens of a prompt and its continuation; the models' own by default.

    Raises:
      InputError: If a name cannot be a file's, a checkpoint does not resolve, or architectures
        (other than numbers of experts) or vocabularies differ.
    """
    sources = []
    for name, path in checkpoints.items():
        if not _NAME.fullmatch(name):
            raise InputError(
                f"A model's name must be of letters, digits, _, . and -, got {name!r}: choose "
                "another."
            )
        reader = layout.open_reader(path)
        config = reader.checkpoint.model_config()
        layout.check_architecture(reader, config)
        sources.append(Source(name, reader, _served(config, dtype, max_length)))
    _check_alike(sources)
    return sources


def _served(config: ModelConfig, dtype: str | None, max_length: int | None) -> ModelConfig:
    if config.has_encoder:
        raise InputError(
            "An exported model must be a decoder, got one with an encoder: export it with "
            "--format hf."
        )
    if max_length is not None and not 1 <= max_length <= config.max_length:
        raise InputError(
            f"max_length must lie between 1 and the model's {config.max_length}, got {max_length}."
        )
    return dataclasses.replace(
        config,
        dtype=dtype or config.dtype,
        max_length=max_length or config.max_length,
        eval_capacity_factor=None,
    )


def _check_alike(sources: Sequence[Source]) -> None:
    def base(source: Source) -> ModelConfig:
        return source.config.with_experts(source.config.num_selected_experts)

    first = sources[0]
    for source in sources[1:]:
        if base(source) != base(first):
            raise InputError(
                "Models of one artifact must differ in nothing but their experts, got other "
                f"architectures in {first.checkpoint} and {source.checkpoint}: export them apart."
            )
        hashes = [each.checkpoint.vocabulary()["hash"] for each in (first, source)]
        if hashes[0] != hashes[1]:
            raise InputError(
                "Models of one artifact must have one vocabulary, got others in "
                f"{first.checkpoint} and {source.checkpoint}: export them apart."
            )


@dataclasses.dataclass(frozen=True)
class SharedWeights:
    """Where the weights of models are, after `write_weights`.

    Attributes:
      tensors: {model: {parameter path: tensor}}.
      expert_maps: {model: {layer: place in the pool of each router column}}.
      pools: experts of each layer's pool, 0 for a dense layer.
      num_bytes: of all tensors.
      num_shared_bytes: what the models would take more if they shared nothing.
    """

    tensors: dict[str, dict[str, str]]
    expert_maps: dict[str, dict[int, list[int]]]
    pools: tuple[int, ...]
    num_bytes: int
    num_shared_bytes: int


def write_weights(
    sources: Sequence[Source],
    writer: TensorWriter | MemoryWriter,
    *,
    quantization: str | None = None,
    progress: Progress = lambda _: None,
) -> SharedWeights:
    """Writes equal arrays once, and of each layer the different experts of all models as one array.

    Arrays have the dtype that the model computes with, so nothing is lost by that: float32 for
    routers and norms, the compute dtype for the others.

    Args:
      sources: of one architecture.
      writer: takes the tensors; memory is that of its file and of one array.
      quantization: "int8" for the experts' kernels, None for none.
      progress: called with the name of each parameter that is done.

    Raises:
      InputError: If a parameter is not finite.
    """
    tensors: dict[str, dict[str, str]] = {source.name: {} for source in sources}
    maps: dict[str, dict[int, list[int]]] = {source.name: {} for source in sources}
    written: dict[str, str] = {}
    total = 0
    for path in _dense_paths(sources[0]):
        for source in sources:
            array = read_parameter(source, path)
            total += array.nbytes
            digest = sha256_of_bytes(f"{array.shape} {array.dtype} ".encode() + array.tobytes())
            if digest not in written:
                written[digest] = path if path not in writer.shapes else f"{source.name}:{path}"
                writer.add(written[digest], array)
            tensors[source.name][path] = written[digest]
        progress(path)
    pools = []
    for layer, count in enumerate(sources[0].config.num_experts):
        if not count:
            pools.append(0)
            continue
        pool = _pool(sources, layer)
        pools.append(len(pool.members))
        names, num_bytes = _write_pool(pool, layer, writer, quantization, progress)
        per_expert = num_bytes // len(pool.members)
        for source in sources:
            row = source.config.expert_map[layer] if source.config.expert_map else None
            places = pool.places[source.name]
            column = places if row is None else [places[expert] for expert in row]
            map_name = f"{source.name}:layers_{layer}/{EXPERT_MAP}"
            writer.add(map_name, np.asarray(column, np.int32))
            maps[source.name][layer] = column
            tensors[source.name] |= {name: name for name in names}
            tensors[source.name][f"layers_{layer}/{EXPERT_MAP}"] = map_name
            total += per_expert * len(places) + 4 * len(column)
    writer.flush()
    return SharedWeights(tensors, maps, tuple(pools), writer.num_bytes, total - writer.num_bytes)


def _dense_paths(source: Source) -> list[str]:
    return [path for path in source.reader.parameters() if not is_expert_array(path)]


def stored_dtype(path: str, config: ModelConfig) -> np.dtype:
    """Returns the dtype that the model computes with a parameter in."""
    is_wide = config.dtype == "float32" or _FLOAT32.search(path)
    return np.dtype(np.float32) if is_wide else np.dtype(ml_dtypes.bfloat16)


def read_parameter(source: Source, path: str, expert: int | None = None) -> np.ndarray:
    """Reads a parameter, or one expert of it, in the dtype and length that are served.

    Raises:
      InputError: If a value is not finite.
    """
    array = source.reader.read(f"{layout.TARGET}/{path}", expert)
    if not np.isfinite(array).all():
        check_finite(source.reader)
    if path == POSITIONS:
        array = array[: source.config.max_length]
    return array.astype(stored_dtype(path, source.config))


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The different experts of a layer: members (source, expert), and {model: [place]}."""

    members: list[tuple[Source, int]]
    places: dict[str, list[int]]


def _expert_paths(source: Source, layer: int) -> list[str]:
    prefix = f"layers_{layer}/moe/experts/"
    return [path for path in source.reader.parameters() if path.startswith(prefix)]


def _pool(sources: Sequence[Source], layer: int) -> _Pool:
    members: list[tuple[Source, int]] = []
    places: dict[str, list[int]] = {}
    known: dict[str, int] = {}
    for source in sources:
        paths = _expert_paths(source, layer)
        row = places[source.name] = []
        for expert in range(source.config.num_experts[layer]):
            parts = [read_parameter(source, path, expert).tobytes() for path in paths]
            digest = sha256_of_bytes(b"".join(parts))
            if digest not in known:
                known[digest] = len(members)
                members.append((source, expert))
            row.append(known[digest])
    return _Pool(members, places)


def _write_pool(
    pool: _Pool,
    layer: int,
    writer: TensorWriter | MemoryWriter,
    quantization: str | None,
    progress: Progress,
) -> tuple[list[str], int]:
    """Writes a layer's experts; returns the names of their tensors and the bytes of all."""
    before, names = writer.num_bytes, []
    for path in _expert_paths(pool.members[0][0], layer):
        arrays = [read_parameter(source, path, expert) for source, expert in pool.members]
        if quantization is not None and path.rsplit("/", 1)[1] in KERNELS:
            parts = [quantize(array) for array in arrays]
            writer.add(path, np.stack([part.values for part in parts]))
            writer.add(path + SCALE_SUFFIX, np.stack([part.scale for part in parts]))
            names += [path, path + SCALE_SUFFIX]
        else:
            writer.add(path, np.stack(arrays))
            names.append(path)
        progress(path)
    return names, writer.num_bytes - before


def checkpoint_bytes(source: Source) -> dict[str, int]:
    """Returns {"parameters": bytes uncompressed, "on_disk": bytes of the step's files}."""
    step = Path(source.checkpoint.step_directory)
    step = step if step.is_dir() else Path(source.checkpoint.directory)
    parameters = source.reader.parameters().values()
    stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameters)
    on_disk = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    return {"parameters": stored, "on_disk": on_disk}
