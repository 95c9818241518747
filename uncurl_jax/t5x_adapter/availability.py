"""Finds T5X, or says how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

import gin

from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import standins

# The commit of github.com/google-research/t5x that this package is tested with.
TESTED_COMMIT = "cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"
SOURCE_VARIABLE = "UNCURL_T5X_SRC"

_REMEDY = (
    f"give --t5x_src DIR (or {SOURCE_VARIABLE}=DIR) with a checkout of "
    "github.com/google-research/t5x, or install it as docs/t5x.md says"
)


def find(t5x_src: str | None = None) -> None:
    """Finds T5X and imports nothing; arguments and errors as `make_importable`."""
    source = t5x_src or os.environ.get(SOURCE_VARIABLE)
    if source is not None:
        _add_source(Path(source))
    if importlib.util.find_spec("t5x") is None:
        raise InputError(f"T5X must be importable, got no module t5x: {_REMEDY}.")
    _check_jax()


def make_importable(t5x_src: str | None = None) -> None:
    """Makes `import t5x` work, with stand-ins for airio and jestimator where they are missing.

    Args:
      t5x_src: a checkout of T5X, the directory that holds the package `t5x`; None takes the
        environment's UNCURL_T5X_SRC, or what is installed.

    Raises:
      InputError: If T5X, something that it imports, or a jax that it can use is missing.
    """
    find(t5x_src)
    standins.install()
    try:
        # T5X adds functions of its own to gin as it is imported.
        with warnings.catch_warnings(), gin.unlock_config():
            # T5X imports names that jax and TensorFlow are about to take away.
            warnings.simplefilter("ignore")
            for module in ("t5x.models", "t5x.train", "t5x.eval", "t5x.infer"):
                importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"T5X must be importable, got {error} from {_place()}: pip install 'uncurl_jax[t5x]' "
            "for what it needs."
        ) from error


def why_missing(t5x_src: str | None = None) -> str | None:
    """Returns what `make_importable` would complain of, None if nothing."""
    try:
        make_importable(t5x_src)
    except InputError as error:
        return str(error)
    return None


def _add_source(source: Path) -> None:
    source = source.expanduser().resolve()
    if not (source / "t5x" / "__init__.py").is_file():
        raise InputError(
            f"--t5x_src must be a checkout of T5X, got {source} without t5x/__init__.py: clone "
            "github.com/google-research/t5x there."
        )
    loaded = sys.modules.get("t5x")
    if loaded is not None and Path(str(loaded.__file__)).resolve().parents[1] != source:
        raise InputError(
            f"--t5x_src must be the T5X that this process uses, got {source} after "
            f"{_place()}: start a new process."
        )
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))


def _check_jax() -> None:
    found = importlib.metadata.version("jax")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= (0, 11):
        raise InputError(
            f"T5X needs jax below 0.11, which took jax.experimental.pjit away, got jax "
            f"{found}: pip install 'uncurl_jax[t5x]' in an environment of Python 3.11."
        )


def _place() -> str:
    loaded = sys.modules.get("t5x")
    if loaded is not None and loaded.__file__:
        return str(Path(loaded.__file__).parent)
    spec = importlib.util.find_spec("t5x")
    return str(spec.origin) if spec else "nowhere"
