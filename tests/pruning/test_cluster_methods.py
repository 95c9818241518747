"""Every merging method on numbers that can be checked by eye, and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.cluster.hierarchy

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.methods import (
    GroupingOptions,
    GroupRequest,
    LayerParameters,
    group_experts,
)
from uncurl_jax.pruning.plan import make_plan

PLANTED = np.array([0, 1, 2, 0, 1, 2, 0, 0])
# Cosines between four experts.
SIMILARITY = [[1, 0.9, 0.2, 0.1], [0.9, 1, 0.3, 0.2], [0.2, 0.3, 1, 0.8], [0.1, 0.2, 0.8, 1]]


def group(method, statistics, num_clusters, parameters=None, **options):
    request = GroupRequest(
        statistics, num_clusters, options=GroupingOptions(**options), parameters=parameters
    )
    return group_experts(method, request)


def test_uncurl_worked_by_hand(reference):
    # Two tokens; experts 0, 1 and 2, 3 have equal logits: cosines 1 inside, 0 between.
    h = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]])
    statistics = reference.statistics(h)._replace(selected=np.array([1.0, 1, 6, 2]))
    got = group("uncurl", statistics, 2)
    np.testing.assert_array_equal(got.labels, [1, 1, 0, 0])  # 8 selections before 2
    np.testing.assert_array_equal(got.reference, [2, 0])  # the tie of 0 and 1 goes to 0
    np.testing.assert_allclose(got.weights, [0.5, 0.5, 0.75, 0.25])
    # A = 1 inside and 1/2 between: Laplacian eigenvalues 0, 1, 3/2, 3/2.
    assert got.diagnostics == {
        "eigengap": pytest.approx(0.5),
        "silhouette": pytest.approx(1.0),
        "seed_stability": 1.0,
    }


@pytest.mark.parametrize("assign_labels", ["kmeans", "cluster_qr"])
def test_uncurl_recovers_planted_clusters_and_says_how_clear_they_are(reference, assign_labels):
    statistics = reference.statistics(reference.planted_logits(0, PLANTED))
    got = group("uncurl", statistics, 3, assign_labels=assign_labels)
    assert reference.same_partition(got.labels, PLANTED)
    assert got.diagnostics["silhouette"] > 0.5 and got.diagnostics["eigengap"] > 0.05
    # cluster_qr has no random start, so there is nothing to be stable under.
    assert got.diagnostics.get("seed_stability") == (1.0 if assign_labels == "kmeans" else None)


def test_uncurl_of_experts_without_clusters_depends_on_the_seed_and_says_so(reference):
    h = np.random.default_rng(0).normal(size=(400, 24))
    got = group("uncurl", reference.statistics(h), 8)
    assert got.diagnostics["seed_stability"] < 0.9
    assert got.diagnostics["silhouette"] < 0.25


def test_uncurl_references_are_most_selected_and_weights_are_frequencies(reference):
    statistics = reference.statistics(reference.planted_logits(0, PLANTED))
    selected = np.array([4.0, 1, 2, 4, 3, 2, 0, 0])
    got = group("uncurl", statistics._replace(selected=selected), 3)
    # clusters by falling sums: {0, 3, 6, 7} 8, then {1, 4} and {2, 5} with 4 each
    np.testing.assert_array_equal(got.labels, [0, 1, 2, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(got.reference, [0, 4, 2])
    np.testing.assert_allclose(got.weights, [0.5, 0.25, 0.5, 0.5, 0.75, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("merge_weights", "expected"),
    [
        ("frequency", [0.8, 0.2, 1.0]),  # 4 and 1 selections
        ("gate_mass", [0.5, 0.5, 1.0]),  # gates of 3 and 3
        ("uniform", [0.5, 0.5, 1.0]),
    ],
)
def test_merge_weights_worked_by_hand(reference, merge_weights, expected):
    h = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    statistics = reference.statistics(h)._replace(
        selected=np.array([4.0, 1, 2]), gate_mass=np.array([3.0, 3, 1])
    )
    got = group("uncurl", statistics, 2, merge_weights=merge_weights)
    np.testing.assert_allclose(got.weights, expected)
    np.testing.assert_array_equal(got.reference, [0, 2])  # by selections, whatever the weights


def test_gate_mass_differs_from_uniform_where_gates_differ(reference):
    h = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    statistics = reference.statistics(h)._replace(
        selected=np.array([4.0, 1, 2]), gate_mass=np.array([1.0, 3, 1])
    )
    got = group("uncurl", statistics, 2, merge_weights="gate_mass")
    np.testing.assert_allclose(got.weights, [0.25, 0.75, 1.0])


def test_a_dead_cluster_has_equal_weights_and_its_lowest_member_as_reference(reference):
    statistics = reference.statistics(reference.planted_logits(0, PLANTED))
    got = group("uncurl", statistics._replace(selected=np.zeros(8)), 3)
    np.testing.assert_array_equal(got.labels, PLANTED)
    np.testing.assert_array_equal(got.reference, [0, 1, 2])
    np.testing.assert_allclose(got.weights, [0.25, 0.5, 0.5, 0.25, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("method", ["frequency_merge", "mc_smoe"])
def test_centres_are_the_most_selected_and_others_join_the_most_similar(reference, method):
    got = group(method, reference.fixed_statistics([5, 1, 1, 7], SIMILARITY), 2)
    # Centres 3 and 0; expert 1 is most like 0, expert 2 most like 3.
    np.testing.assert_array_equal(got.labels, [1, 1, 0, 0])
    np.testing.assert_array_equal(got.reference, [3, 0])
    np.testing.assert_allclose(got.weights, [5 / 6, 1 / 6, 1 / 8, 7 / 8])


def test_an_expert_between_two_centres_joins_the_busier_one(reference):
    similarity = np.eye(3)
    similarity[1, [0, 2]] = similarity[[0, 2], 1] = 0.5
    got = group("frequency_merge", reference.fixed_statistics([3, 0, 7], similarity), 2)
    np.testing.assert_array_equal(got.labels, [1, 0, 0])


def test_a_cap_sends_the_least_attached_expert_to_another_centre(reference):
    similarity = np.eye(4)
    # Both 2 and 3 are most like centre 0; 3 loses less by joining centre 1.
    for expert, (first, second) in ((2, (0.9, 0.1)), (3, (0.8, 0.7))):
        similarity[expert, :2] = similarity[:2, expert] = first, second
    statistics = reference.fixed_statistics([9, 8, 1, 1], similarity)
    np.testing.assert_array_equal(group("frequency_merge", statistics, 2).labels, [0, 1, 0, 0])
    capped = group("frequency_merge", statistics, 2, max_cluster_size=2)
    np.testing.assert_array_equal(capped.labels, [0, 1, 0, 1])


def test_mc_smoe_divides_one_number_by_normalised_usage(reference):
    # Usage over the layer's largest: 1, .5, .25, .125 and 1, .9, .8, .7; the four largest of both
    # layers are 1, 1, .9 and .8.
    statistics = reference.router_statistics(
        {
            0: reference.fixed_statistics([8, 4, 2, 1], SIMILARITY),
            1: reference.fixed_statistics([10, 9, 8, 7], SIMILARITY),
        },
        (4, 4),
    )
    assert make_plan(statistics, num_experts=2, method="mc_smoe").num_experts == (1, 3)
    assert make_plan(statistics, num_experts=(2, 2), method="mc_smoe").num_experts == (2, 2)
    assert make_plan(statistics, num_experts=2, method="frequency_merge").num_experts == (2, 2)
    total = make_plan(statistics, total_experts=4, method="frequency_merge")
    assert total.num_experts == (1, 3)


def means(reference, points, selected=None):
    """Statistics whose mean outputs over 40 tokens are `points`."""
    points = np.asarray(points, float)
    selected = np.ones(len(points)) if selected is None else selected
    return reference.fixed_statistics(selected, all_output_sum=40 * points)


def test_hc_smoe_worked_by_hand(reference):
    statistics = means(reference, [[0.0], [1.0], [10.0], [12.0], [30.0]], [1, 1, 1, 1, 9])
    np.testing.assert_array_equal(group("hc_smoe", statistics, 4).labels, [1, 1, 2, 3, 0])
    np.testing.assert_array_equal(group("hc_smoe", statistics, 3).labels, [1, 1, 2, 2, 0])
    # The means of distances: {0, 1} to {10, 12} (10 + 12 + 9 + 11) / 4 = 10.5, {10, 12} to {30} 19.
    got = group("hc_smoe", statistics, 2)
    np.testing.assert_array_equal(got.labels, [1, 1, 1, 1, 0])
    np.testing.assert_allclose(got.weights, [0.25, 0.25, 0.25, 0.25, 1.0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_clusters", [1, 3, 7, 12])
def test_hc_smoe_equals_scipys_flat_clusters(reference, seed, num_clusters):
    points = np.random.default_rng(seed).normal(size=(12, 4))
    tree = scipy.cluster.hierarchy.average(points)
    expected = scipy.cluster.hierarchy.fcluster(tree, num_clusters, "maxclust")
    got = group("hc_smoe", means(reference, points), num_clusters)
    assert reference.same_partition(got.labels, expected)


def test_hc_smoe_is_not_aligned_unless_asked_for(reference):
    statistics = reference.router_statistics(
        {0: means(reference, np.random.default_rng(0).normal(size=(5, 2)))}, (5,)
    )
    assert make_plan(statistics, num_experts=2, method="hc_smoe").alignment == "none"
    asked = make_plan(statistics, num_experts=2, method="hc_smoe", alignment="features")
    assert asked.alignment == "features"
    assert make_plan(statistics, num_experts=2).alignment == "features"


def test_weight_groups_experts_by_the_cosine_of_their_weights(reference):
    # Flattened weights (1, 0 | 0), (0, 1 | 0), (2, 0 | 0), (0, 5 | 0): length plays no part.
    wi = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[2.0, 0.0]], [[0.0, 5.0]]], np.float32)
    experts = {"wi": wi, "wo": np.zeros((4, 2, 1), np.float32)}
    parameters = LayerParameters(np.zeros((1, 4)), experts)
    got = group("weight", reference.fixed_statistics([1, 5, 2, 3]), 2, parameters)
    np.testing.assert_array_equal(got.labels, [1, 0, 1, 0])
    np.testing.assert_array_equal(got.reference, [1, 2])
    assert got.diagnostics["silhouette"] == pytest.approx(1.0)


def test_protected_experts_stay_alone_by_the_rule_of_equal_shares(reference):
    # Of 100 selections 40 and 34 are at least 1/3: both would be protected, and are with D = 3.
    h = reference.planted_logits(0, np.array([0, 0, 1, 1, 2, 2]))
    statistics = reference.statistics(h)._replace(selected=np.array([40.0, 34, 10, 6, 5, 5]))
    got = group("uncurl_protected", statistics, 3)
    assert got.diagnostics["num_protected"] == 2
    np.testing.assert_array_equal(got.labels, [0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(got.weights[2:], np.array([10, 6, 5, 5]) / 26, rtol=1e-6)
    # 1/4 for D = 4: the same two, and two clusters of the tail.
    got = group("uncurl_protected", statistics, 4)
    np.testing.assert_array_equal(got.labels, [0, 1, 2, 2, 3, 3])
    # 1/2 for D = 2: none, so that all are clustered.
    assert group("uncurl_protected", statistics, 2).diagnostics["num_protected"] == 0


def test_the_number_of_protected_experts_may_be_given(reference):
    h = reference.planted_logits(0, np.array([0, 0, 1, 1, 2, 2]))
    statistics = reference.statistics(h)._replace(selected=np.array([40.0, 34, 10, 6, 5, 5]))
    one = group("uncurl_protected", statistics, 4, num_protected=1)
    # Expert 0 alone; expert 1 and the two pairs are the clusters of the tail.
    np.testing.assert_array_equal(one.labels, [0, 1, 2, 2, 3, 3])
    none = group("uncurl_protected", statistics, 3, num_protected=0)
    plain = group("uncurl", statistics, 3)
    np.testing.assert_array_equal(none.labels, plain.labels)


def test_with_all_places_protected_the_others_join_the_nearest_kept_expert(reference):
    statistics = reference.fixed_statistics([5, 1, 1, 7], SIMILARITY)
    got = group("uncurl_protected", statistics, 2, num_protected=2)
    np.testing.assert_array_equal(got.labels, [1, 1, 0, 0])
    np.testing.assert_array_equal(got.reference, [3, 0])


def test_protecting_never_takes_every_place_by_itself(reference):
    got = group("uncurl_protected", reference.fixed_statistics([5, 5, 0, 0]), 2)
    assert got.diagnostics["num_protected"] == 1  # both have the share 1/2


def test_a_cap_leaves_room_for_the_experts_that_are_not_protected(reference):
    # With D = 3 and at most 2 in a cluster, no expert of six can be alone; with 3, one can.
    statistics = reference.fixed_statistics([40, 34, 10, 6, 5, 5])
    for cap, protected in ((2, 0), (3, 1), (4, 2), (None, 2)):
        got = group("uncurl_protected", statistics, 3, max_cluster_size=cap)
        assert got.diagnostics["num_protected"] == protected
        assert np.bincount(got.labels).max() <= (cap or 6)
    with pytest.raises(InputError, match="got 3 for 4 in 1 clusters: protect at most 1 or raise"):
        group("uncurl_protected", statistics, 3, max_cluster_size=3, num_protected=2)


def test_more_protected_experts_than_places_are_refused(reference):
    with pytest.raises(InputError, match="got 3 for 2: protect fewer experts"):
        group("uncurl_protected", reference.fixed_statistics([3, 2, 1, 1]), 2, num_protected=3)


def test_a_composite_plan_has_another_method_in_each_layer(reference):
    sums = reference.statistics(reference.planted_logits(0, PLANTED))
    sums = sums._replace(selected=np.array([9.0, 8, 7, 1, 1, 1, 1, 1]))
    statistics = reference.router_statistics({0: sums, 2: sums, 3: sums}, (8, 0, 8, 8))
    plan = make_plan(
        statistics, num_experts=3, method="composite", layer_methods=("frequency", "uncurl")
    )
    assert plan.method == "composite"
    assert [layer.method for layer in plan.layers] == ["frequency", "uncurl", "uncurl"]
    assert plan.layers[0].labels == (0, 1, 2, -1, -1, -1, -1, -1)
    assert reference.same_partition(plan.layers[1].labels, PLANTED)
    assert plan.alignment == "features"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "composite"}, r"one to 2 names for MoE layers \[0, 1\], got \[\]"),
        ({"method": "composite", "layer_methods": ["seer"] * 3}, "one to 2 names for MoE layers"),
        ({"method": "composite", "layer_methods": ["sear"]}, r"got 'sear'; did you mean seer"),
        ({"method": "composite", "layer_methods": ["composite"]}, "got 'composite'"),
        ({"layer_methods": ["seer"]}, "must come with method 'composite', got method 'uncurl'"),
    ],
)
def test_composites_that_break_a_rule_are_refused(reference, options, message):
    sums = reference.fixed_statistics([1, 2, 3])
    statistics = reference.router_statistics({0: sums, 1: sums}, (3, 3))
    with pytest.raises(InputError, match=message):
        make_plan(statistics, num_experts=2, **options)
