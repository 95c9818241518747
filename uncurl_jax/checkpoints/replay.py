"""Makes the arrays of a pruned checkpoint from its source, a few experts at a time.

Reading, aligning (in worker processes) and merging overlap. Memory stays near a small multiple of
one expert for each worker, or of the largest other array, however large layers and model are.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.accounting import Accounts, Piece
from uncurl_jax.checkpoints.finite import check_finite
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import AlignedExpert, AlignmentPool
from uncurl_jax.pruning.merging import RunningMean
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.prune import prune_router
from uncurl_jax.pruning.router import scale_outputs

# Below this many hidden units all alignments of a layer take less time than a process's start.
_MIN_MLP_DIM_FOR_WORKERS = 1024


class Similarity(NamedTuple):
    """Cosine of one aligned member and its reference, before and after its permutation."""

    before: float
    after: float


class Replayed(NamedTuple):
    """One piece of the result.

    Attributes:
      piece: which.
      arrays: {key: array}; of an expert, its entry without the expert axis.
      similarities: of the aligned members, rising; empty where nothing was aligned.
    """

    piece: Piece
    arrays: dict[str, np.ndarray]
    similarities: tuple[Similarity, ...]


@dataclasses.dataclass
class Seconds:
    """Where time went.

    Attributes:
      read: waiting for arrays of the source.
      cost_matrices: products of hidden units' features, added over the workers.
      assignments: the assignment problems, added over the workers.
      merge: permuting and averaging.
      write: hashing, and waiting for the arrays to be on disk.
    """

    read: float = 0.0
    cost_matrices: float = 0.0
    assignments: float = 0.0
    merge: float = 0.0
    write: float = 0.0

    @contextlib.contextmanager
    def add(self, name: str) -> Iterator[None]:
        """Adds the time that the body takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - start)


def choose_workers(workers: int | None, plan: PruningPlan, config: ModelConfig) -> int:
    """Returns how many processes to align with.

    Args:
      workers: what the user wants; None is one for each core this process may use, or none where
        experts are small.
      plan: the plan.
      config: the source's architecture.

    Raises:
      InputError: If workers is negative.
    """
    if workers is not None and workers < 0:
        raise InputError(f"workers must not be negative, got {workers}: 0 uses no other process.")
    if plan.alignment == "none":
        return 0
    aligned = sum(size - 1 for layer in plan.layers for size in layer.cluster_sizes)
    if workers is None:
        is_small = config.mlp_dim < _MIN_MLP_DIM_FOR_WORKERS or aligned < 4
        workers = 0 if is_small else len(os.sched_getaffinity(0))
    return min(workers, aligned)


def replay(
    reader: layout.ArrayReader,
    plan: PruningPlan,
    config: ModelConfig,
    accounts: Accounts,
    pieces: Sequence[Piece],
    *,
    workers: int = 0,
    seconds: Seconds | None = None,
) -> Generator[Replayed]:
    """Carries a plan out, piece by piece; close the iterator to end its workers early.

    Args:
      reader: the source, which `account` accepted.
      plan: the plan.
      config: the source's architecture.
      accounts: of the source.
      pieces: which of the accounts' pieces to make, in order.
      workers: processes for the alignment; the result is the same for any number.
      seconds: gets the time of each part added.

    Yields:
      The pieces in the order given, in the dtypes of the source.

    Raises:
      InputError: If an array is damaged or holds NaN or infinity.
    """
    seconds = Seconds() if seconds is None else seconds
    source = _Source(reader, plan, pieces, seconds)
    alignment = "features" if plan.alignment == "none" else plan.alignment
    with AlignmentPool(workers, alignment) as pool:
        merger = _Merger(plan, seconds)
        pending: collections.deque[_Member] = collections.deque()
        for number, piece in enumerate(pieces):
            if piece.layer is None:
                yield Replayed(piece, _remade(source, piece, plan, config, accounts), ())
                continue
            reference: dict[str, np.ndarray] = {}
            for z in _reading_order(piece, plan):
                expert = source.next(piece, z)
                future = None
                if not reference:
                    reference = expert
                elif plan.alignment != "none":
                    future = pool.submit(number, reference, expert)
                pending.append(_Member(piece, z, expert, future))
                while _is_full(pending, workers):
                    yield from merger.add(pending.popleft())
        while pending:
            yield from merger.add(pending.popleft())


