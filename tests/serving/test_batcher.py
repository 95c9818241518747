"""Gathering of batches, limits and failures, with jobs that run no model."""

from __future__ import annotations

import asyncio
import threading

import pytest

from uncurl_jax.serving.batcher import Batcher, Job, QueueFullError, ShuttingDownError
from uncurl_jax.serving.metrics import ServerMetrics

A, B = ("a",), ("b",)


class Executor:
    """Notes the batches and finishes their jobs; waits for `go` where there is one."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()

    def __call__(self, jobs):
        self.started.set()
        self.go.wait()
        self.batches.append([job.payload for job in jobs])
        for job in jobs:
            if job.payload == "bad":
                raise RuntimeError("a bad job")
            job.finish(job.payload.upper())


def run(body, **limits):
    """Runs body(batcher, executor) while the batcher runs; returns the executor."""
    executor = Executor()

    async def main():
        values = {
            "max_batch": 4,
            "max_wait_seconds": 0.0,
            "max_queue": 100,
            "max_background": 2,
            **limits,
        }
        batcher = Batcher(executor, ServerMetrics({}), **values)
        task = asyncio.create_task(batcher.run())
        try:
            await body(batcher, executor)
        finally:
            executor.go.set()
            task.cancel()
            await batcher.stop()

    asyncio.run(main())
    return executor


async def blocked(batcher, executor) -> Job:
    """Makes the thread busy with one job until executor.go is set."""
    executor.go.clear()
    job = Job(B, 1, "first")
    batcher.submit(job)
    await asyncio.to_thread(executor.started.wait)
    return job


def test_jobs_of_one_key_share_a_batch_up_to_its_size_oldest_first():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        jobs = [
            Job(*each) for each in [(A, 2, "v"), (B, 1, "w"), (A, 3, "x"), (A, 1, "y"), (A, 1, "z")]
        ]
        for job in jobs:
            batcher.submit(job)
        executor.go.set()
        results = await asyncio.gather(first.result, *(job.result for job in jobs))
        assert results == ["FIRST", "V", "W", "X", "Y", "Z"]

    # x does not fit beside v (2 + 3 > 4), y and z do.
    assert run(body).batches == [["first"], ["v", "y", "z"], ["w"], ["x"]]


def test_a_job_larger_than_a_batch_is_one_of_its_own():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        jobs = [Job(A, 9, "large"), Job(A, 1, "small")]
        for job in jobs:
            batcher.submit(job)
        executor.go.set()
        await asyncio.gather(first.result, *(job.result for job in jobs))

    assert run(body).batches == [["first"], ["large"], ["small"]]


def test_a_job_waits_for_company_until_its_batch_is_full():
    async def body(batcher, executor):
        jobs = [Job(A, 1, text) for text in "pqrs"]
        for job in jobs:
            batcher.submit(job)
            await asyncio.sleep(0.001)
        await asyncio.gather(*(job.result for job in jobs))

    # Nobody would wait a minute for the fourth.
    assert run(body, max_wait_seconds=60.0).batches == [["p", "q", "r", "s"]]


def test_a_full_queue_refuses_and_says_when_to_come_back():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        jobs = [Job(A, 1, "x"), Job(A, 1, "y")]
        for job in jobs:
            batcher.submit(job)
        with pytest.raises(QueueFullError) as refused:
            batcher.submit(Job(A, 1, "z"))
        assert 1 <= refused.value.retry_after_seconds <= 60
        executor.go.set()
        await asyncio.gather(first.result, *(job.result for job in jobs))
        batcher.submit(late := Job(A, 1, "z"))
        assert await late.result == "Z"

    run(body, max_queue=2)


def test_what_nobody_waits_for_is_not_run():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        gone, kept = Job(A, 1, "gone"), Job(A, 1, "kept")
        for job in (gone, kept):
            batcher.submit(job)
        gone.cancel()
        executor.go.set()
        await asyncio.gather(first.result, kept.result)

    assert run(body).batches == [["first"], ["kept"]]


def test_background_jobs_run_when_no_other_waits_and_take_bounded_room():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        background = [Job(A, 1, text) for text in ("one", "two", "three")]
        assert [batcher.offer(job) for job in background] == [True, True, False]
        batcher.submit(job := Job(A, 1, "urgent"))
        assert not batcher.is_idle
        executor.go.set()
        await asyncio.gather(first.result, job.result, *(job.result for job in background[:2]))

    assert run(body).batches == [["first"], ["urgent"], ["one", "two"]]


def test_a_batch_that_fails_fails_its_jobs_and_no_others(caplog):
    async def body(batcher, executor):
        batcher.submit(bad := Job(A, 1, "bad"))
        with pytest.raises(RuntimeError, match="a bad job"):
            await bad.result
        batcher.submit(good := Job(A, 1, "good"))
        assert await good.result == "GOOD"

    run(body)
    assert "a batch of 1 jobs failed" in caplog.text


def test_after_closing_waiting_jobs_are_run_and_new_ones_refused():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        batcher.submit(waiting := Job(A, 1, "waiting"))
        batcher.close()
        with pytest.raises(ShuttingDownError):
            batcher.submit(Job(A, 1, "late"))
        assert not batcher.offer(Job(A, 1, "late"))
        executor.go.set()
        assert await asyncio.gather(first.result, waiting.result) == ["FIRST", "WAITING"]

    run(body)


def test_a_job_that_is_given_up_while_it_waits_for_company_leaves_the_batcher_running(caplog):
    async def body(batcher, executor):
        batcher.submit(alone := Job(A, 1, "alone"))
        await asyncio.sleep(0.05)
        assert batcher.abandon() == 1
        with pytest.raises(ShuttingDownError):
            await alone.result
        jobs = [Job(A, 1, text) for text in "pqrs"]
        for job in jobs:
            batcher.submit(job)
        assert await asyncio.gather(*(job.result for job in jobs)) == list("PQRS")

    # The first waits a second for others, of which the next four are the whole batch.
    assert run(body, max_wait_seconds=1.0).batches == [["p", "q", "r", "s"]]
    assert caplog.text == ""


def test_abandoned_jobs_are_told_and_counted():
    async def body(batcher, executor):
        first = await blocked(batcher, executor)
        batcher.submit(waiting := Job(A, 1, "waiting"))
        batcher.submit(gone := Job(A, 1, "gone"))
        gone.cancel()
        assert batcher.abandon() == 2
        for job in (first, waiting):
            with pytest.raises(ShuttingDownError):
                await job.result
            assert not job.is_wanted

    run(body)
