"""Bodies of requests: JSON in, checked dataclasses out, or one sentence about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uncurl_jax.data import registry
from uncurl_jax.data.tasks import Task
from uncurl_jax.errors import InputError
from uncurl_jax.serving.continuation import Continuation, Sampling
from uncurl_jax.serving.models import ServedArtifact, ServedModel
from uncurl_jax.serving.settings import ServeConfig
from uncurl_jax.serving.worker import Question

_MAX_STOPS = 4
_MAX_OPTIONS = 256
_MAX_TRACED_MODELS = 2
_MAX_TRACED_TOKENS = 64
# Parameters of OpenAI's API that only their neutral values are taken for, and why.
_NEUTRAL = {
    "n": (1, "one completion is made of a prompt"),
    "best_of": (1, "one completion is made of a prompt"),
    "top_p": (1, "all tokens are sampled from"),
    "frequency_penalty": (0, "logits are not changed"),
    "presence_penalty": (0, "logits are not changed"),
    "logit_bias": ({}, "logits are not changed"),
    "echo": (False, "the prompt is not returned"),
    "logprobs": (None, "/classify returns log-likelihoods"),
    "suffix": (None, "text is continued, not filled in"),
}


class RequestError(Exception):
    """A request that is not carried out.

    Attributes:
      status: of HTTP.
      message: one sentence.
      kind: `type` in the answer.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.headers = dict(headers or {})


def _wrong(message: str) -> RequestError:
    return RequestError(422, message)


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads a body.

    Raises:
      RequestError: 400 if it is not one JSON object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "too many brackets"
        raise RequestError(400, f"A body must be JSON, got something else: {reason}.") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"A body must be a JSON object, got {type(value).__name__}.")
    return value


class Fields:
    """Takes the fields of a body one by one; `finish` refuses what is left."""

    def __init__(self, body: Mapping[str, Any]):
        """Nothing is taken yet."""
        self._left = dict(body)
        self._known: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is; null and a missing one are the default."""
        self._known.append(name)
        value = self._left.pop(name, None)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str | None:
        """Returns a string."""
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise _wrong(f"{name} must be a string, got {_shorten(value)}.")
        return value

    def flag(self, name: str) -> bool:
        """Returns true or false, false by default."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise _wrong(f"{name} must be true or false, got {_shorten(value)}.")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Returns a number of [low, high]."""
        value = self.take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise _wrong(
                f"{name} must be a number between {low:g} and {high:g}, got {_shorten(value)}."
            )
        return float(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Returns an integer of [low, high]."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(
                f"{name} must be an integer between {low} and {high}, got {_shorten(value)}."
            )
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...] | None:
        """Returns a list of strings that are not empty, None if it is missing."""
        value = self.take(name)
        if value is None:
            return None
        is_list = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
        if not is_list or not 1 <= len(value) <= most:
            raise _wrong(
                f"{name} must be a list of 1 to {most} strings that are not empty, got "
                f"{_shorten(value)}."
            )
        return tuple(value)

    def finish(self) -> None:
        """Raises RequestError if a field was not taken."""
        if self._left:
            raise _wrong(
                f"A field must be one of {', '.join(sorted(self._known))}, got "
                f"{_shorten(next(iter(self._left)))}."
            )


def find_model(artifact: ServedArtifact, fields: Fields) -> ServedModel:
    """Returns the model that `model` or `task` names; either may be a model's or a task's name.

    Raises:
      RequestError: 404 if there is none; 422 if none is named although there are several, or a
        task has several.
    """
    name, task = fields.text("model"), fields.text("task")
    models = artifact.models
    known = f"there are {_listed(models)}"
    if name is None and task is None:
        if len(models) > 1:
            raise _wrong(f"model must name a model or a task, got none: {known}.")
        return next(iter(models.values()))
    if name in models:
        model = models[name]
        if task is not None and task not in _names_of_task(model):
            raise _wrong(f"model and task must agree, got {name!r} and {task!r}: {known}.")
        return model
    wanted = name if task is None else task
    found = [model for model in models.values() if wanted in _names_of_task(model)]
    if not found or (name is not None and task is not None):
        raise RequestError(
            404, f"No model or task is named {_shorten(name or task)}: {known}.", "not_found_error"
        )
    if len(found) > 1:
        names = ", ".join(model.name for model in found)
        raise _wrong(f"Task {wanted!r} has several models: name one of {names}.")
    return found[0]


