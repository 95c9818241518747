from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncurl_jax.models import routing

TOLERANCE = 1e-5


@functools.partial(jax.jit, static_argnums=(1, 2))
def choose(logits: jax.Array, num_selected: int, normalize_gates: bool) -> routing.RouterChoice:
    return routing.choose_experts(logits, num_selected, normalize_gates=normalize_gates)


ranks = jax.jit(routing.ranks_within_expert, static_argnums=2)


def test_the_gate_of_top_1_is_the_softmax_probability():
    logits = np.log(np.asarray([[0.2, 0.5, 0.3]], np.float32))
    choice = choose(logits, 1, False)
    np.testing.assert_array_equal(choice.expert_index, [[1]])
    np.testing.assert_allclose(choice.gate, [[0.5]], rtol=TOLERANCE)
    np.testing.assert_allclose(choice.probabilities, [[0.2, 0.5, 0.3]], rtol=TOLERANCE)


@pytest.mark.parametrize(("normalize", "gates"), [(False, [0.5, 0.3]), (True, [0.625, 0.375])])
def test_the_gates_of_top_2_are_best_first_and_normalised_on_request(
    normalize: bool, gates: list[float]
):
    logits = np.log(np.asarray([[0.2, 0.5, 0.3]], np.float32))
    choice = choose(logits, 2, normalize)
    np.testing.assert_array_equal(choice.expert_index, [[1, 2]])
    np.testing.assert_allclose(choice.gate, [gates], rtol=TOLERANCE)


def test_equal_logits_go_to_the_lowest_experts():
    choice = choose(np.zeros((1, 4), np.float32), 2, False)
    np.testing.assert_array_equal(choice.expert_index, [[0, 1]])


def test_routing_is_float32_even_from_bfloat16():
    choice = choose(jnp.zeros((2, 3), jnp.bfloat16), 1, False)
    assert {choice.logits.dtype, choice.probabilities.dtype, choice.gate.dtype} == {
        jnp.dtype("float32")
    }
    assert choice.expert_index.dtype == jnp.int32


def test_ranks_worked_by_hand():
    # First choices in token order, then second choices; token 2 is padding.
    index = np.asarray([[0, 1], [0, 2], [0, 1], [1, 0]], np.int32)
    mask = np.asarray([True, True, False, True])
    found, counts = ranks(index, mask, 3)
    np.testing.assert_array_equal(np.asarray(found)[mask], [[0, 1], [1, 0], [0, 2]])
    np.testing.assert_array_equal(counts, [3, 2, 1])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), topk=st.sampled_from([1, 2]))
def test_ranks_count_the_earlier_assignments_to_the_same_expert(data: st.DataObject, topk: int):
    num_tokens, num_experts = 9, 4
    choices = st.permutations(range(num_experts)).map(lambda order: order[:topk])
    index = np.asarray(data.draw(st.lists(choices, min_size=num_tokens, max_size=num_tokens)))
    mask = np.asarray(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    found, counts = ranks(index.astype(np.int32), mask, num_experts)
    seen = [0] * num_experts
    for choice in range(topk):
        for token in range(num_tokens):
            if mask[token]:
                assert found[token, choice] == seen[index[token, choice]]
                seen[index[token, choice]] += 1
    np.testing.assert_array_equal(counts, seen)


def test_the_load_balancing_loss_worked_by_hand():
    probabilities = np.asarray([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]], np.float32)
    index = np.asarray([[0], [0], [1], [1]], np.int32)
    mask = np.asarray([True, True, True, False])
    # f = (2/3, 1/3), P = (1.4, 1.6) / 3: 2 * (2/3 * 1.4/3 + 1/3 * 1.6/3)
    loss = jax.jit(routing.load_balancing_loss)(probabilities, index, mask)
    np.testing.assert_allclose(loss, 2 * (2 * 1.4 + 1.6) / 9, rtol=TOLERANCE)


def test_the_load_balancing_loss_is_one_when_balanced_for_top_1_and_top_2():
    probabilities = np.full((4, 4), 0.25, np.float32)
    loss = jax.jit(routing.load_balancing_loss)
    mask = np.ones(4, bool)
    one = loss(probabilities, np.asarray([[0], [1], [2], [3]], np.int32), mask)
    two = loss(probabilities, np.asarray([[0, 1], [1, 2], [2, 3], [3, 0]], np.int32), mask)
    np.testing.assert_allclose([one, two], 1.0, rtol=TOLERANCE)


def test_the_load_balancing_loss_has_a_gradient_through_the_probabilities():
    probabilities = np.asarray([[0.7, 0.3], [0.6, 0.4]], np.float32)
    index = np.asarray([[0], [0]], np.int32)
    gradient = jax.jit(jax.grad(routing.load_balancing_loss))(
        probabilities, index, np.ones(2, bool)
    )
    # d/dp_ti of E * sum_i f_i * mean_t p_ti is E * f_i / tokens.
    np.testing.assert_allclose(gradient, [[1.0, 0.0], [1.0, 0.0]], atol=TOLERANCE)


def test_the_router_z_loss_worked_by_hand():
    logits = np.log(np.asarray([[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]], np.float32))
    mask = np.asarray([True, True, False])
    loss = jax.jit(routing.router_z_loss)(logits, mask)
    np.testing.assert_allclose(loss, (np.log(2) ** 2 + np.log(4) ** 2) / 2, rtol=TOLERANCE)


def test_losses_without_any_token_are_zero():
    none = np.zeros(2, bool)
    balance = jax.jit(routing.load_balancing_loss)(
        np.full((2, 2), 0.5, np.float32), np.zeros((2, 1), np.int32), none
    )
    z_loss = jax.jit(routing.router_z_loss)(np.ones((2, 2), np.float32), none)
    assert float(balance) == float(z_loss) == 0.0
