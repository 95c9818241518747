from __future__ import annotations

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
    canonical_labels,
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
def test_clusters_equal_scikit_learns_spectral_clustering(reference, seed):
    h = reference.planted_logits(seed, PLANTED)
    A = affinity(reference.statistics(h), "cosine")
    ours = spectral_clustering(A, 4, seed=seed, frequency=np.ones(10))
    theirs = sklearn.cluster.SpectralClustering(
        4, affinity="precomputed", assign_labels="kmeans", random_state=0
    ).fit_predict(A)
    assert reference.same_partition(ours, theirs)
    assert reference.same_partition(ours, PLANTED)


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
def test_equal_and_isolated_experts_still_fill_every_cluster(num_clusters, shared):
    A = np.full((8, 8), shared)
    np.fill_diagonal(A, 1.0)
    labels = spectral_clustering(A, num_clusters, seed=0, frequency=np.arange(8.0))
    assert set(labels) == set(range(num_clusters))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), num_experts=st.integers(2, 9), data=st.data())
def test_clustering_fills_every_cluster_repeats_and_follows_a_permutation(seed, num_experts, data):
    num_clusters = data.draw(st.integers(1, num_experts))
    A = random_affinity(seed, num_experts)
    generator = np.random.default_rng(seed)
    frequency = generator.permutation(num_experts).astype(float)
    labels = spectral_clustering(A, num_clusters, seed=3, frequency=frequency)
    assert set(labels) == set(range(num_clusters))
    again = spectral_clustering(A, num_clusters, seed=3, frequency=frequency)
    np.testing.assert_array_equal(labels, again)
    mass = [frequency[labels == cluster].sum() for cluster in range(num_clusters)]
    assert mass == sorted(mass, reverse=True)
    order = generator.permutation(num_experts)
    permuted = spectral_clustering(
        A[np.ix_(order, order)], num_clusters, seed=3, frequency=frequency[order]
    )
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