def _names_of_task(model: ServedModel) -> tuple[str, ...]:
    if model.task is None:
        return ()
    return (model.task, model.task.removeprefix("superglue_"))


def _listed(models: Mapping[str, ServedModel]) -> str:
    return ", ".join(
        name if model.task is None else f"{name} (task {model.task})"
        for name, model in models.items()
    )


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A checked body of /v1/completions."""

    model: ServedModel
    rows: list[Continuation]
    is_streamed: bool


def completion_request(
    body: Mapping[str, Any], artifact: ServedArtifact, config: ServeConfig
) -> CompletionRequest:
    """Checks a body of /v1/completions.

    Raises:
      RequestError: 404 or 422, saying what is wrong.
    """
    fields = Fields(body)
    model = find_model(artifact, fields)
    prompts = fields.take("prompt")
    if isinstance(prompts, str):
        prompts = [prompts]
    is_list = isinstance(prompts, list) and all(isinstance(each, str) for each in prompts)
    if not is_list or not 1 <= len(prompts) <= config.max_batch:
        raise _wrong(
            f"prompt must be a string, or a list of 1 to {config.max_batch} strings, got "
            f"{_shorten(prompts)}."
        )
    max_tokens = fields.integer("max_tokens", 16, 1, config.max_new_tokens)
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    seed = fields.integer("seed", secrets.randbits(32), 0, 2**63 - 1)
    stop = fields.take("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        raise _wrong(f"stop must be strings that are not empty, got {_shorten(stop)}.")
    if len(stop) > _MAX_STOPS:
        raise _wrong(f"stop must be at most {_MAX_STOPS} strings, got {len(stop)}.")
    is_streamed = fields.flag("stream")
    if is_streamed and len(prompts) > 1:
        raise _wrong(f"stream must go with one prompt, got {len(prompts)}.")
    fields.text("user")
    for name, (neutral, reason) in _NEUTRAL.items():
        value = fields.take(name, neutral)
        if isinstance(value, bool) != isinstance(neutral, bool) or value != neutral:
            raise _wrong(
                f"{name} must be left out or {json.dumps(neutral)}, got {_shorten(value)}: "
                f"{reason}."
            )
    fields.finish()
    sampling = Sampling(max_tokens, temperature, seed, tuple(stop))
    rows = [
        _continuation(artifact, prompt, sampling, number) for number, prompt in enumerate(prompts)
    ]
    return CompletionRequest(model, rows, is_streamed)


def _continuation(
    artifact: ServedArtifact, prompt: str, sampling: Sampling, number: int = 0
) -> Continuation:
    ids = _prompt_ids(artifact, prompt)
    # The last token made is not read.
    room = artifact.max_length + 1
    if len(ids) + sampling.max_tokens > room:
        raise _wrong(
            f"A prompt and max_tokens must fit into {room} tokens, got {len(ids)} and "
            f"{sampling.max_tokens}: shorten one of them."
        )
    return Continuation(ids, sampling, artifact.vocabulary, number)


def _prompt_ids(artifact: ServedArtifact, prompt: str) -> list[int]:
    """Returns what a model reads of a prompt, with what every row begins with."""
    ids = [*artifact.prefix, *artifact.vocabulary.encode(_encodable("prompt", prompt))]
    if not ids:
        raise _wrong("prompt must have a token, as these models begin no text by themselves.")
    return ids


def _encodable(name: str, text: str) -> str:
    """Returns a text of whole characters; JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(f"{name} must be Unicode text, got half of a surrogate pair.") from None
    return text


@dataclasses.dataclass(frozen=True)
class ClassifyRequest:
    """A checked body of /classify."""

    model: ServedModel
    options: tuple[str, ...]
    question: Question


