"""The server as a process: real sockets, signals, exit status, and files at the end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from uncurl_jax import artifacts
from uncurl_jax.cli import main
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.serving.server import serve as serve_artifact

ROOT = Path(__file__).parents[2]


class Process(NamedTuple):
    """`uncurl serve` in another process."""

    popen: subprocess.Popen[str]
    address: str

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.address + path)

    def post(self, path: str, **body) -> httpx2.Response:
        return httpx2.post(self.address + path, json=body, timeout=120)

    def attempt(self, path: str, **body) -> httpx2.Response | None:
        """Posts; None if the server no longer listens."""
        try:
            return self.post(path, **body)
        except httpx2.ConnectError:
            return None

    def wait_until_ready(self) -> None:
        while self.get("/health").status_code != 200:
            assert self.popen.poll() is None, "the server has ended"
            time.sleep(0.05)

    def end(self, sent: int) -> tuple[int, str, str]:
        """Sends a signal; returns status, stdout and stderr."""
        self.popen.send_signal(sent)
        out, err = self.popen.communicate(timeout=120)
        return self.popen.returncode, out, err


@pytest.fixture(scope="module")
def start(made, tmp_path_factory):
    """Returns start(*options): a running server with one shape; programs compile once."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

    @contextlib.contextmanager
    def run(*options: str):
        command = [sys.executable, "-m", "uncurl_jax.cli", "serve", str(made.artifact)]
        shapes = ["--port", "0", "--batch_sizes", "4", "--lengths", "96"]
        with subprocess.Popen(
            [*command, *shapes, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as popen:
            try:
                assert popen.stderr is not None
                line = popen.stderr.readline()
                assert line.startswith('{"listening"'), line + popen.stderr.read()
                yield Process(popen, json.loads(line)["listening"])
            finally:
                popen.kill()

    return run


def test_sigterm_finishes_what_was_accepted_saves_statistics_and_exits_with_0(start, tmp_path):
    out = tmp_path / "statistics"
    shadowing = ["--shadow", "base", "--shadow_fraction", "1"]
    with start("--statistics_out", str(out), *shadowing) as server:
        # It listens before its programs are compiled, and says so.
        assert server.get("/health").json()["status"] in ("starting", "ready")
        server.wait_until_ready()
        body = {"model": "topic", "prompt": "abc", "max_tokens": 80, "seed": 0}
        server.post("/v1/completions", **body)
        while not server.get("/health").json()["idle"]:
            pass
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(server.attempt, "/v1/completions", **body) for _ in range(20)]
            while (num_waiting := server.get("/health").json()["waiting"]) < 8:
                pass
            server.popen.send_signal(signal.SIGTERM)
            answers = [answer for future in futures if (answer := future.result()) is not None]
        status, stdout, stderr = server.end(signal.SIGTERM)
    assert status == 0, stderr
    assert "Traceback" not in stderr
    # Those that came after the signal were told so.
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= num_waiting
    (line,) = stdout.splitlines()
    result = json.loads(line)
    assert result["requests_given_up"] == 0 and result["statistics"] == ["topic", "base@topic"]
    saved = {path.stem: RouterStatistics.load(path) for path in out.iterdir()}
    assert {name: found.tokens for name, found in saved.items()} == {
        name: tokens for name, tokens in result["tokens"].items() if tokens
    }
    made = [answer.json()["usage"] for answer in answers if answer.status_code == 200]
    # The prompt with what it begins with, and what was made but for its last token.
    read = [4 + usage["completion_tokens"] - 1 for usage in made]
    assert saved["topic"].tokens >= sum(read)


def test_sigterm_ends_a_server_that_still_compiles(start):
    with start() as server:
        status, stdout, stderr = server.end(signal.SIGTERM)
    assert status == 0 and "Traceback" not in stderr
    assert json.loads(stdout)["tokens"] == {"base": 0, "topic": 0}


@pytest.mark.slow
def test_with_no_time_to_drain_what_is_left_is_answered_with_503(start):
    with start("--drain_seconds", "0") as server:
        server.wait_until_ready()
        body = {"model": "base", "prompt": "abc", "max_tokens": 80}
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(server.attempt, "/v1/completions", **body) for _ in range(20)]
            while server.get("/health").json()["waiting"] < 8:
                pass
            server.popen.send_signal(signal.SIGINT)
            answers = [answer for future in futures if (answer := future.result()) is not None]
        status, stdout, stderr = server.end(signal.SIGINT)
    assert status == 0, stderr
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} <= {200, 503}
    # Some may have come after the signal and were never accepted.
    assert 8 <= json.loads(stdout)["requests_given_up"] <= len(refused)
    assert refused[0].json()["error"]["message"] == "The server is shutting down."


