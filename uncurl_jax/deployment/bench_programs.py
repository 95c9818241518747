"""The programs that a benchmark times: whole steps, one MoE layer, and its parts alone.

Axes: b batch, l length, t tokens of a device, e expert, c slot, d embed, f mlp; n devices that
share a batch, g devices that share a layer's experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uncurl_jax.checkpoints import store
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import collectives
from uncurl_jax.deployment.bench_settings import BenchModel, BenchSettings, Layout
from uncurl_jax.deployment.timing import Alternative
from uncurl_jax.models import layers
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.models.decoder import Decoder, Params
from uncurl_jax.models.expert_mlp import Experts, apply_experts
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.partitioning import (
    TOKEN_AXES,
    ExpertAxes,
    axis_size,
    batch_sharding,
    layer_expert_axes,
    parameter_spec,
    place_batch,
)

ALL_TO_ALL = "all_to_all"
GATHER_SCATTER = "all_gather_reduce_scatter"
# Places of a row whose logits are compared between devices.
_NUM_COMPARED = 16
# Side of the square matrix product that tells whether the machine kept its speed.
_REFERENCE_SIZE = {"cpu": 512}
_REFERENCE_SIZE_OF_ACCELERATORS = 4096


class LayerKind(NamedTuple):
    """MoE layers of one model that are the same in shape and place.

    Attributes:
      layers: their indices.
      num_experts, padded_experts: as stored, and as divided among devices.
      capacity: slots of an expert for the tokens of one device; None drops nothing.
      expert_axes: mesh axes of more than one device that divide the experts.
      group_size: g, the devices along them.
      communication: how tokens cross the mesh, ALL_TO_ALL, GATHER_SCATTER or None.
    """

    layers: tuple[int, ...]
    num_experts: int
    padded_experts: int
    capacity: int | None
    expert_axes: tuple[str, ...]
    group_size: int
    communication: str | None

    def slots(self, tokens: int, topk: int) -> int:
        """Slots of one expert for the tokens of all devices that share it; balanced if dropless."""
        if self.capacity is not None:
            return self.capacity * self.group_size
        return math.ceil(tokens * self.group_size * topk / self.num_experts)

    def bytes_per_device(self, config: ModelConfig, tokens: int) -> int:
        """Bytes that a device sends to others in one forward pass of one layer, by arithmetic."""
        size, others = jnp.dtype(config.dtype).itemsize, self.group_size - 1
        if self.communication == ALL_TO_ALL:
            assert self.capacity is not None
            buffer = self.padded_experts * self.capacity * config.embed_dim * size
            return 2 * buffer * others // self.group_size
        if self.communication == GATHER_SCATTER:
            topk = config.num_selected_experts
            # Tokens, expert indices and gates; float32 results back. Which tokens are wanted is
            # known without asking: all.
            per_token = config.embed_dim * size + topk * (4 + 4) + config.embed_dim * 4
            return tokens * per_token * others
        return 0


def layer_kinds(config: ModelConfig, layout: Layout, tokens: int) -> list[LayerKind]:
    """Groups the MoE layers of a model by what they compute and send for `tokens` a device."""
    sizes = {"data": layout.data, "expert": layout.expert}
    members: dict[tuple[Any, ...], list[int]] = {}
    for layer in config.moe_layers:
        given = layer_expert_axes(layout.expert_axes, layer)
        axes = tuple(axis for axis in given if sizes[axis] > 1)
        key = (config.num_experts[layer], config.router_width(layer), axes)
        members.setdefault(key, []).append(layer)
    kinds = []
    for (count, _, axes), indices in members.items():
        group_size = math.prod(sizes[axis] for axis in axes)
        capacity = config.expert_capacity(indices[0], tokens, is_training=False)
        crosses = GATHER_SCATTER if capacity is None else ALL_TO_ALL
        kinds.append(
            LayerKind(
                layers=tuple(indices),
                num_experts=count,
                padded_experts=-(-count // group_size) * group_size,
                capacity=capacity,
                expert_axes=axes,
                group_size=group_size,
                communication=crosses if axes else None,
            )
        )
    return kinds


def serving_params(
    model: BenchModel, mesh: Mesh | None, layout: Layout | None, seed: int
) -> Params:
    """Returns parameters in the compute dtype; routers and norms stay float32.

    Args:
      model: restored from its checkpoint, or random.
      mesh: None puts them on the first device.
      layout: of the mesh.
      seed: of random ones, which depend on nothing else.
    """
    config = model.config
    axes = None if layout is None else layout.expert_axes
    abstract = abstract_serving_params(config, mesh, axes)
    if model.checkpoint is not None:
        params = store.restore(model.checkpoint, abstract_params=abstract).params
        return jax.tree.map(jnp.asarray, params) if mesh is None else params
    return random_params(abstract, config.init_stddev, seed)


def abstract_serving_params(
    config: ModelConfig, mesh: Mesh | None = None, expert_axes: ExpertAxes | None = None
) -> Any:
    """Returns the same as ShapeDtypeStructs, with shardings if a mesh is given."""
    dtype = jnp.dtype(config.dtype)

    def as_served(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = {entry.key for entry in path}
        is_exact = bool(names & {"router", "shared_gate"}) or any(
            name.endswith("norm") for name in names
        )
        kept = jnp.float32 if is_exact else dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)

    abstract = abstract_params(config, mesh, expert_axes)
    return jax.tree_util.tree_map_with_path(as_served, abstract)


def random_params(abstract: Any, stddev: float, seed: int) -> Params:
    """Returns random parameters of given shapes, dtypes and shardings, without compiling a model.

    Args:
      abstract: tree of ShapeDtypeStructs, as `abstract_params` returns it.
      stddev: of every kernel.
      seed: the values depend on nothing else.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree_util.tree_unflatten(
        structure,
        [
            _random_parameter(path[-1].key, leaf, stddev, (seed, place))
            for place, (path, leaf) in enumerate(leaves)
        ],
    )


