"""`uncurl serve`: the service on a socket, from the first compilation to the last answer."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import uvicorn
from tqdm import tqdm

from uncurl_jax.artifacts import atomic_directory, refuse_existing
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.serving.app import make_app
from uncurl_jax.serving.guard import is_loopback
from uncurl_jax.serving.models import open_artifact
from uncurl_jax.serving.service import Service
from uncurl_jax.serving.settings import ServeConfig

# Connections that may be open; what comes on top gets 503 from uvicorn itself.
_MAX_CONNECTIONS = 1024
# For answers on their way when everything is done.
_CLOSING_SECONDS = 5


def serve(
    directory: str | os.PathLike[str],
    *,
    config: ServeConfig | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    statistics: Mapping[str, str] | None = None,
    statistics_out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Serves an artifact until SIGTERM or SIGINT; both drain, a second one does not wait.

    Args:
      directory: what `uncurl export --format stablehlo` wrote.
      config: batching, limits, drift and shadowing.
      host: address to listen on; there is no authentication, so others than loopback are warned
        about.
      port: to listen on; 0 takes a free one. One JSON line on stderr says which.
      statistics: {stream: router_statistics.npz} to compare live traffic with.
      statistics_out: directory that is made at the end with the statistics of every stream.
      quiet: no progress bar.

    Returns:
      A JSON-compatible summary, after the server has stopped.

    Raises:
      InputError: If the artifact, a reference or an output does not permit it, or the address is
        taken.
    """
    config = config or ServeConfig()
    if statistics_out is not None:
        statistics_out = refuse_existing(statistics_out)
    references = {
        stream: RouterStatistics.load(path) for stream, path in (statistics or {}).items()
    }
    if not is_loopback(host):
        print(
            f"uncurl serve: warning: {host} may be reached from other machines and there is no "
            "authentication: anybody who reaches it may use it.",
            file=sys.stderr,
        )
    with _bind(host, port) as bound:
        service = Service(open_artifact(directory), config, references)
        address = asyncio.run(_serve(service, host, bound, quiet=quiet))
    saved: list[str] = []
    if statistics_out is not None:
        with atomic_directory(statistics_out) as partial:
            saved = service.save_statistics(partial)
    return {
        "address": address,
        "tokens": {name: stream.tokens for name, stream in service.streams.items()},
        "requests_given_up": service.num_given_up,
        "statistics_out": None if statistics_out is None else str(statistics_out),
        "statistics": saved,
    }


def _bind(host: str, port: int) -> socket.socket:
    """Returns a socket on an address, not yet listening.

    Raises:
      InputError: If there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(
            f"The server needs a free address of this machine, got {host} port {port} ({error}): "
            "choose another --host or --port."
        ) from None
    return bound


async def _serve(service: Service, host: str, bound: socket.socket, *, quiet: bool) -> str:
    """Serves until a signal has been answered; returns the URL."""
    server = _Server(service, host)

    async def start() -> None:
        with tqdm(desc="compile", unit="shape", file=sys.stderr, disable=quiet, delay=1.0) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                await service.start(show)
            except BaseException:
                server.should_exit = True
                raise

    starting = asyncio.create_task(start())
    await server.serve(sockets=[bound])
    await starting
    return server.address


class _Server(uvicorn.Server):
    """uvicorn's server, which on a signal drains before it closes its socket.

    Attributes:
      address: URL, once it listens.
    """

    def __init__(self, service: Service, host: str):
        super().__init__(
            uvicorn.Config(
                make_app(service, host=host),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self.address = ""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(json.dumps({"listening": self.address}), file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal, gives up what is left on the second."""
        self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = self._loop.create_task(self._drain_and_close())
        else:
            self._service.give_up()

    async def _drain_and_close(self) -> None:
        await self._service.drain()
        self.should_exit = True
