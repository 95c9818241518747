"""What stands before every route: headers of every answer, and names a loopback server goes by."""

from __future__ import annotations

import ipaddress
from typing import Any

from starlette.responses import JSONResponse

from uncurl_jax.serving.requests import RequestError

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def error_json(error: RequestError) -> dict[str, Any]:
    """Returns the body of an error's answer."""
    return {"error": {"message": error.message, "type": error.kind}}


def error_response(error: RequestError) -> JSONResponse:
    """Returns an error's answer."""
    return JSONResponse(error_json(error), error.status, error.headers)


class Guard:
    """ASGI application around another.

    A server on loopback answers only requests that call it so: a web page can have a name of its
    own point to this machine, and would then count as of the same origin (DNS rebinding).
    """

    def __init__(self, app: Any, *, host: str):
        """Guards an application that is bound to `host`."""
        self._app = app
        self._is_loopback = is_loopback(host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self._is_loopback and not is_loopback(_name_of(host)):
            error = RequestError(
                400, f"Host must be localhost or a loopback address, got {host!r}."
            )
            await error_response(error)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _name_of(host: str) -> str:
    """Returns "::1" for "[::1]:8000", "localhost" for "localhost:8000"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
