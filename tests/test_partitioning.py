from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uncurl_jax import partitioning
from uncurl_jax.errors import InputError


def test_what_experts_and_model_leave_over_goes_to_data():
    mesh = partitioning.make_mesh(expert_partitions=2, model_partitions=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "model": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()
    assert dict(partitioning.make_mesh().shape) == {"data": 8, "expert": 1, "model": 1}
    two = partitioning.make_mesh(expert_partitions=2, devices=jax.devices()[:2])
    assert dict(two.shape) == {"data": 1, "expert": 2, "model": 1}


@pytest.mark.parametrize(("expert", "model"), [(3, 1), (1, 3), (4, 4), (0, 1), (1, 0), (16, 1)])
def test_partitions_that_do_not_divide_the_devices_are_refused(expert: int, model: int):
    with pytest.raises(InputError, match=f"got {expert} \\* {model} on 8 devices: choose divisors"):
        partitioning.make_mesh(expert_partitions=expert, model_partitions=model)


def test_axis_sizes_multiply():
    mesh = partitioning.make_mesh(expert_partitions=4)
    assert partitioning.axis_size(mesh, None) == 1
    assert partitioning.axis_size(mesh, "expert") == 4
    assert partitioning.axis_size(mesh, partitioning.TOKEN_AXES) == 8


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (32, 16), ("model", None)),
        (("vocab", "embed"), (33, 16), (None, None)),  # 33 rows do not divide
        (("embed", "heads", "kv"), (16, 4, 4), (None, "model", None)),
        (("expert", "embed", "expert_mlp"), (8, 16, 32), ("expert", None, "model")),
        # 5 experts do not divide among 4: the expert axis goes to the last free dimension.
        (("expert", "embed", "expert_mlp"), (5, 16, 32), (None, "expert", "model")),
        (("expert", "embed"), (5, 16), (None, "expert")),
        (("expert", "embed"), (5, 6), (None, None)),  # and is left out if none divides
        (("unmodeled", None), (8, 8), (None, None)),
    ],
)
def test_mesh_axes_that_do_not_divide_are_left_out(
    names: tuple[str | None, ...], shape: tuple[int, ...], spec: tuple[str | None, ...]
):
    mesh = partitioning.make_mesh(expert_partitions=4, model_partitions=2)
    assert partitioning.parameter_spec(names, shape, mesh) == PartitionSpec(*spec)


def test_a_batch_is_divided_by_its_first_axis():
    mesh = partitioning.make_mesh(expert_partitions=2, model_partitions=2)
    batch = {"a": np.arange(8).reshape(8, 1), "b": np.arange(8)}
    placed = partitioning.place_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.shard_shape(array.shape) == (2, *array.shape[1:])
    on_one = partitioning.place_batch(batch, None)
    assert len(on_one["a"].devices()) == 1


def test_a_batch_that_does_not_divide_is_refused():
    mesh = partitioning.make_mesh(expert_partitions=2, model_partitions=2)
    message = "batch_size must be a multiple of data . expert partitions, got 6 on 4: choose"
    with pytest.raises(InputError, match=message):
        partitioning.place_batch(np.zeros((6, 2)), mesh)
    partitioning.check_batch_size(6, None)


def test_one_process_has_all_rows():
    rows = np.arange(6)
    np.testing.assert_array_equal(partitioning.local_rows({"rows": rows})["rows"], rows)


def test_a_replicated_array_is_whole_on_every_device():
    mesh = partitioning.make_mesh()
    array = jax.device_put(np.arange(3.0), partitioning.replicated(mesh))
    assert array.sharding.is_fully_replicated
    assert len(array.addressable_shards) == 8
