"""The loop over blocks against the numpy loop over tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.export.quantization import quantize
from uncurl_jax.models.expert_loop import apply_in_loop, dequantized
from uncurl_jax.models.routing import _top_k_by_rounds

EXPERTS, DIM, MLP = 5, 6, 8


def run(x, index, wanted, gate, experts):
    x, index, wanted, gate = (jnp.asarray(array) for array in (x, index, wanted, gate))
    experts = jax.tree.map(jnp.asarray, experts)
    return np.asarray(apply_in_loop(x, index, wanted, gate, experts, jax.nn.gelu))


@pytest.mark.parametrize(
    ("num_tokens", "topk", "crowd"),
    [
        (1, 1, 0),
        (7, 2, 0),
        (40, 2, 0),  # every expert in one or two small blocks
        (40, 1, 16),  # two small blocks and no more
        (40, 1, 17),  # the busiest expert has too many for small blocks
        (150, 2, 129),  # three large blocks, the last one with a row
    ],
)
@pytest.mark.parametrize("is_gated", [False, True])
def test_tokens_get_what_their_experts_make_of_them(
    num_tokens, topk, crowd, is_gated, random_experts, reference_experts
):
    generator = np.random.default_rng(num_tokens + topk)
    experts = random_experts(EXPERTS, DIM, MLP, is_gated=is_gated)
    x = generator.normal(size=(num_tokens, DIM)).astype(np.float32)
    # `crowd` tokens go to expert 3 first.
    index = np.stack([generator.permutation(EXPERTS)[:topk] for _ in range(num_tokens)])
    index[index[:, 0] == 3] = np.arange(topk)
    index[:crowd] = (3 + np.arange(topk)) % EXPERTS
    gate = generator.uniform(size=(num_tokens, topk)).astype(np.float32)
    mask = generator.uniform(size=num_tokens) < 0.8
    mask[: max(crowd, 1)] = True
    y = run(x, index.astype(np.int32), np.repeat(mask[:, None], topk, 1), gate, experts)
    expected, _ = reference_experts(x, index, gate, mask, experts, None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not y[~mask].any()


def test_nothing_wanted_gives_zeros(random_experts):
    experts = random_experts(EXPERTS, DIM, MLP)
    x = np.full((3, DIM), np.nan, np.float32)
    wanted, gate = np.zeros((3, 2), bool), np.ones((3, 2), np.float32)
    assert not run(x, np.zeros((3, 2), np.int32), wanted, gate, experts).any()


def test_int8_kernels_are_multiplied_by_their_scales(random_experts):
    experts = random_experts(EXPERTS, DIM, MLP, is_gated=True)
    parts = {name: quantize(np.asarray(getattr(experts, name))) for name in ("wi", "wo", "wg")}
    small = experts._replace(
        **{name: jnp.asarray(part.values) for name, part in parts.items()},
        **{f"{name}_scale": jnp.asarray(part.scale) for name, part in parts.items()},
    )
    by_hand = experts._replace(
        **{name: part.values * part.scale[:, None] for name, part in parts.items()}
    )
    for name in parts:
        np.testing.assert_array_equal(
            getattr(dequantized(small, jnp.float32), name), getattr(by_hand, name)
        )
    assert dequantized(small, jnp.float32).wi_scale is None
    generator = np.random.default_rng(3)
    x = generator.normal(size=(9, DIM)).astype(np.float32)
    index = generator.integers(0, EXPERTS, (9, 1)).astype(np.int32)
    ones = np.ones((9, 1), np.float32)
    found = run(x, index, ones > 0, ones, small)
    np.testing.assert_allclose(found, run(x, index, ones > 0, ones, by_hand), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_repeated_maxima_are_the_largest_in_the_order_of_top_k(k):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 4, (30, 5)) / 4, jnp.float32)
    for found, expected in zip(_top_k_by_rounds(values, k), jax.lax.top_k(values, k), strict=True):
        np.testing.assert_array_equal(found, expected)
