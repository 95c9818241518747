"""Alignment of experts: the order of hidden units under which two experts are most alike.

Permuting an expert's hidden units leaves its output unchanged, so units must be matched before
weights are averaged (arXiv 2409.01483, section 4; Git Re-Basin). Axes: expert, embed, mlp, cluster.
This module imports neither JAX nor scikit-learn: worker processes start fast.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import queue
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import threadpoolctl

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.assignment import best_assignment

# One expert: "wi" [embed, mlp], "wo" [mlp, embed]; optional "wi_bias" [mlp], "wo_bias" [embed] and,
# in a gated feed-forward network, the gate projection "wg" [embed, mlp], "wg_bias" [mlp].
Expert = Mapping[str, np.ndarray]
# The same names with a leading [expert] axis.
Experts = Mapping[str, np.ndarray]

# How the members of a cluster are matched to its reference: not at all, by inner products of hidden
# units' features (the paper), or by those of features scaled to norm 1 (cosines).
ALIGNMENTS = ("none", "features", "unit_features")

# Axis that runs over the hidden units, in one expert; None where there is none.
_HIDDEN_AXIS: dict[str, int | None] = {
    "wi": 1,
    "wi_bias": 0,
    "wg": 1,
    "wg_bias": 0,
    "wo": 0,
    "wo_bias": None,
}


class Alignment(NamedTuple):
    """How each expert's hidden units are ordered before the merge.

    Attributes:
      permutations: [expert, mlp] int32; row z is applied by `permute_hidden`. The identity for
        references, members of singletons and dropped experts.
      similarity_before: [expert] float64, cosine of the expert's and its reference's features (as
        the alignment scales them) in the stored order of units; 1 for references, 0 for dropped
        experts.
      similarity_after: [expert] float64, the same after the permutation, never smaller.
    """

    permutations: np.ndarray
    similarity_before: np.ndarray
    similarity_after: np.ndarray


class AlignedExpert(NamedTuple):
    """One expert's alignment to its reference; fields as in `Alignment`, for one expert.

    Attributes:
      permutation: [mlp] int32.
      similarity_before: cosine in the stored order of units.
      similarity_after: cosine after the permutation.
      seconds_products: time that the products of features took.
      seconds_assignment: time that the assignment took.
    """

    permutation: np.ndarray
    similarity_before: float
    similarity_after: float
    seconds_products: float
    seconds_assignment: float


def check_expert(expert: Expert) -> None:
    """Raises InputError if an expert's arrays have unknown names or do not fit together."""
    unknown = sorted(set(expert) - set(_HIDDEN_AXIS))
    if unknown or not {"wi", "wo"} <= set(expert):
        raise InputError(
            f"An expert must hold wi and wo, and may hold {', '.join(sorted(_HIDDEN_AXIS))}, got "
            f"{', '.join(sorted(expert))}: rename its arrays."
        )
    embed, mlp = expert["wi"].shape
    expected = {"wi": (embed, mlp), "wg": (embed, mlp), "wo": (mlp, embed), "wo_bias": (embed,)}
    for name, array in expert.items():
        if array.shape != expected.get(name, (mlp,)):
            raise InputError(
                f"{name} of an expert with wi {(embed, mlp)} must have shape "
                f"{expected.get(name, (mlp,))}, got {array.shape}: experts are [embed, mlp] and "
                "[mlp, embed]."
            )


def permute_hidden(expert: Expert, permutation: np.ndarray) -> dict[str, np.ndarray]:
    """Reorders an expert's hidden units; its output stays the same.

    Args:
      expert: one expert's arrays.
      permutation: [mlp] int; unit j of the result is unit permutation[j] of `expert`.

    Returns:
      New arrays under the same names; wo_bias has no hidden axis and is passed through.
    """
    check_expert(expert)
    return {name: permute_array(name, array, permutation) for name, array in expert.items()}


