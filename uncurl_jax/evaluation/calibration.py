"""Runs a checkpoint over a task and gathers router statistics: the glue of model, data, pruning."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from uncurl_jax.artifacts import refuse_existing
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import Batch, TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.rank_classification import examples_that_divide, row_length
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.partitioning import local_rows, make_mesh, place_batch, replicated
from uncurl_jax.pruning import calibration
from uncurl_jax.pruning.statistics import (
    LayerStatistics,
    RouterStatistics,
    layer_statistics,
    make_manifest,
)

_SAVE_EVERY_BATCHES = 100


def router_observer(
    config: ModelConfig, mesh: Mesh | None = None, num_groups: int | None = None
) -> Callable[[Any, Batch], dict[int, LayerStatistics]]:
    """Returns the compiled function (params, batch) -> {MoE layer: sums over the batch}.

    On a mesh the sums run over all devices, and every process gets them whole.
    """
    decoder = Decoder(config, mesh, num_groups)

    def observe(params: Any, batch: Any) -> dict[int, LayerStatistics]:
        _, sown = decoder.apply(
            {"params": params}, batch.inputs, batch.mask, mutable=["router_observations"]
        )
        observations: Any = sown["router_observations"]
        return {
            layer: layer_statistics(
                **observations[f"layers_{layer}"]["moe"]["observation"][0], mask=batch.mask
            )
            for layer in config.moe_layers
        }

    return jax.jit(observe, out_shardings=None if mesh is None else replicated(mesh))


def calibrate_model(
    model: LoadedModel,
    cache: TokenCache,
    *,
    batch_size: int,
    length: int,
    max_batches: int | None = None,
    partial: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    quiet: bool = False,
) -> RouterStatistics:
    """Gathers statistics of a loaded model; see `calibrate_checkpoint`."""
    observe = router_observer(model.config, model.mesh)
    batches: Iterator[Batch] = cache.sequential_batches(batch_size, length=length)
    total = -(-cache.num_target_rows // batch_size)
    if max_batches is not None:
        total = min(total, max_batches)
    manifest = make_manifest(
        checkpoint_hash=layout.fingerprint(model.checkpoint),
        num_experts=model.config.num_experts,
        num_selected_experts=model.config.num_selected_experts,
        task=cache.task,
        split=cache.split,
        vocabulary_hash=cache.vocabulary_hash,
        seed=0,
        cache_hash=cache.hash,
        eval_capacity_factor=model.config.eval_capacity_factor,
        batch_size=batch_size,
        max_batches=max_batches,
    )
    bar = tqdm(
        total=total,
        desc=f"calibrate on {cache.task}",
        unit="batch",
        file=sys.stderr,
        disable=quiet or jax.process_index() != 0,
        mininterval=1.0,
    )

    def show(done: int, tokens: int) -> None:
        bar.update(done - bar.n)
        bar.set_postfix(tokens=tokens, refresh=False)

    def place(batch: Batch) -> Any:
        return place_batch(batch if model.mesh is None else local_rows(batch), model.mesh)

    with bar:
        return calibration.calibrate(
            lambda batch: observe(model.params, place(batch)),
            (batch for batch, _ in zip(batches, range(total), strict=False)),
            manifest=manifest,
            progress=show,
            resume_from=partial,
            save_every=save_every if jax.process_index() == 0 else None,
        )


def calibrate_checkpoint(
    checkpoint: str | os.PathLike[str],
    cache: TokenCache,
    *,
    out: str | os.PathLike[str],
    batch_size: int = 32,
    max_batches: int | None = None,
    is_dropless: bool = False,
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
      expert_partitions: of the device mesh.
      model_partitions: of the device mesh.
      quiet: no progress bar.

    Returns:
      The statistics, as saved.

    Raises:
      InputError: If `out` exists, the vocabularies differ, or the model has no experts.
    """
    out = refuse_existing(out)
    if max_batches is not None and max_batches < 1:
        raise InputError(f"max_batches must be at least 1, or None for all, got {max_batches}.")
    path = layout.resolve(checkpoint)
    config = path.model_config()
    if not config.moe_layers:
        raise InputError(
            f"Calibration needs a model with experts, got the dense {path}: choose another."
        )
    cache.check_vocabulary(path.vocabulary()["hash"])
    length = row_length(config, cache)
    mesh = make_mesh(expert_partitions=expert_partitions, model_partitions=model_partitions)
    mesh = mesh if mesh.size > 1 else None
    model = load_model(path, mesh)
    if is_dropless:
        model = model._replace(config=dataclasses.replace(config, eval_capacity_factor=None))
    partial = out.with_name(f".{out.name}.resume.npz")
    is_resumed = partial.exists()
    try:
        statistics = calibrate_model(
            model,
            cache,
            batch_size=examples_that_divide(batch_size, mesh),
            length=length,
            max_batches=max_batches,
            partial=partial,
            save_every=_SAVE_EVERY_BATCHES,
            quiet=quiet,
        )
    except InputError as error:
        # A parameter that is not finite spoils later layers too: name it, not what it spoiled.
        layout.check_finite(path)
        if is_resumed:
            raise InputError(
                f"{error} (A calibration that was interrupted left {partial}: remove it to begin "
                "afresh.)"
            ) from None
        raise
    if jax.process_index() == 0:
        statistics.save(out)
        partial.unlink(missing_ok=True)
    return statistics
