"""Prefill and decoding with the key-value cache, as programs to time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.bench_programs import random_values
from uncurl_jax.deployment.bench_settings import BenchSettings, Layout
from uncurl_jax.deployment.timing import Alternative
from uncurl_jax.evaluation.generation import abstract_cache, compiled_decode
from uncurl_jax.models.decoder import Params
from uncurl_jax.partitioning import batch_sharding, place_batch


def prefill_program(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    mesh: Mesh | None,
    layout: Layout,
) -> Alternative:
    """Reads prompts [b, l] into a new cache and returns the logits after the last token."""
    programs = compiled_decode(config, mesh, layout.expert_axes)
    lengths = np.full((tokens.shape[0],), tokens.shape[1], np.int32)
    inputs, lengths = place_batch((tokens, lengths), mesh)
    compiled = programs.prefill.lower(params, inputs, lengths).compile()
    return Alternative(lambda: compiled(params, inputs, lengths))


def padded_rows(batch: int, layout: Layout) -> int:
    """Rows of a decoding program: those that decode, and as many more as the devices need."""
    return -(-batch // layout.token_shards) * layout.token_shards


def decode_program(
    config: ModelConfig,
    params: Params,
    batch: int,
    mesh: Mesh | None,
    layout: Layout,
    settings: BenchSettings,
) -> Alternative:
    """Greedy decoding: `decode_steps` steps after a prompt of `length`, launched one by one.

    The cache is filled with random values: what stands in it does not change how long a step
    takes. Rows beyond `batch`, where the devices do not divide it, have ended before.
    """
    step = compiled_decode(config, mesh, layout.expert_axes).step
    rows = padded_rows(batch, layout)
    abstract = abstract_cache(config, rows, mesh)
    carried: dict[str, Any] = {
        "cache": jax.tree.map(
            lambda leaf: random_values(leaf.shape, leaf.dtype, leaf.sharding, settings.seed),
            abstract,
        )
    }
    first = np.full((rows,), settings.length, np.int32)
    is_running = np.arange(rows) < batch
    token, first, is_running = place_batch((np.zeros(rows, np.int32), first, is_running), mesh)
    carried["token"] = token

    def advance(
        params: Params, cache: Any, token: jax.Array, positions: jax.Array, is_running: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        decoded = step(params, cache, token, positions, is_running)
        return decoded.cache, decoded.logits.argmax(axis=-1).astype(jnp.int32), positions + 1

    shardings = None
    if mesh is not None:
        of_cache = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        shardings = (of_cache, batch_sharding(mesh), batch_sharding(mesh))
    compiled = (
        jax.jit(advance, donate_argnums=1, out_shardings=shardings)
        .lower(params, carried["cache"], token, first, is_running)
        .compile()
    )

    def run() -> jax.Array:
        # Every run writes the same places of the cache again.
        positions = first
        for _ in range(settings.decode_steps):
            carried["cache"], carried["token"], positions = compiled(
                params, carried["cache"], carried["token"], positions, is_running
            )
        return carried["token"]

    return Alternative(run, settings.decode_steps)
