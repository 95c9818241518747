"""Switch Transformers: T5's encoder and decoder with experts in some layers of both.

Fields and tensors are named as in transformers (`models/switch_transformers/`), whose defaults for
missing fields are given here too. Its routers drop what exceeds expert_capacity in a row; ours have
a capacity for all rows of a device, or none, which is what an import sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from uncurl_jax.checkpoints.huggingface import llama
from uncurl_jax.checkpoints.huggingface.family import Entry, HfConfig
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

# T5 reads sequences of any length; checkpoints on the hub say n_positions 512.
_USUAL_LENGTH = 512
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu"}
_HF_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu"}
# Copies of the token embedding that transformers may save.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def to_model_config(config: HfConfig, max_length: int | None) -> ModelConfig:
    """Translates a config.json; see `family.Family`."""
    if max_length is not None and max_length < 1:
        raise InputError(f"--max_length must be at least 1, got {max_length}: raise it.")
    for field, allowed in (
        ("router_bias", False),
        ("router_dtype", "float32"),
        ("is_encoder_decoder", True),
        ("num_selected_experts", 1),
        ("decoder_start_token_id", 0),
        ("pad_token_id", 0),
        ("is_gated_act", False),
    ):
        config.require(field, (allowed,), "models with this change of Switch are not read")
    name = config.get("dense_act_fn", config.get("feed_forward_proj", "relu"))
    if name not in _ACTIVATIONS:
        raise config.refuse(
            "dense_act_fn", " or ".join(_ACTIVATIONS), "models with another are not read"
        )
    num_encoder = config.integer("num_layers", 12)
    is_tied = config.flag("tie_word_embeddings", True)
    return ModelConfig(
        num_experts=(
            *_counts(config, num_encoder, "num_sparse_encoder_layers"),
            *_counts(
                config,
                config.integer("num_decoder_layers", num_encoder),
                "num_sparse_decoder_layers",
            ),
        ),
        num_encoder_layers=num_encoder,
        vocab_size=config.integer("vocab_size", 32128),
        embed_dim=config.integer("d_model", 768),
        num_heads=config.integer("num_heads", 12),
        attention_head_dim=config.integer("d_kv", 64),
        mlp_dim=config.integer("d_ff", 2048),
        max_length=max_length or config.integer("n_positions", _USUAL_LENGTH),
        capacity_factor=None,
        eval_capacity_factor=None,
        router_jitter=config.number("router_jitter_noise", 0.01),
        auxiliary_loss_weight=config.number("router_aux_loss_coef", 0.001),
        router_z_loss_weight=config.number("router_z_loss_coef", 0.001),
        activation=_ACTIVATIONS[name],
        has_mlp_bias=False,
        position_embedding="relative",
        relative_buckets=config.integer("relative_attention_num_buckets", 32),
        relative_max_distance=config.integer("relative_attention_max_distance", 128),
        norm="rms_norm",
        attention_bias="none",
        attention_scale=1.0,
        has_tied_embeddings=is_tied,
        has_scaled_logits=is_tied,
        encoder_end_id=_end_id(config),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-6),
        dtype=llama.compute_dtype(config),
    )


def _end_id(config: HfConfig) -> int:
    value = config.get("eos_token_id", 1)
    value = value[0] if isinstance(value, list) and value else value
    if type(value) is not int:
        raise config.refuse("eos_token_id", "an id", "download the file again")
    return value


def _counts(config: HfConfig, num_layers: int, field: str) -> list[int]:
    """Experts of each layer of one stack."""
    sparse = config.get(field, 3)
    if type(sparse) is not int or not 0 <= sparse <= num_layers:
        raise config.refuse(field, f"from 0 to {num_layers} layers", "download the file again")
    count = config.integer("num_experts", 8)
    return [count if flag else 0 for flag in _is_sparse(num_layers, sparse)]


def _is_sparse(num_layers: int, num_sparse: int) -> list[bool]:
    """Which layers of a stack transformers gives experts (SwitchTransformersStack).

    Every step-th layer, beginning with the second, step being layers / sparse layers; and where
    there are to be none it is as many as layers, which leaves the second layer.
    """
    step = num_layers // num_sparse if num_sparse else num_layers
    return [step == 1 or layer % step == 1 for layer in range(num_layers)]


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of config.json; see `family.Family`."""
    if not config.has_encoder:
        raise InputError("Switch Transformers have an encoder, got a decoder alone.")
    if config.is_gated or not config.has_tied_embeddings:
        what = "gated networks" if config.is_gated else "an output projection of its own"
        raise InputError(
            f"Switch Transformers in transformers have neither gated networks nor, with one token "
            f"embedding, an output projection of their own, got a model with {what}: keep this "
            "package's own format."
        )
    split = config.num_encoder_layers
    return {
        "d_ff": config.mlp_dim,
        "d_kv": config.head_dim,
        "d_model": config.embed_dim,
        "decoder_start_token_id": 0,
        "dense_act_fn": _HF_ACTIVATIONS[config.activation],
        "eos_token_id": config.encoder_end_id,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.norm_epsilon,
        "n_positions": config.max_length,
        "num_decoder_layers": config.num_layers - split,
        "num_experts": llama.one_count(config, "num_experts"),
        "num_heads": config.num_heads,
        "num_layers": split,
        "num_sparse_decoder_layers": _num_sparse(config.num_experts[split:], "decoder"),
        "num_sparse_encoder_layers": _num_sparse(config.num_experts[:split], "encoder"),
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relative_max_distance,
        "relative_attention_num_buckets": config.relative_buckets,
        "router_aux_loss_coef": config.auxiliary_loss_weight,
        "router_jitter_noise": config.router_jitter,
        "router_z_loss_coef": config.router_z_loss_weight,
        "tie_word_embeddings": config.has_tied_embeddings,
        "vocab_size": config.vocab_size,
    }


