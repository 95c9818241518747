"""Methods that merge: clusters of experts from router logits, outputs or weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.cluster.hierarchy

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import affinity as affinity_lib
from uncurl_jax.pruning import clustering
from uncurl_jax.pruning.grouping import Grouping, GroupRequest, LayerParameters, Method, merge

# Further seeds that k-means is started from, to see whether the clusters depend on the seed, and
# the restarts of each: fewer than for the clusters themselves, which makes planning twice as fast.
_STABILITY_SEEDS = 4
_STABILITY_STARTS = 8


def uncurl(request: GroupRequest) -> Grouping:
    """Spectral clusters of router logits (arXiv 2409.01483, Algorithm 1)."""
    A = affinity_lib.affinity(request.statistics, request.options.affinity)
    labels, diagnostics = _spectral(A, request, request.num_clusters)
    return merge(request, labels, diagnostics)


def weight(request: GroupRequest) -> Grouping:
    """Spectral clusters of the cosine between experts' flattened weights."""
    parameters: LayerParameters | Any = request.parameters
    gram = np.zeros((request.num_experts,) * 2)
    for array in parameters.experts.values():
        flat = np.asarray(array).reshape(len(array), -1)
        for start in range(0, flat.shape[1], 1 << 20):
            part = flat[:, start : start + (1 << 20)].astype(np.float32)
            gram += part @ part.T
    norm = np.sqrt(np.maximum(np.diagonal(gram), np.finfo(np.float64).tiny))
    A = (1.0 + np.clip(gram / np.outer(norm, norm), -1.0, 1.0)) / 2.0
    A = (A + A.T) / 2.0
    labels, diagnostics = _spectral(A, request, request.num_clusters)
    return merge(request, labels, diagnostics)


def frequency_merge(request: GroupRequest) -> Grouping:
    """The D most selected experts as centres; each other joins the centre of largest affinity.

    Section 6.4.1 of arXiv 2409.01483. With counts per layer this is MC-SMoE's grouping.
    """
    A = affinity_lib.affinity(request.statistics, request.options.affinity)
    centres = np.argsort(-request.selected, kind="stable")[: request.num_clusters]
    return merge(request, _join_centres(A, centres, request.options.max_cluster_size))


