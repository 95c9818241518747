"""Chooses the mesh and the place of every layer's experts, and says why, or why none can be had."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import drops
from uncurl_jax.deployment.costs import ExpertCost
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.layouts import (
    LayerChoice,
    Layout,
    Request,
    best_layout,
    group_layers,
    least_memory,
    mesh_problem,
    mesh_shapes,
    model_axis_problem,
    wire_bytes_per_token,
)
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import TOKEN_AXES


class FewestChips(NamedTuple):
    """Fewest chips of a kind that hold a model and one row per device; None: no slice does.

    `before` is None too if there is no prune.
    """

    before: int | None
    after: int | None


class LayerKind(NamedTuple):
    """Layers with the same experts, and every way to place those of one of them.

    Attributes:
      layers: their indices.
      options: mesh and choice; the chosen mesh's first, then others by estimated time. What has
        several names for the same chips is there once.
    """

    layers: tuple[int, ...]
    options: tuple[tuple[MeshShape, LayerChoice], ...]

    def chosen_for(self, layout: Layout, choice: LayerChoice) -> list[int]:
        """The layers for which a layout has made this very choice."""
        return [layer for layer in self.layers if layout.layers[layer] is choice]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the planner found.

    Attributes:
      request: what was asked.
      chosen: the feasible layout with the least estimated step time.
      layouts: all that were priced, the feasible ones first, by estimated step time.
      kinds: of MoE layers.
      refused: meshes that cannot run the job, whatever their memory, and why.
      fewest_chips: before and after the prune.
      reason: one sentence why the choice won.
    """

    request: Request
    chosen: Layout
    layouts: tuple[Layout, ...]
    kinds: tuple[LayerKind, ...]
    refused: Mapping[MeshShape, str]
    fewest_chips: FewestChips
    reason: str


def make_placement(request: Request) -> Report:
    """Prices every mesh and picks one.

    Raises:
      InputError: If the given mesh does not fit the slice, the batch does not divide on any mesh,
        nothing fits in memory, or capacity drops too much everywhere; with the numbers and the
        nearest valid choice.
    """
    meshes = _given_meshes(request)
    problems = {mesh: mesh_problem(request, mesh) for mesh in meshes}
    usable = [mesh for mesh, problem in problems.items() if problem is None]
    if not usable:
        raise InputError(_no_mesh(request, problems))
    every = [best_layout(request, mesh) for mesh in usable]
    layouts = _without_equals(every)
    layouts.sort(key=lambda layout: (layout.problem is not None, layout.times.total))
    if layouts[0].problem is not None:
        raise InputError(_no_layout(request, layouts))
    fewest = FewestChips(
        before=None
        if request.num_experts_before is None
        else fewest_chips(request, _with_counts(request.model, request.num_experts_before)),
        after=fewest_chips(request, request.model),
    )
    kinds = _layer_kinds(layouts[0], every)
    return Report(
        request=request,
        chosen=layouts[0],
        layouts=tuple(layouts),
        kinds=kinds,
        refused={mesh: problem for mesh, problem in problems.items() if problem is not None},
        fewest_chips=fewest,
        reason=_reason(request, layouts[0], kinds),
    )


def _group_key(mesh: MeshShape, choice: LayerChoice) -> tuple[Any, ...]:
    """The same for choices that put experts on the same chips: all of them have several names."""
    experts = choice.experts
    is_everywhere = experts.group == mesh.size_of(TOKEN_AXES) > 1
    return mesh.model, experts.group, "all" if is_everywhere else experts.axes


def _without_equals(layouts: Sequence[Layout]) -> list[Layout]:
    """Keeps one of the layouts that put everything on the same chips.

    That is the mesh with the longest expert axis if any layer is divided, else the shortest.
    """
    kept: dict[Any, Layout] = {}
    for layout in layouts:
        choices = layout.layers.values()
        key = (layout.mesh.model, *(_group_key(layout.mesh, choice) for choice in choices))
        sign = 1 if any(choice.experts.axes for choice in choices) else -1
        if key not in kept or sign * (layout.mesh.expert - kept[key].mesh.expert) > 0:
            kept[key] = layout
    return list(kept.values())


def _layer_kinds(chosen: Layout, layouts: Sequence[Layout]) -> tuple[LayerKind, ...]:
    """Collects the options of all meshes, for each kind of layer."""
    alike: dict[int, list[int]] = {}
    for layer, options in chosen.options.items():
        alike.setdefault(id(options), []).append(layer)
    kinds = []
    for layers in alike.values():
        found: dict[Any, tuple[MeshShape, LayerChoice]] = {}
        for layout in (chosen, *layouts):
            for choice in layout.options[layers[0]]:
                found.setdefault(_group_key(layout.mesh, choice), (layout.mesh, choice))
        order = sorted(
            found.values(), key=lambda pair: (pair[0] != chosen.mesh, pair[1].times.total)
        )
        kinds.append(LayerKind(tuple(layers), tuple(order)))
    return tuple(kinds)


