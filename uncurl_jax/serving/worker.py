"""What the thread that owns the device does with a batch of jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from uncurl_jax.serving import execution
from uncurl_jax.serving.batcher import Job
from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.execution import Shapes, SumsObserver, TraceObserver
from uncurl_jax.serving.metrics import ServerMetrics
from uncurl_jax.serving.models import ServedArtifact
from uncurl_jax.serving.routing_sums import routing_sums
from uncurl_jax.serving.traffic import Stream, stream_name


@dataclasses.dataclass(frozen=True)
class Completion:
    """Prompts to continue; its result is None, as the rows hold what was made.

    Attributes:
      rows: at most the largest batch.
      is_streamed: whether the job says each new piece of text of its only row.
    """

    rows: list[Continuation]
    is_streamed: bool = False


@dataclasses.dataclass(frozen=True)
class Trace:
    """A prompt to continue and to watch; its result is {"layers_<i>": TokenChoices}."""

    row: Continuation


@dataclasses.dataclass(frozen=True)
class Question:
    """Options to rank after a prompt; its result is a Ranking.

    Attributes:
      prompt: its ids, with what every row begins with.
      options: the ids of each, with the end of text.
      is_length_normalized: whether log-likelihoods are divided by the tokens of the option.
    """

    prompt: list[int]
    options: list[list[int]]
    is_length_normalized: bool = False


class Ranking(NamedTuple):
    """Scores of the options of a question.

    Attributes:
      log_likelihood: [option] float64, nats.
      num_tokens: [option] int.
      choice: the option of the largest score, the first of several.
      probability: [option] float64, softmax of the scores.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray
    choice: int
    probability: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """Ids that a model reads for its statistics alone; nobody waits for the result.

    Attributes:
      ids: of one row.
      asked: the model that answered it.
    """

    ids: list[int]
    asked: str


Payload = Completion | Trace | Question | Reading


def make_job(model: str, payload: Payload) -> Job:
    """Returns a job for a model; jobs share batches with those of one kind, model and stream."""
    if isinstance(payload, Completion):
        rows, stream = len(payload.rows), model
    elif isinstance(payload, Question):
        rows, stream = len(payload.options), model
    elif isinstance(payload, Reading):
        rows, stream = 1, stream_name(model, payload.asked)
    else:
        rows, stream = 1, ""
    return Job((type(payload).__name__, model, stream), rows, payload)


class Worker:
    """Runs batches."""

    def __init__(
        self,
        artifact: ServedArtifact,
        streams: Mapping[str, Stream],
        metrics: ServerMetrics,
        shapes: Shapes,
    ):
        """Runs nothing yet."""
        self._artifact = artifact
        self._streams = streams
        self._metrics = metrics
        self._shapes = shapes

    def execute(self, jobs: Sequence[Job]) -> None:
        """Runs jobs of one key and finishes each."""
        kind, model, stream = jobs[0].key
        run = {
            "Completion": self._complete,
            "Trace": self._trace,
            "Question": self._rank,
            "Reading": self._read,
        }[kind]
        self._metrics.batch_rows.labels(kind.lower()).observe(sum(job.num_rows for job in jobs))
        run(jobs, model, self._streams.get(stream))

    def _complete(self, jobs: Sequence[Job], model: str, stream: Stream | None) -> None:
        owner = {id(row): job for job in jobs for row in job.payload.rows}

        def on_token(row: Continuation) -> None:
            job = owner[id(row)]
            if job.payload.is_streamed:
                job.emit(row.certain_text)
            if all(each.finish_reason is not None for each in job.payload.rows):
                # Others of the batch may go on.
                job.finish(None)

        observer = SumsObserver()
        execution.continue_rows(
            self._artifact.models[model].programs,
            [row for job in jobs for row in job.payload.rows],
            self._shapes,
            observer,
            on_token=on_token,
            is_wanted=lambda row: owner[id(row)].is_wanted,
        )
        if stream is not None:
            stream.add(jax.device_get(observer.sums))

    def _trace(self, jobs: Sequence[Job], model: str, _: Stream | None) -> None:
        owner = {id(job.payload.row): job for job in jobs}
        observer = TraceObserver(len(jobs))
        execution.continue_rows(
            self._artifact.models[model].programs,
            [job.payload.row for job in jobs],
            self._shapes,
            observer,
            on_token=lambda row: None,
            is_wanted=lambda row: owner[id(row)].is_wanted,
        )
        for number, job in enumerate(jobs):
            job.finish(observer.row(number))

    def _rank(self, jobs: Sequence[Job], model: str, stream: Stream | None) -> None:
        rows = [(job.payload.prompt, option) for job in jobs for option in job.payload.options]
        size = self._shapes.batch_sizes[-1]
        programs = self._artifact.models[model].programs
        parts = [
            execution.score_rows(programs, rows[start : start + size], self._shapes)
            for start in range(0, len(rows), size)
        ]
        log_likelihood = np.concatenate([part.log_likelihood for part in parts])
        num_tokens = np.concatenate([part.num_tokens for part in parts])
        chosen, start = [], 0
        for job in jobs:
            place = slice(start, start + len(job.payload.options))
            ranking = rank(
                log_likelihood[place], num_tokens[place], job.payload.is_length_normalized
            )
            chosen.append(start + ranking.choice)
            start = place.stop
            job.finish(ranking)
        if stream is None:
            return
        # Statistics count what was answered, as calibration counts right answers.
        for number, part in enumerate(parts):
            is_chosen = np.isin(np.arange(len(part.mask)) + number * size, chosen)
            if is_chosen.any():
                sums = routing_sums(part.routing, part.mask & is_chosen[:, None])
                stream.add(jax.device_get(sums))

    def _read(self, jobs: Sequence[Job], model: str, stream: Stream | None) -> None:
        observer = SumsObserver()
        execution.read_rows(
            self._artifact.models[model].programs,
            [job.payload.ids for job in jobs],
            self._shapes,
            observer,
        )
        if stream is not None:
            stream.add(jax.device_get(observer.sums))
        self._metrics.shadowed.labels("read").inc(len(jobs))
        for job in jobs:
            job.finish(None)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compiles the programs of every model for every batch size and length.

        Models of equal shapes share programs, which compile once.

        Args:
          progress: called with (compiled, of how many).
        """
        models = {
            id(model.programs.programs["prefill"]): model.programs
            for model in self._artifact.models.values()
        }
        cases = [
            (programs, size, length)
            for programs in models.values()
            for length in self._shapes.lengths
            for size in self._shapes.batch_sizes
        ]
        progress(0, len(cases))
        for done, (programs, size, length) in enumerate(cases, start=1):
            execution.compile_shapes(programs, size, length, self._shapes.targets)
            progress(done, len(cases))


def rank(log_likelihood: np.ndarray, num_tokens: np.ndarray, is_length_normalized: bool) -> Ranking:
    """Chooses among the options of a question, [option] each."""
    scores = log_likelihood / np.maximum(num_tokens, 1) if is_length_normalized else log_likelihood
    weights = np.exp(scores - scores.max())
    return Ranking(log_likelihood, num_tokens, int(scores.argmax()), weights / weights.sum())
