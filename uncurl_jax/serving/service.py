"""An artifact that answers: models, queue, statistics and shadowing, without HTTP."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.serving.batcher import Batcher, Job, ShuttingDownError
from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.execution import Shapes
from uncurl_jax.serving.metrics import ServerMetrics
from uncurl_jax.serving.models import ServedArtifact
from uncurl_jax.serving.settings import ServeConfig
from uncurl_jax.serving.traffic import Stream, make_streams
from uncurl_jax.serving.worker import Payload, Question, Ranking, Reading, Worker, make_job

STARTING, READY, DRAINING = "starting", "ready", "draining"


class Service:
    """Everything behind the HTTP interface; used in one event loop.

    Attributes:
      artifact: what is served.
      config: how.
      streams: statistics of live traffic, by name.
      metrics: what the server says of itself.
      batcher: queue and batches.
      status: "starting" until all programs are compiled, "ready", then "draining".
      num_given_up: requests that were accepted and not answered before the end.
    """

    def __init__(
        self,
        artifact: ServedArtifact,
        config: ServeConfig,
        references: Mapping[str, RouterStatistics] | None = None,
    ):
        """Takes no request before `start`.

        Raises:
          InputError: If the shadow or a reference does not fit the artifact.
        """
        self.artifact, self.config = artifact, config
        self.streams = make_streams(artifact, config, references or {})
        self.metrics = ServerMetrics(self.streams)
        shapes = Shapes(
            config.batch_sizes,
            config.length_buckets(artifact.max_length),
            _longest_option(artifact),
        )
        self._worker = Worker(artifact, self.streams, self.metrics, shapes)
        self.batcher = Batcher(
            self._worker.execute,
            self.metrics,
            max_batch=config.max_batch,
            max_wait_seconds=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            max_background=config.shadow_queue,
        )
        self.status = STARTING
        self.num_given_up = 0
        self._random = random.Random(config.seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles all programs, then takes requests.

        Args:
          progress: called with (compiled, of how many).
        """

        def show(done: int, total: int) -> None:
            if self.status != STARTING:
                raise ShuttingDownError
            progress(done, total)

        try:
            await self.batcher.call(lambda: self._worker.warm_up(show))
        except ShuttingDownError:
            return
        self._tasks.add(asyncio.create_task(self.batcher.run()))
        self.status = READY
        self.metrics.ready.set(1)

    def submit(self, model: str, payload: Payload) -> Job:
        """Puts a request into the queue.

        Raises:
          QueueFullError: If it is full.
          ShuttingDownError: If the server is going.
        """
        job = make_job(model, payload)
        self.batcher.submit(job)
        return job

    def served(self, model: str, rows: Sequence[Continuation]) -> None:
        """Counts continued rows and lets the shadow read some."""
        for row in rows:
            num_prompt = len(row.prompt) - len(self.artifact.prefix)
            self.metrics.tokens.labels(model, "prompt").inc(num_prompt)
            self.metrics.tokens.labels(model, "generated").inc(len(row.generated))
            self._shadow(model, row.read_ids)

    def ranked(self, model: str, question: Question, ranking: Ranking) -> None:
        """Counts a ranked question and may let the shadow read its answer."""
        scored = sum(len(question.prompt) + len(option) for option in question.options)
        self.metrics.tokens.labels(model, "scored").inc(scored)
        self._shadow(model, [*question.prompt, *question.options[ranking.choice][:-1]])

    def _shadow(self, asked: str, ids: list[int]) -> None:
        shadow = self.config.shadow
        if shadow is None or shadow == asked:
            return
        is_drawn = self._random.random() < self.config.shadow_fraction
        if is_drawn and not self.batcher.offer(make_job(shadow, Reading(ids, asked))):
            self.metrics.shadowed.labels("skipped").inc()

    def statistics_file(self, stream: Stream, reset: bool) -> bytes:
        """Returns a router_statistics.npz of a stream's traffic.

        Raises:
          InputError: If there was none.
        """
        found = stream.statistics(reset=reset)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "router_statistics.npz"
            found.save(path)
            return path.read_bytes()

    def save_statistics(self, directory: Path) -> list[str]:
        """Writes <stream>.npz of every stream with traffic; returns the streams."""
        names = [name for name, stream in self.streams.items() if stream.tokens]
        for name in names:
            self.streams[name].statistics().save(directory / f"{name}.npz")
        return names

    async def drain(self) -> None:
        """Refuses new requests, finishes accepted ones within the limit, ends the thread."""
        self.status = DRAINING
        self.metrics.ready.set(0)
        self.batcher.close()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.drain_seconds
        while not self.batcher.is_idle and loop.time() < deadline:
            await asyncio.sleep(0.02)
        self.give_up()
        await self.batcher.stop()
        for task in self._tasks:
            task.cancel()

    def give_up(self) -> None:
        """Answers all requests that are not done with an error."""
        self.num_given_up += self.batcher.abandon()


def _longest_option(artifact: ServedArtifact) -> int:
    """Returns the tokens of the longest known option with its end of text, 16 at least."""
    encode = artifact.vocabulary.encode_after_space
    options = {option for model in artifact.models.values() for option in model.options or ()}
    return max([16, *(len(encode(option)) + 1 for option in options)])
