"""Saving and restoring."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uncurl_jax.checkpoints.layout import StateReader, finished_steps, resolve
from uncurl_jax.checkpoints.store import CheckpointStore, restore
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

PROVENANCE = {"created_by": "test"}
VOCABULARY = {"name": "bytes", "spec": "bytes", "size": 259, "hash": "0" * 64}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(got).dtype == np.asarray(want).dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def open_store(directory, config, **options) -> CheckpointStore:
    return CheckpointStore(
        directory, model_config=config, provenance=PROVENANCE, vocabulary=VOCABULARY, **options
    )


def expert_sharding(mesh, path):
    if "experts" in jax.tree_util.keystr(path) and mesh.size > 1:
        return NamedSharding(mesh, PartitionSpec("expert"))
    return NamedSharding(mesh, PartitionSpec())


def abstract_on(mesh, tree):
    def leaf(path, value):
        sharding = expert_sharding(mesh, path)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_parameters_equal_the_saved_ones_bit_for_bit(
    tmp_path, config, make_params, save_checkpoint, dtype
):
    params = make_params(config, dtype=dtype)
    path = save_checkpoint(tmp_path / "run", config, params=params)
    restored = restore(path, abstract_params=abstract(params))
    assert restored.step == 7
    assert restored.param_states is None
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(restored.params))
    assert_equal_trees(restored.params, params)


def test_optimizer_state_with_empty_dicts_and_scalars_comes_back(
    tmp_path, config, make_params, save_checkpoint
):
    params = make_params(config)
    states = {
        "0": {},
        "1": {
            "count": jnp.int32(4),
            "host_count": np.int64(5),
            "mu": params,
            "scale": 0.5,
            "updates": 3,
            "empty": {"deep": {}},
        },
        "2": {},
    }
    path = save_checkpoint(tmp_path / "run", config, params=params, param_states=states)
    wanted = {
        "0": {},
        "1": {
            "count": jax.ShapeDtypeStruct((), jnp.int32),
            "host_count": jax.ShapeDtypeStruct((), np.int64),
            "mu": abstract(params),
            "scale": 0.0,
            "updates": 0,
            "empty": {"deep": {}},
        },
        "2": {},
    }
    restored = restore(path, abstract_params=abstract(params), abstract_param_states=wanted)
    assert_equal_trees(restored.param_states, states)
    assert type(restored.param_states["1"]["updates"]) is int
    assert restore(path, abstract_params=abstract(params)).param_states is None


def test_state_without_any_array_comes_back(tmp_path, config, make_params, save_checkpoint):
    params = make_params(config)
    path = save_checkpoint(tmp_path / "run", config, params=params, param_states={"0": {}})
    restored = restore(path, abstract_params=abstract(params), abstract_param_states={"0": {}})
    assert restored.param_states == {"0": {}}


@pytest.mark.parametrize("saved_on, restored_on", [(8, 4), (4, 8), (1, 8), (8, 1)])
def test_any_mesh_restores_what_another_saved(
    tmp_path, config, make_params, save_checkpoint, saved_on, restored_on
):
    config = ModelConfig(**{**config.to_dict(), "num_experts": (8, 0, 8)})
    params = make_params(config)
    devices = jax.devices()
    assert len(devices) >= 8
    mesh = Mesh(np.array(devices[:saved_on]), ("expert",))
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, expert_sharding(mesh, path)), params
    )
    path = save_checkpoint(tmp_path / "run", config, params=sharded)

    other = Mesh(np.array(devices[-restored_on:]), ("expert",))
    restored = restore(path, abstract_params=abstract_on(other, params))
    assert_equal_trees(restored.params, params)
    wi = restored.params["layers_0"]["moe"]["experts"]["wi"]
    assert wi.sharding.device_set == set(devices[-restored_on:])
    assert_equal_trees(restore(path, abstract_params=abstract(params)).params, params)


def test_restoring_casts_to_the_dtype_asked_for(tmp_path, config, make_params, save_checkpoint):
    params = make_params(config)
    path = save_checkpoint(tmp_path / "run", config, params=params)
    as_bfloat16 = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    restored = restore(path, abstract_params=as_bfloat16)
    assert_equal_trees(
        restored.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    )


def test_no_chunk_holds_two_experts(tmp_path, config, save_checkpoint):
    import tensorstore as ts

    path = resolve(save_checkpoint(tmp_path / "run", config))
    for name in ("wi", "wi_bias", "wo", "wo_bias"):
        array = ts.open(
            {
                "driver": "zarr",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": f"file://{path.state_dir}/",
                    "path": f"target.layers_0.moe.experts.{name}/",
                },
            },
            open=True,
        ).result()
        assert array.chunk_layout.read_chunk.shape == (1, *array.shape[1:])


def test_only_the_last_steps_are_kept(tmp_path, config, make_params):
    with open_store(tmp_path / "run", config, max_to_keep=2) as store:
        for step in (0, 5, 10, 15):
            store.save(step, make_params(config, seed=step))
        store.wait()
        assert store.latest_step() == 15
        assert finished_steps(tmp_path / "run") == [10, 15]
    assert not (tmp_path / "run" / ".deleted").exists()
    restored = restore(tmp_path / "run", abstract_params=abstract(make_params(config)))
    assert restored.step == 15
    assert_equal_trees(restored.params, make_params(config, seed=15))


def test_saving_does_not_see_later_changes_of_numpy_arrays(tmp_path, config, make_params):
    params = make_params(config)
    with open_store(tmp_path / "run", config) as store:
        store.save(1, params)
        for leaf in jax.tree.leaves(params):
            leaf[...] = 0
    restored = restore(tmp_path / "run", abstract_params=abstract(params))
    assert_equal_trees(restored.params, make_params(config))


def test_a_new_store_goes_on_in_its_directory(tmp_path, config, make_params):
    for step in (1, 2):
        with open_store(tmp_path / "run", config) as store:
            assert store.latest_step() == (None if step == 1 else 1)
            store.save(step, make_params(config, seed=step))
    assert finished_steps(tmp_path / "run") == [1, 2]


def test_steps_must_grow(tmp_path, config, make_params):
    with open_store(tmp_path / "run", config) as store:
        store.save(3, make_params(config))
        with pytest.raises(InputError, match=r"got 3 for .*run which holds step 3"):
            store.save(3, make_params(config))


def test_parameters_of_another_model_are_not_saved(tmp_path, config, make_params):
    padded = ModelConfig(**{**config.to_dict(), "num_experts": (10, 0, 4)})
    message = r"layers_0/moe/experts/wi is \[10, 16, 24\] instead"
    with (
        open_store(tmp_path / "run", config) as store,
        pytest.raises(InputError, match=message),
    ):
        store.save(1, make_params(padded))
    assert finished_steps(tmp_path / "run") == []


def test_a_directory_of_another_model_is_refused(tmp_path, config, save_checkpoint):
    save_checkpoint(tmp_path / "run", config)
    other = ModelConfig(**{**config.to_dict(), "mlp_dim": 32})
    with pytest.raises(InputError, match=r"other values of \['mlp_dim'\]"):
        open_store(tmp_path / "run", other)


def test_a_directory_of_something_else_is_refused(tmp_path, config):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"without model_config\.json"):
        open_store(tmp_path, config)


def test_keeping_no_step_is_refused(tmp_path, config):
    with pytest.raises(InputError, match="max_to_keep must be at least 1"):
        open_store(tmp_path / "run", config, max_to_keep=0)


def test_an_incomplete_vocabulary_record_is_refused(tmp_path, config):
    with pytest.raises(InputError, match="has the keys"):
        CheckpointStore(
            tmp_path, model_config=config, provenance=PROVENANCE, vocabulary={"name": "bytes"}
        )


def test_restoring_into_another_model_lists_the_differences(
    tmp_path, config, make_params, save_checkpoint
):
    path = save_checkpoint(tmp_path / "run", config)
    other = ModelConfig(**{**config.to_dict(), "num_experts": (8, 0, 0)})
    with pytest.raises(InputError) as raised:
        restore(path, abstract_params=abstract(make_params(other)))
    message = str(raised.value)
    assert "missing target/layers_2/mlp/wi/kernel [16, 24]" in message
    assert "unknown target/layers_2/moe/experts/wi [4, 16, 24]" in message


def test_restoring_a_state_that_was_not_saved_is_refused(
    tmp_path, config, make_params, save_checkpoint
):
    params = make_params(config)
    path = save_checkpoint(tmp_path / "run", config, params=params)
    with pytest.raises(InputError, match="missing state/param_states/mu"):
        restore(
            path,
            abstract_params=abstract(params),
            abstract_param_states={"mu": jax.ShapeDtypeStruct((3,), np.float32)},
        )


_KILLED_RUN = """
import sys
import numpy as np
from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig

