"""A forward pass over a whole calibration set, one layer and one expert at a time.

Activations go through the model layer by layer, in memory or in files. Parameters are read when
they are needed, of an MoE layer only the experts that some token chose, each once.

Axes: b batch, l length, d embed, k topk, e expert, row (rows of all batches), place (row and length
merged), n (assignments of one expert, padded to few sizes so that few shapes are compiled).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.evaluation.layerwise_job import Activations, Job
from uncurl_jax.models import layers as layers_lib
from uncurl_jax.models.expert_parallel import Experts, apply_experts
from uncurl_jax.models.layer_parts import DecoderLayerWithoutExperts, Router, SharedExpert
from uncurl_jax.models.routing import RouterChoice, ranks_within_expert
from uncurl_jax.pruning.router_inputs import sample_tokens as draw_tokens
from uncurl_jax.pruning.statistics import (
    LayerStatistics,
    add_layers,
    check_layers,
    layer_statistics,
    to_host,
    zero_layers,
)

# Attention looks at so many rows at once that its float32 scores, and the hidden units of a
# feed-forward network, take some 100 MiB.
_SCORES_AT_ONCE = 2**25
_TOKENS_AT_ONCE = 2**13
# Sizes that an expert's tokens are padded to: at most a third is filling, and 13 shapes in all.
_SIZES = sorted({size for power in range(4, 11) for size in (2**power, 3 * 2 ** (power - 1))})[:-1]


class _Routed(NamedTuple):
    """What one layer's router decided for all places.

    Attributes:
      expert_index: [place, k] int32.
      gate: [place, k] float32.
      is_kept: [place, k] bool, False where the capacity dropped the assignment.
    """

    expert_index: np.ndarray
    gate: np.ndarray
    is_kept: np.ndarray


class Observed(NamedTuple):
    """What a pass finds out.

    Attributes:
      layers: MoE layer -> sums over all batches, float64 numpy arrays.
      samples: MoE layer -> [token, d] float32, the sample of its inputs; empty if there is none.
    """

    layers: dict[int, LayerStatistics]
    samples: dict[int, np.ndarray]


def observe(job: Job, activations: Activations, *, quiet: bool = False) -> Observed:
    """Runs the pass.

    Args:
      job: what to do.
      activations: of `layerwise_job.open_activations`; overwritten.
      quiet: no progress bar.

    Raises:
      InputError: If a sum is not finite, or an array cannot be read.
    """
    found: dict[int, LayerStatistics] = {}
    samples: dict[int, np.ndarray] = {}
    if not job.batches:
        return Observed(zero_layers(job.config.num_experts), samples)
    _embed(job, activations)
    # What comes after the last router changes no statistic.
    last = job.config.moe_layers[-1]
    bar = tqdm(
        range(last + 1),
        desc="calibrate layer by layer",
        unit="layer",
        file=sys.stderr,
        disable=quiet,
        mininterval=1.0,
    )
    for layer in bar:
        params = _read_layer(job, layer)
        if not job.config.num_experts[layer]:
            with job.seconds.add("layers"):
                for place in range(len(job.batches)):
                    _attend(job, layer, params, place, activations)
            continue
        with job.seconds.add("layers"):
            routed, found[layer], sample = _route_layer(job, layer, params, activations)
        if sample is not None:
            samples[layer] = sample
        _check(job, layer, found[layer])
        if layer < last or job.collect:
            outputs = _run_experts(job, layer, routed, activations)
            found[layer] = found[layer]._replace(**outputs)
            _check(job, layer, found[layer])
        if layer < last:
            with job.seconds.add("experts"):
                for rows in _slices(job):
                    added = _add(activations.x[rows], activations.update[rows])
                    activations.x[rows] = np.asarray(added)
    return Observed(found, samples)


def _check(job: Job, layer: int, fields: LayerStatistics) -> None:
    counts = [count if index == layer else 0 for index, count in enumerate(job.config.num_experts)]
    check_layers({layer: fields}, counts)


def _read_layer(job: Job, layer: int) -> dict[str, Any]:
    """Reads a layer without its experts as a float32 tree."""
    prefix = f"layers_{layer}/"
    names = [
        name.removeprefix(prefix)
        for name in job.reader.parameters()
        if name.startswith(prefix) and not name.startswith(f"{prefix}moe/experts/")
    ]
    tree: dict[str, Any] = {}
    with job.seconds.add("read"):
        requests = ((f"{layout.TARGET}/{prefix}{name}", None) for name in names)
        for name, array in zip(names, job.reader.stream(requests), strict=True):
            *parents, leaf = name.split("/")
            parent = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
            parent[leaf] = jnp.asarray(array).astype(jnp.float32)
    return tree


def _embed(job: Job, activations: Activations) -> None:
    """Fills the residual stream with the embeddings of tokens and, if learned, positions."""
    config = job.config
    tables = {"token_embedder": config.vocab_size}
    if config.position_embedding == "learned":
        tables["position_embedder"] = config.max_length
    for name, size in tables.items():
        with job.seconds.add("read"):
            table = jnp.asarray(job.reader.read(f"{layout.TARGET}/{name}/embedding"))
        embed = nn.Embed(size, config.embed_dim, dtype=jnp.dtype(config.dtype))
        run = jax.jit(lambda params, ids, embed=embed: embed.apply({"params": params}, ids))
        params, start = {"embedding": table.astype(jnp.float32)}, 0
        for batch in job.batches:
            rows = slice(start, start + len(batch.inputs))
            is_token = name == "token_embedder"
            ids = batch.inputs if is_token else np.arange(batch.inputs.shape[1])[None]
            activations.x[rows] += np.asarray(run(params, ids))
            start = rows.stop


def _slices(job: Job, place: int | None = None) -> Iterator[slice]:
    """Slices of rows, of one batch or all, that are small enough for attention."""
    size, length = job.batches[0].inputs.shape
    scores = job.config.num_heads * length * length
    step = max(1, min(_SCORES_AT_ONCE // scores, _TOKENS_AT_ONCE // length))
    places = range(len(job.batches)) if place is None else [place]
    for batch in places:
        for start in range(batch * size, (batch + 1) * size, step):
            yield slice(start, min(start + step, (batch + 1) * size))


def _attend(
    job: Job, layer: int, params: dict[str, Any], place: int, activations: Activations
) -> jax.Array | None:
    """Takes one batch up to the layer's experts; returns what they see, [b, l, d] float32."""
    run = _compiled_attention(job.config, _alike(job.config, layer))
    is_moe = bool(job.config.num_experts[layer])
    mask = job.batches[place].mask
    first = place * len(mask)
    normed = []
    for rows in _slices(job, place):
        is_token = mask[rows.start - first : rows.stop - first]
        x, part, shared = run(params, activations.x[rows], is_token)
        activations.x[rows] = np.asarray(x)
        if is_moe:
            normed.append(part)
            activations.update[rows] = 0.0 if shared is None else np.asarray(shared)
    return jnp.concatenate(normed) if is_moe else None


