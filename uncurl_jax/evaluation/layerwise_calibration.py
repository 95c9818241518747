"""Router statistics of a model larger than memory: one layer, and one expert, at a time.

What stays resident is the activations of the calibration set (or nothing, if they are kept in
files), one layer without its experts, and a few arrays of experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence

import jax

from uncurl_jax.artifacts import refuse_existing
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.calibration import (
    calibration_manifest,
    check_request,
    num_batches,
    sampled_batches,
)
from uncurl_jax.evaluation.layerwise_forward import observe
from uncurl_jax.evaluation.layerwise_job import Job, Seconds, open_activations
from uncurl_jax.evaluation.rank_classification import row_length
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import RouterStatistics


def calibrate_layer_by_layer(
    checkpoint: layout.PathLike | layout.ArrayReader,
    cache: TokenCache,
    *,
    out: str | os.PathLike[str],
    batch_size: int = 32,
    max_batches: int | None = None,
    is_dropless: bool = False,
    collect: Sequence[str] = (),
    inputs_out: str | os.PathLike[str] | None = None,
    sample_tokens: int = 4096,
    activations_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    seconds: Seconds | None = None,
) -> RouterStatistics:
    """Gathers the statistics of `calibrate_checkpoint` on one device, in little memory.

    Counts are those of one device (capacity is shared by the rows of a batch), sums agree to 1e-4
    in float32, and the manifest is the same. An interrupted call begins afresh.

    Args:
      checkpoint: a checkpoint, or a reader of one.
      cache: the task's training split.
      out: router_statistics.npz to write.
      batch_size: rows per batch: who shares an expert's slots.
      max_batches: stop after so many; None reads the whole split.
      is_dropless: no capacity limit, whatever the model's evaluation capacity factor.
      collect: optional statistics; "outputs" costs next to nothing here, "all_outputs" reads every
        expert and runs it on every token.
      inputs_out: router_inputs.npz to write as well; None writes none.
      sample_tokens: tokens of that sample.
      activations_dir: where to keep activations, 8 bytes (in float32 12) for each token, padding
        included, and embedding dimension; None keeps them in memory.
      quiet: no progress bar.
      seconds: if given, what each part takes is added to it.

    Returns:
      The statistics, as saved.

    Raises:
      InputError: As `calibrate_checkpoint`.
      RuntimeError: If it runs under `jax.distributed` with several processes.
    """
    if jax.process_count() > 1:
        raise RuntimeError(
            f"A calibration layer by layer runs in one process, got {jax.process_count()}: run it "
            "on one host without jax.distributed."
        )
    out = refuse_existing(out)
    reader = layout.open_reader(checkpoint)
    config = reader.checkpoint.model_config()
    check_request(
        reader.checkpoint,
        config,
        cache,
        inputs_out=inputs_out,
        max_batches=max_batches,
        collect=collect,
        sample_tokens=sample_tokens,
    )
    config.check_decoder("A calibration --layer_by_layer")
    length = row_length(config, cache)
    batches = cache.sequential_batches(batch_size, length=length)
    layout.check_architecture(reader, config)
    if is_dropless:
        config = dataclasses.replace(config, eval_capacity_factor=None)
    seconds = Seconds() if seconds is None else seconds
    with seconds.add("fingerprint"):
        manifest = calibration_manifest(
            reader, config, cache, batch_size=batch_size, max_batches=max_batches
        )
    sampled = None
    if inputs_out is not None:
        sampled = sampled_batches(cache, sample_tokens, batch_size, max_batches)
    chosen = list(itertools.islice(batches, num_batches(cache, batch_size, max_batches)))
    job = Job(reader, config, chosen, tuple(collect), sampled, sample_tokens, seconds)
    try:
        with open_activations(job, activations_dir) as activations:
            observed = observe(job, activations, quiet=quiet)
        done = {"collected": list(collect), "batches": len(chosen), "is_complete": True}
        statistics = RouterStatistics(observed.layers, {**manifest, **done})
        inputs = RouterInputs(observed.samples, manifest) if inputs_out is not None else None
    except InputError:
        # A parameter that is not finite spoils later layers too: name it, not what it spoiled.
        check_finite(reader)
        raise
    if inputs is not None and inputs_out is not None:
        inputs.save(inputs_out)
    statistics.save(out)
    return statistics