config = ModelConfig(num_experts=(8,), vocab_size=8, embed_dim=512, num_heads=2, mlp_dim=1024,
                     max_length=8)
generator = np.random.default_rng(0)
params = {}
for name, shape in expected_parameters(config).items():
    *parents, last = name.split("/")
    node = params
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = generator.standard_normal(shape, dtype=np.float32)
vocabulary = {"name": "bytes", "spec": "bytes", "size": 259, "hash": "0" * 64}
store = CheckpointStore(sys.argv[1], model_config=config, provenance={}, vocabulary=vocabulary)
for step in range(1, 1000):
    store.save(step, params)
    store.wait()
    print("saved", flush=True)
"""


def unfinished_saves(directory):
    return [entry for entry in directory.iterdir() if "orbax-checkpoint-tmp" in entry.name]


def test_a_kill_during_a_save_leaves_only_the_steps_before(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED_RUN, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "saved"
        # Stopped first: a process that runs on might finish the save between look and kill.
        while not (unfinished := unfinished_saves(run)):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert unfinished == unfinished_saves(run)
    killed = int(unfinished[0].name.split("_")[1].split(".")[0])
    assert finished_steps(run) == list(range(1, killed))
    assert resolve(run).step == killed - 1
    for entry in unfinished:
        with pytest.raises(InputError):
            resolve(entry)
    with pytest.raises(InputError):
        resolve(run / f"checkpoint_{killed}")
    assert all(
        np.isfinite(array).all()
        for array in StateReader(run).stream([("target/layers_0/moe/experts/wi", None)])
    )
    config = resolve(run).model_config()
    with CheckpointStore(run, model_config=config, provenance={}, vocabulary=VOCABULARY):
        assert unfinished_saves(run) == []


_DISTRIBUTED_RUN = """
import sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.checkpoints.store import CheckpointStore, restore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import ModelConfig

