"""Two processes under jax.distributed train what one process trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import uncurl_jax
from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.training.trainer import train

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 300


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
