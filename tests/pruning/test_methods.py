"""The registry, and what holds for every method in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import clustering, methods
from uncurl_jax.pruning.grouping import Grouping
from uncurl_jax.pruning.methods import (
    GroupingOptions,
    GroupRequest,
    LayerParameters,
    Method,
    group_experts,
)

METHODS = (
    "ean",
    "frequency",
    "frequency_merge",
    "hc_smoe",
    "mc_smoe",
    "random",
    "reap",
    "router_norm",
    "seer",
    "uncurl",
    "uncurl_protected",
    "weight",
)
MERGING = ("frequency_merge", "hc_smoe", "mc_smoe", "uncurl", "uncurl_protected", "weight")


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


def layer_of(reference, seed, num_experts, tokens=30):
    """Returns (statistics with every optional sum, parameters) of a random layer."""
    generator = np.random.default_rng(seed)
    h = generator.normal(size=(tokens, num_experts))
    outputs = generator.normal(size=(tokens, num_experts, 3))
    router = generator.normal(size=(4, num_experts)).astype(np.float32)
    experts = reference.experts(generator, num_experts, embed=3, mlp=4)
    return reference.statistics(h, outputs=outputs), LayerParameters(router, experts)


def test_the_methods_are_those_of_the_documentation():
    assert methods.method_names() == METHODS
    assert all(methods.get_method(name).summary for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_as_many_clusters_as_experts_keeps_everyone(reference, name):
    statistics, parameters = layer_of(reference, 0, 4)
    statistics = statistics._replace(selected=np.array([3.0, 9, 5, 7]))
    got = group_experts(name, GroupRequest(statistics, 4, parameters=parameters))
    np.testing.assert_array_equal(got.labels, [3, 0, 2, 1])
    np.testing.assert_array_equal(got.reference, [1, 3, 2, 0])
    np.testing.assert_array_equal(got.weights, np.ones(4))


@pytest.mark.parametrize("name", MERGING)
def test_one_cluster_holds_everyone(reference, name):
    statistics, parameters = layer_of(reference, 0, 5)
    got = group_experts(name, GroupRequest(statistics, 1, parameters=parameters))
    np.testing.assert_array_equal(got.labels, np.zeros(5))
    np.testing.assert_allclose(got.weights, statistics.selected / 30, rtol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(METHODS),
    affinity=st.sampled_from(["cosine", "pearson", "centered"]),
    assign_labels=st.sampled_from(["kmeans", "cluster_qr", "cluster_qr"]),
    merge_weights=st.sampled_from(["frequency", "gate_mass", "uniform"]),
    num_experts=st.integers(1, 9),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_every_grouping_is_well_formed(
    reference, name, affinity, assign_labels, merge_weights, num_experts, seed, data
):
    num_clusters = data.draw(st.integers(1, num_experts))
    least = -(-num_experts // num_clusters)
    cap = data.draw(st.none() | st.integers(least, num_experts))
    options = GroupingOptions(affinity, assign_labels, merge_weights, cap)
    statistics, parameters = layer_of(reference, seed, num_experts, tokens=15)
    request = GroupRequest(statistics, num_clusters, seed, options, parameters)
    got = group_experts(name, request)
    labels = got.labels
    assert labels.dtype == np.int64 and got.weights.dtype == np.float32
    assert set(labels) - {-1} == set(range(num_clusters))
    assert (-1 in labels) == (name not in MERGING and num_clusters < num_experts)
    np.testing.assert_array_equal(labels, clustering.canonical_labels(labels, request.selected))
    np.testing.assert_array_equal(labels[got.reference], np.arange(num_clusters))
    for cluster in range(num_clusters):
        members = labels == cluster
        assert got.weights[members].sum() == pytest.approx(1.0, abs=1e-6)
        assert statistics.selected[got.reference[cluster]] == statistics.selected[members].max()
        assert cap is None or members.sum() <= cap
    assert not got.weights[labels < 0].any()
    again = group_experts(name, request)
    np.testing.assert_array_equal(again.labels, labels)
    assert again.diagnostics == got.diagnostics


def permuted(fields: Any, order):
    """The statistics of the same tokens with expert order[i] at place i."""

    def move(name, array):
        if array is None or np.ndim(array) == 0:
            return array
        is_square = name in ("gram", "coactivation", "routed_prob")
        return array[np.ix_(order, order)] if is_square else array[order]

    return type(fields)(**{name: move(name, array) for name, array in fields._asdict().items()})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_permuting_the_experts_permutes_the_grouping_and_nothing_else(reference, name, seed):
    statistics, parameters = layer_of(reference, seed, 9, tokens=60)
    generator = np.random.default_rng(100 + seed)
    statistics = statistics._replace(selected=2.0 ** generator.permutation(9))
    order = generator.permutation(9)
    base = group_experts(name, GroupRequest(statistics, 4, parameters=parameters))
    moved = LayerParameters(
        parameters.router[:, order],
        {key: array[order] for key, array in parameters.experts.items()},
    )
    request = GroupRequest(permuted(statistics, order), 4, parameters=moved)
    got = group_experts(name, request)
    np.testing.assert_array_equal(got.labels, base.labels[order])
    np.testing.assert_array_equal(order[got.reference], base.reference)
    np.testing.assert_array_equal(got.weights, base.weights[order])


def test_an_unknown_method_names_the_nearest(reference):
    request = GroupRequest(reference.fixed_statistics([1, 2]), 1)
    with pytest.raises(InputError, match=r"got 'frequncy'; did you mean frequency"):
        group_experts("frequncy", request)
    with pytest.raises(InputError, match="method must be one of"):
        group_experts("composite", request)


@pytest.mark.parametrize("num_clusters", [0, 3])
def test_counts_outside_the_layer_are_refused(reference, num_clusters):
    request = GroupRequest(reference.fixed_statistics([1, 2]), num_clusters)
    with pytest.raises(InputError, match=rf"lie in \[1, 2\], got {num_clusters}"):
        group_experts("random", request)


def test_a_cap_that_cannot_hold_all_experts_is_refused(reference):
    options = GroupingOptions(max_cluster_size=2)
    request = GroupRequest(reference.fixed_statistics([1, 2, 3, 4, 5]), 2, options=options)
    with pytest.raises(InputError, match=r"got 2 \* 2 for 5: raise the cap or keep more"):
        group_experts("uncurl", request)


@pytest.mark.parametrize("name", ["router_norm", "weight"])
def test_methods_that_look_at_weights_need_them(reference, name):
    with pytest.raises(InputError, match=f"Method '{name}' needs the checkpoint's weights"):
        group_experts(name, GroupRequest(reference.fixed_statistics([1, 2]), 1))


@pytest.mark.parametrize(
    ("name", "group"), [("ean", "outputs"), ("reap", "outputs"), ("hc_smoe", "all_outputs")]
)
def test_methods_that_look_at_outputs_need_them(reference, name, group):
    message = (
        f"Method '{name}' needs the statistics {group}, which were not collected: calibrate "
        f"again with --collect {group}"
    )
    with pytest.raises(InputError, match=message):
        group_experts(name, GroupRequest(reference.fixed_statistics([1, 2]), 1))


def test_a_method_of_ones_own_joins_the_registry(reference, registered):
    def evens(request: GroupRequest) -> Grouping:
        return methods.keep(request.selected, np.arange(request.num_clusters) * 2)

    registered(Method("test_evens", evens, "keep the even experts"))
    assert "test_evens" in methods.method_names()
    got = group_experts("test_evens", GroupRequest(reference.fixed_statistics([1, 2, 3]), 2))
    np.testing.assert_array_equal(got.labels, [1, -1, 0])


@pytest.mark.parametrize("name", ["uncurl", "composite"])
def test_two_methods_of_one_name_are_refused(registered, name):
    method = Method(name, methods.get_method("uncurl").group, "again")
    with pytest.raises(InputError, match=f"name must be new, got '{name}'"):
        registered(method)


RETURNED = Grouping(np.array([0, 1, 0, -1]), np.array([0, 1]), np.array([0.5, 1, 0.5, 0]), {})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "labels, reference, weights and diagnostics, got NoneType"),
        (tuple(RETURNED), "labels, reference, weights and diagnostics, got tuple"),
        (RETURNED._replace(labels=np.array([0, 1, 0])), "4 whole labels"),
        (RETURNED._replace(labels=np.array([0.0, 1, 0, -1])), "4 whole labels"),
        (RETURNED._replace(labels=np.array([0, 0, 0, -1])), r"cover 0\.\.1, got \[-1, 0\]"),
        (RETURNED._replace(labels=np.array([0, 1, 2, -1])), r"cover 0\.\.1, got \[-1, 0, 1, 2\]"),
        (RETURNED._replace(labels=np.array([0, 1, 0, -2])), r"cover 0\.\.1, got \[-2, 0, 1\]"),
        (RETURNED._replace(reference=np.array([0])), r"2 references in \[0, 4\), got \[0\]"),
        (RETURNED._replace(reference=np.array([0, 4])), r"2 references in \[0, 4\)"),
        (RETURNED._replace(reference=np.array([-4, 1])), r"2 references in \[0, 4\)"),
        (RETURNED._replace(reference=np.array([0.0, 1.0])), r"2 references in \[0, 4\)"),
        (RETURNED._replace(reference=np.array([1, 0])), "references that belong to their clusters"),
        (RETURNED._replace(reference=np.array([3, 1])), "references that belong to their clusters"),
        (RETURNED._replace(weights=np.array([0.5, 1, 0.5])), "4 finite weights >= 0"),
        (RETURNED._replace(weights=np.array([np.nan, 1, 0.5, 0])), "4 finite weights >= 0"),
        (RETURNED._replace(weights=np.array([1.5, 1, -0.5, 0])), "4 finite weights >= 0"),
        (RETURNED._replace(weights=np.array([0.5, 1, 0.4, 0])), "sum to 1 in every cluster"),
        (RETURNED._replace(weights=np.array([0.5, 1, 0.5, 0.1])), "are 0 for dropped experts"),
        (RETURNED._replace(diagnostics=[]), r"diagnostics in a dict that JSON can hold, got \[\]"),
        (RETURNED._replace(diagnostics={"x": np.ones(2)}), "a dict that JSON can hold"),
        (RETURNED._replace(diagnostics={"x": float("nan")}), "a dict that JSON can hold"),
    ],
)
def test_what_is_no_grouping_is_refused_by_rule(reference, registered, returned, message):
    registered(Method("test_wrong", lambda request: returned, "returns nonsense"))
    request = GroupRequest(reference.fixed_statistics([1, 2, 3, 4]), 2)
    with pytest.raises(InputError, match=f"Method 'test_wrong' must return .*{message}"):
        group_experts("test_wrong", request)


def test_a_grouping_that_follows_the_rules_is_passed_on(reference, registered):
    registered(Method("test_right", lambda request: RETURNED, "returns a constant"))
    request = GroupRequest(reference.fixed_statistics([1, 2, 3, 4]), 2)
    assert group_experts("test_right", request) is RETURNED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": "dot"}, "affinity must be one of"),
        ({"assign_labels": "kmean"}, r"assign_labels must be .* did you mean kmeans"),
        ({"merge_weights": "gates"}, r"merge_weights must be one of .*gate_mass"),
        ({"max_cluster_size": 0}, "max_cluster_size must be at least 1, or None, got 0"),
        ({"num_protected": -1}, "num_protected must be at least 0, or None, got -1"),
    ],
)
def test_options_are_checked_even_where_they_are_not_used(options, message):
    with pytest.raises(InputError, match=message):
        GroupingOptions(**options)


def test_the_most_selected_member_of_each_cluster_worked_by_hand():
    got = methods.most_selected([1, 0, 1, -1, 0], [3, 2, 3, 9, 2])
    np.testing.assert_array_equal(got, [1, 0])  # ties to the lowest, dropped ones left out
    assert got.dtype == np.int64


def test_keeping_puts_clusters_in_the_order_of_selections():
    got = methods.keep([3, 9, 5, 7], [0, 2, 3])
    np.testing.assert_array_equal(got.labels, [2, -1, 1, 0])
    np.testing.assert_array_equal(got.reference, [3, 2, 0])
    np.testing.assert_array_equal(got.weights, [1, 0, 1, 1])