def _route_layer(
    job: Job, layer: int, params: dict[str, Any], activations: Activations
) -> tuple[_Routed, LayerStatistics, np.ndarray | None]:
    """Runs a layer up to its experts; returns routing, sums over all batches, and the sample."""
    run = _compiled_routing(job.config, _alike(job.config, layer))
    total: dict[int, LayerStatistics] = {}
    routed, parts, masks = [], [], []
    for place, batch in enumerate(job.batches):
        normed = _attend(job, layer, params, place, activations)
        choice, is_kept, sums = run(params["moe"], normed, batch.mask)
        rows = slice(place * len(batch.mask), (place + 1) * len(batch.mask))
        seen = cast(jax.Array, normed).astype(activations.inputs.dtype)
        activations.inputs[rows] = np.asarray(seen)
        routed.append(_Routed(*map(np.asarray, (choice.expert_index, choice.gate, is_kept))))
        host = {layer: to_host(sums)}
        total = add_layers(total, host) if total else host
        if job.sampled is not None and place in job.sampled:
            parts.append(np.asarray(normed))
            masks.append(batch.mask)
    topk = job.config.num_selected_experts
    whole = _Routed(
        *(np.concatenate(field).reshape(-1, topk) for field in zip(*routed, strict=True))
    )
    sample = None
    if parts:
        drawn = draw_tokens(
            {layer: np.concatenate(parts)}, np.concatenate(masks), job.sample_tokens, seed=0
        )
        sample = drawn[layer]
    return whole, total[layer], sample


