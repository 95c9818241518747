"""SIGTERM saves and stops; the same call goes on, on the same devices or on others."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.errors import InputError
from uncurl_jax.training import preemption
from uncurl_jax.training.trainer import is_finished, train

TOLERANCE = 1e-5


def losses_of(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_json_lines(out / "metrics.jsonl")}


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    reader = layout.StateReader(path)
    return {name: reader.read(name) for name in reader.metadata}


def assert_same_bits(one: Path, other: Path) -> None:
    """Of the latest checkpoints, optimizer state included."""
    expected, found = arrays_of(one), arrays_of(other)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def signal_when(condition: Callable[[], bool]) -> threading.Thread:
    """Sends SIGTERM to this process once the condition holds, from another thread."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(autouse=True)
def handler() -> Iterator[list[int]]:
    """A handler of the caller's own, so that a signal too many does not end pytest; its signals."""
    received: list[int] = []
    own = lambda number, frame: received.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    yield received
    assert signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def long(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """More steps than a test waits for, dropless; jitter shows whether random numbers go on."""
    model = dataclasses.replace(model, num_experts=(3,), router_jitter=0.1)
    return dataclasses.replace(config, model=model, num_steps=10_000)


def test_sigterm_saves_the_step_and_the_same_call_gives_the_same_bits(
    long, cache_path, tmp_path, handler
):
    out = tmp_path / "out"
    thread = signal_when(lambda: lines_in(out / "metrics.jsonl") >= 3)
    with pytest.raises(preemption.Preempted) as stop:
        train(long, cache=cache_path, out=out, quiet=True)
    thread.join()
    step = stop.value.step
    assert 3 <= step < long.num_steps
    assert stop.value.code == 143
    assert str(stop.value) == (
        f"stopped on SIGTERM after step {step}, which is saved, in {out}: "
        "the same command goes on from there"
    )
    # Although save_every_steps is None, and with a line for every step up to it.
    assert layout.finished_steps(out) == [step]
    assert list(losses_of(out)) == list(range(1, step + 1))
    assert list((out / "tensorboard").glob("events.*"))
    assert not is_finished(out)
    assert handler == []

    end = step + 2
    assert train(long, cache=cache_path, out=out, stop_after_step=end, quiet=True).step == end
    train(long, cache=cache_path, out=tmp_path / "whole", stop_after_step=end, quiet=True)
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert_same_bits(tmp_path / "whole", out)


def test_a_signal_in_the_last_step_of_a_stage_stops_the_next_stage_before_its_first(
    long, cache_path, tmp_path
):
    with preemption.Watch():
        signal.raise_signal(signal.SIGTERM)
    out = tmp_path / "out"
    with pytest.raises(preemption.Preempted) as stop:
        train(long, cache=cache_path, out=out, quiet=True)
    assert stop.value.step == 0
    assert str(stop.value).startswith("stopped on SIGTERM before its first step, in ")
    assert layout.finished_steps(out) == []
    train(long, cache=cache_path, out=out, stop_after_step=1, quiet=True)
    assert list(losses_of(out)) == [1]


def test_a_second_signal_goes_to_the_handler_before(handler):
    with preemption.Watch() as watch:
        assert not watch.is_due()
        signal.raise_signal(signal.SIGTERM)
        assert watch.is_due()
        assert watch.is_due()
        assert handler == []
        signal.raise_signal(signal.SIGTERM)
        assert handler == [signal.SIGTERM]
        with pytest.raises(SystemExit), watch:
            raise preemption.Preempted("out", 1)


def test_the_handler_comes_back_after_an_error(handler):
    with pytest.raises(RuntimeError, match="mine"), preemption.Watch():
        raise RuntimeError("mine")
    signal.raise_signal(signal.SIGTERM)
    assert handler == [signal.SIGTERM]


def test_in_another_thread_signals_stay_with_their_handler(handler):
    answers = []

    def watch() -> None:
        with preemption.Watch() as other:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            answers.append(other.is_due())

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert answers == [False]
    assert handler == [signal.SIGTERM]


def test_importing_the_module_does_not_import_jax():
    code = "import sys, uncurl_jax.training.preemption; sys.exit('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def assert_same_but_for_rounding(expected: Path, found: Path) -> None:
    losses = losses_of(found)
    assert losses == pytest.approx(losses_of(expected), rel=TOLERANCE)
    arrays = arrays_of(found)
    for name, array in arrays_of(expected).items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=TOLERANCE, err_msg=name)


def test_a_run_goes_on_with_other_partitions(long, cache_path, tmp_path):
    train(long, cache=cache_path, out=tmp_path / "whole", stop_after_step=5, quiet=True)
    out = tmp_path / "out"
    train(long, cache=cache_path, out=out, stop_after_step=3, quiet=True)
    other = dataclasses.replace(long, expert_partitions=2, model_partitions=2)
    train(other, cache=cache_path, out=out, stop_after_step=5, quiet=True)
    assert_same_but_for_rounding(tmp_path / "whole", out)
    settings = read_json(out / "train_config.json")["train_config"]
    assert (settings["expert_partitions"], settings["model_partitions"]) == (2, 2)


def test_other_partitions_do_not_excuse_another_configuration(long, cache_path, tmp_path):
    out = tmp_path / "out"
    train(long, cache=cache_path, out=out, stop_after_step=1, quiet=True)
    other = dataclasses.replace(long, expert_partitions=2, seed=4)
    with pytest.raises(InputError, match="goes on with the configuration it began with"):
        train(other, cache=cache_path, out=out, quiet=True)
