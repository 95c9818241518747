"""One small job done with the commands themselves, and ways to call them.

The job runs in one process of its own with one device, as users have it on a laptop; this test
process has eight. Compiled programs are kept on disk between the processes of one session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.cli import main
from uncurl_jax.data import synthetic

MODEL = """
from __gin__ import dynamic_registration
from uncurl_jax import config
config.ModelConfig.num_experts = (4, 4)
config.ModelConfig.vocab_size = 260
config.ModelConfig.embed_dim = 16
config.ModelConfig.num_heads = 2
config.ModelConfig.mlp_dim = 32
config.ModelConfig.max_length = 96
config.ModelConfig.eval_capacity_factor = None
config.ModelConfig.init_stddev = 0.2
config.ModelConfig.dtype = 'float32'
config.TrainConfig.optimizer = @config.OptimizerConfig()
config.TrainConfig.batch_size = 8
config.OptimizerConfig.peak_learning_rate = 1e-2
"""

STAGE = """
from __gin__ import dynamic_registration
from uncurl_jax import config
from uncurl_jax.training import trainer
include 'model.gin'
NUM_STEPS = 3
trainer.train.config = @config.TrainConfig()
config.TrainConfig.num_steps = %NUM_STEPS
"""

PRETRAIN = STAGE + "config.TrainConfig.model = @config.ModelConfig()\n"
WARMUP = STAGE + "config.TrainConfig.trainable = 'router'\n"

STUDY = """
from __gin__ import dynamic_registration
from uncurl_jax import config
from uncurl_jax.experiments import study
from uncurl_jax.experiments import sweep
include 'model.gin'
SEEDS = (0,)
sweep.run_sweep.config = @study.StudyConfig()
study.StudyConfig.title = 'Tiny'
study.StudyConfig.model = @config.ModelConfig()
study.StudyConfig.corpus = 'synthetic_corpus'
study.StudyConfig.tasks = ('synthetic_topic',)
study.StudyConfig.source_num_experts = (4,)
study.StudyConfig.target_num_experts = (2,)
study.StudyConfig.methods = ('uncurl', 'frequency')
study.StudyConfig.seeds = %SEEDS
study.StudyConfig.has_scratch = False
study.StudyConfig.calibration_max_batches = 1
study.StudyConfig.pretrain = @config.TrainConfig()
study.StudyConfig.warmup = @warmup/config.TrainConfig()
study.StudyConfig.finetune = @config.TrainConfig()
config.ModelConfig.num_experts = (4,)
config.TrainConfig.num_steps = 2
warmup/config.TrainConfig.trainable = 'router'
"""

_DRIVER = """
import json, os, sys
from uncurl_jax.cli import main
results = []
saved = os.dup(1), os.dup(2)
for number, command in enumerate(json.load(sys.stdin)):
    for stream, name in ((1, "out"), (2, "err")):
        target = os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(target, stream)
        os.close(target)
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(saved[0], 1)
    os.dup2(saved[1], 2)
    texts = [open(f"{number}.{name}").read() for name in ("out", "err")]
    results.append([status, *texts])
    os.remove(f"{number}.out"), os.remove(f"{number}.err")
print(json.dumps(results))
"""


class Done(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        """The one JSON line on stdout."""
        assert self.status == 0, self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process with one CPU device that compiles quickly, and each program once."""
    root = Path(__file__).parents[2]
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture(scope="session")
def run_all(environment) -> Callable[[Path, Sequence[Sequence[str]]], list[Done]]:
    """Returns run_all(directory, commands): all in one other process, one after the other."""

    def run(directory: Path, commands: Sequence[Sequence[str]]) -> list[Done]:
        process = subprocess.run(
            [sys.executable, "-c", _DRIVER],
            input=json.dumps(commands),
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return [Done(*values) for values in json.loads(process.stdout.splitlines()[-1])]

    return run


@pytest.fixture(scope="session")
def run_alone(environment) -> Callable[..., Done]:
    """Returns run_alone(directory, *arguments): `uncurl` as a process."""

    def run(directory: Path, *arguments: str) -> Done:
        process = subprocess.run(
            [sys.executable, "-m", "uncurl_jax.cli", *arguments],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(process.returncode, process.stdout, process.stderr)

    return run


@pytest.fixture(scope="session")
def kill_when(environment) -> Callable[..., None]:
    """Returns kill_when(directory, condition, *arguments): starts it, kills it at the condition."""

    def run(directory: Path, condition: Callable[[], bool], *arguments: str) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "uncurl_jax.cli", *arguments],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            while process.poll() is None and not condition():
                time.sleep(0.002)
            assert process.poll() is None, "the command ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert process.stdout is not None
            assert process.stdout.read() == b""

    return run


@pytest.fixture
def uncurl(monkeypatch, capsys, tmp_path) -> Callable[..., Done]:
    """Returns uncurl(*arguments): calls main here, in a new directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            status = stop.code
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return run


class World(NamedTuple):
    """Where the job's files lie, and what its commands said."""

    root: Path
    done: dict[str, Done]

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)


