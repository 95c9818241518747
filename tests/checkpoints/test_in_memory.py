"""The streaming prune against the one in memory, and against `prune_layer`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from uncurl_jax.checkpoints.in_memory import prune_in_memory
from uncurl_jax.checkpoints.layout import StateReader, resolve
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.layer_plan import encode_kernel
from uncurl_jax.pruning.prune import prune_layer

MODELS = {
    "plain": {},
    "gated": {"is_gated": True},
    "gated without biases": {"is_gated": True, "has_mlp_bias": False},
    "without biases": {"has_mlp_bias": False},
    "with a shared expert": {"shared_mlp_dim": 8, "has_shared_gate": True, "is_gated": True},
}
PLANS = {
    "reference": {"router": "reference"},
    "mean, cosines": {"router": "mean", "alignment": "unit_features"},
    "reinit, not aligned": {"router": "reinit", "alignment": "none"},
    "remap": {"router": "remap"},
    "compensated": {"gate_factors": {0: (0.5, 1.5, 1.0), 2: (1.0, 0.3)}},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model, options",
    [
        ("plain", "reference"),
        ("plain", "mean, cosines"),
        ("plain", "remap"),
        ("gated", "compensated"),
        ("gated without biases", "reinit, not aligned"),
        ("without biases", "reference"),
        ("with a shared expert", "mean, cosines"),
    ],
)
def test_streaming_gives_the_bytes_of_the_plain_way(
    tmp_path,
    config,
    labels,
    make_params,
    save_checkpoint,
    plan_for,
    read_arrays,
    model,
    options,
    dtype,
):
    config = dataclasses.replace(config, **MODELS[model])
    params = make_params(config, dtype=dtype)
    source = save_checkpoint(
        tmp_path / "run", config, params=params, param_states={"mu": {"a": np.ones(3)}}
    )
    plan = plan_for(source, labels, **PLANS[options])
    prune_checkpoint(source, plan, tmp_path / "streamed", workers=0)
    prune_in_memory(source, plan, tmp_path / "whole")

    streamed, whole = read_arrays(tmp_path / "streamed"), read_arrays(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    for name, array in whole.items():
        assert streamed[name].dtype == array.dtype and streamed[name].shape == array.shape
        assert streamed[name].tobytes() == array.tobytes(), name
    for name in ("model_config.json", "hashes.json", "vocabulary.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "whole" / name).read_text()

    # Both against the arrays of one layer, and what a prune does not touch against the source.
    before = read_arrays(source)
    for layer in labels:
        prefix = f"target/layers_{layer}/moe"
        experts = {
            key.rsplit("/", 1)[1]: array
            for key, array in before.items()
            if key.startswith(f"{prefix}/experts/")
        }
        pruned = prune_layer(
            plan, layer, before[f"{prefix}/router/kernel"], experts, init_stddev=config.init_stddev
        )
        assert streamed[f"{prefix}/router/kernel"].tobytes() == pruned.router.tobytes()
        for name, array in pruned.experts.items():
            assert streamed[f"{prefix}/experts/{name}"].tobytes() == array.tobytes()
    for name, array in streamed.items():
        if name.startswith("target/") and "/experts/" not in name and "/router/" not in name:
            assert array.tobytes() == before[name].tobytes()


def test_a_remapped_model_keeps_its_router_and_names_its_experts(
    tmp_path, config, labels, save_checkpoint, plan_for, read_arrays
):
    source = save_checkpoint(tmp_path / "run", config)
    prune_checkpoint(source, plan_for(source, labels, router="remap"), tmp_path / "pruned")
    pruned = resolve(tmp_path / "pruned").model_config()
    assert pruned.num_experts == (3, 0, 2)
    assert pruned.expert_map == (tuple(labels[0]), None, tuple(labels[2]))
    name = "target/layers_0/moe/router/kernel"
    assert read_arrays(tmp_path / "pruned")[name].tobytes() == read_arrays(source)[name].tobytes()


def test_a_fitted_router_is_taken_from_the_plan(
    tmp_path, config, labels, save_checkpoint, plan_for, read_arrays
):
    source = save_checkpoint(tmp_path / "run", config)
    generator = np.random.default_rng(5)
    kernels = {
        layer: generator.standard_normal((16, count)).astype(np.float32)
        for layer, count in {0: 3, 2: 2}.items()
    }
    fitted = {layer: encode_kernel(kernel) for layer, kernel in kernels.items()}
    plan = plan_for(source, labels, router="fit", fitted_routers=fitted)
    prune_checkpoint(source, plan, tmp_path / "pruned")
    arrays = read_arrays(tmp_path / "pruned")
    for layer, kernel in kernels.items():
        np.testing.assert_array_equal(arrays[f"target/layers_{layer}/moe/router/kernel"], kernel)


def test_the_files_have_the_layout_that_orbax_gives(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    import tensorstore as ts

    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, labels)
    prune_checkpoint(source, plan, tmp_path / "streamed")
    prune_in_memory(source, plan, tmp_path / "whole")
    stored, trees = [], []
    for name in ("streamed", "whole"):
        state = resolve(tmp_path / name).state_dir
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
        stored.append({key: store.read(key).result().value for key in store.list().result()})
        trees.append(json.loads((state / "_METADATA").read_text()))
    # Headers and encoded chunks, byte for byte.
    assert stored[0] == stored[1]
    assert b"target.layers_0.moe.experts.wi/2.0.0" in stored[0]
    entries = [tree.pop("tree_metadata") for tree in trees]
    assert trees[0] == trees[1]
    # The step alone is a numpy array here and a scalar there.
    steps = [entry.pop("('state', 'step')")["key_metadata"] for entry in entries]
    assert steps[0] == steps[1] and entries[0] == entries[1]


def test_orbax_alone_restores_the_result(
    tmp_path, config, labels, save_checkpoint, plan_for, read_arrays
):
    import orbax.checkpoint as ocp

    source = save_checkpoint(tmp_path / "run", config)
    prune_checkpoint(source, plan_for(source, labels), tmp_path / "pruned")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.restore(resolve(tmp_path / "pruned").state_dir)
    arrays = read_arrays(tmp_path / "pruned")
    wi = np.asarray(tree["target"]["layers_2"]["moe"]["experts"]["wi"])
    np.testing.assert_array_equal(wi, arrays["target/layers_2/moe/experts/wi"])
    assert tree["state"]["step"] == 0


def test_arrays_without_a_place_are_refused(tmp_path, config, labels, save_checkpoint, plan_for):
    from uncurl_jax.checkpoints.accounting import account

    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, labels)
    reader = StateReader(source)
    reader.metadata["extra/table"] = reader.metadata["state/step"]
    kernel = reader.metadata.pop("target/layers_1/mlp/wi/kernel")
    reader.metadata["target/layers_1/mlp/wx/kernel"] = kernel
    message = (
        r"account for every array .* no place for extra/table; missing layers_1/mlp/wi/kernel "
        r"\[16, 24\]; unknown layers_1/mlp/wx/kernel"
    )
    with pytest.raises(InputError, match=message):
        account(reader, plan, config)


def test_every_array_of_source_and_result_is_in_one_piece(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    from uncurl_jax.checkpoints.accounting import account

    source = save_checkpoint(tmp_path / "run", config)
    reader = StateReader(source)
    accounts = account(reader, plan_for(source, labels), config)
    plain = [key for piece in accounts.pieces if piece.layer is None for key in piece.keys]
    of_experts = {
        (key, z)
        for piece in accounts.pieces
        if piece.layer is not None
        for key in piece.keys
        for z in piece.members
    }
    assert len(set(plain)) == len(plain)
    assert {*plain, *(key for key, _ in of_experts), *accounts.left_out} == set(reader.metadata)
    assert ("target/layers_2/moe/experts/wo", 3) in of_experts
    assert accounts.left_out == ("state/step",)


def test_nothing_is_written_in_memory_if_the_source_is_not_finite(
    tmp_path, config, labels, make_params, save_checkpoint, plan_for
):
    params = make_params(config)
    params["layers_0"]["moe"]["experts"]["wi"][1, 0, 0] = np.inf
    source = save_checkpoint(tmp_path / "run", config, params=params)
    with pytest.raises(InputError, match="layers_0/moe/experts/wi expert 1"):
        prune_in_memory(source, plan_for(source, labels), tmp_path / "pruned")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
