"""Parts of a decoder layer on their own, for forward passes that never hold a whole layer.

Each is the decoder's own code over a part of its parameters: the same names, the same mathematics.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from uncurl_jax.models import routing
from uncurl_jax.models.decoder import DecoderLayer
from uncurl_jax.models.moe import MoeLayer


class DecoderLayerWithoutExperts(DecoderLayer):
    """A decoder layer up to its experts; its parameters are the layer's without `moe`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream and its norm.

        Args:
          x: [b, l, d] compute dtype.

        Returns:
          The residual stream [b, l, d] in the compute dtype, which is the layer's result if it is
          dense, else what its experts' outputs are to be added to; and what an MoE layer sees,
          [b, l, d] float32.
        """
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        x, normed = self.attend(x, positions)
        if self.config.num_experts[self.layer] == 0:
            x = self.feed_forward(x, normed)
        return x, normed


class Router(MoeLayer):
    """An MoE layer's router, as in evaluation; its parameters are the layer's `router`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> routing.RouterChoice:
        """Chooses experts for x [b, l, d] float32, the normalised input."""
        width = self.config.router_width(self.layer)
        return self._route(x, width, is_training=False)


class SharedExpert(MoeLayer):
    """An MoE layer's shared expert; its parameters are the layer's `shared` and `shared_gate`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [b, l, d] float32, the normalised input, to [b, l, d] float32."""
        return self._shared(x)
