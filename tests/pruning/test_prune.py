"""The identities of a prune that need no trained model."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import permute_hidden, select_expert
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.prune import prune_layer
from uncurl_jax.pruning.statistics import layer_statistics

NUM_DISTINCT, COPIES, EMBED, MLP = 4, 3, 6, 10


def copied_layer(reference, gated, seed=0):
    """Returns (router, experts) of Z experts: D distinct ones, hidden units of copies permuted.

    Experts are numbered at random; router columns of copies are equal.
    """
    generator = np.random.default_rng(seed)
    distinct = reference.experts(generator, NUM_DISTINCT, EMBED, MLP, gated)
    columns = generator.normal(size=(EMBED, NUM_DISTINCT)).astype(np.float32)
    origin = generator.permutation(np.repeat(np.arange(NUM_DISTINCT), COPIES))
    copies = [
        permute_hidden(select_expert(distinct, z), generator.permutation(MLP)) for z in origin
    ]
    experts = {name: np.stack([copy[name] for copy in copies]) for name in distinct}
    return columns[:, origin], experts, origin


def statistics_with_random_ties(router, origin, x, seed=1):
    """Top-1 statistics on x; tokens choose at random among the copies of the best expert."""
    generator = np.random.default_rng(seed)
    logits = jnp.asarray(x.astype(np.float32) @ router)
    p = jnp.exp(logits) / jnp.exp(logits).sum(axis=-1, keepdims=True)
    best = origin[np.asarray(logits).argmax(axis=-1)]
    index = np.array([[generator.choice(np.flatnonzero(origin == b))] for b in best])
    gate = jnp.take_along_axis(p, jnp.asarray(index), axis=1)
    shape = (1, len(x), -1)
    return layer_statistics(
        logits.reshape(shape),
        jnp.asarray(index).reshape(shape),
        gate.reshape(shape),
        jnp.ones((1, len(x), 1), bool),
        jnp.ones((1, len(x)), bool),
    )


@pytest.mark.parametrize("ties", ["lowest", "random"])
@pytest.mark.parametrize("router_treatment", ["mean", "reference"])
@pytest.mark.parametrize("gated", [False, True])
def test_copies_are_pruned_losslessly(reference, gated, router_treatment, ties):
    router, experts, origin = copied_layer(reference, gated)
    x = np.random.default_rng(2).normal(size=(200, EMBED))
    if ties == "lowest":
        sums = reference.statistics(x @ router)
    else:
        sums = statistics_with_random_ties(router, origin, x)
    statistics = reference.router_statistics({0: sums}, (len(origin),))
    plan = make_plan(
        statistics, num_experts=NUM_DISTINCT, router=router_treatment, gate_compensation=True
    )
    assert reference.same_partition(plan.layers[0].labels, origin)
    factors = np.array(plan.layers[0].gate_factors)
    np.testing.assert_allclose(factors, 1 / COPIES, rtol=1e-5)
    pruned = prune_layer(plan, 0, router, experts, init_stddev=0.02)
    assert pruned.router.shape == (EMBED, NUM_DISTINCT)
    assert pruned.alignment is not None
    np.testing.assert_allclose(pruned.alignment.similarity_after, 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        reference.moe_output(pruned.router, pruned.experts, x),
        reference.moe_output(router, experts, x),
        atol=1e-5,
    )


def test_without_alignment_the_copies_are_not_lossless(reference):
    router, experts, origin = copied_layer(reference, gated=False)
    x = np.random.default_rng(2).normal(size=(200, EMBED))
    sums = statistics_with_random_ties(router, origin, x)
    statistics = reference.router_statistics({0: sums}, (len(origin),))
    plan = make_plan(
        statistics,
        num_experts=NUM_DISTINCT,
        router="mean",
        gate_compensation=True,
        alignment="none",
    )
    pruned = prune_layer(plan, 0, router, experts, init_stddev=0.02)
    assert pruned.alignment is None
    difference = reference.moe_output(pruned.router, pruned.experts, x) - reference.moe_output(
        router, experts, x
    )
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("method", ["uncurl", "frequency", "random"])
@pytest.mark.parametrize("router_treatment", ["reference", "mean"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_as_many_experts_as_before_changes_no_bit_but_the_order(
    reference, method, router_treatment, dtype
):
    generator = np.random.default_rng(3)
    router = generator.normal(size=(EMBED, 7)).astype(dtype)
    experts = reference.experts(generator, 7, EMBED, MLP, dtype=dtype)
    x = generator.normal(size=(100, EMBED))
    sums = reference.statistics(x @ router.astype(np.float64))
    plan = make_plan(
        reference.router_statistics({0: sums}, (7,)),
        num_experts=7,
        method=method,
        router=router_treatment,
        gate_compensation=True,
    )
    order = list(plan.layers[0].reference)
    assert sorted(order) == list(range(7))
    pruned = prune_layer(plan, 0, router, experts, init_stddev=0.02)
    assert pruned.router.tobytes() == np.take(router, order, axis=1).tobytes()
    for name, array in experts.items():
        assert pruned.experts[name].tobytes() == array[order].tobytes()


def test_a_layer_pruned_by_frequency_holds_the_kept_experts(reference):
    generator = np.random.default_rng(4)
    router = generator.normal(size=(EMBED, 5)).astype(np.float32)
    experts = reference.experts(generator, 5, EMBED, MLP)
    sums = reference.statistics(generator.normal(size=(50, EMBED)) @ router)
    sums = sums._replace(selected=np.array([1.0, 30, 2, 9, 8]))
    statistics = reference.router_statistics({3: sums}, (0, 0, 0, 5))
    plan = make_plan(statistics, num_experts=2, method="frequency")
    pruned = prune_layer(plan, 3, router, experts, init_stddev=0.02)
    np.testing.assert_array_equal(pruned.router, router[:, [1, 3]])
    for name, array in experts.items():
        np.testing.assert_array_equal(pruned.experts[name], array[[1, 3]])


def test_pruning_permuted_experts_gives_the_same_function(reference):
    generator = np.random.default_rng(5)
    router = generator.normal(size=(EMBED, 8)).astype(np.float32)
    experts = reference.experts(generator, 8, EMBED, MLP)
    x = generator.normal(size=(100, EMBED))
    order = generator.permutation(8)
    outputs = []
    for index in (np.arange(8), order):
        sums = reference.statistics(x @ router[:, index])
        plan = make_plan(
            reference.router_statistics({0: sums}, (8,)),
            num_experts=3,
            router="mean",
            gate_compensation=True,
        )
        permuted = {name: array[index] for name, array in experts.items()}
        pruned = prune_layer(plan, 0, router[:, index], permuted, init_stddev=0.02)
        outputs.append(reference.moe_output(pruned.router, pruned.experts, x))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)


def test_arrays_of_another_model_are_refused(reference):
    sums = reference.statistics(np.random.default_rng(6).normal(size=(30, 4)))
    plan = make_plan(reference.router_statistics({0: sums}, (4,)), num_experts=2)
    experts = reference.experts(np.random.default_rng(7), 4, EMBED, MLP)
    with pytest.raises(InputError, match="layer 0 is for 4 experts, got 5 in router"):
        prune_layer(plan, 0, np.zeros((EMBED, 5), np.float32), experts, init_stddev=0.02)
    experts["wo"] = experts["wo"][:3]
    with pytest.raises(InputError, match="layer 0 is for 4 experts, got 3 in wo"):
        prune_layer(plan, 0, np.zeros((EMBED, 4), np.float32), experts, init_stddev=0.02)
