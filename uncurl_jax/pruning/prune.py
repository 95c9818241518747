"""Carries a plan out on one layer's arrays: align, merge, compensate, new router."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import Alignment, Experts, align_clusters
from uncurl_jax.pruning.merging import merge_experts
from uncurl_jax.pruning.plan_file import PruningPlan
from uncurl_jax.pruning.router import new_router_kernel, scale_outputs


class PrunedLayer(NamedTuple):
    """One MoE layer after a prune.

    Attributes:
      router: [embed, cluster] kernel.
      experts: arrays with a leading [cluster] axis.
      alignment: how the members were aligned; None if the plan does not align.
    """

    router: np.ndarray
    experts: dict[str, np.ndarray]
    alignment: Alignment | None


def prune_layer(
    plan: PruningPlan,
    layer: int,
    router: np.ndarray,
    experts: Experts,
    *,
    init_stddev: float,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PrunedLayer:
    """Prunes one MoE layer as the plan says. Needs the arrays of that layer and nothing else.

    Args:
      plan: the plan.
      layer: index of the layer in the model.
      router: [embed, expert] kernel.
      experts: arrays with a leading [expert] axis; see `alignment`.
      init_stddev: standard deviation of a router's new values (`ModelConfig.init_stddev`).
      workers: processes for the alignment; 0 works in this one.
      progress: called with (members aligned, members in all).

    Returns:
      The pruned layer, in the dtypes of the inputs.

    Raises:
      InputError: If the plan has no such layer or the arrays do not fit it.
    """
    decided = plan.layer(layer)
    for name, count in (("router", router.shape[-1]), *((n, len(a)) for n, a in experts.items())):
        if count != decided.num_experts:
            raise InputError(
                f"The plan's layer {layer} is for {decided.num_experts} experts, got {count} in "
                f"{name}: it is of another checkpoint."
            )
    labels, reference = decided.labels, decided.reference
    alignment = None
    if plan.alignment != "none":
        alignment = align_clusters(
            experts,
            labels,
            reference,
            alignment=plan.alignment,
            workers=workers,
            progress=progress,
        )
    merged = merge_experts(
        experts,
        labels,
        decided.weights,
        permutations=None if alignment is None else alignment.permutations,
    )
    if decided.gate_factors is not None:
        merged = scale_outputs(merged, decided.gate_factors)
    kernel = prune_router(plan, layer, router, init_stddev=init_stddev)
    return PrunedLayer(kernel, merged, alignment)


def prune_router(
    plan: PruningPlan, layer: int, router: np.ndarray, *, init_stddev: float
) -> np.ndarray:
    """Returns a layer's router kernel after the prune, as the plan's treatment says.

    Args:
      plan: the plan.
      layer: index of the layer in the model.
      router: [embed, expert] kernel.
      init_stddev: standard deviation of new values (`ModelConfig.init_stddev`).

    Returns:
      [embed, cluster] in the dtype of `router`; with router "remap" the kernel as it is.

    Raises:
      InputError: If the plan has no such layer or the kernel does not fit it.
    """
    decided = plan.layer(layer)
    if plan.router == "fit":
        kernel = decided.fitted_kernel()
        if kernel.shape[0] != router.shape[0]:
            raise InputError(
                f"A fitted router must have the model's width, got {kernel.shape[0]} in the plan "
                f"and {router.shape[0]} in layer {layer}: the plan is of another model."
            )
        return kernel.astype(router.dtype)
    return new_router_kernel(
        router,
        decided.labels,
        decided.reference,
        decided.selected,
        plan.router,
        seed=plan.seed,
        layer=layer,
        init_stddev=init_stddev,
    )
