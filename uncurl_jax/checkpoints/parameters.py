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
    embed, mlp = config.embed_dim, config.mlp_dim
    heads, head_dim = config.num_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedder/embedding": (config.vocab_size, embed),
        "position_embedder/embedding": (config.max_length, embed),
        "final_norm/scale": (embed,),
        "final_norm/bias": (embed,),
    }
    for layer, experts in enumerate(config.num_experts):
        block: dict[str, tuple[int, ...]] = {}
        for norm in ("pre_attention_norm", "pre_mlp_norm"):
            block |= {f"{norm}/scale": (embed,), f"{norm}/bias": (embed,)}
        for projection in ("query", "key", "value"):
            block[f"attention/{projection}/kernel"] = (embed, heads, head_dim)
            block[f"attention/{projection}/bias"] = (heads, head_dim)
        block |= {
            "attention/out/kernel": (heads, head_dim, embed),
            "attention/out/bias": (embed,),
        }
        if experts:
            block["moe/router/kernel"] = (embed, config.router_width(layer))
            for name, shape in _mlp_parameters(config, mlp).items():
                stored = name.replace("/kernel", "").replace("/bias", "_bias")
                block[f"moe/experts/{stored}"] = (experts, *shape)
            if config.shared_mlp_dim:
                shared = _mlp_parameters(config, config.shared_mlp_dim)
                block |= {f"moe/shared/{name}": shape for name, shape in shared.items()}
            if config.has_shared_gate:
                block["moe/shared_gate/kernel"] = (embed, 1)
        else:
            block |= {f"mlp/{name}": shape for name, shape in _mlp_parameters(config, mlp).items()}
        shapes |= {f"layers_{layer}/{name}": shape for name, shape in block.items()}
    return dict(sorted(shapes.items()))


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
