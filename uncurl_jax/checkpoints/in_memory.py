"""Pruning of small checkpoints in memory, through Orbax's transformations of trees.

The plain way to do what `transform` does in pieces: same plan, same arrays, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from uncurl_jax.artifacts import atomic_directory
from uncurl_jax.checkpoints import companions, layout, pruned
from uncurl_jax.checkpoints.accounting import STEP, Accounts, account, pruned_config
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.replay import choose_workers
from uncurl_jax.checkpoints.state_writer import nested
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.prune import PrunedLayer, prune_layer


def prune_in_memory(
    source: layout.PathLike | layout.CheckpointPath,
    plan: PruningPlan,
    out: layout.PathLike,
    *,
    workers: int | None = 0,
) -> dict[str, Any]:
    """Carries out a pruning plan on a checkpoint of which two copies fit into memory.

    Args:
      source: the checkpoint that the plan's statistics were taken on; as for `layout.resolve`.
      plan: the plan.
      out: directory to make, as `transform.prune_checkpoint` makes it.
      workers: processes for the alignment; 0 works in this one, None chooses.

    Returns:
      A JSON-compatible summary: "out", "source", "plan_hash", "fingerprint" (of the result) and
      "seconds".

    Raises:
      InputError, RuntimeError: As in `transform.prune_checkpoint`; nothing has been written then.
    """
    start = time.monotonic()
    out = pruned.new_output(out)
    reader = layout.open_reader(source)
    config = reader.checkpoint.model_config()
    fingerprint = pruned.check_source(reader, config, plan)
    check_finite(reader)
    accounts = account(reader, plan, config)
    tree = _transformed(reader, plan, config, accounts, choose_workers(workers, plan, config))
    with _new_directory(out) as directory:
        with CheckpointStore(
            directory,
            model_config=pruned_config(config, plan),
            provenance=pruned.make_provenance(reader, fingerprint, plan),
            vocabulary=reader.checkpoint.vocabulary(),
        ) as store:
            store.save(0, tree[layout.TARGET])
        companions.carry(reader.checkpoint, directory)
        hashes = pruned.hashes_record(plan, _hashes(tree, accounts))
        layout.write_json_at(directory / pruned.HASHES_FILE, hashes)
    return {
        "out": os.fspath(out),
        "source": str(reader.checkpoint),
        "plan_hash": plan.hash,
        "fingerprint": layout.fingerprint(out),
        "seconds": round(time.monotonic() - start, 3),
    }


def _transformed(
    reader: layout.ArrayReader,
    plan: PruningPlan,
    config: ModelConfig,
    accounts: Accounts,
    workers: int,
) -> dict[str, Any]:
    """Returns the result's tree; arrays that no transformation names are those of the source."""
    keys = [key for key in reader.metadata if key not in accounts.left_out]
    original = nested({key: reader.read(key) for key in keys})

    @functools.cache
    def layer_after(layer: int) -> PrunedLayer:
        moe = original[layout.TARGET][f"layers_{layer}"]["moe"]
        return prune_layer(
            plan,
            layer,
            moe["router"]["kernel"],
            moe["experts"],
            init_stddev=config.init_stddev,
            workers=workers,
        )

    def router_of(layer: int) -> ocp.transform_utils.Transform:
        return ocp.transform_utils.Transform(multi_value_fn=lambda *_: layer_after(layer).router)

    def experts_of(layer: int, name: str) -> ocp.transform_utils.Transform:
        return ocp.transform_utils.Transform(
            multi_value_fn=lambda *_: layer_after(layer).experts[name]
        )

    transformations = {STEP: ocp.transform_utils.Transform(multi_value_fn=lambda *_: np.int32(0))}
    transformations |= {key: router_of(layer) for key, layer in accounts.routers.items()}
    for piece in accounts.pieces:
        if piece.layer is not None:
            for key in piece.keys:
                transformations[key] = experts_of(piece.layer, key.rsplit("/", 1)[1])
    return ocp.transform_utils.apply_transformations(
        original,
        nested(transformations),
        # Its values count for keys alone that are in neither of the other trees: there are none.
        nested(dict.fromkeys(accounts.targets, 0)),
    )


@contextlib.contextmanager
def _new_directory(out: epath.Path) -> Iterator[epath.Path]:
    if layout.is_remote(out):
        yield out
    else:
        with atomic_directory(out) as partial:
            yield epath.Path(partial)


def _hashes(tree: Mapping[str, Any], accounts: Accounts) -> dict[str, str | list[str]]:
    hashes: dict[str, str | list[str]] = {}
    for key in accounts.targets:
        array: Any = tree
        for part in key.split("/"):
            array = array[part]
        if is_expert_array(key):
            hashes[key] = [pruned.array_hash(entry) for entry in array]
        else:
            hashes[key] = pruned.array_hash(array)
    return hashes
