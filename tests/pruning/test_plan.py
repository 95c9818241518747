from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import budgets, methods
from uncurl_jax.pruning.plan import PruningPlan, expected_drop, make_plan

PLANTED = np.array([0, 1, 2, 0, 1, 2, 0, 0])


@pytest.fixture(scope="module")
def statistics(reference):
    """Layers 0 and 2 of three have 8 and 6 experts."""
    return reference.router_statistics(
        {
            0: reference.statistics(reference.planted_logits(0, PLANTED)),
            2: reference.statistics(reference.planted_logits(1, PLANTED[:6])),
        },
        (8, 0, 6),
    )


def test_a_plan_records_its_options_and_source(statistics):
    plan = make_plan(statistics, num_experts=3, router="mean", gate_compensation=True, seed=7)
    assert (plan.method, plan.router, plan.alignment) == ("uncurl", "mean", "features")
    assert plan.grouping == methods.GroupingOptions()
    assert plan.seed == 7 and plan.gate_compensation
    assert plan.source.statistics_hash == statistics.hash
    assert plan.source.tokens == 400 and plan.source.task == "superglue_rte"
    assert plan.num_experts == (3, 0, 3)
    assert [layer.layer for layer in plan.layers] == [0, 2]
    assert plan.layers[0].cluster_sizes == tuple(np.bincount(plan.layers[0].labels))
    assert sum(plan.layers[0].selected) == 400
    assert len(plan.layers[0].gate_factors or ()) == 3
    assert [layer.method for layer in plan.layers] == ["uncurl", "uncurl"]
    assert plan.layers[0].fitted_router is None


def test_a_plan_records_how_the_method_worked(statistics):
    options = {
        "affinity": "pearson",
        "assign_labels": "cluster_qr",
        "merge_weights": "uniform",
        "max_cluster_size": 4,
        "num_protected": 1,
    }
    plan = make_plan(
        statistics, num_experts=3, method="uncurl_protected", alignment="unit_features", **options
    )
    assert plan.grouping == methods.GroupingOptions(**options)
    assert plan.alignment == "unit_features"
    assert max(plan.layers[0].cluster_sizes) <= 4
    for layer in plan.layers:
        expected = {z: 1 / layer.cluster_sizes[c] for z, c in enumerate(layer.labels)}
        np.testing.assert_allclose(layer.weights, list(expected.values()), rtol=1e-6)


def test_each_layer_has_its_prediction_and_verdict(statistics):
    plan = make_plan(statistics, num_experts=3)
    for layer in plan.layers:
        load = np.bincount(layer.labels, layer.selected) / 400
        np.testing.assert_allclose(layer.diagnostics["predicted_load"], load)
        assert layer.diagnostics["dead_experts"] == []
        assert {"eigengap", "silhouette", "seed_stability"} < set(layer.diagnostics)
        assert layer.verdict.partition(":")[0] in ("good", "caution", "poor")


def test_dead_experts_are_listed(reference):
    sums = reference.fixed_statistics([5, 0, 3, 0])
    statistics = reference.router_statistics({0: sums}, (4,))
    plan = make_plan(statistics, num_experts=2, method="frequency")
    assert plan.layers[0].diagnostics["dead_experts"] == [1, 3]


def test_each_moe_layer_may_have_its_own_count(statistics):
    assert make_plan(statistics, num_experts=(5, 2)).num_experts == (5, 0, 2)
    count: Any = np.int64(2)
    assert make_plan(statistics, num_experts=count).num_experts == (2, 0, 2)
    assert make_plan(statistics, num_experts=(4, 2), multiple_of=2).num_experts == (4, 0, 2)


@pytest.mark.parametrize("method", ["uncurl", "seer", "mc_smoe"])
def test_a_total_is_divided_among_the_layers(statistics, method):
    plan = make_plan(statistics, total_experts=10, multiple_of=2, method=method)
    counts = budgets.allocate(statistics.layers, 10, minimum=1, multiple_of=2)
    assert plan.num_experts == (counts[0], 0, counts[2])
    assert sum(plan.num_experts) == 10


