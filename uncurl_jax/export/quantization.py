"""Weight-only int8 for the kernels of experts: symmetric, one scale for each output channel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

INT8 = "int8"
_LARGEST = 127


class Quantized(NamedTuple):
    """A kernel as kernel ~ values * scale.

    Attributes:
      values: [..., k, n] int8 in [-127, 127].
      scale: [..., n] float32, positive.
    """

    values: np.ndarray
    scale: np.ndarray


def quantize(kernel: np.ndarray) -> Quantized:
    """Rounds a kernel [..., k, n] to int8; the error of each entry is at most scale / 2.

    A channel of zeros has scale 1.
    """
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=-2)
    scale = np.where(largest > 0, largest / _LARGEST, 1).astype(np.float32)
    values = np.clip(np.rint(kernel / scale[..., None, :]), -_LARGEST, _LARGEST)
    return Quantized(values.astype(np.int8), scale)
