"""The parameters that a model's checkpoint holds: names, shapes, and how two sets differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.config import ModelConfig


def is_expert_array(name: str) -> bool:
    """Whether the first axis of the array of this name counts experts."""
    return "experts" in name.split("/")[:-1]


def expected_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the parameters of a model, names joined with "/" and sorted."""
    embed = config.embed_dim
    shapes = {
        "token_embedder/embedding": (config.vocab_size, embed),
        **_norm_parameters(config, "final_norm"),
    }
    if config.has_encoder:
        shapes |= _norm_parameters(config, "encoder_norm")
        for stack in ("encoder", "decoder"):
            table = (config.relative_buckets, config.num_heads)
            shapes[f"{stack}_relative_position/embedding"] = table
    if config.position_embedding == "learned":
        shapes["position_embedder/embedding"] = (config.max_length, embed)
    if not config.has_tied_embeddings:
        shapes["output_embedder/embedding"] = (config.vocab_size, embed)
    for layer, experts in enumerate(config.num_experts):
        block = {
            **_norm_parameters(config, "pre_attention_norm"),
            **_norm_parameters(config, "pre_mlp_norm"),
            **_attention_parameters(config, "attention"),
        }
        if config.has_encoder and not config.is_encoder_layer(layer):
            block |= _norm_parameters(config, "pre_cross_attention_norm")
            block |= _attention_parameters(config, "cross_attention")
        if experts:
            block["moe/router/kernel"] = (embed, config.router_width(layer))
            for name, shape in _mlp_parameters(config, config.mlp_dim).items():
                stored = name.replace("/kernel", "").replace("/bias", "_bias")
                block[f"moe/experts/{stored}"] = (experts, *shape)
            if config.shared_mlp_dim:
                shared = _mlp_parameters(config, config.shared_mlp_dim)
                block |= {f"moe/shared/{name}": shape for name, shape in shared.items()}
            if config.has_shared_gate:
                block["moe/shared_gate/kernel"] = (embed, 1)
        else:
            dense = _mlp_parameters(config, config.dense_width)
            block |= {f"mlp/{name}": shape for name, shape in dense.items()}
        shapes |= {f"layers_{layer}/{name}": shape for name, shape in block.items()}
    return dict(sorted(shapes.items()))


def _norm_parameters(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}/scale": (config.embed_dim,)}
    if config.norm == "layer_norm":
        shapes[f"{name}/bias"] = (config.embed_dim,)
    return shapes


def _attention_parameters(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    embed, head_dim = config.embed_dim, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{name}/out/kernel": (config.num_heads, head_dim, embed)}
    heads = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    for projection, count in heads.items():
        shapes[f"{name}/{projection}/kernel"] = (embed, count, head_dim)
        if config.attention_bias != "none":
            shapes[f"{name}/{projection}/bias"] = (count, head_dim)
        if config.qk_norm != "none" and projection != "value":
            normed = (head_dim,) if config.qk_norm == "head" else (count, head_dim)
            shapes[f"{name}/{projection}_norm/scale"] = normed
    if config.attention_bias == "all":
        shapes[f"{name}/out/bias"] = (embed,)
    return shapes


def _mlp_parameters(config: ModelConfig, mlp: int) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of one feed-forward network with hidden width `mlp`."""
    embed = config.embed_dim
    shapes: dict[str, tuple[int, ...]] = {"wi/kernel": (embed, mlp), "wo/kernel": (mlp, embed)}
    if config.has_mlp_bias:
        shapes |= {"wi/bias": (mlp,), "wo/bias": (embed,)}
    if config.is_gated:
        shapes["wg/kernel"] = (embed, mlp)
        if config.has_mlp_bias:
            shapes["wg/bias"] = (mlp,)
    return shapes


def differences(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Describes every name that is missing, unknown or of another shape; empty if none is."""
    missing, unknown = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    return [
        *(f"missing {name} {list(expected[name])}" for name in missing),
        *(f"unknown {name} {list(stored[name])}" for name in unknown),
        *(
            f"{name} is {list(stored[name])} instead of {list(expected[name])}"
            for name in sorted(set(stored) & set(expected))
            if stored[name] != expected[name]
        ),
    ]


def listed(problems: Sequence[Any], limit: int = 20) -> str:
    """Joins problems for a message; past `limit` only their number."""
    text = "; ".join(str(problem) for problem in problems[:limit])
    return text if len(problems) <= limit else f"{text}; and {len(problems) - limit} more"