def test_layers_draw_different_random_experts(reference):
    one = reference.statistics(np.random.default_rng(0).normal(size=(50, 20)))
    statistics = reference.router_statistics({0: one, 1: one}, (20, 20))
    plan = make_plan(statistics, num_experts=10, method="random")
    assert plan.layers[0].labels != plan.layers[1].labels


@pytest.mark.parametrize("method", ["uncurl", "uncurl_protected", "random", "frequency_merge"])
@pytest.mark.parametrize("affinity", ["cosine", "pearson", "centered"])
def test_the_same_inputs_give_the_same_bytes(statistics, tmp_path, method, affinity):
    for name in ("a", "b"):
        plan = make_plan(statistics, num_experts=3, method=method, affinity=affinity, seed=5)
        plan.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(max_examples=20, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 8), st.integers(1, 6)),
    method=st.sampled_from(["uncurl", "random", "mc_smoe", "uncurl_protected"]),
    router=st.sampled_from(["reinit", "reference", "mean", "remap"]),
    assign_labels=st.sampled_from(["kmeans", "cluster_qr"]),
    compensate=st.booleans(),
    factor=st.sampled_from([None, 1.0, 2]),
    seed=st.integers(0, 9),
)
def test_every_plan_survives_json(
    statistics, counts, method, router, assign_labels, compensate, factor, seed
):
    assume((method, router) != ("random", "remap"))
    plan = make_plan(
        statistics,
        num_experts=counts,
        method=method,
        router=router,
        assign_labels=assign_labels,
        gate_compensation=compensate and router not in ("reinit", "remap"),
        eval_capacity_factor=factor,
        seed=seed,
    )
    read = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert read == plan and read.hash == plan.hash


def test_expected_drop_worked_by_hand():
    # Loads 80 % and 20 % of two clusters with room for 50 % each at factor 1, 60 % at 1.2.
    labels, selected = np.array([0, 0, 1]), np.array([50.0, 30.0, 20.0])
    assert expected_drop(labels, selected, 1.0) == pytest.approx(0.3)
    assert expected_drop(labels, selected, 1.2) == pytest.approx(0.2)
    assert expected_drop(labels, selected, None) == 0.0
    # A dropped expert's tokens spread in proportion: 50 to 20.
    assert expected_drop(np.array([0, -1, 1]), selected, 1.0) == pytest.approx(5 / 7 - 0.5)
    assert expected_drop(labels, np.zeros(3), 1.0) == 0.0


def test_overflow_and_dead_clusters_are_warned_about(reference):
    h = reference.planted_logits(0, PLANTED)
    sums = reference.statistics(h)._replace(selected=np.array([300.0, 100, 0, 0, 0, 0, 0, 0]))
    statistics = reference.router_statistics({0: sums}, (8,))
    plan = make_plan(statistics, num_experts=3)
    assert plan.layers[0].expected_drop_fraction == pytest.approx(0.75 - 1 / 3)
    dead, drop = plan.warnings
    assert dead == (
        "Layer 0: no token selected an expert of cluster 2 ([2, 5]); its members are merged with "
        "equal weights."
    )
    assert "about 41.7 % of the assignments would overflow at capacity factor 1.0" in drop
    kept = make_plan(statistics, num_experts=3, method="frequency", eval_capacity_factor=None)
    assert kept.warnings == ("Layer 0: no token selected expert 2, which is kept as cluster 2.",)


