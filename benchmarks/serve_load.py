"""Puts load on `uncurl serve` and measures latency; prints, and writes, JSON.

    python benchmarks/serve_load.py --seconds 10 --concurrency 1,4,16 --out FILE

Exports a random model of 16 experts and one of 4 beside it, serves both in another process on this
machine, and lets each of several clients send one request after the other (a closed loop):
completions of 16 tokens to either model and classifications of four options, on one connection
each. Then 64 clients at once meet a queue of 8, to see what is refused; one that was refused waits
a twentieth of a second, not as long as it is told to.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax
import numpy as np
from environment import describe

from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.export.stablehlo import export_stablehlo
from uncurl_jax.models.architecture import init_params

MODEL = ModelConfig(
    num_experts=(16, 0, 16, 0),
    vocab_size=259,
    embed_dim=64,
    num_heads=4,
    mlp_dim=256,
    max_length=256,
    eval_capacity_factor=None,
    init_stddev=0.1,
    dtype="float32",
)
BATCH_SIZES, LENGTHS = "1,4,16", "64,256"
NEW_TOKENS = 16
QUEUE = 8


def export(directory: Path) -> Path:
    """Writes an artifact of a model with 16 experts and of one with 4."""
    for name, config in (("base", MODEL), ("pruned", MODEL.with_experts(4))):
        with CheckpointStore(
            directory / name,
            model_config=config,
            provenance={"created_by": "benchmark"},
            vocabulary=load_vocabulary("bytes").describe(),
        ) as store:
            store.save(0, jax.device_get(init_params(config, 0)))
    out = directory / "artifact"
    export_stablehlo({name: directory / name for name in ("base", "pruned")}, out)
    return out


@contextlib.contextmanager
def server(artifact: Path, *options: str) -> Iterator[str]:
    """Serves an artifact in another process; yields its address once it is ready."""
    command = [sys.executable, "-m", "uncurl_jax.cli", "serve", str(artifact), "--port", "0"]
    shapes = ["--batch_sizes", BATCH_SIZES, "--lengths", LENGTHS]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *shapes, *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            address = _address(process, log)
            while httpx2.get(f"{address}/health").status_code != 200:
                time.sleep(0.2)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    if process.returncode:
        raise RuntimeError(f"The server ended with status {process.returncode}.")


def _address(process: subprocess.Popen[str], log: Any) -> str:
    while process.poll() is None:
        log.seek(0)
        for line in log:
            if line.startswith('{"listening"'):
                return json.loads(line)["listening"]
        time.sleep(0.1)
    raise RuntimeError(f"The server ended with status {process.returncode}.")


def request(number: int) -> tuple[str, dict[str, Any]]:
    """Returns path and body of the number-th request."""
    prompt = f"the {number}-th sailor " + "hoists the sail " * (number % 3)
    model = ("base", "pruned")[number % 2]
    if number % 4 == 3:
        options = ["sea", "farm", "kitchen", "music"]
        return "/classify", {"model": model, "prompt": prompt, "options": options}
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 1.0, "seed": number}
    return "/v1/completions", {"model": model, "prompt": prompt, **sampling}


def load(address: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Lets clients send requests for some seconds; returns latencies in milliseconds."""

    def client(first: int) -> list[tuple[str, int, float, int]]:
        done = []
        with httpx2.Client(base_url=address, timeout=120) as session:
            number = first
            while time.perf_counter() < until:
                path, body = request(number)
                started = time.perf_counter()
                response = session.post(path, json=body)
                took = time.perf_counter() - started
                usage = response.json().get("usage", {})
                if response.status_code == 429:
                    time.sleep(0.05)
                done.append((path, response.status_code, took, usage.get("completion_tokens", 0)))
                number += concurrency
        return done

    started = time.perf_counter()
    until = started + seconds
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        answers = [answer for done in pool.map(client, range(concurrency)) for answer in done]
    wall = time.perf_counter() - started
    good = [answer for answer in answers if answer[1] == 200]
    result: dict[str, Any] = {
        "concurrency": concurrency,
        "seconds": round(wall, 2),
        "status": dict(sorted(collections.Counter(str(answer[1]) for answer in answers).items())),
        "requests_per_second": round(len(good) / wall, 1),
        "generated_tokens_per_second": round(sum(answer[3] for answer in good) / wall, 1),
    }
    for path in ("/v1/completions", "/classify"):
        times = [answer[2] * 1000 for answer in good if answer[0] == path]
        if times:
            quantiles = {f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 90, 99)}
            result[path] = {"requests": len(times), **quantiles}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Put load on uncurl serve.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--concurrency", default="1,4,16", help="clients, one after the other")
    parser.add_argument("--out", help="JSON to write")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.concurrency.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        artifact = export(Path(directory))
        with server(artifact) as address:
            measured = [load(address, level, arguments.seconds) for level in levels]
        with server(artifact, "--max_queue", str(QUEUE)) as address:
            overload = {"max_queue": QUEUE, **load(address, 64, arguments.seconds)}
    result = {
        **describe(("jax", "jaxlib", "numpy", "starlette", "uvicorn")),
        "model": {
            "num_experts": list(MODEL.num_experts),
            "embed_dim": MODEL.embed_dim,
            "mlp_dim": MODEL.mlp_dim,
            "dtype": MODEL.dtype,
            "pruned_to": 4,
        },
        "server": {"batch_sizes": BATCH_SIZES, "lengths": LENGTHS, "new_tokens": NEW_TOKENS},
        "note": "Clients, server and other programs shared the cores.",
        "load": measured,
        "overload": overload,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
