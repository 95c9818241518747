"""The HTTP interface: routes, limits and answers. ASGI, on Starlette."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from uncurl_jax.errors import InputError
from uncurl_jax.serving import requests as bodies
from uncurl_jax.serving.batcher import Job, QueueFullError, ShuttingDownError
from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.drift import Divergence
from uncurl_jax.serving.execution import TokenChoices
from uncurl_jax.serving.page import load_page
from uncurl_jax.serving.requests import RequestError
from uncurl_jax.serving.routing_sums import layer_number
from uncurl_jax.serving.service import READY, STARTING, Service
from uncurl_jax.serving.settings import LOOPBACK
from uncurl_jax.serving.traffic import StreamDrift
from uncurl_jax.serving.worker import Completion, Ranking, Trace

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, *, host: str) -> Any:
    """Returns the ASGI application over a service.

    Args:
      service: runs the requests.
      host: address that the server is bound to; bound to loopback, it answers only requests that
        name loopback, so that no web page can reach it by a name of its own.
    """
    endpoints: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/", _page),
        ("GET", "/health", _health),
        ("GET", "/metrics", _metrics),
        ("GET", "/drift", _drift),
        ("GET", "/v1/models", _models),
        ("POST", "/v1/completions", _completions),
        ("POST", "/classify", _classify),
        ("POST", "/experts", _experts),
        ("POST", "/statistics", _statistics),
    )
    app = Starlette(
        routes=[
            Route(path, _measured(path, handler), methods=[method])
            for method, path, handler in endpoints
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.service = service
    app.state.page = load_page()
    return _Guard(app, is_loopback=host in LOOPBACK)


class _Guard:
    """Adds headers to every answer, and refuses other hosts' names on loopback."""

    def __init__(self, app: Any, *, is_loopback: bool):
        self._app = app
        self._is_loopback = is_loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self._is_loopback and _name_of(host) not in LOOPBACK:
            error = RequestError(400, f"Host must be {' or '.join(LOOPBACK)}, got {host!r}.")
            await _error_response(error)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _name_of(host: str) -> str:
    """Returns "::1" for "[::1]:8000", "localhost" for "localhost:8000"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _measured(path: str, handler: Handler) -> Handler:
    """Answers errors as JSON and counts what was answered."""

    async def answer(request: Request) -> Response:
        service: Service = request.app.state.service
        started = time.perf_counter()
        try:
            response = await handler(request)
        except RequestError as error:
            response = _error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            _log.exception("%s failed", path)
            response = _error_response(_unexpected(error))
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        service.metrics.seconds.labels(path).observe(time.perf_counter() - started)
        return response

    return answer


def _unexpected(error: BaseException) -> RequestError:
    reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
    return RequestError(500, f"The server failed on this request: {reason}", "server_error")


def _error_json(error: RequestError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind}}


def _error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(_error_json(error), error.status, error.headers)


async def _http_error(request: Request, error: Any) -> Response:
    messages = {
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _error_response(RequestError(error.status_code, message, headers=error.headers))


async def _read_object(request: Request) -> dict[str, Any]:
    """Reads a JSON body, never more of it than the limit."""
    service: Service = request.app.state.service
    _require_ready(service)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"Content-Type must be application/json, got {kind or 'none'}.")
    limit = service.config.max_body_bytes
    # What is not read of a body must not be taken for the next request.
    too_large = RequestError(
        413, f"A body must have at most {limit} bytes, got more.", headers={"connection": "close"}
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(service.config.request_timeout_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            408,
            "A body must arrive in time, got a part of it.",
            "timeout_error",
            {"connection": "close"},
        ) from None
    return bodies.parse_object(bytes(body))


async def _page(request: Request) -> Response:
    page = request.app.state.page
    return Response(page.html, media_type="text/html", headers=page.headers)


async def _health(request: Request) -> Response:
    service: Service = request.app.state.service
    content = {
        "status": service.status,
        "waiting": service.batcher.num_waiting,
        "idle": service.batcher.is_idle,
    }
    return JSONResponse(content, 200 if service.status == READY else 503)


async def _metrics(request: Request) -> Response:
    text = await asyncio.to_thread(request.app.state.service.metrics.text)
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


async def _models(request: Request) -> Response:
    artifact = request.app.state.service.artifact
    data = [
        {
            "id": model.name,
            "object": "model",
            "owned_by": "uncurl_jax",
            "task": model.task,
            "num_experts": list(model.config.num_experts),
            "top_k": model.config.num_selected_experts,
            "max_length": artifact.max_length,
            "options": None if model.options is None else list(model.options),
            "example": model.example,
            "checkpoint": model.checkpoint,
        }
        for model in artifact.models.values()
    ]
    memory = {"bytes": artifact.bytes_in_memory, "bytes_if_apart": artifact.bytes_apart}
    return JSONResponse({"object": "list", "data": data, "memory": memory})


async def _result(service: Service, job: Job) -> Any:
    """Waits for a job within the time of a request."""
    try:
        async with asyncio.timeout(service.config.request_timeout_seconds):
            return await job.result
    except TimeoutError:
        raise _timed_out(service) from None
    except ShuttingDownError:
        raise _shutting_down() from None
    finally:
        job.cancel()


def _timed_out(service: Service) -> RequestError:
    return RequestError(
        504,
        f"A request must be done in {service.config.request_timeout_seconds:g} s, got no answer by "
        "then: ask for fewer tokens or try again later.",
        "timeout_error",
    )


def _shutting_down() -> RequestError:
    return RequestError(503, "The server is shutting down.", "server_error")


def _require_ready(service: Service) -> None:
    if service.status == STARTING:
        raise RequestError(503, "The server is still compiling its programs.", "server_error")
    if service.status != READY:
        raise _shutting_down()


def _submit(service: Service, model: str, payload: Any) -> Job:
    try:
        return service.submit(model, payload)
    except QueueFullError as full:
        raise RequestError(
            429,
            f"At most {service.config.max_queue} requests may wait, got one more: try again later.",
            "overloaded_error",
            {"retry-after": str(full.retry_after_seconds)},
        ) from None
    except ShuttingDownError:
        raise _shutting_down() from None


async def _completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await _read_object(request)
    wanted = bodies.completion_request(body, service.artifact, service.config)
    payload = Completion(wanted.rows, wanted.is_streamed)
    job = _submit(service, wanted.model.name, payload)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.model.name,
    }
    if wanted.is_streamed:
        stream = _streamed(service, job, head, wanted.rows[0])
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    await _result(service, job)
    service.served(wanted.model.name, wanted.rows)
    choices = [_choice(number, row.text, row) for number, row in enumerate(wanted.rows)]
    return JSONResponse({**head, "choices": choices, "usage": _usage(service, wanted.rows)})


def _choice(number: int, text: str, row: Continuation) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": row.finish_reason}


def _usage(service: Service, rows: list[Continuation]) -> dict[str, int]:
    prefix = len(service.artifact.prefix)
    prompt = sum(len(row.prompt) - prefix for row in rows)
    made = sum(len(row.generated) for row in rows)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }


async def _streamed(
    service: Service, job: Job, head: Mapping[str, Any], row: Continuation
) -> AsyncIterator[str]:
    """Yields server-sent events: pieces of text, then the usage, then [DONE]."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.config.request_timeout_seconds
    sent = ""
    try:
        while True:
            text = await asyncio.wait_for(job.events.get(), deadline - loop.time())
            if text is None:
                break
            if len(text) > len(sent):
                choice = {**_choice(0, text[len(sent) :], row), "finish_reason": None}
                yield _event({**head, "choices": [choice]})
                sent = text
        await job.result
        choices = [_choice(0, row.text[len(sent) :], row)]
        yield _event({**head, "choices": choices, "usage": _usage(service, [row])})
        service.served(head["model"], [row])
    except TimeoutError:
        yield _event(_error_json(_timed_out(service)))
    except ShuttingDownError:
        yield _event(_error_json(_shutting_down()))
    except RuntimeError as failed:
        yield _event(_error_json(_unexpected(failed)))
    finally:
        # Also when the client has gone.
        job.cancel()
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _classify(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await _read_object(request)
    wanted = bodies.classify_request(body, service.artifact)
    ranking: Ranking = await _result(service, _submit(service, wanted.model.name, wanted.question))
    service.ranked(wanted.model.name, wanted.question, ranking)
    return JSONResponse(
        {
            "model": wanted.model.name,
            "task": wanted.model.task,
            "choice": ranking.choice,
            "text": wanted.options[ranking.choice],
            "options": [
                {
                    "text": text,
                    "log_likelihood": float(score),
                    "num_tokens": int(tokens),
                    "probability": float(probability),
                }
                for text, score, tokens, probability in zip(
                    wanted.options,
                    ranking.log_likelihood,
                    ranking.num_tokens,
                    ranking.probability,
                    strict=True,
                )
            ],
        }
    )


async def _experts(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await _read_object(request)
    wanted = bodies.trace_request(body, service.artifact)
    jobs = [_submit(service, model.name, Trace(row)) for model, row in wanted.rows]
    traces = await asyncio.gather(*(_result(service, job) for job in jobs))
    decode, prefix = service.artifact.vocabulary.decode, len(service.artifact.prefix)
    models = []
    for (model, row), trace in zip(wanted.rows, traces, strict=True):
        read = row.read_ids[prefix:]
        models.append(
            {
                "model": model.name,
                "task": model.task,
                "num_experts": list(model.config.num_experts),
                # What every row begins with stands for no text.
                "tokens": [*([""] * prefix), *(decode([token]) for token in read)],
                "num_prompt_tokens": len(row.prompt),
                "layers": [_traced(name, choices) for name, choices in trace.items()],
                "text": row.text,
                "finish_reason": row.finish_reason,
            }
        )
    return JSONResponse({"models": models})


def _traced(name: str, choices: TokenChoices) -> dict[str, Any]:
    return {
        "layer": layer_number(name),
        "experts": choices.expert_index.tolist(),
        "gates": [[round(float(gate), 4) for gate in token] for token in choices.gate],
    }


async def _drift(request: Request) -> Response:
    service: Service = request.app.state.service
    found = await asyncio.to_thread(
        lambda: {name: stream.drift() for name, stream in service.streams.items()}
    )
    streams = {
        name: {
            "model": service.streams[name].model.name,
            "tokens": service.streams[name].tokens,
            **_drift_json(drift),
        }
        for name, drift in found.items()
    }
    config = service.config
    return JSONResponse(
        {
            "streams": streams,
            "alpha": config.drift_alpha,
            "floor_bits": config.drift_floor_bits,
            "half_life_requests": config.drift_half_life,
        }
    )


def _drift_json(drift: StreamDrift) -> dict[str, Any]:
    return {
        "requests": round(drift.requests, 1),
        "verdict": drift.verdict,
        "layers": [
            {
                "layer": layer.layer,
                "is_drifting": layer.is_drifting,
                "selections": _divergence_json(layer.selections),
                "probabilities": _divergence_json(layer.probabilities),
                "live": [round(float(share), 6) for share in layer.live],
                "reference": [round(float(share), 6) for share in layer.reference],
            }
            for layer in drift.layers
        ],
    }


def _divergence_json(found: Divergence) -> dict[str, float | None]:
    """The distance and its threshold, both without bias; None for a threshold not yet known."""
    threshold = found.threshold_bits - found.bias_bits
    return {
        "distance_bits": found.distance_bits,
        "threshold_bits": threshold if math.isfinite(threshold) else None,
        "bias_bits": found.bias_bits,
    }


async def _statistics(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await _read_object(request)
    wanted = bodies.statistics_request(body, list(service.streams))
    stream = service.streams[wanted.stream]
    try:
        content = await asyncio.to_thread(service.statistics_file, stream, wanted.is_reset)
    except InputError as error:
        raise RequestError(422, str(error)) from None
    return Response(
        content,
        media_type="application/octet-stream",
        headers={"content-disposition": 'attachment; filename="router_statistics.npz"'},
    )
