"""The plan as a file: what is stored, and every rule that a damaged or edited one breaks."""

from __future__ import annotations

import base64
import copy
import json

import numpy as np
import pytest

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.layer_plan import encode_kernel
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.router_inputs import RouterInputs

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


@pytest.fixture(scope="module")
def compensated_plan(statistics):
    return make_plan(statistics, num_experts=3, router="mean", gate_compensation=True)


@pytest.fixture(scope="module")
def fitted_plan(reference, statistics):
    generator = np.random.default_rng(0)
    routers = {0: generator.normal(size=(4, 8)), 2: generator.normal(size=(4, 6))}
    inputs = {layer: generator.normal(size=(60, 4)) for layer in (0, 2)}
    return make_plan(
        statistics,
        num_experts=3,
        router="fit",
        weights=reference.weights(routers),
        router_inputs=RouterInputs(inputs, {"checkpoint_hash": "c" * 8}),
    )


def test_the_golden_fields_of_a_plan(compensated_plan):
    values = json.loads(json.dumps(compensated_plan.to_dict()))
    assert set(values) == {
        "format",
        "format_version",
        "hash",
        "method",
        "router",
        "grouping",
        "seed",
        "alignment",
        "gate_compensation",
        "eval_capacity_factor",
        "source",
        "layers",
    }
    assert values["format_version"] == 2
    assert set(values["grouping"]) == {
        "affinity",
        "assign_labels",
        "merge_weights",
        "max_cluster_size",
        "num_protected",
    }
    assert set(values["layers"][0]) == {
        "layer",
        "method",
        "num_experts",
        "labels",
        "reference",
        "weights",
        "selected",
        "cluster_sizes",
        "gate_factors",
        "fitted_router",
        "expected_drop_fraction",
        "diagnostics",
        "verdict",
        "warnings",
    }


def test_a_plan_survives_a_file(compensated_plan, tmp_path):
    compensated_plan.save(tmp_path / "pruning_plan.json")
    assert PruningPlan.load(tmp_path / "pruning_plan.json") == compensated_plan


def test_a_fitted_router_survives_a_file_bit_for_bit(fitted_plan, tmp_path):
    fitted_plan.save(tmp_path / "pruning_plan.json")
    read = PruningPlan.load(tmp_path / "pruning_plan.json")
    assert read == fitted_plan
    for layer in (0, 2):
        kernel = read.layer(layer).fitted_kernel()
        assert kernel.shape == (4, 3) and kernel.dtype == np.float32
        assert kernel.tobytes() == fitted_plan.layer(layer).fitted_kernel().tobytes()


def test_kernels_are_stored_as_little_endian_float32():
    kernel = np.array([[1.0, -2.5], [np.pi, 1e-30]])
    assert np.frombuffer(base64.b64decode(encode_kernel(kernel)), "<f4").tolist() == [
        float(np.float32(value)) for value in kernel.reshape(-1)
    ]


def test_a_fitted_router_is_refused_where_another_treatment_is_named(fitted_plan):
    def change(values):
        values["router"] = "mean"

    with pytest.raises(InputError, match="router 'fit' only, got router 'mean' in layer 0"):
        PruningPlan.from_dict(edited(fitted_plan, change))


def test_a_plan_without_a_fitted_router_has_no_kernel(compensated_plan):
    with pytest.raises(InputError, match="fitted_router must be base64"):
        compensated_plan.layer(0).fitted_kernel()


def test_only_remap_maps_columns_to_experts(statistics, compensated_plan):
    assert compensated_plan.expert_map is None
    plan = make_plan(statistics, num_experts=3, router="remap")
    assert plan.expert_map == (plan.layers[0].labels, None, plan.layers[1].labels)


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


def grouping_change(**fields):
    def change(values):
        values["grouping"].update(fields)

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
KERNEL = encode_kernel(np.ones((2, 3)))
NAN_KERNEL = encode_kernel(np.full((2, 3), np.nan))


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
        (top_change(router="remaps"), "router must be one of"),
        (top_change(router="remap"), "got router 'remap'|whose gates are the old ones"),
        (top_change(router="fit"), "router 'fit' only, got router 'fit' in layer 0"),
        (top_change(alignment="maybe"), "alignment must be one of"),
        (top_change(grouping=None), "grouping must be GroupingOptions, got None"),
        (top_change(grouping={"affinity": "cosine"}), r"GroupingOptions .* missing \['assign_la"),
        (grouping_change(affinity="dot"), "affinity must be one of"),
        (grouping_change(max_cluster_size=0), "max_cluster_size must be at least 1"),
        (layer_change(fitted_router=KERNEL), "router 'fit' only, got router 'mean' in layer 0"),
        (layer_change(fitted_router="%%"), r"must be base64 of float32 \[embed, D\], got 0 bytes"),
        (
            layer_change(fitted_router="AAAA"),
            r"must be base64 of float32 \[embed, D\], got 3 bytes",
        ),
        (layer_change(fitted_router=NAN_KERNEL), "fitted_router must be finite"),
        (top_change(router="reinit"), "gate_compensation must be off with router 'reinit'"),
        (top_change(gate_compensation=False), "gate_factors must be there with gate_compensation"),
        (top_change(layers=None), "must have fields of the right types"),
        (top_change(source=None), "must have fields of the right types"),
        (top_change(layers=[3]), r"LayerPlan must have the fields"),
        (top_change(format="cake"), "must be an object with format"),
        (top_change(format_version=9), "format version 2, got 9"),
        (drop_last_layer, r"cover each MoE layer once, in order, with experts \{0: 8, 2: 6\}"),
        (raise_top_k, r"num_experts\[0\]=3 is below num_selected_experts=4"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(compensated_plan, tmp_path, change, message):
    path = tmp_path / "pruning_plan.json"
    artifacts.write_json(path, edited(compensated_plan, change))
    with pytest.raises(InputError, match=message) as error:
        PruningPlan.load(path)
    assert str(path) in str(error.value)


def test_an_edited_plan_does_not_match_its_hash(compensated_plan):
    values = compensated_plan.to_dict()
    with pytest.raises(InputError, match="hash must match its content"):
        PruningPlan.from_dict({**values, "alignment": "none"})


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
