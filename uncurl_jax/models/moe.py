"""The mixture-of-experts layer as a Flax module: parameters, router and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.models import layers, routing
from uncurl_jax.models.expert_parallel import Experts, MoeOutput, apply_experts, apply_moe
from uncurl_jax.partitioning import TOKEN_AXES, axis_size


class MoeLayer(nn.Module):
    """Router and experts of one layer.

    Sows into `intermediates` the five float32 scalars that T5X's MoE models report
    (auxiliary_loss and router_z_loss already weighted), and what calibration reads into three
    collections, each when it is mutable: `router_observations`, `output_observations` (outputs of
    the selected experts) and `all_output_observations` (sums of every expert's outputs; costs
    experts / k times the layer's arithmetic).

    Attributes:
      config: the model.
      layer: index of this layer, which picks its number of experts.
      mesh: None on one device.
      num_groups: token groups that share slots; by default one per device that holds tokens.
      expert_axes: mesh axes that divide the experts; () if every device holds them all.
    """

    config: ModelConfig
    layer: int
    mesh: Mesh | None = None
    num_groups: int | None = None
    expert_axes: tuple[str, ...] = ("expert",)

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
        row = self._expert_row()
        choice = self._route(x, num_experts if row is None else len(row), is_training=is_training)
        expert_index = choice.expert_index if row is None else _places(choice.expert_index, row)
        experts = ExpertParameters(config, name="experts")(num_experts)

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
            grouped(x.astype(config.dtype), dim),
            grouped(expert_index, topk),
            grouped(choice.gate, topk),
            grouped(mask, 1)[..., 0],
            experts,
            layers.activation(config),
            capacity=capacity,
            mesh=self.mesh,
            expert_axes=self.expert_axes,
        )
        y = out.y.reshape(-1, dim)[: batch * length].reshape(batch, length, dim)
        is_kept = out.is_kept.reshape(-1, topk)[: batch * length].reshape(batch, length, topk)
        self._sow(x, choice, out._replace(is_kept=is_kept), mask)
        if not self.is_initializing():
            self._sow_outputs(x, expert_index, mask, experts, grouped)
        if config.shared_mlp_dim:
            y = y + jnp.where(mask[..., None], self._shared(x), 0.0)
        return y

    def _shared(self, x: jax.Array) -> jax.Array:
        """The shared expert: [b, l, d] float32 in and out."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = layers.Mlp(config, config.shared_mlp_dim, name="shared")(x.astype(dtype))
        if not config.has_shared_gate:
            return y.astype(jnp.float32)
        gate = nn.Dense(
            1,
            use_bias=False,
            dtype=jnp.float32,
            kernel_init=layers.kernel_init(config, "embed", "unmodeled"),
            name="shared_gate",
        )(x)
        return jax.nn.sigmoid(gate) * y

    def _sow_outputs(
        self,
        x: jax.Array,
        expert_index: jax.Array,
        mask: jax.Array,
        experts: Experts,
        grouped: Callable[[jax.Array, int], jax.Array],
    ) -> None:
        """Observes the experts' outputs before gates and drops, if asked to."""
        activation = layers.activation(self.config)
        inputs = x.astype(self.config.dtype)
        if self.is_mutable_collection("output_observations"):
            outputs = []
            for choice in range(expert_index.shape[-1]):
                # One choice at a time, dropless and with gate 1: y is the expert's output.
                index = grouped(expert_index[..., choice : choice + 1], 1)
                out = apply_moe(
                    grouped(inputs, x.shape[-1]),
                    index,
                    jnp.ones(index.shape, jnp.float32),
                    grouped(mask, 1)[..., 0],
                    experts,
                    activation,
                    capacity=None,
                    mesh=self.mesh,
                    expert_axes=self.expert_axes,
                )
                outputs.append(out.y.reshape(-1, x.shape[-1])[: mask.size])
            stacked = jnp.stack(outputs, axis=1).reshape(*expert_index.shape, x.shape[-1])
            self.sow("output_observations", "outputs", stacked)
        if self.is_mutable_collection("all_output_observations"):
            flat, weight = inputs.reshape(1, -1, x.shape[-1]), mask.reshape(-1).astype(jnp.float32)

            def output_sum(expert: Experts) -> jax.Array:
                y = apply_experts(flat, jax.tree.map(lambda array: array[None], expert), activation)
                return jnp.einsum(
                    "td,t->d",
                    y[0].astype(jnp.float32),
                    weight,
                    precision=jax.lax.Precision.HIGHEST,
                )

            sums = jax.lax.map(output_sum, experts)
            self.sow("all_output_observations", "all_output_sum", sums)

    def _expert_row(self) -> jax.Array | None:
        """The expert of each of the router's columns; None if that is its own number.

        It is the variable `row` of the collection `expert_maps`, so that one program serves models
        that choose from the same experts, or else the configuration's. A row of shape
        [column, copy] is of experts that are there several times, which take tokens in turn.
        """
        if self.has_variable("expert_maps", "row"):
            return self.get_variable("expert_maps", "row")
        expert_map = self.config.expert_map
        row = expert_map[self.layer] if expert_map is not None else None
        return None if row is None else jnp.asarray(row, jnp.int32)

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

    def _sow(
        self, x: jax.Array, choice: routing.RouterChoice, out: MoeOutput, mask: jax.Array
    ) -> None:
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
            "inputs": x,
            "logits": choice.logits,
            "expert_index": choice.expert_index,
            "gate": choice.gate,
            "is_kept": out.is_kept,
        }
        self.sow("router_observations", "observation", observation)


def _places(column: jax.Array, row: jax.Array) -> jax.Array:
    """Maps the router's columns [b, l, k] to experts by a row [column] or [column, copy]."""
    if row.ndim == 1:
        return row[column]
    batch, length, _ = column.shape
    token = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length, 1)
    return row[column, token % row.shape[1]]


class ExpertParameters(nn.Module):
    """Declares the stacked parameters of a layer's experts, cast to the compute dtype.

    Kernels that have scales in the collection `scales` are int8 and stay so.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, num_experts: int) -> Experts:
        """Returns the parameters of `num_experts` experts."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dim, mlp = config.embed_dim, config.mlp_dim
        kernel, bias = layers.kernel_init, layers.bias_init

        def parameter(name: str, init: Any, *shape: int) -> Any:
            array = cast(Any, self.param(name, init, (num_experts, *shape)))
            if self.has_variable("scales", name):
                arrays[f"{name}_scale"] = self.get_variable("scales", name)
                return array
            return jnp.asarray(array, dtype)

        to_hidden = kernel(config, "expert", "embed", "expert_mlp")
        to_residual = kernel(config, "expert", "expert_mlp", "embed", is_residual=True)
        arrays: dict[str, Any] = {}
        arrays["wi"] = parameter("wi", to_hidden, dim, mlp)
        arrays["wo"] = parameter("wo", to_residual, mlp, dim)
        if config.is_gated:
            arrays["wg"] = parameter("wg", to_hidden, dim, mlp)
        if config.has_mlp_bias:
            arrays["wi_bias"] = parameter("wi_bias", bias("expert", "expert_mlp"), mlp)
            arrays["wo_bias"] = parameter("wo_bias", bias("expert", "embed"), dim)
            if config.is_gated:
                arrays["wg_bias"] = parameter("wg_bias", bias("expert", "expert_mlp"), mlp)
        return Experts(**arrays)
