"""What a device stores: the planner's count against the shardings that models are given."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.arrays import parameters
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.models.architecture import abstract_params, logical_axes
from uncurl_jax.partitioning import make_mesh

MODEL = ModelConfig(
    num_experts=(6, 0, 8),
    vocab_size=36,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=8,
    num_selected_experts=2,
)
GATED = dataclasses.replace(
    MODEL, is_gated=True, has_mlp_bias=False, shared_mlp_dim=12, has_shared_gate=True
)
MAPPED = dataclasses.replace(MODEL, num_experts=(2,), expert_map=((0, 1, 1, 0, 1),))


@pytest.mark.parametrize("model", [MODEL, GATED, MAPPED], ids=["plain", "gated", "mapped"])
def test_names_shapes_and_logical_axes_are_those_of_the_model(model):
    flat = jax.tree_util.tree_flatten_with_path
    shapes = {
        "/".join(entry.key for entry in path): array.shape
        for path, array in flat(abstract_params(model))[0]
    }
    names = flat(logical_axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
    axes = {"/".join(entry.key for entry in path): tuple(spec) for path, spec in names}
    assert {array.name: array.shape for array in parameters(model)} == shapes
    assert {array.name: array.axes for array in parameters(model)} == axes


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("axes", [(), ("expert",), ("data", "expert")])
@pytest.mark.parametrize("model", [MODEL, GATED], ids=["plain", "gated"])
def test_a_device_holds_what_its_shards_hold(model, mesh, axes):
    shape = MeshShape(*mesh)
    devices = make_mesh(expert_partitions=shape.expert, model_partitions=shape.model)
    placed = abstract_params(model, devices, (axes,) * model.num_layers)
    expected = {
        "/".join(entry.key for entry in path): math.prod(array.sharding.shard_shape(array.shape))
        for path, array in jax.tree_util.tree_flatten_with_path(placed)[0]
    }
    assert {array.name: array.local_size(shape, axes) for array in parameters(model)} == expected
