"""A bounded queue of jobs, gathered into batches for one thread that owns the device."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from uncurl_jax.serving.metrics import ServerMetrics

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The queue holds as much as it may.

    Attributes:
      retry_after_seconds: when there is likely room again.
    """

    def __init__(self, retry_after_seconds: int):
        super().__init__(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class ShuttingDownError(Exception):
    """The server takes no more work, or could not finish this work in time."""


class Job:
    """Work of one request: rows that may share a batch with those of other jobs of the same key.

    Made and awaited in the event loop; run by the thread, which sees `is_wanted` turn False when
    nobody waits any more.

    Attributes:
      key: jobs of one key may be run together.
      num_rows: that it takes up in a batch.
      payload: what is to be run.
      is_wanted: whether somebody still waits for it.
      result: future of what came out.
      events: what the thread said while it ran, None at the end.
    """

    def __init__(self, key: tuple[str, ...], num_rows: int, payload: Any):
        """Belongs to the running event loop."""
        self.key, self.num_rows, self.payload = key, num_rows, payload
        self.is_wanted = True
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()
        self.events: asyncio.Queue[Any] = asyncio.Queue()

    def emit(self, event: Any) -> None:
        """Says something to whoever reads `events`, from the thread."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def finish(self, value: Any) -> None:
        """Gives the result, from the thread; may come before the whole batch is done."""
        self._loop.call_soon_threadsafe(self._set, value, None)

    def fail(self, error: BaseException) -> None:
        """Gives an error in place of a result, from the thread or the loop."""
        self._loop.call_soon_threadsafe(self._set, None, error)

    def _set(self, value: Any, error: BaseException | None) -> None:
        if self.result.done():
            return
        self.events.put_nowait(None)
        if error is None:
            self.result.set_result(value)
        else:
            self.result.set_exception(error)
            # Nobody may be waiting any more; asyncio would complain when it is collected.
            self.result.exception()

    def cancel(self) -> None:
        """Says that nobody waits any more."""
        self.is_wanted = False


class Batcher:
    """Queue and gathering; `run` until cancelled."""

    def __init__(
        self,
        execute: Callable[[Sequence[Job]], None],
        metrics: ServerMetrics,
        *,
        max_batch: int,
        max_wait_seconds: float,
        max_queue: int,
        max_background: int,
    ):
        """Runs nothing yet.

        Args:
          execute: runs a batch of jobs of one key in the thread, and finishes each of them.
          metrics: told of queue and batches.
          max_batch: rows of a batch; a job with more is a batch of its own.
          max_wait_seconds: how long the oldest job waits for others.
          max_queue: jobs that may wait.
          max_background: rows of background jobs that may wait.
        """
        self._execute = execute
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_wait_seconds = max_wait_seconds
        self._max_queue = max_queue
        self._max_background = max_background
        self._waiting: collections.deque[tuple[float, Job]] = collections.deque()
        self._background: collections.deque[Job] = collections.deque()
        self._arrived = asyncio.Event()
        self._running: Sequence[Job] = ()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
        self._seconds_per_job = 0.1
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Jobs that wait, background ones left out."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waiting or running, background jobs included."""
        return not (self._waiting or self._background or self._running)

    def require_room(self) -> None:
        """Raises what `submit` would raise now."""
        if self._is_closed:
            raise ShuttingDownError
        if len(self._waiting) >= self._max_queue:
            seconds = self._seconds_per_job * len(self._waiting)
            raise QueueFullError(min(max(1, math.ceil(seconds)), 60))

    def submit(self, job: Job) -> None:
        """Puts a job into the queue; await its `result`.

        Raises:
          QueueFullError: If the queue is full.
          ShuttingDownError: After `close`.
        """
        self.require_room()
        self._waiting.append((time.monotonic(), job))
        self._metrics.queue_length.set(len(self._waiting))
        self._arrived.set()

    def offer(self, job: Job) -> bool:
        """Takes a job for idle time, if there is room for it; says whether."""
        rows = sum(each.num_rows for each in self._background)
        if self._is_closed or rows + job.num_rows > self._max_background:
            return False
        self._background.append(job)
        self._arrived.set()
        return True

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the thread that owns the device."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Gathers and runs batches until cancelled."""
        while True:
            self._forget_unwanted()
            if self._waiting:
                await self._wait_for_company()
                batch = self._take(self._waiting, lambda entry: entry[1])
                self._metrics.queue_length.set(len(self._waiting))
            elif self._background:
                batch = self._take(self._background, lambda job: job)
            else:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            # All may have been given up while they waited for company.
            if batch:
                await self._run_batch(batch)

    async def _run_batch(self, batch: Sequence[Job]) -> None:
        self._running = batch
        started = time.monotonic()
        try:
            await self.call(lambda: self._execute(batch))
        except Exception as error:
            _log.exception("a batch of %d jobs failed", len(batch))
            for job in batch:
                job.fail(error)
        finally:
            self._running = ()
        seconds = (time.monotonic() - started) / len(batch)
        self._seconds_per_job += 0.2 * (seconds - self._seconds_per_job)

    async def _wait_for_company(self) -> None:
        """Waits until the batch of the oldest job is full, its time is up, or others wait too."""
        arrived, first = self._waiting[0]
        deadline = arrived + self._max_wait_seconds
        while (
            (rest := deadline - time.monotonic()) > 0
            and sum(job.num_rows for _, job in self._waiting) < self._max_batch
            and all(job.key == first.key for _, job in self._waiting)
            and self._waiting
        ):
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._arrived.wait()

    def _take(self, queue: collections.deque, job_of: Callable[[Any], Job]) -> list[Job]:
        """Takes the oldest job of a queue and the oldest others of its key that fit."""
        batch: list[Job] = []
        rows, kept = 0, []
        for entry in queue:
            job = job_of(entry)
            if not batch or (job.key == batch[0].key and rows + job.num_rows <= self._max_batch):
                batch.append(job)
                rows += job.num_rows
            else:
                kept.append(entry)
        queue.clear()
        queue.extend(kept)
        return batch

    def _forget_unwanted(self) -> None:
        wanted = [entry for entry in self._waiting if entry[1].is_wanted]
        if len(wanted) < len(self._waiting):
            self._waiting.clear()
            self._waiting.extend(wanted)

    def close(self) -> None:
        """Takes no more jobs; those that wait are still run."""
        self._is_closed = True

    def abandon(self) -> int:
        """Gives up all jobs that are not done; returns how many somebody waited for."""
        jobs = [*(job for _, job in self._waiting), *self._running]
        self._waiting.clear()
        self._background.clear()
        abandoned = [job for job in jobs if job.is_wanted and not job.result.done()]
        for job in abandoned:
            job.cancel()
            job.fail(ShuttingDownError())
        return len(abandoned)

    async def stop(self) -> None:
        """Waits for what the thread is doing, and ends it."""
        await asyncio.to_thread(self._thread.shutdown)