def uncurl_protected(request: GroupRequest) -> Grouping:
    """The m most used experts stay by themselves, the others are clustered into D - m places.

    With m = D nothing is left for clusters, and the others join their nearest kept expert. m is
    `num_protected`, or how many experts got at least the share 1/D of the selections, at most
    D - 1 and at most what a cap leaves room for. Spectral clusters average the busiest experts
    together, which loses most at small pruning factors; protecting them does not.
    """
    num_experts, num_clusters = request.num_experts, request.num_clusters
    protected, cap = request.options.num_protected, request.options.max_cluster_size
    # With a cap, m experts alone leave (D - m) * cap places for the other Z - m.
    most = num_clusters - 1
    if cap is not None and cap > 1:
        most = min(most, (cap * num_clusters - num_experts) // (cap - 1))
    if protected is None:
        share = request.selected / max(request.selected.sum(), 1.0)
        protected = min(int((share >= 1.0 / num_clusters).sum()), most)
    if protected > num_clusters:
        raise InputError(
            f"num_protected must not exceed the experts after pruning, got {protected} for "
            f"{num_clusters}: protect fewer experts."
        )
    if num_clusters == num_experts or protected == num_clusters:
        return frequency_merge(request)
    if protected > most:
        raise InputError(
            f"max_cluster_size must hold the experts that are not protected, got {cap} for "
            f"{num_experts - protected} in {num_clusters - protected} clusters: protect at most "
            f"{most} or raise the cap."
        )
    order = np.argsort(-request.selected, kind="stable")
    tail = np.sort(order[protected:])
    A = affinity_lib.affinity(request.statistics, request.options.affinity)
    labels = np.empty(num_experts, np.int64)
    labels[order[:protected]] = np.arange(protected)
    inner, diagnostics = _spectral(A[np.ix_(tail, tail)], request, num_clusters - protected, tail)
    labels[tail] = protected + inner
    return merge(request, labels, {**diagnostics, "num_protected": protected})


def hc_smoe(request: GroupRequest) -> Grouping:
    """Average-linkage clusters of the experts' mean outputs over all tokens (arXiv 2410.08589)."""
    tokens = max(float(request.statistics.tokens), 1.0)
    outputs = np.asarray(request.statistics.all_output_sum, np.float64) / tokens
    if request.num_clusters == request.num_experts:
        labels = np.arange(request.num_experts)
    else:
        tree = scipy.cluster.hierarchy.linkage(outputs, method="average", metric="euclidean")
        labels = scipy.cluster.hierarchy.cut_tree(tree, n_clusters=request.num_clusters)[:, 0]
    labels = _capped(outputs, labels.astype(np.int64), request)
    return merge(request, labels, {"silhouette": clustering.silhouette(outputs, labels)})


def _spectral(
    A: np.ndarray, request: GroupRequest, num_clusters: int, members: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Clusters experts (`members` of them, all by default) and says how clear the clusters are."""
    selected = request.selected if members is None else request.selected[members]
    assign = request.options.assign_labels

    def cluster(seed: int, num_starts: int = clustering.NUM_STARTS) -> np.ndarray:
        return clustering.spectral_clustering(
            A,
            num_clusters,
            seed=seed,
            frequency=selected,
            assign_labels=assign,
            num_starts=num_starts,
        )

    labels = cluster(request.seed)
    points = clustering.spectral_embedding(A, num_clusters)
    diagnostics: dict[str, Any] = {
        "eigengap": clustering.eigengap(A, num_clusters),
        "silhouette": clustering.silhouette(points, labels),
    }
    if assign == "kmeans":
        seeds = range(request.seed + 1, request.seed + 1 + _STABILITY_SEEDS)
        others = [cluster(seed, _STABILITY_STARTS) for seed in seeds]
        diagnostics["seed_stability"] = float(
            np.mean([clustering.adjusted_rand_index(labels, other) for other in others])
        )
    return _capped(points, labels, request), diagnostics


def _capped(points: np.ndarray, labels: np.ndarray, request: GroupRequest) -> np.ndarray:
    cap = request.options.max_cluster_size
    return labels if cap is None else clustering.cap_cluster_sizes(points, labels, cap)


def _join_centres(A: np.ndarray, centres: np.ndarray, cap: int | None) -> np.ndarray:
    """Labels each expert with the centre of largest affinity (ties: the busier centre)."""
    labels = A[:, centres].argmax(axis=1)
    labels[centres] = np.arange(len(centres))
    if cap is not None:
        others = np.setdiff1d(np.arange(len(A)), centres)
        room = cap - 1
        labels[others] = clustering.assign_within_capacity(-A[np.ix_(others, centres)], room)
    return labels


METHODS = (
    Method("uncurl", uncurl, "merge spectral clusters of router logits (arXiv 2409.01483)"),
    Method(
        "uncurl_protected",
        uncurl_protected,
        "keep the most used experts by themselves, merge clusters of the others",
    ),
    Method(
        "frequency_merge",
        frequency_merge,
        "keep the most selected experts and merge each other into the most similar of them",
    ),
    Method(
        "mc_smoe",
        frequency_merge,
        "the same with counts per layer that follow the usage (MC-SMoE, arXiv 2310.01334)",
        has_own_counts=True,
    ),
    Method(
        "hc_smoe",
        hc_smoe,
        "merge average-linkage clusters of mean expert outputs (arXiv 2410.08589)",
        collect=("all_outputs",),
        is_aligned=False,
    ),
    Method(
        "weight",
        weight,
        "merge spectral clusters of the experts' weights",
        needs_experts=True,
    ),
)
