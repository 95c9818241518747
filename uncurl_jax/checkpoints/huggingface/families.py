"""The model families that are known. Another one is one more `Family` in `FAMILIES`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from uncurl_jax.checkpoints.huggingface import gpt2, llama, switch
from uncurl_jax.checkpoints.huggingface.family import Family, HfConfig
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_MIXTRAL_NAMES = llama.MoeNames("block_sparse_moe", gate="w1", up="w3", down="w2")


def _mixtral(config: HfConfig, max_length: int | None) -> ModelConfig:
    length = llama.sequence_length(config, max_length, 4096 * 32)
    llama.check_window(config, "sliding_window", length)
    count = config.integer("num_local_experts", 8)
    fields = llama.common_fields(
        config,
        length,
        num_experts=(count,) * config.integer("num_hidden_layers"),
        kv_heads_default=8,
        base_default=1e6,
        epsilon_default=1e-5,
    )
    return ModelConfig(
        **fields,
        mlp_dim=config.integer("intermediate_size"),
        normalize_gates=True,
        attention_bias="none",
    )


def _mixtral_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama.common_hf_fields(config),
        "num_local_experts": llama.one_count(config, "num_local_experts"),
        "intermediate_size": config.mlp_dim,
        "sliding_window": None,
    }


def _olmoe(config: HfConfig, max_length: int | None) -> ModelConfig:
    config.require("clip_qkv", (), "models that clip queries, keys and values are not read")
    width = config.integer("hidden_size") // config.integer("num_attention_heads")
    config.require("head_dim", (width,), "transformers itself cannot run it")
    fields = llama.common_fields(
        config,
        llama.sequence_length(config, max_length, 4096),
        num_experts=(config.integer(_count_name(config), 64),)
        * config.integer("num_hidden_layers"),
        epsilon_default=1e-5,
    )
    return ModelConfig(
        **fields,
        mlp_dim=config.integer("intermediate_size"),
        normalize_gates=config.flag("norm_topk_prob", False),
        attention_bias="all" if config.flag("attention_bias", False) else "none",
        qk_norm="all",
    )


def _olmoe_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama.common_hf_fields(config),
        "attention_bias": config.attention_bias == "all",
        "intermediate_size": config.mlp_dim,
        "norm_topk_prob": config.normalize_gates,
        "num_experts": llama.one_count(config, "num_experts"),
    }


def _qwen_counts(config: HfConfig, default: int) -> tuple[int, ...]:
    """Experts per layer: mlp_only_layers and all but every decoder_sparse_step-th are dense."""
    count = config.integer(_count_name(config), default)
    step = config.integer("decoder_sparse_step", 1)
    num_layers = config.integer("num_hidden_layers")
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise config.refuse("mlp_only_layers", "a list of layers", "download the file again")
    return tuple(
        count if layer not in dense and (layer + 1) % step == 0 else 0
        for layer in range(num_layers)
    )


def _count_name(config: HfConfig) -> str:
    """The field of the number of experts: transformers 5 may write another name than the hub."""
    return "num_experts" if config.get("num_experts") is not None else "num_local_experts"


def _check_qwen_window(config: HfConfig, length: int) -> None:
    if config.flag("use_sliding_window", False):
        llama.check_window(config, "sliding_window", length)


def _qwen_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama.common_hf_fields(config),
        "decoder_sparse_step": 1,
        "intermediate_size": config.dense_width,
        "mlp_only_layers": [i for i, count in enumerate(config.num_experts) if not count],
        "moe_intermediate_size": config.mlp_dim,
        "norm_topk_prob": config.normalize_gates,
        "num_experts": llama.one_count(config, "num_experts"),
        "use_sliding_window": False,
    }


def _qwen2_moe(config: HfConfig, max_length: int | None) -> ModelConfig:
    length = llama.sequence_length(config, max_length, 32768)
    _check_qwen_window(config, length)
    fields = llama.common_fields(
        config, length, num_experts=_qwen_counts(config, 60), kv_heads_default=16
    )
    return ModelConfig(
        **fields,
        mlp_dim=config.integer("moe_intermediate_size", 1408),
        dense_mlp_dim=config.integer("intermediate_size", 5632),
        shared_mlp_dim=config.integer("shared_expert_intermediate_size", 5632),
        has_shared_gate=True,
        normalize_gates=config.flag("norm_topk_prob", False),
        attention_bias="qkv" if config.flag("qkv_bias", True) else "none",
    )


def _qwen2_moe_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        **_qwen_fields(config),
        "qkv_bias": config.attention_bias == "qkv",
        "shared_expert_intermediate_size": config.shared_mlp_dim,
    }


def _qwen3_moe(config: HfConfig, max_length: int | None) -> ModelConfig:
    length = llama.sequence_length(config, max_length, 32768)
    _check_qwen_window(config, length)
    fields = llama.common_fields(
        config, length, num_experts=_qwen_counts(config, 128), kv_heads_default=4
    )
    return ModelConfig(
        **fields,
        mlp_dim=config.integer("moe_intermediate_size", 768),
        dense_mlp_dim=config.integer("intermediate_size", 6144),
        normalize_gates=config.flag("norm_topk_prob", False),
        attention_bias="all" if config.flag("attention_bias", False) else "none",
        qk_norm="head",
    )


def _qwen3_moe_fields(config: ModelConfig) -> dict[str, Any]:
    return {**_qwen_fields(config), "attention_bias": config.attention_bias == "all"}


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _mixtral,
            _mixtral_fields,
            lambda config: llama.entries(config, _MIXTRAL_NAMES),
            (llama.fused_entries,),
            llama.IGNORED,
        ),
        *(
            Family(
                model_type,
                architecture,
                to_model_config,
                to_hf_config,
                llama.entries,
                (llama.fused_entries,),
                llama.IGNORED,
            )
            for model_type, architecture, to_model_config, to_hf_config in (
                ("olmoe", "OlmoeForCausalLM", _olmoe, _olmoe_fields),
                ("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe, _qwen2_moe_fields),
                ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_fields),
            )
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            gpt2.to_model_config,
            gpt2.to_hf_config,
            gpt2.entries,
            (gpt2.entries_without_prefix,),
            gpt2.IGNORED,
        ),
        Family(
            "switch_transformers",
            "SwitchTransformersForConditionalGeneration",
            switch.to_model_config,
            switch.to_hf_config,
            switch.entries,
            aliases=switch.ALIASES,
        ),
    )
}


def find_family(config: HfConfig) -> Family:
    """Returns the family of a config.json.

    Raises:
      InputError: If it is not known, is quantised, or the model is no language model.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        near = difflib.get_close_matches(str(model_type), list(FAMILIES), n=1)
        raise InputError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r} in "
            f"{config.where}: {f'nearest is {near[0]}' if near else 'use a model of those'}."
        )
    config.require(
        "quantization_config", (), "quantised checkpoints are not read; take the original one"
    )
    architectures = config.get("architectures", [family.architecture])
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise config.refuse(
            "architectures", f"[{family.architecture!r}]", "give a checkpoint with that head"
        )
    return family
