"""The figures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uncurl_jax.experiments.reporting import (
    report_course,
    report_plans,
    report_scores,
    report_tradeoffs,
)
from uncurl_jax.experiments.reporting.report_drawing import Figure, drawing_style
from uncurl_jax.pruning.plan_file import PruningPlan

if TYPE_CHECKING:
    from uncurl_jax.experiments.reporting.report_evidence import Evidence


def draw_figures(
    report: Mapping[str, Any], plans: Mapping[str, PruningPlan], evidence: Evidence
) -> list[Figure]:
    """Draws all figures of a study's report.

    Args:
      report: what report.json holds: rows and findings.
      plans: by task, the plan whose clusters and loads are shown.
      evidence: what the study's directory holds beside the scores.

    Returns:
      Figures in the order of the page.
    """
    rows, findings = report["rows"], report["findings"]
    costs = [report_tradeoffs.memory_cost(rows), *evidence.measures]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with drawing_style():
        figures: list[Figure | None] = [
            *report_scores.draw_scores(rows, findings),
            *report_tradeoffs.draw_tradeoffs(rows, findings, costs),
            report_scores.draw_sizes(rows),
        ]
        merged: list[Figure] = []
        for task, plan in plans.items():
            statistics = evidence.statistics.get(task)
            layers = None if statistics is None else statistics.layers
            merged += report_plans.draw_plan_figures(task, plan, layers)
        # Figures of one panel first, so that they stand side by side.
        figures += sorted(merged, key=lambda figure: len(figure.panels) > 1)
        figures += [
            report_scores.draw_dropped(rows),
            report_course.draw_curves(evidence.curves, tasks),
            report_course.draw_costs(evidence.costs),
        ]
    return [figure for figure in figures if figure is not None]


def draw_plan(task: str, plan: PruningPlan) -> list[Figure]:
    """Draws one plan: its clusters, and the loads before and after."""
    with drawing_style():
        return report_plans.draw_plan_figures(task, plan)
