"""An independent MoE reference in numpy loops, and random parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


# Activations in float64, by the name that a configuration gives them.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0),
}


def feed_forward(
    arrays: Mapping[str, Any], x: np.ndarray, activation: str = "gelu", join: str = "_"
) -> np.ndarray:
    """Two or three projections of x [..., d] in float64.

    Arrays are named wi, wi_bias, ... (or with another `join`, as wi/bias), wg if gated.
    """

    def project(name: str, x: np.ndarray) -> np.ndarray:
        kernel = arrays.get(name, arrays.get(f"{name}{join}kernel"))
        bias = arrays.get(f"{name}{join}bias")
        y = x @ np.asarray(kernel, np.float64)
        return y if bias is None else y + np.asarray(bias, np.float64)

    x = np.asarray(x, np.float64)
    hidden = project("wi", x)
    if "wg" in arrays or f"wg{join}kernel" in arrays:
        hidden = ACTIVATIONS[activation](project("wg", x)) * hidden
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return project("wo", hidden)


def _reference_experts(
    x: np.ndarray,
    expert_index: np.ndarray,
    gate: np.ndarray,
    mask: np.ndarray,
    experts: Experts,
    capacity: int | None,
    activation: str = "gelu",
) -> tuple[np.ndarray, np.ndarray]:
    """Fills slots one assignment after the other: all first choices, then all second ones, ...

    x [t, d], expert_index and gate [t, k], mask [t] -> y [t, d] float64, is_kept [t, k].
    """
    used = [0] * len(experts.wi)
    y = np.zeros(x.shape, np.float64)
    is_kept = np.zeros(expert_index.shape, bool)
    for choice in range(expert_index.shape[1]):
        for token in range(len(x)):
            expert = expert_index[token, choice]
            if not mask[token] or (capacity is not None and used[expert] == capacity):
                continue
            used[expert] += 1
            is_kept[token, choice] = True
            one = {n: a[expert] for n, a in experts._asdict().items() if a is not None}
            y[token] += gate[token, choice] * feed_forward(one, x[token], activation)
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
def reference_feed_forward() -> Callable[..., np.ndarray]:
    """Returns the numpy feed-forward network; see `feed_forward`."""
    return feed_forward


@pytest.fixture
def random_experts() -> Callable[..., Experts]:
    """Returns random_experts(count, dim, mlp, ...): float32 experts of order one."""

    def make(
        count: int,
        dim: int,
        mlp: int,
        seed: int = 0,
        *,
        is_gated: bool = False,
        has_bias: bool = True,
    ) -> Experts:
        generator = np.random.default_rng(seed)
        shapes = {"wi": (dim, mlp), "wi_bias": (mlp,), "wo": (mlp, dim), "wo_bias": (dim,)}
        if is_gated:
            shapes |= {"wg": (dim, mlp), "wg_bias": (mlp,)}
        arrays: dict[str, Any] = {
            name: generator.normal(0, 0.3, (count, *shape)).astype(np.float32)
            for name, shape in shapes.items()
            if has_bias or not name.endswith("_bias")
        }
        return Experts(**arrays)

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


@pytest.fixture
def copied_params(random_params) -> Callable[..., dict[str, Any]]:
    """Returns copied_params(config, distinct, noise=0.0): layer 0's experts are copies of some.

    Copies stand in shuffled order with permuted hidden units. Their router columns are equal up to
    `noise`, which decides among copies at random.
    """

    def make(config: ModelConfig, distinct: int, noise: float = 0.0) -> dict[str, Any]:
        generator = np.random.default_rng(11)
        params = random_params(config)
        moe = params["layers_0"]["moe"]
        copies = config.num_experts[0] // distinct
        origin = generator.permutation(np.repeat(np.arange(distinct), copies))
        kernel = moe["router"]["kernel"][:, origin]
        moe["router"]["kernel"] = kernel + generator.normal(0, noise, kernel.shape).astype("f4")
        experts = {name: array[origin].copy() for name, array in moe["experts"].items()}
        for expert in range(len(origin)):
            order = generator.permutation(config.mlp_dim)
            for name in ("wi", "wg", "wi_bias", "wg_bias", "wo"):
                if name in experts:
                    axis = 1 if name in ("wi", "wg") else 0
                    experts[name][expert] = np.take(experts[name][expert], order, axis)
        moe["experts"] = experts
        return params

    return make