def permute_array(name: str, array: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Does what `permute_hidden` does to one array of an expert, "wi" for instance."""
    axis = _HIDDEN_AXIS[name]
    return array if axis is None else np.take(array, permutation, axis=axis)


def feature_products(reference: Expert, member: Expert, alignment: str = "features") -> np.ndarray:
    """Returns M: inner products of all pairs of hidden units' features [gate, up, down].

    M = (W_in^J)^T W_in^y + W_out^J (W_out^y)^T, and for gated networks the same term for the
    gate projection; biases take no part. Computed in float32 (float64 for float64 experts).

    Args:
      reference: the cluster's reference expert J.
      member: the member y.
      alignment: "features", or "unit_features" to scale each unit's feature to norm 1 first (a
        unit of zeros stays zero).

    Returns:
      [mlp, mlp] float32 or float64; rows are J's units, columns y's.

    Raises:
      InputError: If the two differ in names or shapes, a product is not finite, or `alignment` is
        not one of the two.
    """
    return _compare(reference, member, alignment).products


def alignment_permutation(
    reference: Expert, member: Expert, alignment: str = "features"
) -> np.ndarray:
    """Returns the [mlp] int64 permutation P of `member` that maximises <J, member P>.

    Solves the linear assignment problem on `feature_products`; apply with `permute_hidden`.

    Raises:
      InputError: As in `feature_products`.
    """
    return best_assignment(feature_products(reference, member, alignment))


def align_expert(reference: Expert, member: Expert, alignment: str = "features") -> AlignedExpert:
    """Aligns one expert; the same bits in every process of a machine.

    BLAS gets one thread: its sums may depend on their number, and worker processes share the cores.

    Raises:
      InputError: As in `feature_products`.
    """
    start = time.monotonic()
    with _blas().limit(limits=1, user_api="blas"):
        products, norm = _compare(reference, member, alignment)
    compared = time.monotonic()
    permutation = best_assignment(products)
    matched = products[np.arange(len(products)), permutation].sum(dtype=np.float64)
    scale = 1.0 / norm if norm > 0 else 0.0
    return AlignedExpert(
        permutation.astype(np.int32),
        float(np.trace(products, dtype=np.float64) * scale),
        float(matched * scale),
        compared - start,
        time.monotonic() - compared,
    )


def align_clusters(
    experts: Experts,
    labels: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    alignment: str = "features",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Alignment:
    """Aligns every member of each cluster to the cluster's reference.

    The result is the same for any number of workers. With 4096 hidden units a member takes one or
    two seconds of one core.

    Args:
      experts: one layer's arrays with a leading [expert] axis.
      labels: [expert] int, -1 for dropped experts.
      reference: [cluster] int, the expert that is not permuted.
      alignment: "features" or "unit_features"; see `feature_products`.
      workers: processes; 0 works in this one.
      progress: called with (members aligned, members in all).

    Returns:
      Alignment of all experts.

    Raises:
      InputError: If workers is negative, shapes do not fit or a value is not finite.
    """
    labels, reference = np.asarray(labels), np.asarray(reference)
    num_experts, num_hidden = len(labels), experts["wi"].shape[-1]
    members = [z for z in range(num_experts) if labels[z] >= 0 and reference[labels[z]] != z]
    permutations = np.tile(np.arange(num_hidden, dtype=np.int32), (num_experts, 1))
    before, after = (np.where(labels >= 0, 1.0, 0.0) for _ in range(2))
    with AlignmentPool(min(workers, len(members)), alignment) as pool:
        futures = [
            pool.submit(kept, select_expert(experts, kept), select_expert(experts, z))
            for kept, z in ((int(reference[labels[z]]), z) for z in members)
        ]
        for done, (z, future) in enumerate(zip(members, futures, strict=True), start=1):
            aligned = future.result()
            permutations[z] = aligned.permutation
            before[z], after[z] = aligned.similarity_before, aligned.similarity_after
            if progress is not None:
                progress(done, len(members))
    return Alignment(permutations, before, after)


def select_expert(experts: Experts, index: int) -> dict[str, np.ndarray]:
    """Returns views of one expert's arrays."""
    return {name: array[index] for name, array in experts.items()}


class _Comparison(NamedTuple):
    """[mlp, mlp] products of features, and the product of the two experts' norms."""

    products: np.ndarray
    norm: float


