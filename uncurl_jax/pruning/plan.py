"""The pruning plan: every decision about a prune, in a file to inspect, diff and replay.

A plan follows from router statistics in seconds on a CPU, and holds all that the offline transform
needs beside the checkpoint: neither clustering nor gate compensation needs the statistics again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning import methods
from uncurl_jax.pruning import router as router_lib
from uncurl_jax.pruning.affinity import AFFINITIES
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource, build_strict, check_num_experts
from uncurl_jax.pruning.router import TREATMENTS
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics

__all__ = ["FILE_NAME", "LayerPlan", "PlanSource", "PruningPlan", "expected_drop", "make_plan"]

FORMAT = "uncurl_jax pruning plan"
FORMAT_VERSION = 1
FILE_NAME = "pruning_plan.json"
DROP_WARNING_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """A prune of one checkpoint.

    Attributes:
      method: name of the method that grouped the experts.
      router: treatment of the router; see `router.new_router_kernel`.
      affinity: kind of affinity between experts, for the methods that use one.
      seed: seed of clustering, of random choices and of a router's new values.
      align: whether members are aligned to their reference before they are merged.
      gate_compensation: whether outputs are scaled by the layers' gate_factors.
      eval_capacity_factor: capacity factor that drops are predicted for; None is dropless.
      source: what the plan was made from.
      layers: one LayerPlan per MoE layer, in order.
    """

    method: str
    router: str
    affinity: str
    seed: int
    align: bool
    gate_compensation: bool
    eval_capacity_factor: float | None
    source: PlanSource
    layers: tuple[LayerPlan, ...]

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        require_choice("router", self.router, TREATMENTS)
        require_choice("affinity", self.affinity, AFFINITIES)
        if self.gate_compensation and self.router == "reinit":
            raise InputError(
                "gate_compensation must be off with router 'reinit', whose gates are unknown until "
                "it is trained: use 'reference' or 'mean', or turn it off."
            )
        expected = {layer: count for layer, count in enumerate(self.source.num_experts) if count}
        planned = {layer.layer: layer.num_experts for layer in self.layers}
        if list(planned.items()) != list(expected.items()) or len(planned) != len(self.layers):
            raise InputError(
                f"A plan must cover each MoE layer once, in order, with experts {expected}, got "
                f"{planned}: make the plan again."
            )
        for layer in self.layers:
            check_num_experts(layer.num_clusters, layer.layer, self.source)
            if (layer.gate_factors is not None) != self.gate_compensation:
                raise InputError(
                    f"gate_factors must be there with gate_compensation only, got "
                    f"{layer.gate_factors} in layer {layer.layer} with gate_compensation "
                    f"{self.gate_compensation}: make the plan again."
                )

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts of every layer after the prune, 0 for a dense one (`ModelConfig.num_experts`)."""
        after = {layer.layer: layer.num_clusters for layer in self.layers}
        return tuple(after.get(layer, 0) for layer in range(len(self.source.num_experts)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all layers."""
        return tuple(warning for layer in self.layers for warning in layer.warnings)

    @property
    def hash(self) -> str:
        """SHA-256 of the content."""
        return artifacts.sha256_of_json(self._content())

    def layer(self, index: int) -> LayerPlan:
        """Returns the plan of the layer with that index in the model.

        Raises:
          InputError: If the plan has none.
        """
        for layer in self.layers:
            if layer.layer == index:
                return layer
        raise InputError(
            f"The plan must cover layer {index}, got layers {[p.layer for p in self.layers]}: "
            "it is of another model."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-compatible dict with the hash; `from_dict` reads it back."""
        return {**self._content(), "hash": self.hash}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningPlan:
        """Builds and validates a plan.

        Raises:
          InputError: If a field is unknown, missing or breaks a rule, the format version is
            another, or the hash does not match the content.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(
                f"A plan must be an object with format {FORMAT!r}: make the plan again."
            )
        if values.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"A plan must be of format version {FORMAT_VERSION}, got "
                f"{values.get('format_version')}: make the plan again with this version."
            )
        fields = {k: v for k, v in values.items() if k not in ("format", "format_version", "hash")}
        if isinstance(fields.get("layers"), list):
            fields["layers"] = tuple(build_strict(LayerPlan, layer) for layer in fields["layers"])
        if isinstance(fields.get("source"), dict):
            fields["source"] = build_strict(PlanSource, fields["source"])
        plan = build_strict(cls, fields)
        if plan.hash != values.get("hash"):
            raise InputError(
                f"A plan's hash must match its content, got {values.get('hash')} for content "
                f"{plan.hash}: make the plan again instead of editing it."
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically."""
        artifacts.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads and validates what `save` wrote.

        Raises:
          InputError: If the file is missing or is not a valid plan; the message names the file.
        """
        values = artifacts.read_json(path)
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{Path(path)}: {error}") from None

    def _content(self) -> dict[str, Any]:
        # Through JSON: lists where the dataclasses hold tuples.
        fields = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields}


def make_plan(
    statistics: RouterStatistics,
    *,
    num_experts: int | Sequence[int],
    method: str = "uncurl",
    router: str = "reference",
    affinity: str = "cosine",
    align: bool = True,
    gate_compensation: bool = False,
    eval_capacity_factor: float | None = 1.0,
    seed: int = 0,
    parameters: Callable[[int], methods.LayerParameters] | None = None,
) -> PruningPlan:
    """Decides a prune from router statistics; the same arguments give the same bytes.

    Args:
      statistics: complete statistics of the task on the checkpoint.
      num_experts: D, experts per MoE layer afterwards: one number for all, or one per MoE layer.
      method: how experts are grouped; see `methods.method_names`.
      router: "reinit", "reference" or "mean"; see `router.new_router_kernel`.
      affinity: "cosine", "pearson" or "centered"; see `affinity.affinity`.
      align: align members to their reference before merging.
      gate_compensation: scale merged outputs by gate factors; see `router.gate_compensation`.
      eval_capacity_factor: predict overflow at this factor; None for dropless evaluation.
      seed: seed >= 0; every layer draws its own from it.
      parameters: layer index -> its weights, for the methods that need them.

    Returns:
      The plan, validated.

    Raises:
      InputError: If an option is unknown or options do not fit together, D is out of range or
        below top-k, counts do not match the MoE layers, or the statistics are incomplete.
    """
    require_choice("router", router, TREATMENTS)
    require_choice("affinity", affinity, AFFINITIES)
    chosen = methods.get_method(method)
    _check_options(statistics, seed, eval_capacity_factor)
    manifest = statistics.manifest
    source = PlanSource(
        checkpoint_hash=manifest["checkpoint_hash"],
        statistics_hash=statistics.hash,
        task=manifest["task"],
        split=manifest["split"],
        tokens=statistics.tokens,
        num_experts=tuple(manifest["num_experts"]),
        num_selected_experts=manifest["num_selected_experts"],
    )
    layers = []
    # All counts are checked before the first layer is grouped.
    for layer, count in _counts(statistics, num_experts, chosen, source).items():
        layer_statistics = statistics.layers[layer]
        grouping = methods.group_experts(
            method,
            layer_statistics,
            count,
            seed=_layer_seed(seed, layer),
            affinity=affinity,
            parameters=parameters(layer) if parameters and chosen.needs_parameters else None,
        )
        factors = None
        if gate_compensation:
            factors = router_lib.gate_compensation(
                layer_statistics, grouping.labels, grouping.reference, router
            )
        layers.append(_layer_plan(layer, layer_statistics, grouping, factors, eval_capacity_factor))
    return PruningPlan(
        method=method,
        router=router,
        affinity=affinity,
        seed=int(seed),
        align=bool(align),
        gate_compensation=bool(gate_compensation),
        eval_capacity_factor=eval_capacity_factor,
        source=source,
        layers=tuple(layers),
    )


def expected_drop(
    labels: npt.ArrayLike, selected: npt.ArrayLike, capacity_factor: float | None
) -> float:
    """Predicts which share of the assignments overflows after a prune.

    Each cluster is taken to receive what its members received, in groups large enough for the
    capacity's rounding and minimum not to matter; what dropped experts received is taken to spread
    over the clusters in proportion.

    Args:
      labels: [expert] int in [-1, cluster).
      selected: [expert] counts before capacity drops.
      capacity_factor: slots per expert as a multiple of assignments / experts; None is dropless.

    Returns:
      A fraction in [0, 1).
    """
    labels, selected = np.asarray(labels), np.asarray(selected, np.float64)
    num_clusters = int(labels.max(initial=-1)) + 1
    load = np.bincount(labels[labels >= 0], weights=selected[labels >= 0], minlength=num_clusters)
    if capacity_factor is None or not load.sum():
        return 0.0
    overflow = load / load.sum() - capacity_factor / num_clusters
    return float(np.maximum(overflow, 0.0).sum())


def _check_options(
    statistics: RouterStatistics, seed: int, eval_capacity_factor: float | None
) -> None:
    if not statistics.manifest["is_complete"]:
        raise InputError(
            f"A plan needs complete statistics, got a partial file of "
            f"{statistics.manifest['batches']} batches: resume the calibration first."
        )
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}.")
    if eval_capacity_factor is not None and not 0 < eval_capacity_factor < np.inf:
        raise InputError(
            "eval_capacity_factor must be positive, or None for dropless, got "
            f"{eval_capacity_factor}."
        )


def _counts(
    statistics: RouterStatistics,
    num_experts: int | Sequence[int],
    method: methods.Method,
    source: PlanSource,
) -> dict[int, int]:
    """Returns {MoE layer: D}, checked."""
    layers = sorted(statistics.layers)
    if isinstance(num_experts, int | np.integer):
        counts = dict.fromkeys(layers, int(num_experts))
        if method.allocate is not None:
            counts = method.allocate(statistics.layers, int(num_experts))
    elif len(num_experts) == len(layers):
        counts = dict(zip(layers, map(int, num_experts), strict=True))
    else:
        raise InputError(
            f"num_experts must be one number or one per MoE layer, got {len(num_experts)} numbers "
            f"for MoE layers {layers}: give {len(layers)} or one."
        )
    for layer in layers:
        check_num_experts(counts[layer], layer, source)
    return {layer: counts[layer] for layer in layers}


def _layer_seed(seed: int, layer: int) -> int:
    """Returns a seed below 2**32, different for every layer."""
    return int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])


def _layer_plan(
    layer: int,
    statistics: LayerStatistics,
    grouping: methods.Grouping,
    factors: np.ndarray | None,
    capacity_factor: float | None,
) -> LayerPlan:
    labels = grouping.labels
    selected = np.asarray(statistics.selected, np.float64)
    num_clusters = len(grouping.reference)
    drop = expected_drop(labels, selected, capacity_factor)
    warnings = []
    for cluster in range(num_clusters):
        members = np.flatnonzero(labels == cluster)
        if not selected[members].any():
            warnings.append(
                f"Layer {layer}: no token selected an expert of cluster {cluster} "
                f"({members.tolist()}); its members are merged with equal weights."
                if len(members) > 1
                else f"Layer {layer}: no token selected expert {members[0]}, which is kept as "
                f"cluster {cluster}."
            )
    if drop > DROP_WARNING_FRACTION:
        warnings.append(
            f"Layer {layer}: about {100 * drop:.1f} % of the assignments would overflow at "
            f"capacity factor {capacity_factor}; evaluate dropless or with a larger factor."
        )
    return LayerPlan(
        layer=layer,
        num_experts=len(labels),
        labels=tuple(labels.tolist()),
        reference=tuple(grouping.reference.tolist()),
        weights=tuple(grouping.weights.tolist()),
        selected=tuple(selected.tolist()),
        cluster_sizes=tuple(np.bincount(labels[labels >= 0], minlength=num_clusters).tolist()),
        gate_factors=None if factors is None else tuple(factors.tolist()),
        expected_drop_fraction=drop,
        diagnostics=grouping.diagnostics,
        warnings=tuple(warnings),
    )