def test_unrelated_layers_of_a_plan_are_refused(statistics):
    plan = make_plan(statistics, num_experts=3)
    assert plan.layer(2).num_experts == 6
    with pytest.raises(InputError, match=r"cover layer 1, got layers \[0, 2\]"):
        plan.layer(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 7}, r"lie in \[1, 6\] in layer 2, got 7"),
        ({"num_experts": 0}, r"lie in \[1, 8\] in layer 0, got 0"),
        ({"num_experts": (3, 9)}, r"lie in \[1, 6\] in layer 2, got 9"),
        ({"num_experts": (3, 0, 3)}, r"got 3 numbers for MoE layers \[0, 2\]: give 2 or one"),
        ({"method": "uncurled"}, r"method must be .* got 'uncurled'; did you mean uncurl"),
        ({"router": "referense"}, r"router must be .*; did you mean reference"),
        ({"affinity": "pearsn"}, r"affinity must be .*; did you mean pearson\?"),
        ({"router": "reinit", "gate_compensation": True}, "got router 'reinit'"),
        ({"router": "remap", "gate_compensation": True}, "whose gates are the old ones"),
        (
            {"router": "remap", "method": "seer"},
            "got dropped experts in layer 0 from method 'seer'",
        ),
        ({"router": "fit"}, "needs the checkpoint and a sample of its layers' inputs"),
        ({"alignment": "feature"}, r"alignment must be .* did you mean features"),
        ({"assign_labels": "qr"}, "assign_labels must be one of"),
        ({"merge_weights": "gate"}, "merge_weights must be one of"),
        ({"max_cluster_size": 2}, r"got 2 \* 3 for 8: raise the cap"),
        ({"num_protected": 4, "method": "uncurl_protected"}, "got 4 for 3: protect fewer"),
        ({"total_experts": 8}, "got 3 and 8: give one of them"),
        ({"num_experts": None}, "got None and None: give one of them"),
        ({"num_experts": None, "total_experts": 15}, "and 14, got 15"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"multiple_of": 2}, "must be a multiple of multiple_of=2, got 3 in layer 0"),
        ({"method": "reap"}, "needs the statistics outputs, which were not collected"),
        ({"method": "router_norm"}, "needs the checkpoint's weights, got statistics alone"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"eval_capacity_factor": 0.0}, "eval_capacity_factor must be positive"),
        ({"eval_capacity_factor": float("nan")}, "eval_capacity_factor must be positive"),
    ],
)
def test_options_that_break_a_rule_are_refused(statistics, options, message):
    with pytest.raises(InputError, match=message):
        make_plan(statistics, **{"num_experts": 3, **options})


def test_fewer_experts_than_top_k_are_refused(reference):
    h = np.random.default_rng(0).normal(size=(20, 6))
    statistics = reference.router_statistics({0: reference.statistics(h, 4)}, (6,), top_k=4)
    with pytest.raises(InputError, match=r"num_experts\[0\]=3 is below num_selected_experts=4"):
        make_plan(statistics, num_experts=3)


def test_partial_statistics_are_refused(reference):
    h = np.random.default_rng(0).normal(size=(20, 6))
    partial = reference.router_statistics(
        {0: reference.statistics(h)}, (6,), is_complete=False, batches=3
    )
    with pytest.raises(InputError, match="got a partial file of 3 batches"):
        make_plan(partial, num_experts=3)


def test_methods_read_the_weights_of_their_layer(reference, statistics):
    weights = reference.weights(
        {0: np.arange(8.0)[None], 2: np.array([[5.0, 0, 0, 9, 0, 7]])},
        base_routers={2: np.array([[0.0, 0, 8, 9, 0, 0]])},
    )
    plan = make_plan(statistics, num_experts=2, method="router_norm", weights=weights)
    assert set(plan.layers[0].reference) == {6, 7}
    assert set(plan.layers[1].reference) == {2, 5}  # changes 5, 0, 8, 0, 0, 7


def test_the_weights_of_experts_are_read_only_by_methods_that_need_them(reference, statistics):
    generator = np.random.default_rng(0)
    routers = {0: generator.normal(size=(4, 8)), 2: generator.normal(size=(4, 6))}
    experts = {0: reference.experts(generator, 8), 2: reference.experts(generator, 6)}
    plan = make_plan(
        statistics,
        num_experts=3,
        method="weight",
        weights=reference.weights(routers, experts),
    )
    assert plan.num_experts == (3, 0, 3)
    only_routers = reference.weights(routers)  # experts() would raise KeyError
    assert make_plan(statistics, num_experts=3, method="router_norm", weights=only_routers)
