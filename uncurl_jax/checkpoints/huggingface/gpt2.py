"""GPT-2, our decoder's default architecture, as far as transformers has it: without experts.

Its projections are stored [in, out], and those of queries, keys and values side by side
(transformers, `models/gpt2/modeling_gpt2.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uncurl_jax.checkpoints.huggingface import llama
from uncurl_jax.checkpoints.huggingface.family import Entry, HfConfig
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "silu"}
_HF_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu"}
# Causal masks that older versions of transformers saved.
IGNORED = (".attn.bias", ".attn.masked_bias")


def to_model_config(config: HfConfig, max_length: int | None) -> ModelConfig:
    """Translates GPT-2's config.json; see `family.Family`."""
    name = config.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise config.refuse(
            "activation_function", " or ".join(_ACTIVATIONS), "models with another are not read"
        )
    for field, allowed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        config.require(field, (allowed,), "models with this change of GPT-2 are not read")
    embed_dim, length = config.integer("n_embd", 768), config.integer("n_positions", 1024)
    if max_length not in (None, length):
        raise InputError(
            f"--max_length cannot shorten learned positions, got {max_length} for {length} in "
            f"{config.where}: leave it out."
        )
    return ModelConfig(
        num_experts=(0,) * config.integer("n_layer", 12),
        vocab_size=config.integer("vocab_size", 50257),
        embed_dim=embed_dim,
        num_heads=config.integer("n_head", 12),
        mlp_dim=config.integer("n_inner", 4 * embed_dim),
        max_length=length,
        capacity_factor=None,
        eval_capacity_factor=None,
        activation=_ACTIVATIONS[name],
        has_tied_embeddings=config.flag("tie_word_embeddings", True),
        init_stddev=config.number("initializer_range", 0.02),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        dtype=llama.compute_dtype(config),
    )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns GPT-2's fields; see `family.Family`."""
    if config.moe_layers:
        raise InputError(
            "GPT-2 in transformers has no experts, got a model with some in layers "
            f"{list(config.moe_layers)}: keep this package's own format."
        )
    return {
        "activation_function": _HF_ACTIVATIONS[config.activation],
        "initializer_range": config.init_stddev,
        "layer_norm_epsilon": config.norm_epsilon,
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_inner": config.dense_width,
        "n_layer": config.num_layers,
        "n_positions": config.max_length,
        "tie_word_embeddings": config.has_tied_embeddings,
        "vocab_size": config.vocab_size,
    }


def entries(config: ModelConfig, prefix: str = "transformer.") -> Iterator[Entry]:
    """Yields where the parameters are, as GPT2LMHeadModel names them."""
    dim = config.embed_dim
    yield Entry("token_embedder/embedding", f"{prefix}wte.weight", (config.vocab_size, dim))
    yield Entry("position_embedder/embedding", f"{prefix}wpe.weight", (config.max_length, dim))
    if not config.has_tied_embeddings:
        yield Entry("output_embedder/embedding", "lm_head.weight", (config.vocab_size, dim))
    yield from _with_bias("final_norm", f"{prefix}ln_f", (dim,), weight="scale")
    for layer in range(config.num_layers):
        ours, theirs = f"layers_{layer}", f"{prefix}h.{layer}"
        norms = (("pre_attention_norm", "ln_1"), ("pre_mlp_norm", "ln_2"))
        for norm, name in norms:
            yield from _with_bias(f"{ours}/{norm}", f"{theirs}.{name}", (dim,), weight="scale")
        for place, name in enumerate(("query", "key", "value")):
            columns, joined = slice(place * dim, (place + 1) * dim), f"{theirs}.attn.c_attn"
            kernel, bias = f"{ours}/attention/{name}/kernel", f"{ours}/attention/{name}/bias"
            part = (slice(0, dim), columns)
            yield Entry(kernel, f"{joined}.weight", (dim, 3 * dim), part=part)
            yield Entry(bias, f"{joined}.bias", (3 * dim,), part=(columns,))
        yield from _with_bias(f"{ours}/attention/out", f"{theirs}.attn.c_proj", (dim, dim))
        mlp = config.dense_width
        yield from _with_bias(f"{ours}/mlp/wi", f"{theirs}.mlp.c_fc", (dim, mlp))
        yield from _with_bias(f"{ours}/mlp/wo", f"{theirs}.mlp.c_proj", (mlp, dim))


def entries_without_prefix(config: ModelConfig) -> Iterator[Entry]:
    """Yields the same as the first checkpoints on the hub have it."""
    return entries(config, prefix="")


def _with_bias(
    ours: str, theirs: str, shape: tuple[int, ...], weight: str = "kernel"
) -> Iterator[Entry]:
    yield Entry(f"{ours}/{weight}", f"{theirs}.weight", shape)
    yield Entry(f"{ours}/bias", f"{theirs}.bias", shape[-1:])
