"""One pass over a task's batches: router statistics, accumulated in float64 on the host."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import statistics as statistics_lib
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics

BatchT = TypeVar("BatchT")


def calibrate(
    observe: Callable[[BatchT], Mapping[int, LayerStatistics]],
    batches: Iterable[BatchT],
    *,
    manifest: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
) -> RouterStatistics:
    """Runs `observe` over all batches and sums what it returns.

    The next batch is started before the last one's sums are fetched, so the device does not wait
    for the host. Batches are added in order: the result does not depend on interruptions.

    Args:
      observe: batch -> {MoE layer: LayerStatistics}, already summed over the batch (and over
        devices), usually a jitted function; its arrays must be addressable on this host.
      batches: the batches, in an order that is the same on every start.
      manifest: where the statistics come from; see `statistics.make_manifest`.
      progress: called after each batch with (batches done, tokens so far).
      resume_from: partial file. Its batches are skipped if it exists; `save_every` writes it.
      save_every: batches between two writes of the partial file; None writes none.

    Returns:
      Complete RouterStatistics, with "tokens" and "batches" in its manifest.

    Raises:
      InputError: If the partial file is of another source or already complete, the batches end
        before those done, a sum is not finite, or there is no token at all.
    """
    if save_every is not None and (save_every < 1 or resume_from is None):
        raise InputError(
            f"save_every needs a positive number of batches and the partial file in resume_from, "
            f"got save_every={save_every} and resume_from={resume_from}: give both or neither."
        )
    manifest = dict(manifest)
    statistics_lib.require_manifest(manifest)
    layers: dict[int, LayerStatistics] = {}
    done = 0
    if resume_from is not None and Path(resume_from).exists():
        layers, done = _resume(resume_from, manifest)
    remaining = _skip(iter(batches), done)
    for sums in _fetch_behind(observe, remaining):
        done += 1
        host = {layer: statistics_lib.to_host(fields) for layer, fields in sums.items()}
        statistics_lib.check_layers(host, manifest["num_experts"], where=f" in batch {done - 1}")
        layers = statistics_lib.add_layers(layers, host) if layers else host
        tokens = int(next(iter(layers.values())).tokens) if layers else 0
        if save_every is not None and resume_from is not None and done % save_every == 0 and tokens:
            partial = {**manifest, "batches": done, "is_complete": False}
            RouterStatistics(layers, partial).save(resume_from)
        if progress is not None:
            progress(done, tokens)
    if not layers:
        layers = statistics_lib.zero_layers(manifest["num_experts"])
    if not layers:
        raise InputError(
            "Calibration needs a model with experts, got num_experts "
            f"{manifest['num_experts']}: only mixture-of-experts layers can be pruned."
        )
    return RouterStatistics(layers, {**manifest, "batches": done, "is_complete": True})


def _resume(
    path: str | os.PathLike[str], manifest: Mapping[str, Any]
) -> tuple[dict[int, LayerStatistics], int]:
    """Returns the sums of the partial file and the number of batches in them."""
    partial = RouterStatistics.load(path)
    if partial.manifest["is_complete"]:
        raise InputError(
            f"A calibration resumes from a partial file, got complete statistics in {path}: use "
            "them as they are or remove them."
        )
    # Through JSON, as in the file: a tuple becomes a list.
    wanted = RouterStatistics(partial.layers, dict(manifest)).manifest
    statistics_lib.require_same_source(partial.manifest, wanted)
    for key in ("collected", "shards"):
        found, asked = partial.manifest.get(key, []), list(manifest.get(key, []))
        if found != asked:
            raise InputError(
                f"A calibration goes on as it began, got {key} {found} in {path} and {asked} now: "
                "give the same options or remove the file."
            )
    return partial.layers, partial.manifest["batches"]


def _skip(batches: Any, count: int) -> Any:
    skipped = sum(1 for _ in itertools.islice(batches, count))
    if skipped < count:
        raise InputError(
            f"A resumed calibration needs the batches it started with, got {skipped} of the "
            f"{count} already done: give the same task and batch size or start afresh."
        )
    return batches


def _fetch_behind(observe: Callable[[Any], Any], batches: Iterable[Any]) -> Any:
    """Yields observe(batch) on the host, one batch behind the device."""
    pending = None
    for batch in batches:
        started = observe(batch)
        if pending is not None:
            yield jax.device_get(pending)
        pending = started
    if pending is not None:
        yield jax.device_get(pending)
