"""A pruning plan for people (a table, a picture) and for programs (a dict)."""

from __future__ import annotations

import os
from typing import Any

from uncurl_jax.artifacts import atomic_file
from uncurl_jax.experiments.reporting import report_figures, report_page
from uncurl_jax.pruning.layer_plan import LayerPlan
from uncurl_jax.pruning.plan import PruningPlan

# Heading, key of describe_plan's layers, and how the value is written.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("layer", "layer", "d"),
    ("method", "method", "s"),
    ("experts", "num_experts", "d"),
    ("after", "num_clusters", "d"),
    ("largest", "largest_cluster", "d"),
    ("single", "singletons", "d"),
    ("dead", "num_dead_experts", "d"),
    ("drop %", "expected_drop_percent", ".1f"),
    ("top load %", "largest_load_percent", ".1f"),
    ("eigengap", "eigengap", ".3f"),
    ("silhouette", "silhouette", ".2f"),
    ("stability", "seed_stability", ".2f"),
    ("gain", "assignment_gain", ".3f"),
    ("norm", "mean_norm_ratio", ".2f"),
    ("error", "output_error", ".3f"),
    ("KL", "router_kl_after", ".4f"),
)


def describe_plan(plan: PruningPlan) -> dict[str, Any]:
    """Returns a plan's decisions and diagnostics as a JSON-compatible dict, a row per layer."""
    return {
        "method": plan.method,
        "router": plan.router,
        "alignment": plan.alignment,
        "gate_compensation": plan.gate_compensation,
        "task": plan.source.task,
        "tokens": plan.source.tokens,
        "num_experts": {"before": list(plan.source.num_experts), "after": list(plan.num_experts)},
        "hash": plan.hash,
        "verdict": plan.verdict,
        "warnings": list(plan.warnings),
        "layers": [_describe_layer(layer) for layer in plan.layers],
    }


def _describe_layer(layer: LayerPlan) -> dict[str, Any]:
    numbers = layer.diagnostics
    ratios = numbers.get("norm_ratio")
    error = numbers.get("output_error")
    if error is None:
        error = numbers.get("output_error_old_gates")
    return {
        "layer": layer.layer,
        "method": layer.method,
        "num_experts": layer.num_experts,
        "num_clusters": layer.num_clusters,
        "cluster_sizes": list(layer.cluster_sizes),
        "largest_cluster": max(layer.cluster_sizes),
        "singletons": sum(size == 1 for size in layer.cluster_sizes),
        "num_dropped": sum(label < 0 for label in layer.labels),
        "num_dead_experts": len(numbers.get("dead_experts", ())),
        "expected_drop_percent": 100 * layer.expected_drop_fraction,
        "largest_load_percent": 100 * max(numbers.get("predicted_load") or [0.0]),
        "mean_norm_ratio": sum(ratios) / len(ratios) if ratios else None,
        **{k: v for k, v in numbers.items() if k != "output_error"},
        "output_error": error,
        "verdict": layer.verdict,
    }


def format_plan(plan: PruningPlan) -> str:
    """Returns a plan as a table for a terminal; what was not measured is a dash."""
    rows = _table(plan)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        _title(plan),
        *(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ),
        *_notes(plan),
        f"plan: {plan.verdict}",
    ]
    return "\n".join(lines)


def write_page(plan: PruningPlan, path: str | os.PathLike[str]) -> None:
    """Writes a self-contained HTML page: the table, clusters and loads of every layer."""
    figures = report_figures.draw_plan(plan.source.task, plan)
    page = report_page.render_plan(_title(plan), plan.verdict, _table(plan), _notes(plan), figures)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _title(plan: PruningPlan) -> str:
    return (
        f"{plan.method} plan for {plan.source.task} ({plan.source.tokens:,} tokens): router "
        f"{plan.router}, alignment {plan.alignment}"
    )


def _notes(plan: PruningPlan) -> list[str]:
    return [*(f"layer {layer.layer}: {layer.verdict}" for layer in plan.layers), *plan.warnings]


def _table(plan: PruningPlan) -> list[list[str]]:
    rows = [[heading for heading, _, _ in _COLUMNS]]
    for layer in describe_plan(plan)["layers"]:
        rows.append([_cell(layer.get(key), form) for _, key, form in _COLUMNS])
    return rows


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
