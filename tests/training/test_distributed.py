"""Several processes under jax.distributed train what one process trains, also if some are ended.

Most tests here start processes that import JAX and compile, hence slow: two cores take a quarter of
a minute for each set of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import uncurl_jax
from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.training.trainer import train

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 300
WORKER = Path(__file__).with_name("distributed_worker.py")
# The worker asks JAX to give up a dead process after ten seconds. Without that it is JAX's hundred.
SURVIVOR_SECONDS = 60


def write_gin(path: Path, config: TrainConfig, model: ModelConfig) -> Path:
    """Writes the configuration as a gin file."""
    lines = ["from __gin__ import dynamic_registration", "from uncurl_jax import config"]
    lines.append("from uncurl_jax.training import trainer")
    for name, value in dataclasses.asdict(model).items():
        lines.append(f"config.ModelConfig.{name} = {value!r}")
    for name, value in dataclasses.asdict(config.optimizer).items():
        lines.append(f"config.OptimizerConfig.{name} = {value!r}")
    for name, value in dataclasses.asdict(config).items():
        if name not in ("model", "optimizer"):
            lines.append(f"config.TrainConfig.{name} = {value!r}")
    lines.append("config.TrainConfig.model = @config.ModelConfig()")
    lines.append("config.TrainConfig.optimizer = @config.OptimizerConfig()")
    lines.append("trainer.train.config = @config.TrainConfig()")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two_processes(arguments: list[str], directory: Path) -> list[str]:
    """Runs the command as two processes of four devices; returns what each printed."""
    shared = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(Path(uncurl_jax.__file__).parent.parent),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, "-m", "uncurl_jax.cli", *arguments, "--distributed"]
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(2):
            stderr = stack.enter_context((directory / f"stderr_{index}").open("w"))
            process = subprocess.Popen(
                command,
                env={**shared, "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    for index, process in enumerate(processes):
        assert process.returncode == 0, (directory / f"stderr_{index}").read_text()
    return outputs


class Processes:
    """A run in processes of its own, each with as many devices."""

    def __init__(self, directory: Path, count: int, arguments: Sequence[dict[str, Any]], each: int):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={each}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(Path(uncurl_jax.__file__).parent.parent),
        }
        port = free_port()
        self._errors = [directory / f"stderr_{index}" for index in range(count)]
        self.running: list[subprocess.Popen] = []
        for index, error in enumerate(self._errors):
            path = directory / f"arguments_{index}.pickle"
            path.write_bytes(pickle.dumps(arguments[index]))
            place = [index, count, port] if count > 1 else []
            with error.open("w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, str(WORKER), str(path), *map(str, place)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            self.running.append(process)

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> list[int]:
        """Waits for all together; returns their statuses."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in self.running]

    def said(self) -> list[str]:
        return [path.read_text() for path in self._errors]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition() and time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.running), self.said()
            time.sleep(0.002)
        assert condition()


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache_path) -> Iterator[Callable[..., Processes]]:
    """Returns start(processes, devices of each, config, out=..., **arguments of train)."""
    started: list[Processes] = []

    def begin(count: int, each: int, config: TrainConfig, **given) -> Processes:
        directory = tmp_path_factory.mktemp("processes")
        caches = given.pop("caches", [cache_path] * count)
        arguments = [{"config": config, "cache": cache, **given} for cache in caches]
        started.append(Processes(directory, count, arguments, each))
        return started[-1]

    yield begin
    for processes in started:
        for process in processes.running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def finish(start) -> Callable[..., None]:
    """Returns finish(...): a run that nobody disturbs."""

    def run(*arguments, **given) -> None:
        processes = start(*arguments, **given)
        assert processes.wait() == [0] * len(processes.running), processes.said()

    return run


def losses_of(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_json_lines(out / "metrics.jsonl")}


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    reader = layout.StateReader(path)
    return {name: reader.read(name) for name in reader.metadata}


def assert_same(expected: Path, found: Path, *, tolerance: float) -> None:
    """Compares losses and the latest checkpoints, optimizer state included; 0 is bit by bit."""
    losses = losses_of(found)
    assert losses == pytest.approx(losses_of(expected), rel=tolerance, abs=0)
    arrays = arrays_of(found)
    for name, array in arrays_of(expected).items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=tolerance, err_msg=name)


