"""Moves tokens to experts and back: dispatch, expert computation, combine; sharded or not.

One body serves every device and mesh. Axes: g group, t token, k topk, e expert, c slot, r row,
d embed, f mlp. A group is a set of tokens that share the slots of each expert; groups follow the
mesh, not the number of experts.

With a capacity every expert has so many slots for each group, and where experts are divided over
devices slots cross the mesh by all-to-all. Without one, rows are sorted by expert and nothing but
them is computed; devices that divide the experts see each other's tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from uncurl_jax.models.expert_loop import apply_in_loop, dequantized
from uncurl_jax.models.expert_mlp import (
    Activation,
    Experts,
    apply_experts,
    apply_to_blocks,
    apply_to_few,
)
from uncurl_jax.models.grouped_matmul import make_blocks
from uncurl_jax.models.routing import ranks_within_expert
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, replicated

__all__ = ["Activation", "Experts", "MoeOutput", "apply_experts", "apply_moe"]

# Up to so many tokens on one device, an accelerator runs them without sorting: reading the
# kernels is what they cost.
_FEW_TOKENS = 64
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
# Slots are computed at once, rows a little slower (docs/performance.md).
SLOTS_PER_ROW = 1.25


class MoeOutput(NamedTuple):
    """What the experts return.

    Attributes:
      y: [g, t, d] float32 gate-weighted sum over each token's kept experts; 0 if all dropped.
      is_kept: [g, t, k] bool, whether the assignment got a slot.
      num_slots: float32 scalar, slots computed, filled or not, over all groups and experts.
    """

    y: jax.Array
    is_kept: jax.Array
    num_slots: jax.Array


class Tokens(NamedTuple):
    """Tokens of a device or of a mesh, and where they are to go.

    Attributes:
      x: [g, t, d] in the experts' dtype.
      expert_index: [g, t, k] int32.
      gate: [g, t, k] float32.
      is_wanted: [g, t, k] bool; the other assignments take no slot.
    """

    x: jax.Array
    expert_index: jax.Array
    gate: jax.Array
    is_wanted: jax.Array


class Slots(NamedTuple):
    """A partial one-to-one map between assignments (a = t * k) and slots.

    Attributes:
      of_assignment: [t, k] int32; the number of slots where the assignment was dropped.
      assignment: [s] int32, its inverse; t * k where a slot is empty.
    """

    of_assignment: jax.Array
    assignment: jax.Array


def invert(of_assignment: jax.Array, num_slots: int) -> Slots:
    """Finds each slot's assignment: of_assignment [t, k], each slot at most once."""
    flat = of_assignment.reshape(-1)
    empty = jnp.full((num_slots,), flat.size, jnp.int32)
    assignments = jnp.arange(flat.size, dtype=jnp.int32)
    # Dropped assignments write beyond the end, that is nowhere.
    return Slots(of_assignment, empty.at[flat].set(assignments, mode="drop"))


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of an array; zeros where the index is beyond its end."""
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)


# Both maps are gathers, and so are their gradients, which JAX would make scatters: it does not know
# that slots and assignments correspond one to one. A scatter of rows takes five times as long on an
# H200, and its order of additions is not fixed.


@jax.custom_vjp
def dispatch(x: jax.Array, slots: Slots) -> jax.Array:
    """Gathers tokens into slots: x [t, d] -> [s, d], zeros in empty slots."""
    return _take(x, slots.assignment // slots.of_assignment.shape[1])


def _dispatch_forward(x: jax.Array, slots: Slots) -> tuple[jax.Array, Slots]:
    return dispatch(x, slots), slots


def _dispatch_backward(slots: Slots, d_slots: jax.Array) -> tuple[jax.Array, None]:
    dx = _take(d_slots, slots.of_assignment)
    if slots.of_assignment.shape[1] == 1:
        return dx[:, 0], None
    return dx.sum(1, dtype=jnp.float32).astype(d_slots.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y: jax.Array, gate: jax.Array, slots: Slots) -> jax.Array:
    """Gathers slots back: y [s, d], gate [t, k] float32 -> [t, d] float32, summed over k."""
    outputs = _take(y, slots.of_assignment).astype(jnp.float32)
    return jnp.sum(outputs * gate[..., None], axis=1)


def _combine_forward(
    y: jax.Array, gate: jax.Array, slots: Slots
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Slots]]:
    return combine(y, gate, slots), (y, gate, slots)


def _combine_backward(
    saved: tuple[jax.Array, jax.Array, Slots], d_tokens: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y, gate, slots = saved
    outputs = _take(y, slots.of_assignment).astype(jnp.float32)
    d_gate = jnp.sum(outputs * d_tokens[:, None], axis=-1)
    # Gathered in the experts' dtype, which is what the result is rounded to in any case.
    of_slot = _take(d_tokens.astype(y.dtype), slots.assignment // gate.shape[1])
    d_slots = of_slot * _take(gate.reshape(-1), slots.assignment).astype(y.dtype)[:, None]
    return d_slots, d_gate, None


combine.defvjp(_combine_forward, _combine_backward)


class _Kept(NamedTuple):
    """Which assignments are computed, and their place among those of the same expert and group."""

    is_kept: jax.Array  # [g, t, k]
    ranks: jax.Array  # [g, t, k]
    counts: jax.Array  # [g, e], kept assignments


def _keep(tokens: Tokens, num_experts: int, capacity: int | None) -> _Kept:
    """Gives each expert's slots to the first `capacity` wanted assignments of every group."""
    rank = functools.partial(ranks_within_expert, num_experts=num_experts)
    ranks, counts = jax.vmap(rank)(tokens.expert_index, tokens.is_wanted)
    is_kept = tokens.is_wanted
    if capacity is not None:
        is_kept &= ranks < capacity
        counts = jnp.minimum(counts, capacity)
    return _Kept(is_kept, ranks, counts)


