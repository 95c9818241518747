"""Dense feed-forward network, norms and initialisers that all parts of a model share.

Axes: b batch, l length, d embed, f mlp.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
        return rms_norm(config, name, "embed")
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
        bias_init=bias_init("embed"),
        name=name,
    )


def rms_norm(
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
