"""The ways to group experts, behind one interface: statistics (and weights) -> Grouping.

Pruning is "groups of size one plus a dropped set", merging is "groups of any size"; a method says
which. `register_method` adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import affinity as affinity_lib
from uncurl_jax.pruning import clustering
from uncurl_jax.pruning.alignment import Experts
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.merging import normalized_weights
from uncurl_jax.pruning.statistics import LayerStatistics


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
      experts: arrays with a leading [expert] axis; see `alignment`.
    """

    router: np.ndarray
    experts: Experts


class GroupFunction(Protocol):
    """Groups one layer's experts into `num_clusters`, already known to lie in [1, Z]."""

    def __call__(
        self,
        statistics: LayerStatistics,
        num_clusters: int,
        *,
        seed: int,
        affinity: str,
        parameters: LayerParameters | None,
    ) -> Grouping:
        """Returns the grouping; the same arguments give the same grouping."""
        ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to group experts.

    Attributes:
      name: what users call it.
      group: the function; `parameters` is None unless `needs_parameters`.
      summary: one line for help texts.
      needs_parameters: whether `group` looks at weights.
      allocate: for methods whose counts differ between layers: (statistics of all layers, D per
        layer on average) -> {layer: D}. None gives every layer the same D.
    """

    name: str
    group: GroupFunction
    summary: str
    needs_parameters: bool = False
    allocate: Callable[[Mapping[int, LayerStatistics], int], dict[int, int]] | None = None


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Adds a method.

    Raises:
      InputError: If the name is taken.
    """
    if method.name in _METHODS:
        raise InputError(
            f"A method's name must be new, got {method.name!r}, which is taken: choose another."
        )
    _METHODS[method.name] = method


def method_names() -> tuple[str, ...]:
    """Returns the names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """Returns a method by name.

    Raises:
      InputError: If it is unknown; the message holds the nearest names.
    """
    return _METHODS[require_choice("method", name, _METHODS)]


def group_experts(
    method: str,
    statistics: LayerStatistics,
    num_clusters: int,
    *,
    seed: int = 0,
    affinity: str = "cosine",
    parameters: LayerParameters | None = None,
) -> Grouping:
    """Groups one layer's experts by a registered method.

    Raises:
      InputError: If the method or affinity is unknown, num_clusters is not in [1, Z], or the method
        needs weights and got none.
    """
    chosen = get_method(method)
    require_choice("affinity", affinity, affinity_lib.AFFINITIES)
    num_experts = len(np.asarray(statistics.selected))
    if not 1 <= num_clusters <= num_experts:
        raise InputError(
            f"num_experts after pruning must lie in [1, {num_experts}], got {num_clusters}: choose "
            "no more experts than the layer has."
        )
    if chosen.needs_parameters and parameters is None:
        raise InputError(
            f"Method {method!r} needs the checkpoint's weights, got statistics alone: give the "
            "checkpoint too."
        )
    return chosen.group(
        statistics,
        num_clusters,
        seed=seed,
        affinity=affinity,
        parameters=parameters if chosen.needs_parameters else None,
    )


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


def keep(selected: np.ndarray, kept: np.ndarray) -> Grouping:
    """Returns the grouping that keeps some experts as they are and drops the others.

    Args:
      selected: [expert] counts, for the canonical order.
      kept: [cluster] int, distinct experts.
    """
    labels = np.full(len(selected), -1, np.int64)
    labels[kept] = np.arange(len(kept))
    labels = clustering.canonical_labels(labels, selected)
    weights = (labels >= 0).astype(np.float32)
    return Grouping(labels, most_selected(labels, selected), weights, {})


def _uncurl(
    statistics: LayerStatistics,
    num_clusters: int,
    *,
    seed: int,
    affinity: str,
    parameters: LayerParameters | None,
) -> Grouping:
    """ArXiv 2409.01483, Algorithm 1: spectral clusters of router logits."""
    del parameters
    A = affinity_lib.affinity(statistics, affinity)
    selected = np.asarray(statistics.selected, np.float64)
    labels = clustering.spectral_clustering(A, num_clusters, seed=seed, frequency=selected)
    points = clustering.spectral_embedding(A, num_clusters)
    diagnostics = {
        "eigengap": clustering.eigengap(A, num_clusters),
        "silhouette": clustering.silhouette(points, labels),
    }
    weights = normalized_weights(labels, selected)
    return Grouping(labels, most_selected(labels, selected), weights, diagnostics)


def _random(
    statistics: LayerStatistics,
    num_clusters: int,
    *,
    seed: int,
    affinity: str,
    parameters: LayerParameters | None,
) -> Grouping:
    """A seeded choice of D experts; the floor that a method must beat."""
    del affinity, parameters
    selected = np.asarray(statistics.selected, np.float64)
    generator = np.random.default_rng(seed)
    return keep(selected, generator.choice(len(selected), size=num_clusters, replace=False))


def _frequency(
    statistics: LayerStatistics,
    num_clusters: int,
    *,
    seed: int,
    affinity: str,
    parameters: LayerParameters | None,
) -> Grouping:
    """The D most selected experts, ties by lowest index; the paper's one-shot baseline."""
    del seed, affinity, parameters
    selected = np.asarray(statistics.selected, np.float64)
    return keep(selected, np.argsort(-selected, kind="stable")[:num_clusters])


register_method(
    Method("uncurl", _uncurl, "merge spectral clusters of router logits (arXiv 2409.01483)")
)
register_method(Method("random", _random, "keep a random choice of experts, drop the others"))
register_method(Method("frequency", _frequency, "keep the most selected experts, drop the others"))
