"""The decoder: pre-norm, with experts or a dense feed-forward network in each layer.

By default it is the GPT-2-style model of arXiv 2409.01483, section 2 (LayerNorm, GELU, learned
positions, tied embeddings); `ModelConfig` says what else it can be. `num_experts` has one entry per
layer, so one class serves dense, unpruned and pruned models alike.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.models import layers
from uncurl_jax.models.attention import SelfAttention
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.partitioning import ExpertAxes, layer_expert_axes

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
        return self.transform(x, normed, mask, is_training=is_training, is_dropless=decode)

    def attend(
        self, x: jax.Array, positions: jax.Array, *, decode: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream after attention, and its norm [b, l, d] float32."""
        x = self.attend_to_itself(x, positions, decode=decode)
        return x, layers.norm(self.config, "pre_mlp_norm")(x)

    def attend_to_itself(self, x: jax.Array, positions: jax.Array, **options: Any) -> jax.Array:
        """Adds self-attention to the residual stream; options are those of `SelfAttention`."""
        normed = layers.norm(self.config, "pre_attention_norm")(x).astype(x.dtype)
        return x + SelfAttention(self.config, name="attention")(normed, positions, **options)

    def transform(
        self,
        x: jax.Array,
        normed: jax.Array,
        mask: jax.Array,
        *,
        is_training: bool,
        is_dropless: bool,
    ) -> jax.Array:
        """Adds what experts or a feed-forward network make of `normed` [b, l, d] float32."""
        if self.config.num_experts[self.layer] == 0:
            return self.feed_forward(x, normed)
        moe = MoeLayer(
            self.config, self.layer, self.mesh, self.num_groups, self.expert_axes, name="moe"
        )
        y = moe(normed, mask, is_training=is_training, is_dropless=is_dropless)
        return x + y.astype(x.dtype)

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
        config.check_decoder("models.decoder.Decoder")
        length = inputs.shape[1]
        check_length(config, length)
        if mask is None:
            mask = jnp.ones(inputs.shape, dtype=bool)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), inputs.shape)
        embedder = token_embedder(config)
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
        return output_logits(config, x, embedder, logit_positions)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises ValueError if a sequence is longer than the model reads."""
    if length > config.max_length:
        raise ValueError(
            f"A sequence must not be longer than max_length={config.max_length}, got {length}."
        )


def token_embedder(config: ModelConfig) -> nn.Embed:
    """The token embedding, part of the module that calls this."""
    return nn.Embed(
        config.vocab_size,
        config.embed_dim,
        dtype=jnp.dtype(config.dtype),
        embedding_init=layers.kernel_init(config, "vocab", "embed"),
        name="token_embedder",
    )


def output_logits(
    config: ModelConfig, x: jax.Array, embedder: nn.Embed, logit_positions: jax.Array | None
) -> jax.Array:
    """Turns the residual stream into logits, as part of the module that calls this.

    Args:
      config: the model.
      x: [b, l, d] compute dtype.
      embedder: of the tokens, the output projection if embeddings are tied.
      logit_positions: [b, n] int32, see Decoder; None wants all.

    Returns:
      [b, l or n, vocab] float32.
    """
    dtype = jnp.dtype(config.dtype)
    if logit_positions is not None:
        x = jnp.take_along_axis(x, logit_positions[..., None], axis=1)
    x = layers.norm(config, "final_norm")(x)
    if config.has_scaled_logits:
        x = x * config.embed_dim**-0.5
    if not config.has_tied_embeddings:
        embedder = nn.Embed(
            config.vocab_size,
            config.embed_dim,
            embedding_init=layers.kernel_init(config, "vocab", "embed"),
            name="output_embedder",
        )
    return _logits(x.astype(dtype), jnp.asarray(embedder.embedding, dtype))


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


def token_log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target: logits [..., vocab], targets [...] int -> [...] float32."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return target_logits - jax.nn.logsumexp(logits, axis=-1)
