"""What a method is given and what it returns: which experts become which.

Pruning is "groups of size one plus a dropped set", merging is "groups of any size"; one form serves
both. Axes: expert (Z, before), cluster (D, after).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import clustering
from uncurl_jax.pruning.affinity import AFFINITIES
from uncurl_jax.pruning.alignment import Experts
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.merging import normalized_weights
from uncurl_jax.pruning.statistics import LayerStatistics

MERGE_WEIGHTS = ("frequency", "gate_mass", "uniform")


class Grouping(NamedTuple):
    """Which experts become which.

    Attributes:
      labels: [expert] int64 in [-1, cluster), -1 for a dropped expert; canonical order, see
        `clustering.canonical_labels`.
      reference: [cluster] int64, the member that the others are aligned to.
      weights: [expert] float32, shares of the merge, summing to 1 inside each cluster.
      diagnostics: JSON-compatible numbers about the quality of the grouping.
    """

    labels: np.ndarray
    reference: np.ndarray
    weights: np.ndarray
    diagnostics: dict[str, Any]


class LayerParameters(NamedTuple):
    """One MoE layer's weights, for methods that look at them.

    Attributes:
      router: [embed, expert] kernel.
      experts: arrays with a leading [expert] axis; see `alignment`. Empty for methods that need the
        router alone.
      base_router: [embed, expert] kernel of an earlier checkpoint of the same model, None if there
        is none.
    """

    router: np.ndarray
    experts: Experts
    base_router: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GroupingOptions:
    """Choices that methods share; each method uses those that concern it.

    Attributes:
      affinity: between experts, from router logits; see `affinity.affinity`.
      assign_labels: how rows of the spectral embedding become clusters: "kmeans" (the paper) or
        "cluster_qr" (no random start; Damle, Minden, Ying 2019).
      merge_weights: what members are weighed with: "frequency" (how often the task selected them,
        the paper), "gate_mass" (the gates they got) or "uniform".
      max_cluster_size: most members of a cluster; None sets no cap.
      num_protected: experts that `uncurl_protected` keeps by themselves; None takes those with at
        least the share 1/D of the selections.
    """

    affinity: str = "cosine"
    assign_labels: str = "kmeans"
    merge_weights: str = "frequency"
    max_cluster_size: int | None = None
    num_protected: int | None = None

    def __post_init__(self):
        require_choice("affinity", self.affinity, AFFINITIES)
        require_choice("assign_labels", self.assign_labels, clustering.LABEL_ASSIGNMENTS)
        require_choice("merge_weights", self.merge_weights, MERGE_WEIGHTS)
        for name, least in (("max_cluster_size", 1), ("num_protected", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, or None, got {value}.")


@dataclasses.dataclass(frozen=True, eq=False)
class GroupRequest:
    """What a method is asked: group one layer's experts.

    Attributes:
      statistics: the layer's sums, float64 numpy arrays.
      num_clusters: D, already known to lie in [1, Z].
      seed: of whatever is random.
      options: see `GroupingOptions`.
      parameters: the layer's weights; None unless the method says that it needs them.
    """

    statistics: LayerStatistics
    num_clusters: int
    seed: int = 0
    options: GroupingOptions = GroupingOptions()
    parameters: LayerParameters | None = None

    @property
    def selected(self) -> np.ndarray:
        """[expert] float64, selections before capacity drops."""
        return np.asarray(self.statistics.selected, np.float64)

    @property
    def num_experts(self) -> int:
        """Z."""
        return len(self.selected)


GroupFunction = Callable[[GroupRequest], Grouping]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to group experts.

    Attributes:
      name: what users call it.
      group: request -> grouping; the same request gives the same grouping.
      summary: one line for help texts and docs.
      needs_router: whether `group` looks at the router's weights.
      needs_experts: whether `group` looks at the experts' weights (and the router's).
      collect: optional statistics that it needs; see `statistics.COLLECTIONS`.
      has_own_counts: whether one number D is a budget of D per layer on average, which
        `budgets.allocate` divides among the layers.
      is_aligned: whether members are aligned before a merge unless the user says otherwise.
    """

    name: str
    group: GroupFunction
    summary: str
    needs_router: bool = False
    needs_experts: bool = False
    collect: tuple[str, ...] = ()
    has_own_counts: bool = False
    is_aligned: bool = True


