from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.affinity import AFFINITIES, affinity


def test_cosine_affinity_worked_by_hand(reference):
    h = np.array([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
    A = affinity(reference.statistics(h), "cosine")
    expected = [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 1, 0.5], [0, 0, 0.5, 1]]
    np.testing.assert_allclose(A, expected, atol=1e-12)


def test_pearson_affinity_equals_numpy_corrcoef(reference):
    h = np.random.default_rng(0).normal(size=(50, 5)) + np.arange(5)
    expected = (1 + np.corrcoef(h.T)) / 2
    np.testing.assert_allclose(affinity(reference.statistics(h), "pearson"), expected, atol=1e-9)


def test_centered_affinity_ignores_what_softmax_ignores(reference):
    generator = np.random.default_rng(1)
    h = generator.normal(size=(50, 5))
    shifted = h + 3 * generator.normal(size=(50, 1))
    plain = affinity(reference.statistics(h), "centered")
    np.testing.assert_allclose(
        affinity(reference.statistics(shifted), "centered"), plain, atol=1e-9
    )
    centered = h - h.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(affinity(reference.statistics(centered), "cosine"), plain, atol=1e-9)


def test_a_dead_column_has_affinity_to_itself_only(reference):
    h = np.random.default_rng(2).normal(size=(30, 4))
    h[:, 2] = 0.0
    A = affinity(reference.statistics(h), "cosine")
    np.testing.assert_array_equal(A[2], [0, 0, 1, 0])
    np.testing.assert_array_equal(A[:, 2], [0, 0, 1, 0])


def test_a_constant_column_is_dead_under_pearson(reference):
    h = np.random.default_rng(2).normal(size=(30, 3))
    h[:, 1] = 0.1
    np.testing.assert_array_equal(affinity(reference.statistics(h), "pearson")[1], [0, 1, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), kind=st.sampled_from(AFFINITIES), num_experts=st.integers(1, 6))
def test_affinity_is_symmetric_in_unit_interval_and_follows_a_permutation(
    reference, seed, kind, num_experts
):
    generator = np.random.default_rng(seed)
    h = generator.normal(size=(12, num_experts)) * generator.integers(0, 2, num_experts)
    A = affinity(reference.statistics(h), kind)
    assert A.min() >= 0 and A.max() <= 1
    np.testing.assert_array_equal(A, A.T)
    order = generator.permutation(num_experts)
    permuted = affinity(reference.statistics(h[:, order]), kind)
    np.testing.assert_allclose(permuted, A[np.ix_(order, order)], atol=1e-9)


def test_an_unknown_affinity_names_the_nearest(reference):
    with pytest.raises(InputError, match=r"got 'cosin'; did you mean cosine\?"):
        affinity(reference.statistics(np.eye(3)), "cosin")
