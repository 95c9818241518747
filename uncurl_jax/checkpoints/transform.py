"""Offline pruning: reads a checkpoint and writes its pruned copy, one expert at a time.

Host memory stays near a small multiple of one expert for each process, however large layers and
checkpoint are; no accelerator, no model and no data are needed. A prune that was killed goes on
where it stopped and gives the same arrays.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from uncurl_jax.checkpoints import layout, pruned
from uncurl_jax.checkpoints.accounting import Accounts, account, pruned_config
from uncurl_jax.checkpoints.pruned import Progress, new_output, stage
from uncurl_jax.checkpoints.replay import Seconds, choose_workers, replay
from uncurl_jax.checkpoints.sinks import (
    NewCheckpoint,
    build,
    make_sink,
    open_result,
    peak_resident_bytes,
    recorded_hashes,
)
from uncurl_jax.checkpoints.state_writer import num_bytes, num_elements
from uncurl_jax.checkpoints.work_directory import WorkDirectory, open_work_directory
from uncurl_jax.pruning.plan import PruningPlan

__all__ = ["Progress", "prune_checkpoint"]


def prune_checkpoint(
    source: layout.PathLike | layout.CheckpointPath,
    plan: PruningPlan,
    out: layout.PathLike,
    *,
    workers: int | None = None,
    file_format: str = "uncurl",
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carries out a pruning plan on a checkpoint, in little memory.

    The result is built in `.<out>.<plan hash>.partial` beside `out` and renamed to `out` when it
    is whole. A kill leaves that directory, which `layout.resolve` does not accept; the same call
    then goes on with it. At gs:// it is built in place and model_config.json, which `resolve`
    needs, is written last.

    Args:
      source: the checkpoint that the plan's statistics were taken on; as for `layout.resolve`.
      plan: the plan.
      out: directory to make; gets step 0 with the parameters alone, since an optimizer's state
        means nothing for merged experts.
      workers: processes for the alignment; 0 works in this one, None chooses. The result is the
        same.
      file_format: "uncurl", this package's, or "hf", a directory of transformers; local only.
      max_shard_bytes: of "hf", the largest file; None is 5 GB.
      progress: called with ("prune", done, total), which count experts and batches of arrays read.

    Returns:
      A JSON-compatible summary: "out", "source", "plan_hash", "fingerprint" (of the result),
      "num_experts" (per layer), "parameters" and "bytes" (each {"before", "after"}), "layers" (for
      each MoE layer "layer", "num_experts" {"before", "after"} and "similarity" to the reference
      {"before", "after"} the alignment: the mean over the aligned members, None if there are
      none), "warnings" (the plan's), "pieces" {"total", "resumed"} (those that an interrupted
      prune had finished), "seconds", "parts" (seconds of each part, see `replay.Seconds`),
      "workers" and "peak_resident_bytes" (of this process; None where the system does not tell).

    Raises:
      InputError: If `out` exists, the plan is of another checkpoint, the checkpoint's arrays are
        not its architecture's or not finite, the format cannot express the result, or an
        interrupted prune of another plan is in the way; no new file is left then.
      RuntimeError: If it runs under `jax.distributed` with several processes, or a worker died.
    """
    start = time.monotonic()
    out = new_output(out)
    reader = layout.open_reader(source)
    config = reader.checkpoint.model_config()
    fingerprint = pruned.check_source(reader, config, plan)
    accounts = account(reader, plan, config)
    workers = choose_workers(workers, plan, config)
    new = NewCheckpoint(
        reader.checkpoint,
        pruned_config(config, plan),
        accounts.targets,
        pruned.make_provenance(reader, fingerprint, plan),
    )
    sink = make_sink(new, file_format, max_shard_bytes)
    seconds = Seconds()
    make = functools.partial(
        replay, reader, plan, config, accounts, workers=workers, seconds=seconds
    )
    header = pruned.journal_header(
        reader, fingerprint, plan_hash=plan.hash, format=file_format, shard_bytes=max_shard_bytes
    )
    with open_work_directory(out, header, key=plan.hash) as work:
        resumed = len(work.done)
        build(sink, work, accounts, make, seconds=seconds, report=stage(progress, "prune"))
        hashes = pruned.hashes_record(plan, recorded_hashes(accounts.pieces, work))
        sink.finish(work.result, hashes)
        layers = _layer_summaries(plan, accounts, work)

    result = open_result(out, file_format, new.config)
    before, after = reader.parameters(), result.parameters()
    return {
        "out": os.fspath(out),
        "source": str(reader.checkpoint),
        "plan_hash": plan.hash,
        "fingerprint": layout.fingerprint(result),
        "num_experts": list(plan.num_experts),
        "parameters": {"before": num_elements(before), "after": num_elements(after)},
        "bytes": {"before": num_bytes(before), "after": num_bytes(after)},
        "layers": layers,
        "warnings": list(plan.warnings),
        "pieces": {"total": len(accounts.pieces), "resumed": resumed},
        "seconds": round(time.monotonic() - start, 3),
        "parts": {name: round(value, 3) for name, value in vars(seconds).items()},
        "workers": workers,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _layer_summaries(
    plan: PruningPlan, accounts: Accounts, work: WorkDirectory
) -> list[dict[str, Any]]:
    found: dict[int, list[list[float]]] = {}
    for piece in accounts.pieces:
        if piece.layer is not None:
            similarities = work.done[piece.name]["similarities"]
            found.setdefault(piece.layer, []).extend(similarities)
    return [
        {
            "layer": layer.layer,
            "num_experts": {"before": layer.num_experts, "after": layer.num_clusters},
            "similarity": _mean_similarity(found[layer.layer]),
        }
        for layer in plan.layers
    ]


def _mean_similarity(similarities: list[list[float]]) -> Mapping[str, float] | None:
    if not similarities:
        return None
    before, after = np.mean(similarities, axis=0)
    return {"before": float(before), "after": float(after)}
