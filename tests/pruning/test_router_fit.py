"""The fitted router against scipy on the plain objective, and where the answer is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.router_fit import (
    GRADIENT_TOLERANCE,
    fit_router,
    sampled_gate_compensation,
)
from uncurl_jax.pruning.router_inputs import RouterInputs

TOLERANCE = 1e-5
LABELS = np.array([0, 1, 2, 0, 1, 0])


class Problem(NamedTuple):
    inputs: np.ndarray
    kernel: np.ndarray
    labels: np.ndarray
    start: np.ndarray


def problem(seed=0, labels=LABELS, embed=4, tokens=200) -> Problem:
    """Correlated inputs with a mean, a router and the plain means of its columns."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(embed, embed))
    inputs = (generator.normal(size=(tokens, embed)) + 0.5) @ mixing
    kernel = generator.normal(size=(embed, len(labels)))
    start = [kernel[:, labels == c].mean(axis=1) for c in range(labels.max() + 1)]
    return Problem(
        inputs.astype(np.float32), kernel.astype(np.float32), labels, np.stack(start, axis=1)
    )


def mean_kl(inputs, kernel, labels, new):
    """The objective as it is defined, in float64."""
    log_p = scipy.special.log_softmax(inputs.astype(np.float64) @ kernel, axis=1)
    p = np.exp(log_p)
    q = np.stack([p[:, labels == c].sum(axis=1) for c in range(labels.max() + 1)], axis=1)
    q /= q.sum(axis=1, keepdims=True)
    log_new = scipy.special.log_softmax(inputs.astype(np.float64) @ new, axis=1)
    return float((scipy.special.xlogy(q, q) - q * log_new).sum(axis=1).mean())


def test_the_kl_falls_to_the_minimum_that_scipy_finds_on_the_plain_objective():
    given = problem()
    found = fit_router(*given)
    assert found.has_converged and 0 < found.iterations < 100
    assert found.gradient <= GRADIENT_TOLERANCE
    assert found.kernel.dtype == np.float32 and found.kernel.shape == (4, 3)
    before, after = (mean_kl(*given[:3], new) for new in (given.start, found.kernel))
    assert found.kl_before == pytest.approx(before, abs=TOLERANCE)
    assert found.kl_after == pytest.approx(after, abs=TOLERANCE)
    assert after < 0.8 * before
    plain = scipy.optimize.minimize(
        lambda flat: mean_kl(*given[:3], flat.reshape(4, 3)),
        given.start.reshape(-1),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    assert after == pytest.approx(plain.fun, abs=TOLERANCE)
    # The same router too, up to what softmax does not see.
    new, best = (k - k.mean(axis=1, keepdims=True) for k in (found.kernel, plain.x.reshape(4, 3)))
    np.testing.assert_allclose(new, best, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_problem_is_convex_two_starts_end_at_one_minimum(seed):
    given = problem(seed, tokens=100)
    other = np.random.default_rng(seed + 50).normal(size=given.start.shape)
    found, again = fit_router(*given), fit_router(*given._replace(start=other))
    assert found.has_converged and again.has_converged
    assert found.kl_after == pytest.approx(again.kl_after, abs=TOLERANCE)
    assert again.kl_before > again.kl_after


def test_exact_copies_are_fitted_exactly():
    generator = np.random.default_rng(1)
    distinct = generator.normal(size=(5, 3))
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])  # three equal columns in each cluster
    inputs = generator.normal(size=(300, 5)).astype(np.float32)
    start = distinct + generator.normal(size=distinct.shape)
    found = fit_router(inputs, distinct[:, labels], labels, start)
    assert found.kl_before > 0.05
    assert abs(found.kl_after) < TOLERANCE
    np.testing.assert_allclose(
        scipy.special.softmax(inputs @ found.kernel, axis=1),
        scipy.special.softmax(inputs @ distinct, axis=1),
        atol=2e-3,
    )


