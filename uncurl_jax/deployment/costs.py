"""What one device holds, computes and sends in one step, for one way to place a model.

Bytes that cross the mesh are counted from the program (`models.expert_parallel` and what XLA adds);
tests compare them with compiled ones. FLOPs, memory traffic and activations are estimates.

Symbols: d embed, f hidden units, e experts, p experts with padding, g devices that share a layer's
experts, t tokens of one device, k experts per token, c slots of an expert for the tokens of one
device, m devices along `model`. Matrices are computed in the compute dtype, of `size` bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.arrays import Axes, Parameter, expert_parameters, parameters
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.job import Job
from uncurl_jax.models.expert_parallel import SLOTS_PER_ROW, block_shape
from uncurl_jax.partitioning import TOKEN_AXES

# A float32 parameter, AdamW's two moments and the gradient.
_TRAINING_BYTES = 16
# Reads of all four and writes of all but the gradient.
_UPDATE_BYTES = 28
# A float32 product of "highest" precision is six bf16 ones (jax.lax.Precision, on TPU).
_HIGHEST_PASSES = 6
# Attention over a cache of keys writes its scores, reads them three times, and writes and reads the
# probabilities in 2 bytes.
_BYTES_PER_SCORE = 4 * 4 + 2 * 2
# Backward computes a gradient for each of the two operands of a product.
_TRAINING_PASSES = 3


class Traffic(NamedTuple):
    """A collective that a step runs.

    Attributes:
      kind: one of interconnect.KINDS.
      axes: mesh axes that its groups span.
      payload_bytes: see interconnect.wire_bytes.
      times: how often a step runs it.
      purpose: "tokens", "weights", "gradients" or "partial sums".
    """

    kind: str
    axes: Axes
    payload_bytes: int
    times: int
    purpose: str


class Cost(NamedTuple):
    """Of a part of the model on one device.

    Attributes:
      state_bytes: parameters, and in training optimizer state and gradients.
      cache_bytes: keys and values.
      activation_bytes: kept for the backward pass; transient_bytes: at the part's own peak.
      traffic: collectives of a step.
      flops: of a step.
      memory_bytes: read from and written to HBM by a step, the optimizer left out.
      update_bytes: the optimizer's.
      steps, blocks, expert_blocks: passes through a step's launch, the blocks of the decoder, and
        the routing of those with experts; see `slices.Slice.block_seconds`.
    """

    state_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    transient_bytes: int = 0
    traffic: tuple[Traffic, ...] = ()
    flops: float = 0.0
    memory_bytes: float = 0.0
    update_bytes: float = 0.0
    steps: int = 0
    blocks: int = 0
    expert_blocks: int = 0


class ExpertCost(NamedTuple):
    """Of one layer's experts.

    Attributes:
      axes: mesh axes that divide them.
      group: g.
      padded_experts: p.
      capacity: c; None where nothing is dropped.
      rows: that this device computes in one part, padding included.
      weight_bytes: of the experts' parameters alone, as the device holds them.
      cost: the rest.
    """

    axes: Axes
    group: int
    padded_experts: int
    capacity: int | None
    rows: int
    weight_bytes: int
    cost: Cost


def expert_cost(
    model: ModelConfig, layer: int, mesh: MeshShape, axes: Axes, job: Job
) -> ExpertCost:
    """Counts one layer's experts, divided over `axes` (of more than one device each, or none)."""
    group = mesh.size_of(axes)
    num_experts = model.num_experts[layer]
    padded = -(-num_experts // group) * group
    arrays = expert_parameters(model, layer)
    stored = sum(array.local_size(mesh, axes) for array in arrays)
    capacity = job.capacity(model, layer, mesh)
    rows, buffer = _rows(model, job, mesh, padded, group, capacity)
    size = jnp.dtype(model.dtype).itemsize
    hidden = model.mlp_dim // _model_share(model.mlp_dim, mesh)
    matrices = 3 if model.is_gated else 2
    flops = 2.0 * rows * model.embed_dim * hidden * matrices
    used = stored if group > 1 else stored * min(1.0, job.tokens(mesh) * _topk(model) / num_experts)
    memory = size * (used + rows * (2 * model.embed_dim + matrices * hidden))
    passes = (_TRAINING_PASSES if job.is_training else 1) * job.accumulation_steps
    kept, transient = _expert_activations(model, mesh, job, buffer, stored)
    cost = Cost(
        state_bytes=stored * _bytes_per_parameter(job),
        activation_bytes=kept,
        transient_bytes=transient + _gathered_weights(arrays, mesh, axes, num_experts, size),
        traffic=_expert_traffic(model, job, mesh, axes, arrays, padded, capacity),
        flops=flops * passes,
        memory_bytes=memory * passes,
        update_bytes=stored * _UPDATE_BYTES if job.is_training else 0,
        expert_blocks=passes,
    )
    weight_bytes = stored * jnp.dtype("float32" if job.is_training else job.param_dtype).itemsize
    return ExpertCost(axes, group, padded, capacity, rows, weight_bytes, cost)


def _topk(model: ModelConfig) -> int:
    return model.num_selected_experts


def _model_share(dimension: int, mesh: MeshShape) -> int:
    """Devices among which `model` divides a dimension: all of them or none."""
    return mesh.model if dimension % mesh.model == 0 else 1


def _bytes_per_parameter(job: Job) -> int:
    return _TRAINING_BYTES if job.is_training else jnp.dtype(job.param_dtype).itemsize


def _rows(
    model: ModelConfig,
    job: Job,
    mesh: MeshShape,
    padded: int,
    group: int,
    capacity: int | None,
) -> tuple[int, int]:
    """Rows that a device's experts compute in one part, padding included, and rows of its buffer.

    Slots are computed whether filled or not. Sorted rows are padded to blocks, half of one for each
    expert on average. Where tokens are gathered from other devices, the buffer has room for all of
    them; a device computes its share on average.
    """
    own = job.tokens(mesh) * _topk(model)
    local = padded // group
    assignments = group * own
    rows, num_blocks = block_shape(assignments, local)
    if capacity is not None and (
        group > 1 or local * capacity <= SLOTS_PER_ROW * rows * num_blocks
    ):
        return padded * capacity, padded * capacity
    padding = min(local, assignments) * rows // 2
    return own + padding, (num_blocks * rows if group > 1 else own + padding)


def _gathered_weights(
    arrays: tuple[Parameter, ...], mesh: MeshShape, axes: Axes, num_experts: int, size: int
) -> int:
    """Bytes of a layer's experts where they are gathered whole to be padded."""
    if num_experts % mesh.size_of(axes) == 0:
        return 0
    return size * sum(math.prod(array.shape) for array in arrays)


def _expert_traffic(
    model: ModelConfig,
    job: Job,
    mesh: MeshShape,
    axes: Axes,
    arrays: tuple[Parameter, ...],
    padded: int,
    capacity: int | None,
) -> tuple[Traffic, ...]:
    size = jnp.dtype(model.dtype).itemsize
    topk, dim, tokens = _topk(model), model.embed_dim, job.tokens(mesh)
    group = mesh.size_of(axes)
    backward = int(job.is_training)
    found = []

    def add(kind: str, over: Axes, payload: float, times: int, purpose: str) -> None:
        if times and mesh.size_of(over) > 1:
            found.append(Traffic(kind, over, int(payload), times * job.accumulation_steps, purpose))

    outputs = tokens * dim * size
    if group > 1 and capacity is not None:
        outputs = padded * capacity * dim * size
        add("all_to_all", axes, outputs, 2 + 2 * backward, "tokens")
    elif group > 1:
        # Embeddings, indices, gates and the mask there, sums back; gradients the other way.
        all_tokens = group * tokens
        add("all_gather", axes, all_tokens * (dim * size + 8 * topk + 1), 1, "tokens")
        add("reduce_scatter", axes, all_tokens * dim * 4, 1, "tokens")
        add("reduce_scatter", axes, all_tokens * (dim * size + 4 * topk), backward, "tokens")
        add("all_gather", axes, all_tokens * dim * 4, backward, "tokens")
    if _model_share(model.mlp_dim, mesh) > 1:
        # The sum is float32, but its rounding to the compute dtype is moved before it.
        add("all_reduce", ("model",), outputs, 1 + backward, "partial sums")
        of_inputs = tokens * (dim * size + 4 * topk)
        add("all_reduce", ("model",), of_inputs, backward, "partial sums")
    found += _padding_traffic(job, mesh, axes, arrays, padded, size)
    if backward:
        others = tuple(axis for axis in TOKEN_AXES if axis not in axes)
        local = sum(_computed_size(array, model, mesh, padded, group) for array in arrays)
        add("all_reduce", others, local * size, 1, "gradients")
    return tuple(found)


def _computed_size(
    array: Parameter, model: ModelConfig, mesh: MeshShape, padded: int, group: int
) -> int:
    """Elements of an expert array that one device computes with, padding included."""
    one = math.prod(array.shape[1:])
    if "expert_mlp" in array.axes:
        one //= _model_share(model.mlp_dim, mesh)
    return padded // group * one


def _padding_traffic(
    job: Job,
    mesh: MeshShape,
    axes: Axes,
    arrays: tuple[Parameter, ...],
    padded: int,
    size: int,
) -> list[Traffic]:
    """What it costs that experts do not divide: stored in other parts, they are gathered whole."""
    found = []
    for array in arrays:
        num_experts, whole = array.shape[0], math.prod(array.shape)
        parts = whole // array.local_size(mesh, axes)
        if num_experts == padded:
            continue
        if parts > 1:
            over = (*axes, "model") if parts > mesh.size_of(axes) else axes
            found.append(
                Traffic("all_gather", over, whole * size, job.accumulation_steps, "weights")
            )
        if job.is_training:
            of_gradient = whole // num_experts * padded * size
            found.append(
                Traffic("all_gather", axes, of_gradient, job.accumulation_steps, "weights")
            )
    return found


def rest_cost(model: ModelConfig, mesh: MeshShape, job: Job) -> Cost:
    """Counts everything but the experts: attention, dense layers, routers, embeddings, logits."""
    arrays = [array for array in parameters(model) if not array.is_expert]
    stored = {array.name: array.local_size(mesh, ()) for array in arrays}
    size = jnp.dtype(model.dtype).itemsize
    tokens = job.tokens(mesh)
    local = sum(stored.values())
    backward = int(job.is_training)
    flops = _rest_flops(model, mesh, job)
    cache = _cache_bytes(model, mesh, job)
    passes = (_TRAINING_PASSES if backward else 1) * job.accumulation_steps
    activations, transient = _rest_activations(model, mesh, job)
    traffic = []
    sums = _num_partial_sums(model, mesh)
    if sums:
        times = sums * (1 + backward) * job.accumulation_steps
        payload = tokens * model.embed_dim * size
        traffic.append(Traffic("all_reduce", ("model",), payload, times, "partial sums"))
    if backward and mesh.size_of(TOKEN_AXES) > 1:
        gradients = sum(stored[a.name] * (4 if a.is_float32 else size) for a in arrays)
        if model.has_tied_embeddings:
            # Lookup and output projection give the token embedding a gradient each.
            gradients += stored["token_embedder/embedding"] * size
        steps = job.accumulation_steps
        traffic.append(Traffic("all_reduce", TOKEN_AXES, gradients, steps, "gradients"))
    return Cost(
        state_bytes=local * _bytes_per_parameter(job),
        cache_bytes=cache,
        activation_bytes=activations,
        transient_bytes=transient,
        traffic=tuple(traffic),
        flops=flops * passes,
        memory_bytes=(local * size + _cache_traffic(model, mesh, job, cache)) * passes,
        update_bytes=local * _UPDATE_BYTES if backward else 0,
        steps=1,
        blocks=model.num_layers * passes,
    )


def _num_partial_sums(model: ModelConfig, mesh: MeshShape) -> int:
    """All-reduces over `model` in a forward pass: one per block that it divides."""
    if mesh.model == 1:
        return 0
    moe = len(model.moe_layers)

    def divided(dimension: int) -> bool:
        return _model_share(dimension, mesh) > 1

    return (
        model.num_layers * divided(model.num_heads)
        + (model.num_layers - moe) * divided(model.dense_width)
        + moe * bool(model.shared_mlp_dim and divided(model.shared_mlp_dim))
        + divided(model.vocab_size)
    )


def _rest_flops(model: ModelConfig, mesh: MeshShape, job: Job) -> float:
    """FLOPs of one forward pass over one part; attention scores are computed masked, not halved."""
    dim, tokens = model.embed_dim, job.tokens(mesh)
    matrices = 3 if model.is_gated else 2
    context = _context(job)
    queries = model.num_heads * model.head_dim / _model_share(model.num_heads, mesh)
    keys = model.kv_heads * model.head_dim / _model_share(model.kv_heads, mesh)
    attention = 4 * dim * (queries + keys) + 4 * context * queries
    mlp = 2 * matrices * dim * model.dense_width / _model_share(model.dense_width, mesh)
    shared = 0.0
    if model.shared_mlp_dim:
        shared = 2 * matrices * dim * model.shared_mlp_dim
        shared /= _model_share(model.shared_mlp_dim, mesh)
    routers = sum(2 * _HIGHEST_PASSES * dim * model.router_width(i) for i in model.moe_layers)
    moe = len(model.moe_layers)
    layers = model.num_layers * attention + (model.num_layers - moe) * mlp + moe * shared + routers
    logits = 2 * dim * model.vocab_size / _model_share(model.vocab_size, mesh)
    return tokens * layers + _num_logits(mesh, job) * logits


def _context(job: Job) -> int:
    """Keys that a query is multiplied with, seen or masked: with a cache, every place of it."""
    return job.length if job.is_training else job.cache_length or job.length


def _cache_traffic(model: ModelConfig, mesh: MeshShape, job: Job, cache: int) -> float:
    """Bytes that attention over a cache moves: to decode, its keys and values; else its scores."""
    if job.is_decoding or not cache:
        return cache
    heads = model.num_layers * model.num_heads / _model_share(model.num_heads, mesh)
    return job.tokens(mesh) * job.cache_length * heads * _BYTES_PER_SCORE


def _num_logits(mesh: MeshShape, job: Job) -> int:
    """Places of one part on one device whose logits are computed: one per row when serving."""
    return job.tokens(mesh) // (1 if job.is_training else job.length)


def _cache_bytes(model: ModelConfig, mesh: MeshShape, job: Job) -> int:
    """Keys and values of this device's rows and heads, in the compute dtype."""
    if job.is_training:
        return 0
    rows = job.batch // mesh.size_of(TOKEN_AXES)
    keys = model.kv_heads * model.head_dim // _model_share(model.kv_heads, mesh)
    per_position = 2 * model.num_layers * keys
    return rows * job.cache_length * per_position * jnp.dtype(model.dtype).itemsize


# Activations: what the backward pass finds, from the shapes of `models.layers` and
# `models.expert_mlp`, with factors that fit programs compiled for v5e by libtpu 0.0.42 (widths of
# 354m, 2 and 4 layers, 2048 and 4096 tokens a chip): eight training steps took between 11 % less
# HBM and 2 % more than planned here, six forward passes 5 to 18 % less.


def _rest_activations(model: ModelConfig, mesh: MeshShape, job: Job) -> tuple[int, int]:
    """Estimates (bytes kept for the backward pass, bytes at the peak beside them)."""
    size = jnp.dtype(model.dtype).itemsize
    dim, tokens = model.embed_dim, job.tokens(mesh)
    heads = model.num_heads / _model_share(model.num_heads, mesh)
    context = job.cache_length if job.is_decoding else job.length
    scores = tokens * context * heads
    # Residual stream and norms; query, key, value and output of attention.
    queries = heads * model.head_dim
    keys = model.kv_heads * model.head_dim / _model_share(model.kv_heads, mesh)
    attention = tokens * size * (7 * dim + 2 * queries + 2 * keys)
    hidden = model.dense_width / _model_share(model.dense_width, mesh)
    matrices = 3 if model.is_gated else 2
    mlp = tokens * size * matrices * hidden
    shared = mlp * model.shared_mlp_dim / model.dense_width
    logits = _num_logits(mesh, job) * model.vocab_size / _model_share(model.vocab_size, mesh)
    moe = len(model.moe_layers)
    copies = sum(
        array.local_size(mesh, ()) * _copied_bytes(job, size)
        for array in parameters(model)
        if not array.is_expert and not array.is_float32
    )
    if not job.is_training:
        # Layer by layer: float32 scores, and the widest of what a layer computes.
        layer = attention + 4 * scores + max(mlp, shared)
        return 0, int(max(layer, 4 * logits) + copies)
    layers = model.num_layers * (attention + scores * size)
    layers += (model.num_layers - moe) * mlp + moe * shared
    return int(layers + copies), int(5 * logits)


def _copied_bytes(job: Job, size: int) -> int:
    """Bytes per parameter of a copy in the compute dtype, if the parameters have another."""
    stored = jnp.dtype("float32" if job.is_training else job.param_dtype).itemsize
    return size if stored != size else 0


def _expert_activations(
    model: ModelConfig, mesh: MeshShape, job: Job, rows: int, stored: int
) -> tuple[int, int]:
    """Estimates the same for one layer's experts: rows before, within and after them."""
    size = jnp.dtype(model.dtype).itemsize
    hidden = model.mlp_dim / _model_share(model.mlp_dim, mesh)
    matrices = 3 if model.is_gated else 2
    activations = int(rows * size * (2 * model.embed_dim + matrices * hidden))
    activations += stored * _copied_bytes(job, size)
    return (activations, 0) if job.is_training else (0, activations)
