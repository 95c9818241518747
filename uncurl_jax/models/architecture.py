"""Every architecture behind one interface: build a model, feed it a batch, make its parameters.

`read_batch` turns rows of a token cache into what a model reads, a decoder alone or an encoder and
a decoder; the rest of the package needs no case distinction.

Axes: b batch, l length of a row, n places of a row that can count in a loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.decoder import Decoder, Params
from uncurl_jax.models.encoder_decoder import EncoderDecoder
from uncurl_jax.partitioning import ExpertAxes, layer_expert_axes, parameter_spec

Model = Decoder | EncoderDecoder


def build(
    config: ModelConfig,
    mesh: Mesh | None = None,
    num_groups: int | None = None,
    expert_axes: ExpertAxes | None = None,
) -> Model:
    """Returns the Flax module of a configuration.

    Args:
      config: the model.
      mesh: None on one device; else MoE layers compute through shard_map on it.
      num_groups: see `moe.MoeLayer`.
      expert_axes: mesh axes that divide each layer's experts; see partitioning.ExpertAxes.
    """
    module = EncoderDecoder if config.has_encoder else Decoder
    return module(config, mesh, num_groups, expert_axes)


class ModelInputs(NamedTuple):
    """A batch as a model reads it, and what its logits are compared with.

    Attributes:
      arguments: keyword arguments of the model's `__call__`; its logits are those of the places
        below.
      masks: for each layer [b, length of its stack] bool, the real tokens that it sees.
      targets: [b, n] int32.
      weights: [b, n] float32, 0 where a target does not count.
    """

    arguments: dict[str, Any]
    masks: tuple[jax.Array, ...]
    targets: jax.Array
    weights: jax.Array


def read_batch(config: ModelConfig, batch: Any, target_length: int | None = None) -> ModelInputs:
    """Turns rows of a token cache into a model's inputs; may be traced.

    A decoder reads whole rows. Of an encoder-decoder the encoder reads the prompt, ended by
    `encoder_end_id`, and the decoder the answer, both filled up on the right.

    Args:
      config: the model.
      batch: a `token_cache.Batch`: inputs, targets, weights and mask, all [b, l]. The weighted
        targets of a row are consecutive; with an encoder they are all that follows the prompt.
      target_length: n, at least what the weighted targets of any row take up; None takes l.

    Returns:
      The inputs.
    """
    if config.has_encoder:
        return _read_prompt_and_answer(config, batch, target_length)
    window, targets, weights = select_targets(batch, target_length)
    arguments: dict[str, Any] = {"inputs": batch.inputs, "mask": batch.mask}
    if window is not None:
        arguments["logit_positions"] = window
    return ModelInputs(arguments, (batch.mask,) * config.num_layers, targets, weights)


def _read_prompt_and_answer(
    config: ModelConfig, batch: Any, target_length: int | None
) -> ModelInputs:
    length = batch.targets.shape[-1]
    places = jnp.arange(length, dtype=jnp.int32)
    first = jnp.argmax(batch.weights != 0, axis=-1).astype(jnp.int32)[:, None]
    encoder_inputs = jnp.where(places < first, batch.targets, 0)
    encoder_mask = jnp.asarray(batch.mask) & (places < first)
    if config.encoder_end_id is not None:
        # Filling rows, which have no token at all, get none here.
        is_end = jnp.asarray(batch.mask) & (places == first)
        encoder_inputs = jnp.where(is_end, config.encoder_end_id, encoder_inputs)
        encoder_mask |= is_end

    window = first + places[: min(target_length or length, length)]
    inside = jnp.minimum(window, length - 1)

    def answer(array: jax.Array) -> jax.Array:
        taken = jnp.take_along_axis(jnp.asarray(array), inside, axis=-1)
        return jnp.where(window < length, taken, jnp.zeros_like(taken))

    targets, mask = answer(batch.targets), answer(batch.mask)
    arguments = {
        "inputs": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "mask": mask,
        "encoder_inputs": encoder_inputs,
        "encoder_mask": encoder_mask,
    }
    num_encoder = config.num_encoder_layers
    masks = (encoder_mask,) * num_encoder + (mask,) * (config.num_layers - num_encoder)
    return ModelInputs(arguments, masks, targets, answer(batch.weights))


def select_targets(
    batch: Any, target_length: int | None
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Picks the places of each row that can count in a loss or a score.

    Args:
      batch: with `targets` and `weights`, both [b, l].
      target_length: n, at least what the weighted targets of any row take up; None or l takes
        whole rows.

    Returns:
      `Decoder`'s `logit_positions` ([b, n] int32, consecutive; None for whole rows), and the
      targets and weights there.
    """
    length = batch.weights.shape[-1]
    if target_length is None or target_length >= length:
        return None, batch.targets, batch.weights
    first = jnp.argmax(batch.weights != 0, axis=-1)
    start = jnp.minimum(first, length - target_length)
    window = (start[:, None] + jnp.arange(target_length)).astype(jnp.int32)
    targets = jnp.take_along_axis(batch.targets, window, axis=-1)
    return window, targets, jnp.take_along_axis(batch.weights, window, axis=-1)