def most_selected(labels: npt.ArrayLike, selected: npt.ArrayLike) -> np.ndarray:
    """Returns each cluster's most selected member, the lowest index on ties.

    Args:
      labels: [expert] int in [-1, cluster).
      selected: [expert] counts before capacity drops.

    Returns:
      [cluster] int64.
    """
    labels, selected = np.asarray(labels), np.asarray(selected)
    num_clusters = int(labels.max(initial=-1)) + 1
    members = [np.flatnonzero(labels == cluster) for cluster in range(num_clusters)]
    return np.array([m[selected[m].argmax()] for m in members], np.int64)


def keep(selected: npt.ArrayLike, kept: npt.ArrayLike) -> Grouping:
    """Returns the grouping that keeps some experts as they are and drops the others.

    Args:
      selected: [expert] counts, for the canonical order.
      kept: [cluster] int, distinct experts.
    """
    selected, kept = np.asarray(selected, np.float64), np.asarray(kept)
    labels = np.full(len(selected), -1, np.int64)
    labels[kept] = np.arange(len(kept))
    labels = clustering.canonical_labels(labels, selected)
    weights = (labels >= 0).astype(np.float32)
    return Grouping(labels, most_selected(labels, selected), weights, {})


def merge(
    request: GroupRequest, labels: npt.ArrayLike, diagnostics: dict[str, Any] | None = None
) -> Grouping:
    """Returns the grouping that merges clusters, with the references and weights of the request.

    Args:
      request: what was asked.
      labels: [expert] int in [0, cluster), in any order of clusters.
      diagnostics: numbers to pass on.
    """
    labels = clustering.canonical_labels(labels, request.selected)
    mass = {
        "frequency": request.statistics.selected,
        "gate_mass": request.statistics.gate_mass,
        "uniform": np.ones(request.num_experts),
    }[request.options.merge_weights]
    weights = normalized_weights(labels, mass)
    return Grouping(labels, most_selected(labels, request.selected), weights, diagnostics or {})


def check_grouping(grouping: Any, request: GroupRequest, method: str) -> Grouping:
    """Checks what a method returned.

    Raises:
      InputError: If it is no grouping of the request's experts into D clusters.
    """

    def fail(rule: str, got: Any) -> None:
        raise InputError(f"Method {method!r} must return a Grouping with {rule}, got {got}.")

    if not isinstance(grouping, Grouping):
        fail("labels, reference, weights and diagnostics", type(grouping).__name__)
    experts, clusters = request.num_experts, request.num_clusters
    labels, reference = np.asarray(grouping.labels), np.asarray(grouping.reference)
    weights = np.asarray(grouping.weights)
    if labels.shape != (experts,) or not np.issubdtype(labels.dtype, np.integer):
        fail(f"{experts} whole labels", labels)
    if set(labels.tolist()) - {-1} != set(range(clusters)):
        fail(f"labels that cover 0..{clusters - 1}", sorted(set(labels.tolist())))
    is_whole = np.issubdtype(reference.dtype, np.integer)
    if (
        reference.shape != (clusters,)
        or not is_whole
        or not ((reference >= 0) & (reference < experts)).all()
    ):
        fail(f"{clusters} references in [0, {experts})", reference)
    if (labels[reference] != np.arange(clusters)).any():
        fail("references that belong to their clusters", reference)
    if weights.shape != (experts,) or not np.isfinite(weights).all() or (weights < 0).any():
        fail(f"{experts} finite weights >= 0", weights)
    totals = np.bincount(labels[labels >= 0], weights[labels >= 0], minlength=clusters)
    if weights[labels < 0].any() or (np.abs(totals - 1.0) > 1e-4).any():
        fail("weights that sum to 1 in every cluster and are 0 for dropped experts", weights)
    try:
        json.dumps(grouping.diagnostics, allow_nan=False)
        is_json = isinstance(grouping.diagnostics, dict)
    except (TypeError, ValueError):
        is_json = False
    if not is_json:
        fail("diagnostics in a dict that JSON can hold", grouping.diagnostics)
    return grouping
