"""Alignment of experts: the order of hidden units under which two experts are most alike.

Permuting an expert's hidden units leaves its output unchanged, so units must be matched before
weights are averaged (arXiv 2409.01483, section 4; Git Re-Basin). Axes: expert, embed, mlp, cluster.
This module imports neither JAX nor scikit-learn: worker processes start fast.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize

from uncurl_jax.errors import InputError

# One expert: "wi" [embed, mlp], "wo" [mlp, embed]; optional "wi_bias" [mlp], "wo_bias" [embed] and,
# in a gated feed-forward network, the gate projection "wg" [embed, mlp], "wg_bias" [mlp].
Expert = Mapping[str, np.ndarray]
# The same names with a leading [expert] axis.
Experts = Mapping[str, np.ndarray]

# Axis that runs over the hidden units, in one expert; None where there is none.
_HIDDEN_AXIS: dict[str, int | None] = {
    "wi": 1,
    "wi_bias": 0,
    "wg": 1,
    "wg_bias": 0,
    "wo": 0,
    "wo_bias": None,
}


class Alignment(NamedTuple):
    """How each expert's hidden units are ordered before the merge.

    Attributes:
      permutations: [expert, mlp] int32; row z is applied by `permute_hidden`. The identity for
        references, members of singletons and dropped experts.
      similarity_before: [expert] float64, cosine of the expert's and its reference's features in
        the stored order of units; 1 for references, 0 for dropped experts.
      similarity_after: [expert] float64, the same after the permutation, never smaller.
    """

    permutations: np.ndarray
    similarity_before: np.ndarray
    similarity_after: np.ndarray


def check_expert(expert: Expert) -> None:
    """Raises InputError if an expert's arrays have unknown names or do not fit together."""
    unknown = sorted(set(expert) - set(_HIDDEN_AXIS))
    if unknown or not {"wi", "wo"} <= set(expert):
        raise InputError(
            f"An expert must hold wi and wo, and may hold {', '.join(sorted(_HIDDEN_AXIS))}, got "
            f"{', '.join(sorted(expert))}: rename its arrays."
        )
    embed, mlp = expert["wi"].shape
    expected = {"wi": (embed, mlp), "wg": (embed, mlp), "wo": (mlp, embed), "wo_bias": (embed,)}
    for name, array in expert.items():
        if array.shape != expected.get(name, (mlp,)):
            raise InputError(
                f"{name} of an expert with wi {(embed, mlp)} must have shape "
                f"{expected.get(name, (mlp,))}, got {array.shape}: experts are [embed, mlp] and "
                "[mlp, embed]."
            )


def permute_hidden(expert: Expert, permutation: np.ndarray) -> dict[str, np.ndarray]:
    """Reorders an expert's hidden units; its output stays the same.

    Args:
      expert: one expert's arrays.
      permutation: [mlp] int; unit j of the result is unit permutation[j] of `expert`.

    Returns:
      New arrays under the same names; wo_bias has no hidden axis and is passed through.
    """
    check_expert(expert)
    return {name: permute_array(name, array, permutation) for name, array in expert.items()}


