"""config.json of a model of ours: the original with what changed, or a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uncurl_jax.checkpoints.huggingface.directory import CONFIG_FILE
from uncurl_jax.checkpoints.huggingface.families import FAMILIES, find_family
from uncurl_jax.checkpoints.huggingface.family import Family, HfConfig
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

# What decides nothing that a forward pass without dropping computes.
_OF_TRAINING = frozenset(
    {
        "capacity_factor",
        "eval_capacity_factor",
        "min_capacity",
        "router_jitter",
        "auxiliary_loss_weight",
        "router_z_loss_weight",
        "init_stddev",
        "dtype",
    }
)
# transformers 5 reads both names and may write the second.
_OTHER_NAMES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
# Keys that name Python files, which are not carried along.
_OF_CODE = ("auto_map",)


class Translated(NamedTuple):
    """A model in the terms of transformers.

    Attributes:
      family: which models it belongs to.
      hf_config: what config.json is to hold.
    """

    family: Family
    hf_config: dict[str, Any]


def translate(config: ModelConfig, original: Mapping[str, Any] | None, dtype: str) -> Translated:
    """Returns the family and config.json of a model.

    Args:
      config: the model.
      original: the config.json that it was imported with, whose other fields stay as they are;
        None for our own models, whose family is looked for.
      dtype: of the stored numbers.

    Raises:
      InputError: If no config.json expresses the model exactly; says what is in the way.
    """
    if config.expert_map is not None:
        raise InputError(
            "config.json cannot express routers that are wider than their experts, got a model "
            "pruned with router 'remap': prune with another --router, as reference."
        )
    if original is None:
        return _new(config, dtype)
    where = f"the {CONFIG_FILE} it was imported with"
    hf_config = HfConfig(original, where)
    family = find_family(hf_config)
    # A shorter sequence than the model's may have been wanted; what is exported has its own.
    length = None if config.position_embedding == "learned" else config.max_length
    old = family.to_model_config(hf_config, length)
    before, after = family.to_hf_config(old), family.to_hf_config(config)
    changes = {name: value for name, value in after.items() if before.get(name) != value}
    for name in list(changes):
        other = _OTHER_NAMES.get(name)
        if other is not None and other in original:
            changes[other] = changes[name]
            if name not in original:
                del changes[name]
    result = {name: value for name, value in original.items() if name not in _OF_CODE} | changes
    kept = "dtype" if "dtype" in original else "torch_dtype"
    if result.get(kept, "float32") != dtype:
        result[kept] = dtype
    different = _differences(family.to_model_config(HfConfig(result, where), length), config)
    if different:
        raise InputError(
            f"{CONFIG_FILE} of {family.model_type} must express the model exactly, got another "
            f"{', '.join(different)} than it has room for: keep this package's own format."
        )
    return Translated(family, result)


def check_plan(num_experts: Sequence[int], router: str, model_type: str) -> None:
    """Checks, before a prune, that its result can be written for transformers.

    Args:
      num_experts: experts per layer after it, 0 for dense layers.
      router: the plan's router treatment.
      model_type: family of the model.

    Raises:
      InputError: If config.json of the family cannot express the result.
    """
    counts = sorted({count for count in num_experts if count})
    remedy = "or give --format uncurl if the result stays in this package's format"
    if len(counts) > 1:
        raise InputError(
            f"{CONFIG_FILE} of {model_type} has one number of experts for all layers, got a plan "
            f"with {list(num_experts)}: plan with a uniform count, as --num_experts {counts[0]}, "
            f"{remedy}."
        )
    if router == "remap":
        raise InputError(
            f"{CONFIG_FILE} of {model_type} cannot express routers that are wider than their "
            f"experts, got --router remap: choose another, as reference, {remedy}."
        )


def _new(config: ModelConfig, dtype: str) -> Translated:
    reasons = []
    for family in FAMILIES.values():
        fixed = {"model_type": family.model_type, "architectures": [family.architecture]}
        try:
            fields = {**fixed, **family.to_hf_config(config), "torch_dtype": dtype}
            found = family.to_model_config(HfConfig(fields, CONFIG_FILE), None)
        except InputError as error:
            reasons.append(f"{family.model_type}: {error}")
            continue
        different = _differences(found, config)
        if not different:
            return Translated(family, fields)
        reasons.append(f"{family.model_type} has another {', '.join(different)}")
    raise InputError(
        f"A model to export must be of a family that transformers has, got one of none: "
        f"{'; '.join(reasons)}"
    )


def _differences(first: ModelConfig, second: ModelConfig) -> list[str]:
    """Names the fields in which two models compute differently."""
    values = [_computed(config) for config in (first, second)]
    return sorted(name for name in values[0] if values[0][name] != values[1][name])


def _computed(config: ModelConfig) -> dict[str, Any]:
    """Returns what decides a model's results, with defaults filled in and the rest None."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _OF_TRAINING
    }
    values |= {
        "num_kv_heads": config.kv_heads,
        "attention_head_dim": config.head_dim,
        "dense_mlp_dim": config.dense_width if 0 in config.num_experts else None,
    }
    unused = []
    if not config.moe_layers:
        unused += ["mlp_dim", "num_selected_experts", "normalize_gates"]
    if config.position_embedding != "rotary":
        unused += ["rotary_base"]
    if config.position_embedding != "learned":
        unused += ["max_length"]
    return values | dict.fromkeys(unused)
