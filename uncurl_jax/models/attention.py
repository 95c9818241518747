"""Attention of a stack to itself, with an optional cache, and of a decoder to its encoder.

Axes: b batch, l length, s length of the keys, d embed, h heads, k head_dim.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.layers import bias_init, kernel_init, rms_norm


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864).

    Element i of a head's first half and of its second half are the two coordinates that are
    rotated by position * base^(-2i/k), the order of GPT-NeoX and Llama.

    Args:
      x: [b, l, h, k], k even.
      positions: [b, l] int32.
      base: of the wavelengths.

    Returns:
      [b, l, h, k] in x's dtype; angles and products are float32.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@functools.cache
def distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of T5's relative positions in one direction (arXiv 1910.10683, section 2.1).

    The first half of the buckets are single distances e = 0, 1, ...; from E = num_buckets / 2 on
    bucket E + j begins at the distance E * (max_distance / E)^(j / E). Powers of integers are
    compared, so that no rounding of logarithms decides.

    Args:
      num_buckets: even.
      max_distance: where the last bucket ends; above E.

    Returns:
      [max_distance + 1] int32, the bucket of each distance; larger ones have the last.
    """
    exact = num_buckets // 2
    table = np.arange(max_distance + 1, dtype=np.int32)
    bucket = 0
    for distance in range(exact, max_distance + 1):
        while bucket + 1 < exact and (
            distance**exact * exact ** (bucket + 1) >= max_distance ** (bucket + 1) * exact**exact
        ):
            bucket += 1
        table[distance] = exact + bucket
    return table


