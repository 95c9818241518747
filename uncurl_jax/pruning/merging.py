"""Merging: the weighted mean of each cluster's aligned experts. Axes: expert, cluster, mlp."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import Expert, Experts, check_expert, permute_array, select_expert


def normalized_weights(labels: npt.ArrayLike, mass: npt.ArrayLike) -> np.ndarray:
    """Returns each expert's share of its cluster's mass: what merging weighs it with.

    Args:
      labels: [expert] int, -1 for dropped experts.
      mass: [expert] >= 0, for UNCURL how often the task's tokens selected the expert.

    Returns:
      [expert] float32, summing to 1 inside each cluster (equal shares where the cluster's mass is
      0), 0 for dropped experts.
    """
    labels, mass = np.asarray(labels), np.asarray(mass, np.float64)
    weights = np.zeros(len(labels), np.float32)
    for cluster in np.unique(labels[labels >= 0]):
        members = labels == cluster
        share = mass[members]
        total = np.sort(share).sum()  # sorted: the same bits however the members are numbered
        weights[members] = share / total if total > 0 else 1.0 / len(share)
    return weights


def merge_arrays(array: np.ndarray, labels: npt.ArrayLike, weights: npt.ArrayLike) -> np.ndarray:
    """Returns the weighted mean of each cluster's entries of one array.

    Computed in float32 as x_first + sum_z w_z (x_z - x_first), so equal members give exactly
    themselves, and cast back. A cluster of one is copied bit for bit.

    Args:
      array: [expert, ...] float, members aligned already.
      labels: [expert] int in [-1, cluster); -1 is left out.
      weights: [expert] float32, summing to 1 inside each cluster.

    Returns:
      [cluster, ...] in the dtype of `array`.

    Raises:
      InputError: If a cluster has no member.
    """
    labels, weights = np.asarray(labels), np.asarray(weights, np.float32)
    return _merge("", array, _members(labels, len(array)), weights, None)


def merge_experts(
    experts: Experts,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike,
    *,
    permutations: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Merges the experts of each cluster into one (Algorithm 1, line 16, of arXiv 2409.01483).

    Args:
      experts: one layer's arrays with a leading [expert] axis.
      labels: [expert] int in [-1, cluster); -1 drops the expert.
      weights: [expert] float32 >= 0, summing to 1 inside each cluster.
      permutations: [expert, mlp] int from `align_clusters`; None merges without aligning.

    Returns:
      The same names with a leading [cluster] axis, in the dtypes of the inputs. Clusters of one
      are copied bit for bit.

    Raises:
      InputError: If a cluster has no member, or labels, weights or permutations do not fit.
    """
    labels, weights = np.asarray(labels), np.asarray(weights, np.float32)
    clusters = _members(labels, len(experts["wi"]))
    if weights.shape != labels.shape:
        raise InputError(
            f"Merging needs one weight per expert, got {weights.shape} for {len(labels)} experts."
        )
    check_expert(select_expert(experts, 0))
    shape = (len(labels), experts["wi"].shape[-1])
    if permutations is not None and permutations.shape != shape:
        raise InputError(
            f"Merging needs one permutation per expert, [expert, mlp] = {shape}, got "
            f"{permutations.shape}: align the same experts."
        )
    return {
        name: _merge(name, array, clusters, weights, permutations)
        for name, array in experts.items()
    }


def _merge(
    name: str,
    array: np.ndarray,
    clusters: list[np.ndarray],
    weights: np.ndarray,
    permutations: np.ndarray | None,
) -> np.ndarray:
    """Merges one array; beside the result it holds three experts' entries at a time."""
    result = np.empty((len(clusters), *array.shape[1:]), array.dtype)
    for cluster, members in enumerate(clusters):
        mean = RunningMean(is_single=len(members) == 1)
        for z in members:
            permutation = None if permutations is None else permutations[z]
            mean.add({name: array[z]}, float(weights[z]), permutation)
        result[cluster] = mean.result()[name]
    return result


class RunningMean:
    """The merge of one cluster, its members given one at a time; what `merge_experts` computes.

    x_first + sum_z w_z (x_z - x_first) in float32, in the order of the calls. Holds two float32
    copies of an expert and a third while one is added.
    """

    def __init__(self, *, is_single: bool = False):
        """Starts a cluster; that of a single member is copied bit for bit and never permuted."""
        self._is_single = is_single
        self._first: dict[str, np.ndarray] = {}
        self._change: dict[str, np.ndarray] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def add(self, expert: Expert, weight: float, permutation: np.ndarray | None = None) -> None:
        """Adds a member.

        Args:
          expert: its arrays; the same names and shapes in every call.
          weight: its share of the cluster, float32; the first one's is 1 minus all others'.
          permutation: [mlp] order of its hidden units; None leaves them as they are.
        """
        is_first = not self._first
        for name, array in expert.items():
            if self._is_single:
                self._first[name] = array
                continue
            if permutation is not None:
                array = permute_array(name, array, permutation)
            part = array.astype(np.float32)
            if is_first:
                self._dtypes[name] = array.dtype
                self._first[name] = part
                self._change[name] = np.zeros_like(part)
            else:
                part -= self._first[name]
                part *= np.float32(weight)
                self._change[name] += part

    def result(self) -> dict[str, np.ndarray]:
        """Returns the weighted mean in the dtypes of the members."""
        if self._is_single:
            return self._first
        return {
            name: (first + self._change[name]).astype(self._dtypes[name])
            for name, first in self._first.items()
        }


def _members(labels: np.ndarray, num_experts: int) -> list[np.ndarray]:
    """Returns the members of each cluster, rising."""
    if labels.shape != (num_experts,):
        raise InputError(
            f"Merging needs one label per expert, got {labels.shape} for {num_experts} experts."
        )
    num_clusters = int(labels.max(initial=-1)) + 1
    clusters = [np.flatnonzero(labels == cluster) for cluster in range(num_clusters)]
    empty = [cluster for cluster, members in enumerate(clusters) if not len(members)]
    if empty or not clusters:
        raise InputError(
            f"Every cluster in [0, {num_clusters}) needs a member, got none in {empty}: labels "
            "must cover 0..D-1 with at least one cluster."
        )
    return clusters