def test_large_slow_and_broken_requests_do_no_harm(start):
    with start("--request_timeout_seconds", "2", "--max_body_bytes", "1000") as server:
        server.wait_until_ready()
        host, _, port = server.address.removeprefix("http://").partition(":")
        head = (
            "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: {}\r\n\r\n"
        )

        def answer(sent: bytes) -> str:
            """Sends bytes and reads until the server closes the connection."""
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(sent)
                return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

        # Refused by its length alone: the body is never sent.
        assert answer(head.format(10**9).encode()).startswith("HTTP/1.1 413")
        assert answer(head.format(100).encode() + b'{"pro').startswith("HTTP/1.1 408")
        assert answer(b"\x16\x03\x01 nonsense\r\n\r\n").startswith("HTTP/1.1 400")
        good = server.post("/classify", model="topic", prompt="x")
        assert good.status_code == 200
        assert server.end(signal.SIGTERM)[0] == 0


def test_an_address_that_is_taken_is_refused_with_a_sentence(made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=rf"got 127\.0\.0\.1 port {port} .*choose another --host"
        ):
            serve_artifact(made.artifact, port=port)
    with pytest.raises(InputError, match=r"got nowhere\.invalid port 0 "):
        serve_artifact(made.artifact, host="nowhere.invalid", port=0)


@pytest.mark.parametrize(
    ("host", "is_warned"), [("127.0.0.1", False), ("127.0.0.2", False), ("0.0.0.0", True)]
)
def test_other_hosts_than_loopback_are_warned_about(tmp_path, capsys, host, is_warned):
    with pytest.raises(InputError, match=r"An artifact must hold manifest\.json"):
        serve_artifact(tmp_path, host=host, port=0)
    assert ("there is no authentication" in capsys.readouterr().err) == is_warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_queue", "0"], "max_queue must be at least 1, got 0."),
        (["--gin.settings.ServeConfig.max_queue=0"], "max_queue must be at least 1, got 0."),
        (["--statistics", "x=nothing.npz"], "A router statistics file must exist, got nothing.npz"),
        (["--statistics", "x=a", "--statistics", "x=b"], "Each stream must have one --statistics"),
        (["--statistics_out", "."], "An output must not exist yet, got ."),
        (["--shadow", "base"], "shadow and shadow_fraction go together"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options, message, tmp_path, capsys):
    assert main(["serve", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"uncurl serve: error: {message}")


def test_an_artifact_of_another_format_is_refused(made, tmp_path, capsys):
    manifest = artifacts.read_json(made.artifact / "manifest.json")
    artifacts.write_json(tmp_path / "manifest.json", {**manifest, "format": "saved_model"})
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "got 'saved_model' in" in capsys.readouterr().err


def test_a_damaged_artifact_is_refused(made, tmp_path, capsys):
    copy = tmp_path / "artifact"
    subprocess.run(["cp", "-r", made.artifact, copy], check=True)
    weights = next((copy / "weights").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert main(["serve", str(copy), "--port", "0"]) == 2
    assert "must have the SHA-256 that the manifest says" in capsys.readouterr().err
