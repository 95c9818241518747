"""Methods that keep D experts as they are and drop the others: the pruning baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from uncurl_jax.pruning.grouping import Grouping, GroupRequest, LayerParameters, Method, keep


def keep_largest(request: GroupRequest, scores: npt.ArrayLike) -> Grouping:
    """Keeps the D experts with the largest scores [expert], ties by lowest index."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return keep(request.selected, order[: request.num_clusters])


def random(request: GroupRequest) -> Grouping:
    """A seeded choice of D experts; the floor that a method must beat."""
    generator = np.random.default_rng(request.seed)
    chosen = generator.choice(request.num_experts, size=request.num_clusters, replace=False)
    return keep(request.selected, chosen)


def frequency(request: GroupRequest) -> Grouping:
    """The D most selected experts; the paper's one-shot baseline."""
    return keep_largest(request, request.selected)


def seer(request: GroupRequest) -> Grouping:
    """The D largest sums of softmax probabilities (SEER-MoE, arXiv 2404.05089)."""
    return keep_largest(request, request.statistics.prob_mass)


def router_norm(request: GroupRequest) -> Grouping:
    """The D largest router columns, or column changes since an earlier checkpoint.

    arXiv 2405.16646 keeps the experts whose router columns changed most in fine-tuning; without an
    earlier checkpoint the norms themselves are compared.
    """
    parameters: LayerParameters | Any = request.parameters
    kernel = np.asarray(parameters.router).astype(np.float64)
    if parameters.base_router is not None:
        kernel = kernel - np.asarray(parameters.base_router).astype(np.float64)
    return keep_largest(request, np.linalg.norm(kernel, axis=0))


def ean(request: GroupRequest) -> Grouping:
    """The D largest sums of output norms |E_i(x)| over the tokens routed to each expert."""
    return keep_largest(request, request.statistics.output_norm)


def reap(request: GroupRequest) -> Grouping:
    """The D largest means of gate * |E_i(x)| over routed tokens (REAP, arXiv 2510.13999)."""
    count = np.maximum(request.selected, 1.0)
    return keep_largest(request, np.asarray(request.statistics.gated_output_norm) / count)


METHODS = (
    Method("random", random, "keep a random choice of experts, drop the others"),
    Method("frequency", frequency, "keep the most selected experts, drop the others"),
    Method("seer", seer, "keep the largest sums of router probabilities"),
    Method(
        "router_norm",
        router_norm,
        "keep the largest router columns, or their largest changes since --base_checkpoint",
        needs_router=True,
    ),
    Method("ean", ean, "keep the largest sums of output norms", collect=("outputs",)),
    Method("reap", reap, "keep the largest mean gated output norms", collect=("outputs",)),
)
