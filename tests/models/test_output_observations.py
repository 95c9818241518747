"""What calibration sees of the experts' outputs: before gates and capacity drops."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.moe import MoeLayer
from uncurl_jax.partitioning import make_mesh

TOLERANCE = 1e-5
CONFIG = ModelConfig(
    num_experts=(5,),
    vocab_size=8,
    embed_dim=8,
    num_heads=1,
    mlp_dim=12,
    max_length=16,
    num_selected_experts=2,
    min_capacity=1,
    eval_capacity_factor=0.5,
    is_gated=True,
    activation="silu",
    dtype="float32",
)
COLLECTIONS = ("output_observations", "all_output_observations")


def make_inputs(batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(2)
    x = generator.normal(size=(batch, 7, 8)).astype(np.float32)
    return x, np.arange(7) < generator.integers(3, 8, (batch, 1))


def observe(config: ModelConfig, params: Any, batch: int = 3, mesh=None, mutable=COLLECTIONS):
    layer = MoeLayer(config, 0, mesh)
    x, mask = make_inputs(batch)
    collections = ["router_observations", *mutable]
    apply = jax.jit(lambda p: layer.apply({"params": p}, x, mask, mutable=collections))
    y, sown = apply(params)
    return np.asarray(y), jax.device_get(sown)


@pytest.mark.parametrize("expert_map", [None, ((4, 3, 2, 1, 0, 0),)])
def test_outputs_are_those_of_every_chosen_expert_and_their_sums(
    random_params, reference_feed_forward, expert_map
):
    config = dataclasses.replace(CONFIG, expert_map=expert_map)
    params = random_params(config)["layers_0"]["moe"]
    y, sown = observe(config, params)
    x, mask = make_inputs()
    every = np.stack(
        [
            reference_feed_forward({n: a[z] for n, a in params["experts"].items()}, x, "silu")
            for z in range(5)
        ],
        axis=2,
    )  # [b, l, e, d]
    (observation,) = sown["router_observations"]["observation"]
    assert not observation["is_kept"][mask].all()  # some are dropped, and observed all the same
    column = np.asarray(observation["expert_index"])
    index = column if expert_map is None else np.asarray(expert_map[0])[column]
    expected = np.take_along_axis(every, index[..., None], axis=2)
    (outputs,) = sown["output_observations"]["outputs"]
    assert outputs.shape == (3, 7, 2, 8) and outputs.dtype == np.float32
    np.testing.assert_allclose(outputs[mask], expected[mask], rtol=TOLERANCE, atol=TOLERANCE)
    (sums,) = sown["all_output_observations"]["all_output_sum"]
    np.testing.assert_allclose(sums, every[mask].sum(axis=0), rtol=TOLERANCE, atol=TOLERANCE)
    # The layer's own result is what it is without being observed.
    plain, unseen = observe(config, params, mutable=())
    np.testing.assert_array_equal(plain, y)
    assert set(unseen) == {"router_observations"}


def test_observations_on_eight_devices_equal_those_on_one(random_params):
    params = random_params(CONFIG)["layers_0"]["moe"]
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    _, alone = observe(CONFIG, params, 4)
    _, sharded = observe(CONFIG, params, 4, mesh)
    mask = make_inputs(4)[1]
    for name, key in zip(COLLECTIONS, ("outputs", "all_output_sum"), strict=True):
        (one,), (other,) = alone[name][key], sharded[name][key]
        if key == "outputs":
            one, other = one[mask], other[mask]
        np.testing.assert_allclose(other, one, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def test_padding_changes_no_sum(random_params):
    params = random_params(CONFIG)["layers_0"]["moe"]
    layer = MoeLayer(CONFIG, 0)
    x, mask = make_inputs()
    apply = jax.jit(
        lambda x: layer.apply({"params": params}, x, mask, mutable=["all_output_observations"])[1]
    )
    one, other = (
        apply(array)["all_output_observations"]["all_output_sum"][0]
        for array in (x, np.where(mask[..., None], x, 100.0 * x + 3.0))
    )
    np.testing.assert_array_equal(one, other)