def _num_sparse(counts: tuple[int, ...], stack: str) -> int:
    """Returns the number of sparse layers that gives a stack its pattern."""
    wanted = [count > 0 for count in counts]
    for number in (sum(wanted), *range(len(counts) + 1)):
        if _is_sparse(len(counts), number) == wanted:
            return number
    raise InputError(
        f"num_sparse_{stack}_layers of config.json means experts in every n-th layer, got "
        f"{list(counts)} in the {stack}: keep this package's own format."
    )


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Yields where the parameters are."""
    dim = config.embed_dim
    yield Entry("token_embedder/embedding", "shared.weight", (config.vocab_size, dim))
    if not config.has_tied_embeddings:
        yield Entry("output_embedder/embedding", "lm_head.weight", (config.vocab_size, dim))
    for stack, norm in (("encoder", "encoder_norm"), ("decoder", "final_norm")):
        yield Entry(f"{norm}/scale", f"{stack}.final_layer_norm.weight", (dim,))
        yield Entry(
            f"{stack}_relative_position/embedding",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (config.relative_buckets, config.num_heads),
        )
    for layer in range(config.num_layers):
        yield from _layer_entries(config, layer)


def _layer_entries(config: ModelConfig, layer: int) -> Iterator[Entry]:
    """Yields one layer: attention to itself, in a decoder to the prompt, and the network."""
    ours, dim = f"layers_{layer}", config.embed_dim
    is_encoder = config.is_encoder_layer(layer)
    place = layer if is_encoder else layer - config.num_encoder_layers
    block = f"{'encoder' if is_encoder else 'decoder'}.block.{place}"
    parts = [("attention", "pre_attention_norm", "SelfAttention")]
    if not is_encoder:
        parts.append(("cross_attention", "pre_cross_attention_norm", "EncDecAttention"))
    for number, (attention, norm, name) in enumerate(parts):
        part = f"{block}.layer.{number}"
        yield Entry(f"{ours}/{norm}/scale", f"{part}.layer_norm.weight", (dim,))
        width = config.num_heads * config.head_dim
        for projection, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            shape = (dim, width) if letter == "o" else (width, dim)
            yield _kernel(f"{ours}/{attention}/{projection}", f"{part}.{name}.{letter}", shape)
    part = f"{block}.layer.{len(parts)}"
    yield Entry(f"{ours}/pre_mlp_norm/scale", f"{part}.layer_norm.weight", (dim,))
    mlp = {"wi": (config.mlp_dim, dim), "wo": (dim, config.mlp_dim)}
    count = config.num_experts[layer]
    if not count:
        for name, shape in mlp.items():
            yield _kernel(f"{ours}/mlp/{name}", f"{part}.mlp.{name}", shape)
        return
    width = config.router_width(layer)
    yield _kernel(f"{ours}/moe/router", f"{part}.mlp.router.classifier", (width, dim))
    for expert in range(count):
        for name, shape in mlp.items():
            tensor = f"{part}.mlp.experts.expert_{expert}.{name}.weight"
            parameter = f"{ours}/moe/experts/{name}"
            yield Entry(parameter, tensor, shape, expert, is_transposed=True)


def _kernel(ours: str, theirs: str, shape: tuple[int, int]) -> Entry:
    return Entry(f"{ours}/kernel", f"{theirs}.weight", shape, is_transposed=True)
