from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from uncurl_jax.config import (
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    alternating_experts,
    scaled_steps,
)
from uncurl_jax.errors import InputError

MODEL: dict[str, Any] = {
    "num_experts": (4, 0),
    "vocab_size": 32,
    "embed_dim": 16,
    "num_heads": 2,
    "mlp_dim": 24,
    "max_length": 12,
}
ENCODER: dict[str, Any] = {"num_encoder_layers": 1, "position_embedding": "relative"}
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-3)


def test_experts_alternate_starting_with_the_first_layer():
    assert alternating_experts(5, 8) == (8, 0, 8, 0, 8)
    assert alternating_experts(4, 0) == (0, 0, 0, 0)
    assert alternating_experts(5, 8, first=1) == (0, 8, 0, 8, 0)


def test_steps_are_scaled_rounded_and_at_least_one():
    assert scaled_steps(100) == 100
    assert scaled_steps(100, 0.256) == 26
    assert scaled_steps(100, 0.0) == 1


def test_derived_sizes_of_a_model():
    config = ModelConfig(**MODEL)
    assert config.num_layers == 2
    assert config.head_dim == 8
    assert config.moe_layers == (0,)
    assert config.with_experts(2).num_experts == (2, 0)
    dense = dataclasses.replace(config, num_experts=(0, 0))
    assert dense.moe_layers == ()
    assert dense.with_experts(2).num_experts == (0, 0)
    assert (config.kv_heads, config.dense_width) == (config.num_heads, config.mlp_dim)
    other = dataclasses.replace(config, num_kv_heads=1, attention_head_dim=6, dense_mlp_dim=7)
    assert (other.kv_heads, other.head_dim, other.dense_width) == (1, 6, 7)


def test_the_first_layers_are_the_encoders():
    config = ModelConfig(**MODEL, **ENCODER, encoder_end_id=1)
    assert config.has_encoder and not ModelConfig(**MODEL).has_encoder
    assert [config.is_encoder_layer(layer) for layer in (0, 1)] == [True, False]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "factor", "capacity"),
    [
        (64, 8, 1, 1.0, 8),  # 64 / 8
        (64, 8, 1, 1.2, 10),  # ceil(9.6)
        (64, 8, 2, 1.25, 20),  # 64 * 2 * 1.25 / 8
        (64, 5, 1, 1.0, 13),  # ceil(12.8)
        (16, 8, 1, 1.0, 4),  # 2, but at least min_capacity
        (3, 8, 1, 1.0, 3),  # an expert never needs more slots than there are tokens
        (64, 1, 1, 1.2, 64),
        (64, 8, 1, None, None),  # dropless
    ],
)
def test_capacities_worked_by_hand(
    tokens: int, experts: int, topk: int, factor: float | None, capacity: int | None
):
    config = ModelConfig(
        **{**MODEL, "num_experts": (experts,)},
        num_selected_experts=topk,
        capacity_factor=factor,
        eval_capacity_factor=1e-6,
    )
    assert config.expert_capacity(0, tokens, is_training=True) == capacity
    assert config.expert_capacity(0, tokens, is_training=False) == min(4, tokens)


def test_a_model_configuration_round_trips_through_json():
    config = ModelConfig(**MODEL, capacity_factor=None, num_selected_experts=2, dtype="float32")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_option_of_an_architecture_round_trips_through_json():
    config = ModelConfig(
        **{**MODEL, "num_experts": (2, 0)},
        is_gated=True,
        activation="silu",
        has_mlp_bias=False,
        shared_mlp_dim=8,
        has_shared_gate=True,
        dense_mlp_dim=20,
        position_embedding="rotary",
        rotary_base=1e6,
        norm="rms_norm",
        num_kv_heads=1,
        attention_head_dim=6,
        attention_bias="qkv",
        qk_norm="head",
        has_tied_embeddings=False,
        attention_scale=1.0,
        has_scaled_logits=True,
        expert_map=((0, 1, 1), None),
    )
    read = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config and hash(read) == hash(config)


def test_a_configuration_without_the_newer_fields_has_their_defaults():
    values = ModelConfig(**MODEL).to_dict()
    for name in ("is_gated", "activation", "has_mlp_bias", "shared_mlp_dim", "expert_map"):
        del values[name]
    assert ModelConfig.from_dict(values) == ModelConfig(**MODEL)


def test_a_router_may_be_wider_than_its_experts():
    rows: Any = [[1, 0, 1], None, None]
    config = ModelConfig(**{**MODEL, "num_experts": (2, 0, 3)}, expert_map=rows)
    assert config.expert_map == ((1, 0, 1), None, None)
    assert [config.router_width(layer) for layer in (0, 2)] == [3, 3]
    assert config.with_experts(2).expert_map is None
    assert ModelConfig(**MODEL).router_width(0) == 4