def _run_experts(
    job: Job, layer: int, routed: _Routed, activations: Activations
) -> dict[str, np.ndarray]:
    """Adds the experts' outputs to the update; returns the optional sums that were asked for."""
    config, mask = job.config, job.mask
    count, dim = config.num_experts[layer], config.embed_dim
    is_used = mask[:, None] & (routed.is_kept | ("outputs" in job.collect))
    token, choice = np.nonzero(is_used)
    expert = routed.expert_index[token, choice]
    order = np.argsort(expert, kind="stable")
    loads = np.bincount(expert, minlength=count)
    stops = np.cumsum(loads)
    inputs, update = activations.inputs.reshape(-1, dim), activations.update.reshape(-1, dim)
    sums = {
        "output_norm": np.zeros(count),
        "gated_output_norm": np.zeros(count),
        "output_sum": np.zeros((count, dim)),
        "all_output_sum": np.zeros((count, dim)),
    }
    tokens = np.flatnonzero(mask)
    wanted = np.arange(count) if "all_outputs" in job.collect else np.flatnonzero(loads)
    for index, parameters in zip(wanted, _read_experts(job, layer, wanted), strict=True):
        members = order[stops[index] - loads[index] : stops[index]]
        places, choices = token[members], choice[members]
        gate, is_kept = routed.gate[places, choices], routed.is_kept[places, choices]
        with job.seconds.add("experts"):
            for part, out in _apply(config, parameters, inputs, places, gate, gate * is_kept):
                # An expert is among a token's choices once, so no place is named twice here.
                update[places[part]] += out.y[: len(places[part])]
                sums["output_norm"][index] += out.norm
                sums["gated_output_norm"][index] += out.gated_norm
                sums["output_sum"][index] += out.total
            if "all_outputs" in job.collect:
                ones = np.ones(len(tokens), np.float32)
                for _, out in _apply(config, parameters, inputs, tokens, ones, ones):
                    sums["all_output_sum"][index] += out.total
    names = [name for name in sums if name != "all_output_sum"] if "outputs" in job.collect else []
    names += ["all_output_sum"] if "all_outputs" in job.collect else []
    return {name: sums[name] for name in names}


def _read_experts(job: Job, layer: int, wanted: np.ndarray) -> Iterator[Experts]:
    """Reads experts one after the other, a few arrays ahead; [1, ...] in the compute dtype."""
    prefix = f"layers_{layer}/moe/experts/"
    stored = job.reader.parameters()
    names = [name for name in Experts._fields if f"{prefix}{name}" in stored]
    stream = job.reader.stream(
        (f"{layout.TARGET}/{prefix}{name}", int(index)) for index in wanted for name in names
    )
    dtype = jnp.dtype(job.config.dtype)
    for _ in wanted:
        with job.seconds.add("read"):
            # Straight to the compute dtype: through float32 it would be the same value.
            arrays = {name: jnp.asarray(next(stream)).astype(dtype)[None] for name in names}
        yield Experts(**arrays)


class _ExpertOutput(NamedTuple):
    """What an expert makes of a chunk of its tokens, on the host.

    Attributes:
      y: [n, d] float32, outputs scaled by the gates of the assignments that were kept.
      norm: sum of the outputs' norms.
      gated_norm: the same times gates.
      total: [d] sum of the outputs.
    """

    y: np.ndarray
    norm: np.ndarray
    gated_norm: np.ndarray
    total: np.ndarray


