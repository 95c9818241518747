"""What `uncurl aot` compiles: model, stage, slice and placement, put together and checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.deployment import programs
from uncurl_jax.deployment.placement import Placement
from uncurl_jax.deployment.slices import Slice
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import check_expert_axes


class Request(NamedTuple):
    """What is compiled, for what.

    Attributes:
      model: the architecture.
      config: batch size, accumulation, optimizer, and placement on the mesh.
      slice: where it is to run.
      programs: names, some of programs.PROGRAMS.
      length: tokens of each row.
    """

    model: ModelConfig
    config: TrainConfig
    slice: Slice
    programs: tuple[str, ...]
    length: int

    @property
    def rows_at_a_time(self) -> int:
        """Rows of the global batch that are in memory together."""
        return self.config.batch_size // self.config.accumulation_steps


def make_request(
    config: TrainConfig,
    where: Slice,
    *,
    model: ModelConfig | None = None,
    num_experts: int | tuple[int, ...] | None = None,
    programs_wanted: Sequence[str] = programs.PROGRAMS,
    batch_size: int | None = None,
    length: int | None = None,
    expert_partitions: int | None = None,
    model_partitions: int | None = None,
    placement: Placement | None = None,
) -> Request:
    """Puts together what is compiled and checks it; nothing is compiled yet.

    Args:
      config: a training stage.
      where: the slice.
      model: the architecture, if the stage goes on from a checkpoint and names none.
      num_experts: experts per MoE layer in place of the model's: one number, or one per MoE layer.
      programs_wanted: names.
      batch_size: rows of an optimizer step, in place of the stage's.
      length: tokens per row; the stage's by default, or else the longest that the model reads.
      expert_partitions: of the mesh, in place of the stage's.
      model_partitions: likewise.
      placement: mesh and experts' places, in place of the stage's.

    Raises:
      InputError: If something does not exist, does not fit the slice or does not divide.
    """
    for name in programs_wanted:
        if name not in programs.PROGRAMS:
            near = difflib.get_close_matches(name, programs.PROGRAMS, n=1)
            raise InputError(
                f"A program must be one of {', '.join(programs.PROGRAMS)}, got {name!r}: "
                f"{'nearest ' + near[0] if near else 'choose some, with commas between them'}."
            )
    found = model or config.model
    if found is None:
        raise InputError(
            "aot needs a model, got a stage that goes on from a checkpoint: give --checkpoint, or "
            "bind config.TrainConfig.model to @config.ModelConfig() of a file of gin/models."
        )
    found.check_decoder("uncurl aot")
    if config.distillation is not None:
        raise InputError(
            "aot compiles a stage without a teacher, got one with distillation: add "
            "--gin.config.TrainConfig.distillation=None."
        )
    mesh = {"expert_partitions": expert_partitions, "model_partitions": model_partitions}
    given: dict[str, Any] = {name: value for name, value in mesh.items() if value is not None}
    if num_experts is not None:
        found = _with_experts(found, num_experts)
    if placement is not None:
        given |= _placed(placement, found, where, is_divided=bool(given))
    if batch_size is not None:
        given["batch_size"] = batch_size
    config = dataclasses.replace(config, **given)
    check_expert_axes(config.expert_axes, found.num_layers)
    if length is None:
        length = config.length or found.max_length
    if not 1 <= length <= found.max_length:
        raise InputError(
            f"--length must be from 1 to the model's max_length={found.max_length}, got {length}."
        )
    request = Request(found, config, where, tuple(programs_wanted), length)
    _check_divisions(request)
    return request


def _with_experts(model: ModelConfig, counts: int | tuple[int, ...]) -> ModelConfig:
    if isinstance(counts, int):
        return model.with_experts(counts)
    if len(counts) != len(model.moe_layers):
        raise InputError(
            f"--num_experts must be one number or one per MoE layer, got {len(counts)} for "
            f"{len(model.moe_layers)} MoE layers."
        )
    of_layer = dict(zip(model.moe_layers, counts, strict=True))
    experts = tuple(of_layer.get(layer, 0) for layer in range(model.num_layers))
    return dataclasses.replace(model, num_experts=experts, expert_map=None)


def _placed(
    placement: Placement, model: ModelConfig, where: Slice, *, is_divided: bool
) -> dict[str, Any]:
    """Returns the fields of TrainConfig that a placement sets."""
    if is_divided:
        raise InputError(
            "--placement says how the mesh is divided, got it beside --expert_partitions or "
            "--model_partitions: leave out one of them."
        )
    if placement.num_devices != where.num_chips or placement.num_experts != model.num_experts:
        raise InputError(
            f"A placement must be for the slice and the model, got one for {placement.slice} and "
            f"num_experts {list(placement.num_experts)}, with {where.name} and "
            f"{list(model.num_experts)}: make the placement again."
        )
    names = ("expert_partitions", "model_partitions", "expert_axes")
    return {name: getattr(placement, name) for name in names}


def _check_divisions(request: Request) -> None:
    """Checks that mesh and batch divide, naming the nearest numbers that do."""
    config, chips = request.config, request.slice.num_chips
    experts, units = config.expert_partitions, config.model_partitions
    if units < 1 or chips % units:
        raise InputError(
            f"model_partitions must divide the chips of {request.slice.name}, got {units} for "
            f"{chips}: nearest {_nearest_divisor(units, chips)}."
        )
    if experts < 1 or chips // units % experts:
        raise InputError(
            "expert_partitions * model_partitions must divide the chips of "
            f"{request.slice.name}, got {experts} * {units} for {chips}: nearest expert_partitions "
            f"{_nearest_divisor(experts, chips // units)}."
        )
    parts = chips // units * config.accumulation_steps
    if config.batch_size % parts:
        low = config.batch_size // parts * parts
        nearest = " or ".join(str(size) for size in (low, low + parts) if size)
        raise InputError(
            "The batch must be a multiple of data * expert partitions * accumulation_steps, got "
            f"{config.batch_size} for {chips // units} * {config.accumulation_steps}: nearest "
            f"--batch {nearest}."
        )


def _nearest_divisor(wanted: int, number: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
