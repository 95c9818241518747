from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = [f"py{version}{kind}.txt" for version in ("311", "312") for kind in ("", "-dev")]
SCRIPTS = ("create_tpu.sh", "setup_tpu.sh", "run_on_tpu.sh", "delete_tpu.sh")
SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-32", "v5p-128", "v6e-16")


def call(*command, **options):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120, **options
    )


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked_versions(name):
    """Every pinned package of a lock; each must carry a hash."""
    text = (ROOT / "requirements" / name).read_text()
    blocks = re.findall(
        r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    lines = sum(len(block[2].splitlines()) + 1 for block in blocks)
    assert lines == len(text.splitlines()), f"{name} holds something that is not a hashed pin"
    return {canonicalize_name(package): version for package, version, _ in blocks}


# Packaging


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_what_pyproject_asks_for(lock):
    versions = locked_versions(lock)
    requirements = list(project()["dependencies"])
    if lock.endswith("-dev.txt"):
        requirements += project()["optional-dependencies"]["dev"]
    for requirement in map(Requirement, requirements):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {lock}: run make lock"
        assert requirement.specifier.contains(version), f"{requirement} against {version} in {lock}"
    assert "tensorflow" not in versions and "tensorflow-cpu" in versions


@pytest.mark.parametrize("python", ["311", "312"])
def test_the_lock_of_development_extends_the_lock_of_running(python):
    running, development = (
        locked_versions(f"py{python}.txt"),
        locked_versions(f"py{python}-dev.txt"),
    )
    assert running.items() <= development.items()
    assert "pytest" not in running


def test_a_wheel_holds_the_gin_and_configs_folders(tmp_path):
    code = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    result = call(sys.executable, "-c", code, tmp_path, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "uncurl_jax/__init__.py" in names
    for folder in ("gin", "configs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        for path in files:
            assert f"uncurl_jax/_files/{path.relative_to(ROOT).as_posix()}" in names
    assert "uncurl_jax/_files/configs/slices/v5e-16.json" in names
    assert {name.split("/")[0] for name in names} == {
        "uncurl_jax",
        next(name.split("/")[0] for name in names if "dist-info" in name),
    }
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "uncurl = uncurl_jax.cli:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_tests_run_on_eight_devices():
    import jax

    assert (jax.device_count(), jax.default_backend()) == (8, "cpu")


# Makefile and the choice of a Python


def fake_python(directory, name, version):
    path = directory / name
    path.write_text(f'#!/bin/sh\ncase "$2" in *executable*) echo "$0";; *) echo {version};; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("installed", "wanted", "found"),
    [
        ({"python3": "3.12"}, "python3", "python3"),
        ({"python3": "3.13", "python3.12": "3.12"}, "python3", "python3.12"),
        ({"python3": "3.9", "python3.11": "3.11", "python3.12": "3.12"}, "", "python3.11"),
        ({"python3": "3.11", "python3.12": "3.12"}, "python3.12", "python3.12"),
        ({"python3": "3.13"}, "python3", None),
        ({"python3": "3.11"}, "python3.12", None),
        ({"python3": "3.11", "mine": "3.10"}, "mine", None),
    ],
)
def test_make_finds_a_python_that_will_do_or_says_why_not(tmp_path, installed, wanted, found):
    for name, version in installed.items():
        fake_python(tmp_path, name, version)
    for tool in ("env", "bash"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    result = call(ROOT / "requirements/find_python", wanted, env={"PATH": str(tmp_path)})
    if found:
        assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / found))
    else:
        assert result.returncode == 1 and result.stdout == ""
        assert re.fullmatch(r"uncurl_jax (needs|found) [^\n]+\.\n", result.stderr)


def test_make_help_names_every_target():
    result = call("make", "-C", ROOT, "--no-print-directory", "help")
    for target in ("quickstart", "test", "test-slow", "lint", "lock", "clean", "install"):
        assert f"make {target} " in result.stdout


def test_make_installs_from_the_lock_of_its_python_once_only(tmp_path):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    make = ["make", "-C", tmp_path, "--dry-run", f"PYTHON={sys.executable}", "test", "quickstart"]
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    first = call(*make, env=environment).stdout
    assert f"--require-hashes -r requirements/py{version}-dev.txt" in first
    assert f"--require-hashes -r requirements/py{version}.txt" in first
    for folder in (".venv-run", ".venv-test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"uncurl_jax-py{version}.stamp").touch()
    again = call(*make, env=environment).stdout
    assert "pip install" not in again
    assert ".venv-test/bin/python -m pytest" in again
    assert '.venv-run/bin/uncurl quickstart --out "quickstart_out"' in again


# TPU scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_tpu_script_says_how_to_call_it(script):
    result = call(ROOT / "tpu_scripts" / script, "--help")
    assert result.returncode == 0
    assert f"usage: {script} --name NAME --zone ZONE" in result.stdout
    assert "--dry_run" in result.stdout and "#" not in result.stdout
    assert len((ROOT / "tpu_scripts" / script).read_text().splitlines()) <= 60


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tpu_script_refuses_missing_and_unknown_options(script):
    missing = call(ROOT / "tpu_scripts" / script, "--dry_run", "--zone", "z")
    assert missing.returncode == 2 and "--name is required" in missing.stderr
    unknown = call(ROOT / "tpu_scripts" / script, "--nmae", "a")
    assert unknown.returncode == 2 and "unknown option --nmae" in unknown.stderr
    assert missing.stdout == unknown.stdout == ""


def dry_run(script, *options, command=()):
    words = ["--name", "my-tpu", "--zone", "us-west4-a", "--project", "p", "--dry_run", *options]
    result = call(ROOT / "tpu_scripts" / script, *words, *command)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_create_asks_for_a_queued_resource_of_the_slice():
    lines = dry_run("create_tpu.sh", "--slice", "v5e-16", "--spot")
    assert lines == [
        "gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --zone=us-west4-a "
        "--project=p --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot",
        "gcloud compute tpus queued-resources describe my-tpu --zone=us-west4-a --project=p "
        "'--format=value(state.state)'",
    ]


def test_create_refuses_a_slice_it_does_not_know():
    script = ROOT / "tpu_scripts/create_tpu.sh"
    result = call(script, "--name", "a", "--zone", "z", "--slice", "v2-8", "--dry_run")
    assert result.returncode == 2
    assert "must be one of" in result.stderr and "got v2-8" in result.stderr


def test_setup_copies_and_installs_on_all_workers():
    archive, copy, install, count = dry_run("setup_tpu.sh")
    assert archive.startswith("git -C ") and archive.endswith(" HEAD")
    assert copy == (
        "gcloud compute tpus tpu-vm scp uncurl_jax.tar.gz my-tpu: --zone=us-west4-a --project=p "
        "--worker=all"
    )
    assert "--worker=all" in install and "make install" in install and "jax[tpu]" in install
    assert "--worker=all" in count and "jax.distributed.initialize()" in count


def test_run_passes_the_command_on_word_by_word():
    (line,) = dry_run("run_on_tpu.sh", command=("--", "uncurl", "train", "--out", "a b"))
    assert line == (
        "gcloud compute tpus tpu-vm ssh my-tpu --zone=us-west4-a --project=p --worker=all "
        r"'--command=cd uncurl_jax && source .venv-run/bin/activate && uncurl train --out a\ b'"
    )
    (detached,) = dry_run("run_on_tpu.sh", "--detach", command=("--", "uncurl", "train"))
    assert "nohup bash -c " in detached and "> uncurl_jax/run.log 2>&1 < /dev/null &'" in detached


def test_run_needs_a_command():
    script = ROOT / "tpu_scripts/run_on_tpu.sh"
    result = call(script, "--name", "a", "--zone", "z", "--dry_run")
    assert result.returncode == 2 and "a command is required after --" in result.stderr


def test_delete_removes_the_queued_resource_with_its_slice():
    assert dry_run("delete_tpu.sh") == [
        "gcloud compute tpus queued-resources delete my-tpu --zone=us-west4-a --project=p "
        "--force --quiet"
    ]


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_consistent(name):
    facts = json.loads((ROOT / f"configs/slices/{name}.json").read_text())
    assert facts["name"] == name and facts["source"]
    sides = [int(side) for side in facts["topology"].split("x")]
    assert math.prod(sides) == facts["num_chips"]
    assert facts["num_hosts"] * facts["chips_per_host"] == facts["num_chips"]
    # v5p slices are named by TensorCores, two a chip; the others by chips.
    per_chip = 2 if name.startswith("v5p") else 1
    assert int(name.split("-")[1]) == per_chip * facts["num_chips"]
    assert 1e10 < facts["hbm_bytes_per_chip"] < 1e11
    assert 1e14 < facts["peak_bf16_flops_per_second_per_chip"] < 1e15


def test_every_slice_is_tested():
    assert {path.stem for path in (ROOT / "configs/slices").glob("*.json")} == set(SLICES)
