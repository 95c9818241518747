"""Outputs that cannot be written: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = (
    ("cache", "--task", "synthetic_topic", "--data_dir", "data"),
    ("calibrate", "--checkpoint", "pretrained", "--task", "caches/topic"),
    ("plan", "--statistics", "statistics.npz", "--num_experts", "2"),
    ("prune", "--checkpoint", "pretrained", "--plan", "pruning_plan.json"),
    ("evaluate", "--checkpoint", "pretrained", "--task", "caches/topic"),
    ("train", "--gin_file", "pretrain.gin", "--cache", "caches/topic/train"),
    ("sweep", "--gin_file", "study.gin", "--data_dir", "data"),
)


@pytest.fixture(autouse=True)
def in_the_job(world, uncurl, monkeypatch):
    monkeypatch.chdir(world.root)


@pytest.mark.parametrize("arguments", COMMANDS[:5], ids=lambda a: a[0])
def test_an_output_that_exists_is_kept(arguments, refuse, tmp_path):
    (tmp_path / "out").write_text("precious")
    sentence = f"An output must not exist yet, got {tmp_path / 'out'}: choose another --out"
    refuse(sentence, *arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[0])
def test_an_output_below_a_file_is_refused_before_any_work(arguments, refuse, tmp_path):
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" / "out"
    sentence = f"must lie in a directory that can be written, got {out} where "
    refuse(f"{sentence}{tmp_path / 'file'} is a file: choose", *arguments, "--out", out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[0])
def test_an_output_in_a_read_only_directory_is_refused_before_any_work(arguments, refuse, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "out"
    refuse(f"got {out} where {tmp_path / 'locked'} cannot be", *arguments, "--out", out)


def test_the_output_of_a_finished_training_is_kept(refuse):
    arguments = ("--gin_file", "pretrain.gin", "--cache", "caches/topic/train")
    sentence = "An output must not exist yet, got a finished run in pretrained"
    refuse(sentence, "train", *arguments, "--out", "pretrained")


def test_a_training_does_not_mix_its_output_with_something_else(refuse):
    arguments = ("--gin_file", "pretrain.gin", "--cache", "caches/topic/train")
    sentence = "A checkpoint directory must be new, empty or hold checkpoints of the same model"
    refuse(sentence, "train", *arguments, "--out", "data")


@pytest.mark.parametrize(
    ("arguments", "limit"), [(COMMANDS[2], 200), (COMMANDS[0], 2000), (COMMANDS[3], 4000)]
)
def test_a_disk_that_is_full_is_reported_and_nothing_stays(
    arguments, limit, world, environment, tmp_path
):
    """No file may grow beyond `limit` bytes, which looks like a full disk to the program."""
    script = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from uncurl_jax.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--out", str(tmp_path / "out")],
        cwd=world.root,
        env={**environment, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    # Orbax may print before it how its threads ended.
    last = process.stderr.splitlines()[-1]
    assert "The system must let files be read and written, got " in last
    assert "File too large" in last
    # A prune keeps what it has written, under a hidden name, and goes on with it.
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.")] == []
