from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.pruning.assignment import best_assignment


def test_the_best_assignment_worked_by_hand():
    # 8 + 3 = 11 beats 10 + 0
    np.testing.assert_array_equal(best_assignment(np.array([[10.0, 8.0], [3.0, 0.0]])), [1, 0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 30), scale=st.floats(1e-6, 1e6))
def test_the_sum_is_that_of_scipys_assignment(seed, size, scale):
    generator = np.random.default_rng(seed)
    rows = np.exp(generator.normal(size=(size, 1)))
    products = scale * rows * generator.normal(size=(size, size))
    found = best_assignment(products)
    assert sorted(found) == list(range(size))
    expected = scipy.optimize.linear_sum_assignment(products, maximize=True)[1]
    total = products[np.arange(size), expected].sum()
    assert products[np.arange(size), found].sum() == pytest.approx(total, rel=1e-12)


def test_ties_are_broken_the_same_way_each_time():
    products = np.random.default_rng(0).integers(0, 3, (40, 40)).astype(np.float32)
    before = products.copy()
    first = best_assignment(products)
    np.testing.assert_array_equal(products, before)
    np.testing.assert_array_equal(best_assignment(products), first)


@pytest.mark.parametrize("kind", ["unrelated", "related"])
def test_float32_products_lose_less_than_a_millionth(kind):
    generator = np.random.default_rng(1)
    first = generator.normal(size=(300, 128)).astype(np.float32)
    second = generator.normal(size=(300, 128)).astype(np.float32)
    if kind == "related":
        second = second + first[generator.permutation(300)]
    exact = first.astype(np.float64) @ second.T.astype(np.float64)
    expected = scipy.optimize.linear_sum_assignment(exact, maximize=True)[1]
    found = best_assignment(first @ second.T)
    rows = np.arange(300)
    assert exact[rows, found].sum() == pytest.approx(exact[rows, expected].sum(), rel=1e-6)


def test_worker_processes_load_neither_jax_nor_scikit_learn():
    code = (
        "import sys, uncurl_jax.pruning.alignment; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'sklearn', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