def _compare(reference: Expert, member: Expert, alignment: str) -> _Comparison:
    if alignment not in ALIGNMENTS[1:]:
        raise InputError(
            f"alignment must be one of {', '.join(ALIGNMENTS[1:])} where experts are aligned, got "
            f"{alignment!r}: choose one."
        )
    check_expert(reference)
    check_expert(member)
    shapes = [{name: array.shape for name, array in e.items()} for e in (reference, member)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"Experts of one cluster must have the same arrays, got {shapes[0]} and {shapes[1]}."
        )
    num_hidden = reference["wi"].shape[1]
    dtype = np.result_type(np.float32, *(_wide(e[n]) for e in (reference, member) for n in e))
    products = np.zeros((num_hidden, num_hidden), dtype)
    squares = np.zeros((2, num_hidden))
    for name in ("wg", "wi", "wo"):
        if name in reference:
            left, right = (_units(e, name, dtype) for e in (reference, member))
            products += left @ right.T
            for row, units in zip(squares, (left, right), strict=True):
                row += np.square(units).sum(axis=1, dtype=np.float64)
    if alignment == "unit_features":
        norms = np.sqrt(squares)
        inverse = np.where(norms > 0, 1.0, 0.0) / np.where(norms > 0, norms, 1.0)
        products *= inverse[0][:, None].astype(dtype)
        products *= inverse[1].astype(dtype)
        squares = (norms > 0).astype(np.float64)
    if not np.isfinite(products).all():
        raise InputError(
            "Experts to align must be finite, got NaN or infinity in their inner products: check "
            "the checkpoint."
        )
    return _Comparison(products, float(np.sqrt(squares[0].sum()) * np.sqrt(squares[1].sum())))


def _units(expert: Expert, name: str, dtype: npt.DTypeLike) -> np.ndarray:
    """Returns [mlp, embed], one row per hidden unit; a view where nothing is converted."""
    array = np.asarray(expert[name]).astype(dtype, copy=False)
    return array if _HIDDEN_AXIS[name] == 0 else array.T


def _wide(array: np.ndarray) -> np.dtype:
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Finds the BLAS libraries, which takes some milliseconds, once."""
    return threadpoolctl.ThreadpoolController()


class AlignmentPool:
    """Processes that align experts; a context manager.

    A worker holds one pair of experts, their products and one float64 matrix: about 0.35 GB with
    4096 hidden units. Workers end with this process however it ends, a kill included: each reads
    its own pipe and stops at its end.
    """

    def __init__(self, workers: int, alignment: str):
        """Starts the processes.

        Args:
          workers: how many; 0 aligns inside `submit`.
          alignment: "features" or "unit_features"; see `feature_products`.

        Raises:
          InputError: If workers is negative.
        """
        if workers < 0:
            raise InputError(
                f"workers must not be negative, got {workers}: 0 uses no other process."
            )
        self.workers = workers
        self._alignment = alignment
        # spawn: a fork would copy the locks of JAX's threads.
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(context, alignment) for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)
        # One thread for each process: it sends a pair and waits, so that no pipe blocks the caller.
        self._threads = concurrent.futures.ThreadPoolExecutor(workers) if workers else None

    def submit(
        self, key: int, reference: Expert, member: Expert
    ) -> concurrent.futures.Future[AlignedExpert]:
        """Starts to align `member`; calls with the same `key` have the same reference."""
        if self._threads is not None:
            return self._threads.submit(self._send, key, reference, member)
        future: concurrent.futures.Future[AlignedExpert] = concurrent.futures.Future()
        try:
            future.set_result(align_expert(reference, member, self._alignment))
        except InputError as error:
            future.set_exception(error)
        return future

    def _send(self, key: int, reference: Expert, member: Expert) -> AlignedExpert:
        worker = self._idle.get()
        try:
            return worker.align(key, reference, member)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> AlignmentPool:
        """Returns the pool."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the processes; what has not been aligned by then is not."""
        if self._threads is not None:
            for worker in self._all:
                worker.end(at_once=exception[0] is not None)
            self._threads.shutdown(cancel_futures=True)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: multiprocessing.context.SpawnContext, alignment: str):
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, alignment), daemon=True)
        self._process.start()
        other_end.close()
        self._key: int | None = None

    def align(self, key: int, reference: Expert, member: Expert) -> AlignedExpert:
        try:
            self._pipe.send((None if key == self._key else dict(reference), dict(member)))
            self._key = key
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "A process that aligns experts must not end by itself, got exit code "
                f"{self._process.exitcode}: memory may be short; use fewer workers and run again."
            ) from error
        if isinstance(result, InputError):
            raise result
        return result

    def end(self, *, at_once: bool) -> None:
        if at_once:
            self._process.terminate()
        else:
            self._pipe.close()
        self._process.join()


def _serve(pipe: multiprocessing.connection.Connection, alignment: str) -> None:
    """Aligns what comes through the pipe until its other end is closed."""
    reference: Expert = {}
    while True:
        try:
            new_reference, member = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        reference = new_reference or reference
        try:
            pipe.send(align_expert(reference, member, alignment))
        except InputError as error:
            pipe.send(error)
        except KeyboardInterrupt:
            return
        del member, new_reference
