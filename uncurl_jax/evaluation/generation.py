"""Greedy and temperature sampling with the key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import Model, build
from uncurl_jax.models.decoder import Params
from uncurl_jax.partitioning import (
    TOKEN_AXES,
    ExpertAxes,
    axis_size,
    batch_sharding,
    parameter_spec,
)

_PAD_ID = 0


class Decoded(NamedTuple):
    """What the model makes of the tokens so far: b batch.

    Attributes:
      logits: [b, vocab] float32 of each row's next token.
      cache: keys and values of every position, [b, max_length, heads, head_dim] per layer; with an
        encoder also those of the prompt and its mask.
    """

    logits: jax.Array
    cache: Any


def prefill(model: Model, params: Params, inputs: jax.Array, lengths: jax.Array) -> Decoded:
    """Reads prompts into a new cache.

    Args:
      model: on one device or on a mesh.
      params: its parameters.
      inputs: [b, l] int32. A decoder's begin with its BOS, as its targets shifted right do; an
        encoder's are the prompt itself.
      lengths: [b] int32, how many of them count.
    """
    places = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    mask = places < lengths[:, None]
    if model.config.has_encoder:
        start = jnp.full((inputs.shape[0], 1), _PAD_ID, jnp.int32)
        arguments: dict[str, Any] = {
            "inputs": start,
            "positions": jnp.zeros_like(start),
            "encoder_inputs": inputs,
            "encoder_mask": mask,
        }
    else:
        arguments = {
            "inputs": inputs,
            "mask": mask,
            "positions": places,
            "logit_positions": (lengths - 1)[:, None],
        }
    logits, variables = model.apply({"params": params}, **arguments, decode=True, mutable=["cache"])
    return Decoded(logits[:, 0], variables["cache"])


def decode_step(
    model: Model,
    params: Params,
    cache: Any,
    token: jax.Array,
    positions: jax.Array,
    is_running: jax.Array,
) -> Decoded:
    """Reads one more token of each row.

    Args:
      model: on one device or on a mesh.
      params: its parameters.
      cache: of the tokens before.
      token: [b] int32.
      positions: [b] int32, the token's place in its row; with an encoder, in the answer.
      is_running: [b] bool; rows that have ended take no expert's time.
    """
    logits, variables = model.apply(
        {"params": params, "cache": cache},
        token[:, None],
        is_running[:, None],
        positions[:, None],
        decode=True,
        mutable=["cache"],
    )
    return Decoded(logits[:, 0], variables["cache"])


class DecodePrograms(NamedTuple):
    """Prefill and decode step, compiled for a device or a mesh.

    Attributes:
      prefill: (params, inputs, lengths) -> Decoded.
      step: (params, cache, token, positions, is_running) -> Decoded; the cache is donated.
    """

    prefill: Any
    step: Any


@functools.lru_cache(maxsize=16)
def compiled_decode(
    config: ModelConfig, mesh: Mesh | None = None, expert_axes: ExpertAxes | None = None
) -> DecodePrograms:
    """Returns the programs that serve a model token by token.

    On a mesh, rows and their caches are divided over the devices that hold tokens, heads over
    `model`; the number of rows is a multiple of data * expert partitions.
    """
    model = build(config, mesh, expert_axes=expert_axes)
    shardings = None
    if mesh is not None:
        caches = jax.tree.map(
            lambda array: array.sharding, abstract_cache(config, axis_size(mesh, TOKEN_AXES), mesh)
        )
        # _make, because this tuple holds shardings in the places of arrays.
        shardings = Decoded._make([batch_sharding(mesh), caches])
    return DecodePrograms(
        jax.jit(functools.partial(prefill, model), out_shardings=shardings),
        jax.jit(functools.partial(decode_step, model), out_shardings=shardings, donate_argnums=1),
    )


def abstract_cache(config: ModelConfig, batch_size: int, mesh: Mesh | None = None) -> Any:
    """Returns the tree of ShapeDtypeStructs of a cache, with shardings if a mesh is given."""
    arguments = {"inputs": jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)}
    if config.has_encoder:
        prompt = jax.ShapeDtypeStruct((batch_size, config.max_length), jnp.int32)
        arguments["encoder_inputs"] = prompt
    init = functools.partial(build(config).init, decode=True)
    cache = jax.eval_shape(init, jax.random.key(0), **arguments)["cache"]
    if mesh is None:
        return cache

    def with_sharding(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = ("batch", "length", "heads", "kv")[: len(array.shape)]
        spec = parameter_spec(names, array.shape, mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, cache)


class _Generation(NamedTuple):
    """One pass of the loop of `generate`: b batch, n max_new_tokens."""

    index: jax.Array  # int32 scalar, tokens generated so far
    decoded: Decoded
    positions: jax.Array  # [b] int32, where the next token goes
    tokens: jax.Array  # [b, n] int32
    is_done: jax.Array  # [b] bool


@functools.lru_cache(maxsize=16)
def compiled_generate(
    config: ModelConfig, max_new_tokens: int, is_greedy: bool, eos_id: int
) -> Any:
    """Returns the compiled loop (params, inputs, lengths, temperature, seed) -> tokens [b, n]."""
    model = build(config)

    def generate(
        params: Params, inputs: jax.Array, lengths: jax.Array, temperature: jax.Array, seed: int
    ) -> jax.Array:
        batch = inputs.shape[0]
        key = jax.random.key(seed)

        def is_running(state: _Generation) -> jax.Array:
            return (state.index < max_new_tokens) & ~state.is_done.all()

        def step(state: _Generation) -> _Generation:
            logits, cache = state.decoded
            if is_greedy:
                token = logits.argmax(axis=-1)
            else:
                step_key = jax.random.fold_in(key, state.index)
                token = jax.random.categorical(step_key, logits / temperature)
            token = jnp.where(state.is_done, _PAD_ID, token.astype(jnp.int32))
            tokens = state.tokens.at[:, state.index].set(token)
            is_done = state.is_done | (token == eos_id)
            decoded = decode_step(model, params, cache, token, state.positions, ~is_done)
            return _Generation(state.index + 1, decoded, state.positions + 1, tokens, is_done)

        # The padding id that an answer begins with stands at its position 0.
        begin = jnp.ones_like(lengths) if config.has_encoder else lengths
        first = _Generation(
            jnp.int32(0),
            prefill(model, params, inputs, lengths),
            begin,
            jnp.full((batch, max_new_tokens), _PAD_ID, jnp.int32),
            jnp.zeros((batch,), bool),
        )
        return jax.lax.while_loop(is_running, step, first).tokens

    return jax.jit(generate)


def prompt_room(config: ModelConfig, max_new_tokens: int) -> int:
    """Returns how many tokens a prompt may have for so many new ones; below 1 if none fits."""
    if not config.has_encoder:
        return config.max_length - max_new_tokens
    if max_new_tokens > config.max_length:
        return 0
    return config.max_length - (config.encoder_end_id is not None)


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    bos_id: int | None = _PAD_ID,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts, all at once; experts are dropless, so a row's result is its own.

    Args:
      model: what to run, on one device.
      prompts: token ids, each possibly of another length.
      max_new_tokens: at most so many are made.
      eos_id: ends a row; not returned.
      bos_id: what a decoder reads before a prompt, as in training; None for models that read the
        prompt alone.
      temperature: 0 takes the most likely token, else the softmax of logits / temperature is
        sampled with `seed`.
      seed: of the samples.

    Returns:
      The new tokens of each prompt.

    Raises:
      InputError: If a prompt and its continuation do not fit the model's max_length, or a decoder
        would read nothing at all.
    """
    if model.mesh is not None:
        raise InputError("Generation runs on one device: load the model without a mesh.")
    if temperature < 0:
        raise InputError(f"temperature must be at least 0, got {temperature}.")
    config = model.config
    longest = max(len(prompt) for prompt in prompts)
    if longest > prompt_room(config, max_new_tokens):
        raise InputError(
            f"A prompt and max_new_tokens must fit max_length={config.max_length}, got "
            f"{longest} + {max_new_tokens}: shorten one of them."
        )
    rows = [_prompt_row(config, prompt, bos_id) for prompt in prompts]
    if not all(rows):
        raise InputError(
            "A prompt must have a token for a model without a token that begins texts, got an "
            "empty prompt: give it a text."
        )
    lengths = np.asarray([len(row) for row in rows], np.int32)
    width = min(-(-int(lengths.max()) // 32) * 32, config.max_length)
    inputs = np.zeros((len(prompts), width), np.int32)
    for place, row in enumerate(rows):
        inputs[place, : len(row)] = row
    compiled = compiled_generate(config, max_new_tokens, temperature == 0, eos_id)
    tokens = jax.device_get(
        compiled(model.params, inputs, lengths, np.float32(max(temperature, 1e-6)), seed)
    )
    results = []
    for row in tokens:
        ends = np.flatnonzero(row == eos_id)
        results.append([int(token) for token in row[: ends[0] if len(ends) else None]])
    return results


def _prompt_row(config: ModelConfig, prompt: Sequence[int], bos_id: int | None) -> list[int]:
    """What a model reads of a prompt before it makes the first token."""
    if config.has_encoder:
        return [*prompt, *([] if config.encoder_end_id is None else [config.encoder_end_id])]
    # Inputs are targets shifted right.
    return [*([] if bos_id is None else [bos_id]), *prompt]
