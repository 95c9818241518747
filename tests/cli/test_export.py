"""`uncurl export` and `uncurl verify-artifact` as users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_pruned_model_becomes_an_artifact_that_is_verified(world, run_all, tmp_path):
    export = (
        f"export --checkpoint before={world['pretrained']} --checkpoint after={world['finetuned']} "
        f"--format stablehlo --quantize int8 --cache after={world['caches/topic']} --out artifact"
    )
    made, whole, again = run_all(
        tmp_path, [export.split(), ["verify-artifact", "artifact"], export.split()]
    )
    result = made.result
    assert "MiB of parameters" in made.err and "became" in made.err
    scores = result["models"]["after"]["scores"]
    # What `uncurl evaluate` said of the checkpoint; its model has no capacity limit.
    expected = json.loads(Path(world["metrics.json"]).read_text())
    assert scores["checkpoint"]["score"] == expected["score"]
    assert f"after scores {expected['score']:.2f} before" in made.err
    assert result["bytes"] == sum(
        path.stat().st_size
        for path in (tmp_path / "artifact").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
    assert whole.result["verified"] and set(whole.result["models"]) == {"before", "after"}
    assert again.status == 2 and "must not exist yet" in again.err


@pytest.mark.slow
def test_a_serving_placement_lays_out_the_arrays(world, run_all, tmp_path):
    placement = (
        f"placement --checkpoint {world['pruned']} --slice v5e-16 --batch 16 --length 32 "
        "--mode serve --expert_partitions 4 --out placement.json"
    )
    export = (
        f"export --checkpoint {world['pruned']} --format orbax --placement placement.json "
        "--out artifact"
    )
    placed, made, verified = run_all(
        tmp_path, [placement.split(), export.split(), ["verify-artifact", "artifact"]]
    )
    assert placed.status == 0, placed.err
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["serving"]["num_devices"] == 16
    assert made.result["layers"].keys() == {"layers_0", "layers_1"}
    assert verified.result["verified"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--format tflite", "--format must be stablehlo, saved_model, orbax, hf, got 'tflite'"),
        ("--format hf --quantize int8", "--format hf takes no --quantize"),
        ("--format stablehlo --serving x", "--format stablehlo takes no --serving"),
        ("--format orbax --serving x", "--serving must be a file, or one of"),
        ("--format orbax --serving one_device --placement x", "both name a mesh"),
        ("--format stablehlo --quantize int4", 'quantization must be "int8", or None, got'),
        ("--format stablehlo --cache other=x", "--cache must be of one of the models, got 'other'"),
        ("--format stablehlo --max_length 500", "max_length must lie between 1 and the model's 96"),
        ("--format stablehlo --dtype float16", "dtype must be"),
        ("--format stablehlo --checkpoint m=x", "must have different names, got 'm' twice"),
    ],
)
def test_options_that_do_not_go_together_are_refused(refuse, world, options, sentence):
    refuse(
        sentence,
        "export",
        "--checkpoint",
        f"m={world['pruned']}",
        *options.split(),
        "--out",
        "out",
    )


def test_what_is_no_artifact_is_refused(refuse, world):
    refuse("An artifact must hold manifest.json, got", "verify-artifact", world["pruned"])
