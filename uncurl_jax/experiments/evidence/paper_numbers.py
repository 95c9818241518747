"""The numbers of the UNCURL paper, as printed there: theirs, not ours.

One run per cell, no seeds and no intervals, on models of 354M dense parameters with as many experts
as named; validation accuracy in percent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SOURCE = (
    "Sarkar, Lausen, Cevher, Zha, Brox, Karypis: Revisiting SMoE Language Models by Evaluating "
    "Inefficiencies with Task Specific Expert Pruning, PMLR 262:165-181 (2024), arXiv 2409.01483"
)
NOTE = "The paper's numbers, not ours: one run per cell, without seeds or intervals."
TASKS = ("rte", "boolq", "copa", "cb", "record", "wsc")


class PaperModel(NamedTuple):
    """A model that was pretrained with so many experts and not pruned; 1 is the dense model.

    Attributes:
      num_experts: per MoE layer.
      scores: percent, in the order of TASKS.
      mean: percent, as printed.
    """

    num_experts: int
    scores: tuple[float, ...]
    mean: float


class PaperPruned(NamedTuple):
    """A pruned model.

    Attributes:
      source_num_experts, num_experts: before and after.
      method: in this package's words.
      router: likewise; UNCURL re-initialises it.
      scores: percent, in the order of TASKS.
      mean: percent, as printed.
      against_scratch: points against the model from scratch of that size, as printed.
    """

    source_num_experts: int
    num_experts: int
    method: str
    router: str
    scores: tuple[float, ...]
    mean: float
    against_scratch: float


SCRATCH = (
    PaperModel(1, (64.21, 65.33, 56.61, 51.32, 63.14, 65.35), 60.99),
    PaperModel(8, (66.03, 67.35, 58.40, 50.87, 65.17, 68.16), 62.66),
    PaperModel(32, (66.86, 68.27, 59.13, 51.86, 67.75, 70.87), 64.12),
    PaperModel(64, (67.64, 69.09, 60.05, 52.17, 68.85, 71.68), 64.91),
    PaperModel(128, (68.58, 70.13, 61.30, 52.04, 69.83, 72.18), 65.68),
)

PRUNED = (
    PaperPruned(
        32, 8, "frequency", "reinit", (64.86, 66.71, 58.12, 49.53, 64.77, 67.59), 61.93, -0.73
    ),
    PaperPruned(
        64, 32, "frequency", "reinit", (66.36, 68.21, 58.74, 50.09, 66.86, 69.43), 63.28, -0.84
    ),
    PaperPruned(
        128, 64, "frequency", "reinit", (66.91, 68.22, 58.31, 50.98, 67.22, 70.09), 63.62, -1.29
    ),
    PaperPruned(32, 8, "uncurl", "reinit", (66.48, 69.13, 58.96, 50.65, 66.34, 69.86), 63.57, 0.91),
    PaperPruned(
        64, 32, "uncurl", "reinit", (67.14, 68.86, 59.96, 51.94, 67.96, 69.94), 64.30, 0.18
    ),
    PaperPruned(
        128, 64, "uncurl", "reinit", (67.73, 69.28, 60.82, 51.81, 68.91, 71.73), 65.05, 0.13
    ),
    PaperPruned(
        64, 8, "uncurl", "reinit", (66.17, 67.27, 58.11, 50.16, 65.01, 68.11), 62.47, -0.19
    ),
    PaperPruned(
        128, 32, "uncurl", "reinit", (65.17, 67.17, 59.04, 50.17, 67.02, 71.04), 63.27, -0.85
    ),
    PaperPruned(
        128, 8, "uncurl", "reinit", (62.91, 66.93, 56.56, 49.31, 64.32, 64.98), 60.84, -1.83
    ),
)


def paper_effects() -> dict[str, Any]:
    """Returns the paper's effects against scratch and unpruned, in points, for report.json.

    Effects per task are differences of the paper's scores. Those of the mean are as printed against
    scratch, and differences of the printed means against unpruned.
    """
    known = {model.num_experts: model for model in SCRATCH}
    rows = []
    for row in PRUNED:
        small, large = known[row.num_experts], known[row.source_num_experts]
        rows.append(
            {
                "source_num_experts": row.source_num_experts,
                "num_experts": row.num_experts,
                "method": row.method,
                "router": row.router,
                "scratch": _effects(row.scores, small.scores) | {"mean": row.against_scratch},
                "unpruned": _effects(row.scores, large.scores)
                | {"mean": round(row.mean - large.mean, 2)},
            }
        )
    return {"source": SOURCE, "note": NOTE, "tasks": list(TASKS), "rows": rows}


def _effects(ours: tuple[float, ...], theirs: tuple[float, ...]) -> dict[str, float]:
    pairs = zip(TASKS, ours, theirs, strict=True)
    return {task: round(own - other, 2) for task, own, other in pairs}
