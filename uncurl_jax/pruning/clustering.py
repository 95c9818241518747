"""Spectral clustering of experts (arXiv 2409.01483, Algorithm 1), deterministic, never empty.

Axes: expert (Z), cluster (D). Everything is float64 on the host.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

from uncurl_jax.errors import InputError

LABEL_ASSIGNMENTS = ("kmeans", "cluster_qr")
NUM_STARTS = 32  # k-means++ restarts; at least 20, since clusters are few and uneven.


def spectral_embedding(A: np.ndarray, num_clusters: int) -> np.ndarray:
    """Returns F: the eigenvectors of the D smallest eigenvalues of the normalised Laplacian.

    Rows are scaled to norm 1 (Ng, Jordan, Weiss 2001); each eigenvector's sign makes its entry of
    largest magnitude positive. As in NJW and scikit-learn the diagonal of A plays no part, and an
    expert without affinity to any other is a component of its own.

    Args:
      A: [expert, expert] symmetric affinity >= 0.
      num_clusters: D, columns of F.

    Returns:
      [expert, cluster] float64; a row is all zero where every chosen eigenvector is.

    Raises:
      InputError: If D is not in [1, Z], or A is not a square, finite, symmetric matrix.
    """
    _check(A, num_clusters)
    _, vectors = scipy.linalg.eigh(_normalized_laplacian(A))
    vectors = vectors[:, :num_clusters]
    peak = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[peak, np.arange(num_clusters)] < 0, -1.0, 1.0)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def spectral_clustering(
    A: np.ndarray,
    num_clusters: int,
    *,
    seed: int,
    frequency: npt.ArrayLike,
    assign_labels: str = "kmeans",
    num_starts: int = NUM_STARTS,
) -> np.ndarray:
    """Groups the experts into exactly D non-empty clusters.

    Experts are first put in an order that does not depend on their numbering (falling frequency,
    then falling total affinity), so that permuting the experts permutes the labels and nothing
    else unless two experts tie in both.

    Args:
      A: [expert, expert] symmetric affinity >= 0.
      num_clusters: D.
      seed: seed of the k-means++ starts.
      frequency: [expert] >= 0, how often each expert is selected; orders the clusters.
      assign_labels: "kmeans", or "cluster_qr", which needs no seed.
      num_starts: k-means++ restarts, of which the best counts.

    Returns:
      [expert] int64 in [0, D), canonical: see `canonical_labels`.

    Raises:
      InputError: If D is not in [1, Z], or A is not a square, finite, symmetric matrix.
    """
    _check(A, num_clusters)
    num_experts = len(A)
    frequency = np.asarray(frequency, np.float64)
    if num_clusters == 1:
        return np.zeros(num_experts, np.int64)
    if num_clusters == num_experts:
        return canonical_labels(np.arange(num_experts), frequency)
    total = np.sort(A, axis=1).sum(axis=1)  # sorted: the same bits under any numbering
    order = np.lexsort((-total, -frequency))
    embedding = spectral_embedding(A[np.ix_(order, order)], num_clusters)
    if assign_labels == "cluster_qr":
        found = _cluster_qr(embedding)
    else:
        found = _kmeans(embedding, num_clusters, seed, num_starts)
    labels = np.empty(num_experts, np.int64)
    labels[order] = _fill_empty(embedding, found, num_clusters)
    return canonical_labels(labels, frequency)


def canonical_labels(labels: npt.ArrayLike, frequency: npt.ArrayLike) -> np.ndarray:
    """Renumbers clusters by falling summed frequency, ties by lowest member; -1 stays -1.

    Args:
      labels: [expert] int, -1 for a dropped expert.
      frequency: [expert] >= 0.

    Returns:
      [expert] int64, clusters numbered from 0 without gaps.
    """
    labels = np.asarray(labels, np.int64)
    frequency = np.asarray(frequency, np.float64)
    names = np.unique(labels[labels >= 0])
    first = [int(np.flatnonzero(labels == name)[0]) for name in names]
    # Sorted before the sum: the same bits however the members are numbered.
    mass = [float(np.sort(frequency[labels == name]).sum()) for name in names]
    result = np.full(len(labels), -1, np.int64)
    for cluster, index in enumerate(np.lexsort((np.array(first), -np.array(mass)))):
        result[labels == names[index]] = cluster
    return result


def laplacian_eigenvalues(A: np.ndarray) -> np.ndarray:
    """Returns the [expert] eigenvalues of the normalised Laplacian of A, rising, in [0, 2]."""
    _check(A, 1)
    return scipy.linalg.eigvalsh(_normalized_laplacian(A))


def eigengap(A: np.ndarray, num_clusters: int) -> float | None:
    """Returns eigenvalue D + 1 less eigenvalue D of the Laplacian: large where D fits the data.

    None for D = Z, which has no next eigenvalue.
    """
    _check(A, num_clusters)
    if num_clusters == len(A):
        return None
    values = laplacian_eigenvalues(A)
    return float(values[num_clusters] - values[num_clusters - 1])


def silhouette(points: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the mean silhouette (Rousseeuw 1987) in [-1, 1] under Euclidean distance.

    Args:
      points: [expert, feature] float.
      labels: [expert] int >= 0.

    Returns:
      The mean over experts, 0 for a member of a singleton; None unless 2 <= clusters < experts.
    """
    names, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= len(names) < len(points):
        return None
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    to_cluster = distance @ np.eye(len(names))[index]  # [expert, cluster] summed distances
    rows = np.arange(len(points))
    own_size = sizes[index]
    inside = to_cluster[rows, index] / np.maximum(own_size - 1, 1)
    to_cluster = to_cluster / sizes
    to_cluster[rows, index] = np.inf
    outside = to_cluster.min(axis=1)
    scale = np.maximum(inside, outside)
    value = (outside - inside) / np.where(scale > 0, scale, 1.0)
    return float(np.where(own_size > 1, value, 0.0).mean())


