"""What every way to prune a checkpoint checks first and records in its result."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

import uncurl_jax
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan

# What is being done, how much of it is done, and how much there is in all.
Progress = Callable[[str, int, int], None]

# SHA-256 of the bytes of every array of a pruned checkpoint; of [expert, ...] arrays, of each
# expert: {key: hash or list of hashes}.
HASHES_FILE = "hashes.json"

_VERSIONED_PACKAGES = ("jax", "numpy", "scipy", "orbax-checkpoint", "tensorstore")


def new_output(out: layout.PathLike) -> epath.Path:
    """Returns the absolute path of a result; InputError if something is there.

    Raises:
      InputError: If something is there.
      RuntimeError: If this is one of several processes of `jax.distributed`.
    """
    if jax.process_count() > 1:
        raise RuntimeError(
            f"A checkpoint is pruned by one process, got {jax.process_count()}: run it on one host "
            "without jax.distributed."
        )
    path = epath.Path(out)
    if not layout.is_remote(path):
        path = path.expanduser().resolve()
    if path.exists():
        raise InputError(
            f"An output must not exist yet, got {path}: choose another --out or remove it first."
        )
    return path


def check_source(reader: layout.ArrayReader, config: ModelConfig, plan: PruningPlan) -> str:
    """Returns the fingerprint of the checkpoint that a plan is of.

    Raises:
      InputError: If the checkpoint does not hold its architecture's arrays, or the plan is of
        another checkpoint or this one has changed.
    """
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
    return found


def make_provenance(
    reader: layout.ArrayReader, fingerprint: str, plan: PruningPlan
) -> dict[str, Any]:
    """Returns the provenance of a checkpoint pruned from `reader`'s, which has `fingerprint`."""
    return {
        **source_provenance("prune", reader, fingerprint),
        "plan_hash": plan.hash,
        "plan": plan.to_dict(),
        "versions": versions(),
    }


def source_provenance(
    created_by: str, reader: layout.ArrayReader, fingerprint: str
) -> dict[str, Any]:
    """Returns the part of a provenance that says what a checkpoint was made from, and when."""
    checkpoint = reader.checkpoint
    source_file = checkpoint.directory / layout.PROVENANCE_FILE
    return {
        "created_by": created_by,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": {
            "path": str(checkpoint),
            "step": checkpoint.step,
            "fingerprint": fingerprint,
            "provenance": checkpoint.provenance() if source_file.exists() else None,
        },
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and those that decide a result's bytes."""
    return {
        "python": platform.python_version(),
        "uncurl_jax": uncurl_jax.__version__,
        **{name: importlib.metadata.version(name) for name in _VERSIONED_PACKAGES},
    }


def journal_header(reader: layout.ArrayReader, fingerprint: str, **decided: Any) -> dict[str, Any]:
    """Returns what interrupted work must have in common with the work that goes on with it.

    Args:
      reader: the source.
      fingerprint: its.
      **decided: JSON-compatible; what else decides the result.
    """
    return {
        **decided,
        "source": str(reader.checkpoint),
        "fingerprint": fingerprint,
        "source_manifest": reader.identity(),
        "versions": versions(),
    }


def array_hash(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order."""
    contiguous = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(contiguous.view(np.uint8).data).hexdigest()


def hashes_record(
    plan: PruningPlan | None, arrays: Mapping[str, str | list[str]]
) -> dict[str, Any]:
    """Returns the content of `HASHES_FILE`; there is no plan for what was converted."""
    made_by = {} if plan is None else {"plan_hash": plan.hash}
    return {"algorithm": "sha256", **made_by, "arrays": dict(sorted(arrays.items()))}


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None]:
    """Returns a function (done, total) that calls `progress`, if there is one, for one stage."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    return report
