from __future__ import annotations

import itertools
import multiprocessing

import ml_dtypes
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import (
    AlignmentPool,
    align_clusters,
    align_expert,
    alignment_permutation,
    feature_products,
    permute_hidden,
    select_expert,
)


def one_expert(reference, seed, **options):
    return select_expert(reference.experts(np.random.default_rng(seed), 1, **options), 0)


def test_feature_products_worked_by_hand():
    first = {"wi": np.array([[1.0, 2.0]]), "wo": np.array([[3.0], [0.0]])}
    second = {"wi": np.array([[0.0, 5.0]]), "wo": np.array([[1.0], [1.0]])}
    # M_ij = wi_i wi_j + wo_i wo_j
    np.testing.assert_array_equal(feature_products(first, second), [[3, 8], [0, 10]])
    np.testing.assert_array_equal(alignment_permutation(first, second), [0, 1])


def test_unit_features_are_scaled_to_norm_one_and_zeros_stay():
    first = {"wi": np.array([[3.0, 0.0]]), "wo": np.array([[4.0], [0.0]])}
    second = {"wi": np.array([[0.0, 6.0]]), "wo": np.array([[2.0], [8.0]])}
    # features of `first`: (3, 4) / 5 and zeros; of `second`: (0, 1) and (6, 8) / 10
    expected = [[0.8, 1.0], [0.0, 0.0]]
    np.testing.assert_allclose(feature_products(first, second, "unit_features"), expected)
    aligned = align_expert(first, second, "unit_features")
    np.testing.assert_array_equal(aligned.permutation, [1, 0])
    # cosines of the matrices of unit features, whose norms are 1 and sqrt(2)
    assert aligned.similarity_before == pytest.approx(0.8 / 2**0.5)
    assert aligned.similarity_after == pytest.approx(1.0 / 2**0.5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), gated=st.booleans())
def test_unit_features_do_not_see_how_large_a_unit_is(reference, seed, gated):
    generator = np.random.default_rng(seed)
    experts = reference.experts(generator, 2, embed=3, mlp=5, gated=gated)
    first, second = select_expert(experts, 0), select_expert(experts, 1)
    scale = generator.uniform(0.1, 10, 5).astype(np.float32)
    scaled = {
        name: array * (scale[:, None] if name == "wo" else scale) if name != "wo_bias" else array
        for name, array in second.items()
    }
    products = feature_products(first, second, "unit_features")
    np.testing.assert_allclose(
        feature_products(first, scaled, "unit_features"), products, rtol=1e-5, atol=1e-6
    )
    assert np.abs(products).max() <= 1 + 1e-6


def test_an_unknown_alignment_is_refused(reference):
    expert = one_expert(reference, 0)
    with pytest.raises(InputError, match=r"features, unit_features .* got 'none'"):
        feature_products(expert, expert, "none")


