"""The divergence of live from reference: by hand, against direct sums, and its error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uncurl_jax.serving import drift

ALPHA = 0.05


def requests(rng, shares, num_requests, *, concentration, mean_tokens=30):
    """Tokens [request] and selections [request, expert]; a low concentration makes them clump."""
    tokens = 5 + rng.poisson(mean_tokens, num_requests)
    own = rng.dirichlet(shares * concentration, num_requests)
    return tokens, np.stack(
        [rng.multinomial(t, p) for t, p in zip(tokens, own, strict=True)]
    ).astype(float)


def sums_of(tokens, x, half_life=None):
    return drift.add_requests(drift.no_requests(x.shape[1]), tokens, x, half_life)


def test_jensen_shannon_of_disjoint_equal_and_half_overlapping_distributions():
    a, b = np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])
    assert drift.jensen_shannon_bits(a, b) == 1.0
    assert drift.jensen_shannon_bits(b, b) == 0.0
    # m = (3/4, 1/4): (log2(4/3) + log2(2/3)/2 + log2(2)/2) / 2.
    by_hand = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    found = drift.jensen_shannon_bits(np.array([1.0, 0]), np.array([0.5, 0.5]))
    assert found == pytest.approx(by_hand)


@pytest.mark.parametrize("half_life", [None, 3.0])
def test_sums_are_the_same_however_requests_come_in(half_life):
    rng = np.random.default_rng(0)
    tokens, x = requests(rng, np.array([0.2, 0.3, 0.5]), 10, concentration=5)
    at_once = sums_of(tokens, x, half_life)
    in_parts = drift.no_requests(3)
    for part in (slice(0, 1), slice(1, 6), slice(6, 10)):
        in_parts = drift.add_requests(in_parts, tokens[part], x[part], half_life)
    for name in drift.RequestSums._fields:
        np.testing.assert_allclose(getattr(in_parts, name), getattr(at_once, name), rtol=1e-12)


def test_half_life_halves_the_weight_after_so_many_requests():
    sums = sums_of(np.array([8, 1, 1]), np.array([[8.0, 0], [0, 1], [0, 1]]), half_life=2.0)
    np.testing.assert_allclose(sums.x, [4.0, 1 + 0.5**0.5])
    assert drift.num_requests(sums_of(np.ones(5), np.ones((5, 1)))) == pytest.approx(5)


def test_bias_and_threshold_are_those_of_the_covariance_of_whole_requests():
    rng = np.random.default_rng(1)
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    tokens, x = requests(rng, shares, 50, concentration=8)
    reference, reference_tokens = 1000 * shares, 1000.0
    found = drift.divergence(sums_of(tokens, x), reference, reference_tokens, alpha=ALPHA)
    # Directly, request by request.
    p = x.sum(axis=0) / tokens.sum()
    residual = x - tokens[:, None] * p
    per_token = 50 / 49 * residual.T @ residual / tokens.sum()
    a = per_token * (1 / tokens.sum() + 1 / reference_tokens)
    m = (p + shares) / 2
    a = a / np.sqrt(np.outer(m, m))
    assert found.bias_bits == pytest.approx(np.trace(a) / (8 * math.log(2)))
    eigenvalues = np.linalg.eigvalsh(a)
    draws = rng.standard_normal((200_000, 4)) ** 2 @ eigenvalues / (8 * math.log(2))
    # The F quantile is above that of known eigenvalues, by little for 50 requests.
    exact = np.quantile(draws, 1 - ALPHA)
    assert exact < found.threshold_bits < 1.1 * exact


def test_bias_of_independent_tokens_is_experts_minus_one_over_tokens():
    rng = np.random.default_rng(2)
    shares = np.full(8, 1 / 8)
    tokens, x = requests(rng, shares, 4000, concentration=1e9)
    found = drift.divergence(sums_of(tokens, x), 5e4 * shares, 5e4, alpha=ALPHA)
    expected = 7 * (1 / tokens.sum() + 1 / 5e4) / 8 / math.log(2)
    assert found.bias_bits == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("concentration", [5.0, 1e9], ids=["clumped", "independent"])
@pytest.mark.parametrize("half_life", [None, 60.0])
def test_without_drift_the_threshold_is_seldom_exceeded(concentration, half_life):
    rng = np.random.default_rng(3)
    exceeded, distances, biases = 0, [], []
    num_streams = 400
    for _ in range(num_streams):
        shares = rng.dirichlet(np.ones(8))
        # The reference is of other requests to the same task.
        tokens, x = requests(rng, shares, 600, concentration=concentration)
        live = sums_of(*requests(rng, shares, 150, concentration=concentration), half_life)
        found = drift.divergence(live, x.sum(axis=0), tokens.sum(), alpha=ALPHA)
        exceeded += found.bits > found.threshold_bits
        distances.append(found.bits - found.bias_bits)
        biases.append(found.bias_bits)
    # 99.9 % bound of a binomial with 5 %: 35 of 400.
    assert exceeded <= 35
    # And the threshold is not simply out of reach.
    assert exceeded >= 6
    assert abs(np.mean(distances)) < 0.15 * np.mean(biases)


def test_multinomial_errors_would_be_wrong_for_requests_that_clump():
    rng = np.random.default_rng(4)
    shares = np.full(8, 1 / 8)
    tokens, x = requests(rng, shares, 100, concentration=5)
    found = drift.divergence(sums_of(tokens, x), 1e6 * shares, 1e6, alpha=ALPHA)
    independent = 7 / tokens.sum() / 8 / math.log(2)
    assert found.bias_bits > 3 * independent


def test_a_shift_of_a_tenth_of_the_selections_is_seen_in_200_requests():
    rng = np.random.default_rng(5)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    moved = np.array([0.3, 0.3, 0.2, 0.2])
    seen = 0
    for _ in range(50):
        live = sums_of(*requests(rng, moved, 200, concentration=20))
        found = drift.divergence(live, 1e5 * shares, 1e5, alpha=0.01)
        seen += found.bits > found.threshold_bits and found.distance_bits > 0.005
    assert seen >= 48


def test_a_few_requests_are_not_enough_and_none_are_no_distance():
    rng = np.random.default_rng(6)
    tokens, x = requests(rng, np.array([0.9, 0.1]), drift.MIN_REQUESTS - 1, concentration=50)
    found = drift.divergence(sums_of(tokens, x), np.array([1.0, 9.0]), 10.0, alpha=ALPHA)
    assert found.distance_bits > 0.1 and found.threshold_bits == math.inf
    one = drift.divergence(sums_of(tokens[:1], x[:1]), np.array([1.0, 9.0]), 10.0, alpha=ALPHA)
    assert one.threshold_bits == math.inf
    none = drift.divergence(drift.no_requests(2), np.array([1.0, 9.0]), 10.0, alpha=ALPHA)
    assert none == (0.0, 0.0, math.inf)
