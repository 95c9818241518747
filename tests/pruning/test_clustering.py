from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse.csgraph
import sklearn.cluster
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.affinity import affinity
from uncurl_jax.pruning.clustering import (
    LABEL_ASSIGNMENTS,
    adjusted_rand_index,
    assign_within_capacity,
    canonical_labels,
    cap_cluster_sizes,
    eigengap,
    laplacian_eigenvalues,
    silhouette,
    spectral_clustering,
    spectral_embedding,
)

PLANTED = np.array([0, 1, 2, 0, 1, 2, 0, 0, 3, 3])


def random_affinity(seed, num_experts):
    half = np.random.default_rng(seed).random((num_experts, num_experts))
    A = (half + half.T) / 2
    np.fill_diagonal(A, 1.0)
    return A


def block_affinity(labels, within=0.9, between=0.1):
    A = np.where(labels[:, None] == labels, within, between)
    np.fill_diagonal(A, 1.0)
    return A


def test_two_blocks_worked_by_hand():
    A = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], float)
    np.testing.assert_allclose(laplacian_eigenvalues(A), [0, 0, 2, 2], atol=1e-12)
    assert eigengap(A, 2) == pytest.approx(2.0)
    labels = spectral_clustering(A, 2, seed=0, frequency=np.array([1, 1, 5, 0]))
    np.testing.assert_array_equal(labels, [1, 1, 0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_laplacian_eigenvalues_equal_those_of_scipys_laplacian(seed):
    A = random_affinity(seed, 9)
    A[4, :] = A[:, 4] = 0.0
    A[4, 4] = 1.0
    laplacian = scipy.sparse.csgraph.laplacian(A, normed=True)
    np.testing.assert_allclose(laplacian_eigenvalues(A), np.linalg.eigvalsh(laplacian), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("assign_labels", LABEL_ASSIGNMENTS)
def test_clusters_equal_scikit_learns_spectral_clustering(reference, seed, assign_labels):
    h = reference.planted_logits(seed, PLANTED)
    A = affinity(reference.statistics(h), "cosine")
    ours = spectral_clustering(A, 4, seed=seed, frequency=np.ones(10), assign_labels=assign_labels)
    theirs = sklearn.cluster.SpectralClustering(
        4, affinity="precomputed", assign_labels=assign_labels, random_state=0
    ).fit_predict(A)
    assert reference.same_partition(ours, theirs)
    assert reference.same_partition(ours, PLANTED)


def test_cluster_qr_has_no_random_start(reference):
    A = random_affinity(1, 12)
    results = {
        tuple(
            spectral_clustering(
                A, 5, seed=seed, frequency=np.arange(12.0), assign_labels="cluster_qr"
            )
        )
        for seed in range(5)
    }
    assert len(results) == 1


def test_embedding_rows_have_norm_one_and_signs_are_fixed():
    A = random_affinity(0, 7)
    F = spectral_embedding(A, 3)
    assert F.shape == (7, 3) and F.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(F, axis=1), 1.0)
    np.testing.assert_array_equal(F, spectral_embedding(A.copy(), 3))
    assert (F[:, 0] > 0).all()  # the first eigenvector of a connected graph has one sign


def test_an_expert_without_affinity_is_a_cluster_of_its_own():
    A = block_affinity(np.array([0, 0, 0, 1, 1, 1]))
    A[5, :] = A[:, 5] = 0.0
    A[5, 5] = 1.0
    labels = spectral_clustering(A, 3, seed=0, frequency=np.zeros(6))
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 2])


def test_as_many_clusters_as_experts_order_them_by_frequency():
    labels = spectral_clustering(
        random_affinity(0, 4), 4, seed=0, frequency=np.array([1.0, 7.0, 3.0, 7.0])
    )
    np.testing.assert_array_equal(labels, [3, 0, 2, 1])


def test_one_cluster_holds_everyone():
    labels = spectral_clustering(random_affinity(0, 4), 1, seed=0, frequency=np.ones(4))
    np.testing.assert_array_equal(labels, [0, 0, 0, 0])


@pytest.mark.parametrize("num_clusters", range(1, 9))
@pytest.mark.parametrize("shared", [0.0, 1.0])
@pytest.mark.parametrize("assign_labels", LABEL_ASSIGNMENTS)
def test_equal_and_isolated_experts_still_fill_every_cluster(num_clusters, shared, assign_labels):
    A = np.full((8, 8), shared)
    np.fill_diagonal(A, 1.0)
    labels = spectral_clustering(
        A, num_clusters, seed=0, frequency=np.arange(8.0), assign_labels=assign_labels
    )
    assert set(labels) == set(range(num_clusters))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_experts=st.integers(2, 9),
    assign_labels=st.sampled_from(LABEL_ASSIGNMENTS),
    data=st.data(),
)
def test_clustering_fills_every_cluster_repeats_and_follows_a_permutation(
    seed, num_experts, assign_labels, data
):
    num_clusters = data.draw(st.integers(1, num_experts))
    A = random_affinity(seed, num_experts)
    generator = np.random.default_rng(seed)
    frequency = generator.permutation(num_experts).astype(float)

    def cluster(order):
        return spectral_clustering(
            A[np.ix_(order, order)],
            num_clusters,
            seed=3,
            frequency=frequency[order],
            assign_labels=assign_labels,
        )

    labels = cluster(np.arange(num_experts))
    assert set(labels) == set(range(num_clusters))
    again = cluster(np.arange(num_experts))
    np.testing.assert_array_equal(labels, again)
    mass = [frequency[labels == cluster].sum() for cluster in range(num_clusters)]
    assert mass == sorted(mass, reverse=True)
    order = generator.permutation(num_experts)
    permuted = cluster(order)
    if len(set(mass)) == len(mass):
        np.testing.assert_array_equal(permuted, labels[order])


