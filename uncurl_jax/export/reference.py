"""Reference inputs and outputs of a model, which a loaded artifact must reproduce.

Axes: b row, l length of the prompts, s tokens read one by one after them, t scored targets.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.state_writer import nested
from uncurl_jax.config import ModelConfig
from uncurl_jax.export.sources import POSITIONS, Source
from uncurl_jax.models.decoder import Decoder, Params, token_log_probabilities
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, place_batch

# Many short rows, in which no router is likely to waver, and a few longer ones.
_LENGTHS = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 10, 16, 28, 48)
_STEPS, _TARGETS = 2, 3


def _limits(difference: float, same_rows: float) -> dict[str, float]:
    return {"difference": difference, "same_rows": same_rows}


# Of `runner.compare`. On one platform programs and references differ by the order of additions;
# others round products of float32 too (TPUs by default to bfloat16).
TOLERANCES = {
    "float32": {"same_platform": _limits(1e-4, 0.75), "other_platform": _limits(2e-2, 0.125)},
    "bfloat16": {"same_platform": _limits(2e-2, 0.125), "other_platform": _limits(1e-1, 0.125)},
}


def reference_inputs(config: ModelConfig, vocabulary_size: int) -> dict[str, np.ndarray]:
    """Returns seeded random prompts of different lengths, and what follows them.

    Returns:
      "inputs" [b, l], "lengths" [b], "tokens" [b, s], and "targets", "target_positions" and
      "target_mask" [b, t], scored at the last places of each prompt.
    """
    generator = np.random.default_rng(0)
    lengths = np.minimum(_LENGTHS, max(1, config.max_length - _STEPS)).astype(np.int32)
    rows, longest = len(lengths), int(lengths.max())
    inputs = generator.integers(1, vocabulary_size, (rows, longest))
    inputs[:, 0] = 0
    inputs = np.where(np.arange(longest) < lengths[:, None], inputs, 0).astype(np.int32)
    steps = min(_STEPS, config.max_length - longest)
    positions = lengths[:, None] - _TARGETS + np.arange(_TARGETS, dtype=np.int32)
    return {
        "inputs": inputs,
        "lengths": lengths,
        "tokens": generator.integers(1, vocabulary_size, (rows, steps)).astype(np.int32),
        "targets": generator.integers(1, vocabulary_size, (rows, _TARGETS)).astype(np.int32),
        "target_positions": np.maximum(positions, 0),
        "target_mask": positions >= 0,
    }


def checkpoint_params(source: Source) -> Params:
    """Returns a checkpoint's parameters, float32, the position table as long as it is served."""
    names = list(source.reader.parameters())
    arrays = source.reader.stream((f"{layout.TARGET}/{name}", None) for name in names)
    params: dict[str, jax.Array] = {}
    for name, array in zip(names, arrays, strict=True):
        if name == POSITIONS:
            array = array[: source.config.max_length]
        params[name] = jnp.asarray(array, jnp.float32)
    return nested(params)


def checkpoint_outputs(
    source: Source, inputs: dict[str, np.ndarray], params: Params | None = None
) -> dict[str, np.ndarray]:
    """Computes the outputs from the checkpoint, with nothing of what makes up an artifact.

    Args:
      source: the checkpoint.
      inputs: what `reference_inputs` returned.
      params: other parameters of its architecture in their place.

    Returns:
      What `runner.run_reference` returns for the artifact's model.
    """
    variables = {"params": checkpoint_params(source) if params is None else params}
    return forward_outputs(Decoder(source.config), variables, inputs)


def forward_outputs(
    decoder: Decoder, variables: dict[str, Any], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Computes the outputs by one forward pass over prompts and what follows them, without a cache.

    Args:
      decoder: the model, on one device or on a mesh.
      variables: its collections.
      inputs: what `reference_inputs` returned.
    """
    lengths = inputs["lengths"]
    width, steps = inputs["inputs"].shape[1], inputs["tokens"].shape[1]
    rows = np.arange(len(lengths))
    tokens = np.pad(inputs["inputs"], ((0, 0), (0, steps)))
    for step in range(steps):
        tokens[rows, lengths + step] = inputs["tokens"][:, step]
    mask = np.arange(width + steps) < (lengths + steps)[:, None]
    # On a mesh rows divide evenly among the devices that hold tokens.
    shards = axis_size(decoder.mesh, TOKEN_AXES) if decoder.mesh is not None else 1
    filled = np.resize(rows, -(-len(rows) // shards) * shards)

    @jax.jit
    def forward(variables: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        logits, found = decoder.apply(variables, tokens, mask, mutable=["router_observations"])
        return logits, found.get("router_observations", {})

    placed = place_batch((tokens[filled], mask[filled]), decoder.mesh)
    logits, observed = jax.device_get(forward(variables, *placed))
    outputs = {"prefill_logits": logits[rows, lengths - 1]}
    for step in range(steps):
        outputs[f"decode_logits/{step}"] = logits[rows, lengths + step]
    is_prompt = np.arange(width) < lengths[:, None]
    for layer, sown in observed.items():
        (choice,) = sown["moe"]["observation"]
        chosen = choice["expert_index"][rows]
        outputs[f"prefill_experts/{layer}"] = np.where(is_prompt[..., None], chosen[:, :width], -1)
        for step in range(steps):
            outputs[f"decode_experts/{step}/{layer}"] = chosen[rows, lengths + step][:, None]
    scored = token_log_probabilities(
        jnp.asarray(logits[rows[:, None], inputs["target_positions"]]),
        jnp.asarray(inputs["targets"]),
    )
    outputs["token_log_probabilities"] = np.where(inputs["target_mask"], scored, 0.0)
    return outputs
