"""Verifying pruned checkpoints: replays the plan that a checkpoint carries on its source.

The provenance of a checkpoint is a chain: what it was made from, what that was made from, and so
on, through prunes and trainings. A prune can be replayed exactly; a training cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax.checkpoints import layout, pruned
from uncurl_jax.checkpoints.accounting import STEP, account, pruned_config
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.provenance import Link, provenance_chain
from uncurl_jax.checkpoints.pruned import Progress, array_hash, stage
from uncurl_jax.checkpoints.replay import Replayed, choose_workers, replay
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan


def verify_checkpoint(
    pruned_checkpoint: layout.PathLike | layout.CheckpointPath,
    source: layout.PathLike | layout.CheckpointPath | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replays the prunes that a checkpoint comes from and compares every array by hash.

    Args:
      pruned_checkpoint: a checkpoint that was pruned, or trained after a prune; as for
        `layout.resolve`.
      source: what it (or the newest checkpoint of its chain that was pruned) was pruned from;
        None takes the path that its provenance names.
      workers: processes for the alignment; 0 works in this one, None chooses.
      progress: called with ("verify", done, total), which count experts and batches of arrays.

    Returns:
      A JSON-compatible dict: "checkpoint", "verified" (whether at least one prune was replayed and
      all that were agree), "difference" (the first one that was found, else None: "checkpoint",
      "array", "expert" (or None), "expected" and "found", which are hashes or descriptions) and
      "chain": for each checkpoint, the newest first, "path", "created_by", "fingerprint",
      "plan_hash", "status" ("verified", "differs" or "not verifiable"), "reason" (why not, else
      None), "arrays" and "pieces" (how many were compared).

    Raises:
      InputError: If the checkpoint was not made by a prune, directly or through trainings; or the
        source of its newest prune is not where it should be, or another than it was pruned from.
    """
    chain = provenance_chain(layout.resolve(pruned_checkpoint))
    prunes = [index for index, link in enumerate(chain) if _is_prune(link)]
    if not prunes:
        raise InputError(
            "Only what comes from a prune can be verified, got "
            f"{chain[0].path}, whose provenance names no plan: give a pruned checkpoint."
        )
    entries, difference = [], None
    for index, link in enumerate(chain):
        if index not in prunes:
            entries.append(_entry(link, "not verifiable", reason="not made by a prune"))
            continue
        given = source if index == prunes[0] else None
        try:
            found = _compare(*_open(link, chain[index + 1], given), workers, progress)
        except InputError as error:
            if index == prunes[0]:
                raise
            entries.append(_entry(link, "not verifiable", reason=str(error)))
            continue
        status = "verified" if found.difference is None else "differs"
        entries.append(_entry(link, status, arrays=found.arrays, pieces=found.pieces))
        difference = difference or found.difference
    return {
        "checkpoint": chain[0].path,
        "verified": difference is None,
        "difference": difference,
        "chain": entries,
    }


class _Compared(NamedTuple):
    """What came of one replay."""

    difference: dict[str, Any] | None
    arrays: int
    pieces: int


def _is_prune(link: Link) -> bool:
    return link.provenance is not None and "plan" in link.provenance


def _entry(
    link: Link, status: str, *, reason: str | None = None, arrays: int = 0, pieces: int = 0
) -> dict[str, Any]:
    return {
        "path": link.path,
        "created_by": link.created_by,
        "fingerprint": link.fingerprint,
        "plan_hash": link.plan_hash,
        "status": status,
        "reason": reason,
        "arrays": arrays,
        "pieces": pieces,
    }


