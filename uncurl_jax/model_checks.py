"""What a `config.ModelConfig` must be: one sentence for each rule that a user can break."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncurl_jax.errors import InputError

if TYPE_CHECKING:
    from uncurl_jax.config import ModelConfig

_CHOICES = {
    "activation": ("gelu", "silu", "relu"),
    "position_embedding": ("learned", "rotary", "relative"),
    "norm": ("layer_norm", "rms_norm"),
    "attention_bias": ("all", "qkv", "none"),
    "qk_norm": ("none", "head", "all"),
    "dtype": ("bfloat16", "float32"),
}
_COUNTS = (
    "vocab_size",
    "embed_dim",
    "num_heads",
    "mlp_dim",
    "max_length",
    "num_selected_experts",
    "min_capacity",
)


def check_model(config: ModelConfig) -> None:
    """Checks the fields of a model and how they go together.

    Raises:
      InputError: If a rule is broken.
    """
    if not config.num_experts:
        raise InputError(
            "num_experts must name at least one layer, got (): give one entry per layer."
        )
    for name in _COUNTS:
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}.")
    _check_attention(config)
    _check_experts(config)
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            quoted = [f'"{choice}"' for choice in choices]
            listed = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            raise InputError(f"{name} must be {listed}, got {value!r}.")
    _check_encoder(config)
    _check_expert_map(config)


def _check_attention(config: ModelConfig) -> None:
    for name in ("num_kv_heads", "attention_head_dim", "dense_mlp_dim"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, or None, got {value}.")
    if config.attention_head_dim is None and config.embed_dim % config.num_heads:
        raise InputError(
            f"num_heads must divide embed_dim, got {config.num_heads} heads and embed_dim "
            f"{config.embed_dim}."
        )
    if config.num_heads % config.kv_heads:
        raise InputError(
            f"num_kv_heads must divide num_heads, got {config.kv_heads} and {config.num_heads}."
        )
    if config.attention_scale is not None and config.attention_scale <= 0:
        raise InputError(
            f"attention_scale must be positive, or None, got {config.attention_scale}."
        )
    if config.position_embedding == "rotary" and (config.head_dim % 2 or config.rotary_base <= 0):
        raise InputError(
            "Rotary positions need heads of even width and a positive rotary_base, got "
            f"{config.head_dim} and {config.rotary_base}."
        )


def _check_experts(config: ModelConfig) -> None:
    for layer, count in enumerate(config.num_experts):
        if count < 0 or 0 < count < config.num_selected_experts:
            raise InputError(
                f"num_experts[{layer}]={count} is below num_selected_experts="
                f"{config.num_selected_experts}: choose at least that many experts or lower top-k."
            )
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(config, name)
        if factor is not None and factor <= 0:
            raise InputError(f"{name} must be positive, or None for dropless, got {factor}.")
    if config.shared_mlp_dim < 0 or (config.has_shared_gate and not config.shared_mlp_dim):
        raise InputError(
            "shared_mlp_dim must not be negative, and positive with has_shared_gate, got "
            f"{config.shared_mlp_dim}."
        )


def _check_encoder(config: ModelConfig) -> None:
    if not 0 <= config.num_encoder_layers < config.num_layers:
        raise InputError(
            "num_encoder_layers must be at least 0 and leave a layer to the decoder, got "
            f"{config.num_encoder_layers} of {config.num_layers} layers."
        )
    if (config.position_embedding == "relative") != config.has_encoder:
        raise InputError(
            'position_embedding "relative" goes with num_encoder_layers > 0, got '
            f"{config.position_embedding!r} and {config.num_encoder_layers}: set both or neither."
        )
    buckets, distance = config.relative_buckets, config.relative_max_distance
    if buckets < 4 or buckets % 4 or distance <= buckets // 2:
        raise InputError(
            "relative_buckets must be a positive multiple of 4, and relative_max_distance above "
            f"its half, got {buckets} and {distance}."
        )
    end = config.encoder_end_id
    if end is not None and not (config.has_encoder and 0 < end < config.vocab_size):
        raise InputError(
            "encoder_end_id must be an id of the vocabulary other than 0 (padding), and only with "
            f"an encoder, got {end}: leave it None without an encoder."
        )


def _check_expert_map(config: ModelConfig) -> None:
    if config.expert_map is None:
        return
    if len(config.expert_map) != config.num_layers:
        raise InputError(
            f"expert_map must have one entry per layer, got {len(config.expert_map)} for "
            f"{config.num_layers} layers."
        )
    for layer, (row, count) in enumerate(zip(config.expert_map, config.num_experts, strict=True)):
        if row is not None and set(row) != set(range(count)):
            raise InputError(
                f"expert_map[{layer}] must name each of the layer's {count} experts, got "
                f"{sorted(set(row))}."
            )
