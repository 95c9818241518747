"""Which model is placed: of a checkpoint or a configuration, as it is or after a prune."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.provenance import provenance_chain
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import drops
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.statistics import RouterStatistics

PathLike = str | os.PathLike[str]


class Subject(NamedTuple):
    """What is placed.

    Attributes:
      model: after the prune, if there is one.
      num_experts_before: of every layer before it; None if there is none.
      loads: {MoE layer: how often each expert is selected}; None if that is not known.
      fingerprint: of the checkpoint; None without one.
    """

    model: ModelConfig
    num_experts_before: tuple[int, ...] | None
    loads: drops.Loads | None
    fingerprint: str | None


def find_subject(
    model: ModelConfig,
    checkpoint: layout.CheckpointPath | None = None,
    *,
    plan: PathLike | None = None,
    num_experts: int | Sequence[int] | None = None,
    statistics: PathLike | None = None,
) -> Subject:
    """Puts together what is known of a model and its prune.

    Args:
      model: configuration of the model, the checkpoint's if there is one.
      checkpoint: where it comes from; if it was pruned, its provenance tells from what, and how
        often each expert is selected.
      plan: a prune that is still to be done.
      num_experts: the same as a question: one count, or one per MoE layer.
      statistics: how often each expert of `model` is selected.

    Raises:
      InputError: If a file is of another model, or two of them say the same thing, or the model has
        an encoder.
    """
    model.check_decoder("uncurl placement")
    if plan is not None and num_experts is not None:
        raise InputError(
            "A prune is given once, got --plan and --num_experts: leave out one of them."
        )
    if statistics is not None and (plan is not None or num_experts is not None):
        other = "--plan, which holds its own" if plan is not None else "--num_experts"
        raise InputError(
            f"--statistics are of the model as it is, got them with {other}: leave them out, or "
            "make a plan from them."
        )
    fingerprint = None if checkpoint is None else layout.fingerprint(checkpoint)
    if plan is not None:
        return _after_plan(model, PruningPlan.load(plan), fingerprint)
    if num_experts is not None:
        return Subject(_with_counts(model, num_experts), model.num_experts, None, fingerprint)
    subject = Subject(model, None, None, fingerprint)
    if checkpoint is not None:
        subject = _with_provenance(subject, checkpoint)
    if statistics is not None:
        loads = _observed(model, RouterStatistics.load(statistics), fingerprint)
        subject = subject._replace(loads=loads)
    return subject


def _after_plan(model: ModelConfig, plan: PruningPlan, fingerprint: str | None) -> Subject:
    _require_same(model, plan.source.num_experts, "plan")
    _require_checkpoint(plan.source.checkpoint_hash, fingerprint, "plan")
    after = dataclasses.replace(model, num_experts=plan.num_experts, expert_map=plan.expert_map)
    return Subject(after, model.num_experts, _planned_loads(plan), fingerprint)


def _planned_loads(plan: PruningPlan) -> dict[int, Any]:
    return {layer.layer: drops.merged_load(layer.labels, layer.selected) for layer in plan.layers}


def _observed(
    model: ModelConfig, statistics: RouterStatistics, fingerprint: str | None
) -> dict[int, Any]:
    _require_same(model, tuple(statistics.manifest["num_experts"]), "statistics")
    _require_checkpoint(statistics.manifest["checkpoint_hash"], fingerprint, "statistics")
    return {layer: sums.selected for layer, sums in statistics.layers.items()}


def _require_same(model: ModelConfig, num_experts: Sequence[int], name: str) -> None:
    if tuple(num_experts) != model.num_experts:
        raise InputError(
            f"A {name} file must be of the model that is placed, got num_experts "
            f"{list(num_experts)} for a model of {list(model.num_experts)}: give that model's."
        )


def _require_checkpoint(source: str, fingerprint: str | None, name: str) -> None:
    if fingerprint is not None and source != fingerprint:
        raise InputError(
            f"A {name} file must be of the checkpoint that is placed, got one of {source} for "
            f"fingerprint {fingerprint}: give the checkpoint (and step) that was calibrated."
        )


def _with_counts(model: ModelConfig, num_experts: int | Sequence[int]) -> ModelConfig:
    layers = model.moe_layers
    if isinstance(num_experts, int):
        counts = dict.fromkeys(layers, num_experts)
    elif len(num_experts) == len(layers):
        counts = dict(zip(layers, num_experts, strict=True))
    else:
        raise InputError(
            f"num_experts must be one number or one per MoE layer, got {len(num_experts)} numbers "
            f"for {len(layers)} MoE layers: give {len(layers)} or one."
        )
    for layer, count in counts.items():
        if not 1 <= count <= model.num_experts[layer]:
            raise InputError(
                f"num_experts after pruning must lie in [1, {model.num_experts[layer]}] in layer "
                f"{layer}, got {count}: choose no more experts than the layer has."
            )
    after = tuple(counts.get(layer, 0) for layer in range(model.num_layers))
    return dataclasses.replace(model, num_experts=after, expert_map=None)


def _with_provenance(subject: Subject, checkpoint: layout.CheckpointPath) -> Subject:
    """Adds what the prunes behind a checkpoint tell: counts before the first, loads of the last."""
    plans = [
        link.provenance["plan"]
        for link in provenance_chain(checkpoint)
        if link.provenance is not None and link.plan_hash is not None
    ]
    if not plans:
        return subject
    before = tuple(plans[-1]["source"]["num_experts"])
    return subject._replace(
        num_experts_before=before, loads=_planned_loads(PruningPlan.from_dict(plans[0]))
    )
