"""How many experts each MoE layer keeps: uniform, given per layer, or a total to divide."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import LayerStatistics


def allocate(
    layers: Mapping[int, LayerStatistics],
    total: int,
    *,
    minimum: int,
    multiple_of: int = 1,
) -> dict[int, int]:
    """Divides a total of experts among the layers by how concentrated their usage is.

    As MC-SMoE does (arXiv 2310.01334): selection counts are divided by the largest of their layer,
    and the experts with the largest quotients of the whole model are kept. A layer that the task
    spreads over many experts keeps more of them. Here in blocks of `multiple_of` experts, after
    every layer got `minimum`.

    Args:
      layers: layer -> statistics.
      total: experts of all MoE layers together.
      minimum: fewest experts of a layer (top-k).
      multiple_of: every count is a multiple of this (say, the devices that share experts).

    Returns:
      layer -> experts, summing to `total`.

    Raises:
      InputError: If no division meets the total.
    """
    blocks = {layer: len(np.asarray(s.selected)) // multiple_of for layer, s in layers.items()}
    counts = {layer: -(-max(minimum, 1) // multiple_of) for layer in layers}
    low, high = (multiple_of * sum(c.values()) for c in (counts, blocks))
    too_small = [layer for layer in layers if counts[layer] > blocks[layer]]
    if too_small:
        raise InputError(
            f"A layer must hold a multiple of multiple_of={multiple_of} of at least {minimum}, "
            f"got {len(layers[too_small[0]].selected)} experts in layer {too_small[0]}: choose a "
            "smaller multiple_of."
        )
    if total % multiple_of or not low <= total <= high:
        raise InputError(
            f"A total of experts must be a multiple of multiple_of={multiple_of} between {low} "
            f"(at least {minimum} in each of {len(layers)} MoE layers) and {high}, got {total}: "
            "choose another total or another multiple_of."
        )
    candidates = []
    for layer, statistics in layers.items():
        usage = np.sort(np.asarray(statistics.selected, np.float64))[::-1]
        usage = usage / max(usage[0], 1.0)
        for block in range(counts[layer], blocks[layer]):
            gain = usage[block * multiple_of : (block + 1) * multiple_of].sum()
            candidates.append((-gain, block, layer))
    remaining = total // multiple_of - sum(counts.values())
    # Blocks of one layer come in order, since usage falls; ties go to the earlier block and layer.
    for _, _, layer in sorted(candidates)[:remaining]:
        counts[layer] += 1
    return {layer: count * multiple_of for layer, count in counts.items()}
