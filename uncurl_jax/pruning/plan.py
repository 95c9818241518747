"""Makes pruning plans: statistics (and, for some choices, weights and inputs) -> PruningPlan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import budgets, methods, router_fit
from uncurl_jax.pruning import router as router_lib
from uncurl_jax.pruning.alignment import ALIGNMENTS, Experts
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.diagnostics import judge
from uncurl_jax.pruning.grouping import Grouping, GroupingOptions, GroupRequest, LayerParameters
from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource, check_num_experts, encode_kernel
from uncurl_jax.pruning.plan_file import FILE_NAME, FORMAT, FORMAT_VERSION, PruningPlan
from uncurl_jax.pruning.router import TREATMENTS
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "FORMAT_VERSION",
    "LayerPlan",
    "LayerWeights",
    "PlanSource",
    "PruningPlan",
    "expected_drop",
    "make_plan",
]

DROP_WARNING_FRACTION = 0.05


class LayerWeights(Protocol):
    """Reads the weights of the checkpoint that is planned for, a layer at a time."""

    def router(self, layer: int) -> np.ndarray:
        """Returns the [embed, expert] kernel of a layer's router."""
        ...

    def base_router(self, layer: int) -> np.ndarray | None:
        """Returns the same of an earlier checkpoint, None if there is none."""
        ...

    def experts(self, layer: int) -> Experts:
        """Returns a layer's arrays with a leading [expert] axis; see `alignment`."""
        ...