def _random_parameter(
    name: str, leaf: jax.ShapeDtypeStruct, stddev: float, seeds: tuple[int, int]
) -> jax.Array:
    """Scales of norms are 1, biases 0, the rest is uniform: one small program for each shape."""
    scale = 0.0 if name == "scale" or name.endswith("bias") else stddev
    offset = 1.0 if name == "scale" else 0.0
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return random_values(leaf.shape, leaf.dtype, leaf.sharding, seed, scale, offset)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int) -> np.ndarray:
    """Token ids [batch, length] int32, uniform over the vocabulary."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, config.vocab_size, (batch, length)).astype(np.int32)


class Forward(NamedTuple):
    """The compiled forward pass and its arguments."""

    compiled: Any
    params: Params
    inputs: jax.Array

    def __call__(self) -> jax.Array:
        """Returns logits [b, l, vocab] float32."""
        return self.compiled(self.params, self.inputs)

    def compared_logits(self) -> np.ndarray:
        """Returns the logits that are compared between devices, [b, p, vocab]."""
        return np.asarray(self()[:, compared_positions(self.inputs.shape[1])])


def compared_positions(length: int) -> np.ndarray:
    """Places of a row whose logits are compared: spread evenly, the last among them."""
    return np.unique(np.linspace(0, length - 1, min(_NUM_COMPARED, length)).round().astype(int))


def compile_forward(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    mesh: Mesh | None,
    layout: Layout | None,
) -> Forward:
    """Compiles the forward pass with logits of every token."""
    axes = None if layout is None else layout.expert_axes
    decoder = Decoder(config, mesh, None, axes)

    def forward(params: Params, inputs: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]

    inputs = place_batch(tokens, mesh)
    shardings = None
    if mesh is not None:
        shape = (*tokens.shape, config.vocab_size)
        spec = parameter_spec(("batch", "length", "vocab"), shape, mesh)
        shardings = NamedSharding(mesh, spec)
    compiled = jax.jit(forward, out_shardings=shardings).lower(params, inputs).compile()
    return Forward(compiled, params, inputs)


def _repeat(body: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    """Returns body applied `calls` times in one program, each to the result of the one before."""

    def repeated(x: jax.Array, *others: Any) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, carry: body(carry, *others), x)

    return repeated


def _tokens_spec(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else batch_sharding(mesh)


def random_values(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Any,
    seed: int,
    scale: float = 1.0,
    offset: float = 0.0,
) -> jax.Array:
    """Uniform values of standard deviation `scale`, made on the devices that hold them.

    Not zeros, which can run faster than real data; and not `jax.random`, whose many shapes here
    would take minutes to compile.
    """
    make = _random_program(shape, jnp.dtype(dtype).name, sharding)
    return make(np.uint32(seed), np.float32(scale), np.float32(offset))


@functools.lru_cache(maxsize=256)
def _random_program(shape: tuple[int, ...], dtype: str, sharding: Any) -> Callable[..., jax.Array]:
    def make(seed: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
        bits = jnp.broadcast_to(seed, shape)
        for axis in range(len(shape)):
            index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            # The finaliser of MurmurHash3 (Appleby), once for each coordinate.
            bits = bits * np.uint32(0x9E3779B1) + index
            bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
            bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
            bits = bits ^ (bits >> 16)
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
        # Cast inside the program, so that float32 values never lie in memory whole.
        return (offset + scale * math.sqrt(12.0) * (uniform - 0.5)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


class CommunicationAlone(NamedTuple):
    """The collectives of one layer as a program to time.

    Attributes:
      alternative: to time.
      collectives: of one call, as its compiler left them.
    """

    alternative: Alternative
    collectives: float


def communication_alone(
    config: ModelConfig, kind: LayerKind, mesh: Mesh, tokens: int, settings: BenchSettings
) -> CommunicationAlone:
    """The collectives of one layer's forward pass on buffers of the layer's shape, and no more.

    ALL_TO_ALL: each device's [e, c, d], padded experts included, goes to the experts' devices and
    comes back, as in `models.expert_parallel`. GATHER_SCATTER: its tokens [t, d] go to all devices
    of its group, and float32 sums come back.
    """
    shards = axis_size(mesh, TOKEN_AXES)
    dtype, dim, axes = jnp.dtype(config.dtype), config.embed_dim, kind.expert_axes

    def round_trip(x: jax.Array) -> jax.Array:
        if kind.communication == ALL_TO_ALL:
            x = jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=1, tiled=True)
            # Without the barrier a compiler may see that the second undoes the first.
            x = jax.lax.optimization_barrier(x)
            return jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=0, tiled=True)
        gathered = jax.lax.all_gather(x, axes, axis=0, tiled=True).astype(jnp.float32)
        sums = jax.lax.psum_scatter(gathered, axes, scatter_dimension=0, tiled=True)
        return (sums / kind.group_size).astype(dtype)

    if kind.communication == ALL_TO_ALL:
        assert kind.capacity is not None
        shape = (shards * kind.padded_experts, kind.capacity, dim)
    else:
        shape = (shards * tokens, dim)
    x = random_values(shape, dtype, batch_sharding(mesh), settings.seed)
    spec = PartitionSpec(TOKEN_AXES)
    body = _repeat(round_trip, settings.layer_calls)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(x).compile()
    found = collectives.find_collectives(compiled.as_text() or "")
    return CommunicationAlone(
        Alternative(lambda: compiled(x), settings.layer_calls),
        sum(collective.times for collective in found) / settings.layer_calls,
    )


def experts_alone(
    config: ModelConfig,
    kind: LayerKind,
    mesh: Mesh | None,
    tokens: int,
    settings: BenchSettings,
) -> Alternative:
    """One layer's experts on buffers that are dispatched already: [e / g, c * g, d] a device.

    Their values are random, also for a checkpoint: time does not depend on them.
    """
    shards = 1 if mesh is None else axis_size(mesh, TOKEN_AXES)
    dtype, dim, mlp = jnp.dtype(config.dtype), config.embed_dim, config.mlp_dim
    model = None
    if mesh is not None and mesh.shape["model"] > 1 and mlp % mesh.shape["model"] == 0:
        model = "model"
    count = shards * kind.padded_experts // kind.group_size
    spec = PartitionSpec
    shapes: dict[str, tuple[tuple[int, ...], PartitionSpec, float]] = {
        "wi": ((count, dim, mlp), spec(TOKEN_AXES, None, model), dim**-0.5),
        "wo": ((count, mlp, dim), spec(TOKEN_AXES, model, None), mlp**-0.5),
    }
    if config.is_gated:
        shapes["wg"] = shapes["wi"]
    if config.has_mlp_bias:
        shapes["wi_bias"] = ((count, mlp), spec(TOKEN_AXES, model), 0.1)
        shapes["wo_bias"] = ((count, dim), spec(TOKEN_AXES, None), 0.1)
        if config.is_gated:
            shapes["wg_bias"] = shapes["wi_bias"]
    arrays = {
        name: random_values(
            shape, dtype, None if mesh is None else NamedSharding(mesh, where), place, scale
        )
        for place, (name, (shape, where, scale)) in enumerate(shapes.items(), start=1)
    }
    experts = Experts(**arrays)
    slots = kind.slots(tokens, config.num_selected_experts)
    x = random_values((count, slots, dim), dtype, _tokens_spec(mesh), settings.seed)

    def run(x: jax.Array, experts: Experts) -> jax.Array:
        y = apply_experts(x, experts, layers.activation(config), model_axis=model)
        # Added, so that each repetition needs the one before; small, so that values stay.
        return x + 0.01 * y

    body = _repeat(run, settings.layer_calls)
    if mesh is not None:
        specs = Experts._make(
            shapes[name][1] if name in shapes else None for name in Experts._fields
        )
        body = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(spec(TOKEN_AXES), specs),
            out_specs=spec(TOKEN_AXES),
            check_vma=False,
        )
    compiled = jax.jit(body).lower(x, experts).compile()
    return Alternative(lambda: compiled(x, experts), settings.layer_calls)


def layer_alone(
    config: ModelConfig,
    kind: LayerKind,
    layout: Layout,
    mesh: Mesh | None,
    params: Params,
    batch: int,
    settings: BenchSettings,
) -> Alternative:
    """One MoE layer with its router, dispatch and combine: x + layer(x), x [b, l, d] float32."""
    layer = kind.layers[0]
    axes = layer_expert_axes(layout.expert_axes, layer)
    module = MoeLayer(config, layer, mesh, None, axes)
    sharding = _tokens_spec(mesh)
    shape = (batch, settings.length, config.embed_dim)
    x = random_values(shape, jnp.float32, sharding, settings.seed)
    of_layer = params[f"layers_{layer}"]["moe"]

    def run(x: jax.Array, params: Params) -> jax.Array:
        mask = jnp.ones(x.shape[:2], bool)
        return x + module.apply({"params": params}, x, mask)  # pyright: ignore[reportOperatorIssue]

    body = _repeat(run, settings.layer_calls)
    compiled = jax.jit(body, out_shardings=sharding).lower(x, of_layer).compile()
    return Alternative(lambda: compiled(x, of_layer), settings.layer_calls)


def launch_alone(mesh: Mesh | None) -> Alternative:
    """A program that does next to nothing on the same devices: what launching costs."""
    shards = 1 if mesh is None else axis_size(mesh, TOKEN_AXES)
    x = random_values((shards, 8), jnp.float32, _tokens_spec(mesh), 0)
    compiled = jax.jit(lambda x: x + 1, out_shardings=_tokens_spec(mesh)).lower(x).compile()
    return Alternative(lambda: compiled(x))


class Reference(NamedTuple):
    """A fixed matrix product on one device, timed with everything else.

    Attributes:
      alternative: to time.
      flops: of one product.
      text: what it is.
    """

    alternative: Alternative
    flops: int
    text: str


def reference_product() -> Reference:
    """Returns a product of two square matrices: bfloat16, or float32 on a CPU."""
    platform = jax.devices()[0].platform
    size = _REFERENCE_SIZE.get(platform, _REFERENCE_SIZE_OF_ACCELERATORS)
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    a = random_values((size, size), dtype, None, 1)
    b = random_values((size, size), dtype, None, 2, size**-0.5)
    # On an accelerator so many that launching them does not count.
    calls = 8 if platform == "cpu" else 64
    compiled = jax.jit(_repeat(lambda a, b: a @ b, calls)).lower(a, b).compile()
    text = f"{size} x {size} matrix product, {jnp.dtype(dtype).name}, on one device"
    return Reference(Alternative(lambda: compiled(a, b), calls), 2 * size**3, text)
