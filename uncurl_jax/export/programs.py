"""Prefill, decode and score as programs for any batch, length and platform.

Weights are arguments, {parameter path: array}, so models of one architecture share a program.

Axes: b batch, l length of a prompt, t scored targets, both symbolic in the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from uncurl_jax.checkpoints.state_writer import nested
from uncurl_jax.config import ModelConfig
from uncurl_jax.models.decoder import Decoder, token_log_probabilities

PLATFORMS = ("cpu", "cuda", "tpu")
# What stands beside a layer's parameters in `weights`.
EXPERT_MAP = "moe/expert_map"
SCALE_SUFFIX = "_scale"

Weights = Mapping[str, Any]


def variables_of(weights: Weights) -> dict[str, Any]:
    """Sorts weights into the collections of the Flax module.

    Args:
      weights: by path: parameters; "layers_<i>/moe/expert_map", [column] int32, the place in the
        expert arrays of each of the router's columns; and of int8 kernels, "..._scale".

    Returns:
      {"params", "expert_maps", "scales"}.
    """
    params, maps, scales = {}, {}, {}
    for path, array in weights.items():
        if path.endswith(EXPERT_MAP):
            maps[path.replace(EXPERT_MAP, "moe/row")] = array
        elif path.endswith(SCALE_SUFFIX):
            scales[path.removesuffix(SCALE_SUFFIX)] = array
        else:
            params[path] = array
    return {"params": nested(params), "expert_maps": nested(maps), "scales": nested(scales)}


def make_functions(config: ModelConfig) -> dict[str, Callable[..., Any]]:
    """Returns the three functions of a model; experts drop nothing in any.

    Args:
      config: the model, its `num_experts` the lengths of the expert arrays.
    """
    decoder = Decoder(config)
    observed = ["cache", "router_observations"]

    def apply(variables: dict[str, Any], *inputs: Any, **options: Any) -> dict[str, Any]:
        logits, found = decoder.apply(variables, *inputs, decode=True, mutable=observed, **options)
        return {
            "logits": logits[:, 0],
            "cache": found["cache"],
            "routing": _routing(found),
        }

    def prefill(weights: Weights, inputs: jax.Array, lengths: jax.Array) -> dict[str, Any]:
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
        return apply(
            variables_of(weights),
            inputs,
            positions < lengths[:, None],
            positions,
            logit_positions=(lengths - 1)[:, None],
        )

    def decode(
        weights: Weights,
        cache: Any,
        token: jax.Array,
        positions: jax.Array,
        is_running: jax.Array,
    ) -> dict[str, Any]:
        variables = {**variables_of(weights), "cache": cache}
        return apply(variables, token[:, None], is_running[:, None], positions[:, None])

    def score(
        weights: Weights,
        inputs: jax.Array,
        lengths: jax.Array,
        targets: jax.Array,
        target_positions: jax.Array,
        target_mask: jax.Array,
    ) -> dict[str, Any]:
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
        logits, found = decoder.apply(
            variables_of(weights),
            inputs,
            positions < lengths[:, None],
            positions,
            logit_positions=target_positions,
            mutable=["router_observations"],
        )
        log_probability = jnp.where(target_mask, token_log_probabilities(logits, targets), 0.0)
        return {
            "log_likelihood": log_probability.sum(axis=-1),
            "token_log_probabilities": log_probability,
            "routing": _routing(found),
        }

    return {"prefill": prefill, "decode": decode, "score": score}


def _routing(found: Any) -> dict[str, dict[str, jax.Array]]:
    """What each router chose, from what its layer sowed."""
    return {
        layer: {
            "expert_index": choice["expert_index"],
            "gate": choice["gate"],
            "router_logits": choice["logits"],
        }
        for layer, sown in found.get("router_observations", {}).items()
        for choice in sown["moe"]["observation"]
    }


def export_programs(
    config: ModelConfig,
    weights: Mapping[str, jax.ShapeDtypeStruct],
    platforms: tuple[str, ...] = PLATFORMS,
) -> dict[str, export.Exported]:
    """Exports the three functions with symbolic batch and lengths.

    Args:
      config: the model, its `num_experts` the lengths of the expert arrays.
      weights: shapes and dtypes by path.
      platforms: that the programs are to run on.

    Returns:
      {"prefill", "decode", "score"}.
    """
    functions = make_functions(config)
    weights = dict(weights)

    def integers(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def booleans(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bool_)

    limits = [f"l <= {config.max_length}"]
    batch, length, targets = export.symbolic_shape("b, l, t", constraints=limits)
    prompt = (integers(batch, length), integers(batch))
    scored = (integers(batch, targets), integers(batch, targets), booleans(batch, targets))
    # Dimensions belong to the constraints that they were made with, and decoding has no length.
    (rows,) = export.symbolic_shape("b")
    first = (integers(rows, 1), integers(rows))
    cache = jax.eval_shape(functions["prefill"], weights, *first)["cache"]
    arguments = {
        "prefill": prompt,
        "decode": (cache, integers(rows), integers(rows), booleans(rows)),
        "score": (*prompt, *scored),
    }
    return {
        name: export.export(jax.jit(functions[name]), platforms=platforms)(weights, *inputs)
        for name, inputs in arguments.items()
    }