def make_plan(
    statistics: RouterStatistics,
    *,
    num_experts: int | Sequence[int] | None = None,
    total_experts: int | None = None,
    multiple_of: int = 1,
    method: str = "uncurl",
    layer_methods: Sequence[str] | None = None,
    router: str = "reference",
    affinity: str = "cosine",
    assign_labels: str = "kmeans",
    merge_weights: str = "frequency",
    max_cluster_size: int | None = None,
    num_protected: int | None = None,
    alignment: str | None = None,
    gate_compensation: bool = False,
    eval_capacity_factor: float | None = 1.0,
    seed: int = 0,
    weights: LayerWeights | None = None,
    router_inputs: RouterInputs | None = None,
) -> PruningPlan:
    """Decides a prune from router statistics; the same arguments give the same bytes.

    Args:
      statistics: complete statistics of the task on the checkpoint.
      num_experts: D, experts per MoE layer afterwards: one number for all, or one per MoE layer.
        For methods with counts of their own (mc_smoe) one number is the mean of the layers.
      total_experts: experts of all MoE layers together, in place of num_experts; divided among the
        layers by `budgets.allocate`.
      multiple_of: every count must be, or is made, a multiple of this.
      method: how experts are grouped; see `methods.method_names`. "composite" needs layer_methods.
      layer_methods: methods of the MoE layers in order; the last one stands for all that follow.
      router: "reinit", "reference", "mean", "fit" or "remap"; see `router.new_router_kernel` and
        `router_fit.fit_router`.
      affinity: between experts; this and the next four are explained at `GroupingOptions`.
      assign_labels: from spectral embedding to clusters.
      merge_weights: of the members of a cluster.
      max_cluster_size: most members.
      num_protected: of uncurl_protected.
      alignment: see `alignment.ALIGNMENTS`; by default "features", or "none" for methods that are
        defined without alignment.
      gate_compensation: scale merged outputs by gate factors; see `router.gate_compensation`.
      eval_capacity_factor: predict overflow at this factor; None for dropless evaluation.
      seed: seed >= 0; every layer draws its own from it.
      weights: the checkpoint's weights, for the methods that look at them and for router "fit".
      router_inputs: a sample of the layers' inputs, for router "fit".

    Returns:
      The plan, validated.

    Raises:
      InputError: If an option is unknown or options do not fit together, a count is out of range or
        below top-k, no division meets a total, counts do not match the MoE layers, the statistics
        are incomplete, or what a method needs was not collected or given.
    """
    require_choice("router", router, TREATMENTS)
    options = GroupingOptions(
        affinity, assign_labels, merge_weights, max_cluster_size, num_protected
    )
    layers = sorted(statistics.layers)
    chosen = _layer_methods(method, layer_methods, layers)
    if alignment is None:
        alignment = "features" if any(m.is_aligned for m in chosen.values()) else "none"
    require_choice("alignment", alignment, ALIGNMENTS)
    _check_options(statistics, seed, eval_capacity_factor)
    source = _source(statistics)
    if router == "fit":
        if weights is None or router_inputs is None:
            raise InputError(
                "Router 'fit' needs the checkpoint and a sample of its layers' inputs, got none: "
                "calibrate with --inputs_out and give --checkpoint and --router_inputs."
            )
        router_inputs.check_source(source.checkpoint_hash, layers)
    # All counts are checked before the first layer is grouped.
    counts = _counts(statistics, num_experts, total_experts, multiple_of, chosen, source)
    for layer, layer_method in chosen.items():
        methods.check_collected(layer_method, GroupRequest(statistics.layers[layer], 1))
    planned = []
    for layer, count in counts.items():
        request = GroupRequest(
            statistics.layers[layer],
            count,
            seed=_layer_seed(seed, layer),
            options=options,
            parameters=_parameters(chosen[layer], layer, weights),
        )
        grouping = methods.group_experts(chosen[layer].name, request)
        planned.append(
            _plan_layer(
                layer,
                chosen[layer].name,
                request.statistics,
                grouping,
                router=router,
                gate_compensation=gate_compensation,
                capacity_factor=eval_capacity_factor,
                weights=weights,
                router_inputs=router_inputs,
            )
        )
    return PruningPlan(
        method=method,
        router=router,
        grouping=options,
        seed=int(seed),
        alignment=alignment,
        gate_compensation=bool(gate_compensation),
        eval_capacity_factor=eval_capacity_factor,
        source=source,
        layers=tuple(planned),
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


def _source(statistics: RouterStatistics) -> PlanSource:
    manifest = statistics.manifest
    return PlanSource(
        checkpoint_hash=manifest["checkpoint_hash"],
        statistics_hash=statistics.hash,
        task=manifest["task"],
        split=manifest["split"],
        tokens=statistics.tokens,
        num_experts=tuple(manifest["num_experts"]),
        num_selected_experts=manifest["num_selected_experts"],
    )


def _layer_methods(
    method: str, layer_methods: Sequence[str] | None, layers: Sequence[int]
) -> dict[int, methods.Method]:
    """Returns the method of each MoE layer."""
    if method != methods.COMPOSITE:
        if layer_methods is not None:
            raise InputError(
                f"layer_methods must come with method 'composite', got method {method!r}: leave "
                "one of them out."
            )
        chosen = methods.get_method(method)
        return dict.fromkeys(layers, chosen)
    names = list(layer_methods or ())
    if not 0 < len(names) <= len(layers):
        raise InputError(
            f"Method 'composite' needs layer_methods, one to {len(layers)} names for MoE layers "
            f"{list(layers)}, got {names}: the last name stands for all layers that follow."
        )
    names += names[-1:] * (len(layers) - len(names))
    return {layer: methods.get_method(name) for layer, name in zip(layers, names, strict=True)}


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
    num_experts: int | Sequence[int] | None,
    total_experts: int | None,
    multiple_of: int,
    chosen: dict[int, methods.Method],
    source: PlanSource,
) -> dict[int, int]:
    """Returns {MoE layer: D}, checked."""
    layers = sorted(statistics.layers)
    if (num_experts is None) == (total_experts is None):
        raise InputError(
            f"A plan needs num_experts or total_experts, got {num_experts} and {total_experts}: "
            "give one of them."
        )
    if multiple_of < 1:
        raise InputError(f"multiple_of must be at least 1, got {multiple_of}.")
    is_number = isinstance(num_experts, int | np.integer)
    if is_number and all(m.has_own_counts for m in chosen.values()):
        total_experts = int(num_experts) * len(layers)
    if total_experts is not None:
        return budgets.allocate(
            statistics.layers,
            total_experts,
            minimum=source.num_selected_experts,
            multiple_of=multiple_of,
        )
    given: Any = num_experts
    if is_number:
        counts = dict.fromkeys(layers, int(given))
    elif len(given) == len(layers):
        counts = dict(zip(layers, map(int, given), strict=True))
    else:
        raise InputError(
            f"num_experts must be one number or one per MoE layer, got {len(given)} numbers "
            f"for MoE layers {layers}: give {len(layers)} or one."
        )
    for layer in layers:
        check_num_experts(counts[layer], layer, source)
        if counts[layer] % multiple_of:
            raise InputError(
                f"num_experts must be a multiple of multiple_of={multiple_of}, got "
                f"{counts[layer]} in layer {layer}: change one of them."
            )
    return counts


