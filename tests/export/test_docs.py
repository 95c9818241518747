"""The loader that docs/serving.md shows, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from uncurl_jax.export.runner import Artifact

_DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_loader_in_the_documentation_runs_with_jax_alone(shared, quick_processes, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", _DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "safetensors" in block)
    (tmp_path / "artifact").symlink_to(shared)
    refused = 'import sys\nfor name in ("uncurl_jax", "flax", "orbax", "safetensors"):\n'
    refused += "    sys.modules[name] = None\n"
    process = subprocess.run(
        [sys.executable, "-c", refused + code.replace('"rte"', '"pruned"')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    model = Artifact(shared).load("pruned")
    logits = model.prefill(np.asarray([[0, 87, 108]]), [3])["logits"]
    assert int(process.stdout) == int(np.argmax(logits))
