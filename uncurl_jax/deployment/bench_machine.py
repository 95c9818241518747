"""What a benchmark's record says of the machine and the packages; no names of machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import uncurl_jax

# What users set to choose how NCCL sends; others of its variables name networks and files.
_NCCL = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL")
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and those that decide a program's speed."""
    found = {"python": platform.python_version(), "uncurl_jax": uncurl_jax.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Returns the command, absolute paths cut down to their last part."""
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["uncurl", *(Path(a).name if os.path.isabs(a) else a for a in given)])


def script_line() -> str:
    """Returns the command of a script of benchmarks/, absolute paths cut down likewise."""
    arguments = command_line().removeprefix("uncurl")
    return f"python benchmarks/{Path(sys.argv[0]).name}{arguments}"


def describe_devices() -> dict[str, Any]:
    """Returns kind, number, memory, driver and links of the devices, and the host's processor."""
    devices = jax.devices()
    first = devices[0]
    memory = None if first.platform == "cpu" else first.memory_stats()
    driver = links = None
    if first.platform == "gpu":
        driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
        links = _nvidia_smi("topo", "-m")
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "memory_bytes": (memory or {}).get("bytes_limit"),
        "runtime": " ".join(first.client.platform_version.split()),
        "driver": driver.splitlines()[0] if driver else None,
        "links": links,
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "nccl": {name: os.environ[name] for name in _NCCL if name in os.environ},
        "host": {"processor": _processor(), "cores": len(os.sched_getaffinity(0))},
    }


def _nvidia_smi(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # The heading of `topo -m` is underlined.
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).strip()
    return text if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
