"""Finding checkpoints and reading them array by array."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.finite import check_finite, find_nonfinite
from uncurl_jax.checkpoints.layout import (
    StateReader,
    array_metadata,
    check_architecture,
    fingerprint,
    finished_steps,
    read_array,
    resolve,
)
from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError


def with_fields(config: ModelConfig, **fields) -> ModelConfig:
    return ModelConfig(**{**config.to_dict(), **fields})


@pytest.fixture
def run(tmp_path, config, make_params):
    """A checkpoint directory with steps 1 and 2."""
    with CheckpointStore(
        tmp_path / "run",
        model_config=config,
        provenance={"created_by": "test"},
        vocabulary={"name": "bytes", "spec": "bytes", "size": 259, "hash": "0" * 64},
    ) as store:
        store.save(1, make_params(config, seed=1))
        store.save(2, make_params(config, seed=2), {"mu": make_params(config)})
    return tmp_path / "run"


def test_a_directory_means_its_latest_step(run, config):
    checkpoint = resolve(run)
    assert checkpoint.step == 2
    assert checkpoint.directory == run
    assert checkpoint.state_dir == run / "checkpoint_2" / "state"
    assert checkpoint.model_config() == config
    assert checkpoint.provenance() == {"created_by": "test"}
    assert checkpoint.vocabulary()["size"] == 259
    assert resolve(checkpoint) is checkpoint


def test_a_step_directory_means_that_step(run):
    assert resolve(run / "checkpoint_1").step == 1
    assert resolve(str(run / "checkpoint_1")).directory == run


def test_a_relative_path_resolves(run, monkeypatch):
    monkeypatch.chdir(run)
    assert resolve("checkpoint_1").step == 1
    assert resolve(".").step == 2
    assert read_array(".", "state/step") == 2


def test_a_directory_may_itself_be_named_like_a_step(run):
    renamed = run.rename(run.parent / "checkpoint_9")
    assert resolve(renamed).step == 2


def test_latest_is_by_number_not_by_name(run):
    (run / "checkpoint_1").rename(run / "checkpoint_10")
    assert finished_steps(run) == [2, 10]
    assert resolve(run).step == 10


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be an existing directory, got .*nowhere"):
        resolve(tmp_path / "nowhere")


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"without model_config\.json"):
        resolve(tmp_path)
    (tmp_path / "checkpoint_3").mkdir()
    with pytest.raises(InputError, match=r"without model_config\.json"):
        resolve(tmp_path / "checkpoint_3")


def test_an_unfinished_step_is_refused_and_passed_over(run):
    shutil.copytree(run / "checkpoint_2", run / "checkpoint_3")
    (run / "checkpoint_3" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(InputError, match=r"saved to the end.*finished: \[1, 2\]"):
        resolve(run / "checkpoint_3")
    assert resolve(run).step == 2


def test_a_directory_without_a_finished_step_is_refused(run):
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoint_{step}")
    with pytest.raises(InputError, match="with none"):
        resolve(run)


def test_a_missing_vocabulary_names_its_file(run):
    (run / "vocabulary.json").unlink()
    with pytest.raises(InputError, match=r"needs vocabulary\.json"):
        resolve(run).vocabulary()


def test_metadata_names_every_array_with_shape_and_dtype(run, config):
    metadata = array_metadata(run)
    expected = expected_parameters(config)
    assert {name for name in metadata if name.startswith("target/")} == {
        f"target/{name}" for name in expected
    }
    assert metadata["target/layers_0/moe/experts/wi"] == ((8, 16, 24), np.dtype(np.float32))
    assert metadata["state/step"] == ((), np.dtype(np.int32))
    assert metadata["state/param_states/mu/final_norm/scale"].shape == (16,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_array_or_one_expert_is_read(tmp_path, config, make_params, save_checkpoint, dtype):
    params = make_params(config, dtype=dtype)
    path = save_checkpoint(tmp_path / "run", config, params=params)
    wi = params["layers_0"]["moe"]["experts"]["wi"]
    name = "target/layers_0/moe/experts/wi"
    whole, expert = read_array(path, name), read_array(path, name, 3)
    assert whole.dtype == expert.dtype == wi.dtype
    np.testing.assert_array_equal(whole, wi)
    np.testing.assert_array_equal(expert, wi[3])


def test_arrays_stream_in_the_order_asked_for(run, config, make_params):
    wi = make_params(config, seed=2)["layers_0"]["moe"]["experts"]["wi"]
    order = [5, 0, 7, 1, 6, 2, 4, 3]
    stream = StateReader(run).stream([("target/layers_0/moe/experts/wi", z) for z in order])
    for index, array in zip(order, stream, strict=True):
        np.testing.assert_array_equal(array, wi[index])


def test_an_unknown_array_is_refused(run):
    with pytest.raises(InputError, match="must be one of the checkpoint's"):
        read_array(run, "target/layers_9/mlp/wi")


def test_damaged_data_is_refused(run):
    for file in (run / "checkpoint_2" / "state").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="must be readable"):
        read_array(run, "target/layers_0/moe/experts/wi")


def test_fingerprint_is_the_same_for_the_same_parameters(
    tmp_path, config, make_params, save_checkpoint
):
    params = make_params(config)
    one = save_checkpoint(tmp_path / "one", config, params=params, step=1)
    two = save_checkpoint(
        tmp_path / "two", config, params=params, step=2, param_states={"count": np.int32(1)}
    )
    assert fingerprint(one) == fingerprint(two)
    assert len(fingerprint(one)) == 64


@pytest.mark.parametrize("change", ["value", "dtype", "shape"])
def test_fingerprint_tells_checkpoints_apart(
    tmp_path, config, make_params, save_checkpoint, change
):
    one = save_checkpoint(tmp_path / "one", config)
    params = make_params(config)
    other = config
    if change == "value":
        params["final_norm"]["bias"][3] += 1e-6
    elif change == "dtype":
        params = make_params(config, dtype="bfloat16")
    else:
        other = with_fields(config, max_length=13)
        params = make_params(other)
    two = save_checkpoint(tmp_path / "two", other, params=params)
    assert fingerprint(one) != fingerprint(two)


def test_fingerprint_reads_the_first_expert_of_large_arrays(
    tmp_path, config, make_params, save_checkpoint
):
    config = with_fields(config, num_experts=(2,), embed_dim=512, mlp_dim=1040)
    params = make_params(config)
    wi = params["layers_0"]["moe"]["experts"]["wi"]
    assert wi.size > 2**20
    prints = []
    for expert in (None, 1, 0):
        if expert is not None:
            wi[expert, 0, 0] += 1
        path = save_checkpoint(tmp_path / f"run{expert}", config, params=params)
        prints.append(fingerprint(path))
    assert prints[0] == prints[1] != prints[2]


def test_expected_parameters_are_those_of_a_gpt2_decoder(config):
    shapes = expected_parameters(config)
    assert shapes["layers_0/moe/router/kernel"] == (16, 8)
    assert shapes["layers_0/moe/experts/wo"] == (8, 24, 16)
    assert shapes["layers_1/mlp/wi/kernel"] == (16, 24)
    assert shapes["layers_2/attention/out/kernel"] == (2, 8, 16)
    # 354M of GPT-2 medium (arXiv 2409.01483, section 3), biases and positions included.
    medium = ModelConfig(
        num_experts=(0,) * 24,
        vocab_size=50257,
        embed_dim=1024,
        num_heads=16,
        mlp_dim=4096,
        max_length=1024,
    )
    assert sum(np.prod(shape) for shape in expected_parameters(medium).values()) == 354_823_168


def test_architecture_of_its_own_configuration_is_accepted(run, config):
    check_architecture(run, config)


def test_wrong_architecture_lists_what_is_missing_unknown_and_misshapen(run, config):
    other = with_fields(config, num_experts=(8, 3, 2), mlp_dim=24)
    with pytest.raises(InputError) as raised:
        check_architecture(run, other)
    message = str(raised.value)
    assert "missing layers_1/moe/experts/wi [3, 16, 24]" in message
    assert "unknown layers_1/mlp/wi/kernel [16, 24]" in message
    assert "layers_2/moe/router/kernel is [16, 4] instead of [16, 2]" in message


def test_a_long_list_of_differences_is_cut(run, config):
    with pytest.raises(InputError, match=r"and \d+ more: use the model configuration"):
        check_architecture(run, with_fields(config, embed_dim=32))


def test_nonfinite_values_are_named_by_layer_and_expert(
    tmp_path, config, make_params, save_checkpoint
):
    params = make_params(config, dtype="bfloat16")
    params["layers_2"]["moe"]["experts"]["wi"][3, 1, 2:5] = np.nan
    params["layers_1"]["mlp"]["wo"]["bias"][0] = -np.inf
    path = save_checkpoint(tmp_path / "run", config, params=params)
    assert find_nonfinite(path) == [
        ("layers_1/mlp/wo/bias", None, 1),
        ("layers_2/moe/experts/wi", 3, 3),
    ]
    with pytest.raises(InputError, match=r"layers_2/moe/experts/wi expert 3 \(3 values\)"):
        check_finite(path)


def test_finite_checkpoints_pass(run):
    assert find_nonfinite(run) == []
    check_finite(run)


def test_a_zarr3_checkpoint_is_refused(run, config, make_params):
    import orbax.checkpoint as ocp

    state = run / "checkpoint_3" / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as saver:
        tree = {"target": jax.tree.map(np.asarray, make_params(config))}
        saver.save(state, args=ocp.args.PyTreeSave(tree))
    with pytest.raises(InputError, match="must be stored as OCDBT"):
        array_metadata(run / "checkpoint_3")


def test_a_configuration_of_another_version_is_refused(run):
    path = run / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": 3}))
    with pytest.raises(InputError, match=r"unknown \['layers'\]"):
        resolve(run).model_config()
