"""Offline pruning: reads a checkpoint and writes its pruned copy, one layer at a time.

Host memory stays near one layer's experts, however large the checkpoint is; no accelerator, no
model and no data are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

import uncurl_jax
from uncurl_jax.artifacts import atomic_directory
from uncurl_jax.checkpoints import layout, parameters
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.prune import prune_layer

# What is being done, how much of it is done, and how much there is in all.
Progress = Callable[[str, int, int], None]

_VERSIONED_PACKAGES = ("jax", "numpy", "scipy", "orbax-checkpoint", "tensorstore")


def prune_checkpoint(
    source: layout.PathLike | layout.CheckpointPath,
    plan: PruningPlan,
    out: layout.PathLike,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carries out a pruning plan on a checkpoint.

    Everything is checked before anything is written. The result is built beside `out` and renamed
    to `out` when it is whole; a kill leaves a directory `.<out>.*.partial` that
    `layout.resolve` does not accept. At gs:// it is built in place and model_config.json, which
    `resolve` needs, is written last.

    Args:
      source: the checkpoint that the plan's statistics were taken on; as for `layout.resolve`.
      plan: the plan.
      out: directory to make; gets step 0 with the parameters alone, since an optimizer's state
        means nothing for merged experts.
      workers: processes for the alignment; 0 works in this one. The result is the same.
      progress: called with (stage, done, total); stages are "check", "align layer <i>", "write".

    Returns:
      A JSON-compatible summary: "out", "source", "plan_hash", "fingerprint" (of the result),
      "num_experts" (per layer), "parameters" and "bytes" (each {"before", "after"}), "layers" (for
      each MoE layer "layer", "num_experts" {"before", "after"} and "similarity" to the reference
      {"before", "after"} the alignment: the mean over the aligned members, None if there are
      none), "warnings" (the plan's) and "seconds".

    Raises:
      InputError: If `out` exists, the plan is of another checkpoint, or the checkpoint's arrays are
        not its architecture's or not finite; nothing has been written then.
      RuntimeError: If it runs under `jax.distributed` with several processes.
    """
    start = time.monotonic()
    if jax.process_count() > 1:
        raise RuntimeError(
            f"A checkpoint is pruned by one process, got {jax.process_count()}: run it on one host "
            "without jax.distributed."
        )
    out = epath.Path(out)
    if not layout.is_remote(out):
        out = out.expanduser().resolve()
    if out.exists():
        raise InputError(
            f"An output must not exist yet, got {out}: choose another --out or remove it first."
        )
    reader = layout.StateReader(source)
    config = reader.checkpoint.model_config()
    source_fingerprint = _check_source(reader, config, plan, progress)
    pruned_config = dataclasses.replace(config, num_experts=plan.num_experts)
    records = {
        layout.VOCABULARY_FILE: reader.checkpoint.vocabulary(),
        layout.PROVENANCE_FILE: _provenance(reader, source_fingerprint, plan),
    }
    with _output_directory(out) as directory:
        for name, value in records.items():
            layout.write_json_at(directory / name, value)
        layers = _write_state(directory, reader, plan, config, workers, progress)
        layout.write_json_at(directory / layout.MODEL_CONFIG_FILE, pruned_config.to_dict())

    result = layout.StateReader(out)
    before, after = reader.parameters(), result.parameters()
    return {
        "out": os.fspath(out),
        "source": str(reader.checkpoint),
        "plan_hash": plan.hash,
        "fingerprint": layout.fingerprint(result),
        "num_experts": list(plan.num_experts),
        "parameters": {"before": _count(before), "after": _count(after)},
        "bytes": {"before": _bytes(before), "after": _bytes(after)},
        "layers": layers,
        "warnings": list(plan.warnings),
        "seconds": round(time.monotonic() - start, 3),
    }


def _check_source(
    reader: layout.StateReader,
    config: ModelConfig,
    plan: PruningPlan,
    progress: Progress | None,
) -> str:
    """Returns the source's fingerprint; InputError if it is not sound or not the plan's."""
    layout.check_architecture(reader, config)
    for name in ("num_experts", "num_selected_experts"):
        planned, found = getattr(plan.source, name), getattr(config, name)
        if planned != found:
            raise InputError(
                f"A plan must be of the checkpoint that is pruned, got {name} {planned} in the "
                f"plan and {found} in {reader.checkpoint}: give the checkpoint that was calibrated."
            )
    found = layout.fingerprint(reader)
    if plan.source.checkpoint_hash != found:
        raise InputError(
            f"A plan must be of the checkpoint that is pruned, got a plan for "
            f"{plan.source.checkpoint_hash} and {reader.checkpoint} with fingerprint {found}: give "
            "the checkpoint (and step) that was calibrated, or calibrate this one."
        )
    layout.check_finite(reader, progress=_stage(progress, "check"))
    return found


