"""Moves tokens to experts and back: dispatch, expert computation, combine; sharded or not.

One body serves every device and mesh. Axes: g group, t token, k topk, e expert, c slot, d embed,
f mlp. A group is a set of tokens that share the slots of each expert; groups follow the mesh, not
the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from uncurl_jax.models.routing import ranks_within_expert
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, replicated


class Experts(NamedTuple):
    """The parameters of one layer's experts, in the compute dtype.

    Attributes:
      wi: [e, d, f] input (in gated networks: up) projection.
      wo: [e, f, d] output projection.
      wg: [e, d, f] gate projection; None unless gated.
      wi_bias: [e, f]; wo_bias: [e, d]; wg_bias: [e, f]; None without biases.
    """

    wi: jax.Array
    wo: jax.Array
    wg: jax.Array | None = None
    wi_bias: jax.Array | None = None
    wo_bias: jax.Array | None = None
    wg_bias: jax.Array | None = None


Activation = Callable[[jax.Array], jax.Array]


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


def dispatch(x: jax.Array, slot: jax.Array, num_slots: int) -> jax.Array:
    """Gathers tokens into slots: x [t, d], slot [t, k] (num_slots = dropped) -> [num_slots, d]."""
    num_tokens, topk = slot.shape
    token = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], (num_tokens, topk))
    empty = jnp.full((num_slots + 1,), num_tokens, dtype=jnp.int32)
    token_of_slot = empty.at[slot].set(token.astype(jnp.int32))[:num_slots]
    return x.at[token_of_slot].get(mode="fill", fill_value=0)


def combine(y: jax.Array, slot: jax.Array, gate: jax.Array) -> jax.Array:
    """Gathers slots back: y [s, d], slot [t, k] (s = dropped), gate [t, k] -> [t, d] float32."""
    outputs = y.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", outputs, gate)


def apply_experts(
    x: jax.Array, experts: Experts, activation: Activation, *, model_axis: str | None = None
) -> jax.Array:
    """Runs expert i on x[i]: [e, c, d] -> [e, c, d], float32 accumulation.

    With `model_axis`, f is divided over that mesh axis and partial sums are added across it.
    """
    dtype = experts.wi.dtype

    def to_hidden(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        hidden = jnp.einsum("ecd,edf->ecf", x, kernel, preferred_element_type=jnp.float32)
        return hidden.astype(dtype) if bias is None else hidden.astype(dtype) + bias[:, None]

    hidden = to_hidden(experts.wi, experts.wi_bias)
    if experts.wg is None:
        hidden = activation(hidden)
    else:
        hidden = activation(to_hidden(experts.wg, experts.wg_bias)) * hidden
    y = jnp.einsum("ecf,efd->ecd", hidden, experts.wo, preferred_element_type=jnp.float32)
    if model_axis is not None:
        y = jax.lax.psum(y, model_axis)
    y = y.astype(dtype)
    return y if experts.wo_bias is None else y + experts.wo_bias[:, None]


def block_size(num_assignments: int, num_experts: int) -> int:
    """Rows per block of the dropless path: about half an expert's mean load, 1 to 256.

    Small blocks waste fewer rows (each expert's last block is half empty on average), large ones
    read each expert's weights less often. One row per block is the decoding case: only the
    chosen experts are touched.
    """
    mean = num_assignments // max(num_experts, 1)
    return int(min(256, 1 << max(0, (mean // 2).bit_length() - 1))) if mean >= 2 else 1


def apply_dropless(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    mask: jax.Array,
    experts: Experts,
    activation: Activation,
    *,
    model_axis: str | None = None,
) -> MoeOutput:
    """Sends every token to its experts; the cost grows with t * k, not with e.

    Assignments are sorted by expert and each expert's rows padded to whole blocks; a block takes
    the weights of its one expert. x [t, d], expert_index and gate [t, k], mask [t].
    """
    num_experts = experts.wi.shape[0]
    num_tokens, topk = expert_index.shape
    assignments = num_tokens * topk
    rows = block_size(assignments, num_experts)
    num_blocks = -(-assignments // rows) + (min(num_experts, assignments) if rows > 1 else 0)
    ranks, counts = ranks_within_expert(expert_index, mask, num_experts)
    blocks = -(-counts // rows)
    last_block = jnp.cumsum(blocks)
    first_row = (last_block - blocks) * rows
    slot = jnp.where(mask[:, None], first_row[expert_index] + ranks, num_blocks * rows)
    expert_of_block = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    expert_of_block = jnp.minimum(expert_of_block, num_experts - 1)
    block_weights = jax.tree.map(lambda array: array[expert_of_block], experts)
    inputs = dispatch(x, slot, num_blocks * rows).reshape(num_blocks, rows, -1)
    outputs = apply_experts(inputs, block_weights, activation, model_axis=model_axis)
    y = combine(outputs.reshape(num_blocks * rows, -1), slot, gate)
    is_kept = jnp.broadcast_to(mask[:, None], expert_index.shape)
    return MoeOutput(y, is_kept, jnp.float32(num_blocks * rows))


def apply_with_capacity(
    x: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    mask: jax.Array,
    experts: Experts,
    activation: Activation,
    *,
    capacity: int,
    num_experts: int,
    expert_axis: str | None = None,
    model_axis: str | None = None,
) -> MoeOutput:
    """Gives each expert `capacity` slots per group; assignments beyond them are dropped.

    Args:
      x: [g, t, d] local tokens.
      expert_index: [g, t, k].
      gate: [g, t, k].
      mask: [g, t].
      experts: this device's experts.
      activation: their non-linearity.
      capacity: c.
      num_experts: experts with slots, those of every device together, padding included.
      expert_axis: mesh axis over which experts are divided; tokens cross it by all-to-all.
      model_axis: mesh axis over which f is divided.

    Returns:
      The outputs of the local tokens.
    """
    groups, _, dim = x.shape
    num_slots = num_experts * capacity

    def choose_slots(index: jax.Array, is_token: jax.Array) -> jax.Array:
        ranks, _ = ranks_within_expert(index, is_token, num_experts)
        fits = is_token[:, None] & (ranks < capacity)
        return jnp.where(fits, index * capacity + ranks, num_slots)

    slot = jax.vmap(choose_slots)(expert_index, mask)
    inputs = jax.vmap(lambda x_g, slot_g: dispatch(x_g, slot_g, num_slots))(x, slot)
    # [g, e * c, d] -> [e, g * c, d]
    inputs = inputs.reshape(groups, num_experts, capacity, dim).swapaxes(0, 1)
    inputs = inputs.reshape(num_experts, groups * capacity, dim)
    if expert_axis is not None:
        # Each device keeps its own experts' slots of every device: [e / n, n * g * c, d].
        inputs = jax.lax.all_to_all(inputs, expert_axis, split_axis=0, concat_axis=1, tiled=True)
    outputs = apply_experts(inputs, experts, activation, model_axis=model_axis)
    if expert_axis is not None:
        outputs = jax.lax.all_to_all(outputs, expert_axis, split_axis=1, concat_axis=0, tiled=True)
    outputs = outputs.reshape(num_experts, groups, capacity, dim).swapaxes(0, 1)
    outputs = outputs.reshape(groups, num_slots, dim)
    y = jax.vmap(combine)(outputs, slot, gate)
    return MoeOutput(y, slot < num_slots, jnp.float32(groups * num_slots))


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
) -> MoeOutput:
    """Runs the experts of one layer on tokens [g, t, d], on one device or on a mesh.

    On a mesh, groups are divided over (data, expert) and experts over `expert`, padded there with
    experts that the router cannot choose if their number does not divide; hidden units are
    divided over `model` where that divides f. `capacity` None is dropless: sorted blocks where no
    all-to-all is needed, else slots for every local token.
    """
    if mesh is None:
        if capacity is None:
            groups, tokens, dim = x.shape
            out = apply_dropless(
                x.reshape(groups * tokens, dim),
                expert_index.reshape(groups * tokens, -1),
                gate.reshape(groups * tokens, -1),
                mask.reshape(-1),
                experts,
                activation,
            )
            return out._replace(
                y=out.y.reshape(groups, tokens, dim), is_kept=out.is_kept.reshape(gate.shape)
            )
        num_experts = experts.wi.shape[0]
        return apply_with_capacity(
            x,
            expert_index,
            gate,
            mask,
            experts,
            activation,
            capacity=capacity,
            num_experts=num_experts,
        )
    return _apply_moe_on_mesh(
        x, expert_index, gate, mask, experts, activation, capacity=capacity, mesh=mesh
    )


def _apply_moe_on_mesh(
    x, expert_index, gate, mask, experts, activation, *, capacity, mesh
) -> MoeOutput:
    """The sharded path of `apply_moe`."""
    num_experts, _, mlp_dim = experts.wi.shape
    expert_partitions = axis_size(mesh, "expert")
    padding = -num_experts % expert_partitions
    if padding:
        # Storage of such a layer is divided along another axis (partitioning.parameter_spec).
        # Gather it by name, or the partitioner does so with a warning per array.
        experts = jax.lax.with_sharding_constraint(experts, replicated(mesh))
        experts = jax.tree.map(
            lambda array: jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1)), experts
        )
    model = "model" if mesh.shape["model"] > 1 and mlp_dim % mesh.shape["model"] == 0 else None
    expert_axis = "expert" if expert_partitions > 1 else None
    spec = PartitionSpec
    specs = {
        "wi": spec("expert", None, model),
        "wo": spec("expert", model, None),
        "wg": spec("expert", None, model),
        "wi_bias": spec("expert", model),
        "wo_bias": spec("expert", None),
        "wg_bias": spec("expert", model),
    }
    # _make, because this tuple holds specs in the places of arrays; None where there is none.
    expert_specs = Experts._make(
        None if array is None else specs[name] for name, array in experts._asdict().items()
    )

    def body(x, expert_index, gate, mask, experts) -> MoeOutput:
        if capacity is None and expert_axis is None:
            out = jax.vmap(
                lambda x_g, index_g, gate_g, mask_g: apply_dropless(
                    x_g, index_g, gate_g, mask_g, experts, activation, model_axis=model
                )
            )(x, expert_index, gate, mask)
            num_slots = out.num_slots.sum()
        else:
            out = apply_with_capacity(
                x,
                expert_index,
                gate,
                mask,
                experts,
                activation,
                capacity=x.shape[1] if capacity is None else capacity,
                num_experts=num_experts + padding,
                expert_axis=expert_axis,
                model_axis=model,
            )
            num_slots = out.num_slots
        return out._replace(num_slots=jax.lax.psum(num_slots, TOKEN_AXES))

    tokens = spec(TOKEN_AXES)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, tokens, expert_specs),
        out_specs=MoeOutput._make([tokens, tokens, spec()]),
        check_vma=False,
    )(x, expert_index, gate, mask, experts)