def test_canonical_labels_worked_by_hand():
    got = canonical_labels([7, 7, 2, -1, 5, 5], [1.0, 1.0, 5.0, 9.0, 2.0, 0.0])
    # sums: 7 -> 2, 2 -> 5, 5 -> 2; the tie goes to the cluster of expert 0
    np.testing.assert_array_equal(got, [1, 1, 0, -1, 2, 2])


def test_eigengap_is_largest_at_the_planted_number_and_absent_at_the_end():
    A = block_affinity(PLANTED)
    gaps = [eigengap(A, d) or 0.0 for d in range(2, 10)]
    assert np.argmax(gaps) == 2  # D = 4
    assert eigengap(A, 10) is None


@pytest.mark.parametrize("seed", range(3))
def test_silhouette_equals_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(9, 3))
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3])
    expected = sklearn.metrics.silhouette_score(points, labels)
    assert silhouette(points, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_silhouette_of_one_or_all_clusters_is_undefined(labels):
    assert silhouette(np.eye(3), np.array(labels)) is None


def test_adjusted_rand_index_worked_by_hand():
    # Pairs together: 1 on the left, 2 on the right, 1 in both, of 6; by chance 1 * 2 / 6 = 1/3.
    assert adjusted_rand_index([0, 0, 1, 2], [1, 1, 0, 0]) == pytest.approx(
        (1 - 1 / 3) / (1.5 - 1 / 3)
    )
    assert adjusted_rand_index([0, 0, 1, 2], [2, 2, 0, 1]) == 1.0
    assert adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)


def test_capping_cluster_sizes_worked_by_hand():
    points = np.array([[0.0], [1.0], [2.0], [10.0]])
    # Centres 1 and 10. Expert 1 is nearest to its own and stays; moving 2 costs 64 - 1, moving 0
    # costs 100 - 1.
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_array_equal(cap_cluster_sizes(points, labels, 2), [0, 0, 1, 1])
    assert cap_cluster_sizes(points, labels, 3) is labels


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), num_clusters=st.integers(2, 3), slack=st.integers(0, 1))
def test_capped_clusters_are_the_nearest_of_all_that_keep_the_cap(seed, num_clusters, slack):
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(7, 2))
    labels = np.concatenate([np.arange(num_clusters), generator.integers(0, num_clusters, 4)])
    points, labels = points[: len(labels)], generator.permutation(labels)
    cap = -(-len(labels) // num_clusters) + slack
    centres = np.stack([points[labels == c].mean(axis=0) for c in range(num_clusters)])
    cost = np.square(points[:, None] - centres).sum(axis=-1)
    kept = {
        min(np.flatnonzero(labels == c), key=lambda z, c=c: cost[z, c]): c
        for c in range(num_clusters)
    }
    got = cap_cluster_sizes(points, labels, cap)
    assert np.bincount(got, minlength=num_clusters).max() <= cap
    if np.bincount(labels).max() <= cap:
        np.testing.assert_array_equal(got, labels)
        return
    best = min(
        sum(cost[z, c] for z, c in enumerate(choice))
        for choice in itertools.product(range(num_clusters), repeat=len(labels))
        if np.bincount(choice).max() <= cap and all(choice[z] == c for z, c in kept.items())
    )
    assert cost[np.arange(len(labels)), got].sum() == pytest.approx(best)


def test_an_assignment_within_capacity_worked_by_hand():
    # Two places each: the one that loses least by leaving cluster 0 leaves it.
    cost = np.array([[0.0, 1.0], [0.0, 5.0], [0.0, 9.0]])
    np.testing.assert_array_equal(assign_within_capacity(cost, 2), [1, 0, 0])
    np.testing.assert_array_equal(assign_within_capacity(cost, 3), [0, 0, 0])
    assert assign_within_capacity(np.zeros((0, 2)), 0).shape == (0,)


@pytest.mark.parametrize(
    ("A", "num_clusters", "message"),
    [
        (np.eye(3), 0, r"lie in \[1, number of experts\], got 0 for 3 experts"),
        (np.eye(3), 4, "got 4 for 3 experts"),
        (np.ones((2, 3)), 1, r"finite square matrix, got shape \(2, 3\)"),
        (np.full((2, 2), np.nan), 1, "finite square matrix"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), 1, "symmetric and not negative"),
        (-np.eye(2), 1, "symmetric and not negative"),
    ],
)
def test_bad_affinities_and_counts_are_refused(A, num_clusters, message):
    with pytest.raises(InputError, match=message):
        spectral_clustering(A, num_clusters, seed=0, frequency=np.ones(len(A)))
    with pytest.raises(InputError, match=message):
        spectral_embedding(A, num_clusters)