def classify_request(body: Mapping[str, Any], artifact: ServedArtifact) -> ClassifyRequest:
    """Checks a body of /classify.

    Raises:
      RequestError: 404 or 422, saying what is wrong.
    """
    fields = Fields(body)
    model = find_model(artifact, fields)
    prompt, row = fields.text("prompt"), fields.take("fields")
    options = fields.texts("options", _MAX_OPTIONS)
    is_normalized = fields.flag("length_normalized")
    fields.finish()
    if (prompt is None) == (row is None):
        raise _wrong("A question must have either prompt or fields, got both or neither.")
    if row is not None:
        prompt, task_options = _from_row(model, row)
        options = options or task_options
    options = options or model.options
    if options is None:
        raise _wrong(
            f"options must be given, as model {model.name} knows none that all its questions have."
        )
    vocabulary = artifact.vocabulary
    prompt_ids = _prompt_ids(artifact, (prompt or "").strip())
    option_ids = [
        [*vocabulary.encode_after_space(_encodable("options", option)), vocabulary.eos_id]
        for option in options
    ]
    longest = max(map(len, option_ids))
    room = artifact.max_length + 1
    if len(prompt_ids) + longest > room:
        raise _wrong(
            f"A prompt and its longest option must fit into {room} tokens, got {len(prompt_ids)} "
            f"and {longest}: shorten the prompt."
        )
    return ClassifyRequest(model, options, Question(prompt_ids, option_ids, is_normalized))


def _from_row(model: ServedModel, row: Any) -> tuple[str, tuple[str, ...]]:
    """Builds prompt and options from the fields of a row of the model's task."""
    if not isinstance(row, dict):
        raise _wrong(f"fields must be an object, got {_shorten(row)}.")
    try:
        task = registry.find_task(model.task or "")
        if not isinstance(task, Task):
            raise InputError("it is plain text")
    except InputError:
        raise _wrong(
            f"fields must be of a task that this version knows, got model {model.name} with task "
            f"{model.task}: give prompt and options."
        ) from None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fields"
        path.write_text(json.dumps({"idx": 0, **row}) + "\n", encoding="utf-8")
        try:
            examples = list(task.read_file(path))
        except InputError as error:
            message = str(error).replace(f"{path}:1: ", "")
            raise _wrong(f"fields must be a row of task {task.name}: {message}") from None
    if len(examples) != 1:
        raise _wrong(
            f"fields must hold one question, got {len(examples)}: give prompt and options."
        )
    return examples[0].prompt, examples[0].options


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """A checked body of /experts: for each model, a row to continue."""

    rows: list[tuple[ServedModel, Continuation]]


def trace_request(body: Mapping[str, Any], artifact: ServedArtifact) -> TraceRequest:
    """Checks a body of /experts.

    Raises:
      RequestError: 404 or 422, saying what is wrong.
    """
    fields = Fields(body)
    prompt = fields.text("prompt")
    names = fields.texts("models", _MAX_TRACED_MODELS)
    max_tokens = fields.integer("max_tokens", 16, 1, _MAX_TRACED_TOKENS)
    fields.finish()
    if prompt is None:
        raise _wrong("prompt must be given, got none.")
    if names is None:
        names = tuple(artifact.models)[:_MAX_TRACED_MODELS]
    models = [find_model(artifact, Fields({"model": name})) for name in names]
    sampling = Sampling(max_tokens)
    return TraceRequest([(model, _continuation(artifact, prompt, sampling)) for model in models])


@dataclasses.dataclass(frozen=True)
class StatisticsRequest:
    """A checked body of /statistics."""

    stream: str
    is_reset: bool


def statistics_request(body: Mapping[str, Any], streams: Sequence[str]) -> StatisticsRequest:
    """Checks a body of /statistics.

    Raises:
      RequestError: 404 or 422, saying what is wrong.
    """
    fields = Fields(body)
    name, is_reset = fields.text("stream"), fields.flag("reset")
    fields.finish()
    listed = ", ".join(streams) or "none"
    if name is None and len(streams) == 1:
        name = streams[0]
    if name is None:
        raise _wrong(f"stream must be named: there are {listed}.")
    if name not in streams:
        raise RequestError(
            404, f"No stream is named {_shorten(name)}: there are {listed}.", "not_found_error"
        )
    return StatisticsRequest(name, is_reset)


def _shorten(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."
