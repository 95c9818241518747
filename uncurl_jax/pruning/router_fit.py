"""Router "fit": the router over clusters that is closest to the old router's own decisions.

For a token with old router probabilities p, the target is q, q_c = sum of p over the members of
cluster c (renormalised where experts are dropped). Minimised is the mean over the task's tokens of
KL(q || softmax(x W)), which is convex in W, needs no labels, and starts from the "mean" columns.
Axes: token, embed, expert (Z), cluster (D).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

from uncurl_jax.errors import InputError

# The fit stops when no entry of the gradient (of the mean KL in nats, in whitened coordinates) is
# larger; KL is then within about this, squared and halved, of its minimum.
GRADIENT_TOLERANCE = 1e-4
MAX_ITERATIONS = 500
# Relative ridge of the whitening: directions that the sample hardly has move little.
_RIDGE = 1e-4


class RouterFit(NamedTuple):
    """A fitted router.

    Attributes:
      kernel: [embed, cluster] float32.
      kl_before: mean KL in nats of the starting columns, on the sample.
      kl_after: mean KL of `kernel`.
      gradient: largest entry of the last gradient.
      iterations: of L-BFGS.
      has_converged: whether `gradient` is within GRADIENT_TOLERANCE.
    """

    kernel: np.ndarray
    kl_before: float
    kl_after: float
    gradient: float
    iterations: int
    has_converged: bool


def fit_router(
    inputs: np.ndarray,
    kernel: np.ndarray,
    labels: npt.ArrayLike,
    start: np.ndarray,
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> RouterFit:
    """Fits a router over clusters to the old router's decisions.

    L-BFGS on the device's value and gradient, in coordinates in which the inputs are white, so that
    it takes tens of iterations however correlated the inputs are.

    Args:
      inputs: [token, embed] float32, the layer's inputs on the task.
      kernel: [embed, expert] float, the old router.
      labels: [expert] int in [-1, cluster), -1 for dropped experts.
      start: [embed, cluster] float, columns to begin with.
      max_iterations: of L-BFGS.

    Returns:
      The fit; never worse than `start` on the sample.

    Raises:
      InputError: If shapes do not fit.
    """
    labels = np.asarray(labels)
    num_clusters = int(labels.max(initial=-1)) + 1
    embed = kernel.shape[0]
    if inputs.ndim != 2 or inputs.shape[1] != embed or start.shape != (embed, num_clusters):
        raise InputError(
            f"A router fit needs inputs [token, {embed}] and start [{embed}, {num_clusters}], got "
            f"{inputs.shape} and {start.shape}: take the inputs of the same checkpoint."
        )
    x = np.asarray(inputs, np.float32)
    member = (labels[:, None] == np.arange(num_clusters)).astype(np.float32)
    target = _targets(x, np.asarray(kernel, np.float32), member)
    covariance = x.T.astype(np.float64) @ x / len(x)
    ridge = _RIDGE * np.trace(covariance) / embed + np.finfo(np.float64).tiny
    factor = scipy.linalg.cholesky(covariance + ridge * np.eye(embed), lower=True)
    whitener = scipy.linalg.solve_triangular(factor, np.eye(embed), lower=True).T
    white = jnp.asarray(x @ whitener.astype(np.float32))
    # Logits that are constant over clusters do not matter; x start is where V = 0.
    base = _multiply(jnp.asarray(x), jnp.asarray(start, jnp.float32))

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        change = jnp.asarray(flat.reshape(embed, num_clusters), jnp.float32)
        value, gradient = _kl_and_gradient(change, white, base, target)
        return float(value), np.asarray(gradient, np.float64).reshape(-1)

    zero = np.zeros(embed * num_clusters)
    kl_before, first_gradient = value_and_gradient(zero)
    found = scipy.optimize.minimize(
        value_and_gradient,
        zero,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "gtol": GRADIENT_TOLERANCE, "ftol": 0.0},
    )
    kl_after, gradient = float(found.fun), float(np.abs(found.jac).max())
    if not np.isfinite(kl_after) or kl_after > kl_before:
        start = np.asarray(start, np.float32)
        gradient = float(np.abs(first_gradient).max())
        converged = gradient <= GRADIENT_TOLERANCE
        return RouterFit(start, kl_before, kl_before, gradient, 0, converged)
    fitted = np.asarray(start, np.float64) + whitener @ found.x.reshape(embed, num_clusters)
    return RouterFit(
        fitted.astype(np.float32),
        kl_before,
        kl_after,
        gradient,
        int(found.nit),
        gradient <= GRADIENT_TOLERANCE,
    )


def sampled_gate_compensation(
    inputs: np.ndarray, kernel: np.ndarray, labels: npt.ArrayLike, fitted: np.ndarray
) -> np.ndarray:
    """Returns the factor of each merged expert's output that keeps the gates' scale, measured.

    factor = mean old gate / mean new gate over the sampled tokens whose old first choice is a
    member of the cluster.

    Args:
      inputs: [token, embed] float32.
      kernel: [embed, expert], the old router.
      labels: [expert] int in [-1, cluster).
      fitted: [embed, cluster], the new router.

    Returns:
      [cluster] float32 > 0; 1 for a cluster that no sampled token chose.
    """
    labels = np.asarray(labels)
    x = jnp.asarray(inputs, jnp.float32)
    old = np.asarray(jax.nn.softmax(_multiply(x, jnp.asarray(kernel, jnp.float32))), np.float64)
    new = np.asarray(jax.nn.softmax(_multiply(x, jnp.asarray(fitted, jnp.float32))), np.float64)
    chosen = old.argmax(axis=1)
    cluster = labels[chosen]
    factors = np.ones(new.shape[1], np.float32)
    for index in range(new.shape[1]):
        rows = np.flatnonzero(cluster == index)
        if len(rows):
            factors[index] = old[rows, chosen[rows]].sum() / new[rows, index].sum()
    return factors


def _targets(x: np.ndarray, kernel: np.ndarray, member: np.ndarray) -> jax.Array:
    probabilities = jax.nn.softmax(_multiply(jnp.asarray(x), jnp.asarray(kernel)))
    target = _multiply(probabilities, jnp.asarray(member))
    return target / jnp.maximum(target.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@jax.jit
def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _mean_kl(change: jax.Array, white: jax.Array, base: jax.Array, target: jax.Array) -> jax.Array:
    log_new = jax.nn.log_softmax(base + _multiply(white, change), axis=-1)
    log_target = jnp.log(jnp.maximum(target, jnp.finfo(jnp.float32).tiny))
    return jnp.mean(jnp.sum(target * (log_target - log_new), axis=-1))


@jax.jit
def _kl_and_gradient(change, white, base, target):
    return jax.value_and_grad(_mean_kl)(change, white, base, target)
