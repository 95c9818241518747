"""Prices the ways to place a model on one mesh, and chooses per layer where the experts are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import costs, drops
from uncurl_jax.deployment.arrays import Axes
from uncurl_jax.deployment.costs import Cost, ExpertCost
from uncurl_jax.deployment.interconnect import MeshShape, collective_seconds, wire_bytes
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.slices import Slice
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import TOKEN_AXES

# Purposes of collectives, in the order of tables.
PURPOSES: tuple[str, ...] = ("tokens", "weights", "gradients", "partial sums")
# Memory that makes no difference to a choice, as a share of the budget.
_ROUNDING = 2**-14


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be placed where.

    Attributes:
      model: to place; after pruning, if there is a prune.
      job: what it is to do.
      slice: where.
      num_experts_before: of the unpruned model, per layer; None if there is none.
      loads: per MoE layer, how often each expert is selected; None if it is not known.
      max_drop_fraction: most assignments of any layer that the capacity may drop; None for any.
      expert_partitions, model_partitions: of the mesh, if they are given.
      headroom: share of HBM that stays free.
    """

    model: ModelConfig
    job: Job
    slice: Slice
    num_experts_before: tuple[int, ...] | None = None
    loads: drops.Loads | None = None
    max_drop_fraction: float | None = None
    expert_partitions: int | None = None
    model_partitions: int | None = None
    headroom: float = 0.1

    def __post_init__(self):
        if not 0 <= self.headroom < 1:
            raise InputError(f"headroom must lie in [0, 1), got {self.headroom}: choose 0.1.")
        limit = self.max_drop_fraction
        if limit is not None and not 0 <= limit < 1:
            raise InputError(f"max_drop_fraction must lie in [0, 1), got {limit}.")
        if limit is not None and self.loads is None:
            raise InputError(
                "max_drop_fraction needs to know how often experts are selected, got neither "
                "--statistics nor --plan: give one of them."
            )
        model, job = self.model, self.job
        if job.mode not in ("train", "serve"):
            raise InputError(f'mode must be "train" or "serve", got {job.mode!r}.')
        if min(job.batch, job.length, job.accumulation_steps) < 1 or job.cache_length < 0:
            raise InputError(
                "batch, length and accumulation_steps must be at least 1 and cache_length 0, got "
                f"{job.batch}, {job.length}, {job.accumulation_steps} and {job.cache_length}."
            )
        if job.batch % job.accumulation_steps:
            raise InputError(
                "accumulation_steps must divide batch, got "
                f"{job.accumulation_steps} and {job.batch}."
            )
        if max(job.length, job.cache_length) > model.max_length:
            raise InputError(
                f"length and cache_length must not be above the model's max_length="
                f"{model.max_length}, got {job.length} and {job.cache_length}: choose "
                f"{model.max_length}."
            )

    @property
    def budget_bytes(self) -> int:
        """HBM of a chip that may be used."""
        return int(self.slice.hbm_bytes_per_chip * (1 - self.headroom))


class Times(NamedTuple):
    """Estimated seconds of a step, nothing overlapping.

    Attributes:
      compute: the larger of FLOPs at the chip's peak and bytes at HBM's bandwidth.
      update: the optimizer, at HBM's bandwidth.
      communication: {purpose: seconds}, see `interconnect`.
      overhead: launches and small kernels, where they were measured; see `slices.Slice`.
    """

    compute: float
    update: float
    communication: dict[str, float]
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.update + self.overhead + sum(self.communication.values())


class LayerChoice(NamedTuple):
    """One way to place one layer's experts."""

    experts: ExpertCost
    times: Times