def test_unknown_and_missing_fields_are_listed():
    values = ModelConfig(**MODEL).to_dict()
    del values["embed_dim"]
    with pytest.raises(InputError, match=r"unknown \['width'\] and missing \['embed_dim'\]"):
        ModelConfig.from_dict({**values, "width": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": ()}, r"num_experts must name at least one layer, got \(\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"min_capacity": 0}, "min_capacity must be at least 1, got 0"),
        ({"num_selected_experts": 0}, "num_selected_experts must be at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide embed_dim, got 3 heads and embed_dim 16"),
        (
            {"num_experts": (4, 1), "num_selected_experts": 2},
            r"num_experts\[1\]=1 is below num_selected_experts=2: choose at least that many",
        ),
        ({"num_experts": (4, -1)}, r"num_experts\[1\]=-1 is below"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, or None for dropless"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor must be positive"),
        ({"activation": "tanh"}, 'activation must be "gelu", "silu" or "relu", got \'tanh\''),
        ({"shared_mlp_dim": -1}, "shared_mlp_dim must not be negative, .* got -1"),
        ({"has_shared_gate": True}, "positive with has_shared_gate, got 0"),
        ({"expert_map": ((0, 1, 2, 3),)}, "one entry per layer, got 1 for 2 layers"),
        (
            {"expert_map": ((0, 1, 2, 2), None)},
            r"expert_map\[0\] must name each of the layer's 4 experts, got \[0, 1, 2\]",
        ),
        ({"expert_map": ((0, 1, 2, 3, 4), None)}, r"expert_map\[0\] must name each"),
        ({"expert_map": (None, (0,))}, r"expert_map\[1\] must name each of the layer's 0 experts"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 2"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, or None, got 0"),
        ({"dense_mlp_dim": 0}, "dense_mlp_dim must be at least 1, or None, got 0"),
        (
            {"position_embedding": "rotary", "attention_head_dim": 5},
            "heads of even width and a positive rotary_base, got 5 and 10000.0",
        ),
        (
            {"position_embedding": "alibi"},
            'must be "learned", "rotary" or "relative", got \'alibi\'',
        ),
        ({"norm": "batch"}, 'norm must be "layer_norm" or "rms_norm"'),
        ({"attention_bias": True}, 'attention_bias must be "all", "qkv" or "none", got True'),
        ({"attention_scale": 0.0}, "attention_scale must be positive, or None, got 0.0"),
        (
            {"num_encoder_layers": 2, "position_embedding": "relative"},
            "leave a layer to the decoder, got 2 of 2 layers",
        ),
        ({"num_encoder_layers": -1}, "num_encoder_layers must be at least 0"),
        ({"num_encoder_layers": 1}, "goes with num_encoder_layers > 0, got 'learned' and 1"),
        ({"position_embedding": "relative"}, "got 'relative' and 0: set both or neither"),
        ({"relative_buckets": 6}, "relative_buckets must be a positive multiple of 4"),
        ({"relative_max_distance": 16}, "relative_max_distance above its half, got 32 and 16"),
        ({"encoder_end_id": 1}, "only with an encoder, got 1: leave it None"),
        (ENCODER | {"encoder_end_id": 0}, r"other than 0 \(padding\), and only with an encoder"),
        (ENCODER | {"encoder_end_id": 32}, "encoder_end_id must be an id of the vocabulary"),
        ({"qk_norm": "each"}, 'qk_norm must be "none", "head" or "all"'),
        ({"dtype": "float16"}, 'dtype must be "bfloat16" or "float32", got \'float16\''),
    ],
)
def test_a_wrong_model_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        ModelConfig(**{**MODEL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, 'schedule must be "linear", "cosine" or "constant", got \'step\''),
        ({"peak_learning_rate": 0.0}, "peak_learning_rate must be positive .* got 0.0, 0 and 0.1"),
        ({"warmup_steps": -1}, "warmup_steps and weight_decay at least 0, got 0.001, -1"),
        ({"weight_decay": -0.1}, "got 0.001, 0 and -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None for none, got 0.0"),
    ],
)
def test_a_wrong_optimizer_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(OPTIMIZER, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": "experts"}, 'trainable must be "all" or "router", got \'experts\''),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every_steps": 0}, "log_every_steps must be at least 1, got 0"),
        ({"accumulation_steps": 3}, "accumulation_steps must divide batch_size, got 3 and 8"),
        ({"length": 0}, "length must be at least 1, or None, got 0"),
        ({"save_every_steps": 0}, "save_every_steps must be at least 1, or None, got 0"),
        ({"max_to_keep": 0}, "max_to_keep must be at least 1, or None, got 0"),
    ],
)
def test_a_wrong_stage_is_refused(change: dict[str, Any], message: str):
    stage = TrainConfig(optimizer=OPTIMIZER, num_steps=4, batch_size=8)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(stage, **change)
