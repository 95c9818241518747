"""The file that holds a placement: what the planner chose, and for what."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.layouts import (
    PURPOSES,
    LayerChoice,
    Layout,
    Request,
    Times,
)
from uncurl_jax.deployment.layouts import wire_bytes_per_token as bytes_per_token
from uncurl_jax.deployment.planner import LayerKind, Report
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import ExpertAxes, check_expert_axes

SCHEMA = "uncurl_jax placement 1"
NOTE = (
    "seconds and activation_bytes are estimates: a roofline of the slice's rates with nothing "
    "overlapping, and a formula; state_bytes, cache_bytes and wire bytes are counted"
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a placement file says to those who carry it out.

    Attributes:
      slice: name of the slice.
      num_devices: its chips.
      mode: "train" or "serve".
      batch, length, accumulation_steps: of the step that it was made for.
      num_experts: of the model, per layer.
      model_hash: of the model's configuration; see `model_hash`.
      expert_partitions, model_partitions: of the mesh; data takes the other devices.
      expert_axes: mesh axes that divide each layer's experts.
    """

    slice: str
    num_devices: int
    mode: str
    batch: int
    length: int
    accumulation_steps: int
    num_experts: tuple[int, ...]
    model_hash: str
    expert_partitions: int
    model_partitions: int
    expert_axes: ExpertAxes

    def __post_init__(self):
        numbers = (
            *(self.num_devices, self.batch, self.length, self.accumulation_steps),
            *(self.expert_partitions, self.model_partitions),
        )
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise InputError(
                f"A placement's sizes must be whole numbers of at least 1, got {numbers}: make the "
                "placement again."
            )
        if self.num_devices % (self.expert_partitions * self.model_partitions):
            raise InputError(
                "expert_partitions * model_partitions of a placement must divide its devices, got "
                f"{self.expert_partitions} * {self.model_partitions} on {self.num_devices}: make "
                "the placement again."
            )
        check_expert_axes(self.expert_axes, len(self.num_experts))

    @property
    def data_partitions(self) -> int:
        """Devices along the data axis."""
        return self.num_devices // (self.expert_partitions * self.model_partitions)

    def check_training(
        self, *, num_devices: int, num_experts: Sequence[int], batch_size: int, parts: int
    ) -> None:
        """Checks that the placement is for this training run.

        Raises:
          InputError: If it is for other devices, another model, batch or mode.
        """
        again = "make the placement again for this run"
        if self.mode != "train":
            raise InputError(
                f'A placement for training must be made with --mode train, got "{self.mode}": '
                f"{again}."
            )
        if num_devices != self.num_devices:
            raise InputError(
                f"A placement's mesh must multiply to the devices present, got data "
                f"{self.data_partitions} * expert {self.expert_partitions} * model "
                f"{self.model_partitions} = {self.num_devices} for {num_devices} devices: nearest "
                f"is a slice of {num_devices} chips; {again}."
            )
        if tuple(num_experts) != self.num_experts:
            raise InputError(
                f"A placement must be for the model that is trained, got num_experts "
                f"{list(self.num_experts)} for a model of {list(num_experts)}: {again}."
            )
        if (batch_size, parts) != (self.batch, self.accumulation_steps):
            raise InputError(
                "A placement must be for the batch that is trained, got batch "
                f"{self.batch} in {self.accumulation_steps} parts for batch_size {batch_size} in "
                f"{parts}: set TrainConfig.batch_size and accumulation_steps to that, or {again}."
            )


def model_hash(model: ModelConfig) -> str:
    """Identifies an architecture."""
    return artifacts.sha256_of_json(model.to_dict())