class _Source:
    """The arrays of the source in the order in which `replay` needs them, read ahead."""

    def __init__(
        self,
        reader: layout.ArrayReader,
        plan: PruningPlan,
        pieces: Sequence[Piece],
        seconds: Seconds,
    ):
        self._reader = reader
        self._seconds = seconds
        self._arrays = reader.stream(
            (key, index)
            for piece in pieces
            for index in (_reading_order(piece, plan) if piece.members else (None,))
            for key in piece.keys
        )

    def next(self, piece: Piece, index: int | None) -> dict[str, np.ndarray]:
        """Returns {last part of the key, or the key itself without `index`: array}, checked."""
        arrays = {}
        for key in piece.keys:
            with self._seconds.add("read"):
                array = next(self._arrays)
            if not np.isfinite(array).all():
                # Raises, and names every parameter and expert that is not finite.
                check_finite(self._reader)
            arrays[key if index is None else key.rsplit("/", 1)[1]] = array
        return arrays


class _Member(NamedTuple):
    """One expert of the source on its way into its cluster."""

    piece: Piece
    expert: int
    arrays: dict[str, np.ndarray]
    aligned: concurrent.futures.Future[AlignedExpert] | None


class _Merger:
    """Merges the members of one cluster after the other."""

    def __init__(self, plan: PruningPlan, seconds: Seconds):
        self._plan = plan
        self._seconds = seconds
        self._mean: RunningMean | None = None
        self._waiting: list[int] = []
        self._ready: dict[int, tuple[dict[str, np.ndarray], np.ndarray | None]] = {}
        self._similarities: dict[int, Similarity] = {}

    def add(self, member: _Member) -> Iterator[Replayed]:
        """Takes the next member; yields its cluster if that is the last one.

        Members are merged in rising order, which decides the bits of the sum; the reference comes
        first and waits for its turn.
        """
        piece = member.piece
        assert piece.layer is not None
        decided = self._plan.layer(piece.layer)
        permutation = self._permutation(member)
        start = time.monotonic()
        if self._mean is None:
            self._mean = RunningMean(is_single=len(piece.members) == 1)
            self._waiting = list(piece.members)
        self._ready[member.expert] = member.arrays, permutation
        while self._waiting and self._waiting[0] in self._ready:
            z = self._waiting.pop(0)
            self._mean.add(self._ready[z][0], decided.weights[z], self._ready.pop(z)[1])
        finished = None if self._waiting else self._finish(piece)
        self._seconds.merge += time.monotonic() - start
        if finished is not None:
            yield finished

    def _permutation(self, member: _Member) -> np.ndarray | None:
        if member.aligned is None:
            return None
        try:
            aligned = member.aligned.result()
        except InputError as error:
            raise InputError(
                f"Expert {member.expert} of layer {member.piece.layer}: {error}"
            ) from None
        self._seconds.cost_matrices += aligned.seconds_products
        self._seconds.assignments += aligned.seconds_assignment
        self._similarities[member.expert] = Similarity(
            aligned.similarity_before, aligned.similarity_after
        )
        return aligned.permutation

    def _finish(self, piece: Piece) -> Replayed:
        assert self._mean is not None and piece.layer is not None and piece.cluster is not None
        expert: Mapping[str, np.ndarray] = self._mean.result()
        factors = self._plan.layer(piece.layer).gate_factors
        if factors is not None:
            stacked = {name: array[None] for name, array in expert.items()}
            scaled = scale_outputs(stacked, [factors[piece.cluster]])
            expert = {name: array[0] for name, array in scaled.items()}
        arrays = {key: expert[key.rsplit("/", 1)[1]] for key in piece.keys}
        similarities = tuple(self._similarities[z] for z in sorted(self._similarities))
        self._mean, self._ready, self._similarities = None, {}, {}
        return Replayed(piece, arrays, similarities)


def _remade(
    source: _Source, piece: Piece, plan: PruningPlan, config: ModelConfig, accounts: Accounts
) -> dict[str, np.ndarray]:
    """Returns arrays that have no expert axis: as they are, and new router kernels."""
    arrays = source.next(piece, None)
    for key in piece.keys:
        if key in accounts.routers:
            layer = accounts.routers[key]
            arrays[key] = np.ascontiguousarray(
                prune_router(plan, layer, arrays[key], init_stddev=config.init_stddev)
            )
    return arrays


def _reading_order(piece: Piece, plan: PruningPlan) -> list[int]:
    """Returns the members, the reference first, since the others are aligned to it."""
    assert piece.layer is not None and piece.cluster is not None
    reference = plan.layer(piece.layer).reference[piece.cluster]
    return [reference, *(z for z in piece.members if z != reference)]


def _is_full(pending: collections.deque[_Member], workers: int) -> bool:
    """Whether a member must be merged before another is read: this bounds the memory."""
    unaligned = sum(m.aligned is not None and not m.aligned.done() for m in pending)
    return unaligned > 2 * workers or len(pending) > 4 * workers
