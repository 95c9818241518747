from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning import methods
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
    assert (plan.method, plan.router, plan.affinity) == ("uncurl", "mean", "cosine")
    assert plan.seed == 7 and plan.align and plan.gate_compensation
    assert plan.source.statistics_hash == statistics.hash
    assert plan.source.tokens == 400 and plan.source.task == "superglue_rte"
    assert plan.num_experts == (3, 0, 3)
    assert [layer.layer for layer in plan.layers] == [0, 2]
    assert plan.layers[0].cluster_sizes == tuple(np.bincount(plan.layers[0].labels))
    assert sum(plan.layers[0].selected) == 400
    assert len(plan.layers[0].gate_factors or ()) == 3


def test_each_moe_layer_may_have_its_own_count(statistics):
    assert make_plan(statistics, num_experts=(5, 2)).num_experts == (5, 0, 2)
    count: Any = np.int64(2)
    assert make_plan(statistics, num_experts=count).num_experts == (2, 0, 2)


def test_layers_draw_different_random_experts(reference):
    one = reference.statistics(np.random.default_rng(0).normal(size=(50, 20)))
    statistics = reference.router_statistics({0: one, 1: one}, (20, 20))
    plan = make_plan(statistics, num_experts=10, method="random")
    assert plan.layers[0].labels != plan.layers[1].labels


@pytest.mark.parametrize("method", ["uncurl", "random", "frequency"])
@pytest.mark.parametrize("affinity", ["cosine", "pearson", "centered"])
def test_the_same_inputs_give_the_same_bytes(statistics, tmp_path, method, affinity):
    for name in ("a", "b"):
        plan = make_plan(statistics, num_experts=3, method=method, affinity=affinity, seed=5)
        plan.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(max_examples=20, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 8), st.integers(1, 6)),
    method=st.sampled_from(["uncurl", "random", "frequency"]),
    router=st.sampled_from(["reinit", "reference", "mean"]),
    compensate=st.booleans(),
    factor=st.sampled_from([None, 1.0, 2]),
    seed=st.integers(0, 9),
)
def test_every_plan_survives_json(statistics, counts, method, router, compensate, factor, seed):
    plan = make_plan(
        statistics,
        num_experts=counts,
        method=method,
        router=router,
        gate_compensation=compensate and router != "reinit",
        eval_capacity_factor=factor,
        seed=seed,
    )
    read = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert read == plan and read.hash == plan.hash


def test_a_plan_survives_a_file(statistics, tmp_path):
    plan = make_plan(statistics, num_experts=3, gate_compensation=True)
    plan.save(tmp_path / "pruning_plan.json")
    assert PruningPlan.load(tmp_path / "pruning_plan.json") == plan


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
        ({"method": "uncurled"}, r"method must be .* got 'uncurled'; did you mean uncurl\?"),
        ({"router": "referense"}, r"router must be .*; did you mean reference"),
        ({"affinity": "pearsn"}, r"affinity must be .*; did you mean pearson\?"),
        ({"router": "reinit", "gate_compensation": True}, "got router 'reinit'"),
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


def test_a_method_may_allocate_counts_and_look_at_weights(statistics):
    def group(statistics, num_clusters, *, seed, affinity, parameters):
        kept = np.argsort(-parameters.router[0])[:num_clusters]
        return methods.keep(np.asarray(statistics.selected), kept)

    def allocate(layers, num_experts):
        assert sorted(layers) == [0, 2]
        return {0: num_experts + 1, 2: num_experts - 1}

    name = "test_allocating"
    methods.register_method(methods.Method(name, group, "test", True, allocate))
    try:
        plan = make_plan(
            statistics,
            num_experts=3,
            method=name,
            parameters=lambda layer: methods.LayerParameters(np.arange(8.0 - layer)[None], {}),
        )
    finally:
        del methods._METHODS[name]
    assert plan.num_experts == (4, 0, 2)
    assert set(plan.layers[1].reference) == {4, 5}


def edited(plan, change):
    """Returns the plan's dict after `change`, with a hash that fits its new content."""
    values = json.loads(json.dumps(plan.to_dict()))
    change(values)
    content = {key: value for key, value in values.items() if key != "hash"}
    return {**content, "hash": artifacts.sha256_of_json(content)}


def layer_change(**fields):
    def change(values):
        values["layers"][0].update(fields)

    return change