class Memory(NamedTuple):
    """HBM of one chip in bytes: state and cache are counted, activations estimated."""

    state: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the best choice for every layer.

    Attributes:
      mesh: its shape.
      layers: {MoE layer: its choice}.
      options: {MoE layer: all choices}, the order of `layer_axes`.
      memory: HBM of a chip.
      times: estimated, of the whole model.
      wire_bytes_per_token: {purpose: bytes that a chip sends per token of its own}.
      drop_fractions: {MoE layer: expected share of assignments dropped}; empty if not known.
      problem: why it cannot be had, None if it can.
    """

    mesh: MeshShape
    layers: Mapping[int, LayerChoice]
    options: Mapping[int, Sequence[LayerChoice]]
    memory: Memory
    times: Times
    wire_bytes_per_token: Mapping[str, float]
    drop_fractions: Mapping[int, float]
    problem: str | None = None

    def expert_axes(self, num_layers: int) -> tuple[Axes, ...]:
        """One entry per layer, as `TrainConfig.expert_axes`."""
        return tuple(
            self.layers[layer].experts.axes if layer in self.layers else ()
            for layer in range(num_layers)
        )


def layer_axes(mesh: MeshShape) -> tuple[Axes, ...]:
    """Ways to divide experts on a mesh: axes of more than one device, () first, then by size."""
    candidates = ((), ("expert",), ("data",), TOKEN_AXES)
    real = [axes for axes in candidates if all(mesh.size_of((axis,)) > 1 for axis in axes)]
    return tuple(sorted(real, key=mesh.size_of))


def mesh_shapes(num_chips: int) -> Iterator[MeshShape]:
    """All meshes of so many chips."""
    for expert, model in itertools.product(_divisors(num_chips), repeat=2):
        if num_chips % (expert * model) == 0:
            yield MeshShape(num_chips // (expert * model), expert, model)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def mesh_problem(request: Request, mesh: MeshShape) -> str | None:
    """Says why a mesh cannot run the job, whatever its memory; None if it can."""
    shards = mesh.size_of(TOKEN_AXES)
    if request.job.rows % shards:
        return f"{request.job.rows} rows at a time do not divide among {shards} devices"
    return model_axis_problem(request, mesh)


def model_axis_problem(request: Request, mesh: MeshShape) -> str | None:
    """Says why the model axis of a mesh cannot be used, whatever the batch; None if it can."""
    model, chips = request.model, request.slice.chips_per_host
    if model.num_heads % mesh.model or model.mlp_dim % mesh.model:
        return (
            f"{model.num_heads} heads and {model.mlp_dim} hidden units do not divide by "
            f"{mesh.model}"
        )
    if mesh.size > chips and chips % mesh.model:
        return f"{mesh.model} model partitions do not divide a host's {chips} chips"
    return None


def least_memory(request: Request, mesh: MeshShape) -> int:
    """Bytes of HBM that the job takes on a mesh, of any size, with the smallest choices."""
    model, job = request.model, request.job
    rest = costs.rest_cost(model, mesh, job)
    kept = rest.state_bytes + rest.cache_bytes + rest.activation_bytes
    transient = rest.transient_bytes
    for layer in model.moe_layers:
        experts = (
            costs.expert_cost(model, layer, mesh, axes, job).cost for axes in layer_axes(mesh)
        )
        smallest = min(
            experts,
            key=lambda cost: cost.state_bytes + cost.activation_bytes + cost.transient_bytes,
        )
        kept += smallest.state_bytes + smallest.activation_bytes
        transient = max(transient, smallest.transient_bytes)
    return kept + transient


def best_layout(request: Request, mesh: MeshShape) -> Layout:
    """Chooses each layer's expert axes: least estimated time within the memory, on one mesh."""
    model, job = request.model, request.job
    rest = costs.rest_cost(model, mesh, job)
    options = _layer_options(request, mesh)
    picks = _choose(
        [options[layer] for layer in model.moe_layers],
        fixed_bytes=rest.state_bytes + rest.cache_bytes + rest.activation_bytes,
        transient_bytes=rest.transient_bytes,
        budget_bytes=request.budget_bytes,
    )
    layers = {
        layer: options[layer][pick] for layer, pick in zip(model.moe_layers, picks, strict=True)
    }
    return _layout(request, mesh, rest, layers, options)


def _layer_options(request: Request, mesh: MeshShape) -> dict[int, tuple[LayerChoice, ...]]:
    """Prices every way to place each layer's experts; equal layers share the result."""
    model = request.model

    @functools.cache
    def of_kind(num_experts: int, router_width: int) -> tuple[LayerChoice, ...]:
        del router_width
        layer = model.num_experts.index(num_experts)
        priced = (
            costs.expert_cost(model, layer, mesh, axes, request.job) for axes in layer_axes(mesh)
        )
        return tuple(
            LayerChoice(experts, estimate_times(request, mesh, experts.cost)) for experts in priced
        )

    return {
        layer: of_kind(model.num_experts[layer], model.router_width(layer))
        for layer in model.moe_layers
    }


def estimate_times(request: Request, mesh: MeshShape, cost: Cost) -> Times:
    """Roofline times of a part of a step."""
    slice_ = request.slice
    bandwidth = slice_.hbm_bytes_per_second_per_chip
    communication = dict.fromkeys(PURPOSES, 0.0)
    for kind, axes, payload, times, purpose in cost.traffic:
        communication[purpose] += times * collective_seconds(slice_, mesh, axes, kind, payload)
    compute = max(
        cost.flops / slice_.peak_bf16_flops_per_second_per_chip, cost.memory_bytes / bandwidth
    )
    overhead = (
        cost.steps * slice_.step_seconds
        + cost.blocks * slice_.block_seconds
        + cost.expert_blocks * slice_.expert_block_seconds
    )
    return Times(compute, cost.update_bytes / bandwidth, communication, overhead)


