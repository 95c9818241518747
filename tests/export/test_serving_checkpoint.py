"""Arrays for a serving mesh, restored by Orbax and run on eight devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.errors import InputError
from uncurl_jax.export.manifest import ExportOptions
from uncurl_jax.export.quantization import quantize
from uncurl_jax.export.serving_checkpoint import export_orbax
from uncurl_jax.export.serving_config import ServingConfig
from uncurl_jax.export.verify import verify_artifact


@pytest.fixture(scope="session")
def uneven(save_checkpoint, make_params, checkpoints, tmp_path_factory):
    """Three experts in one layer, two in the other."""
    config = dataclasses.replace(
        load_model(checkpoints["base"]).config,
        num_experts=(3, 2),
        num_selected_experts=1,
    )
    path = tmp_path_factory.mktemp("uneven") / "model"
    return save_checkpoint(path, config, make_params(config, seed=4))


def restored(out, manifest):
    """What Orbax makes of the folder without being told anything."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((out / manifest["params"]).absolute())
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(array)
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def on_eight(uneven, environment, tmp_path_factory):
    """Exported to float32 for two data and four expert partitions; the check has run by then."""
    out = tmp_path_factory.mktemp("orbax") / "artifact"
    config = ServingConfig("two by four", (2, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        summary = export_orbax({"m": uneven}, out, config, ExportOptions(dtype="float32"))
    return out, summary


def test_the_mesh_reproduces_the_checkpoint(on_eight, quick_processes):
    out, summary = on_eight
    assert summary["layers"]["layers_0"] == {
        "num_experts": 3,
        "copies": 1,
        "padding": 1,
        "stored": 4,
    }
    assert summary["layers"]["layers_1"]["copies"] == 2
    (found,) = verify_artifact(out)["models"].values()
    assert found["difference"] <= found["tolerance"] == 1e-4
    assert found["same_rows"] == 1.0


def test_orbax_restores_padded_and_copied_experts(on_eight, uneven, read_manifest):
    out, _ = on_eight
    manifest = read_manifest(out)
    arrays = restored(out, manifest)
    assert {name: list(array.shape) for name, array in arrays.items()} == {
        name: entry["shape"] for name, entry in manifest["arrays"].items()
    }
    params = load_model(uneven).params
    padded, copied = (params[f"layers_{n}"]["moe"]["experts"]["wi"] for n in (0, 1))
    found = arrays["layers_0/moe/experts/wi"]
    np.testing.assert_array_equal(found[:3], padded)
    assert not found[3].any()
    np.testing.assert_array_equal(
        arrays["layers_1/moe/experts/wi"], np.concatenate([copied, copied])
    )
    np.testing.assert_array_equal(
        arrays["layers_0/moe/router/kernel"], params["layers_0"]["moe"]["router"]["kernel"]
    )
    assert manifest["serving"]["expert_map"] == {
        "layers_0": [[0], [1], [2]],
        "layers_1": [[0, 2], [1, 3]],
    }


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_heads_and_units_are_divided_too(
    uneven, quantization, quick_processes, read_manifest, tmp_path
):
    out = tmp_path / "artifact"
    config = ServingConfig("two by two by two", (2, 2, 2), "replicate")
    export_orbax({"m": uneven}, out, config, ExportOptions(quantization=quantization))
    assert verify_artifact(out)["verified"]
    manifest = read_manifest(out)
    arrays = restored(out, manifest)
    assert arrays["layers_0/moe/experts/wi"].shape == (6, 16, 32)
    assert arrays["token_embedder/embedding"].dtype.name == "bfloat16"
    assert arrays["final_norm/scale"].dtype == np.float32
    kind = "int8" if quantization else "bfloat16"
    assert arrays["layers_0/moe/experts/wi"].dtype.name == kind
    if quantization:
        kernel = load_model(uneven).params["layers_0"]["moe"]["experts"]["wi"]
        values, scale = quantize(kernel.astype("bfloat16"))
        np.testing.assert_array_equal(arrays["layers_0/moe/experts/wi"][3:], values)
        np.testing.assert_array_equal(arrays["layers_0/moe/experts/wi_scale"][:3], scale)


def test_several_checkpoints_are_refused(checkpoints, tmp_path):
    with pytest.raises(InputError, match="--format orbax takes one checkpoint, got 2"):
        export_orbax(checkpoints, tmp_path / "out", ServingConfig("one", (1, 1, 1)))


def test_layers_that_the_model_lacks_are_refused(checkpoints, tmp_path):
    config = ServingConfig("one", (1, 1, 1), layers=((1, "pad"),))
    base = {"base": checkpoints["base"]}
    with pytest.raises(InputError, match=r"must have experts, got \[1\] in one for a model"):
        export_orbax(base, tmp_path / "out", config)
    config = ServingConfig("one", (1, 1, 1), expert_axes=((),))
    with pytest.raises(InputError, match="one entry per layer, got 1 for 2 layers"):
        export_orbax(base, tmp_path / "out", config)


@pytest.mark.slow
def test_axes_of_a_placement_decide_which_layers_are_padded(uneven, quick_processes, tmp_path):
    out = tmp_path / "artifact"
    axes = ((), ("data", "expert"))
    summary = export_orbax({"m": uneven}, out, ServingConfig("two", (2, 2, 1), expert_axes=axes))
    # Every device holds the three experts of layer 0; the two of layer 1 are on four devices.
    assert [layer["stored"] for layer in summary["layers"].values()] == [3, 4]
    assert verify_artifact(out)["verified"]
