from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.budgets import allocate


def layers_of(reference, *usage):
    return {2 * layer: reference.fixed_statistics(row) for layer, row in enumerate(usage)}


def test_a_total_goes_to_the_layers_that_spread_their_tokens(reference):
    layers = layers_of(reference, [8, 4, 2, 1], [10, 9, 8, 7])
    # Over the largest of each layer: 1, .5, .25, .125 and 1, .9, .8, .7.
    expected = {2: (1, 1), 3: (1, 2), 4: (1, 3), 5: (1, 4), 6: (2, 4), 7: (3, 4), 8: (4, 4)}
    for total, counts in expected.items():
        assert tuple(allocate(layers, total, minimum=1).values()) == counts


def test_every_layer_keeps_the_minimum_first(reference):
    layers = layers_of(reference, [8, 0, 0, 0], [1, 1, 1, 1])
    assert allocate(layers, 6, minimum=2) == {0: 2, 2: 4}


def test_counts_are_whole_blocks(reference):
    layers = layers_of(reference, [8, 4, 2, 1, 1, 1], [10, 9, 8, 7, 1, 1])
    # Second blocks of two: (2 + 1) / 8 = .375 and (8 + 7) / 10 = 1.5; third (1 + 1) / 8 and .2.
    assert allocate(layers, 6, minimum=1, multiple_of=2) == {0: 2, 2: 4}
    assert allocate(layers, 8, minimum=1, multiple_of=2) == {0: 4, 2: 4}
    assert allocate(layers, 10, minimum=1, multiple_of=2) == {0: 6, 2: 4}
    assert allocate(layers, 8, minimum=3, multiple_of=2) == {0: 4, 2: 4}  # 3, rounded up to 4


def test_layers_without_any_token_get_what_is_left(reference):
    layers = layers_of(reference, [0, 0, 0], [1, 1, 1])
    assert allocate(layers, 4, minimum=1) == {0: 1, 2: 3}
    assert allocate(layers, 6, minimum=1) == {0: 3, 2: 3}


@pytest.mark.parametrize(
    ("total", "minimum", "multiple_of", "message"),
    [
        (3, 2, 1, r"between 4 \(at least 2 in each of 2 MoE layers\) and 9, got 3"),
        (10, 1, 1, r"and 9, got 10"),
        (5, 1, 2, r"multiple of multiple_of=2 between 4 .* and 8, got 5"),
        (8, 1, 8, "of at least 1, got 4 experts in layer 0: choose a smaller multiple_of"),
        (12, 4, 3, "at least 4, got 4 experts in layer 0"),  # 4, rounded up to 6
    ],
)
def test_totals_that_cannot_be_divided_are_refused(reference, total, minimum, multiple_of, message):
    layers = layers_of(reference, [8, 4, 2, 1], [1, 1, 1, 1, 1])
    with pytest.raises(InputError, match=message):
        allocate(layers, total, minimum=minimum, multiple_of=multiple_of)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), multiple_of=st.integers(1, 3), minimum=st.integers(1, 3))
def test_counts_sum_to_the_total_in_blocks_above_the_minimum(reference, data, multiple_of, minimum):
    least = -(-minimum // multiple_of) * multiple_of
    usage = data.draw(
        st.lists(st.lists(st.integers(0, 50), min_size=least, max_size=12), min_size=1, max_size=4)
    )
    layers = layers_of(reference, *usage)
    most = sum(len(row) // multiple_of for row in usage)
    blocks = data.draw(st.integers(len(usage) * least // multiple_of, most))
    total = blocks * multiple_of
    counts = allocate(layers, total, minimum=minimum, multiple_of=multiple_of)
    assert sum(counts.values()) == total and list(counts) == list(layers)
    for row, count in zip(usage, counts.values(), strict=True):
        assert count % multiple_of == 0 and minimum <= count <= len(row)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), total=st.integers(3, 24))
def test_single_blocks_are_the_globally_largest_normalised_counts(reference, seed, total):
    generator = np.random.default_rng(seed)
    usage = [generator.permutation(np.arange(1, 9) ** power) for power in generator.random(3) + 0.5]
    scores = sorted(
        ((count / row.max(), layer) for layer, row in enumerate(usage) for count in row),
        reverse=True,
    )
    expected = [sum(layer == kept for _, kept in scores[:total]) for layer in range(3)]
    assert list(allocate(layers_of(reference, *usage), total, minimum=1).values()) == expected