JOB = {
    "cache": "cache --task synthetic_topic --data_dir data --max_length 96 --out caches/topic",
    "cache text": "cache --task synthetic_corpus --data_dir data --max_length 64 --out caches/text",
    "train": "train --gin_file pretrain.gin --cache caches/topic/train --out pretrained",
    "calibrate": "calibrate --checkpoint pretrained --task caches/topic --out statistics.npz",
    "plan": "plan --statistics statistics.npz --num_experts 2,3 --out pruning_plan.json",
    "prune": "prune --checkpoint pretrained --plan pruning_plan.json --out pruned",
    "warm up": "train --gin_file warmup.gin --checkpoint pruned --cache caches/topic/train "
    "--out warmed_up",
    "finetune": "train --gin_file finetune.gin --checkpoint warmed_up "
    "--cache caches/topic/train --gin.NUM_STEPS=2 --out finetuned",
    "evaluate": "evaluate --checkpoint finetuned --task caches/topic --out metrics.json",
    "evaluate named": "evaluate --checkpoint finetuned --task synthetic_topic --data_dir data "
    "--out metrics_named.json",
    "evaluate text": "evaluate --checkpoint finetuned --task caches/text --out loss.json",
    "evaluate generated": "evaluate --checkpoint finetuned --task caches/topic --mode generate "
    "--max_new_tokens 4 --out generated.json",
    "inspect": "inspect finetuned",
    "sweep 0": "sweep --gin_file study.gin --cache_dir study_caches --data_dir data --out study "
    "--shard 0/2",
    "sweep 1": "sweep --gin_file study.gin --cache_dir study_caches --data_dir data --out study "
    "--shard 1/2 --gin.study.StudyConfig.keep_checkpoints=False",
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and gin files, before any command."""
    root = tmp_path_factory.mktemp("job")
    synthetic.write_tasks(root / "data", num_train=24, num_validation=10, num_documents=12)
    texts = {
        "model": MODEL,
        "pretrain": PRETRAIN,
        "warmup": WARMUP,
        "finetune": STAGE,
        "study": STUDY,
    }
    for name, text in texts.items():
        (root / f"{name}.gin").write_text(text)
    return root


@pytest.fixture(scope="session")
def world(files, run_all) -> World:
    """The whole job, done."""
    done = run_all(files, [command.split() for command in JOB.values()])
    return World(files, dict(zip(JOB, done, strict=True)))


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory with size and time of change."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            state = path.lstat()
            found[str(path)] = (state.st_size, state.st_mtime_ns)
    return found


@pytest.fixture
def refuse(uncurl, world, tmp_path):
    """Returns refuse(sentence, *arguments): checks how a command refuses; parts joined by ..."""

    def check(sentence: str, *arguments: object) -> str:
        before = listing(world.root, tmp_path)
        done = uncurl(*arguments)
        assert done.status == 2, done
        assert done.out == ""
        assert done.err.endswith("\n") and done.err.count("\n") == 1, done.err
        assert "Traceback" not in done.err
        said = done.err.strip()
        place = 0
        for part in sentence.split("..."):
            place = said.find(part, place)
            assert place >= 0, f"{part!r} is not in {said!r}"
        assert listing(world.root, tmp_path) == before
        return said

    return check


@pytest.fixture
def rewrite_statistics(world, tmp_path):
    """Returns a function that changes the arrays or the header of the statistics file."""

    def rewrite(change) -> Path:
        with np.load(world["statistics.npz"]) as archive:
            arrays = {name: archive[name].copy() for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        change(header["manifest"], arrays)
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        path = tmp_path / "changed.npz"
        np.savez(path, header=text, **arrays)
        return path

    return rewrite


@pytest.fixture
def save_changed(world, tmp_path):
    """Returns a function that saves the pretrained checkpoint with other parameters."""

    def save(change) -> Path:
        reader = layout.StateReader(world["pretrained"])
        params: dict = {}
        for name in reader.parameters():
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = reader.read(f"target/{name}").copy()
        change(params)
        source = reader.checkpoint
        with CheckpointStore(
            tmp_path / "changed",
            model_config=source.model_config(),
            provenance={"created_by": "test"},
            vocabulary=source.vocabulary(),
        ) as store:
            store.save(1, params)
        return tmp_path / "changed"

    return save
