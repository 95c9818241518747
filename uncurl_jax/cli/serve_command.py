"""`uncurl serve`: the HTTP server over an exported artifact."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from uncurl_jax.errors import InputError

GIN_MODULES = ("uncurl_jax.serving.settings",)
# Options that are not fields of ServeConfig.
_OWN = ("directory", "host", "port", "statistics", "statistics_out")
_PACKAGES = ("prometheus_client", "starlette", "uvicorn")


def add_parser(command: Any) -> None:
    """Adds the command; `command(name, help)` makes a parser."""
    sub = command("serve", "Serve an exported artifact over HTTP, watch how its experts are used.")
    sub.add_argument("directory", metavar="DIR", help="what export --format stablehlo wrote")
    sub.add_argument("--host", help="address to listen on (default 127.0.0.1); no authentication")
    sub.add_argument("--port", type=int, help="to listen on (default 8000); 0 takes a free one")
    sub.add_argument(
        "--batch_sizes", type=_sizes, help="rows that programs are compiled for (default 1,4,16)"
    )
    sub.add_argument(
        "--lengths", type=_sizes, help="tokens that prompts are filled up to (default 32,64,...)"
    )
    sub.add_argument("--max_wait_ms", type=float, help="wait for others in a batch (default 5)")
    sub.add_argument("--max_queue", type=int, help="requests that may wait (default 64)")
    sub.add_argument("--max_body_bytes", type=int, help="of a request (default 1 MiB)")
    sub.add_argument("--max_new_tokens", type=int, help="of a completion (default 256)")
    sub.add_argument("--request_timeout_seconds", type=float, help="default 60")
    sub.add_argument("--drain_seconds", type=float, help="after SIGTERM (default 30)")
    sub.add_argument(
        "--statistics",
        action="append",
        type=_named_file,
        metavar="STREAM=FILE",
        help="calibration statistics to compare the live traffic of a model with; repeatable; "
        "BASE@MODEL is what the shadow BASE reads of the requests to MODEL",
    )
    sub.add_argument("--statistics_out", help="directory for the statistics of live traffic")
    sub.add_argument("--shadow", help="model that reads a part of the traffic of the others")
    sub.add_argument("--shadow_fraction", type=float, help="which part, between 0 and 1")
    sub.add_argument("--drift_half_life", type=float, help="in requests (default 1000)")
    sub.add_argument("--drift_alpha", type=float, help="false alarms per look (default 0.01)")
    sub.add_argument("--drift_floor_bits", type=float, help="smallest drift (default 0.01)")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"sizes must be whole numbers with commas between them, as 1,4,16, got {text!r}"
        ) from None


def _named_file(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(
            f"statistics must be STREAM=FILE, as rte=router_statistics.npz, got {text!r}"
        )
    return name, path


def serve(options: dict[str, Any]) -> Any:
    """Serves until SIGTERM or SIGINT; returns what was seen."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"The server needs packages that are not installed, {', '.join(missing)}: "
            "pip install 'uncurl_jax[serve]'."
        )
    from uncurl_jax.cli.gin_config import configured
    from uncurl_jax.serving import server, settings

    own = {name: options.pop(name) for name in _OWN if name in options}
    named = own.pop("statistics", [])
    statistics = dict(named)
    if len(statistics) < len(named):
        raise InputError(
            "Each stream must have one --statistics, got "
            f"{', '.join(name for name, _ in named)}: merge files with uncurl merge-statistics."
        )
    config = configured(settings.ServeConfig)(**options)
    return server.serve(own.pop("directory"), config=config, statistics=statistics, **own)
