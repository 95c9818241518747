"""The decoder: pre-norm, with experts or a dense feed-forward network in each layer.

By default it is the GPT-2-style model of arXiv 2409.01483, section 2 (LayerNorm, GELU, learned
positions, tied embeddings); `ModelConfig` says what else it can be. `num_experts` has one entry per
layer, so one class serves dense, unpruned and pruned models alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from uncurl_jax.config import ModelConfig
from uncurl_jax.models import layers
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.partitioning import ExpertAxes, layer_expert_axes, parameter_spec

Params = dict[str, Any]

MOE_METRICS = (
    "auxiliary_loss",
    "router_z_loss",
    "fraction_tokens_left_behind",
    "expert_usage",
    "router_confidence",
)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm and added to the residual."""

    config: ModelConfig
    layer: int
    mesh: Mesh | None = None
    num_groups: int | None = None
    expert_axes: tuple[str, ...] = ("expert",)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        *,
        is_training: bool,
        decode: bool,
    ) -> jax.Array:
        """Maps [b, l, d] to [b, l, d] in the compute dtype; see Decoder for the arguments."""
        x, normed = self.attend(x, positions, decode=decode)
        if self.config.num_experts[self.layer] == 0:
            return self.feed_forward(x, normed)
        moe = MoeLayer(
            self.config, self.layer, self.mesh, self.num_groups, self.expert_axes, name="moe"
        )
        y = moe(normed, mask, is_training=is_training, is_dropless=decode)
        return x + y.astype(x.dtype)

    def attend(
        self, x: jax.Array, positions: jax.Array, *, decode: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream after attention, and its norm [b, l, d] float32."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        normed = layers.norm(config, "pre_attention_norm")(x).astype(dtype)
        attention = layers.SelfAttention(config, name="attention")
        x = x + attention(normed, positions, decode=decode)
        return x, layers.norm(config, "pre_mlp_norm")(x)

    def feed_forward(self, x: jax.Array, normed: jax.Array) -> jax.Array:
        """Adds the dense feed-forward network of a layer without experts."""
        return x + layers.Mlp(self.config, name="mlp")(normed.astype(x.dtype))


class Decoder(nn.Module):
    """Token ids to next-token logits.

    Attributes:
      config: the model.
      mesh: None on one device; else MoE layers compute through shard_map on it.
      num_groups: see MoeLayer.
      expert_axes: mesh axes that divide each layer's experts; see partitioning.ExpertAxes.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    num_groups: int | None = None
    expert_axes: ExpertAxes | None = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        is_training: bool = False,
        decode: bool = False,
        logit_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the decoder.

        Args:
          inputs: [b, l] int32 token ids, targets shifted right.
          mask: [b, l] bool, False at padding (right end of a row); all True by default.
          positions: [b, l] int32, 0..l-1 by default.
          is_training: training capacity factor and router jitter.
          decode: use the key-value cache (collection "cache"); experts are dropless then.
          logit_positions: [b, n] int32 places in the row whose logits are wanted; None wants all.
            With a large vocabulary logits are most of a small model's work.

        Returns:
          [b, l, vocab] float32 logits, or [b, n, vocab].
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        length = inputs.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"A sequence must not be longer than max_length={config.max_length}, got {length}."
            )
        if mask is None:
            mask = jnp.ones(inputs.shape, dtype=bool)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), inputs.shape)
        embedder = nn.Embed(
            config.vocab_size,
            config.embed_dim,
            dtype=dtype,
            embedding_init=layers.kernel_init(config, "vocab", "embed"),
            name="token_embedder",
        )
        x = embedder(inputs)
        if config.position_embedding == "learned":
            position_embedder = nn.Embed(
                config.max_length,
                config.embed_dim,
                dtype=dtype,
                embedding_init=layers.kernel_init(config, "unmodeled", "embed"),
                name="position_embedder",
            )
            x = x + position_embedder(positions)
        for layer in range(config.num_layers):
            block = DecoderLayer(
                config,
                layer,
                self.mesh,
                self.num_groups,
                layer_expert_axes(self.expert_axes, layer),
                name=f"layers_{layer}",
            )
            x = block(x, mask, positions, is_training=is_training, decode=decode)
        if logit_positions is not None:
            x = jnp.take_along_axis(x, logit_positions[..., None], axis=1)
        x = layers.norm(config, "final_norm")(x).astype(dtype)
        if not config.has_tied_embeddings:
            embedder = nn.Embed(
                config.vocab_size,
                config.embed_dim,
                embedding_init=layers.kernel_init(config, "vocab", "embed"),
                name="output_embedder",
            )
        return _logits(x, jnp.asarray(embedder.embedding, dtype))


@jax.custom_vjp
def _logits(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """Multiplies by the output embedding: x [b, l, d], embedding [v, d] -> [b, l, v] float32.

    The gradient is rounded to x's dtype before its two products, which would otherwise be float32
    products of the largest arrays there are.
    """
    return jnp.einsum("bld,vd->blv", x, embedding, preferred_element_type=jnp.float32)


def _logits_forward(x: jax.Array, embedding: jax.Array) -> tuple[jax.Array, Any]:
    return _logits(x, embedding), (x, embedding)


def _logits_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, embedding = saved
    g = g.astype(x.dtype)
    return jnp.einsum("blv,vd->bld", g, embedding), jnp.einsum("blv,bld->vd", g, x)


_logits.defvjp(_logits_forward, _logits_backward)


class ParameterCount(NamedTuple):
    """Parameters of a model.

    Attributes:
      total: all of them.
      active: those that one token's forward pass uses (k experts per MoE layer).
    """

    total: int
    active: int


def _boxed_abstract_params(config: ModelConfig) -> Any:
    tokens = jnp.zeros((1, min(2, config.max_length)), jnp.int32)
    init = functools.partial(Decoder(config).init, jax.random.key(0))
    return jax.eval_shape(init, tokens)["params"]


def logical_axes(config: ModelConfig) -> Any:
    """Returns the tree of logical axis names (a PartitionSpec of names) of every parameter."""
    return nn.get_partition_spec(_boxed_abstract_params(config))


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, expert_axes: ExpertAxes | None = None
) -> Any:
    """Returns the tree of float32 ShapeDtypeStructs, with shardings if a mesh is given."""
    boxed = _boxed_abstract_params(config)
    params = nn.meta.unbox(boxed)
    if mesh is None:
        return params
    names = nn.get_partition_spec(boxed)

    def with_sharding(path: Any, array: jax.ShapeDtypeStruct, axes: Any) -> jax.ShapeDtypeStruct:
        top = path[0].key
        layer = int(top.removeprefix("layers_")) if top.startswith("layers_") else 0
        over = layer_expert_axes(expert_axes, layer)
        sharding = NamedSharding(mesh, parameter_spec(tuple(axes), array.shape, mesh, over))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(with_sharding, params, names)


def init_params(
    config: ModelConfig,
    seed: int,
    mesh: Mesh | None = None,
    expert_axes: ExpertAxes | None = None,
) -> Params:
    """Returns freshly initialised float32 parameters, born sharded if a mesh is given.

    The values depend on `seed` alone, not on the mesh.
    """
    return _compiled_init(config, mesh, expert_axes)(jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _compiled_init(
    config: ModelConfig, mesh: Mesh | None, expert_axes: ExpertAxes | None
) -> Callable[[jax.Array], Params]:
    """Returns the compiled function from a key to parameters, one for all seeds."""
    tokens = jnp.zeros((1, min(2, config.max_length)), jnp.int32)

    def init(key: jax.Array) -> Params:
        return nn.meta.unbox(Decoder(config).init(key, tokens)["params"])

    shardings = None
    if mesh is not None:
        abstract = abstract_params(config, mesh, expert_axes)
        shardings = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts parameters from shapes alone; nothing is allocated."""
    total = inactive = 0
    for path, array in jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]:
        size = math.prod(array.shape)
        total += size
        if "experts" in (entry.key for entry in path):
            inactive += size // array.shape[0] * (array.shape[0] - config.num_selected_experts)
    return ParameterCount(total, total - inactive)