def adjusted_rand_index(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Returns how far two partitions agree: 1 if they are equal, about 0 by chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(left, right))


def cap_cluster_sizes(points: np.ndarray, labels: np.ndarray, cap: int) -> np.ndarray:
    """Moves members of clusters that are too large to the nearest centres with room.

    Of the assignments with at most `cap` members each, in which every cluster keeps the member
    nearest to its centre, the one with the smallest sum of squared distances to the centres; labels
    that keep the cap stay as they are.

    Args:
      points: [expert, feature].
      labels: [expert] int in [0, cluster), each used.
      cap: most members; cap * clusters >= experts.

    Returns:
      [expert] int64 labels, every cluster with at least one member.
    """
    num_clusters = int(labels.max()) + 1
    if np.bincount(labels).max() <= cap:
        return labels
    centres = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(num_clusters)])
    cost = np.square(points[:, None] - centres[None]).sum(axis=-1)
    result = np.empty_like(labels)
    # The member nearest to each centre stays there, so that no cluster is emptied.
    kept = [
        int(np.flatnonzero(labels == cluster)[cost[labels == cluster, cluster].argmin()])
        for cluster in range(num_clusters)
    ]
    result[kept] = np.arange(num_clusters)
    others = np.setdiff1d(np.arange(len(labels)), kept)
    result[others] = assign_within_capacity(cost[others], cap - 1)
    return result


def assign_within_capacity(cost: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the cheapest assignment [item] of items to clusters of at most `capacity` items.

    Args:
      cost: [item, cluster].
      capacity: of each cluster; capacity * clusters >= items.
    """
    if not len(cost):
        return np.zeros(0, np.int64)
    _, places = scipy.optimize.linear_sum_assignment(np.repeat(cost, capacity, axis=1))
    return places.astype(np.int64) // capacity


def _normalized_laplacian(A: np.ndarray) -> np.ndarray:
    weight = np.array(A, np.float64)
    np.fill_diagonal(weight, 0.0)
    degree = weight.sum(axis=1)
    is_isolated = degree <= 0
    root = np.sqrt(np.where(is_isolated, 1.0, degree))
    laplacian = -weight / np.outer(root, root)
    np.fill_diagonal(laplacian, np.where(is_isolated, 0.0, 1.0))
    return laplacian


def _kmeans(points: np.ndarray, num_clusters: int, seed: int, num_starts: int) -> np.ndarray:
    # Imported here: the alignment workers import this package and need no scikit-learn.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: a few dozen rows gain nothing from more, and sums keep their order.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # Fewer distinct rows than clusters, as with equal experts: _fill_empty settles it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        starts: Any = num_starts  # scikit-learn leaves n_init untyped
        model = KMeans(num_clusters, n_init=starts, random_state=seed, algorithm="lloyd")
        return model.fit_predict(points).astype(np.int64)


def _cluster_qr(points: np.ndarray) -> np.ndarray:
    """Labels rows by pivoted QR (Damle, Minden, Ying 2019): no iteration, no random start.

    The pivots are rows as near to orthogonal as there are; the polar factor of these rows turns
    the embedding so that each row's largest coordinate names its cluster.
    """
    num_clusters = points.shape[1]
    decomposition: Any = scipy.linalg.qr(points.T, pivoting=True, mode="economic")
    pivots = decomposition[-1]
    left, _, right = scipy.linalg.svd(points[pivots[:num_clusters]].T)
    return np.abs(points @ (left @ right)).argmax(axis=1).astype(np.int64)


def _fill_empty(points: np.ndarray, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Gives each empty cluster the point farthest from its centre in a cluster of two or more."""
    labels = labels.copy()
    for empty in np.setdiff1d(np.arange(num_clusters), labels):
        distance = np.full(len(labels), -1.0)
        for cluster in np.unique(labels):
            members = labels == cluster
            if members.sum() > 1:
                centre = points[members].mean(axis=0)
                distance[members] = np.linalg.norm(points[members] - centre, axis=1)
        labels[int(distance.argmax())] = empty
    return labels


def _check(A: np.ndarray, num_clusters: int) -> None:
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not np.isfinite(A).all():
        raise InputError(
            f"An affinity must be a finite square matrix, got shape {A.shape}: compute it with "
            "affinity()."
        )
    if A.min(initial=0.0) < 0 or not np.allclose(A, A.T, rtol=0, atol=1e-9):
        raise InputError(
            "An affinity must be symmetric and not negative, got a matrix that is not: compute it "
            "with affinity()."
        )
    if not 1 <= num_clusters <= len(A):
        raise InputError(
            f"num_clusters must lie in [1, number of experts], got {num_clusters} for {len(A)} "
            "experts: choose fewer clusters than experts."
        )
