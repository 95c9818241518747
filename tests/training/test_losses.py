from __future__ import annotations

import jax
import numpy as np

from uncurl_jax.training.losses import token_loss

TOLERANCE = 1e-5


def test_the_loss_worked_by_hand():
    probabilities = np.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]], np.float32)
    targets = np.asarray([[1, 1, 0]], np.int32)
    weights = np.asarray([[1.0, 0.5, 0.0]], np.float32)
    loss = jax.jit(token_loss)(np.log(probabilities), targets, weights)
    expected = -np.log(0.25) - 0.5 * np.log(0.8)
    np.testing.assert_allclose(loss.cross_entropy, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(loss.correct, 0.5)  # only the second one is the likeliest
    np.testing.assert_allclose(loss.weight, 1.5)


def test_parts_of_a_batch_add_up():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4, 3, 7)).astype(np.float32)
    targets = generator.integers(0, 7, (4, 3)).astype(np.int32)
    weights = generator.random((4, 3)).astype(np.float32)
    loss = jax.jit(token_loss)
    whole = loss(logits, targets, weights)
    halves = [loss(*(a[part] for a in (logits, targets, weights))) for part in np.s_[:2, 2:]]
    np.testing.assert_allclose(np.add(*halves), whole, rtol=TOLERANCE)


def test_large_logits_stay_finite():
    logits = np.asarray([[[1e4, -1e4]]], np.float32)
    loss = jax.jit(token_loss)(logits, np.asarray([[1]]), np.ones((1, 1), np.float32))
    np.testing.assert_allclose(loss.cross_entropy, 2e4)
