"""The mixture-of-experts layer as a Flax module: parameters, router and metrics."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.models import layers, routing
from uncurl_jax.models.expert_parallel import Experts, MoeOutput, apply_moe
from uncurl_jax.partitioning import TOKEN_AXES, axis_size


class MoeLayer(nn.Module):
    """Router and experts of one layer.

    Sows into `intermediates` the five float32 scalars that T5X's MoE models report
    (auxiliary_loss and router_z_loss already weighted), and into `router_observations` what
    calibration reads, when that collection is mutable.

    Attributes:
      config: the model.
      layer: index of this layer, which picks its number of experts.
      mesh: None on one device.
      num_groups: token groups that share slots; by default one per device that holds tokens.
    """

    config: ModelConfig
    layer: int
    mesh: Mesh | None = None
    num_groups: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, *, is_training: bool = False, is_dropless: bool = False
    ) -> jax.Array:
        """Routes tokens through their experts.

        Args:
          x: [b, l, d] float32, the normalised input.
          mask: [b, l] bool; tokens outside it take no slot, count nowhere and get zeros.
          is_training: training capacity and jitter.
          is_dropless: every token reaches its experts, whatever the configuration says.

        Returns:
          [b, l, d] float32, to be added to the residual stream.
        """
        config, num_experts = self.config, self.config.num_experts[self.layer]
        choice = self._route(x, num_experts, is_training=is_training)
        experts = self._experts(num_experts)

        batch, length, dim = x.shape
        groups = self.num_groups or (axis_size(self.mesh, TOKEN_AXES) if self.mesh else 1)
        tokens = -(-batch * length // groups)

        def grouped(array: jax.Array, width: int) -> jax.Array:
            flat = array.reshape(batch * length, width)
            flat = jnp.pad(flat, ((0, groups * tokens - batch * length), (0, 0)))
            return flat.reshape(groups, tokens, width)

        topk = config.num_selected_experts
        capacity = (
            None
            if is_dropless
            else config.expert_capacity(self.layer, tokens, is_training=is_training)
        )
        out = apply_moe(
            grouped(x.astype(experts.wi.dtype), dim),
            grouped(choice.expert_index, topk),
            grouped(choice.gate, topk),
            grouped(mask, 1)[..., 0],
            experts,
            capacity=capacity,
            mesh=self.mesh,
        )
        y = out.y.reshape(-1, dim)[: batch * length].reshape(batch, length, dim)
        is_kept = out.is_kept.reshape(-1, topk)[: batch * length].reshape(batch, length, topk)
        self._sow(choice, out._replace(is_kept=is_kept), mask)
        return y

    def _route(self, x: jax.Array, num_experts: int, *, is_training: bool) -> routing.RouterChoice:
        config = self.config
        x = x.astype(jnp.float32)
        if is_training and config.router_jitter:
            noise = jax.random.uniform(
                self.make_rng("jitter"),
                x.shape,
                minval=1.0 - config.router_jitter,
                maxval=1.0 + config.router_jitter,
            )
            x = x * noise
        logits = nn.Dense(
            num_experts,
            use_bias=False,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=layers.kernel_init(config, "embed", "unmodeled"),
            name="router",
        )(x)
        return routing.choose_experts(
            logits, config.num_selected_experts, normalize_gates=config.normalize_gates
        )

    def _experts(self, num_experts: int) -> Experts:
        config = self.config
        dim, mlp = config.embed_dim, config.mlp_dim
        return ExpertParameters(config, name="experts")(num_experts, dim, mlp)

    def _sow(self, choice: routing.RouterChoice, out: MoeOutput, mask: jax.Array) -> None:
        config = self.config
        topk = config.num_selected_experts
        weight = mask.astype(jnp.float32)
        num_tokens = jnp.maximum(weight.sum(), 1.0)
        num_kept = out.is_kept.astype(jnp.float32).sum()
        flat_mask = mask.reshape(-1)
        num_experts = choice.logits.shape[-1]
        balance = routing.load_balancing_loss(
            choice.probabilities.reshape(-1, num_experts),
            choice.expert_index.reshape(-1, topk),
            flat_mask,
        )
        z_loss = routing.router_z_loss(choice.logits.reshape(-1, num_experts), flat_mask)
        left_behind = jnp.sum(weight * ~out.is_kept.any(axis=-1)) / num_tokens
        metrics = {
            "auxiliary_loss": config.auxiliary_loss_weight * balance,
            "router_z_loss": config.router_z_loss_weight * z_loss,
            "fraction_tokens_left_behind": left_behind,
            "expert_usage": num_kept / jnp.maximum(out.num_slots, 1.0),
            "router_confidence": jnp.sum(choice.gate * out.is_kept) / jnp.maximum(num_kept, 1.0),
        }
        for name, value in metrics.items():
            self.sow("intermediates", name, value)
        observation = {
            "logits": choice.logits,
            "expert_index": choice.expert_index,
            "gate": choice.gate,
            "is_kept": out.is_kept,
        }
        self.sow("router_observations", "observation", observation)


class ExpertParameters(nn.Module):
    """Declares the stacked parameters of a layer's experts, cast to the compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, num_experts: int, dim: int, mlp: int) -> Experts:
        """Returns the parameters of `num_experts` experts."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        kernel, bias = layers.kernel_init, layers.bias_init

        def parameter(name: str, init: Any, *shape: int) -> Any:
            return jnp.asarray(cast(Any, self.param(name, init, (num_experts, *shape))), dtype)

        to_residual = kernel(config, "expert", "expert_mlp", "embed", is_residual=True)
        return Experts(
            wi=parameter("wi", kernel(config, "expert", "embed", "expert_mlp"), dim, mlp),
            wi_bias=parameter("wi_bias", bias("expert", "expert_mlp"), mlp),
            wo=parameter("wo", to_residual, mlp, dim),
            wo_bias=parameter("wo_bias", bias("expert", "embed"), dim),
        )
