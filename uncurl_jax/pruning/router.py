"""The router after a merge: new columns, and factors that keep the gates' scale.

Axes: embed, expert (Z, before), cluster (D, after).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.merging import merge_arrays, normalized_weights
from uncurl_jax.pruning.statistics import LayerStatistics

TREATMENTS = ("reinit", "reference", "mean", "fit", "remap")


def new_router_kernel(
    kernel: np.ndarray,
    labels: npt.ArrayLike,
    reference: npt.ArrayLike,
    frequency: npt.ArrayLike,
    treatment: str,
    *,
    seed: int,
    layer: int,
    init_stddev: float,
) -> np.ndarray:
    """Returns the router's kernel over clusters.

    Args:
      kernel: [embed, expert] float, the unpruned router.
      labels: [expert] int, -1 for dropped experts.
      reference: [cluster] int, each cluster's reference expert.
      frequency: [expert] >= 0, how often each expert is selected, or its share in its cluster (a
        plan's weights); used by "mean".
      treatment: "reinit" (normal values, the paper's; to be trained before use), "reference" (the
        reference's column), "mean" (frequency-weighted mean of the members' columns) or "remap"
        (the kernel as it is, [embed, expert]; the model maps its columns to clusters). "fit" needs
        the task's tokens: see `fit_router`.
      seed: seed of "reinit".
      layer: index of the layer, so that layers differ under "reinit".
      init_stddev: standard deviation of "reinit" (`ModelConfig.init_stddev`).

    Returns:
      [embed, cluster] in the dtype of `kernel`.

    Raises:
      InputError: If the treatment is unknown or labels do not fit the kernel.
    """
    require_choice("router", treatment, TREATMENTS)
    if treatment == "fit":
        raise InputError("A fitted router is part of the plan, got treatment 'fit': take it there.")
    labels, reference = np.asarray(labels), np.asarray(reference)
    if labels.shape != kernel.shape[1:]:
        raise InputError(
            f"A router needs one label per column, got {labels.shape} for a kernel of shape "
            f"{kernel.shape}: the plan is of another model."
        )
    if treatment == "remap":
        return np.array(kernel)
    if treatment == "reference":
        return np.take(kernel, reference, axis=1)
    if treatment == "mean":
        shares = normalized_weights(labels, frequency)
        return np.ascontiguousarray(merge_arrays(kernel.T, labels, shares).T)
    key = jax.random.fold_in(jax.random.key(seed), layer)
    shape = (kernel.shape[0], len(reference))
    values = jax.nn.initializers.normal(init_stddev)(key, shape, jnp.float32)
    return np.asarray(values).astype(kernel.dtype)


def gate_compensation(
    statistics: LayerStatistics,
    labels: npt.ArrayLike,
    reference: npt.ArrayLike,
    treatment: str,
) -> np.ndarray:
    """Returns the factor of each merged expert's output that keeps the MoE branch's scale.

    factor = mean gate before / mean gate after, over the assignments of tokens to the cluster's
    members. Before: the members' own softmax probabilities. After: what the new columns give these
    tokens, p_c / sum_c' p_c' with p_c the old probability of the cluster's reference ("reference")
    or the frequency-weighted mean of the members' ("mean"), estimated as a ratio of sums so that
    the additive `routed_prob` is enough:

      after_c = sum_i R_i . b_c / sum_c' sum_i R_i . b_c',   i in c, R = routed_prob, b = weights.

    The ratio is exact where sum_c' p_c' is the same for all tokens: n copies of every expert give
    1/n, and D = Z gives 1. Otherwise it is an estimate, as are "mean" columns of experts that
    differ (a mean of logits is a geometric mean of probabilities, at most the arithmetic one), and
    tokens that a dropped expert or a changed router sends here are not foreseen. With top-k > 1 a
    token whose experts share a cluster counts once for each.

    Args:
      statistics: one layer's sums.
      labels: [expert] int, -1 for dropped experts.
      reference: [cluster] int.
      treatment: "reference" or "mean".

    Returns:
      [cluster] float32 > 0; 1 for a cluster that no token selected.

    Raises:
      InputError: For "reinit", whose gates are unknown until it is trained, and where gates are not
        softmax probabilities (normalised over the top-k).
    """
    require_choice("router", treatment, TREATMENTS)
    if treatment == "reinit":
        raise InputError(
            "gate_compensation needs a router whose gates can be predicted, got router 'reinit': "
            "use 'reference' or 'mean', or turn gate_compensation off."
        )
    require_softmax_gates(statistics)
    routed = np.asarray(statistics.routed_prob, np.float64)
    own = np.diagonal(routed)
    labels, reference = np.asarray(labels), np.asarray(reference)
    num_clusters = len(reference)
    member = (labels[:, None] == np.arange(num_clusters)).astype(np.float64)  # [expert, cluster]
    if treatment == "reference":
        column = (np.arange(len(labels))[:, None] == reference).astype(np.float64)
    else:
        column = member * normalized_weights(labels, statistics.selected)[:, None]
    rows = member.T @ routed  # [cluster, expert] probabilities of the tokens routed to the cluster
    after = rows @ column  # [cluster, cluster]
    before = member.T @ own
    # (before / all of the softmax) / (after / all of the new softmax)
    numerator = before * after.sum(axis=1)
    denominator = np.diagonal(after) * rows.sum(axis=1)
    is_known = (numerator > 0) & (denominator > 0)
    factors = np.where(is_known, numerator, 1.0) / np.where(is_known, denominator, 1.0)
    return factors.astype(np.float32)


def require_softmax_gates(statistics: LayerStatistics) -> None:
    """Raises InputError if gates are not softmax probabilities, but normalised over the top-k."""
    own = np.diagonal(np.asarray(statistics.routed_prob, np.float64)).sum()
    applied = np.asarray(statistics.gate_mass, np.float64).sum()
    if not np.isclose(own, applied, rtol=1e-3):
        raise InputError(
            "gate_compensation needs gates that are softmax probabilities, got gates that sum to "
            f"{applied:.6g} where the probabilities sum to {own:.6g}: turn it off for models that "
            "normalise the gates of the selected experts."
        )


def scale_outputs(
    experts: Mapping[str, np.ndarray], factors: npt.ArrayLike
) -> dict[str, np.ndarray]:
    """Applies gate compensation: scales each merged expert's wo and wo_bias.

    Args:
      experts: merged arrays with a leading [cluster] axis.
      factors: [cluster] float32 from `gate_compensation`.

    Returns:
      The arrays, wo and wo_bias multiplied in float32 and cast back; a factor of 1 changes no bit.
    """
    result = dict(experts)
    for name in ("wo", "wo_bias"):
        if name in experts:
            array = experts[name]
            factor = np.asarray(factors, np.float32).reshape(-1, *[1] * (array.ndim - 1))
            result[name] = (array.astype(np.float32) * factor).astype(array.dtype)
    return result
