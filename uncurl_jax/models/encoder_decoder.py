"""Encoder and decoder: the architecture of T5 and of Switch Transformers (arXiv 2101.03961).

Pre-norm, relative positions shared by the layers of a stack, experts or a dense feed-forward
network in each layer of both. Layers have one numbering: the encoder's first, then the decoder's.
What a layer is made of, experts and their places on a mesh included, is the decoder's own code.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.models import layers
from uncurl_jax.models.attention import CrossAttention, RelativePositions
from uncurl_jax.models.decoder import DecoderLayer, check_length, output_logits, token_embedder
from uncurl_jax.partitioning import ExpertAxes, layer_expert_axes


class EncoderLayer(DecoderLayer):
    """Attention to the whole sequence, then experts or a dense network."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        *,
        is_training: bool,
        is_dropless: bool,
    ) -> jax.Array:
        """Maps [b, l, d] to [b, l, d] in the compute dtype.

        Args:
          x: [b, l, d] compute dtype.
          mask: [b, l] bool, False at padding.
          bias: [1, h, l, l] float32, the positions' part of the attention scores.
          is_training: training capacity and jitter.
          is_dropless: every token reaches its experts.
        """
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        x = self.attend_to_itself(x, positions, key_mask=mask, bias=bias)
        normed = layers.norm(self.config, "pre_mlp_norm")(x)
        return self.transform(x, normed, mask, is_training=is_training, is_dropless=is_dropless)


class CrossDecoderLayer(DecoderLayer):
    """Attention to what came before, attention to the prompt, then experts or a dense network."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        bias: jax.Array,
        encoded: jax.Array | None,
        encoder_mask: jax.Array,
        *,
        is_training: bool,
        decode: bool,
    ) -> jax.Array:
        """Maps [b, l, d] to [b, l, d] in the compute dtype.

        Args:
          x: [b, l, d] compute dtype.
          mask: [b, l] bool, False at padding.
          positions: [b, l] int32.
          bias: [b or 1, h, l, l or max_length] float32, the positions' part of the scores.
          encoded: [b, s, d] compute dtype; None reads the cache.
          encoder_mask: [b, s] bool, False at the prompt's padding.
          is_training: training capacity and jitter.
          decode: use the cache; experts are dropless then.
        """
        x = self.attend_to_itself(x, positions, bias=bias, decode=decode)
        normed = layers.norm(self.config, "pre_cross_attention_norm")(x).astype(x.dtype)
        attention = CrossAttention(self.config, name="cross_attention")
        x = x + attention(normed, encoded, encoder_mask, decode=decode)
        normed = layers.norm(self.config, "pre_mlp_norm")(x)
        return self.transform(x, normed, mask, is_training=is_training, is_dropless=decode)


class EncoderDecoder(nn.Module):
    """Token ids of a prompt and of an answer to next-token logits of the answer.

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
        encoder_inputs: jax.Array | None = None,
        encoder_mask: jax.Array | None = None,
        is_training: bool = False,
        decode: bool = False,
        logit_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Runs both stacks, or only the decoder on a prompt that the cache holds.

        Args:
          inputs: [b, l] int32 token ids of the answer, shifted right.
          mask: [b, l] bool, False at padding (right end of a row); all True by default.
          positions: [b, l] int32, 0..l-1 by default.
          encoder_inputs: [b, s] int32 token ids of the prompt, of any length up to max_length. None
            with `decode` takes the prompt that the first call left in the cache.
          encoder_mask: [b, s] bool, False at padding; all True by default.
          is_training: training capacity factor and router jitter.
          decode: use the cache (collection "cache") of keys and values; experts are dropless then.
          logit_positions: [b, n] int32 places in the row whose logits are wanted; None wants all.

        Returns:
          [b, l, vocab] float32 logits, or [b, n, vocab].
        """
        config = self.config
        check_length(config, inputs.shape[1])
        embedder = token_embedder(config)
        encoded = None
        if encoder_inputs is not None:
            check_length(config, encoder_inputs.shape[1])
            if encoder_mask is None:
                encoder_mask = jnp.ones(encoder_inputs.shape, dtype=bool)
            encoded = self._encode(
                embedder(encoder_inputs), encoder_mask, is_training=is_training, is_dropless=decode
            )
            if decode:
                self.put_variable("cache", "encoder_mask", encoder_mask)
        elif decode and self.has_variable("cache", "encoder_mask"):
            encoder_mask = self.get_variable("cache", "encoder_mask")
        if encoder_mask is None:
            raise ValueError("An encoder-decoder needs encoder_inputs, or a cache that holds some.")

        if mask is None:
            mask = jnp.ones(inputs.shape, dtype=bool)
        steps = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        keys = jnp.arange(config.max_length, dtype=jnp.int32) if decode else steps[0]
        positions = steps if positions is None else positions
        bias = RelativePositions(config, is_bidirectional=False, name="decoder_relative_position")(
            positions, keys
        )
        positions = jnp.broadcast_to(positions, inputs.shape)
        x = embedder(inputs)
        for layer in range(config.num_encoder_layers, config.num_layers):
            block = CrossDecoderLayer(*self._layer(layer), name=f"layers_{layer}")
            x = block(
                x,
                mask,
                positions,
                bias,
                encoded,
                encoder_mask,
                is_training=is_training,
                decode=decode,
            )
        return output_logits(config, x, embedder, logit_positions)

    def _encode(
        self, x: jax.Array, mask: jax.Array, *, is_training: bool, is_dropless: bool
    ) -> jax.Array:
        """Runs the encoder on embedded tokens [b, s, d]; returns [b, s, d] compute dtype."""
        config = self.config
        places = jnp.arange(x.shape[1], dtype=jnp.int32)
        bias = RelativePositions(config, is_bidirectional=True, name="encoder_relative_position")(
            places[None], places
        )
        for layer in range(config.num_encoder_layers):
            block = EncoderLayer(*self._layer(layer), name=f"layers_{layer}")
            x = block(x, mask, bias, is_training=is_training, is_dropless=is_dropless)
        return layers.norm(config, "encoder_norm")(x).astype(x.dtype)

    def _layer(self, layer: int):
        """The fields of one layer."""
        axes = layer_expert_axes(self.expert_axes, layer)
        return self.config, layer, self.mesh, self.num_groups, axes