def _with_counts(model: ModelConfig, num_experts: Sequence[int]) -> ModelConfig:
    return dataclasses.replace(model, num_experts=tuple(num_experts), expert_map=None)


def _given_meshes(request: Request) -> list[MeshShape]:
    """All meshes of the slice, or those that the request leaves."""
    chips = request.slice.num_chips
    expert, model = request.expert_partitions, request.model_partitions
    meshes = [
        mesh
        for mesh in mesh_shapes(chips)
        if expert in (None, mesh.expert) and model in (None, mesh.model)
    ]
    if not meshes:
        wanted = (expert or 1, model or 1)
        nearest = min(
            mesh_shapes(chips),
            key=lambda mesh: (abs(mesh.expert - wanted[0]) + abs(mesh.model - wanted[1]), mesh),
        )
        raise InputError(
            "expert_partitions * model_partitions must divide the chips of the slice, got "
            f"{wanted[0]} * {wanted[1]} on the {chips} chips of {request.slice.name}: nearest "
            f"{nearest.expert} * {nearest.model}, which leaves {nearest.data} to data."
        )
    return meshes


def _no_mesh(request: Request, problems: Mapping[MeshShape, str | None]) -> str:
    """The sentence for a job that no mesh can run."""
    job, chips = request.job, request.slice.num_chips
    possible = [mesh for mesh in problems if model_axis_problem(request, mesh) is None]
    if not possible:
        problem = model_axis_problem(request, next(iter(problems)))
        return (
            f"model_partitions must divide heads, hidden units and the chips of a host, got that "
            f"{problem}: choose model_partitions 1 or another divisor."
        )
    multiple = min(mesh.size_of(TOKEN_AXES) for mesh in possible) * job.accumulation_steps
    below = job.batch // multiple * multiple
    nearest = " or ".join(str(batch) for batch in (below, below + multiple) if batch)
    parts = f" in {job.accumulation_steps} parts" if job.accumulation_steps > 1 else ""
    return (
        f"batch must divide among the devices that hold tokens, got {job.batch} rows{parts} on "
        f"{chips} chips of {request.slice.name}: nearest {nearest}."
    )


def _no_layout(request: Request, layouts: Sequence[Layout]) -> str:
    """The sentence for a job for which every mesh has a problem of memory or drops."""
    within = [layout for layout in layouts if layout.memory.total <= request.budget_bytes]
    if within:
        return _too_many_drops(request, min(within, key=lambda layout: _worst_drop(layout)[1]))
    smallest = min(layouts, key=lambda layout: layout.memory.total)
    needed, budget = smallest.memory, request.budget_bytes
    name, chips = request.slice.name, request.slice.num_chips
    remedies = []
    if request.expert_partitions is not None or request.model_partitions is not None:
        free = dataclasses.replace(request, expert_partitions=None, model_partitions=None)
        try:
            mesh = make_placement(free).chosen.mesh
            remedies.append(f"expert_partitions {mesh.expert} and model_partitions {mesh.model}")
        except InputError:
            pass
    fewest = fewest_chips(request, request.model)
    if fewest is not None and fewest > chips:
        remedies.append(f"{fewest} chips")
    parts = _enough_parts(request)
    if parts is not None:
        remedies.append(f"accumulation_steps {parts}")
    experts = _most_experts(request)
    if experts is not None:
        remedies.append(f"at most {experts} experts per layer")
    remedy = " or ".join(remedies) or "a slice of larger chips"
    return (
        f"A layout must fit in {budget / 1e9:.1f} GB of a chip of {name} ({request.headroom:.0%} "
        f"stay free), got at least {needed.total / 1e9:.1f} GB ({needed.state / 1e9:.1f} state, "
        f"{needed.cache / 1e9:.1f} cache, about {needed.activations / 1e9:.1f} activations) on "
        f"{chips} chips: nearest {remedy}."
    )


def _worst_drop(layout: Layout) -> tuple[int, float]:
    """The layer that drops most, and its share."""
    layer = max(layout.drop_fractions, key=lambda layer: layout.drop_fractions[layer])
    return layer, layout.drop_fractions[layer]


def _too_many_drops(request: Request, layout: Layout) -> str:
    model, job, limit = request.model, request.job, request.max_drop_fraction or 0.0
    layer, share = _worst_drop(layout)
    tokens = job.tokens(layout.mesh)
    topk = model.num_selected_experts
    factor = max(
        drops.needed_factor(load, limit, tokens, topk) for load in (request.loads or {}).values()
    )
    name = "capacity_factor" if job.is_training else "eval_capacity_factor"
    return (
        f"Capacity must drop at most {limit:.2%} of a layer's assignments, got about {share:.2%} "
        f"in layer {layer} with {name} {getattr(model, name)} and groups of {tokens} tokens: "
        f"nearest {name} {factor:g}."
    )


