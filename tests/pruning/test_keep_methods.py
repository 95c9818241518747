"""Every pruning baseline on numbers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from uncurl_jax.pruning.methods import GroupRequest, LayerParameters, group_experts

ROUTER = np.array([[3.0, 0.0, 1.0, 0.5], [4.0, 2.0, 2.0, 0.5]], np.float32)
BASE = np.array([[3.0, 0.0, 1.0, 0.5], [4.0, 0.0, 1.0, 0.5]], np.float32)


def kept(method, statistics, num_clusters, **request):
    """Experts that stay, by cluster; checks that the others are dropped and nothing is merged."""
    got = group_experts(method, GroupRequest(statistics, num_clusters, **request))
    is_kept = np.isin(np.arange(len(got.labels)), got.reference)
    np.testing.assert_array_equal(got.labels >= 0, is_kept)
    np.testing.assert_array_equal(got.weights, is_kept)
    assert got.weights.dtype == np.float32 and got.diagnostics == {}
    return got.reference.tolist()


def test_frequency_keeps_the_most_selected_ties_to_the_lowest(reference):
    statistics = reference.fixed_statistics([3, 9, 5, 5])
    assert kept("frequency", statistics, 2) == [1, 2]
    got = group_experts("frequency", GroupRequest(statistics, 2))
    np.testing.assert_array_equal(got.labels, [-1, 0, 1, -1])


def test_random_keeps_a_seeded_choice(reference):
    statistics = reference.fixed_statistics(np.arange(16))
    first = kept("random", statistics, 5, seed=1)
    assert len(first) == 5 and first == sorted(first, reverse=True)  # by falling selections
    assert first == kept("random", statistics, 5, seed=1)
    assert first != kept("random", statistics, 5, seed=2)
    chosen = np.random.default_rng(1).choice(16, 5, replace=False)
    assert set(first) == set(chosen)


def test_seer_keeps_the_largest_sums_of_probabilities(reference):
    statistics = reference.fixed_statistics([9, 1, 5, 2], prob_mass=[1.0, 4.0, 2.0, 3.0])
    # Experts 1 and 3 have 4 and 3; clusters are ordered by selections, 1 and 2.
    assert kept("seer", statistics, 2) == [3, 1]


def test_router_norm_keeps_the_largest_columns(reference):
    # Norms 5, 2, sqrt(5) = 2.24 and sqrt(0.5) = 0.71.
    statistics = reference.fixed_statistics([1, 2, 3, 4])
    assert kept("router_norm", statistics, 2, parameters=LayerParameters(ROUTER, {})) == [2, 0]


def test_router_norm_with_a_base_router_keeps_the_largest_changes(reference):
    # Changes 0, 2, 1 and 0: expert 0, the largest column, has not moved.
    statistics = reference.fixed_statistics([1, 2, 3, 4])
    parameters = LayerParameters(ROUTER, {}, BASE)
    assert kept("router_norm", statistics, 2, parameters=parameters) == [2, 1]


def outputs(reference):
    """Sums of norms 6, 5, 9, 0 and of gated norms 3, 2, 2.7, 0 over 3, 1, 9, 0 tokens."""
    return reference.fixed_statistics(
        [3, 1, 9, 0],
        output_norm=[6.0, 5.0, 9.0, 0.0],
        gated_output_norm=[3.0, 2.0, 2.7, 0.0],
        output_sum=np.zeros((4, 2)),
    )


def test_ean_keeps_the_largest_sums_of_output_norms(reference):
    assert kept("ean", outputs(reference), 1) == [2]
    assert kept("ean", outputs(reference), 2) == [2, 0]


def test_reap_keeps_the_largest_mean_gated_output_norms(reference):
    # Means 3/3 = 1, 2/1 = 2, 2.7/9 = 0.3; an expert without tokens has 0.
    assert kept("reap", outputs(reference), 1) == [1]
    assert kept("reap", outputs(reference), 2) == [0, 1]
    assert kept("reap", outputs(reference), 3) == [2, 0, 1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_ean_and_reap_scores_are_those_of_real_tokens(reference, top_k):
    generator = np.random.default_rng(3)
    h, values = generator.normal(size=(50, 5)), generator.normal(size=(50, 5, 3))
    values *= np.array([1.0, 4.0, 2.0, 0.5, 3.0])[:, None]
    p = reference.softmax(h)
    chosen = (-h).argsort(axis=1)[:, :top_k]
    routed = [np.flatnonzero((chosen == z).any(axis=1)) for z in range(5)]
    norms = [np.linalg.norm(values[rows, z], axis=-1) for z, rows in enumerate(routed)]
    ean = [norm.sum() for norm in norms]
    reap = [(p[rows, z] * norms[z]).mean() for z, rows in enumerate(routed)]
    statistics = reference.statistics(h, top_k, outputs=values)
    for method, score in (("ean", ean), ("reap", reap)):
        for count in (1, 2, 4):
            best = set(np.argsort(-np.array(score))[:count].tolist())
            assert set(kept(method, statistics, count)) == best
