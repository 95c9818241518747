from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import methods
from uncurl_jax.pruning.methods import Grouping, LayerParameters, Method, group_experts

PLANTED = np.array([0, 1, 2, 0, 1, 2, 0, 0])


def with_counts(reference, selected):
    """Statistics of random logits with these counts of selection."""
    h = np.random.default_rng(0).normal(size=(40, len(selected)))
    return reference.statistics(h)._replace(selected=np.asarray(selected, float))


@pytest.fixture
def registered():
    """Registers methods for one test."""
    names = []

    def register(method):
        methods.register_method(method)
        names.append(method.name)

    yield register
    for name in names:
        del methods._METHODS[name]


def test_frequency_keeps_the_most_selected_worked_by_hand(reference):
    got = group_experts("frequency", with_counts(reference, [3, 9, 5, 5]), 2)
    np.testing.assert_array_equal(got.labels, [-1, 0, 1, -1])  # the tie goes to expert 2
    np.testing.assert_array_equal(got.reference, [1, 2])
    np.testing.assert_array_equal(got.weights, [0, 1, 1, 0])
    assert got.weights.dtype == np.float32


def test_random_keeps_a_seeded_choice(reference):
    statistics = with_counts(reference, np.arange(16))
    first = group_experts("random", statistics, 5, seed=1)
    assert (first.labels >= 0).sum() == 5
    np.testing.assert_array_equal(first.labels, group_experts("random", statistics, 5, seed=1)[0])
    assert not np.array_equal(first.labels, group_experts("random", statistics, 5, seed=2)[0])


def test_uncurl_recovers_planted_clusters_and_says_how_clear_they_are(reference):
    h = reference.planted_logits(0, PLANTED)
    got = group_experts("uncurl", reference.statistics(h), 3)
    assert reference.same_partition(got.labels, PLANTED)
    assert set(got.diagnostics) == {"eigengap", "silhouette"}
    assert got.diagnostics["silhouette"] > 0.5 and got.diagnostics["eigengap"] > 0.05


def test_uncurl_references_are_most_selected_and_weights_are_frequencies(reference):
    statistics = reference.statistics(reference.planted_logits(0, PLANTED))
    selected = np.array([4.0, 1, 2, 4, 3, 2, 0, 0])
    got = group_experts("uncurl", statistics._replace(selected=selected), 3)
    # clusters by falling sums: {0, 3, 6, 7} 8, then {1, 4} and {2, 5} with 4 each
    np.testing.assert_array_equal(got.labels, [0, 1, 2, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(got.reference, [0, 4, 2])
    np.testing.assert_allclose(got.weights, [0.5, 0.25, 0.5, 0.5, 0.75, 0.5, 0, 0])


def test_a_dead_cluster_has_equal_weights_and_its_lowest_member_as_reference(reference):
    statistics = reference.statistics(reference.planted_logits(0, PLANTED))
    got = group_experts("uncurl", statistics._replace(selected=np.zeros(8)), 3)
    np.testing.assert_array_equal(got.labels, PLANTED)
    np.testing.assert_array_equal(got.reference, [0, 1, 2])
    np.testing.assert_allclose(got.weights, [0.25, 0.5, 0.5, 0.25, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("name", ["uncurl", "frequency", "random"])
def test_as_many_clusters_as_experts_keeps_everyone(reference, name):
    got = group_experts(name, with_counts(reference, [3, 9, 5, 7]), 4)
    np.testing.assert_array_equal(got.labels, [3, 0, 2, 1])
    np.testing.assert_array_equal(got.reference, [1, 3, 2, 0])
    np.testing.assert_array_equal(got.weights, np.ones(4))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["uncurl", "frequency", "random"]),
    affinity=st.sampled_from(["cosine", "pearson", "centered"]),
    num_experts=st.integers(1, 8),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_every_grouping_is_well_formed(reference, name, affinity, num_experts, seed, data):
    num_clusters = data.draw(st.integers(1, num_experts))
    h = np.random.default_rng(seed).normal(size=(15, num_experts))
    statistics = reference.statistics(h)
    got = group_experts(name, statistics, num_clusters, seed=seed, affinity=affinity)
    assert set(got.labels) - {-1} == set(range(num_clusters))
    np.testing.assert_array_equal(got.labels[got.reference], np.arange(num_clusters))
    for cluster in range(num_clusters):
        members = got.labels == cluster
        assert got.weights[members].sum() == pytest.approx(1.0, abs=1e-6)
        assert statistics.selected[got.reference[cluster]] == statistics.selected[members].max()
    assert not got.weights[got.labels < 0].any()


@pytest.mark.parametrize("name", ["uncurl", "frequency"])
def test_permuting_the_experts_permutes_the_grouping_and_nothing_else(reference, name):
    h = np.random.default_rng(5).normal(size=(60, 9)) + np.linspace(0, 0.5, 9)
    statistics = reference.statistics(h)
    statistics = statistics._replace(selected=2.0 ** np.random.default_rng(1).permutation(9))
    base = group_experts(name, statistics, 4)
    order = np.random.default_rng(2).permutation(9)
    permuted_sums = [
        f if f.ndim == 0 else f[order] if f.ndim == 1 else f[np.ix_(order, order)]
        for f in statistics
    ]
    permuted = group_experts(name, type(statistics)(*permuted_sums), 4)
    np.testing.assert_array_equal(permuted.labels, base.labels[order])
    np.testing.assert_array_equal(order[permuted.reference], base.reference)
    np.testing.assert_array_equal(permuted.weights, base.weights[order])


def test_an_unknown_method_names_the_nearest(reference):
    with pytest.raises(InputError, match=r"got 'frequncy'; did you mean frequency\?"):
        group_experts("frequncy", with_counts(reference, [1, 2]), 1)


def test_an_unknown_affinity_is_refused_even_where_it_is_not_used(reference):
    with pytest.raises(InputError, match="affinity must be one of"):
        group_experts("random", with_counts(reference, [1, 2]), 1, affinity="dot")


@pytest.mark.parametrize("num_clusters", [0, 3])
def test_counts_outside_the_layer_are_refused(reference, num_clusters):
    with pytest.raises(InputError, match=rf"lie in \[1, 2\], got {num_clusters}"):
        group_experts("random", with_counts(reference, [1, 2]), num_clusters)


def test_a_later_method_that_needs_weights_joins_the_registry(reference, registered):
    def router_norm(statistics, num_clusters, *, seed, affinity, parameters) -> Grouping:
        norms = np.linalg.norm(parameters.router, axis=0)
        return methods.keep(np.asarray(statistics.selected), np.argsort(-norms)[:num_clusters])

    registered(Method("test_router_norm", router_norm, "by norm", needs_parameters=True))
    assert "test_router_norm" in methods.method_names()
    statistics = with_counts(reference, [1, 2, 3])
    router = np.array([[5.0, 1.0, 3.0]])
    got = group_experts("test_router_norm", statistics, 2, parameters=LayerParameters(router, {}))
    np.testing.assert_array_equal(got.labels, [1, -1, 0])
    with pytest.raises(InputError, match="needs the checkpoint's weights"):
        group_experts("test_router_norm", statistics, 2)


def test_two_methods_of_one_name_are_refused(registered):
    with pytest.raises(InputError, match="name must be new, got 'uncurl'"):
        registered(methods.get_method("uncurl"))
