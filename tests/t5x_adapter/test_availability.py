from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.version
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import availability

ROOT = Path(__file__).parents[2]
HAS_NEW_JAX = jax.version.__version_info__ >= (0, 11)


def test_a_directory_without_t5x_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be a checkout of T5X, got .* without t5x/__init"):
        availability.find(str(tmp_path))


def test_a_missing_t5x_is_explained():
    said = say("import sys; sys.modules['t5x'] = None")
    assert said.startswith("T5X must be importable, got no module t5x: give --t5x_src DIR")
    assert "docs/t5x.md" in said


@pytest.mark.skipif(HAS_NEW_JAX, reason="jax is said to be too new first")
def test_a_broken_t5x_is_explained(tmp_path):
    source = t5x_like(tmp_path / "broken", "import a_module_that_is_nowhere")
    said = say("", source)
    assert said.startswith("T5X must be importable, got No module named 'a_module_that_is_nowhere'")
    assert "pip install 'uncurl_jax[t5x]'" in said


@pytest.mark.skipif(not HAS_NEW_JAX, reason="T5X can use this jax")
def test_a_jax_that_t5x_cannot_use_is_named(tmp_path):
    said = say("", t5x_like(tmp_path / "source"))
    assert said.startswith("T5X needs jax below 0.11, which took jax.experimental.pjit away, got")


def test_the_first_t5x_of_a_process_stays(tmp_path):
    first, second = t5x_like(tmp_path / "first"), t5x_like(tmp_path / "second")
    work = f"import sys; sys.path.insert(0, {str(first)!r}); import t5x"
    said = say(work, second)
    assert said.startswith(f"--t5x_src must be the T5X that this process uses, got {second} after")


def say(work: str, t5x_src: Path | None = None) -> str:
    """What is missing, in a process of its own that has done some work before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(availability.SOURCE_VARIABLE, None)
    given = None if t5x_src is None else str(t5x_src)
    code = f"{work}\nfrom uncurl_jax.t5x_adapter.availability import why_missing\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(why_missing({given!r}))"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def t5x_like(directory: Path, text: str = "") -> Path:
    """Makes a directory with a package t5x that holds nothing but a text."""
    (directory / "t5x").mkdir(parents=True)
    (directory / "t5x" / "__init__.py").write_text(text)
    return directory
