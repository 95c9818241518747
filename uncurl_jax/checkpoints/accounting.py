"""Which arrays of a checkpoint a prune reads, and which it makes of them: every key, once.

Arrays are named as in `layout`. A piece is what is made, written and recorded at once: one expert
of the result, or some arrays that have no expert axis.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.parameters import differences, expected_parameters, listed
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan

STEP = "state/step"

_BATCH_BYTES = 32 * 2**20
_LAYER_NAME = re.compile(rf"{layout.TARGET}/layers_(\d+)/moe/(experts|router)/(.+)")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some arrays of the result.

    Attributes:
      name: tells it from the others; what the journal of an interrupted prune holds.
      keys: the arrays. Those of an expert have an expert axis and the piece is entry `cluster`.
      layer: layer of an expert, None for other arrays.
      cluster: which expert of the result, None for other arrays.
      members: experts of the source that it is merged from, rising; empty for other arrays.
    """

    name: str
    keys: tuple[str, ...]
    layer: int | None = None
    cluster: int | None = None
    members: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many experts or batches of arrays it reads."""
        return max(1, len(self.members))


@dataclasses.dataclass(frozen=True)
class Accounts:
    """What becomes of every array of the source.

    Attributes:
      pieces: all of the result but the step, in the order in which they are made.
      targets: {key: (shape, dtype)} of every array of the result, the step included.
      routers: {key: layer} of the router kernels, which are remade.
      left_out: keys of the source that have no part in the result: step and optimizer state.
    """

    pieces: tuple[Piece, ...]
    targets: dict[str, layout.ArrayMetadata]
    routers: dict[str, int]
    left_out: tuple[str, ...]


def pruned_config(config: ModelConfig, plan: PruningPlan) -> ModelConfig:
    """Returns the architecture after the prune."""
    return dataclasses.replace(config, num_experts=plan.num_experts, expert_map=plan.expert_map)


def account(reader: layout.ArrayReader, plan: PruningPlan, config: ModelConfig) -> Accounts:
    """Assigns every array of the source to arrays of the result.

    Args:
      reader: the source, of the architecture `config`.
      plan: the plan.
      config: the source's architecture.

    Returns:
      The accounts.

    Raises:
      InputError: If an array of the source has no place, or the result would lack an array of the
        pruned architecture, hold another or one of another shape; lists them.
    """
    others: list[str] = []
    experts: dict[int, list[str]] = {}
    routers: dict[str, int] = {}
    left_out, unknown = [], []
    targets = {STEP: layout.ArrayMetadata((), np.dtype(np.int32))}
    after = pruned_config(config, plan)
    for key, (shape, dtype) in reader.metadata.items():
        match = _LAYER_NAME.fullmatch(key)
        if not key.startswith(f"{layout.TARGET}/"):
            (left_out if key.startswith("state/") else unknown).append(key)
            continue
        if match is None:
            others.append(key)
        elif match[2] == "experts":
            layer = int(match[1])
            experts.setdefault(layer, []).append(key)
            shape = (after.num_experts[layer], *shape[1:])
        else:
            others.append(key)
            routers[key] = int(match[1])
            shape = (*shape[:-1], after.router_width(int(match[1])))
        targets[key] = layout.ArrayMetadata(shape, dtype)
    made = {
        key.removeprefix(f"{layout.TARGET}/"): entry.shape
        for key, entry in targets.items()
        if key != STEP
    }
    problems = [f"no place for {key}" for key in unknown]
    problems += differences(made, expected_parameters(after))
    if problems:
        raise InputError(
            "A prune must account for every array of its source and of its result once, got "
            f"{reader.checkpoint} with {listed(problems)}: save the parameters again with this "
            "package, or make the plan for this checkpoint."
        )
    pieces = (*_batches(others, targets), *_experts(experts, plan))
    return Accounts(pieces, targets, routers, tuple(left_out))


def account_copy(reader: layout.ArrayReader, dtype: np.dtype | None = None) -> Accounts:
    """Assigns every array of a checkpoint to itself.

    Args:
      reader: the checkpoint, which holds the arrays of its architecture.
      dtype: what numbers become; None leaves them as they are.
    """
    targets = {STEP: layout.ArrayMetadata((), np.dtype(np.int32))}
    others: list[str] = []
    experts: dict[int, list[str]] = {}
    for key, (shape, stored) in reader.metadata.items():
        if key.startswith(f"{layout.TARGET}/"):
            targets[key] = layout.ArrayMetadata(shape, stored if dtype is None else dtype)
            match = _LAYER_NAME.fullmatch(key)
            if match is not None and match[2] == "experts":
                experts.setdefault(int(match[1]), []).append(key)
            else:
                others.append(key)
    pieces = [*_batches(others, targets)]
    for layer, keys in sorted(experts.items()):
        for z in range(targets[keys[0]].shape[0]):
            pieces.append(Piece(_expert_name(layer, z), tuple(keys), layer, z, (z,)))
    left_out = tuple(key for key in reader.metadata if key not in targets)
    return Accounts(tuple(pieces), targets, {}, left_out)


def _expert_name(layer: int, expert: int) -> str:
    return f"{layout.TARGET}/layers_{layer}/moe/experts expert {expert}"


def _batches(keys: list[str], targets: dict[str, layout.ArrayMetadata]) -> Iterator[Piece]:
    """Puts small arrays together, since every piece costs a commit to disk."""
    batch: list[str] = []
    num_bytes = 0
    for key in keys:
        shape, dtype = targets[key]
        size = math.prod(shape) * dtype.itemsize
        if batch and num_bytes + size > _BATCH_BYTES:
            yield Piece(f"{batch[0]} and {len(batch) - 1} more", tuple(batch))
            batch, num_bytes = [], 0
        batch.append(key)
        num_bytes += size
    if batch:
        yield Piece(f"{batch[0]} and {len(batch) - 1} more", tuple(batch))


def _experts(experts: dict[int, list[str]], plan: PruningPlan) -> Iterator[Piece]:
    for layer, keys in sorted(experts.items()):
        decided = plan.layer(layer)
        for cluster in range(decided.num_clusters):
            members = tuple(z for z, label in enumerate(decided.labels) if label == cluster)
            yield Piece(_expert_name(layer, cluster), tuple(keys), layer, cluster, members)
