"""What capacity is expected to drop: by hand, by drawing, and as the plan of a prune says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import drops
from uncurl_jax.pruning.plan import expected_drop


def test_two_tokens_and_one_slot_each():
    """Two experts, chosen with 1/2 by each of two tokens: they meet with chance 1/2, one drops."""
    assert drops.drop_fraction([1, 1], 1, num_tokens=2, topk=1) == pytest.approx(0.25)
    # All choose the first: one of two stays.
    assert drops.drop_fraction([1, 0], 1, num_tokens=2, topk=1) == pytest.approx(0.5)
    assert drops.drop_fraction([1, 1], 2, num_tokens=2, topk=1) == 0
    assert drops.drop_fraction([0, 0], 1, num_tokens=2, topk=1) == 0


def test_it_is_the_mean_of_draws():
    generator = np.random.default_rng(0)
    load = np.array([5.0, 3.0, 1.0, 1.0])
    draws = generator.multinomial(64, load / load.sum(), size=20000)
    measured = np.maximum(draws - 20, 0).sum() / draws.sum()
    assert drops.drop_fraction(load, 20, num_tokens=64, topk=1) == pytest.approx(measured, rel=0.02)


def test_with_two_choices_no_expert_gets_a_token_twice():
    """Load 1/2 of all choices, two a token: every token chooses it."""
    load = [4, 2, 1, 1]
    assert drops.drop_fraction(load, 8, num_tokens=16, topk=2) >= (16 - 8) / 32


def test_large_groups_drop_what_a_plan_expects():
    selected = np.array([400.0, 300.0, 200.0, 50.0, 50.0])
    labels = [0, 1, 2, 1, 0]
    load = drops.merged_load(labels, selected)
    assert load.tolist() == [450, 350, 200]
    tokens, factor = 10**7, 1.0
    found = drops.drop_fraction(load, int(tokens * factor / 3), tokens, 1)
    assert found == pytest.approx(expected_drop(labels, selected, factor), abs=1e-4)


def test_experts_that_were_dropped_bring_no_load():
    assert drops.merged_load([0, -1, 1], [3, 9, 2]).tolist() == [3, 2]


@settings(deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=8),
    st.integers(1, 63),
    st.sampled_from([0.0, 0.01, 0.05, 0.2]),
)
def test_more_slots_never_drop_more_and_the_needed_factor_is_enough(load, capacity, limit):
    fewer, more = (drops.drop_fraction(load, c, 64, 1) for c in (capacity, capacity + 1))
    assert 0 <= more <= fewer + 1e-12 and fewer < 1
    factor = drops.needed_factor(load, limit, 64, 1)
    model = ModelConfig((len(load),), 8, 8, 1, 8, 8, capacity_factor=factor, min_capacity=1)
    slots = model.expert_capacity(0, 64, is_training=True)
    assert slots is not None
    assert drops.drop_fraction(load, slots, 64, 1) <= limit


def test_layers_without_capacity_drop_nothing():
    model = ModelConfig((2, 2), 8, 8, 1, 8, 8)
    found = drops.layer_drops(model, {0: [1, 1], 1: [1, 1]}, {0: 1, 1: None}, num_tokens=2)
    assert found == {0: pytest.approx(0.25), 1: 0.0}
