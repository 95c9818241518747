"""`uncurl verify-artifact`: reloads an artifact in a fresh process and compares with references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from uncurl_jax.errors import InputError
from uncurl_jax.export import runner

# What runs an artifact, by its format. The first two import nothing of this package.
_RUNNERS = {
    "stablehlo": "runner.py",
    "saved_model": "saved_model_runner.py",
    "orbax": "serving_runner.py",
}


def verify_artifact(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Checks hashes here, then loads and runs the artifact in another process.

    Returns:
      {"artifact", "format", "models": {name: {"difference", "tolerance", ...}}, "verified": True}.

    Raises:
      InputError: If a file differs from the manifest, or an output from the reference.
      RuntimeError: If the other process fails in another way.
    """
    try:
        manifest = runner.read_manifest(directory)
        _check_fields(directory, manifest)
        runner.check_files(directory, manifest)
    except runner.ArtifactError as error:
        raise InputError(str(error)) from None
    try:
        models = run_check(directory, manifest)
    except MismatchError as error:
        raise InputError(str(error)) from None
    return {
        "artifact": os.fspath(directory),
        "format": manifest["format"],
        "models": models,
        "verified": True,
    }


def _check_fields(directory: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    missing = [name for name in ("format", "files", "models") if name not in manifest]
    if missing or manifest["format"] not in _RUNNERS:
        got = f"no {missing[0]}" if missing else repr(manifest["format"])
        raise InputError(
            f"A manifest must have models, files and a format of {', '.join(_RUNNERS)}, got {got} "
            f"in {directory}: export again."
        )


class MismatchError(RuntimeError):
    """An artifact does not reproduce its reference outputs; the message is one sentence."""


def run_check(directory: str | os.PathLike[str], manifest: dict[str, Any]) -> dict[str, Any]:
    """Runs an artifact in another process and returns what it says of each model.

    Raises:
      MismatchError: If an output differs from the reference.
      RuntimeError: If the process fails in another way.
    """
    script = Path(__file__).with_name(_RUNNERS[manifest["format"]])
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    if manifest["format"] == "orbax":
        # Any mesh fits on virtual devices of the CPU.
        flags = os.environ.get("XLA_FLAGS", "")
        count = manifest["serving"]["num_devices"]
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}".strip(),
        }
    # -P: modules beside the script must not be taken for installed ones.
    process = subprocess.run(
        [sys.executable, "-P", str(script), "--dir", os.fspath(directory)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode == 2:
        raise MismatchError(process.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if process.returncode:
        raise RuntimeError(f"The artifact's process failed: {process.stderr.strip()[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])
