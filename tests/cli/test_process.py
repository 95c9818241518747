"""The command as a process of its own: exit statuses, what it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

_REPORT_IMPORTS = """
import sys
{work}
heavy = {{"jax", "jaxlib", "tensorflow", "seqio", "orbax", "flax", "gin"}}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "work",
    [
        "import uncurl_jax",
        "import uncurl_jax.cli",
        "import uncurl_jax.cli; uncurl_jax.cli.build_parser().format_help()",
    ],
)
def test_importing_the_package_and_asking_for_help_import_nothing_heavy(work, environment):
    process = subprocess.run(
        [sys.executable, "-c", _REPORT_IMPORTS.format(work=work)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "[]\n"


def test_help_ends_before_anything_heavy_is_imported(environment):
    work = (
        "from uncurl_jax.cli import main\n"
        "try:\n    main(['plan', '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", _REPORT_IMPORTS.format(work=work)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.startswith("usage: uncurl plan")
    assert process.stdout.endswith("[]\n")


def test_a_plan_needs_no_tensorflow_and_no_checkpoint_library(world, environment, tmp_path):
    arguments = ["plan", "--statistics", world["statistics.npz"], "--num_experts", "3"]
    arguments += ["--out", str(tmp_path / "plan.json")]
    work = f"from uncurl_jax.cli import main\nassert main({arguments!r}) == 0"
    process = subprocess.run(
        [sys.executable, "-c", _REPORT_IMPORTS.format(work=work)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.splitlines()[-1] == "['gin', 'jax', 'jaxlib']"


def test_the_process_ends_with_the_status_and_its_streams_stay_apart(world, run_alone, tmp_path):
    good = run_alone(tmp_path, "inspect", world["pretrained"])
    assert good.result["step"] == 3
    bad = run_alone(tmp_path, "inspect", "nowhere")
    assert (bad.status, bad.out) == (2, "")
    assert bad.err == (
        "uncurl inspect: error: A checkpoint must be an existing directory, got nowhere: "
        "check the path.\n"
    )


def test_a_gin_file_with_includes_is_found_from_any_directory(run_alone, tmp_path):
    """In a process of its own: other modules may import what gin forgets to."""
    arguments = ("--gin_file", "gin/runs/distill.gin", "--cache", "none", "--out", "o")
    done = run_alone(tmp_path, "train", *arguments, "--checkpoint", "none", "--teacher", "none")
    assert done.status == 2
    assert done.err.startswith("uncurl train: error: A token cache must hold manifest.json, got ")
    assert list(tmp_path.iterdir()) == []


def test_a_quickstart_of_wrong_settings_writes_nothing(run_alone, tmp_path):
    binding = "--gin.study.StudyConfig.methods=('uncrl',)"
    done = run_alone(tmp_path, "quickstart", binding, "--out", "q")
    assert done.status == 2 and "did you mean uncurl?" in done.err
    assert list(tmp_path.iterdir()) == []