def moe_metrics(intermediates: Any) -> dict[str, jax.Array]:
    """Reduces what MoE layers sowed: losses are summed over layers, the rest averaged.

    A dense model gives zeros.
    """
    values: dict[str, list[jax.Array]] = {name: [] for name in MOE_METRICS}
    for path, value in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        name = next(entry.key for entry in reversed(path) if hasattr(entry, "key"))
        if name in values:
            values[name].append(value)
    zero = jnp.zeros((), jnp.float32)
    return {
        name: sum(found, zero) / (1 if name.endswith("_loss") else max(len(found), 1))
        for name, found in values.items()
    }


def select_targets(
    batch: Any, target_length: int | None
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Picks the places of each row that can count in a loss or a score.

    Args:
      batch: with `targets` and `weights`, both [b, l].
      target_length: n, at least what the weighted targets of any row take up; None or l takes
        whole rows.

    Returns:
      Decoder's `logit_positions` ([b, n] int32, consecutive; None for whole rows), and the targets
      and weights there.
    """
    length = batch.weights.shape[-1]
    if target_length is None or target_length >= length:
        return None, batch.targets, batch.weights
    first = jnp.argmax(batch.weights != 0, axis=-1)
    start = jnp.minimum(first, length - target_length)
    window = (start[:, None] + jnp.arange(target_length)).astype(jnp.int32)
    targets = jnp.take_along_axis(batch.targets, window, axis=-1)
    return window, targets, jnp.take_along_axis(batch.weights, window, axis=-1)


def token_log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target: logits [..., vocab], targets [...] int -> [...] float32."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return target_logits - jax.nn.logsumexp(logits, axis=-1)
