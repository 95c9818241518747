"""An independent MoE reference in numpy loops, and random parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.config import ModelConfig
from uncurl_jax.models.expert_parallel import Experts


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form (Hendrycks and Gimpel, arXiv 1606.08415, section 2), as GPT-2 has it."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _reference_experts(
    x: np.ndarray,
    expert_index: np.ndarray,
    gate: np.ndarray,
    mask: np.ndarray,
    experts: Experts,
    capacity: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fills slots one assignment after the other: all first choices, then all second ones, ...

    x [t, d], expert_index and gate [t, k], mask [t] -> y [t, d] float64, is_kept [t, k].
    """
    wi, wi_bias, wo, wo_bias = (np.asarray(array, np.float64) for array in experts)
    used = [0] * len(wi)
    y = np.zeros(x.shape, np.float64)
    is_kept = np.zeros(expert_index.shape, bool)
    for choice in range(expert_index.shape[1]):
        for token in range(len(x)):
            expert = expert_index[token, choice]
            if not mask[token] or (capacity is not None and used[expert] == capacity):
                continue
            used[expert] += 1
            is_kept[token, choice] = True
            hidden = gelu(x[token].astype(np.float64) @ wi[expert] + wi_bias[expert])
            y[token] += gate[token, choice] * (hidden @ wo[expert] + wo_bias[expert])
    return y, is_kept


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def reference_experts() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Returns the loop reference of one token group; see `_reference_experts`."""
    return _reference_experts


@pytest.fixture
def reference_gelu() -> Callable[[np.ndarray], np.ndarray]:
    """Returns the numpy GELU."""
    return gelu


@pytest.fixture
def random_experts() -> Callable[..., Experts]:
    """Returns random_experts(count, dim, mlp, seed=0): float32 experts of order one."""

    def make(count: int, dim: int, mlp: int, seed: int = 0) -> Experts:
        generator = np.random.default_rng(seed)
        shapes = ((count, dim, mlp), (count, mlp), (count, mlp, dim), (count, dim))
        arrays = (generator.normal(0, 0.3, shape).astype(np.float32) for shape in shapes)
        return Experts._make(arrays)

    return make


@pytest.fixture
def random_params() -> Callable[..., dict[str, Any]]:
    """Returns random_params(config, seed=0): every parameter random, biases and norms too."""

    def make(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        params: dict[str, Any] = {}
        for name, shape in expected_parameters(config).items():
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            scale = 1.0 if "router" in parents else 0.3
            node[last] = generator.normal(0, scale, shape).astype(np.float32)
            if last == "scale":
                node[last] += 1
        return params

    return make