def _run_in_slots(
    tokens: Tokens,
    kept: _Kept,
    slot: jax.Array,
    num_slots: int,
    run: Callable[[jax.Array], jax.Array],
) -> MoeOutput:
    """Takes tokens to slots [g, t, k], calls run([num_slots, d]), and takes the results back."""
    topk = slot.shape[-1]
    slot = jnp.where(kept.is_kept, slot, num_slots).astype(jnp.int32)
    slots = invert(slot.reshape(-1, topk), num_slots)
    outputs = run(dispatch(tokens.x.reshape(-1, tokens.x.shape[-1]), slots))
    y = combine(outputs, tokens.gate.reshape(-1, topk), slots)
    return MoeOutput(y.reshape(tokens.x.shape), kept.is_kept, jnp.float32(num_slots))


def block_rows(num_assignments: int, num_experts: int) -> int:
    """Rows per block: about a quarter of an expert's mean load, a power of two from 16 to 128.

    Small blocks waste fewer rows (each expert's last block is half empty on average), large ones
    read each expert's kernels less often.
    """
    quarter = num_assignments // (4 * num_experts)
    power = 1 << max(0, quarter.bit_length() - 1)
    return min(max(power, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def block_shape(num_assignments: int, num_experts: int) -> tuple[int, int]:
    """Rows per block, and as many blocks as any loads of the experts can need."""
    rows = block_rows(num_assignments, num_experts)
    num_blocks = num_assignments // rows + min(num_experts, num_assignments)
    if num_assignments >= num_experts * rows:
        num_blocks += -num_blocks % num_experts  # so that equal shares are possible
    return rows, num_blocks


def apply_locally(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int | None,
    may_be_even: bool = True,
) -> MoeOutput:
    """Runs tokens through experts that are all on this device; the cost follows the tokens kept.

    Rows are sorted by expert and each expert's padded to whole blocks; see `grouped_matmul`.

    Args:
      tokens: what to run.
      experts: all of them.
      activation: their non-linearity.
      capacity: c, slots of an expert in each group; None drops nothing.
      may_be_even: see `grouped_matmul.make_blocks`.

    Returns:
      The outputs.
    """
    index = tokens.expert_index
    groups, num_experts = len(index), experts.wi.shape[0]
    rows, num_blocks = block_shape(index.size, num_experts)
    kept = _keep(tokens, num_experts, capacity)
    blocks = make_blocks(kept.counts.sum(0), rows, num_blocks, may_be_even=may_be_even)
    of_groups_before = jnp.cumsum(kept.counts, axis=0) - kept.counts
    before = jnp.take_along_axis(of_groups_before, index.reshape(groups, -1), axis=1)
    slot = blocks.first[index] * rows + before.reshape(index.shape) + kept.ranks

    def run(x: jax.Array) -> jax.Array:
        return apply_to_blocks(x, experts, blocks, activation)

    out = _run_in_slots(tokens, kept, slot, num_blocks * rows, run)
    computed = jnp.sum(blocks.last - blocks.first) * rows
    if blocks.is_even is not None:
        computed = jnp.where(blocks.is_even, num_blocks * rows, computed)
    return out._replace(num_slots=computed.astype(jnp.float32))


def _apply_few(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int | None,
) -> MoeOutput:
    """The same for a few tokens, without sorting."""
    kept = _keep(tokens, experts.wi.shape[0], capacity)
    gate = jnp.where(kept.is_kept, tokens.gate, 0.0)
    x, index, gate = (
        array.reshape(-1, array.shape[-1]) for array in (tokens.x, tokens.expert_index, gate)
    )
    y = apply_to_few(x, index, gate, experts, activation)
    return MoeOutput(y.reshape(tokens.x.shape), kept.is_kept, kept.counts.sum().astype(jnp.float32))


def _apply_any(
    tokens: Tokens, experts: Experts, activation: Activation, capacity: int | None
) -> MoeOutput:
    """The same for a symbolic number of tokens, which exported programs have."""
    if capacity is not None:
        raise ValueError("Experts of a symbolic number of tokens have no capacity.")
    x, index, gate, is_wanted = (array.reshape(-1, array.shape[-1]) for array in tokens)
    y = apply_in_loop(x, index, is_wanted, gate, experts, activation)
    num_slots = jnp.sum(is_wanted, dtype=jnp.float32)
    return MoeOutput(y.reshape(tokens.x.shape), tokens.is_wanted, num_slots)


def _apply_on_device(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int | None,
    may_be_even: bool = True,
) -> MoeOutput:
    """Slots if they are about as many as sorted rows would be, else sorted rows.

    Slots are one batched product, which is faster, but all of them are computed. Accelerators run
    a few tokens as `_apply_few`. A number of tokens that is not known yet goes into a loop.
    """
    groups, per_group, _ = tokens.expert_index.shape
    if jax.export.is_symbolic_dim(groups * per_group):
        return _apply_any(tokens, experts, activation, capacity)
    experts = dequantized(experts, tokens.x.dtype)
    num_experts = experts.wi.shape[0]
    apply: Any = functools.partial(
        apply_locally, activation=activation, capacity=capacity, may_be_even=may_be_even
    )
    if capacity is not None:
        rows, num_blocks = block_shape(tokens.expert_index.size, num_experts)
        if num_experts * groups * capacity <= SLOTS_PER_ROW * rows * num_blocks:
            apply = functools.partial(
                apply_with_capacity,
                activation=activation,
                capacity=capacity,
                num_experts=num_experts,
                expert_axes=(),
            )
    if groups * per_group > _FEW_TOKENS:
        return apply(tokens, experts)
    few = functools.partial(_apply_few, activation=activation, capacity=capacity)
    return jax.lax.platform_dependent(tokens, experts, cpu=apply, default=few)


def apply_with_capacity(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int,
    num_experts: int,
    expert_axes: tuple[str, ...],
    model_axis: str | None = None,
) -> MoeOutput:
    """Gives each expert `capacity` slots per group; assignments beyond them are dropped.

    Args:
      tokens: those of this device.
      experts: this device's experts.
      activation: their non-linearity.
      capacity: c.
      num_experts: experts with slots, those of every device together, padding included.
      expert_axes: mesh axes over which experts are divided; slots cross them by all-to-all.
      model_axis: mesh axis over which f is divided.

    Returns:
      The outputs of the local tokens.
    """
    groups, _, dim = tokens.x.shape
    kept = _keep(tokens, num_experts, capacity)
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    slot = (tokens.expert_index * groups + group) * capacity + kept.ranks

    def run(x: jax.Array) -> jax.Array:
        x = x.reshape(num_experts, groups * capacity, dim)
        if not expert_axes:
            return apply_experts(x, experts, activation, model_axis=model_axis).reshape(-1, dim)
        # Each device keeps its own experts' slots of every device: [e / n, n * g * c, d].
        x = jax.lax.all_to_all(x, expert_axes, split_axis=0, concat_axis=1, tiled=True)
        y = apply_experts(x, experts, activation, model_axis=model_axis)
        y = jax.lax.all_to_all(y, expert_axes, split_axis=1, concat_axis=0, tiled=True)
        return y.reshape(-1, dim)

    return _run_in_slots(tokens, kept, slot, num_experts * groups * capacity, run)


def apply_moe(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    mask: jax.Array,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int | None,
    mesh: Mesh | None,
    expert_axes: tuple[str, ...] = ("expert",),
) -> MoeOutput:
    """Runs the experts of one layer on tokens [g, t, d], on one device or on a mesh.

    On a mesh, groups are divided over (data, expert). Experts are divided over `expert_axes`,
    padded there with experts that the router cannot choose if their number does not divide; with
    no axes every device holds them all and no token crosses the mesh. Hidden units are divided
    over `model` where that divides f. `capacity` None drops nothing: where experts are divided,
    every device of their group then sees all tokens of the group (an all-gather, and a
    reduce-scatter of the results), because a buffer of fixed size for each pair of devices would
    have to hold as many, all computed.
    """
    is_wanted = jnp.broadcast_to(mask[..., None], expert_index.shape)
    tokens = Tokens(x, expert_index, gate, is_wanted)
    if mesh is None:
        return _apply_on_device(tokens, experts, activation, capacity=capacity)
    return _apply_on_mesh(
        tokens, experts, activation, capacity=capacity, mesh=mesh, expert_axes=expert_axes
    )


def _apply_on_mesh(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int | None,
    mesh: Mesh,
    expert_axes: tuple[str, ...],
) -> MoeOutput:
    """The sharded path of `apply_moe`."""
    num_experts, _, mlp_dim = experts.wi.shape
    axes = tuple(axis for axis in expert_axes if mesh.shape[axis] > 1)
    padding = -num_experts % axis_size(mesh, axes)
    if padding:
        # Storage of such a layer is divided along another axis (partitioning.parameter_spec).
        # Gather it by name, or the partitioner does so with a warning per array.
        experts = jax.lax.with_sharding_constraint(experts, replicated(mesh))
        experts = jax.tree.map(
            lambda array: jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1)), experts
        )
    model = "model" if mesh.shape["model"] > 1 and mlp_dim % mesh.shape["model"] == 0 else None
    spec = PartitionSpec
    divided = axes or None
    specs = {
        "wi": spec(divided, None, model),
        "wo": spec(divided, model, None),
        "wg": spec(divided, None, model),
        "wi_bias": spec(divided, model),
        "wo_bias": spec(divided, None),
        "wg_bias": spec(divided, model),
    }
    # _make, because this tuple holds specs in the places of arrays; None where there is none.
    expert_specs = Experts._make(
        None if array is None else specs[name] for name, array in experts._asdict().items()
    )

    def body(tokens: Tokens, experts: Experts) -> MoeOutput:
        if not axes:
            out = _apply_replicated(tokens, experts, activation, capacity, model)
        elif capacity is None:
            out = _apply_gathered(tokens, experts, activation, axes, model)
        else:
            out = apply_with_capacity(
                tokens,
                experts,
                activation,
                capacity=capacity,
                num_experts=num_experts + padding,
                expert_axes=axes,
                model_axis=model,
            )
        return out._replace(num_slots=jax.lax.psum(out.num_slots, TOKEN_AXES))

    divided_tokens = spec(TOKEN_AXES)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(divided_tokens, expert_specs),
        out_specs=MoeOutput._make([divided_tokens, divided_tokens, spec()]),
        check_vma=False,
    )(tokens, experts)