@contextlib.contextmanager
def _output_directory(out: epath.Path) -> Iterator[epath.Path]:
    if layout.is_remote(out):
        out.mkdir(parents=True)
        yield out
    else:
        with atomic_directory(out) as partial:
            yield epath.Path(partial)


def _write_state(
    directory: epath.Path,
    reader: layout.StateReader,
    plan: PruningPlan,
    config: ModelConfig,
    workers: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Writes directory/checkpoint_0; returns a summary of every MoE layer."""
    path = directory / f"{layout.CHECKPOINT_PREFIX}_0"
    report = _stage(progress, "write")
    summaries = []
    context = ocp.Context()
    context.array.saving.use_ocdbt = True
    context.array.saving.use_zarr3 = False
    context.array.saving.scoped_storage_options_creator = _storage_options
    with context:
        # One save per layer: what has been saved is on disk and leaves memory.
        for layer in range(config.num_layers):
            summary = _write_layer(path, reader, layer, plan, config, workers, progress)
            if summary is not None:
                summaries.append(summary)
            report(layer + 1, config.num_layers + 1)
        ocp.partial.save(path, _nested(_read_outside_layers(reader)))
        ocp.partial.finalize(path)
        report(config.num_layers + 1, config.num_layers + 1)
    return summaries


def _write_layer(
    path: epath.Path,
    reader: layout.StateReader,
    layer: int,
    plan: PruningPlan,
    config: ModelConfig,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any] | None:
    """Adds one layer to the unfinished checkpoint at `path`; returns an MoE layer's summary."""
    arrays = _read(reader, f"{layout.TARGET}/layers_{layer}/")
    summary = None
    if config.num_experts[layer]:
        summary = _prune_arrays(arrays, layer, plan, config, workers, progress)
    ocp.partial.save(path, _nested(arrays))
    return summary


def _read(reader: layout.StateReader, prefix: str) -> dict[str, np.ndarray]:
    names = [name for name in reader.metadata if name.startswith(prefix)]
    return dict(zip(names, reader.stream((name, None) for name in names), strict=True))


def _read_outside_layers(reader: layout.StateReader) -> dict[str, np.ndarray]:
    names = [
        f"{layout.TARGET}/{name}" for name in reader.parameters() if not name.startswith("layers_")
    ]
    arrays = dict(zip(names, reader.stream((name, None) for name in names), strict=True))
    return {**arrays, "state/step": np.zeros((), np.int32)}


def _prune_arrays(
    arrays: dict[str, np.ndarray],
    layer: int,
    plan: PruningPlan,
    config: ModelConfig,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Replaces one MoE layer's router and experts in `arrays`; returns the layer's summary."""
    prefix = f"{layout.TARGET}/layers_{layer}/moe"
    experts = {
        name.removeprefix(f"{prefix}/experts/"): arrays.pop(name)
        for name in list(arrays)
        if name.startswith(f"{prefix}/experts/")
    }
    pruned = prune_layer(
        plan,
        layer,
        arrays[f"{prefix}/router/kernel"],
        experts,
        init_stddev=config.init_stddev,
        workers=workers,
        progress=_stage(progress, f"align layer {layer}"),
    )
    arrays[f"{prefix}/router/kernel"] = pruned.router
    arrays |= {f"{prefix}/experts/{name}": array for name, array in pruned.experts.items()}
    similarity = None
    decided = plan.layer(layer)
    aligned = [
        expert
        for expert, cluster in enumerate(decided.labels)
        if cluster >= 0 and decided.reference[cluster] != expert
    ]
    if pruned.alignment is not None and aligned:
        similarity = {
            "before": float(pruned.alignment.similarity_before[aligned].mean()),
            "after": float(pruned.alignment.similarity_after[aligned].mean()),
        }
    return {
        "layer": layer,
        "num_experts": {"before": decided.num_experts, "after": decided.num_clusters},
        "similarity": similarity,
    }


def _storage_options(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    del value
    is_expert = parameters.is_expert_array(jax.tree_util.keystr(key, simple=True, separator="/"))
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,) if is_expert else ())


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _provenance(
    reader: layout.StateReader, source_fingerprint: str, plan: PruningPlan
) -> dict[str, Any]:
    checkpoint = reader.checkpoint
    source_file = checkpoint.directory / layout.PROVENANCE_FILE
    return {
        "created_by": "prune",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": {
            "path": str(checkpoint),
            "step": checkpoint.step,
            "fingerprint": source_fingerprint,
            "provenance": checkpoint.provenance() if source_file.exists() else None,
        },
        "plan_hash": plan.hash,
        "plan": plan.to_dict(),
        "versions": {
            "python": platform.python_version(),
            "uncurl_jax": uncurl_jax.__version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
        },
    }


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    return report


def _count(stored: dict[str, layout.ArrayMetadata]) -> int:
    return sum(math.prod(entry.shape) for entry in stored.values())


def _bytes(stored: dict[str, layout.ArrayMetadata]) -> int:
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in stored.values())