class RelativePositions(nn.Module):
    """A learned term of the attention scores for each bucket of distances and each head.

    Attributes:
      config: the model.
      is_bidirectional: whether keys may stand after queries (an encoder): then each direction has
        half of the buckets. Else those after a query have distance 0.
    """

    config: ModelConfig
    is_bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Returns [b, h, l, s] float32 for queries at [b, l] and keys at [s] int32."""
        config, buckets = self.config, self.config.relative_buckets
        offset = key_positions - query_positions[..., None]
        if self.is_bidirectional:
            buckets //= 2
            first, distance = jnp.where(offset > 0, buckets, 0), jnp.abs(offset)
        else:
            first, distance = 0, jnp.maximum(-offset, 0)
        table = jnp.asarray(distance_buckets(buckets, config.relative_max_distance))
        bucket = first + table[jnp.minimum(distance, config.relative_max_distance)]
        init: Any = kernel_init(config, "unmodeled", "heads")
        shape = (config.relative_buckets, config.num_heads)
        embedding = jnp.asarray(cast(Any, self.param("embedding", init, shape)), jnp.float32)
        return jnp.moveaxis(embedding[bucket], -1, -3)


class _Attention(nn.Module):
    """Projections that all kinds of attention share."""

    config: ModelConfig

    def _query(self, x: jax.Array) -> jax.Array:
        """Queries [b, l, h, k] of x [b, l, d]."""
        query = self._projection("query", self.config.num_heads, x)
        return query if self.config.qk_norm == "none" else self._normed(query, "query_norm")

    def _key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, each [b, s, kv heads, k], of x [b, s, d]."""
        key = self._projection("key", self.config.kv_heads, x)
        value = self._projection("value", self.config.kv_heads, x)
        return key if self.config.qk_norm == "none" else self._normed(key, "key_norm"), value

    def _projection(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        return nn.DenseGeneral(
            (heads, self.config.head_dim),
            use_bias=self.config.attention_bias != "none",
            dtype=jnp.dtype(self.config.dtype),
            kernel_init=kernel_init(self.config, "embed", "heads", "kv"),
            bias_init=bias_init("heads", "kv"),
            name=name,
        )(x)

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        """Normalises queries or keys [b, l, h, k], each head by itself or all together."""
        if self.config.qk_norm == "head":
            out = rms_norm(self.config, name, "kv")(x)
        else:
            out = rms_norm(self.config, name, "heads", "kv", over=(-2, -1))(x)
        return out.astype(x.dtype)

    def _output(self, out: jax.Array) -> jax.Array:
        """Maps heads [b, l, h, k] to the residual stream, [b, l, d]."""
        return nn.DenseGeneral(
            self.config.embed_dim,
            axis=(-2, -1),
            use_bias=self.config.attention_bias == "all",
            dtype=jnp.dtype(self.config.dtype),
            kernel_init=kernel_init(self.config, "heads", "kv", "embed", is_residual=True),
            bias_init=bias_init("embed"),
            name="out",
        )(out)


class SelfAttention(_Attention):
    """Multi-head attention of a sequence to itself; causal, or of an encoder.

    Padding stands at the right end of a row, so the causal mask alone keeps it out.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        *,
        decode: bool = False,
        key_mask: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: [b, l, d] compute dtype.
          positions: [b, l] int32: of rotary embeddings; with the cache, where keys are written,
            and how far each query may look.
          decode: read and write the cache of `max_length` positions. Keys at positions beyond a
            row's own are never read before they are overwritten, so rows may differ in length.
          key_mask: [b, l] bool for an encoder, whose queries see every key of this mask; None is
            causal.
          bias: [b or 1, h, l, s] float32, added to the scores; s is max_length with the cache.

        Returns:
          [b, l, d] compute dtype.
        """
        config = self.config
        query, (key, value) = self._query(x), self._key_value(x)
        if config.position_embedding == "rotary":
            query = rotate(query, positions, config.rotary_base)
            key = rotate(key, positions, config.rotary_base)
        mask = None if key_mask is None else key_mask[:, None, None]
        if decode:
            key, value = self._update_cache(key, value, positions)
            # [b, 1, l, max_length]: query i sees cache slots up to its own position.
            mask = (jnp.arange(config.max_length) <= positions[..., None])[:, None]
        is_plain = mask is None and bias is None
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=config.attention_scale,
            is_causal=mask is None,
            implementation=_attention_implementation(query) if is_plain else None,
        )
        return self._output(out)

    def _update_cache(self, key: jax.Array, value: jax.Array, positions: jax.Array):
        """Writes [b, l, h, k] keys and values at `positions`; returns the whole cache."""
        batch, _, heads, head_dim = key.shape
        shape = (batch, self.config.max_length, heads, head_dim)
        cached_key = self.variable("cache", "cached_key", jnp.zeros, shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, shape, value.dtype)
        rows = jnp.arange(batch)[:, None]
        cached_key.value = cached_key.value.at[rows, positions].set(key)
        cached_value.value = cached_value.value.at[rows, positions].set(value)
        return cached_key.value, cached_value.value


class CrossAttention(_Attention):
    """Multi-head attention of a decoder to what its encoder made of the prompt."""

    @nn.compact
    def __call__(
        self, x: jax.Array, encoded: jax.Array | None, key_mask: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        """Attends.

        Args:
          x: [b, l, d] compute dtype.
          encoded: [b, s, d] compute dtype, the encoder's result. None, with the cache alone, reads
            the keys and values that an earlier call left there.
          key_mask: [b, s] bool, False at the prompt's padding.
          decode: keep keys and values in the cache.

        Returns:
          [b, l, d] compute dtype.
        """
        query = self._query(x)
        if encoded is not None:
            key, value = self._key_value(encoded)
            if decode:
                self.put_variable("cache", "encoded_key", key)
                self.put_variable("cache", "encoded_value", value)
        else:
            key = self.get_variable("cache", "encoded_key")
            value = self.get_variable("cache", "encoded_value")
        out = jax.nn.dot_product_attention(
            query, key, value, mask=key_mask[:, None, None], scale=self.config.attention_scale
        )
        return self._output(out)


def _attention_implementation(query: jax.Array) -> Literal["cudnn", "xla"]:
    """Flash attention by cuDNN where it can: it keeps no [b, h, l, l] array for the gradient."""
    length, head_dim = query.shape[1], query.shape[3]
    is_supported = query.dtype == jnp.bfloat16 and length % 64 == 0 and head_dim in (64, 128)
    return "cudnn" if is_supported and jax.default_backend() == "gpu" else "xla"
