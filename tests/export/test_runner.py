"""Artifacts in processes without this package, damaged ones, and requests that do not fit."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.export import runner
from uncurl_jax.export.runner import Artifact, ArtifactError
from uncurl_jax.export.verify import verify_artifact

# A process in which none of this package and of what it needs beside jax can be imported.
_ALONE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"uncurl_jax", "flax", "orbax", "tensorflow", "safetensors", "optax", "etils"}:
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_py_needs_neither_this_package_nor_flax(shared, quick_processes):
    process = alone(shared / "run.py", "--model", "pruned", "--ids", "50", "60", "--steps", "3")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == Artifact(shared).load("pruned").generate([[50, 60]], 3)[0]


def test_run_py_imports_jax_numpy_and_the_standard_library():
    tree = ast.parse(Path(runner.__file__).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"jax", "ml_dtypes", "numpy"}


def test_a_whole_artifact_is_verified_in_another_process(shared, quick_processes):
    result = verify_artifact(shared)
    assert result["verified"] and result["format"] == "stablehlo"
    for found in result["models"].values():
        assert found["difference"] <= found["tolerance"] == 1e-4
        assert found["same_rows"] == 1.0


@pytest.fixture
def copy(shared, tmp_path):
    return Path(shutil.copytree(shared, tmp_path / "copy"))


def rewrite(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_one_changed_byte_is_found(copy):
    (path,) = (copy / "weights").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"00001.safetensors must have the SHA-256"):
        verify_artifact(copy)


def test_a_missing_file_is_named(copy):
    (copy / "programs" / "base.decode.stablehlo").unlink()
    with pytest.raises(InputError, match=r"without programs/base.decode.stablehlo"):
        verify_artifact(copy)
    with pytest.raises(ArtifactError, match="must hold its programs"):
        Artifact(copy).load("base")


def test_outputs_that_differ_from_the_reference_are_refused(copy, quick_processes):
    path = copy / "reference" / "pruned.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["out/prefill_logits"][1, 3] += 0.01
    np.savez(path, **arrays)
    entry = {"sha256": runner.sha256_of_file(path), "bytes": path.stat().st_size}
    rewrite(copy, lambda manifest: manifest["files"].update({"reference/pruned.npz": entry}))
    with pytest.raises(InputError, match="Model pruned must reproduce its reference outputs"):
        verify_artifact(copy)


def test_a_weight_that_no_file_holds_is_named(copy):
    weights = {"final_norm/scale": "lost"}
    rewrite(copy, lambda manifest: manifest["models"]["base"]["weights"].update(weights))
    with pytest.raises(ArtifactError, match=r"every weight that its manifest names, .* lost"):
        Artifact(copy).load("base")


def test_directories_that_are_no_artifacts_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"must hold manifest.json"):
        verify_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="must hold JSON"):
        verify_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": "uncurl_jax artifact 9"}')
    with pytest.raises(InputError, match='must have the schema "uncurl_jax artifact 1"'):
        verify_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": "uncurl_jax artifact 1"}')
    with pytest.raises(InputError, match=r"a format of stablehlo, .* got no format in"):
        verify_artifact(tmp_path)
    values = {"schema": runner.SCHEMA, "format": "onnx", "files": {}, "models": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"a format of stablehlo, .* got 'onnx'"):
        verify_artifact(tmp_path)


@pytest.fixture(scope="module")
def model(shared):
    return Artifact(shared).load("base")


def test_an_unknown_model_is_refused(shared):
    with pytest.raises(ArtifactError, match="got 'other': it holds base, pruned"):
        Artifact(shared).load("other")


def test_requests_beyond_the_programs_are_refused(model):
    with pytest.raises(ArtifactError, match="must not be longer than max_length=96, got 97"):
        model.prefill(np.zeros((1, 97), np.int32), [97])
    with pytest.raises(ArtifactError, match="lengths must lie between 1 and 5, got 0 to 5"):
        model.prefill(np.zeros((2, 5), np.int32), [0, 5])
    with pytest.raises(ArtifactError, match=r"inputs must be \[b, l\]"):
        model.prefill(np.zeros((0, 5), np.int32), [])
    cache = model.prefill(np.zeros((1, 5), np.int32), [5])["cache"]
    with pytest.raises(ArtifactError, match="positions must be below max_length=96, got 96"):
        model.decode(cache, [3], [96])
    with pytest.raises(ArtifactError, match="token and positions must be of one shape"):
        model.decode(cache, [3, 4], [5])
    with pytest.raises(ArtifactError, match=r"must fit max_length=96, got 90 \+ 7"):
        model.generate([[5] * 90], 7)


def compared(**changes):
    reference = {
        "prefill_logits": np.asarray([[1.0], [3.0], [0.0], [0.0]]),
        "prefill_experts/layers_0": np.asarray([[0, 1], [1, 1], [0, 0], [0, 0]]),
        "decode_logits/0": np.zeros((4, 1)),
        "decode_experts/0/layers_0": np.asarray([[0], [1], [1], [0]]),
        "decode_logits/1": np.zeros((4, 1)),
        "decode_experts/1/layers_0": np.asarray([[0], [0], [0], [0]]),
    }
    return runner.compare({**reference, **changes}, reference)


def limits(difference: float, same_rows: float) -> dict[str, float]:
    return {"difference": difference, "same_rows": same_rows}


def test_differences_are_relative_to_one_plus_the_size_of_a_row():
    found = compared(prefill_logits=np.asarray([[1.0], [3.4], [0.0], [0.05]]))
    assert found["difference"] == pytest.approx(0.4 / (1 + 3))
    found = runner.compare(
        {"prefill_logits": np.asarray([[3.0, 5.5]])}, {"prefill_logits": np.asarray([[3.0, 5.0]])}
    )
    assert found["difference"] == pytest.approx(0.5 / (1 + np.sqrt((9 + 25) / 2)))


def test_a_row_with_another_expert_is_not_compared():
    experts = np.asarray([[0, 1], [1, 0], [0, 0], [0, 0]])
    rows = np.asarray([[0.0], [9.0], [0.0], [0.0]])
    found = compared(**{"prefill_experts/layers_0": experts, "decode_logits/1": rows})
    assert found == {"difference": 0.0, "same_rows": 0.75}
    assert runner.is_alike(found, limits(1e-4, 0.75))
    assert not runner.is_alike(found, limits(1e-4, 0.8))


def test_a_row_is_compared_up_to_the_step_with_another_expert():
    experts = np.asarray([[0], [0], [1], [0]])
    rows = np.asarray([[0.0], [0.5], [0.0], [0.0]])
    assert compared(**{"decode_logits/0": rows})["difference"] == 0.5
    changed = {"decode_experts/0/layers_0": experts}
    assert compared(**changed, **{"decode_logits/0": rows})["difference"] == 0
    # The second step goes on from the first one.
    assert compared(**changed, **{"decode_logits/1": rows})["difference"] == 0
    logits = rows + np.asarray([[1], [3], [0], [0]])
    assert compared(**changed, prefill_logits=logits)["difference"] == 0.125


def test_not_a_number_is_no_small_difference():
    found = compared(prefill_logits=np.asarray([[np.nan], [3.0], [0.0], [0.0]]))
    assert not runner.is_alike(found, limits(1.0, 0.0))