def permute_array(name: str, array: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Does what `permute_hidden` does to one array of an expert, "wi" for instance."""
    axis = _HIDDEN_AXIS[name]
    return array if axis is None else np.take(array, permutation, axis=axis)


def feature_products(reference: Expert, member: Expert) -> np.ndarray:
    """Returns M: inner products of all pairs of hidden units' features [gate, up, down].

    M = (W_in^J)^T W_in^y + W_out^J (W_out^y)^T, and for gated networks the same term for the
    gate projection; biases take no part.

    Args:
      reference: the cluster's reference expert J.
      member: the member y.

    Returns:
      [mlp, mlp] float64; rows are J's units, columns y's.

    Raises:
      InputError: If the two differ in names or shapes, or a product is not finite.
    """
    check_expert(reference)
    check_expert(member)
    shapes = [{name: array.shape for name, array in e.items()} for e in (reference, member)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"Experts of one cluster must have the same arrays, got {shapes[0]} and {shapes[1]}."
        )
    product = np.zeros((reference["wi"].shape[1],) * 2)
    for name in ("wg", "wi", "wo"):
        if name in reference:
            left, right = (_units(e, name) for e in (reference, member))
            product += left @ right.T
    if not np.isfinite(product).all():
        raise InputError(
            "Experts to align must be finite, got NaN or infinity in their inner products: check "
            "the checkpoint."
        )
    return product


def alignment_permutation(reference: Expert, member: Expert) -> np.ndarray:
    """Returns the [mlp] int64 permutation P of `member` that maximises <J, member P>.

    Solves the linear assignment problem on `feature_products`; apply with `permute_hidden`.

    Raises:
      InputError: If the two differ in names or shapes, or are not finite.
    """
    return _assign(feature_products(reference, member))


def align_clusters(
    experts: Experts,
    labels: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Alignment:
    """Aligns every member of each cluster to the cluster's reference.

    The result is the same for any number of workers. With 4096 hidden units a member takes some
    seconds of one core (about 4 measured with random weights).

    Args:
      experts: one layer's arrays with a leading [expert] axis.
      labels: [expert] int, -1 for dropped experts.
      reference: [cluster] int, the expert that is not permuted.
      workers: processes; 0 works in this one.
      progress: called with (members aligned, members in all).

    Returns:
      Alignment of all experts.

    Raises:
      InputError: If workers is negative, shapes do not fit or a value is not finite.
    """
    if workers < 0:
        raise InputError(f"workers must not be negative, got {workers}: 0 uses no other process.")
    labels, reference = np.asarray(labels), np.asarray(reference)
    num_experts, num_hidden = len(labels), experts["wi"].shape[-1]
    members = [z for z in range(num_experts) if labels[z] >= 0 and reference[labels[z]] != z]
    permutations = np.tile(np.arange(num_hidden, dtype=np.int32), (num_experts, 1))
    before, after = (np.where(labels >= 0, 1.0, 0.0) for _ in range(2))
    targets = [int(reference[labels[z]]) for z in members]
    if workers and len(members) > 1:
        # spawn: a fork would copy the locks of JAX's threads.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(members)), mp_context=context
        )
        with pool:
            results = pool.map(
                _align,
                (select_expert(experts, z) for z in targets),
                (select_expert(experts, z) for z in members),
            )
            found = _collect(results, len(members), progress)
    else:
        align = functools.partial(_align_stacked, experts)
        found = _collect(map(align, targets, members), len(members), progress)
    for z, (permutation, cosine_before, cosine_after) in zip(members, found, strict=True):
        permutations[z], before[z], after[z] = permutation, cosine_before, cosine_after
    return Alignment(permutations, before, after)


def select_expert(experts: Experts, index: int) -> dict[str, np.ndarray]:
    """Returns views of one expert's arrays."""
    return {name: array[index] for name, array in experts.items()}


def _units(expert: Expert, name: str) -> np.ndarray:
    """Returns [mlp, embed] float64, one row per hidden unit."""
    array = np.asarray(expert[name]).astype(np.float64)
    return array if _HIDDEN_AXIS[name] == 0 else array.T


def _assign(product: np.ndarray) -> np.ndarray:
    return scipy.optimize.linear_sum_assignment(product, maximize=True)[1]


def _align(reference: Expert, member: Expert) -> tuple[np.ndarray, float, float]:
    product = feature_products(reference, member)
    permutation = _assign(product)
    norm = _norm(reference) * _norm(member)
    matched = product[np.arange(len(product)), permutation].sum()
    scale = 1.0 / norm if norm > 0 else 0.0
    return permutation.astype(np.int32), float(np.trace(product) * scale), float(matched * scale)


def _align_stacked(
    experts: Experts, reference: int, member: int
) -> tuple[np.ndarray, float, float]:
    return _align(select_expert(experts, reference), select_expert(experts, member))


def _norm(expert: Expert) -> float:
    squares = [np.sum(np.square(_units(expert, n))) for n in ("wg", "wi", "wo") if n in expert]
    return float(np.sqrt(np.sum(squares)))


def _collect(results, total: int, progress: Callable[[int, int], None] | None) -> list:
    found = []
    for result in results:
        found.append(result)
        if progress is not None:
            progress(len(found), total)
    return found
