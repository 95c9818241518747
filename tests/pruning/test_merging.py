from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import permute_hidden, select_expert
from uncurl_jax.pruning.merging import merge_arrays, merge_experts, normalized_weights


def test_weighted_mean_worked_by_hand():
    array = np.array([[1.0], [5.0], [7.0], [9.0]], np.float32)
    got = merge_arrays(array, [0, 0, -1, 1], np.array([0.25, 0.75, 0.0, 1.0]))
    np.testing.assert_array_equal(got, [[4.0], [9.0]])


def test_merge_equals_numpys_average(reference):
    experts = reference.experts(np.random.default_rng(0), 6)
    labels = np.array([0, 1, 0, 1, 1, -1])
    weights = normalized_weights(labels, np.array([3.0, 1, 5, 2, 2, 9]))
    merged = merge_experts(experts, labels, weights)
    for name, array in experts.items():
        assert merged[name].dtype == np.float32
        for cluster in range(2):
            m = labels == cluster
            expected = np.average(array[m].astype(np.float64), axis=0, weights=weights[m])
            np.testing.assert_allclose(merged[name][cluster], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_merge_of_identical_experts_is_identity_bit_for_bit(reference, dtype):
    experts = reference.experts(np.random.default_rng(1), 1, dtype=dtype)
    copies = {name: np.repeat(array, 3, axis=0) for name, array in experts.items()}
    merged = merge_experts(copies, [0, 0, 0], np.array([0.1, 0.2, 0.7], np.float32))
    for name, array in experts.items():
        assert merged[name].dtype == dtype
        assert merged[name].tobytes() == array.tobytes()


def test_singletons_are_copied_bit_for_bit(reference):
    experts = reference.experts(np.random.default_rng(2), 3)
    experts["wi"][1, 0, 0] = np.float32(-0.0)
    permutations = np.tile(np.arange(10)[::-1], (3, 1))
    merged = merge_experts(experts, [1, 0, -1], np.array([1, 1, 0]), permutations=permutations)
    for name, array in experts.items():
        assert merged[name].tobytes() == array[[1, 0]].tobytes()


def test_half_precision_is_averaged_in_float32():
    array = np.array([[1.0], [1.0 + 2**-7], [1.0 + 2**-7]], ml_dtypes.bfloat16)
    got = merge_arrays(array, [0, 0, 0], np.full(3, 1 / 3, np.float32))
    # the mean, 1.0052, rounds up; bfloat16 sums of thirds would round to 1.0
    assert got.dtype == array.dtype and float(got[0, 0]) == 1.0 + 2**-7


def test_members_are_permuted_before_they_are_averaged(reference):
    expert = reference.experts(np.random.default_rng(3), 1)
    order = np.random.default_rng(4).permutation(10)
    shuffled = permute_hidden(select_expert(expert, 0), order)
    both = {name: np.stack([array[0], shuffled[name]]) for name, array in expert.items()}
    permutations = np.stack([np.arange(10), np.argsort(order)])
    merged = merge_experts(both, [0, 0], np.full(2, 0.5), permutations=permutations)
    for name, array in expert.items():
        np.testing.assert_array_equal(merged[name], array)


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 2), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_weights_sum_to_one_in_each_cluster_and_are_zero_outside(labels, seed):
    mass = np.random.default_rng(seed).integers(0, 3, len(labels)).astype(float)
    weights = normalized_weights(np.array(labels), mass)
    assert weights.dtype == np.float32 and (weights >= 0).all()
    for cluster in set(labels):
        total = weights[np.array(labels) == cluster].sum()
        assert total == pytest.approx(0.0 if cluster < 0 else 1.0, abs=1e-6)


def test_a_cluster_that_no_token_selected_has_equal_weights():
    weights = normalized_weights(np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 3.0, 1.0]))
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0.75, 0.25])


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, 2, 2], [1, 0.5, 0.5], r"Every cluster in \[0, 3\) needs a member, got none in \[1\]"),
        ([-1, -1, -1], [0, 0, 0], r"Every cluster in \[0, 0\)"),
        ([0, 0], [0.5, 0.5], r"one label per expert, got \(2,\) for 3 experts"),
        ([0, 0, 0], [0.5, 0.5], r"one weight per expert, got \(2,\) for 3 experts"),
    ],
)
def test_labels_and_weights_that_do_not_fit_are_refused(reference, labels, weights, message):
    with pytest.raises(InputError, match=message):
        merge_experts(reference.experts(np.random.default_rng(0), 3), labels, np.array(weights))


def test_permutations_of_other_experts_are_refused(reference):
    experts = reference.experts(np.random.default_rng(0), 2)
    with pytest.raises(InputError, match=r"\[expert, mlp\] = \(2, 10\), got \(3, 10\)"):
        merge_experts(experts, [0, 0], [0.5, 0.5], permutations=np.zeros((3, 10), int))
