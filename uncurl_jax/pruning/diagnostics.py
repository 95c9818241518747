"""Numbers that say whether a cut can be trusted, and the sentence that sums them up.

`make_plan` fills in what follows from statistics; `measure_layer` adds what needs the weights: how
alike the merged experts are, how much of their norm survives the mean, and how far the merged
layer's output is from the original before any training. Axes: token, embed, expert, cluster, mlp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import Experts, select_expert
from uncurl_jax.pruning.layer_plan import LayerPlan
from uncurl_jax.pruning.merging import normalized_weights
from uncurl_jax.pruning.plan_file import PruningPlan
from uncurl_jax.pruning.prune import prune_layer

# Beyond the first number a layer deserves caution, beyond the second it is poor.
_DROP_LIMITS = (0.05, 0.20)
_ERROR_LIMITS = (0.5, 0.9)
# Below these the clusters are hardly clusters, or depend on the seed (Rousseeuw 1987 calls a
# silhouette below 0.25 no substantial structure).
_SILHOUETTE_LIMIT = 0.25
_STABILITY_LIMIT = 0.6


class LayerSettings(NamedTuple):
    """What the output of an MoE layer depends on beside its weights.

    Attributes:
      num_selected_experts: top-k.
      normalize_gates: whether the selected gates are divided by their sum.
      activation: "gelu", "silu" or "relu".
      init_stddev: standard deviation of a router's new values.
    """

    num_selected_experts: int
    normalize_gates: bool
    activation: str
    init_stddev: float


def judge(diagnostics: Mapping[str, Any], expected_drop_fraction: float) -> str:
    """Returns the verdict of a layer: "good", "caution" or "poor", and why.

    Args:
      diagnostics: see `LayerPlan`; what is missing or None does not count.
      expected_drop_fraction: assignments expected to overflow.
    """
    level, reasons = 0, []

    def find(value: Any, limits: tuple[float, float], text: str) -> None:
        nonlocal level
        if value is not None and value > limits[0]:
            level = max(level, 2 if value > limits[1] else 1)
            reasons.append(text)

    find(
        expected_drop_fraction,
        _DROP_LIMITS,
        f"{100 * expected_drop_fraction:.1f} % of the assignments would overflow",
    )
    error = diagnostics.get("output_error")
    if error is None:
        error = diagnostics.get("output_error_old_gates")
    find(error, _ERROR_LIMITS, f"the layer's output changes by {error or 0.0:.2f} of its norm")
    silhouette, stability = (diagnostics.get(name) for name in ("silhouette", "seed_stability"))
    if silhouette is not None and silhouette < _SILHOUETTE_LIMIT:
        level = max(level, 1)
        reasons.append(f"clusters are not distinct (silhouette {silhouette:.2f})")
    if stability is not None and stability < _STABILITY_LIMIT:
        level = max(level, 1)
        reasons.append(f"clusters depend on the seed (adjusted Rand index {stability:.2f})")
    if diagnostics.get("router_fit_converged") is False:
        level = max(level, 1)
        reasons.append("the router fit did not converge")
    name = ("good", "caution", "poor")[level]
    return f"{name}: {'; '.join(reasons) or 'nothing speaks against this cut'}."


def measure_plan(
    plan: PruningPlan,
    router: Callable[[int], np.ndarray],
    experts: Callable[[int], Experts],
    settings: LayerSettings,
    *,
    inputs: Mapping[int, np.ndarray] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PruningPlan:
    """Returns the plan with diagnostics that need the weights; its decisions stay the same.

    Prunes one layer at a time in memory, so it takes the time of a prune and a layer's memory.

    Args:
      plan: the plan.
      router: layer -> [embed, expert] kernel.
      experts: layer -> arrays with a leading [expert] axis.
      settings: of the model.
      inputs: layer -> [token, embed] sample of the layer's inputs; without it no output error.
      workers: processes for the alignment.
      progress: called with (layers done, layers in all).
    """
    layers = []
    for done, decided in enumerate(plan.layers, start=1):
        measured = measure_layer(
            plan,
            decided.layer,
            router(decided.layer),
            experts(decided.layer),
            settings,
            inputs=None if inputs is None else inputs[decided.layer],
            workers=workers,
        )
        diagnostics = {**decided.diagnostics, **measured}
        verdict = judge(diagnostics, decided.expected_drop_fraction)
        layers.append(dataclasses.replace(decided, diagnostics=diagnostics, verdict=verdict))
        if progress is not None:
            progress(done, len(plan.layers))
    return dataclasses.replace(plan, layers=tuple(layers))


def measure_layer(
    plan: PruningPlan,
    layer: int,
    router: np.ndarray,
    experts: Experts,
    settings: LayerSettings,
    *,
    inputs: np.ndarray | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Prunes one layer in memory and measures what the merge did.

    Args:
      plan: the plan.
      layer: index of the layer in the model.
      router: [embed, expert] kernel.
      experts: arrays with a leading [expert] axis.
      settings: of the model.
      inputs: [token, embed] sample of the layer's inputs.
      workers: processes for the alignment.

    Returns:
      "similarity_identity" and "similarity_aligned" (mean cosine of merged members to their
      reference, before and after the alignment; None if nothing is aligned), "assignment_gain"
      (their difference), "norm_ratio" ([cluster] norm of the merged weights over the weighted mean
      norm of the members, before gate compensation; 1 for singletons), and with inputs
      "output_error" (relative L2 change of the routed output on the sample with the new router;
      None for "reinit", which is random) and "output_error_old_gates" (the same with every token
      sent to the cluster of its old expert at its old gate).
    """
    decided = plan.layer(layer)
    pruned = prune_layer(
        plan, layer, router, experts, init_stddev=settings.init_stddev, workers=workers
    )
    result: dict[str, Any] = dict.fromkeys(
        ("similarity_identity", "similarity_aligned", "assignment_gain")
    )
    labels = np.asarray(decided.labels)
    merged = [z for z, c in enumerate(decided.labels) if c >= 0 and decided.reference[c] != z]
    if pruned.alignment is not None and merged:
        before = float(np.asarray(pruned.alignment.similarity_before)[merged].mean())
        after = float(np.asarray(pruned.alignment.similarity_after)[merged].mean())
        result |= {
            "similarity_identity": before,
            "similarity_aligned": after,
            "assignment_gain": after - before,
        }
    factors = np.asarray(decided.gate_factors or np.ones(decided.num_clusters))
    result["norm_ratio"] = _norm_ratios(experts, pruned.experts, decided, factors)
    if inputs is not None:
        x = np.asarray(inputs, np.float32)
        old = _route(x, router, settings)
        before = _mixture(x, old, experts, settings.activation)
        kept = labels[old.expert] >= 0
        old_gates = _Routing(np.maximum(labels[old.expert], 0), np.where(kept, old.gate, 0.0))
        norm = max(float(np.linalg.norm(before)), float(np.finfo(np.float32).tiny))

        def error(routing: _Routing) -> float:
            after = _mixture(x, routing, pruned.experts, settings.activation)
            return float(np.linalg.norm(after - before)) / norm

        result["output_error_old_gates"] = error(old_gates)
        result["output_error"] = None
        if plan.router == "remap":
            result["output_error"] = result["output_error_old_gates"]
        elif plan.router != "reinit":
            result["output_error"] = error(_route(x, pruned.router, settings))
    return result


