"""Greedy and temperature sampling with the key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.models.decoder import Decoder, Params

_PAD_ID = 0


class _DecodeState(NamedTuple):
    """One step of decoding: b batch, n max_new_tokens."""

    index: jax.Array  # int32 scalar, tokens generated so far
    logits: jax.Array  # [b, vocab] float32 of the next token
    positions: jax.Array  # [b] int32, where the next token goes
    tokens: jax.Array  # [b, n] int32
    is_done: jax.Array  # [b] bool
    cache: Any


@functools.lru_cache(maxsize=16)
def _compiled_generate(
    config: ModelConfig, max_new_tokens: int, is_greedy: bool, eos_id: int
) -> Any:
    decoder = Decoder(config)

    def generate(
        params: Params, inputs: jax.Array, lengths: jax.Array, temperature: jax.Array, seed: int
    ) -> jax.Array:
        batch, length = inputs.shape
        key = jax.random.key(seed)
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), inputs.shape)
        mask = positions < lengths[:, None]
        logits, variables = decoder.apply(
            {"params": params}, inputs, mask, positions, decode=True, mutable=["cache"]
        )
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]

        def is_running(state: _DecodeState) -> jax.Array:
            return (state.index < max_new_tokens) & ~state.is_done.all()

        def step(state: _DecodeState) -> _DecodeState:
            if is_greedy:
                token = state.logits.argmax(axis=-1)
            else:
                step_key = jax.random.fold_in(key, state.index)
                token = jax.random.categorical(step_key, state.logits / temperature)
            token = jnp.where(state.is_done, _PAD_ID, token.astype(jnp.int32))
            tokens = state.tokens.at[:, state.index].set(token)
            is_done = state.is_done | (token == eos_id)
            logits, variables = decoder.apply(
                {"params": params, "cache": state.cache},
                token[:, None],
                ~is_done[:, None],
                state.positions[:, None],
                decode=True,
                mutable=["cache"],
            )
            return _DecodeState(
                state.index + 1,
                logits[:, 0],
                state.positions + 1,
                tokens,
                is_done,
                variables["cache"],
            )

        first = _DecodeState(
            jnp.int32(0),
            last,
            lengths,
            jnp.full((batch, max_new_tokens), _PAD_ID, jnp.int32),
            jnp.zeros((batch,), bool),
            variables["cache"],
        )
        return jax.lax.while_loop(is_running, step, first).tokens

    return jax.jit(generate)


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts, all at once; experts are dropless, so a row's result is its own.

    Args:
      model: what to run, on one device.
      prompts: token ids, each possibly of another length.
      max_new_tokens: at most so many are made.
      eos_id: ends a row; not returned.
      temperature: 0 takes the most likely token, else the softmax of logits / temperature is
        sampled with `seed`.
      seed: of the samples.

    Returns:
      The new tokens of each prompt.

    Raises:
      InputError: If a prompt and its continuation do not fit the model's max_length.
    """
    if model.mesh is not None:
        raise InputError("Generation runs on one device: load the model without a mesh.")
    if temperature < 0:
        raise InputError(f"temperature must be at least 0, got {temperature}.")
    longest = max(len(prompt) for prompt in prompts)
    if longest + 1 + max_new_tokens > model.config.max_length + 1:
        raise InputError(
            f"A prompt and max_new_tokens must fit max_length={model.config.max_length}, got "
            f"{longest} + {max_new_tokens}: shorten one of them."
        )
    # Inputs are targets shifted right, so a prompt begins with the padding id as BOS.
    width = min(-(-(longest + 1) // 32) * 32, model.config.max_length)
    inputs = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, 1 : len(prompt) + 1] = prompt
    lengths = np.asarray([len(prompt) + 1 for prompt in prompts], np.int32)
    compiled = _compiled_generate(model.config, max_new_tokens, temperature == 0, eos_id)
    tokens = jax.device_get(
        compiled(model.params, inputs, lengths, np.float32(max(temperature, 1e-6)), seed)
    )
    results = []
    for row in tokens:
        ends = np.flatnonzero(row == eos_id)
        results.append([int(token) for token in row[: ends[0] if len(ends) else None]])
    return results