class _Point(NamedTuple):
    """Choices for the first layers."""

    kept_bytes: int
    transient_bytes: int
    seconds: float
    picks: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return self.kept_bytes + self.transient_bytes


def _choose(
    options: Sequence[Sequence[LayerChoice]],
    *,
    fixed_bytes: int,
    transient_bytes: int,
    budget_bytes: int,
) -> tuple[int, ...]:
    """Picks one option per layer: least time within the budget, least memory if none fits.

    Keeps what no other set of choices beats in both time and memory, but for rounding, layer by
    layer.
    """
    rounding = max(1, int(budget_bytes * _ROUNDING))
    front = [_Point(fixed_bytes, transient_bytes, 0.0, ())]
    for of_layer in options:
        priced = [(choice, choice.experts.cost) for choice in of_layer]
        extended = [
            _Point(
                point.kept_bytes
                + choice.experts.cost.state_bytes
                + choice.experts.cost.activation_bytes,
                max(point.transient_bytes, choice.experts.cost.transient_bytes),
                point.seconds + choice.times.total,
                (*point.picks, pick),
            )
            for point in front
            for pick, (choice, cost) in enumerate(priced)
        ]
        extended.sort(key=lambda point: (point.total_bytes // rounding, point.seconds))
        # The first of them needs the least memory and stays, within the budget or not.
        front, fastest = extended[:1], extended[0].seconds
        for point in extended[1:]:
            if point.total_bytes <= budget_bytes and point.seconds < fastest:
                front.append(point)
                fastest = point.seconds
    return front[-1].picks


def _layout(
    request: Request,
    mesh: MeshShape,
    rest: Cost,
    layers: Mapping[int, LayerChoice],
    options: Mapping[int, Sequence[LayerChoice]],
) -> Layout:
    model, job = request.model, request.job
    parts = [rest, *(choice.experts.cost for choice in layers.values())]
    memory = Memory(
        state=sum(part.state_bytes for part in parts),
        cache=sum(part.cache_bytes for part in parts),
        activations=sum(part.activation_bytes for part in parts)
        + max(part.transient_bytes for part in parts),
    )
    all_times = [
        estimate_times(request, mesh, rest),
        *(choice.times for choice in layers.values()),
    ]
    times = Times(
        sum(part.compute for part in all_times),
        sum(part.update for part in all_times),
        {purpose: sum(part.communication[purpose] for part in all_times) for purpose in PURPOSES},
        sum(part.overhead for part in all_times),
    )
    capacities = {layer: choice.experts.capacity for layer, choice in layers.items()}
    tokens = job.tokens(mesh)
    fractions = drops.layer_drops(model, request.loads or {}, capacities, tokens)
    problem = None
    if memory.total > request.budget_bytes:
        problem = f"needs {memory.total / 1e9:.1f} GB of {request.budget_bytes / 1e9:.1f} GB"
    elif request.max_drop_fraction is not None and (
        max(fractions.values(), default=0.0) > request.max_drop_fraction
    ):
        problem = f"drops {max(fractions.values()):.1%} of a layer's assignments"
    return Layout(
        mesh=mesh,
        layers=layers,
        options=options,
        memory=memory,
        times=times,
        wire_bytes_per_token=wire_bytes_per_token(parts, mesh, job),
        drop_fractions=fractions,
        problem=problem,
    )


def wire_bytes_per_token(parts: Sequence[Cost], mesh: MeshShape, job: Job) -> dict[str, float]:
    """Returns {purpose: bytes that a device sends in a step, per token of its own}."""
    totals = dict.fromkeys(PURPOSES, 0.0)
    for kind, axes, payload, times, purpose in itertools.chain(*(part.traffic for part in parts)):
        totals[purpose] += times * wire_bytes(kind, payload, mesh.size_of(axes))
    tokens = job.tokens(mesh) * job.accumulation_steps
    return {purpose: total / tokens for purpose, total in totals.items()}


def group_layers(layout: Layout) -> list[tuple[int, ...]]:
    """MoE layers that have the same options and choice, in order."""
    groups: dict[Any, list[int]] = {}
    for layer, choice in layout.layers.items():
        groups.setdefault((id(layout.options[layer]), choice.experts.axes), []).append(layer)
    return [tuple(layers) for layers in groups.values()]
