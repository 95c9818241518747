"""What a pass layer by layer is to do, and the arrays that it works on.

Axes: l length, d embed, row (rows of all batches), place (row and length merged).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import Batch


@dataclasses.dataclass
class Seconds:
    """Where the time went, in seconds.

    Attributes:
      fingerprint: identifying the checkpoint.
      read: waiting for parameters.
      layers: attention, dense networks, shared experts, routers and their statistics.
      experts: the experts of MoE layers.
    """

    fingerprint: float = 0.0
    read: float = 0.0
    layers: float = 0.0
    experts: float = 0.0

    @contextlib.contextmanager
    def add(self, name: str) -> Iterator[None]:
        """Adds the time that the body takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


class Job(NamedTuple):
    """What is to be done, checked.

    Attributes:
      reader: of the checkpoint.
      config: the model, with the evaluation capacity factor that it is to run with.
      batches: all batches, in order and of one shape.
      collect: optional statistics.
      sampled: places of the batches that inputs are sampled from, None for no sample.
      sample_tokens: tokens of that sample.
      seconds: gets what each part takes.
    """

    reader: layout.ArrayReader
    config: ModelConfig
    batches: list[Batch]
    collect: tuple[str, ...]
    sampled: set[int] | None
    sample_tokens: int
    seconds: Seconds

    @property
    def mask(self) -> np.ndarray:
        """[place] bool, the real tokens of all batches."""
        return np.concatenate([batch.mask.reshape(-1) for batch in self.batches])


class Activations(NamedTuple):
    """What the calibration set has become so far.

    Attributes:
      x: [row, l, d] compute dtype, the residual stream.
      inputs: [row, l, d] compute dtype, what the experts of the current layer see.
      update: [row, l, d] float32, what its shared expert and experts add to the stream.
    """

    x: np.ndarray
    inputs: np.ndarray
    update: np.ndarray


@contextlib.contextmanager
def open_activations(job: Job, directory: str | os.PathLike[str] | None) -> Iterator[Activations]:
    """Makes the arrays, in memory or in files of a directory that is removed in the end."""
    dtype = np.dtype(jnp.dtype(job.config.dtype))
    rows = sum(len(batch.inputs) for batch in job.batches)
    length = job.batches[0].inputs.shape[1] if job.batches else 1
    shape = (rows, length, job.config.embed_dim)
    dtypes = {"x": dtype, "inputs": dtype, "update": np.dtype(np.float32)}
    if directory is None or not rows:
        yield Activations(**{name: np.zeros(shape, kind) for name, kind in dtypes.items()})
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="uncurl_activations_", dir=directory) as folder:
        files = {name: Path(folder) / f"{name}.bin" for name in dtypes}
        yield Activations(
            **{name: _new_memmap(files[name], shape, kind) for name, kind in dtypes.items()}
        )


def _new_memmap(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.memmap(path, dtype, "w+", shape=shape)
    # Now, because a disk that is full later would kill the process instead of raising.
    with path.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, array.nbytes)
    return array