def test_dropped_experts_give_their_mass_to_the_others():
    # Columns of the kept experts give exactly the renormalised probabilities: nothing to gain.
    given = problem(2, labels=np.array([0, -1, 1, -1, 2]))
    kept = given.kernel[:, [0, 2, 4]]
    found = fit_router(given.inputs, given.kernel, given.labels, kept)
    assert abs(found.kl_before) < TOLERANCE and found.has_converged
    np.testing.assert_allclose(found.kernel, kept, atol=TOLERANCE)
    wrong = fit_router(given.inputs, given.kernel, given.labels, kept[:, ::-1].copy())
    assert wrong.kl_before > 0.5 and abs(wrong.kl_after) < TOLERANCE


def test_too_few_iterations_are_better_than_the_start_and_say_so():
    given = problem(3)
    one, found = fit_router(*given, max_iterations=1), fit_router(*given)
    assert not one.has_converged and one.gradient > GRADIENT_TOLERANCE and one.iterations == 1
    assert found.kl_after < one.kl_after < one.kl_before


def test_a_start_at_the_minimum_stays():
    given = problem(4)
    best = fit_router(*given)
    again = fit_router(*given._replace(start=best.kernel))
    assert again.has_converged
    assert again.kl_after <= again.kl_before
    assert again.kl_after == pytest.approx(best.kl_after, abs=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_a_fit_is_never_worse_than_its_start(scale):
    given = problem(5)
    far = scale * np.random.default_rng(6).normal(size=given.start.shape)
    found = fit_router(*given._replace(start=far))
    assert np.isfinite(found.kernel).all()
    assert mean_kl(*given[:3], found.kernel) <= mean_kl(*given[:3], far) + TOLERANCE


def test_inputs_of_low_rank_and_one_cluster_are_no_trouble():
    given = problem(7, tokens=2)  # fewer tokens than dimensions
    found = fit_router(*given)
    assert np.isfinite(found.kernel).all() and found.kl_after <= found.kl_before
    single = fit_router(given.inputs, given.kernel, np.zeros(6, int), given.kernel[:, :1])
    assert abs(single.kl_after) < TOLERANCE and single.has_converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.zeros((5, 3))}, r"inputs \[token, 4\] and start \[4, 3\], got \(5, 3\)"),
        ({"inputs": np.zeros(4)}, r"got \(4,\) and \(4, 3\)"),
        ({"start": np.zeros((4, 2))}, r"start \[4, 3\], got \(200, 4\) and \(4, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        fit_router(*problem()._replace(**change))


def test_sampled_factors_worked_by_hand():
    # Old: p = (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2); clusters {0, 1} and {2}.
    inputs, kernel = np.eye(2), np.log([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    labels = np.array([0, 0, 1])
    # New: (3/4, 1/4) and (1/2, 1/2). The first token chose cluster 0 at 1/2, which becomes 3/4.
    fitted = np.log([[3.0, 1.0], [1.0, 1.0]])
    factors = sampled_gate_compensation(inputs, kernel, labels, fitted)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, [(1 / 2) / (3 / 4), (1 / 2) / (1 / 2)], rtol=TOLERANCE)


def test_a_cluster_that_no_sampled_token_chose_has_the_factor_one():
    inputs, kernel = np.eye(2)[:1], np.log([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    fitted = np.log([[3.0, 1.0], [1.0, 1.0]])
    for labels, expected in (([0, 0, 1], [2 / 3, 1.0]), ([-1, 0, 1], [1.0, 1.0])):
        factors = sampled_gate_compensation(inputs, kernel, labels, fitted)
        np.testing.assert_allclose(factors, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("copies", [2, 3])
def test_n_equal_copies_with_mean_columns_have_the_factor_one_over_n(copies):
    generator = np.random.default_rng(8)
    distinct = generator.normal(size=(5, 4))
    labels = np.tile(np.arange(4), copies)
    inputs = generator.normal(size=(100, 5))
    factors = sampled_gate_compensation(inputs, distinct[:, labels], labels, distinct)
    np.testing.assert_allclose(factors, 1 / copies, rtol=TOLERANCE)


@pytest.fixture
def layer(reference):
    """Statistics, weights and inputs of one layer with six experts."""
    given = problem(9)
    statistics = reference.router_statistics(
        {1: reference.statistics(given.inputs @ given.kernel)}, (0, 6)
    )
    inputs = RouterInputs({1: given.inputs}, {"checkpoint_hash": "c" * 8})
    return given, statistics, reference.weights({1: given.kernel}), inputs


@pytest.mark.parametrize("compensate", [False, True])
def test_a_plan_holds_the_fitted_router_bit_for_bit(layer, compensate):
    given, statistics, weights, inputs = layer
    plan = make_plan(
        statistics,
        num_experts=3,
        router="fit",
        gate_compensation=compensate,
        weights=weights,
        router_inputs=inputs,
    )
    plan = PruningPlan.from_dict(plan.to_dict())
    decided = plan.layer(1)
    labels, selected = np.array(decided.labels), np.array(decided.selected)
    start = np.stack(
        [
            np.average(given.kernel[:, labels == c], axis=1, weights=selected[labels == c])
            for c in range(3)
        ],
        axis=1,
    )
    found = fit_router(given.inputs, given.kernel, labels, start)
    np.testing.assert_allclose(decided.fitted_kernel(), found.kernel, atol=1e-3)
    diagnostics = decided.diagnostics
    assert diagnostics["router_kl_before"] == pytest.approx(found.kl_before, abs=TOLERANCE)
    assert diagnostics["router_kl_after"] == pytest.approx(found.kl_after, abs=TOLERANCE)
    assert diagnostics["router_fit_converged"] is True
    assert diagnostics["router_fit_gradient"] <= GRADIENT_TOLERANCE
    if compensate:
        factors = sampled_gate_compensation(
            given.inputs, given.kernel, labels, decided.fitted_kernel()
        )
        np.testing.assert_array_equal(decided.gate_factors, factors)
    else:
        assert decided.gate_factors is None


def test_a_fitted_router_drops_experts_too(layer):
    _, statistics, weights, inputs = layer
    options = {"weights": weights, "router_inputs": inputs, "router": "fit"}
    plan = make_plan(statistics, num_experts=2, method="frequency", **options)
    assert plan.layer(1).labels.count(-1) == 4
    # The kept columns are the exact answer, and the start.
    assert abs(plan.layer(1).diagnostics["router_kl_before"]) < TOLERANCE
    np.testing.assert_allclose(
        plan.layer(1).fitted_kernel(),
        weights.router(1)[:, list(plan.layer(1).reference)],
        atol=TOLERANCE,
    )


def test_gate_compensation_of_a_fit_needs_softmax_gates(layer, reference):
    _, statistics, weights, inputs = layer
    sums = statistics.layers[1]
    normalised = reference.router_statistics(
        {1: sums._replace(gate_mass=sums.selected)}, (0, 6), top_k=1
    )
    with pytest.raises(InputError, match="turn it off for models that normalise the gates"):
        make_plan(
            normalised,
            num_experts=3,
            router="fit",
            gate_compensation=True,
            weights=weights,
            router_inputs=inputs,
        )


def test_inputs_of_another_checkpoint_are_refused(layer):
    given, statistics, weights, _ = layer
    options = {"num_experts": 3, "router": "fit", "weights": weights}
    for inputs in (
        RouterInputs({1: given.inputs}, {"checkpoint_hash": "d" * 8}),
        RouterInputs({0: given.inputs}, {"checkpoint_hash": "c" * 8}),
    ):
        with pytest.raises(InputError, match="must be of the checkpoint of the statistics"):
            make_plan(statistics, router_inputs=inputs, **options)
    with pytest.raises(InputError, match="needs the checkpoint and a sample"):
        make_plan(statistics, **options)