def _open(
    link: Link, made_from: Link, source: layout.PathLike | layout.CheckpointPath | None
) -> tuple[layout.ArrayReader, layout.ArrayReader, PruningPlan]:
    """Returns (pruned checkpoint, its source, plan), each that which the chain names."""
    result = layout.open_reader(link.path)
    if link.fingerprint is not None and layout.fingerprint(result) != link.fingerprint:
        raise InputError(
            f"A checkpoint of the chain must be what its successor was made from, got "
            f"{link.path} with another fingerprint than {link.fingerprint}: put it back."
        )
    assert link.provenance is not None
    plan = PruningPlan.from_dict(link.provenance["plan"])
    if plan.hash != link.plan_hash:
        raise InputError(
            f"provenance.json must hold the plan that it names, got plan_hash {link.plan_hash} and "
            f"a plan {plan.hash} in {link.path}: the file was edited."
        )
    try:
        reader = layout.open_reader(made_from.path if source is None else source)
    except InputError as error:
        raise InputError(
            f"Verifying {link.path} needs the checkpoint that it was pruned from: {error}"
        ) from None
    if layout.fingerprint(reader) != made_from.fingerprint:
        raise InputError(
            f"Verifying {link.path} needs the checkpoint with fingerprint "
            f"{made_from.fingerprint}, got {reader.checkpoint} with another: give the checkpoint "
            "(and step) that it was pruned from."
        )
    return result, reader, plan


def _compare(
    result: layout.ArrayReader,
    source: layout.ArrayReader,
    plan: PruningPlan,
    workers: int | None,
    progress: Progress | None,
) -> _Compared:
    """Compares everything in `result` with the replay, up to the first difference."""
    config = source.checkpoint.model_config()
    pruned.check_source(source, config, plan)
    accounts = account(source, plan, config)
    for difference in _of_files(result, pruned_config(config, plan).to_dict(), accounts.targets):
        return _Compared({"checkpoint": str(result.checkpoint), **difference}, 0, 0)
    recorded = _recorded_hashes(result)
    report = stage(progress, "verify")
    total, done = sum(piece.size for piece in accounts.pieces), 0
    workers = choose_workers(workers, plan, config)
    made = replay(source, plan, config, accounts, accounts.pieces, workers=workers)
    with contextlib.closing(made):
        for count, piece in enumerate(made, start=1):
            for difference in _of_piece(result, piece, recorded):
                return _Compared(
                    {"checkpoint": str(result.checkpoint), **difference},
                    len(accounts.targets),
                    count,
                )
            done += piece.piece.size
            report(done, total)
    return _Compared(None, len(accounts.targets), len(accounts.pieces))


def _of_files(
    result: layout.ArrayReader,
    config: dict[str, Any],
    targets: Mapping[str, layout.ArrayMetadata],
) -> Iterator[dict[str, Any]]:
    """Yields differences of the architecture, of names, shapes and dtypes, and of the step."""
    found_config = result.checkpoint.model_config().to_dict()
    for name in sorted(config):
        if found_config[name] != config[name]:
            place = f"{layout.MODEL_CONFIG_FILE}: {name}"
            yield _difference(place, None, str(config[name]), str(found_config[name]))
    for key in sorted(targets.keys() | result.metadata.keys()):
        expected, found = (
            None if key not in arrays else f"{list(arrays[key].shape)} {arrays[key].dtype.name}"
            for arrays in (targets, result.metadata)
        )
        if expected != found:
            yield _difference(key, None, expected or "no such array", found or "no such array")
    step = np.zeros((), np.int32)
    if (found := array_hash(result.read(STEP))) != array_hash(step):
        yield _difference(STEP, None, array_hash(step), found)


def _of_piece(
    result: layout.ArrayReader, made: Replayed, recorded: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields differences of one piece: of the stored arrays, then of the recorded hashes."""
    expert = made.piece.cluster
    stored = result.stream((key, expert) for key in made.arrays)
    for (key, array), found in zip(made.arrays.items(), stored, strict=True):
        expected = array_hash(array)
        if (got := array_hash(found)) != expected:
            yield _difference(key, expert, expected, got)
        if key in recorded:
            entry = recorded[key][expert] if is_expert_array(key) else recorded[key]
            if entry != expected:
                yield _difference(f"{pruned.HASHES_FILE}: {key}", expert, expected, entry)


def _recorded_hashes(result: layout.ArrayReader) -> Mapping[str, Any]:
    path = result.checkpoint.directory / pruned.HASHES_FILE
    return layout.read_json_at(path)["arrays"] if path.exists() else {}


def _difference(array: str, expert: int | None, expected: str, found: str) -> dict[str, Any]:
    return {"array": array, "expert": expert, "expected": expected, "found": found}
