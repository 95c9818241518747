from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.router import gate_compensation, new_router_kernel, scale_outputs

LABELS, REFERENCES = np.array([0, 1, 0, -1]), np.array([2, 1])
FREQUENCY = np.array([1.0, 5.0, 3.0, 9.0])
KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)


def new_kernel(treatment, kernel: np.ndarray = KERNEL, seed=0, layer=0):
    return new_router_kernel(
        kernel, LABELS, REFERENCES, FREQUENCY, treatment, seed=seed, layer=layer, init_stddev=0.02
    )


def test_reference_keeps_the_references_columns():
    np.testing.assert_array_equal(new_kernel("reference"), KERNEL[:, [2, 1]])


def test_mean_weighs_columns_by_frequency():
    expected = np.stack([0.25 * KERNEL[:, 0] + 0.75 * KERNEL[:, 2], KERNEL[:, 1]], axis=1)
    np.testing.assert_allclose(new_kernel("mean"), expected, rtol=1e-6)


def test_mean_of_equal_columns_is_that_column_bit_for_bit():
    kernel = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    kernel[:, 0] = kernel[:, 2]
    assert new_kernel("mean", kernel).tobytes() == kernel[:, [2, 1]].tobytes()


def test_reinit_is_seeded_differs_by_layer_and_has_the_stddev():
    kernel = np.zeros((2000, 4), np.float32)
    fresh = new_kernel("reinit", kernel)
    assert fresh.shape == (2000, 2) and fresh.dtype == np.float32
    assert fresh.std() == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(fresh, new_kernel("reinit", kernel))
    assert not np.array_equal(fresh, new_kernel("reinit", kernel, seed=1))
    assert not np.array_equal(fresh, new_kernel("reinit", kernel, layer=2))


def test_remap_keeps_every_column():
    kept = new_kernel("remap")
    np.testing.assert_array_equal(kept, KERNEL)
    assert kept is not KERNEL  # a copy: the old kernel may be freed


def test_a_fitted_kernel_is_not_made_from_weights():
    with pytest.raises(InputError, match="A fitted router is part of the plan"):
        new_kernel("fit")


@pytest.mark.parametrize("treatment", ["reinit", "reference", "mean", "remap"])
def test_kernels_keep_their_dtype(treatment):
    assert new_kernel(treatment, KERNEL.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16


def test_an_unknown_treatment_names_the_nearest():
    with pytest.raises(InputError, match=r"got 'means'; did you mean mean\?"):
        new_kernel("means")


def test_a_kernel_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"one label per column, got \(4,\) for a kernel"):
        new_kernel("mean", np.zeros((3, 5), np.float32))


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("treatment", ["reference", "mean"])
def test_n_equal_copies_have_the_factor_one_over_n(reference, treatment, copies):
    h = np.repeat(np.random.default_rng(0).normal(size=(50, 4)), copies, axis=1)
    statistics = reference.statistics(h)
    labels = np.repeat(np.arange(4), copies)
    factors = gate_compensation(statistics, labels, np.arange(4) * copies, treatment)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, 1 / copies, rtol=1e-6)


@pytest.mark.parametrize("treatment", ["reference", "mean"])
def test_no_merge_has_the_factor_exactly_one(reference, treatment):
    h = np.random.default_rng(1).normal(size=(300, 6))
    labels = np.random.default_rng(2).permutation(6)
    factors = gate_compensation(reference.statistics(h), labels, np.argsort(labels), treatment)
    np.testing.assert_array_equal(factors, np.ones(6, np.float32))


def test_factors_worked_by_hand(reference):
    # One token to expert 0 with p = (1/2, 1/4, 1/4), one to expert 2 with p = (1/4, 1/4, 1/2).
    h = np.log([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    factors = gate_compensation(
        reference.statistics(h), np.array([0, 0, 1]), np.array([0, 2]), "reference"
    )
    # Kept columns 0 and 2 give each token 2/3 for its cluster instead of 1/2.
    np.testing.assert_allclose(factors, [0.75, 0.75], rtol=1e-6)


def test_kept_experts_are_compensated_for_the_mass_of_dropped_ones(reference):
    h = np.log([[2.0, 1.0, 1.0]])
    factors = gate_compensation(
        reference.statistics(h), np.array([0, -1, 1]), np.array([0, 2]), "reference"
    )
    np.testing.assert_allclose(factors, [0.75, 1.0], rtol=1e-6)  # expert 2 got no token


def test_factors_keep_the_mean_gate_close_when_clusters_are_uneven(reference):
    generator = np.random.default_rng(3)
    labels = np.array([0, 0, 0, 1, 1, 2])
    h = reference.planted_logits(4, labels, num_tokens=500) + 0.2 * generator.normal(size=6)
    references = np.array([0, 3, 5])
    factors = gate_compensation(reference.statistics(h), labels, references, "reference")
    old, new = reference.softmax(h), reference.softmax(h[:, references])
    cluster = labels[h.argmax(axis=1)]
    for c in range(3):
        rows = cluster == c
        true = old[rows].max(axis=1).mean() / new[rows, c].mean()
        assert factors[c] == pytest.approx(true, rel=0.1)


def test_reinit_has_no_gates_to_compensate(reference):
    statistics = reference.statistics(np.eye(3))
    with pytest.raises(InputError, match="got router 'reinit': use 'reference' or 'mean'"):
        gate_compensation(statistics, np.arange(3), np.arange(3), "reinit")


def test_normalised_gates_are_refused(reference):
    statistics = reference.statistics(np.eye(3))
    statistics = statistics._replace(gate_mass=statistics.selected)
    with pytest.raises(InputError, match="got gates that sum to 3 where the probabilities sum to"):
        gate_compensation(statistics, np.arange(3), np.arange(3), "mean")


def test_scaling_outputs_scales_the_experts_and_leaves_the_rest(reference):
    experts = reference.experts(np.random.default_rng(5), 2)
    scaled = scale_outputs(experts, np.array([0.5, 1.0], np.float32))
    x = np.random.default_rng(6).normal(size=(4, 6))
    for z, factor in ((0, 0.5), (1, 1.0)):
        before, after = ({n: a[z] for n, a in e.items()} for e in (experts, scaled))
        np.testing.assert_allclose(
            reference.expert_output(after, x), factor * reference.expert_output(before, x)
        )
    np.testing.assert_array_equal(scaled["wi"], experts["wi"])
    assert scaled["wo"][1].tobytes() == experts["wo"][1].tobytes()
