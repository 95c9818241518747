"""The HTTP interface: routes, limits and answers. ASGI, on Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from uncurl_jax.errors import InputError
from uncurl_jax.serving import answers
from uncurl_jax.serving import requests as bodies
from uncurl_jax.serving.batcher import Job, QueueFullError, ShuttingDownError
from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.guard import Guard, error_json, error_response
from uncurl_jax.serving.page import load_page
from uncurl_jax.serving.requests import RequestError
from uncurl_jax.serving.service import READY, STARTING, Service
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
    return Guard(app, host=host)


def _measured(path: str, handler: Handler) -> Handler:
    """Answers errors as JSON and counts what was answered."""

    async def answer(request: Request) -> Response:
        service: Service = request.app.state.service
        started = time.perf_counter()
        try:
            response = await handler(request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception as error:
            _log.exception("%s failed", path)
            response = error_response(_unexpected(error))
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        service.metrics.seconds.labels(path).observe(time.perf_counter() - started)
        return response

    return answer


def _unexpected(error: BaseException) -> RequestError:
    reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
    return RequestError(500, f"The server failed on this request: {reason}", "server_error")


async def _http_error(request: Request, error: Any) -> Response:
    messages = {
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(RequestError(error.status_code, message, headers=error.headers))


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
    return JSONResponse(answers.models_json(request.app.state.service.artifact))


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


@contextlib.contextmanager
def _queueing(service: Service) -> Iterator[None]:
    """Answers 429 or 503 if the queue takes nothing."""
    try:
        yield
    except QueueFullError as full:
        raise RequestError(
            429,
            f"At most {service.config.max_queue} requests may wait, got one more: try again later.",
            "overloaded_error",
            {"retry-after": str(full.retry_after_seconds)},
        ) from None
    except ShuttingDownError:
        raise _shutting_down() from None


async def _read_request(request: Request, parse: Callable[..., Any], *arguments: Any) -> Any:
    """Reads and checks the body of a request that is to be queued; refuses early if it cannot be.

    Tokenising may take a while, so it is not done in the event loop.
    """
    service: Service = request.app.state.service
    body = await _read_object(request)
    with _queueing(service):
        service.batcher.require_room()
    return await asyncio.to_thread(parse, body, service.artifact, *arguments)


def _submit(service: Service, model: str, payload: Any) -> Job:
    with _queueing(service):
        return service.submit(model, payload)


async def _completions(request: Request) -> Response:
    service: Service = request.app.state.service
    wanted = await _read_request(request, bodies.completion_request, service.config)
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
    choices = [
        answers.choice_json(number, row.text, row.finish_reason)
        for number, row in enumerate(wanted.rows)
    ]
    usage = answers.usage_json(service.artifact, wanted.rows)
    return JSONResponse({**head, "choices": choices, "usage": usage})


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
                choice = answers.choice_json(0, text[len(sent) :], None)
                yield _event({**head, "choices": [choice]})
                sent = text
        await job.result
        choice = answers.choice_json(0, row.text[len(sent) :], row.finish_reason)
        usage = answers.usage_json(service.artifact, [row])
        yield _event({**head, "choices": [choice], "usage": usage})
        service.served(head["model"], [row])
    except TimeoutError:
        yield _event(error_json(_timed_out(service)))
    except ShuttingDownError:
        yield _event(error_json(_shutting_down()))
    except RuntimeError as failed:
        yield _event(error_json(_unexpected(failed)))
    finally:
        # Also when the client has gone.
        job.cancel()
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _classify(request: Request) -> Response:
    service: Service = request.app.state.service
    wanted = await _read_request(request, bodies.classify_request)
    ranking: Ranking = await _result(service, _submit(service, wanted.model.name, wanted.question))
    service.ranked(wanted.model.name, wanted.question, ranking)
    return JSONResponse(answers.ranking_json(wanted, ranking))


async def _experts(request: Request) -> Response:
    service: Service = request.app.state.service
    wanted = await _read_request(request, bodies.trace_request)
    jobs: list[Job] = []
    try:
        for model, row in wanted.rows:
            jobs.append(_submit(service, model.name, Trace(row)))
        traces = await asyncio.gather(*(_result(service, job) for job in jobs))
    finally:
        # If one is refused, nobody waits for the other.
        for job in jobs:
            job.cancel()
    models = [
        answers.trace_json(service.artifact, model, row, trace)
        for (model, row), trace in zip(wanted.rows, traces, strict=True)
    ]
    return JSONResponse({"models": models})


async def _drift(request: Request) -> Response:
    service: Service = request.app.state.service
    found = await asyncio.to_thread(
        lambda: {name: stream.drift() for name, stream in service.streams.items()}
    )
    streams = {
        name: answers.stream_json(service.streams[name], drift) for name, drift in found.items()
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