def own_part(cache_path: Path, config: TrainConfig, index: int, count: int, copy: Path) -> Path:
    """Copies a cache in which only the rows that one process trains on are what they were."""
    cache = TokenCache.open(cache_path)
    batches = cache.train_batches(
        config.batch_size,
        length=cache.max_row_length,
        seed=config.seed,
        process_index=index,
        process_count=count,
    )
    used = itertools.islice(batches, config.num_steps)
    own = {row.tobytes() for batch in used for row in batch.targets}
    shutil.copytree(cache_path, copy)
    tokens = np.array(cache.tokens)
    spoiled = 0
    for begin, end in zip(cache.offsets[:-1], cache.offsets[1:], strict=True):
        row = np.zeros(cache.max_row_length, np.int32)
        row[: end - begin] = tokens[begin:end]
        if row.tobytes() not in own:
            tokens[begin:end] = 3
            spoiled += 1
    assert spoiled >= len(cache.offsets) // 2
    np.save(copy / "tokens.npy", tokens)
    return copy


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_two_processes_equal_one(cache_path, config, model, tmp_path: Path):
    config = dataclasses.replace(config, num_steps=2, save_every_steps=1, expert_partitions=2)
    gin_file = write_gin(tmp_path / "train.gin", config, model)
    arguments = ["train", "--gin_file", str(gin_file), "--cache", str(cache_path)]
    outputs = run_two_processes([*arguments, "--out", str(tmp_path / "two")], tmp_path)
    # Only the first process prints a result; Gloo writes lines of its own.
    results = [[line for line in output.splitlines() if line.startswith("{")] for output in outputs]
    assert [len(lines) for lines in results] == [1, 0]
    assert json.loads(results[0][0])["step"] == 2
    train(config, cache=cache_path, out=tmp_path / "one", quiet=True)

    one, two = (read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2]
    for expected, found in zip(one, two, strict=True):
        for name in ("loss", "cross_entropy", "auxiliary_loss", "gradient_norm", "tokens"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE), name
    assert read_json(tmp_path / "two" / "train_summary.json")["device"]["count"] == 8
    readers = [layout.StateReader(tmp_path / name) for name in ("one", "two")]
    assert readers[0].metadata == readers[1].metadata
    for name in readers[0].metadata:
        if "/nu/" not in name:
            expected, found = (reader.read(name) for reader in readers)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def small(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """One layer, which compiles in half the time."""
    return dataclasses.replace(config, model=dataclasses.replace(model, num_experts=(3,)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_read_only_their_rows_equal_one_process(
    count, small, cache_path, tmp_path, finish
):
    config = dataclasses.replace(small, num_steps=4, expert_partitions=2)
    train(config, cache=cache_path, out=tmp_path / "one", quiet=True)
    caches = [
        own_part(cache_path, config, index, count, tmp_path / f"cache_{index}")
        for index in range(count)
    ]
    finish(count, 8 // count, config, out=tmp_path / "several", caches=caches)
    assert_same(tmp_path / "one", tmp_path / "several", tolerance=TOLERANCE)


@pytest.mark.slow
def test_a_run_goes_on_with_half_the_devices(small, cache_path, tmp_path, finish):
    train(small, cache=cache_path, out=tmp_path / "whole", quiet=True)
    out = tmp_path / "out"
    train(small, cache=cache_path, out=out, stop_after_step=3, quiet=True)
    other = dataclasses.replace(small, expert_partitions=2)
    finish(1, 4, other, out=out)
    assert read_json(out / "train_summary.json")["device"]["count"] == 4
    assert_same(tmp_path / "whole", out, tolerance=TOLERANCE)


class Stopped(NamedTuple):
    """A run of two processes with one device each after SIGTERM."""

    config: TrainConfig
    out: Path
    step: int
    statuses: list[int]
    said: list[str]


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory, start) -> Stopped:
    config = dataclasses.replace(small, num_steps=100_000)
    out = tmp_path_factory.mktemp("runs") / "stopped"
    processes = start(2, 1, config, out=out)
    processes.wait_until(lambda: lines_in(out / "metrics.jsonl") >= 3)
    processes.running[1].send_signal(signal.SIGTERM)
    # Where all hosts are taken away the other one hears of it when the step may be being saved.
    processes.wait_until(lambda: any(out.glob("checkpoint_*")))
    processes.running[0].send_signal(signal.SIGTERM)
    statuses = processes.wait()
    return Stopped(config, out, layout.finished_steps(out)[0], statuses, processes.said())


def test_sigterm_to_one_process_stops_all_at_one_step(stopped):
    assert stopped.statuses == [143, 143], stopped.said
    sentence = f"stopped on SIGTERM after step {stopped.step}, which is saved, in {stopped.out}: "
    assert all(sentence in text for text in stopped.said)
    # Although save_every_steps is None.
    assert layout.finished_steps(stopped.out) == [stopped.step]
    assert list(losses_of(stopped.out)) == list(range(1, stopped.step + 1))


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_step_on_any_topology(stopped, cache_path, tmp_path, finish):
    config = stopped.config
    end: dict[str, Any] = {"stop_after_step": stopped.step + 2}
    for name in ("same", "one", "four"):
        shutil.copytree(stopped.out, tmp_path / name)
    finish(2, 1, config, out=tmp_path / "whole", **end)
    finish(2, 1, config, out=tmp_path / "same", **end)
    assert_same(tmp_path / "whole", tmp_path / "same", tolerance=0)
    # One process of eight devices, and four of one that share the experts.
    train(config, cache=cache_path, out=tmp_path / "one", quiet=True, **end)
    assert_same(tmp_path / "whole", tmp_path / "one", tolerance=TOLERANCE)
    divided = dataclasses.replace(config, expert_partitions=4)
    finish(4, 1, divided, out=tmp_path / "four", **end)
    assert_same(tmp_path / "whole", tmp_path / "four", tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory, finish) -> Callable[[int], tuple[TrainConfig, Path]]:
    """Returns undisturbed(processes of two devices): the configuration, and the finished run."""
    config = dataclasses.replace(small, num_steps=60, save_every_steps=5)

    @functools.cache
    def run(count: int) -> tuple[TrainConfig, Path]:
        out = tmp_path_factory.mktemp("runs") / "undisturbed"
        finish(count, 2, config, out=out)
        return config, out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 2)])
def test_a_killed_process_ends_the_others_and_a_restart_gives_the_same_bits(
    count, victim, undisturbed, tmp_path, start, finish
):
    config, whole = undisturbed(count)
    out = tmp_path / "out"
    generator = random.Random(10 * count + victim)
    step = generator.randrange(6, 45)
    processes = start(count, 2, config, out=out)
    processes.wait_until(lambda: lines_in(out / "metrics.jsonl") >= step)
    time.sleep(generator.uniform(0, 0.02))
    processes.running[victim].kill()
    # JAX ends the others: at once if the first process is gone, else when no heartbeat has come.
    statuses = processes.wait(SURVIVOR_SECONDS)
    assert statuses[victim] == -signal.SIGKILL
    assert 0 not in statuses
    assert not (out / "train_summary.json").exists()
    finish(count, 2, config, out=out)
    assert_same(whole, out, tolerance=0)
