"""Runs every test on eight host devices of the CPU; a browser for the tests of pages.

The flags count only if they are set before JAX is imported, hence here and not in a fixture.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

_FLAG = "--xla_force_host_platform_device_count"

if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# TensorFlow, where SeqIO imports it: errors only, and no GPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def browser():
    """Chromium: of the variable CHROMIUM, else on the PATH, else Playwright's own.

    Not for the whole session: while it is open, this thread counts as inside an event loop.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, _BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        if found is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(
                "no Chromium: set CHROMIUM, install one, or run `playwright install chromium`"
            )
        # Root cannot have the sandbox, and containers have little shared memory.
        started = driver.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()
