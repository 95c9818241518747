"""Runs a checkpoint over a task and gathers router statistics: the glue of model, data, pruning."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from uncurl_jax.artifacts import refuse_existing
from uncurl_jax.checkpoints import companions, layout
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import Batch, TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.rank_classification import examples_that_divide, row_length
from uncurl_jax.models.architecture import build, read_batch
from uncurl_jax.partitioning import ExpertAxes, local_rows, make_mesh, place_batch, replicated
from uncurl_jax.pruning import calibration
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.router_inputs import sample_tokens as draw_tokens
from uncurl_jax.pruning.statistics import (
    COLLECTIONS,
    LayerStatistics,
    RouterStatistics,
    layer_statistics,
    make_manifest,
)

_SAVE_EVERY_BATCHES = 100
# The Flax collection that MoE layers sow each optional group of statistics into.
_OBSERVED = {"outputs": "output_observations", "all_outputs": "all_output_observations"}


def router_observer(
    config: ModelConfig,
    mesh: Mesh | None = None,
    num_groups: int | None = None,
    collect: Sequence[str] = (),
    expert_axes: ExpertAxes | None = None,
    target_length: int | None = None,
) -> Callable[[Any, Batch], dict[int, LayerStatistics]]:
    """Returns the compiled function (params, batch) -> {MoE layer: sums over the batch}.

    On a mesh the sums run over all devices, and every process gets them whole. `collect` names
    optional groups of `statistics.COLLECTIONS`. `target_length` is the token cache's, so that a
    decoder that reads answers alone is no longer than they are.
    """
    model = build(config, mesh, num_groups, expert_axes)
    mutable = ["router_observations", *(_OBSERVED[group] for group in collect)]

    def observe(params: Any, batch: Any) -> dict[int, LayerStatistics]:
        read = read_batch(config, batch, target_length)
        _, sown = model.apply({"params": params}, **read.arguments, mutable=mutable)

        def observed(layer: int) -> LayerStatistics:
            values: dict[str, Any] = {}
            for collection in mutable:
                found: Any = sown[collection]
                values |= {k: v[0] for k, v in found[f"layers_{layer}"]["moe"].items()}
            values |= values.pop("observation")
            values.pop("inputs")
            return layer_statistics(**values, mask=read.masks[layer])

        return {layer: observed(layer) for layer in config.moe_layers}

    return jax.jit(observe, out_shardings=None if mesh is None else replicated(mesh))


class LayerInputs(NamedTuple):
    """What one MoE layer sees of a batch.

    Attributes:
      inputs: [b, l, d] float32.
      mask: [b, l] bool, the real tokens.
    """

    inputs: Any
    mask: Any


def input_observer(
    config: ModelConfig,
    mesh: Mesh | None = None,
    expert_axes: ExpertAxes | None = None,
    target_length: int | None = None,
) -> Callable[[Any, Batch], dict[int, LayerInputs]]:
    """Returns the compiled function (params, batch) -> {MoE layer: its inputs}."""
    model = build(config, mesh, expert_axes=expert_axes)

    def observe(params: Any, batch: Any) -> dict[int, LayerInputs]:
        read = read_batch(config, batch, target_length)
        _, sown = model.apply({"params": params}, **read.arguments, mutable=["router_observations"])
        found: Any = sown["router_observations"]

        def observed(layer: int) -> LayerInputs:
            inputs = found[f"layers_{layer}"]["moe"]["observation"][0]["inputs"]
            return LayerInputs(inputs, read.masks[layer])

        return {layer: observed(layer) for layer in config.moe_layers}

    return jax.jit(observe, out_shardings=None if mesh is None else replicated(mesh))


def calibrate_model(
    model: LoadedModel,
    cache: TokenCache,
    *,
    batch_size: int,
    length: int,
    max_batches: int | None = None,
    shard: tuple[int, int] | None = None,
    collect: Sequence[str] = (),
    partial: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    quiet: bool = False,
) -> RouterStatistics:
    """Gathers statistics of a loaded model; see `calibrate_checkpoint`."""
    observe = router_observer(
        model.config,
        model.mesh,
        collect=collect,
        expert_axes=model.expert_axes,
        target_length=cache.target_length,
    )
    index, count = shard or (0, 1)
    batches: Iterator[Batch] = cache.sequential_batches(batch_size, length=length)
    total = num_batches(cache, batch_size, max_batches)
    chosen = range(index, total, count)
    bar = tqdm(
        total=len(chosen),
        desc=f"calibrate on {cache.task}",
        unit="batch",
        file=sys.stderr,
        disable=quiet or jax.process_index() != 0,
        mininterval=1.0,
    )

    def show(done: int, tokens: int) -> None:
        bar.update(done - bar.n)
        bar.set_postfix(tokens=tokens, refresh=False)

    with bar:
        return calibration.calibrate(
            lambda batch: observe(model.params, _place(batch, model)),
            itertools.islice(batches, index, total, count),
            manifest=calibration_manifest(
                model.checkpoint,
                model.config,
                cache,
                batch_size=batch_size,
                max_batches=max_batches,
                shard=shard,
                collect=collect,
            ),
            progress=show,
            resume_from=partial,
            save_every=save_every if jax.process_index() == 0 else None,
        )


def sample_router_inputs(
    model: LoadedModel,
    cache: TokenCache,
    *,
    num_tokens: int,
    batch_size: int,
    length: int,
    max_batches: int | None = None,
) -> RouterInputs:
    """Samples what the MoE layers see of a task, from batches spread over the training split.

    Args:
      model: the model.
      cache: the task's training split.
      num_tokens: tokens of the sample, fewer if the split is smaller.
      batch_size: rows per batch.
      length: tokens per row.
      max_batches: as for the statistics.

    Returns:
      The sample; the same arguments give the same tokens.
    """
    chosen = sampled_batches(cache, num_tokens, batch_size, max_batches)
    observe = input_observer(model.config, model.mesh, model.expert_axes, cache.target_length)
    parts: list[dict[int, LayerInputs]] = []
    for place, batch in enumerate(cache.sequential_batches(batch_size, length=length)):
        if place in chosen:
            parts.append(jax.device_get(observe(model.params, _place(batch, model))))

    def sampled_of(layer: int) -> np.ndarray:
        inputs, masks = zip(*(part[layer] for part in parts), strict=True)
        # Layers with the same mask draw the same tokens.
        drawn = draw_tokens(
            {layer: np.concatenate(inputs)}, np.concatenate(masks), num_tokens, seed=0
        )
        return drawn[layer]

    sampled = {layer: sampled_of(layer) for layer in model.config.moe_layers}
    manifest = calibration_manifest(
        model.checkpoint, model.config, cache, batch_size=batch_size, max_batches=max_batches
    )
    return RouterInputs(sampled, manifest)


def sampled_batches(
    cache: TokenCache, num_tokens: int, batch_size: int, max_batches: int | None
) -> set[int]:
    """Returns the places of the batches that a sample of so many tokens is drawn from."""
    total = num_batches(cache, batch_size, max_batches)
    mean_tokens = max(1, int(cache.manifest["tokens"]) // max(cache.num_rows, 1)) * batch_size
    wanted = min(total, 1 + -(-num_tokens // mean_tokens))
    return set(np.linspace(0, total - 1, wanted).round().astype(int).tolist())


def num_batches(cache: TokenCache, batch_size: int, max_batches: int | None) -> int:
    """Returns how many batches a calibration reads."""
    total = -(-cache.num_target_rows // batch_size)
    return total if max_batches is None else min(total, max_batches)


def _place(batch: Batch, model: LoadedModel) -> Any:
    return place_batch(batch if model.mesh is None else local_rows(batch), model.mesh)


def calibration_manifest(
    checkpoint: layout.CheckpointPath | layout.ArrayReader,
    config: ModelConfig,
    cache: TokenCache,
    *,
    batch_size: int,
    max_batches: int | None,
    shard: tuple[int, int] | None = None,
    collect: Sequence[str] = (),
) -> dict[str, Any]:
    """Says where statistics come from; the same for every way to compute them.

    Args:
      checkpoint: what is observed.
      config: its model, with the evaluation capacity factor that it runs with.
      cache: the task's training split.
      batch_size: rows per batch.
      max_batches: limit of batches.
      shard: part of the batches.
      collect: optional statistics.
    """
    is_reader = isinstance(checkpoint, layout.ArrayReader)
    original = companions.original_config(checkpoint.checkpoint if is_reader else checkpoint)
    return make_manifest(
        checkpoint_hash=layout.fingerprint(checkpoint),
        num_experts=config.num_experts,
        num_selected_experts=config.num_selected_experts,
        task=cache.task,
        split=cache.split,
        vocabulary_hash=cache.vocabulary_hash,
        seed=0,
        cache_hash=cache.hash,
        eval_capacity_factor=config.eval_capacity_factor,
        batch_size=batch_size,
        max_batches=max_batches,
        collected=list(collect),
        **({} if shard is None else {"shards": [f"{shard[0]}/{shard[1]}"]}),
        # Plans are then made so that the result can go back to where the model came from.
        **({} if original is None else {"hf_model_type": original["model_type"]}),
    )


def check_request(
    checkpoint: layout.CheckpointPath,
    config: ModelConfig,
    cache: TokenCache,
    *,
    inputs_out: str | os.PathLike[str] | None,
    max_batches: int | None,
    collect: Sequence[str],
    sample_tokens: int,
) -> None:
    """Checks what every way to calibrate must know before it begins.

    Args:
      checkpoint: what is to be observed.
      config: its model.
      cache: the task's training split.
      inputs_out: file of the inputs' sample, or None.
      max_batches: limit of batches.
      collect: optional statistics.
      sample_tokens: tokens of the sample.

    Raises:
      InputError: As `calibrate_checkpoint`.
    """
    if inputs_out is not None:
        refuse_existing(inputs_out)
    for group in collect:
        require_choice("collect", group, COLLECTIONS)
    if sample_tokens < 1:
        raise InputError(f"sample_tokens must be at least 1, got {sample_tokens}.")
    if max_batches is not None and max_batches < 1:
        raise InputError(f"max_batches must be at least 1, or None for all, got {max_batches}.")
    if not config.moe_layers:
        raise InputError(
            f"Calibration needs a model with experts, got the dense {checkpoint}: choose another."
        )
    if config.expert_map is not None:
        raise InputError(
            f"Calibration needs routers with one column per expert, got {checkpoint}, which was "
            "pruned with router 'remap': prune again with another treatment."
        )
    record = checkpoint.vocabulary()
    cache.check_vocabulary(record["hash"], record["name"])
    if config.has_encoder:
        cache.check_prompts()


def calibrate_checkpoint(
    checkpoint: str | os.PathLike[str],
    cache: TokenCache,
    *,
    out: str | os.PathLike[str],
    batch_size: int = 32,
    max_batches: int | None = None,
    is_dropless: bool = False,
    collect: Sequence[str] = (),
    shard: tuple[int, int] | None = None,
    inputs_out: str | os.PathLike[str] | None = None,
    sample_tokens: int = 4096,
    expert_partitions: int = 1,
    model_partitions: int = 1,
    quiet: bool = False,
) -> RouterStatistics:
    """Gathers the router statistics of a checkpoint on a task's right answers, without gradients.

    Every 100 batches the sums so far are kept in a hidden file beside `out`; the same call goes on
    from there after an interruption.

    Args:
      checkpoint: a directory that `uncurl train` or `uncurl prune` wrote.
      cache: the task's training split.
      out: router_statistics.npz to write.
      batch_size: rows per batch.
      max_batches: stop after so many; None reads the whole split.
      is_dropless: no capacity limit, whatever the model's evaluation capacity factor.
      collect: optional statistics, "outputs" (methods ean and reap; about the cost of the experts
        again) and "all_outputs" (hc_smoe; runs every expert on every token).
      shard: (i, n) takes part i of the batches; `statistics.merge_statistics` adds the n files.
      inputs_out: router_inputs.npz to write as well, a sample of what the MoE layers see, for
        router "fit" and for measured merge errors; None writes none.
      sample_tokens: tokens of that sample.
      expert_partitions: of the device mesh.
      model_partitions: of the device mesh.
      quiet: no progress bar.

    Returns:
      The statistics, as saved.

    Raises:
      InputError: If an output exists, an option is unknown, the vocabularies differ, or the model
        has no experts or a router wider than its experts.
    """
    out = refuse_existing(out)
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise InputError(f"A shard i/n must have 0 <= i < n, got {shard[0]}/{shard[1]}.")
    partial = out.with_name(f".{out.name}.resume.npz")
    is_resumed = partial.exists()
    path = layout.resolve(checkpoint)
    config = path.model_config()
    check_request(
        path,
        config,
        cache,
        # A kill may have come between the two files of this calibration.
        inputs_out=None if is_resumed else inputs_out,
        max_batches=max_batches,
        collect=collect,
        sample_tokens=sample_tokens,
    )
    length = row_length(config, cache)
    mesh = make_mesh(expert_partitions=expert_partitions, model_partitions=model_partitions)
    mesh = mesh if mesh.size > 1 else None
    model = load_model(path, mesh)
    if is_dropless:
        model = model._replace(config=dataclasses.replace(config, eval_capacity_factor=None))
    inputs = None
    batch_size = examples_that_divide(batch_size, mesh)
    try:
        if inputs_out is not None:
            inputs = sample_router_inputs(
                model,
                cache,
                num_tokens=sample_tokens,
                batch_size=batch_size,
                length=length,
                max_batches=max_batches,
            )
        statistics = calibrate_model(
            model,
            cache,
            batch_size=batch_size,
            length=length,
            max_batches=max_batches,
            collect=collect,
            shard=shard,
            partial=partial,
            save_every=_SAVE_EVERY_BATCHES,
            quiet=quiet,
        )
    except InputError as error:
        # A parameter that is not finite spoils later layers too: name it, not what it spoiled.
        check_finite(path)
        if is_resumed:
            raise InputError(
                f"{error} (A calibration that was interrupted left {partial}: remove it to begin "
                "afresh.)"
            ) from None
        raise
    if jax.process_index() == 0:
        if inputs is not None and inputs_out is not None:
            inputs.save(inputs_out)
        statistics.save(out)
        partial.unlink(missing_ok=True)
    return statistics