def _apply(
    config: ModelConfig,
    parameters: Experts,
    inputs: np.ndarray,
    places: np.ndarray,
    gate: np.ndarray,
    kept_gate: np.ndarray,
) -> Iterator[tuple[slice, _ExpertOutput]]:
    """Runs an expert on the inputs at `places`, a chunk at a time; yields each chunk's slice."""
    run = _compiled_expert(config)
    for start in range(0, len(places), _SIZES[-1]):
        part = slice(start, start + _SIZES[-1])
        chunk = places[part]
        size = next(size for size in _SIZES if size >= len(chunk))
        x = np.zeros((size, inputs.shape[1]), inputs.dtype)
        x[: len(chunk)] = inputs[chunk]
        filling = (0, size - len(chunk))
        gates = np.pad(gate[part], filling), np.pad(kept_gate[part], filling)
        out = run(parameters, x, *gates, np.arange(size) < len(chunk))
        yield part, _ExpertOutput(*map(np.asarray, out))


def _alike(config: ModelConfig, layer: int) -> int:
    """Returns the first layer of the same shape, for which alone functions are compiled."""
    return config.num_experts.index(config.num_experts[layer])


@jax.jit
def _add(x: jax.Array, update: jax.Array) -> jax.Array:
    return x + update.astype(x.dtype)


@functools.lru_cache(maxsize=16)
def _compiled_attention(config: ModelConfig, layer: int) -> Any:
    """(params, x, mask) -> (x, normed float32 or None, masked shared expert float32 or None)."""
    block = DecoderLayerWithoutExperts(config, layer)
    shared_expert = SharedExpert(config, layer)
    is_moe = bool(config.num_experts[layer])

    def run(params: Any, x: jax.Array, mask: jax.Array) -> Any:
        x, normed = block.apply({"params": params}, x)
        if not is_moe:
            return x, None, None
        if not config.shared_mlp_dim:
            return x, normed, None
        shared: Any = shared_expert.apply({"params": params["moe"]}, normed)
        return x, normed, jnp.where(mask[..., None], shared, 0.0)

    return jax.jit(run)


@functools.lru_cache(maxsize=16)
def _compiled_routing(config: ModelConfig, layer: int) -> Any:
    """(params of the MoE layer, normed [b, l, d], mask [b, l]) -> (choice, is_kept, sums)."""
    router = Router(config, layer)

    def run(params: Any, normed: jax.Array, mask: jax.Array) -> Any:
        choice: Any = router.apply({"params": params}, normed)
        assert isinstance(choice, RouterChoice)
        shape = choice.expert_index.shape
        is_kept = jnp.broadcast_to(mask[..., None], shape)
        capacity = config.expert_capacity(layer, mask.size, is_training=False)
        if capacity is not None:
            index = choice.expert_index.reshape(mask.size, -1)
            ranks, _ = ranks_within_expert(index, mask.reshape(-1), config.num_experts[layer])
            is_kept &= ranks.reshape(shape) < capacity
        sums = layer_statistics(choice.logits, choice.expert_index, choice.gate, is_kept, mask)
        return choice, is_kept, sums

    return jax.jit(run)


@functools.lru_cache(maxsize=16)
def _compiled_expert(config: ModelConfig) -> Any:
    """(expert, x [n, d], gate [n], kept gate [n], is_token [n]) -> _ExpertOutput on the device."""
    activation = layers_lib.activation(config)

    def run(
        expert: Experts, x: jax.Array, gate: jax.Array, kept_gate: jax.Array, is_token: jax.Array
    ) -> Any:
        y = apply_experts(x[None], expert, activation)[0].astype(jnp.float32)
        y = jnp.where(is_token[:, None], y, 0.0)
        norm = jnp.linalg.norm(y, axis=-1)
        return y * kept_gate[:, None], norm.sum(), jnp.sum(norm * gate), y.sum(axis=0)

    return jax.jit(run)
