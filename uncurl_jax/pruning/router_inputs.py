"""A sample of the task's tokens as the MoE layers see them: what fits routers and measures merges.

Statistics are enough to group experts. Fitting a router (router "fit") and measuring how far a
merged layer's output is from the original need real inputs; a few thousand tokens are enough.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.array_file import check_hash, read_arrays, write_arrays

FORMAT = "uncurl_jax router inputs"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class RouterInputs:
    """Inputs of every MoE layer for one sample of tokens.

    Attributes:
      layers: layer index -> [token, embed] float32, the normalised input of the layer. Layers that
        see the same tokens (all of a decoder, each stack of an encoder-decoder) have the same.
      manifest: where they come from, as `statistics.make_manifest` says.
    """

    layers: dict[int, np.ndarray]
    manifest: dict[str, Any]

    def __post_init__(self):
        layers = {
            int(layer): np.ascontiguousarray(array, np.float32)
            for layer, array in sorted(self.layers.items())
        }
        shapes = {array.shape for array in layers.values()}
        widths = {shape[-1] for shape in shapes if len(shape) == 2 and 0 not in shape}
        if len(widths) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise InputError(
                f"Router inputs must be [token, embed] with one embed for all layers, got shapes "
                f"{sorted(shapes)}: calibrate again."
            )
        for layer, array in layers.items():
            if not np.isfinite(array).all():
                raise InputError(
                    f"Router inputs must be finite, got NaN or infinity in layer {layer}: check "
                    "the checkpoint."
                )
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "manifest", json.loads(json.dumps(dict(self.manifest))))

    @property
    def tokens(self) -> int:
        """Tokens in the sample, of the layer that has most."""
        return max(map(len, self.layers.values()))

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest and of every array's bytes."""
        arrays = {
            str(layer): artifacts.sha256_of_bytes(array.astype("<f4").tobytes())
            for layer, array in self.layers.items()
        }
        return artifacts.sha256_of_json({"manifest": self.manifest, "arrays": arrays})

    def check_source(self, checkpoint_hash: str, layers: Iterable[int]) -> None:
        """Raises InputError unless the sample is of that checkpoint and has those layers."""
        found = self.manifest.get("checkpoint_hash")
        if found != checkpoint_hash or set(layers) != set(self.layers):
            raise InputError(
                f"Router inputs must be of the checkpoint of the statistics, got {found} with "
                f"layers {sorted(self.layers)} where {checkpoint_hash} with {sorted(layers)} was "
                "observed: calibrate both together."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file atomically."""
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hash": self.hash,
            "manifest": self.manifest,
        }
        arrays = {f"layers_{layer}": array for layer, array in self.layers.items()}
        write_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterInputs:
        """Reads what `save` wrote.

        Raises:
          InputError: If the file is missing, is something else, or is damaged.
        """
        header, arrays = read_arrays(
            path, file_format=FORMAT, version=FORMAT_VERSION, name="router inputs"
        )
        try:
            layers = {int(name.removeprefix("layers_")): array for name, array in arrays.items()}
            inputs = cls(layers, header["manifest"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        check_hash(path, header, inputs.hash)
        return inputs


def sample_tokens(
    layers: Mapping[int, np.ndarray], mask: np.ndarray, num_tokens: int, *, seed: int
) -> dict[int, np.ndarray]:
    """Draws tokens without replacement, the same in every layer.

    Args:
      layers: layer -> [batch, length, embed].
      mask: [batch, length] bool, True on real tokens.
      num_tokens: how many to draw; all if there are fewer.
      seed: of the draw.

    Returns:
      layer -> [token, embed] float32, in the order of the batch.
    """
    places = np.flatnonzero(mask.reshape(-1))
    if len(places) > num_tokens:
        generator = np.random.default_rng(seed)
        places = np.sort(generator.choice(places, num_tokens, replace=False))
    return {
        layer: np.asarray(array, np.float32).reshape(-1, array.shape[-1])[places]
        for layer, array in layers.items()
    }