def load_placement(path: str | os.PathLike[str]) -> Placement:
    """Reads and checks what `save_report` wrote.

    Raises:
      InputError: If the file is missing or is not a placement.
    """
    values = artifacts.read_json(path)
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise InputError(
            f'A placement must be an object with schema "{SCHEMA}", got something else in {path}: '
            "make it with uncurl placement."
        )
    try:
        return Placement(
            **{
                name: values[name]
                for name in (
                    *("slice", "num_devices", "mode", "batch", "length", "accumulation_steps"),
                    *("expert_partitions", "model_partitions"),
                )
            },
            num_experts=tuple(int(count) for count in values["model"]["num_experts"]),
            model_hash=values["model"]["hash"],
            expert_axes=tuple(tuple(axes) for axes in values["expert_axes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{Path(path)}: {error}") from None
        raise InputError(
            f"A placement must have the fields of this version, got {path} with "
            f"{type(error).__name__} {error}: make the placement again."
        ) from None


def save_report(
    report: Report, path: str | os.PathLike[str], *, fingerprint: str | None = None
) -> None:
    """Writes the choice and what it was chosen from, atomically."""
    artifacts.write_json(path, describe(report, fingerprint=fingerprint))


def describe(report: Report, *, fingerprint: str | None = None) -> dict[str, Any]:
    """Returns a report as a JSON-compatible dict.

    Args:
      report: what the planner found.
      fingerprint: of the checkpoint that was given.
    """
    request, chosen = report.request, report.chosen
    model, job = request.model, request.job
    return {
        "schema": SCHEMA,
        "slice": request.slice.name,
        "num_devices": request.slice.num_chips,
        "model": {
            "hash": model_hash(model),
            "fingerprint": fingerprint,
            "num_experts": list(model.num_experts),
            "num_experts_before": None
            if request.num_experts_before is None
            else list(request.num_experts_before),
        },
        "mode": job.mode,
        "batch": job.batch,
        "length": job.length,
        "accumulation_steps": job.accumulation_steps,
        "param_dtype": "float32" if job.is_training else job.param_dtype,
        "cache_length": job.cache_length,
        "expert_partitions": chosen.mesh.expert,
        "model_partitions": chosen.mesh.model,
        "expert_axes": [list(axes) for axes in chosen.expert_axes(model.num_layers)],
        "reason": report.reason,
        "note": NOTE,
        "hbm_bytes_per_chip": request.slice.hbm_bytes_per_chip,
        "headroom": request.headroom,
        "estimates": _estimates(chosen),
        "layers": [_kind(request, chosen, kind) for kind in report.kinds],
        "alternatives": [
            {
                **layout.mesh._asdict(),
                "expert_axes": [list(axes) for axes in layout.expert_axes(model.num_layers)],
                "problem": layout.problem,
                **_estimates(layout),
            }
            for layout in report.layouts
            if layout is not chosen
        ],
        "refused": [
            {**mesh._asdict(), "problem": problem} for mesh, problem in report.refused.items()
        ],
        "fewest_chips": report.fewest_chips._asdict(),
    }


def summarize(report: Report) -> dict[str, Any]:
    """Returns the choice alone, as a JSON-compatible dict."""
    whole = describe(report)
    names = ("slice", "num_devices", "mode", "batch", "length", "accumulation_steps")
    chosen = ("expert_partitions", "model_partitions", "expert_axes")
    return {
        **{name: whole[name] for name in (*names, *chosen)},
        "num_experts": whole["model"]["num_experts"],
        "estimates": whole["estimates"],
        "fewest_chips": whole["fewest_chips"],
        "feasible_layouts": sum(layout.problem is None for layout in report.layouts),
        "reason": report.reason,
    }


def _estimates(layout: Layout) -> dict[str, Any]:
    return {
        "state_bytes": layout.memory.state,
        "cache_bytes": layout.memory.cache,
        "activation_bytes": layout.memory.activations,
        "hbm_bytes": layout.memory.total,
        "wire_bytes_per_token": _by_purpose(layout.wire_bytes_per_token),
        "seconds": _seconds(layout.times),
        "drop_fraction": {str(layer): share for layer, share in layout.drop_fractions.items()},
    }


def _kind(request: Request, chosen: Layout, kind: LayerKind) -> dict[str, Any]:
    """Layers of one kind, with every way to place them."""
    return {
        "layers": list(kind.layers),
        "num_experts": request.model.num_experts[kind.layers[0]],
        "options": [
            {
                **mesh._asdict(),
                "chosen_for": kind.chosen_for(chosen, choice),
                **_option(request, mesh, choice),
            }
            for mesh, choice in kind.options
        ],
    }


def _option(request: Request, mesh: MeshShape, choice: LayerChoice) -> dict[str, Any]:
    """One way to place the experts of one layer."""
    experts = choice.experts
    return {
        "expert_axes": list(experts.axes),
        "group": experts.group,
        "padded_experts": experts.padded_experts,
        "capacity": experts.capacity,
        "weight_bytes": experts.weight_bytes,
        "state_bytes": experts.cost.state_bytes,
        "activation_bytes": experts.cost.activation_bytes,
        "wire_bytes_per_token": _by_purpose(bytes_per_token([experts.cost], mesh, request.job)),
        "collectives": [
            {**traffic._asdict(), "axes": list(traffic.axes)} for traffic in experts.cost.traffic
        ],
        "seconds": _seconds(choice.times),
    }


def _by_purpose(values: Any) -> dict[str, float]:
    named = {purpose.replace(" ", "_"): round(values[purpose], 3) for purpose in PURPOSES}
    return {**named, "total": round(sum(values[purpose] for purpose in PURPOSES), 3)}


def _seconds(times: Times) -> dict[str, float]:
    communication = {
        f"communication_{purpose.replace(' ', '_')}": times.communication[purpose]
        for purpose in PURPOSES
    }
    return {
        "compute": times.compute,
        "update": times.update,
        "overhead": times.overhead,
        **communication,
        "total": times.total,
    }