def _parameters(
    method: methods.Method, layer: int, weights: LayerWeights | None
) -> LayerParameters | None:
    """Reads what a method needs of a layer's weights."""
    if weights is None or not (method.needs_router or method.needs_experts):
        return None
    experts = weights.experts(layer) if method.needs_experts else {}
    return LayerParameters(weights.router(layer), experts, weights.base_router(layer))


def _layer_seed(seed: int, layer: int) -> int:
    """Returns a seed below 2**32, different for every layer."""
    return int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])


def _plan_layer(
    layer: int,
    method: str,
    statistics: LayerStatistics,
    grouping: Grouping,
    *,
    router: str,
    gate_compensation: bool,
    capacity_factor: float | None,
    weights: LayerWeights | None,
    router_inputs: RouterInputs | None,
) -> LayerPlan:
    """Writes one layer's decision down: fitted router, gate factors, predictions, verdict."""
    labels = np.asarray(grouping.labels)
    selected = np.asarray(statistics.selected, np.float64)
    num_clusters = len(grouping.reference)
    diagnostics = dict(grouping.diagnostics)
    fitted = None
    if router == "fit" and weights is not None and router_inputs is not None:
        fitted = _fit(layer, statistics, grouping, weights, router_inputs, diagnostics)
    factors = None
    if gate_compensation and fitted is not None and weights is not None and router_inputs:
        router_lib.require_softmax_gates(statistics)
        factors = router_fit.sampled_gate_compensation(
            router_inputs.layers[layer], weights.router(layer), labels, fitted
        )
    elif gate_compensation:
        factors = router_lib.gate_compensation(statistics, labels, grouping.reference, router)
    load = np.bincount(labels[labels >= 0], selected[labels >= 0], minlength=num_clusters)
    diagnostics["predicted_load"] = (load / max(load.sum(), 1.0)).tolist()
    diagnostics["dead_experts"] = np.flatnonzero(selected == 0).tolist()
    drop = expected_drop(labels, selected, capacity_factor)
    return LayerPlan(
        layer=layer,
        method=method,
        num_experts=len(labels),
        labels=tuple(labels.tolist()),
        reference=tuple(np.asarray(grouping.reference).tolist()),
        weights=tuple(np.asarray(grouping.weights).tolist()),
        selected=tuple(selected.tolist()),
        cluster_sizes=tuple(np.bincount(labels[labels >= 0], minlength=num_clusters).tolist()),
        gate_factors=None if factors is None else tuple(factors.tolist()),
        fitted_router=None if fitted is None else encode_kernel(fitted),
        expected_drop_fraction=drop,
        diagnostics=diagnostics,
        verdict=judge(diagnostics, drop),
        warnings=tuple(_warnings(layer, labels, selected, drop, capacity_factor)),
    )


def _fit(
    layer: int,
    statistics: LayerStatistics,
    grouping: Grouping,
    weights: LayerWeights,
    router_inputs: RouterInputs,
    diagnostics: dict[str, Any],
) -> np.ndarray:
    """Fits the layer's router and adds how well it went to the diagnostics."""
    kernel = np.asarray(weights.router(layer)).astype(np.float32)
    start = router_lib.new_router_kernel(
        kernel,
        grouping.labels,
        grouping.reference,
        statistics.selected,
        "mean",
        seed=0,
        layer=layer,
        init_stddev=1.0,
    )
    found = router_fit.fit_router(router_inputs.layers[layer], kernel, grouping.labels, start)
    diagnostics |= {
        "router_kl_before": found.kl_before,
        "router_kl_after": found.kl_after,
        "router_fit_gradient": found.gradient,
        "router_fit_iterations": found.iterations,
        "router_fit_converged": found.has_converged,
    }
    return found.kernel


def _warnings(
    layer: int,
    labels: np.ndarray,
    selected: np.ndarray,
    drop: float,
    capacity_factor: float | None,
) -> list[str]:
    warnings = []
    for cluster in range(int(labels.max()) + 1):
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
    return warnings
