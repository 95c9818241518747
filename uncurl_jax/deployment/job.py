"""What a slice is to do: training or serving, and on how many tokens."""

from __future__ import annotations

import dataclasses

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import TOKEN_AXES


@dataclasses.dataclass(frozen=True)
class Job:
    """What the slice is to do.

    Attributes:
      mode: "train" or "serve" (also evaluation).
      batch: rows per step, over all devices.
      length: tokens per row; 1 when serving is a decoding step, which is dropless.
      param_dtype: of the parameters when serving; training keeps float32.
      accumulation_steps: parts that a batch is trained in.
      cache_length: positions of the key-value cache when serving; 0 for none.
    """

    mode: str
    batch: int
    length: int
    param_dtype: str = "bfloat16"
    accumulation_steps: int = 1
    cache_length: int = 0

    @property
    def is_training(self) -> bool:
        """Whether gradients are computed."""
        return self.mode == "train"

    @property
    def is_decoding(self) -> bool:
        """Whether a step is one more token per row."""
        return not self.is_training and self.length == 1

    @property
    def rows(self) -> int:
        """Rows of one part of a batch."""
        return self.batch // self.accumulation_steps

    def tokens(self, mesh: MeshShape) -> int:
        """Tokens of one part on one device, which are a capacity group."""
        return self.rows * self.length // mesh.size_of(TOKEN_AXES)

    def capacity(self, model: ModelConfig, layer: int, mesh: MeshShape) -> int | None:
        """Slots per expert and group; None if nothing is dropped."""
        if self.is_decoding:
            return None
        return model.expert_capacity(layer, self.tokens(mesh), is_training=self.is_training)


def make_job(
    mode: str,
    batch: int,
    length: int,
    *,
    max_length: int,
    param_dtype: str | None = None,
    accumulation_steps: int | None = None,
    cache_length: int | None = None,
) -> Job:
    """Returns a job with the defaults of its mode: when serving, bf16 and a whole cache.

    Raises:
      InputError: If something is given that the mode does not have.
    """
    foreign = {"accumulation_steps": accumulation_steps}
    if mode == "train":
        foreign = {"param_dtype": param_dtype, "cache_length": cache_length}
    for name, value in foreign.items():
        if value is not None:
            raise InputError(
                f"{name} does not belong to mode {mode}, got {value}: leave it out or use the "
                "other mode."
            )
    if mode == "train":
        return Job(mode, batch, length, "float32", accumulation_steps or 1)
    cache = max_length if cache_length is None else cache_length
    return Job(mode, batch, length, param_dtype or "bfloat16", cache_length=cache)