class ParameterCount(NamedTuple):
    """Parameters of a model.

    Attributes:
      total: all of them.
      active: those that one token's forward pass uses (k experts per MoE layer).
    """

    total: int
    active: int


def _init(config: ModelConfig) -> Callable[[jax.Array], Any]:
    """Returns the function from a key to boxed parameters; the tokens it traces do not matter."""
    tokens = jnp.zeros((1, min(2, config.max_length)), jnp.int32)
    prompt: dict[str, Any] = {"encoder_inputs": tokens} if config.has_encoder else {}
    return lambda key: build(config).init(key, tokens, **prompt)["params"]


def _boxed_abstract_params(config: ModelConfig) -> Any:
    return jax.eval_shape(_init(config), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Any:
    """Returns the tree of logical axis names (a PartitionSpec of names) of every parameter."""
    return nn.get_partition_spec(_boxed_abstract_params(config))


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, expert_axes: ExpertAxes | None = None
) -> Any:
    """Returns the tree of float32 ShapeDtypeStructs, with shardings if a mesh is given."""
    boxed = _boxed_abstract_params(config)
    params = nn.meta.unbox(boxed)
    if mesh is None:
        return params
    names = nn.get_partition_spec(boxed)

    def with_sharding(path: Any, array: jax.ShapeDtypeStruct, axes: Any) -> jax.ShapeDtypeStruct:
        top = path[0].key
        layer = int(top.removeprefix("layers_")) if top.startswith("layers_") else 0
        over = layer_expert_axes(expert_axes, layer)
        sharding = NamedSharding(mesh, parameter_spec(tuple(axes), array.shape, mesh, over))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(with_sharding, params, names)


def init_params(
    config: ModelConfig,
    seed: int,
    mesh: Mesh | None = None,
    expert_axes: ExpertAxes | None = None,
) -> Params:
    """Returns freshly initialised float32 parameters, born sharded if a mesh is given.

    The values depend on `seed` alone, not on the mesh.
    """
    return _compiled_init(config, mesh, expert_axes)(jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _compiled_init(
    config: ModelConfig, mesh: Mesh | None, expert_axes: ExpertAxes | None
) -> Callable[[jax.Array], Params]:
    """Returns the compiled function from a key to parameters, one for all seeds."""
    initialise = _init(config)

    def init(key: jax.Array) -> Params:
        return nn.meta.unbox(initialise(key))

    shardings = None
    if mesh is not None:
        abstract = abstract_params(config, mesh, expert_axes)
        shardings = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts parameters from shapes alone; nothing is allocated."""
    total = inactive = 0
    for path, array in jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]:
        size = math.prod(array.shape)
        total += size
        if "experts" in (entry.key for entry in path):
            inactive += size // array.shape[0] * (array.shape[0] - config.num_selected_experts)
    return ParameterCount(total, total - inactive)
