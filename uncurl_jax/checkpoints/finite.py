"""Finds NaN and infinity in a checkpoint's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.parameters import is_expert_array, listed
from uncurl_jax.errors import InputError


class NonFinite(NamedTuple):
    """NaN or infinite values in one parameter.

    Attributes:
      name: the parameter, for example "layers_0/moe/experts/wi".
      expert: which expert of it; None for parameters that have no expert axis.
      count: how many values.
    """

    name: str
    expert: int | None
    count: int

    def __str__(self) -> str:
        """Names the parameter, its expert and the count."""
        place = self.name if self.expert is None else f"{self.name} expert {self.expert}"
        return f"{place} ({self.count} values)"


def find_nonfinite(
    path: layout.PathLike | layout.CheckpointPath | layout.ArrayReader,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[NonFinite]:
    """Finds NaN and infinity in the parameters; reads all of them, a few at a time.

    Args:
      path: the checkpoint.
      progress: called with (arrays read, arrays in all); experts count one by one.

    Returns:
      One entry for each parameter, or each expert of one, that is not finite.
    """
    reader = layout.open_reader(path)
    requests: list[tuple[str, int | None]] = []
    for name, (shape, _) in reader.parameters().items():
        indices = range(shape[0]) if is_expert_array(name) else [None]
        requests.extend((f"{layout.TARGET}/{name}", index) for index in indices)
    found = []
    arrays = zip(requests, reader.stream(requests), strict=True)
    for done, ((name, index), array) in enumerate(arrays, start=1):
        count = int(array.size - np.count_nonzero(np.isfinite(array)))
        if count:
            found.append(NonFinite(name.removeprefix(f"{layout.TARGET}/"), index, count))
        if progress is not None:
            progress(done, len(requests))
    return found


def check_finite(
    path: layout.PathLike | layout.CheckpointPath | layout.ArrayReader,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Raises InputError naming every parameter, and expert, that holds NaN or infinity."""
    reader = layout.open_reader(path)
    found = find_nonfinite(reader, progress=progress)
    if found:
        raise InputError(
            f"All parameters must be finite, got NaN or infinity in {reader.checkpoint}: "
            f"{listed(found)}; use an earlier step."
        )
