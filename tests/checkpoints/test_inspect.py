"""Descriptions of checkpoints."""

from __future__ import annotations

import json

import jax
import pytest

from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError


def test_sizes_equal_those_counted_by_hand(tmp_path, config, save_checkpoint):
    description = describe(save_checkpoint(tmp_path / "run", config))
    attention = 4 * (16 * 16 + 16)
    norms = 2 * 2 * 16
    expert = 16 * 24 + 24 + 24 * 16 + 16
    layers = [
        attention + norms + 16 * 8 + 8 * expert,
        attention + norms + expert,
        attention + norms + 16 * 4 + 4 * expert,
    ]
    rest = 32 * 16 + 12 * 16 + 2 * 16
    assert [layer["parameters"] for layer in description["layers"]] == layers
    assert description["parameters"] == sum(layers) + rest
    assert description["active_parameters"] == sum(layers) + rest - (7 + 3) * expert
    assert description["bytes"] == 4 * description["parameters"]
    assert description["dtypes"] == {"float32": description["parameters"]}
    assert description["num_experts"] == [8, 0, 4]
    assert description["step"] == 7
    assert description["steps"] == [7]
    assert description["optimizer_bytes"] == 0
    assert description["provenance"] == {"created_by": "test"}
    assert description["vocabulary"]["name"] == "bytes"
    json.dumps(description, allow_nan=False)


def test_parameters_equal_the_leaves_of_the_tree(tmp_path, config, make_params, save_checkpoint):
    config = ModelConfig(**{**config.to_dict(), "num_selected_experts": 2})
    params = make_params(config, dtype="bfloat16")
    path = save_checkpoint(tmp_path / "run", config, params=params, param_states={"mu": params})
    description = describe(path)
    leaves = jax.tree.leaves(params)
    assert description["parameters"] == sum(leaf.size for leaf in leaves)
    assert description["bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert description["optimizer_bytes"] == description["bytes"]
    assert list(description["dtypes"]) == ["bfloat16"]


def test_a_checkpoint_without_provenance_is_described(tmp_path, config, save_checkpoint):
    path = save_checkpoint(tmp_path / "run", config)
    (path / "provenance.json").unlink()
    assert describe(path)["provenance"] is None


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be an existing directory"):
        describe(tmp_path / "nothing")