assert jax.process_count() == 2 and len(jax.devices()) == 4
config = ModelConfig(num_experts=(8, 0), vocab_size=8, embed_dim=8, num_heads=2, mlp_dim=16,
                     max_length=8)
mesh = Mesh(np.array(jax.devices()), ("expert",))
params, abstract = {}, {}
for name, shape in expected_parameters(config).items():
    *parents, last = name.split("/")
    node, abstract_node = params, abstract
    for parent in parents:
        node = node.setdefault(parent, {})
        abstract_node = abstract_node.setdefault(parent, {})
    spec = PartitionSpec("expert") if "experts" in name else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    node[last] = jax.make_array_from_callback(shape, sharding, lambda index, v=value: v[index])
    abstract_node[last] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
vocabulary = {"name": "bytes", "spec": "bytes", "size": 259, "hash": "0" * 64}
with CheckpointStore(sys.argv[1], model_config=config, provenance={}, vocabulary=vocabulary,
                     max_to_keep=1) as store:
    for step in (1, 2, 3):
        store.save(step, params, {"count": np.int32(step)})
restored = restore(
    sys.argv[1], abstract_params=abstract,
    abstract_param_states={"count": jax.ShapeDtypeStruct((), np.int32)},
)
assert restored.step == 3 and restored.param_states["count"] == 3
wi = restored.params["layers_0"]["moe"]["experts"]["wi"]
for shard in wi.addressable_shards:
    value = np.arange(np.prod(wi.shape), dtype=np.float32).reshape(wi.shape)
    np.testing.assert_array_equal(shard.data, value[shard.index])
try:
    prune_checkpoint(sys.argv[1], None, sys.argv[1] + "-pruned")
except RuntimeError as error:
    assert "pruned by one process, got 2" in str(error)
    print("done", flush=True)
"""


def test_two_processes_save_one_checkpoint_that_one_process_restores(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _DISTRIBUTED_RUN, str(tmp_path / "run"), address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [output.split()[-1:] for output, _ in outputs] == [["done"], ["done"]], outputs
    assert finished_steps(tmp_path / "run") == [3]
    wi = StateReader(tmp_path / "run").read("target/layers_0/moe/experts/wi")
    np.testing.assert_array_equal(wi, np.arange(wi.size, dtype=np.float32).reshape(8, 8, 16))
