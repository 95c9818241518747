"""SavedModels in a process of TensorFlow alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.generation import generate
from uncurl_jax.export.manifest import ExportOptions
from uncurl_jax.export.saved_model import export_saved_model
from uncurl_jax.export.verify import verify_artifact

# Loads a SavedModel with neither JAX nor this package, and calls its signatures.
_ALONE = """
import json, sys
sys.modules["jax"] = sys.modules["uncurl_jax"] = None
import numpy as np, tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
names = sorted(signatures)
prompt = {"inputs": tf.constant([[0, 50, 60, 70], [0, 80, 0, 0]]), "lengths": tf.constant([4, 2])}
tokens = signatures["base_generate"](**prompt)["tokens"].numpy().tolist()
following = signatures["serving_default"](**prompt)["next_token"].numpy().tolist()
print(json.dumps([names, tokens, following]))
"""


@pytest.fixture(scope="module")
def saved(checkpoints, cache, tmp_path_factory):
    pytest.importorskip("tensorflow")
    out = tmp_path_factory.mktemp("saved") / "artifact"
    summary = export_saved_model(
        checkpoints, out, ExportOptions(caches={"pruned": cache}), max_new_tokens=3
    )
    return out, summary


@pytest.mark.slow
def test_tensorflow_alone_makes_the_same_tokens(saved, checkpoints):
    out, _ = saved
    process = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(out / "1")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    names, tokens, following = json.loads(process.stdout.splitlines()[-1])
    kinds = ("generate", "next_token", "score")
    expected = [f"{model}_{kind}" for model in ("base", "pruned") for kind in kinds]
    assert names == sorted([*expected, "serving_default"])
    model = load_model(checkpoints["base"])
    made = generate(model, [[50, 60, 70], [80]], max_new_tokens=3, eos_id=1)
    assert [row[: len(ids)] for row, ids in zip(tokens, made, strict=True)] == made
    assert following == [row[0] for row in tokens]


@pytest.mark.slow
def test_variables_are_shared_and_the_reference_holds(saved, read_manifest, cache):
    out, summary = saved
    result = verify_artifact(out)
    for found in result["models"].values():
        assert found["difference"] <= found["tolerance"] == 1e-4
    manifest = read_manifest(out)
    assert manifest["saved_by_sharing_bytes"] > 0
    assert summary["models"]["pruned"]["scores"]["artifact"]["num_examples"] == len(
        cache.examples()
    )


@pytest.mark.slow
def test_int8_kernels_are_signatures_too(checkpoints, tmp_path, read_manifest):
    pytest.importorskip("tensorflow")
    out = tmp_path / "artifact"
    options = ExportOptions(quantization="int8")
    export_saved_model({"m": checkpoints["pruned"]}, out, options, max_new_tokens=2)
    assert verify_artifact(out)["verified"]
    assert read_manifest(out)["models"]["m"]["signatures"]["score"] == "score"


def test_without_tensorflow_the_format_is_refused(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match="TensorFlow, which is not installed: pip install"):
        export_saved_model({"base": checkpoints["base"]}, tmp_path / "out")


def test_too_many_new_tokens_are_refused(checkpoints, tmp_path):
    pytest.importorskip("tensorflow")
    with pytest.raises(InputError, match="below max_length=96, got 96"):
        export_saved_model({"base": checkpoints["base"]}, tmp_path / "out", max_new_tokens=96)
    assert list(tmp_path.iterdir()) == []