def _apply_replicated(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    capacity: int | None,
    model_axis: str | None,
    may_be_even: bool = True,
) -> MoeOutput:
    """A device's tokens through all experts, or through its part of their hidden units."""
    if model_axis is not None and experts.wo_bias is not None:
        # One part of the hidden units brings the bias, so that the sum has it once.
        is_first = jax.lax.axis_index(model_axis) == 0
        experts = experts._replace(wo_bias=jnp.where(is_first, experts.wo_bias, 0))
    out = _apply_on_device(tokens, experts, activation, capacity=capacity, may_be_even=may_be_even)
    return out if model_axis is None else out._replace(y=jax.lax.psum(out.y, model_axis))


def _apply_gathered(
    tokens: Tokens,
    experts: Experts,
    activation: Activation,
    expert_axes: tuple[str, ...],
    model_axis: str | None,
) -> MoeOutput:
    """Without drops: each device runs its experts on all tokens of the group that chose them."""
    num_local = experts.wi.shape[0]
    first = jax.lax.axis_index(expert_axes) * num_local

    def gather(array: jax.Array) -> jax.Array:
        return jax.lax.all_gather(array, expert_axes, axis=0, tiled=True)

    everyones = jax.tree.map(gather, tokens)
    index = everyones.expert_index - first
    is_here = (index >= 0) & (index < num_local) & everyones.is_wanted
    out = _apply_replicated(
        everyones._replace(expert_index=jnp.where(is_here, index, 0), is_wanted=is_here),
        experts,
        activation,
        None,
        model_axis,
        may_be_even=False,  # most of the assignments are other devices'
    )
    y = jax.lax.psum_scatter(out.y, expert_axes, scatter_dimension=0, tiled=True)
    return MoeOutput(y, tokens.is_wanted, out.num_slots)