def top_change(**fields):
    def change(values):
        values.update(copy.deepcopy(fields))

    return change


def drop_last_layer(values):
    values["layers"].pop()


def forget_method(values):
    del values["method"]


def forget_labels(values):
    del values["layers"][0]["labels"]


def raise_top_k(values):
    values["source"]["num_selected_experts"] = 4


LABELS = [0, 1, 2, 0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (layer_change(labels=[0, 1, 0, 0, 1, 0, 0, 0]), r"labels must cover 0\.\.2, got \[0, 1\]"),
        (layer_change(labels=LABELS[:-1]), "labels must have 8 entries, got 7"),
        (layer_change(labels=[0.5, *LABELS[1:]]), "labels must be whole numbers"),
        (layer_change(labels="many"), "labels must be a list of finite numbers"),
        (layer_change(labels=[-2, *LABELS[1:]]), "labels must cover"),
        (layer_change(reference=[1, 0, 2]), "reference must be a member of its cluster"),
        (layer_change(reference=[99, 1, 2]), "reference must be a member of its cluster, got 99"),
        (layer_change(reference=[], cluster_sizes=[]), "labels must cover"),
        (layer_change(cluster_sizes=[8, 0, 0]), "cluster_sizes must be"),
        (layer_change(weights=[0.0] * 8), "weights must sum to 1 in every cluster, got 0.0 in 0"),
        (layer_change(weights=[-1.0] * 8), "weights must be 8 numbers >= 0"),
        (layer_change(weights=None), "weights must be a list of finite numbers"),
        (layer_change(selected=[1.0]), "selected must be 8 numbers >= 0"),
        (layer_change(gate_factors=[1.0, 0.0, 1.0]), "gate_factors must be 3 numbers > 0"),
        (layer_change(gate_factors=[1.0, 1.0]), "gate_factors must be 3 numbers > 0"),
        (layer_change(gate_factors=None), "gate_factors must be there with gate_compensation"),
        (layer_change(expected_drop_fraction=2.0), r"must lie in \[0, 1\], got 2.0"),
        (layer_change(expected_drop_fraction="x"), "LayerPlan must have fields of the right types"),
        (layer_change(colour="red"), r"unknown \['colour'\] and missing \[\]"),
        (forget_labels, r"LayerPlan .* missing \['labels'\]"),
        (forget_method, r"PruningPlan .* missing \['method'\]"),
        (top_change(router="remap"), "router must be one of"),
        (top_change(affinity="dot"), "affinity must be one of"),
        (top_change(router="reinit"), "gate_compensation must be off with router 'reinit'"),
        (top_change(gate_compensation=False), "gate_factors must be there with gate_compensation"),
        (top_change(layers=None), "must have fields of the right types"),
        (top_change(source=None), "must have fields of the right types"),
        (top_change(layers=[3]), r"LayerPlan must have the fields"),
        (top_change(format="cake"), "must be an object with format"),
        (top_change(format_version=9), "format version 1, got 9"),
        (drop_last_layer, r"cover each MoE layer once, in order, with experts \{0: 8, 2: 6\}"),
        (raise_top_k, r"num_experts\[0\]=3 is below num_selected_experts=4"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(statistics, tmp_path, change, message):
    plan = make_plan(statistics, num_experts=3, router="mean", gate_compensation=True)
    path = tmp_path / "pruning_plan.json"
    artifacts.write_json(path, edited(plan, change))
    with pytest.raises(InputError, match=message) as error:
        PruningPlan.load(path)
    assert str(path) in str(error.value)


def test_an_edited_plan_does_not_match_its_hash(statistics):
    values = make_plan(statistics, num_experts=3).to_dict()
    with pytest.raises(InputError, match="hash must match its content"):
        PruningPlan.from_dict({**values, "align": False})


def test_a_weight_on_a_dropped_expert_is_refused(statistics):
    plan = make_plan(statistics, num_experts=3, method="frequency")

    def change(values):
        values["layers"][0]["weights"] = [1.0] * 8

    with pytest.raises(InputError, match="a dropped expert's weight must be 0"):
        PruningPlan.from_dict(edited(plan, change))


@pytest.mark.parametrize("content", ["[]", "{}", "3"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match="A plan must be an object with format"):
        PruningPlan.load(tmp_path / "x.json")
