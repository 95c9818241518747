"""The pruning plan: every decision about a prune, in a file to inspect, diff and replay.

It holds all that the offline transform needs beside the checkpoint: neither clustering nor gate
compensation nor a fitted router needs the statistics again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import ALIGNMENTS
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.grouping import GroupingOptions
from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource, build_strict, check_num_experts
from uncurl_jax.pruning.router import TREATMENTS

FORMAT = "uncurl_jax pruning plan"
FORMAT_VERSION = 2
FILE_NAME = "pruning_plan.json"
# What can be said of a layer or a plan, from best to worst.
VERDICTS = ("good", "caution", "poor")


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """A prune of one checkpoint.

    Attributes:
      method: name of the method that grouped the experts; "composite" if layers differ in it.
      router: treatment of the router; see `router.new_router_kernel`.
      grouping: how the method worked; see `GroupingOptions`.
      seed: seed of clustering, of random choices and of a router's new values.
      alignment: how members are aligned to their reference before they are merged; see
        `alignment.ALIGNMENTS`.
      gate_compensation: whether outputs are scaled by the layers' gate_factors.
      eval_capacity_factor: capacity factor that drops are predicted for; None is dropless.
      source: what the plan was made from.
      layers: one LayerPlan per MoE layer, in order.
    """

    method: str
    router: str
    grouping: GroupingOptions
    seed: int
    alignment: str
    gate_compensation: bool
    eval_capacity_factor: float | None
    source: PlanSource
    layers: tuple[LayerPlan, ...]

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        require_choice("router", self.router, TREATMENTS)
        require_choice("alignment", self.alignment, ALIGNMENTS)
        if not isinstance(self.grouping, GroupingOptions):
            raise InputError(
                f"A plan's grouping must be GroupingOptions, got {self.grouping!r}: make the plan "
                "again."
            )
        if self.gate_compensation and self.router in ("reinit", "remap"):
            reason = (
                "whose gates are unknown until it is trained"
                if self.router == "reinit"
                else "whose gates are the old ones"
            )
            raise InputError(
                f"gate_compensation must be off with router {self.router!r}, {reason}: use "
                "'reference', 'mean' or 'fit', or turn it off."
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
            if (layer.fitted_router is not None) != (self.router == "fit"):
                raise InputError(
                    f"A fitted router must be there with router 'fit' only, got router "
                    f"{self.router!r} in layer {layer.layer}: make the plan again."
                )
            if self.router == "remap" and -1 in layer.labels:
                raise InputError(
                    f"Router 'remap' needs every expert in a cluster, got dropped experts in layer "
                    f"{layer.layer} from method {layer.method!r}: choose a method that merges, or "
                    "another router."
                )
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
    def expert_map(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """`ModelConfig.expert_map` after the prune: the labels with router "remap", else None."""
        if self.router != "remap":
            return None
        labels = {layer.layer: layer.labels for layer in self.layers}
        return tuple(labels.get(layer) for layer in range(len(self.source.num_experts)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all layers."""
        return tuple(warning for layer in self.layers for warning in layer.warnings)

    @property
    def verdict(self) -> str:
        """One sentence: the worst of the layers' verdicts and how many share it."""
        levels = [layer.verdict.partition(":")[0] for layer in self.layers]
        worst = max(levels, key=VERDICTS.index)
        counts = ", ".join(
            f"{levels.count(level)} {level}" for level in VERDICTS if level in levels
        )
        return f"{worst}: of {len(levels)} MoE layers {counts}."

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
        if isinstance(fields.get("grouping"), dict):
            fields["grouping"] = build_strict(GroupingOptions, fields["grouping"])
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
