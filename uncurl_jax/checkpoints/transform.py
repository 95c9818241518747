"""Offline pruning: reads a checkpoint and writes its pruned copy, one expert at a time.

Host memory stays near a small multiple of one expert for each process, however large layers and
checkpoint are; no accelerator, no model and no data are needed. A prune that was killed goes on
where it stopped and gives the same arrays.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax.checkpoints import layout, pruned
from uncurl_jax.checkpoints.accounting import STEP, Accounts, account, pruned_config
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.pruned import Progress, array_hash, new_output, stage
from uncurl_jax.checkpoints.replay import Replayed, Seconds, choose_workers, replay
from uncurl_jax.checkpoints.state_writer import (
    StateWriter,
    create_state,
    num_bytes,
    num_elements,
    remove_unreferenced,
)
from uncurl_jax.checkpoints.work_directory import WorkDirectory, open_work_directory
from uncurl_jax.config import ModelConfig
from uncurl_jax.pruning.plan import PruningPlan

__all__ = ["Progress", "prune_checkpoint"]

# So that a result is never taken for a step that training went on from.
_STEP = 0


def prune_checkpoint(
    source: layout.PathLike | layout.CheckpointPath,
    plan: PruningPlan,
    out: layout.PathLike,
    *,
    workers: int | None = None,
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
        not its architecture's or not finite, or an interrupted prune of another plan is in the
        way; no new file is left then.
      RuntimeError: If it runs under `jax.distributed` with several processes, or a worker died.
    """
    start = time.monotonic()
    out = new_output(out)
    reader = layout.open_reader(source)
    config = reader.checkpoint.model_config()
    fingerprint = pruned.check_source(reader, config, plan)
    accounts = account(reader, plan, config)
    workers = choose_workers(workers, plan, config)
    records = {
        layout.VOCABULARY_FILE: reader.checkpoint.vocabulary(),
        layout.PROVENANCE_FILE: pruned.make_provenance(reader, fingerprint, plan),
    }
    seconds = Seconds()
    job = _Job(reader, plan, config, accounts, workers)
    with open_work_directory(out, pruned.journal_header(reader, fingerprint, plan)) as work:
        resumed = len(work.done)
        _write_state(job, work, seconds, progress)
        records[pruned.HASHES_FILE] = pruned.hashes_record(plan, _hashes(job, work))
        # Last, because it is the one that makes the directory a checkpoint.
        records[layout.MODEL_CONFIG_FILE] = pruned_config(config, plan).to_dict()
        for name, value in records.items():
            layout.write_json_at(work.result / name, value)
        layers = _layer_summaries(plan, accounts, work)

    result = layout.open_reader(out)
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
        "peak_resident_bytes": _peak_resident_bytes(),
    }


class _Job(NamedTuple):
    """What is to be done."""

    reader: layout.ArrayReader
    plan: PruningPlan
    config: ModelConfig
    accounts: Accounts
    workers: int


def _write_state(
    job: _Job, work: WorkDirectory, seconds: Seconds, progress: Progress | None
) -> None:
    """Writes every piece that is not on disk yet."""
    step_directory = work.result / f"{layout.CHECKPOINT_PREFIX}_{_STEP}"
    if not work.is_created:
        create_state(step_directory, job.accounts.targets)
        StateWriter(step_directory).write({STEP: np.asarray(_STEP, np.int32)}).result()
        work.mark_created()
    elif not layout.is_remote(step_directory):
        remove_unreferenced(step_directory)
    writer = _RecordingWriter(StateWriter(step_directory), work, seconds)
    report = stage(progress, "prune")
    total = sum(piece.size for piece in job.accounts.pieces)
    missing = [piece for piece in job.accounts.pieces if piece.name not in work.done]
    done = total - sum(piece.size for piece in missing)
    report(done, total)
    pieces = replay(
        job.reader,
        job.plan,
        job.config,
        job.accounts,
        missing,
        workers=job.workers,
        seconds=seconds,
    )
    with contextlib.closing(pieces), contextlib.closing(writer):
        for made in pieces:
            writer.write(made)
            done += made.piece.size
            report(done, total)
    left = [piece.name for piece in job.accounts.pieces if piece.name not in work.done]
    assert not left, f"pieces that were not made: {left}"


class _RecordingWriter:
    """Writes pieces, each while the next is being made, and records those that are on disk."""

    def __init__(self, writer: StateWriter, work: WorkDirectory, seconds: Seconds):
        self._writer = writer
        self._work = work
        self._seconds = seconds
        self._unrecorded: tuple[Any, str, dict[str, Any]] | None = None

    def write(self, made: Replayed) -> None:
        start = time.monotonic()
        record = {
            "hashes": {key: array_hash(array) for key, array in made.arrays.items()},
            "similarities": [list(similarity) for similarity in made.similarities],
        }
        self._record()
        future = self._writer.write(made.arrays, made.piece.cluster)
        self._unrecorded = future, made.piece.name, record
        self._seconds.write += time.monotonic() - start

    def close(self) -> None:
        """Returns when all is on disk and recorded; also after an error nothing is under way."""
        start = time.monotonic()
        self._record()
        self._seconds.write += time.monotonic() - start

    def _record(self) -> None:
        if self._unrecorded is not None:
            future, name, record = self._unrecorded
            future.result()
            self._work.record(name, **record)
            self._unrecorded = None


def _hashes(job: _Job, work: WorkDirectory) -> dict[str, str | list[str]]:
    """Returns {key: hash}, for expert arrays a list with one for each expert."""
    hashes: dict[str, Any] = {STEP: array_hash(np.asarray(_STEP, np.int32))}
    for piece in job.accounts.pieces:
        for key, value in work.done[piece.name]["hashes"].items():
            if is_expert_array(key):
                hashes.setdefault(key, []).append(value)
            else:
                hashes[key] = value
    return hashes


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


def _peak_resident_bytes() -> int | None:
    # Not resource.getrusage: its maximum includes what the parent had before the exec.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None