@pytest.mark.parametrize("gated", [False, True])
def test_permuting_hidden_units_leaves_the_output_unchanged(reference, gated):
    expert = one_expert(reference, 0, gated=gated)
    x = np.random.default_rng(1).normal(size=(8, 6))
    permuted = permute_hidden(expert, np.random.default_rng(2).permutation(10))
    assert not np.array_equal(permuted["wi"], expert["wi"])
    np.testing.assert_allclose(
        reference.expert_output(permuted, x), reference.expert_output(expert, x), atol=1e-10
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_alignment_recovers_a_planted_permutation_exactly(reference, gated, dtype):
    expert = one_expert(reference, 3, gated=gated, mlp=40, dtype=dtype)
    planted = np.random.default_rng(4).permutation(40)
    shuffled = permute_hidden(expert, planted)
    found = alignment_permutation(expert, shuffled)
    np.testing.assert_array_equal(planted[found], np.arange(40))
    restored = permute_hidden(shuffled, found)
    for name in expert:
        np.testing.assert_array_equal(restored[name], expert[name])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_no_permutation_beats_the_alignment(reference, seed):
    experts = reference.experts(np.random.default_rng(seed), 2, embed=3, mlp=5)
    first, second = select_expert(experts, 0), select_expert(experts, 1)
    M = feature_products(first, second)
    expected = first["wi"].T.astype(np.float64) @ second["wi"] + first["wo"].astype(np.float64) @ (
        second["wo"].T
    )
    np.testing.assert_allclose(M, expected, atol=1e-5)
    rows = np.arange(5)
    found = alignment_permutation(first, second)
    best = max(M[rows, list(order)].sum() for order in itertools.permutations(range(5)))
    assert M[rows, found].sum() == pytest.approx(best)
    _, columns = scipy.optimize.linear_sum_assignment(-M)
    np.testing.assert_array_equal(found, columns)


def layer(reference, seed=0, **options):
    """Five experts, of which 0, 2 and 4 form a cluster, 1 stands alone and 3 is dropped."""
    experts = reference.experts(np.random.default_rng(seed), 5, **options)
    return experts, np.array([0, 1, 0, -1, 0]), np.array([2, 1])


def test_only_members_beside_the_reference_are_permuted(reference):
    experts, labels, references = layer(reference)
    heard = []
    got = align_clusters(experts, labels, references, progress=lambda *seen: heard.append(seen))
    assert heard == [(1, 2), (2, 2)]
    assert got.permutations.dtype == np.int32
    for z in (1, 2, 3):
        np.testing.assert_array_equal(got.permutations[z], np.arange(10))
    for z in (0, 4):
        expected = alignment_permutation(select_expert(experts, 2), select_expert(experts, z))
        np.testing.assert_array_equal(got.permutations[z], expected)
    np.testing.assert_array_equal(got.similarity_before[[1, 2, 3]], [1, 1, 0])
    assert (got.similarity_after >= got.similarity_before).all()


def test_similarity_after_aligning_a_shuffled_copy_is_one(reference):
    experts, labels, references = layer(reference)
    copy = permute_hidden(select_expert(experts, 2), np.roll(np.arange(10), 3))
    for name, array in experts.items():
        array[4] = copy[name]
    got = align_clusters(experts, labels, references)
    assert got.similarity_after[4] == pytest.approx(1.0)
    assert got.similarity_before[4] < 0.9


def test_an_all_zero_member_has_similarity_zero(reference):
    experts, labels, references = layer(reference)
    for array in experts.values():
        array[4] = 0
    got = align_clusters(experts, labels, references)
    assert got.similarity_before[4] == got.similarity_after[4] == 0


def test_worker_processes_give_the_same_alignment(reference):
    experts, labels, references = layer(reference, dtype=ml_dtypes.bfloat16)
    alone = align_clusters(experts, labels, references)
    pooled = align_clusters(experts, labels, references, workers=2)
    for a, b in zip(alone, pooled, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_expert_that_is_not_finite_is_refused_by_any_process(reference, workers):
    experts, labels, references = layer(reference)
    experts["wo"][4, 0, 0] = np.inf
    with pytest.raises(InputError, match="Experts to align must be finite"):
        align_clusters(experts, labels, references, workers=workers)


def test_a_worker_that_dies_is_an_error(reference):
    expert = one_expert(reference, 0)
    with AlignmentPool(1, "features") as pool:
        assert pool.submit(0, expert, expert).result().similarity_after == pytest.approx(1.0)
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        with pytest.raises(RuntimeError, match="must not end by itself, got exit code -9"):
            pool.submit(0, expert, expert).result()


def test_negative_workers_are_refused(reference):
    with pytest.raises(InputError, match="workers must not be negative, got -1"):
        align_clusters(*layer(reference), workers=-1)


def test_experts_of_different_shapes_do_not_align(reference):
    with pytest.raises(InputError, match="must have the same arrays"):
        alignment_permutation(one_expert(reference, 0), one_expert(reference, 0, mlp=4))
    with pytest.raises(InputError, match="must have the same arrays"):
        alignment_permutation(one_expert(reference, 0), one_expert(reference, 0, gated=True))


def test_experts_that_are_not_finite_do_not_align(reference):
    expert = one_expert(reference, 0)
    expert["wi"] = np.full_like(expert["wi"], np.nan)
    with pytest.raises(InputError, match="Experts to align must be finite"):
        alignment_permutation(expert, one_expert(reference, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.ones(3)}, "got kernel, wi, wi_bias, wo, wo_bias: rename its arrays"),
        ({"wo": np.ones((6, 10))}, r"wo of an expert .* must have shape \(10, 6\), got \(6, 10\)"),
        ({"wi_bias": np.ones(6)}, r"wi_bias of an expert .* must have shape \(10,\), got \(6,\)"),
        ({"wo_bias": np.ones(10)}, r"wo_bias .* must have shape \(6,\), got \(10,\)"),
    ],
)
def test_arrays_that_are_no_expert_are_refused(reference, change, message):
    with pytest.raises(InputError, match=message):
        permute_hidden({**one_expert(reference, 0), **change}, np.arange(10))


def test_an_expert_needs_both_projections():
    with pytest.raises(InputError, match="must hold wi and wo"):
        permute_hidden({"wi": np.ones((2, 3))}, np.arange(3))