def _enough_parts(request: Request) -> int | None:
    """The fewest parts of a batch, above those asked for, that fit; None if none do."""
    job = request.job
    if not job.is_training:
        return None
    for parts in range(job.accumulation_steps + 1, job.batch + 1):
        if job.batch % parts == 0:
            changed = dataclasses.replace(job, accumulation_steps=parts)
            if _fits(dataclasses.replace(request, job=changed), request.slice.num_chips):
                return parts
    return None


def _most_experts(request: Request) -> int | None:
    """The most experts per layer, a power of two below those there are, that fit."""
    count = 1 << (max(request.model.num_experts, default=0) - 1).bit_length()
    while count // 2 >= request.model.num_selected_experts:
        count //= 2
        model = request.model.with_experts(count)
        changed = dataclasses.replace(request, model=model, loads=None, max_drop_fraction=None)
        if _fits(changed, request.slice.num_chips):
            return count
    return None


def _fits(request: Request, chips: int) -> bool:
    """Whether any mesh of so many chips holds the job."""
    return any(_holds(request, mesh) for mesh in mesh_shapes(chips))


def _holds(request: Request, mesh: MeshShape) -> bool:
    if mesh_problem(request, mesh) is not None:
        return False
    return least_memory(request, mesh) <= request.budget_bytes


def fewest_chips(request: Request, model: ModelConfig) -> int | None:
    """Fewest chips of the slice's kind that hold a model with one row per device."""
    for chips in request.slice.chip_counts:
        for mesh in mesh_shapes(chips):
            rows = mesh.size_of(TOKEN_AXES)
            job = dataclasses.replace(request.job, batch=rows, accumulation_steps=1)
            one_row = dataclasses.replace(
                request, model=model, job=job, loads=None, max_drop_fraction=None
            )
            if _holds(one_row, mesh):
                return chips
    return None


def _reason(request: Request, layout: Layout, kinds: Sequence[LayerKind]) -> str:
    """Says in one sentence what a layout is and what it saves."""
    groups = group_layers(layout)
    if not groups:
        return f"The model has no experts: {_mesh_text(layout.mesh)} is fastest by estimate."
    options = {layer: kind.options for kind in kinds for layer in kind.layers}
    texts = [_group_text(request, layout, layers, options[layers[0]]) for layers in groups]
    return f"{_mesh_text(layout.mesh)} is fastest by estimate: {'; '.join(texts)}."


def _mesh_text(mesh: MeshShape) -> str:
    return f"data {mesh.data} x expert {mesh.expert} x model {mesh.model}"


def _group_text(
    request: Request,
    layout: Layout,
    layers: Sequence[int],
    options: Sequence[tuple[MeshShape, LayerChoice]],
) -> str:
    """The same for layers that share a choice: what it takes and saves, against the opposite.

    Whole experts are compared with the fastest way to divide them, on a mesh with the same model
    axis.
    """
    number, chosen = len(layers), layout.layers[layers[0]].experts
    count = request.model.num_experts[layers[0]]
    where = f"the {count} experts of {_layers_text(layers)}"

    def gigabytes(experts: ExpertCost) -> str:
        return f"{number * experts.cost.state_bytes / 1e9:.2g} GB"

    def kilobytes(experts: ExpertCost, mesh: MeshShape) -> str:
        sent = wire_bytes_per_token([experts.cost], mesh, request.job)
        value = number * (sum(sent.values()) - sent["partial sums"]) / 1e3
        return f"{value:,.0f} KB" if value >= 99.5 else f"{value:.3g} KB"

    same = [(mesh, o) for mesh, o in options if mesh.model == layout.mesh.model]
    whole = next(choice.experts for _, choice in same if not choice.experts.axes)
    sent = kilobytes(whole, layout.mesh)
    if chosen.axes:
        padded = f", padded to {chosen.padded_experts}," if chosen.padded_experts != count else ""
        return (
            f"dividing {where}{padded} over {chosen.group} chips ({', '.join(chosen.axes)}) takes "
            f"{gigabytes(chosen)} per chip where whole ones would take {gigabytes(whole)}, and "
            f"sends {kilobytes(chosen, layout.mesh)} per token where they would send {sent}"
        )
    text = f"replicating {where} takes {gigabytes(whole)} per chip"
    divided = [(mesh, choice) for mesh, choice in same if choice.experts.axes]
    if not divided:
        return text
    mesh, other = min(divided, key=lambda pair: pair[1].times.total)
    traffic = other.experts.cost.traffic
    calls = number * sum(t.times for t in traffic if t.purpose == "tokens")
    what = "all-to-alls" if traffic[0].kind == "all_to_all" else "collectives of tokens"
    text += (
        f" and removes {calls} {what} among {other.experts.group} chips, "
        f"{kilobytes(other.experts, mesh)} per token"
    )
    return text + (f", for gradients of {sent}" if request.job.is_training else "")


def _layers_text(layers: Sequence[int]) -> str:
    steps = {after - before for before, after in itertools.pairwise(layers)}
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 3 and len(steps) == 1:
        return f"layers {layers[0]}, {layers[1]}, ..., {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
