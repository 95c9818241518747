"""Attention, dense feed-forward network and norms of the decoder.

Axes: b batch, l length, d embed, h heads, k head_dim, f mlp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from uncurl_jax.config import ModelConfig


def kernel_init(config: ModelConfig, *axes: str, is_residual: bool = False):
    """Normal initialiser annotated with logical axes.

    Kernels that write to the residual stream are scaled by 1/sqrt(2 * depth), as in GPT-2
    (Radford et al. 2019, section 2.3).
    """
    scale = 1.0 / math.sqrt(2 * config.num_layers) if is_residual else 1.0
    return nn.with_logical_partitioning(nn.initializers.normal(config.init_stddev * scale), axes)


def bias_init(*axes: str):
    """Zeros annotated with logical axes."""
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


def norm(config: ModelConfig, name: str) -> nn.LayerNorm | nn.RMSNorm:
    """The norm over embed, in float32: parameters scale [d] and, for LayerNorm, bias [d]."""
    if config.norm == "rms_norm":
        return _rms_norm(config, name, "embed")
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
        bias_init=bias_init("embed"),
        name=name,
    )


def _rms_norm(
    config: ModelConfig, name: str, *axes: str, over: int | tuple[int, ...] = -1
) -> nn.RMSNorm:
    """RMSNorm in float32 over the axes `over`, whose logical names are `axes`."""
    return nn.RMSNorm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        reduction_axes=over,
        feature_axes=over,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), axes),
        name=name,
    )


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


class SelfAttention(nn.Module):
    """Causal multi-head attention with an optional key-value cache.

    Padding stands at the right end of a row, so the causal mask alone keeps it out.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, *, decode: bool = False) -> jax.Array:
        """Attends.

        Args:
          x: [b, l, d] compute dtype.
          positions: [b, l] int32: of rotary embeddings; with the cache, where keys are written,
            and how far each query may look.
          decode: read and write the cache of `max_length` positions. Keys at positions beyond a
            row's own are never read before they are overwritten, so rows may differ in length.

        Returns:
          [b, l, d] compute dtype.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def projection(name: str, heads: int) -> jax.Array:
            return nn.DenseGeneral(
                (heads, config.head_dim),
                use_bias=config.attention_bias != "none",
                dtype=dtype,
                kernel_init=kernel_init(config, "embed", "heads", "kv"),
                bias_init=bias_init("heads", "kv"),
                name=name,
            )(x)

        query, key = projection("query", config.num_heads), projection("key", config.kv_heads)
        value = projection("value", config.kv_heads)
        if config.qk_norm != "none":
            query, key = self._normed(query, "query_norm"), self._normed(key, "key_norm")
        if config.position_embedding == "rotary":
            query = rotate(query, positions, config.rotary_base)
            key = rotate(key, positions, config.rotary_base)
        if decode:
            key, value = self._update_cache(key, value, positions)
            # [b, 1, l, max_length]: query i sees cache slots up to its own position.
            mask = (jnp.arange(config.max_length) <= positions[..., None])[:, None]
            out = jax.nn.dot_product_attention(query, key, value, mask=mask)
        else:
            out = jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                implementation=_attention_implementation(query),
            )
        return nn.DenseGeneral(
            config.embed_dim,
            axis=(-2, -1),
            use_bias=config.attention_bias == "all",
            dtype=dtype,
            kernel_init=kernel_init(config, "heads", "kv", "embed", is_residual=True),
            bias_init=bias_init("embed"),
            name="out",
        )(out)

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        """Normalises queries or keys [b, l, h, k], each head by itself or all together."""
        if self.config.qk_norm == "head":
            out = _rms_norm(self.config, name, "kv")(x)
        else:
            out = _rms_norm(self.config, name, "heads", "kv", over=(-2, -1))(x)
        return out.astype(x.dtype)

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


def _attention_implementation(query: jax.Array) -> Literal["cudnn", "xla"]:
    """Flash attention by cuDNN where it can: it keeps no [b, h, l, l] array for the gradient."""
    length, head_dim = query.shape[1], query.shape[3]
    is_supported = query.dtype == jnp.bfloat16 and length % 64 == 0 and head_dim in (64, 128)
    return "cudnn" if is_supported and jax.default_backend() == "gpu" else "xla"


def activation(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """Returns the non-linearity of feed-forward networks and experts."""
    return getattr(jax.nn, config.activation)


class Mlp(nn.Module):
    """Dense feed-forward network: wo(act(wi(x))), or wo(act(wg(x)) * wi(x)) if gated.

    Attributes:
      config: the model.
      mlp_dim: hidden width; that of the model's dense layers by default.
    """

    config: ModelConfig
    mlp_dim: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, l, d] to [b, l, d] in the compute dtype."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def to_hidden(name: str) -> jax.Array:
            return nn.Dense(
                self.mlp_dim or config.dense_width,
                use_bias=config.has_mlp_bias,
                dtype=dtype,
                kernel_init=kernel_init(config, "embed", "mlp"),
                bias_init=bias_init("mlp"),
                name=name,
            )(x)

        hidden = to_hidden("wi")
        if config.is_gated:
            hidden = activation(config)(to_hidden("wg")) * hidden
        else:
            hidden = activation(config)(hidden)
        return nn.Dense(
            config.embed_dim,
            use_bias=config.has_mlp_bias,
            dtype=dtype,
            kernel_init=kernel_init(config, "mlp", "embed", is_residual=True),
            bias_init=bias_init("embed"),
            name="wo",
        )(hidden)
