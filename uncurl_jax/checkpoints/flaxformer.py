"""Encoder-decoders that T5X trained with Flaxformer's modules, as the published Switch models are.

Names and shapes are those of Flaxformer's `architectures/moe/moe_architecture.py` and of what it is
made of, with one array per layer; kernels of attention are matrices there, tables of relative
positions [heads, buckets]. Steps may be in T5X's present layout or in its older one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from uncurl_jax.artifacts import sha256_of_json
from uncurl_jax.checkpoints import layout, legacy_t5x
from uncurl_jax.checkpoints.accounting import STEP
from uncurl_jax.checkpoints.parameters import (
    differences,
    expected_parameters,
    is_expert_array,
    listed,
)
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_NORMS = {"encoder": "encoder_norm", "decoder": "final_norm"}


class Stored(NamedTuple):
    """Where a parameter of ours is.

    Attributes:
      name: of their array.
      shape: of it.
      is_transposed: whether it is ours after its axes are exchanged; else it is ours reshaped.
    """

    name: str
    shape: tuple[int, ...]
    is_transposed: bool = False


def stored_parameters(config: ModelConfig) -> dict[str, Stored]:
    """Returns {parameter: where it is} of an encoder-decoder.

    Raises:
      InputError: If the model has what Flaxformer's has not.
    """
    for field, value in (
        ("norm", "rms_norm"),
        ("attention_bias", "none"),
        ("qk_norm", "none"),
        ("has_mlp_bias", False),
        ("shared_mlp_dim", 0),
        ("num_kv_heads", None),
        ("dense_mlp_dim", None),
        ("expert_map", None),
    ):
        if getattr(config, field) != value:
            raise InputError(
                f"A model of Flaxformer's must have {field}={value!r}, got "
                f"{getattr(config, field)!r}: give the configuration it was trained with, as "
                "gin/models/switch_base.gin."
            )
    shapes = expected_parameters(config)
    return {name: _stored(config, name, shape) for name, shape in shapes.items()}


def _stored(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Stored:
    top, *rest = name.split("/")
    if top == "token_embedder":
        return Stored(name, shape)
    if top == "output_embedder":
        return Stored("decoder/logits_dense/kernel", shape[::-1], is_transposed=True)
    if top.startswith("layers_"):
        return _stored_in_layer(config, int(top.removeprefix("layers_")), rest, shape)
    for stack, norm in _NORMS.items():
        if top == norm:
            return Stored(f"{stack}/{stack}_norm/scale", shape)
    stack = top.removesuffix("_relative_position")
    return Stored(f"{stack}/relpos_bias/rel_embedding", shape[::-1], is_transposed=True)


def _stored_in_layer(
    config: ModelConfig, layer: int, rest: list[str], shape: tuple[int, ...]
) -> Stored:
    is_encoder = config.is_encoder_layer(layer)
    place = layer if is_encoder else layer - config.num_encoder_layers
    theirs = f"{'encoder' if is_encoder else 'decoder'}/layers_{place}"
    itself = "attention" if is_encoder else "self_attention"
    # wi_0 goes through the activation, wi_1 is multiplied with it (MlpBlock.activations).
    networks = {"wg": "wi_0", "wi": "wi_1"} if config.is_gated else {}
    match rest:
        case ["pre_attention_norm", "scale"]:
            return Stored(f"{theirs}/pre_{itself}_layer_norm/scale", shape)
        case ["pre_cross_attention_norm" | "pre_mlp_norm" as norm, "scale"]:
            return Stored(f"{theirs}/{norm.removesuffix('_norm')}_layer_norm/scale", shape)
        case ["attention" | "cross_attention" as ours, projection, "kernel"]:
            attention = itself if ours == "attention" else "encoder_decoder_attention"
            width = config.num_heads * config.head_dim
            is_out = projection == "out"
            matrix = (width, config.embed_dim) if is_out else (config.embed_dim, width)
            return Stored(f"{theirs}/{attention}/{projection}/kernel", matrix)
        case ["mlp", network, "kernel"]:
            return Stored(f"{theirs}/mlp/{networks.get(network, network)}/kernel", shape)
        case ["moe", "router", "kernel"]:
            return Stored(f"{theirs}/mlp/router/router_weights/w/kernel", shape)
        case ["moe", "experts", network]:
            return Stored(f"{theirs}/mlp/expert/{networks.get(network, network)}/kernel", shape)
    raise AssertionError(rest)


@dataclasses.dataclass(frozen=True)
class FlaxformerCheckpoint(layout.CheckpointPath):
    """One step that T5X wrote.

    Attributes:
      config: what it is of.
      record: of its vocabulary.
    """

    config: ModelConfig = dataclasses.field(kw_only=True)
    record: Mapping[str, Any] = dataclasses.field(kw_only=True, compare=False)

    def model_config(self) -> ModelConfig:
        """Returns the architecture."""
        return self.config

    def vocabulary(self) -> dict[str, Any]:
        """Returns {name, spec, size, hash}."""
        return dict(self.record)


def resolve(
    directory: layout.PathLike, config: ModelConfig, vocabulary: Mapping[str, Any]
) -> FlaxformerCheckpoint:
    """Finds the step that a user means.

    Args:
      directory: holds `checkpoint_<step>` directories, of which the latest is taken; or one of
        these.
      config: what it is of.
      vocabulary: {"name", "spec", "size", "hash"} of the tokeniser.

    Raises:
      InputError: If there is no finished step, or the vocabulary is larger than the model's.
    """
    place = epath.Path(directory)
    if not layout.is_remote(place):
        place = epath.Path(os.path.abspath(place))
    if vocabulary["size"] > config.vocab_size:
        raise InputError(
            f"model.vocab_size must be at least the vocabulary's size, got {config.vocab_size} for "
            f"{vocabulary['name']} with {vocabulary['size']}: set ModelConfig.vocab_size."
        )
    if not place.is_dir():
        raise InputError(
            f"A checkpoint must be an existing directory, got {place}: check the path."
        )
    step, parent = layout.step_of(place), place.parent
    if step is None:
        numbered = {layout.step_of(entry): entry for entry in place.iterdir()}
        older = [number for number, entry in numbered.items() if _is_legacy(entry)]
        steps = sorted({*layout.finished_steps(place), *(n for n in older if n is not None)})
        step, parent = (steps[-1] if steps else None), place
    found = parent / f"{layout.CHECKPOINT_PREFIX}_{step}"
    if step is None or not (_is_legacy(found) or step in layout.finished_steps(parent)):
        raise InputError(
            "A directory of T5X checkpoints holds checkpoint_<step> directories that were saved to "
            f"the end, got {place} with none: give the run's MODEL_DIR, or one of its steps."
        )
    return FlaxformerCheckpoint(parent, step, config=config, record=vocabulary)


def _is_legacy(step_directory: epath.Path) -> bool:
    return step_directory.is_dir() and legacy_t5x.is_legacy_step(step_directory)


class FlaxformerReader(layout.ArrayReader):
    """Reads a step's parameters, or single experts, under our names."""

    def __init__(self, checkpoint: FlaxformerCheckpoint):
        """Opens the step; InputError if it does not hold the parameters of the model."""
        self.checkpoint = checkpoint
        self._stored = stored_parameters(checkpoint.config)
        directory = checkpoint.step_directory
        is_legacy = legacy_t5x.is_legacy_step(directory)
        self._source = _Legacy(directory) if is_legacy else _Present(checkpoint)
        expected = {entry.name: entry.shape for entry in self._stored.values()}
        found = {name: entry.shape for name, entry in self._source.metadata.items()}
        problems = differences(found, expected)
        if problems:
            raise InputError(
                f"A checkpoint must hold the parameters of its architecture, got {checkpoint} with "
                f"{listed(problems, 8)}: give the model configuration it was trained with; models "
                "with scanned layers are not read."
            )
        shapes = expected_parameters(checkpoint.config)
        self.metadata = {STEP: layout.ArrayMetadata((), np.dtype(np.int32))}
        for name, entry in self._stored.items():
            dtype = self._source.metadata[entry.name].dtype
            self.metadata[f"{layout.TARGET}/{name}"] = layout.ArrayMetadata(shapes[name], dtype)

    def stream(self, requests: Iterable[tuple[str, int | None]]) -> Iterator[np.ndarray]:
        """Reads many arrays in order; arguments as for `read`."""
        for name, index in requests:
            yield self._read(name, index)

    def identity(self) -> str:
        """Returns a hash of names, sizes and times of what is in the step's directory."""
        entries = sorted(self.checkpoint.step_directory.iterdir(), key=os.fspath)
        stats = [(path.name, path.stat()) for path in entries]
        return sha256_of_json([[name, stat.length, stat.mtime] for name, stat in stats])

    def _read(self, name: str, index: int | None) -> np.ndarray:
        if name not in self.metadata:
            raise self._no_such_array(name)
        if name == STEP:
            return np.asarray(self.checkpoint.step, np.int32)
        parameter, shape = name.removeprefix(f"{layout.TARGET}/"), self.metadata[name].shape
        entry = self._stored[parameter]
        # Of stacked experts alone the first axis is theirs too.
        if index is not None and is_expert_array(parameter):
            return self._source.read(entry.name, index)
        array = self._source.read(entry.name, None)
        array = array.T if entry.is_transposed else array.reshape(shape)
        return np.ascontiguousarray(array if index is None else array[index])


class _Legacy:
    """The parameters of a step in T5X's older layout."""

    def __init__(self, directory: epath.Path):
        self._reader = legacy_t5x.LegacyReader(directory)
        self.metadata = self._reader.metadata

    def read(self, name: str, index: int | None) -> np.ndarray:
        return self._reader.read(name, index)


class _Present:
    """The parameters of a step in T5X's present layout."""

    def __init__(self, checkpoint: layout.CheckpointPath):
        self._reader = layout.StateReader(checkpoint)
        self.metadata = self._reader.parameters()

    def read(self, name: str, index: int | None) -> np.ndarray:
        return self._reader.read(f"{layout.TARGET}/{name}", index)
