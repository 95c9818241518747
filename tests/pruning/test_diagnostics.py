"""What a cut did to the layer, against independent arithmetic; and the verdict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import permute_hidden, select_expert
from uncurl_jax.pruning.diagnostics import (
    LayerSettings,
    expert_output,
    judge,
    measure_layer,
    measure_plan,
)
from uncurl_jax.pruning.grouping import Grouping
from uncurl_jax.pruning.methods import Method
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.prune import prune_layer
from uncurl_jax.pruning.router_inputs import RouterInputs

TOLERANCE = 1e-5
SETTINGS = LayerSettings(1, False, "relu", 0.02)
EMBED, MLP = 6, 10

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize(
    ("diagnostics", "drop", "verdict"),
    [
        ({}, 0.0, "good: nothing speaks against this cut."),
        (
            {"silhouette": None, "output_error": None},
            0.05,
            "good: nothing speaks against this cut.",
        ),
        ({}, 0.06, "caution: 6.0 % of the assignments would overflow."),
        ({}, 0.25, "poor: 25.0 % of the assignments would overflow."),
        ({"output_error": 0.5}, 0.0, "good: nothing speaks against this cut."),
        ({"output_error": 0.6}, 0.0, "caution: the layer's output changes by 0.60 of its norm."),
        ({"output_error": 1.2}, 0.0, "poor: the layer's output changes by 1.20 of its norm."),
        # With router "reinit" there is no output yet: the old gates stand in.
        (
            {"output_error": None, "output_error_old_gates": 0.95},
            0.0,
            "poor: the layer's output changes by 0.95 of its norm.",
        ),
        (
            {"output_error": 0.1, "output_error_old_gates": 0.95},
            0.0,
            "good: nothing speaks against this cut.",
        ),
        ({"silhouette": 0.2}, 0.0, "caution: clusters are not distinct (silhouette 0.20)."),
        ({"silhouette": 0.25}, 0.0, "good: nothing speaks against this cut."),
        (
            {"seed_stability": 0.5},
            0.0,
            "caution: clusters depend on the seed (adjusted Rand index 0.50).",
        ),
        ({"router_fit_converged": False}, 0.0, "caution: the router fit did not converge."),
        ({"router_fit_converged": True}, 0.0, "good: nothing speaks against this cut."),
        (
            {"silhouette": 0.1, "output_error": 0.95},
            0.1,
            "poor: 10.0 % of the assignments would overflow; the layer's output changes by 0.95 of "
            "its norm; clusters are not distinct (silhouette 0.10).",
        ),
    ],
)
def test_verdicts_worked_by_hand(diagnostics, drop, verdict):
    assert judge(diagnostics, drop) == verdict


def test_a_plans_verdict_is_that_of_its_worst_layer(reference):
    statistics = reference.router_statistics(
        {layer: reference.fixed_statistics([1, 1, 1, 1]) for layer in range(3)}, (4, 4, 4)
    )
    plan = make_plan(statistics, num_experts=2, method="frequency")

    def verdict(*levels):
        layers = zip(plan.layers, levels, strict=True)
        judged = [dataclasses.replace(layer, verdict=f"{level}: why.") for layer, level in layers]
        return dataclasses.replace(plan, layers=tuple(judged)).verdict

    assert verdict("good", "good", "good") == "good: of 3 MoE layers 3 good."
    assert verdict("caution", "good", "good") == "caution: of 3 MoE layers 2 good, 1 caution."
    assert verdict("good", "poor", "caution") == "poor: of 3 MoE layers 1 good, 1 caution, 1 poor."


def layer_of(reference, seed, num_experts=6, gated=False, biases=True):
    """Returns (router, experts, inputs) of order one."""
    generator = np.random.default_rng(seed)
    experts = reference.experts(generator, num_experts, EMBED, MLP, gated)
    if not biases:
        experts = {name: a for name, a in experts.items() if not name.endswith("_bias")}
    router = generator.normal(size=(EMBED, num_experts)).astype(np.float32)
    return router, experts, generator.normal(size=(50, EMBED)).astype(np.float32)


def plan_of(reference, kernel, inputs, num_experts, top_k=1, **options):
    h = np.asarray(inputs, np.float64) @ kernel
    statistics = reference.router_statistics(
        {0: reference.statistics(h, top_k)}, (kernel.shape[1],), top_k
    )
    if options.get("router") == "fit":
        options["weights"] = reference.weights({0: kernel})
        options["router_inputs"] = RouterInputs({0: inputs}, {"checkpoint_hash": "c" * 8})
    return make_plan(statistics, num_experts=num_experts, **options)


def change(after, before):
    return np.linalg.norm(after - before) / np.linalg.norm(before)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize(("gated", "biases"), [(False, True), (True, True), (True, False)])
def test_an_experts_output_equals_plain_arithmetic(reference, gated, biases, activation):
    _, experts, x = layer_of(reference, 0, 2, gated, biases)
    one = select_expert(experts, 1)
    expected = reference.expert_output(one, x, activation=ACTIVATIONS[activation])
    found = expert_output(one, x, activation)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=5 * TOLERANCE)


def test_silu_of_large_inputs_does_not_overflow():
    one = {"wi": np.eye(2, dtype=np.float32), "wo": np.eye(2, dtype=np.float32)}
    x = np.array([[-1e4, 1e4]], np.float32)
    np.testing.assert_allclose(expert_output(one, x, "silu"), [[0.0, 1e4]])


def test_an_unknown_activation_is_refused():
    one = {"wi": np.eye(2, dtype=np.float32), "wo": np.eye(2, dtype=np.float32)}
    with pytest.raises(InputError, match='must be "gelu", "silu" or "relu", got \'tanh\''):
        expert_output(one, np.eye(2, dtype=np.float32), "tanh")


@pytest.mark.parametrize(
    ("router_treatment", "method", "compensate"),
    [
        ("reference", "uncurl", False),
        ("mean", "uncurl", True),
        ("fit", "frequency_merge", True),
        ("reference", "frequency", False),
        ("fit", "frequency", False),
    ],
)
@pytest.mark.parametrize(
    ("gated", "activation", "top_k", "normalize"),
    [(False, "relu", 1, False), (True, "silu", 2, False), (True, "gelu", 2, True)],
)
def test_the_output_error_is_that_of_an_independent_mixture(
    reference, router_treatment, method, compensate, gated, activation, top_k, normalize
):
    router, experts, x = layer_of(reference, 1, gated=gated)
    plan = plan_of(
        reference,
        router,
        x,
        3,
        top_k,
        method=method,
        router=router_treatment,
        gate_compensation=compensate,
    )
    found = measure_layer(
        plan, 0, router, experts, LayerSettings(top_k, normalize, activation, 0.02), inputs=x
    )
    pruned = prune_layer(plan, 0, router, experts, init_stddev=0.02)
    options = {"top_k": top_k, "normalize": normalize, "activation": ACTIVATIONS[activation]}
    wide = x.astype(np.float64)
    before = reference.moe_output(router, experts, wide, **options)
    after = reference.moe_output(pruned.router, pruned.experts, wide, **options)
    assert found["output_error"] == pytest.approx(change(after, before), rel=1e-4)
    # And with the old gates, each sent to the cluster of its expert; dropped experts give nothing.
    p = reference.softmax(wide @ router)
    y = np.zeros_like(wide)
    for token, chances in enumerate(p):
        top = np.argsort(-chances)[:top_k]
        for expert in top:
            cluster = plan.layers[0].labels[expert]
            if cluster >= 0:
                gate = chances[expert] / (chances[top].sum() if normalize else 1.0)
                one = select_expert(pruned.experts, cluster)
                output = reference.expert_output(
                    one, wide[token : token + 1], activation=ACTIVATIONS[activation]
                )
                y[token] += gate * output[0]
    assert found["output_error_old_gates"] == pytest.approx(change(y, before), rel=1e-4)


def test_an_unpruned_layer_has_no_error(reference):
    router, experts, x = layer_of(reference, 2)
    plan = plan_of(reference, router, x, 6)
    found = measure_layer(plan, 0, router, experts, SETTINGS, inputs=x)
    assert found["output_error"] < TOLERANCE and found["output_error_old_gates"] < TOLERANCE
    assert found["norm_ratio"] == pytest.approx([1.0] * 6)
    assert found["assignment_gain"] is None  # nothing was merged


@pytest.mark.parametrize("treatment", ["reinit", "remap"])
def test_the_new_gates_of_reinit_are_unknown_and_those_of_remap_the_old_ones(reference, treatment):
    router, experts, x = layer_of(reference, 3)
    plan = plan_of(reference, router, x, 3, router=treatment)
    found = measure_layer(plan, 0, router, experts, SETTINGS, inputs=x)
    old = found["output_error_old_gates"]
    assert old > 0.1
    assert found["output_error"] == (None if treatment == "reinit" else old)


def test_without_inputs_there_is_no_output_error(reference):
    router, experts, x = layer_of(reference, 3)
    found = measure_layer(plan_of(reference, router, x, 3), 0, router, experts, SETTINGS)
    assert not {"output_error", "output_error_old_gates"} & set(found)


def pairs(request):
    """Experts 2 c and 2 c + 1 become cluster c, whatever the statistics say."""
    labels = np.arange(request.num_experts) // 2
    return Grouping(labels, 2 * np.arange(labels.max() + 1), np.full(len(labels), 0.5), {})


@pytest.fixture
def pair_plan(reference):
    """Returns pair_plan(**options): a plan that merges four experts in pairs."""
    from uncurl_jax.pruning import methods

    methods.register_method(Method("test_pairs", pairs, "pairs"))

    def make(**options):
        router, _, x = layer_of(reference, 4, 4)
        return plan_of(reference, router, x, 2, method="test_pairs", **options)

    yield make
    del methods._METHODS["test_pairs"]


def paired_experts(reference, gated, change):
    """Returns four experts, the odd ones `change` of the ones before."""
    _, experts, _ = layer_of(reference, 5, 4, gated)
    for z in (1, 3):
        for name, array in change(select_expert(experts, z - 1), z).items():
            experts[name][z] = array
    return experts


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("compensate", [False, True])
def test_identical_members_keep_their_norm(reference, pair_plan, gated, compensate):
    plan = pair_plan(gate_compensation=compensate)
    experts = paired_experts(reference, gated, lambda expert, z: expert)
    found = measure_layer(plan, 0, np.zeros((EMBED, 4)), experts, SETTINGS)
    assert found["norm_ratio"] == pytest.approx([1.0, 1.0], abs=TOLERANCE)
    assert found["similarity_identity"] == pytest.approx(1.0, abs=TOLERANCE)
    assert found["assignment_gain"] == pytest.approx(0.0, abs=TOLERANCE)


def test_members_of_opposite_sign_cancel(reference, pair_plan):
    def opposite(expert, z):
        return {name: (-1 if z == 1 else 1) * array for name, array in expert.items()}

    plan = pair_plan(alignment="none")
    experts = paired_experts(reference, False, opposite)
    found = measure_layer(plan, 0, np.zeros((EMBED, 4)), experts, SETTINGS)
    assert found["norm_ratio"] == pytest.approx([0.0, 1.0], abs=TOLERANCE)
    assert found["similarity_identity"] is None and found["similarity_aligned"] is None


def test_gate_projections_count_in_the_norm(reference, pair_plan):
    # Members that differ in the sign of wg alone keep the norms of wi and wo.
    def other_gate(expert, z):
        return {name: (-1 if name == "wg" else 1) * array for name, array in expert.items()}

    experts = paired_experts(reference, True, other_gate)
    found = measure_layer(pair_plan(alignment="none"), 0, np.zeros((EMBED, 4)), experts, SETTINGS)
    squares = [
        {name: np.square(experts[name][z]).sum() for name in ("wi", "wg", "wo")} for z in (0, 2)
    ]
    expected = [np.sqrt((s["wi"] + s["wo"]) / sum(s.values())) for s in squares]
    assert found["norm_ratio"] == pytest.approx(expected, rel=TOLERANCE)


def test_unrelated_members_shrink_by_the_root_of_two(reference, pair_plan):
    # |(a + b) / 2| of unrelated a, b of equal norm is |a| / sqrt(2).
    generator = np.random.default_rng(6)
    experts = reference.experts(generator, 4, 60, 80)
    found = measure_layer(pair_plan(alignment="none"), 0, np.zeros((60, 4)), experts, SETTINGS)
    assert found["norm_ratio"] == pytest.approx([2**-0.5] * 2, rel=0.02)


@pytest.mark.parametrize("alignment", ["features", "unit_features"])
@pytest.mark.parametrize("gated", [False, True])
def test_alignment_gains_what_a_planted_permutation_hid(reference, pair_plan, gated, alignment):
    generator = np.random.default_rng(7)

    def shuffled(expert, z):
        return permute_hidden(expert, generator.permutation(MLP))

    experts = paired_experts(reference, gated, shuffled)
    plan = pair_plan(alignment=alignment)
    found = measure_layer(plan, 0, np.zeros((EMBED, 4)), experts, SETTINGS)
    assert found["similarity_aligned"] == pytest.approx(1.0, abs=TOLERANCE)
    assert found["similarity_identity"] < 0.6
    assert found["assignment_gain"] == found["similarity_aligned"] - found["similarity_identity"]
    assert found["norm_ratio"] == pytest.approx([1.0, 1.0], abs=TOLERANCE)
    unaligned = measure_layer(
        pair_plan(alignment="none"), 0, np.zeros((EMBED, 4)), experts, SETTINGS
    )
    assert max(unaligned["norm_ratio"]) < 0.95


def test_measuring_a_plan_adds_numbers_and_judges_again_but_decides_nothing(reference):
    router, experts, x = layer_of(reference, 8)
    plan = plan_of(reference, router, x, 2)
    heard = []
    measured = measure_plan(
        plan,
        lambda layer: router,
        lambda layer: experts,
        SETTINGS,
        inputs={0: x},
        progress=lambda *seen: heard.append(seen),
    )
    assert heard == [(1, 1)]
    assert PruningPlan.from_dict(measured.to_dict()) == measured  # all numbers are JSON's
    old, new = plan.layers[0], measured.layers[0]
    alone = measure_layer(plan, 0, router, experts, SETTINGS, inputs=x)
    assert new.diagnostics == {**old.diagnostics, **alone}
    assert new.verdict == judge(new.diagnostics, new.expected_drop_fraction)
    assert "the layer's output changes by" in new.verdict
    assert measured.verdict.startswith(new.verdict.partition(":")[0])
    unchanged = dataclasses.replace(new, diagnostics=old.diagnostics, verdict=old.verdict)
    assert dataclasses.replace(measured, layers=(unchanged,)) == plan
