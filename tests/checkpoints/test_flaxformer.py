"""Encoder-decoders of T5X with Flaxformer's names become ours; the steps are made by hand.

Names are those that transformers' conversion scripts of Switch Transformers read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
import tensorstore as ts

from uncurl_jax.checkpoints import flaxformer, layout
from uncurl_jax.checkpoints.convert import export_checkpoint, import_t5x
from uncurl_jax.checkpoints.state_writer import StateWriter, create_state, nested
from uncurl_jax.cli import main
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_path = Path(__file__).parents[1] / "models" / "switch_reference.py"
_spec = importlib.util.spec_from_file_location("switch_reference", _path)
assert _spec is not None and _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

RELU: ModelConfig = reference.RELU
GATED: ModelConfig = reference.CONFIGS["gated_gelu"]
VOCABULARY = {"name": "t5", "spec": "bytes", "size": 50, "hash": "0" * 64}


def flaxformer_tree(config: ModelConfig) -> dict[str, np.ndarray]:
    """The random parameters as a Flaxformer module holds them."""
    ours = reference.random_params(config)
    theirs = {
        "token_embedder/embedding": ours["token_embedder/embedding"],
        "encoder/encoder_norm/scale": ours["encoder_norm/scale"],
        "decoder/decoder_norm/scale": ours["final_norm/scale"],
        "encoder/relpos_bias/rel_embedding": ours["encoder_relative_position/embedding"].T,
        "decoder/relpos_bias/rel_embedding": ours["decoder_relative_position/embedding"].T,
    }
    if not config.has_tied_embeddings:
        theirs["decoder/logits_dense/kernel"] = ours["output_embedder/embedding"].T
    for layer, count in enumerate(config.num_experts):
        own, is_encoder = f"layers_{layer}", layer < config.num_encoder_layers
        number = layer if is_encoder else layer - config.num_encoder_layers
        block = f"{'encoder' if is_encoder else 'decoder'}/layers_{number}"
        attentions = {"attention": "attention" if is_encoder else "self_attention"}
        norms = {"pre_attention_norm": f"pre_{attentions['attention']}_layer_norm"}
        norms["pre_mlp_norm"] = "pre_mlp_layer_norm"
        if not is_encoder:
            attentions["cross_attention"] = "encoder_decoder_attention"
            norms["pre_cross_attention_norm"] = "pre_cross_attention_layer_norm"
        for name, other in norms.items():
            theirs[f"{block}/{other}/scale"] = ours[f"{own}/{name}/scale"]
        for name, other in attentions.items():
            for projection in ("query", "key", "value", "out"):
                kernel = ours[f"{own}/{name}/{projection}/kernel"]
                matrix = kernel.reshape((-1, 20) if projection == "out" else (20, -1))
                theirs[f"{block}/{other}/{projection}/kernel"] = matrix
        names = {"wg": "wi_0", "wi": "wi_1", "wo": "wo"}
        for name, other in names.items() if config.is_gated else {"wi": "wi", "wo": "wo"}.items():
            if count:
                kernel = ours[f"{own}/moe/experts/{name}"]
                theirs[f"{block}/mlp/expert/{other}/kernel"] = kernel
            else:
                theirs[f"{block}/mlp/{other}/kernel"] = ours[f"{own}/mlp/{name}/kernel"]
        if count:
            router = ours[f"{own}/moe/router/kernel"]
            theirs[f"{block}/mlp/router/router_weights/w/kernel"] = router
    return theirs


def write_present(directory: Path, step: int, tree: dict[str, np.ndarray]) -> Path:
    """As T5X saves through Orbax."""
    arrays = {f"target/{name}": np.ascontiguousarray(array) for name, array in tree.items()}
    arrays["state/step"] = np.asarray(step, np.int32)
    arrays["state/param_states/token_embedder/embedding/m"] = np.zeros(3, np.float32)
    place = directory / f"checkpoint_{step}"
    create_state(
        layout.epath.Path(place),
        {name: layout.ArrayMetadata(array.shape, array.dtype) for name, array in arrays.items()},
    )
    writer = StateWriter(layout.epath.Path(place))
    for name, array in arrays.items():
        writer.write({name: array}).result()
    return place


def write_legacy(directory: Path, step: int, tree: dict[str, np.ndarray]) -> Path:
    """As T5X saved before: norms in the msgpack file, the rest as zarr arrays beside it."""
    place = directory / f"checkpoint_{step}"
    place.mkdir(parents=True)
    leaves: dict[str, Any] = {}
    for name, array in tree.items():
        if "norm" in name:
            leaves[name] = np.ascontiguousarray(array)
            continue
        folder = f"target.{name.replace('/', '.')}"
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{place}/{folder}/"},
            "metadata": {"shape": list(array.shape)},
            "dtype": array.dtype.name,
        }
        ts.open(spec, create=True).result().write(array).result()
        leaves[name] = {**spec, "kvstore": {"driver": "file", "path": f"{folder}/"}}
    contents = {"version": 3, "optimizer": {"target": nested(leaves), "state": {"step": step}}}
    (place / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return place


WRITERS = {"present": write_present, "legacy": write_legacy}
both_layouts = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    reader = layout.StateReader(path)
    return {name: reader.read(f"target/{name}") for name in reader.parameters()}


@both_layouts
@pytest.mark.parametrize("config", [RELU, GATED], ids=["relu", "gated_gelu"])
def test_every_array_becomes_its_parameter(config, write, tmp_path):
    write(tmp_path / "run", 3, {"token_embedder/embedding": np.zeros((2, 2), np.float32)})
    write(tmp_path / "run", 500, flaxformer_tree(config))
    summary = import_t5x(tmp_path / "run", tmp_path / "C", config, VOCABULARY)
    assert summary["step"] == 500 and summary["num_experts"] == list(config.num_experts)
    found, expected = arrays_of(tmp_path / "C"), reference.random_params(config)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    checkpoint = layout.resolve(tmp_path / "C")
    assert checkpoint.model_config() == config and checkpoint.vocabulary() == VOCABULARY
    source = checkpoint.provenance()["source"]
    assert source["path"].endswith("run/checkpoint_500") and source["step"] == 500


@both_layouts
def test_one_step_may_be_named_and_single_experts_are_read(write, tmp_path):
    place = write(tmp_path / "run", 500, flaxformer_tree(RELU))
    write(tmp_path / "run", 600, {})
    checkpoint = flaxformer.resolve(place, RELU, VOCABULARY)
    reader = flaxformer.FlaxformerReader(checkpoint)
    expected = reference.random_params(RELU)["layers_7/moe/experts/wi"]
    np.testing.assert_array_equal(reader.read("target/layers_7/moe/experts/wi", 2), expected[2])
    np.testing.assert_array_equal(reader.read("target/layers_7/moe/experts/wi"), expected)
    assert reader.read("state/step") == 500
    with pytest.raises(InputError, match="An array must be one of the checkpoint's, got 'x'"):
        reader.read("x")


def test_both_roads_from_a_published_model_give_the_same(tmp_path):
    """Through T5X's files and through transformers' names, which their script makes of these."""
    write_legacy(tmp_path / "run", 5, flaxformer_tree(RELU))
    import_t5x(tmp_path / "run", tmp_path / "C", RELU, VOCABULARY)
    export_checkpoint(tmp_path / "C", tmp_path / "hf")
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = reference.hugging_face_tensors(RELU, reference.random_params(RELU))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": (0, 2) * 4}, r"expert/wi/kernel is \[4, 20, 14\] instead of \[2, 20, 14"),
        ({"is_gated": True}, r"missing decoder/layers_0/mlp/wi_0/kernel \[20, 14\]"),
        ({"has_tied_embeddings": False}, r"missing decoder/logits_dense/kernel \[20, 53\]"),
        ({"num_encoder_layers": 3}, r"missing decoder/layers_0/mlp/expert/wi/kernel"),
        ({"norm": "layer_norm"}, "must have norm='rms_norm', got 'layer_norm'"),
        ({"has_mlp_bias": True}, "must have has_mlp_bias=False, got True"),
        ({"vocab_size": 49}, "at least the vocabulary's size, got 49 for t5 with 50"),
    ],
)
def test_another_model_is_refused_before_any_work(changes, message, tmp_path):
    write_legacy(tmp_path / "run", 5, flaxformer_tree(RELU))
    with pytest.raises(InputError, match=message):
        config = dataclasses.replace(RELU, **changes)
        import_t5x(tmp_path / "run", tmp_path / "C", config, VOCABULARY)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "checkpoint_3").mkdir()
    for place, message in (
        (tmp_path / "nowhere", "must be an existing directory, got .*nowhere"),
        (tmp_path, "directories that were saved to the end, got"),
        (tmp_path / "checkpoint_3", "directories that were saved to the end, got .*checkpoint_3"),
    ):
        with pytest.raises(InputError, match=message):
            flaxformer.resolve(place, RELU, VOCABULARY)


GIN = """
from __gin__ import dynamic_registration
from uncurl_jax import config
include 'gin/models/switch_base.gin'
NUM_EXPERTS = 4
config.alternating_experts.num_layers = 8
config.ModelConfig.num_encoder_layers = 4
config.ModelConfig.vocab_size = 260
config.ModelConfig.embed_dim = 20
config.ModelConfig.num_heads = 4
config.ModelConfig.attention_head_dim = 6
config.ModelConfig.mlp_dim = 14
"""


def test_the_command_adopts_an_encoder_decoder_to_a_new_directory(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        RELU, vocab_size=260, relative_buckets=32, relative_max_distance=128
    )
    write_legacy(tmp_path / "run", 5, flaxformer_tree(config))
    (tmp_path / "model.gin").write_text(GIN)
    monkeypatch.chdir(tmp_path)
    command = ["t5x", "adopt", "run", "--gin_file", "model.gin", "--vocabulary", "bytes"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "copied to a new directory, under the names of this package, got run" in said
    assert main([*command, "--out", "C"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 5 and result["num_experts"] == [0, 4] * 4
    assert layout.resolve("C").model_config().eval_capacity_factor == 2.0
    assert main([*command, "--out", "C"]) == 2
    assert "An output must not exist yet" in capsys.readouterr().err