class _Routing(NamedTuple):
    """expert [token, topk] int and gate [token, topk] float32."""

    expert: np.ndarray
    gate: np.ndarray


def _route(x: np.ndarray, router: np.ndarray, settings: LayerSettings) -> _Routing:
    logits = x @ np.asarray(router).astype(np.float32)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    expert = np.argsort(-p, axis=-1, kind="stable")[:, : settings.num_selected_experts]
    gate = np.take_along_axis(p, expert, axis=-1)
    if settings.normalize_gates:
        gate = gate / gate.sum(axis=-1, keepdims=True)
    return _Routing(expert, gate)


def _mixture(x: np.ndarray, routing: _Routing, experts: Experts, activation: str) -> np.ndarray:
    """Returns [token, embed] float32, the gate-weighted sum of the experts' outputs, dropless."""
    y = np.zeros_like(x)
    for index in range(len(experts["wi"])):
        tokens, choice = np.nonzero((routing.expert == index) & (routing.gate > 0))
        if len(tokens):
            output = expert_output(select_expert(experts, index), x[tokens], activation)
            np.add.at(y, tokens, routing.gate[tokens, choice, None] * output)
    return y


def expert_output(expert: Mapping[str, np.ndarray], x: np.ndarray, activation: str) -> np.ndarray:
    """Returns one expert's output [token, embed] float32 for inputs [token, embed]."""
    e = {name: np.asarray(array).astype(np.float32) for name, array in expert.items()}
    hidden = x @ e["wi"] + e.get("wi_bias", np.float32(0))
    if "wg" in e:
        hidden = _activate(x @ e["wg"] + e.get("wg_bias", np.float32(0)), activation) * hidden
    else:
        hidden = _activate(hidden, activation)
    return hidden @ e["wo"] + e.get("wo_bias", np.float32(0))


def _activate(x: np.ndarray, name: str) -> np.ndarray:
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return x * (0.5 * (1.0 + np.tanh(0.5 * x)))
    if name == "gelu":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    raise InputError(f'activation must be "gelu", "silu" or "relu", got {name!r}.')


def _norm_ratios(
    before: Experts, after: Experts, decided: LayerPlan, factors: np.ndarray
) -> list[float]:
    def norms(experts: Experts, scale: np.ndarray | None = None) -> np.ndarray:
        squares = np.zeros(len(experts["wi"]))
        for name in ("wi", "wg", "wo"):
            if name in experts:
                for index in range(len(squares)):
                    array = np.asarray(experts[name][index]).astype(np.float32)
                    factor = scale[index] if scale is not None and name == "wo" else 1.0
                    squares[index] += float(np.square(array).sum(dtype=np.float64)) / factor**2
        return np.sqrt(squares)

    labels = np.asarray(decided.labels)
    shares = normalized_weights(labels, np.asarray(decided.weights))
    members = np.bincount(
        labels[labels >= 0], (shares * norms(before))[labels >= 0], minlength=decided.num_clusters
    )
    merged = norms(after, factors)
    return (merged / np.where(members > 0, members, 1.0)).tolist()
