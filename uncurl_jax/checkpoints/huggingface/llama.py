"""What Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE have in common: Llama's decoder, with experts.

Fields and tensors are named as in transformers (`models/*/configuration_*.py`, `modeling_*.py`),
whose defaults for missing fields are given here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from uncurl_jax.checkpoints.huggingface.family import Entry, HfConfig
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
_HF_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu_pytorch_tanh"}
# A buffer that older versions of transformers saved.
IGNORED = (".rotary_emb.inv_freq",)


def activation(config: HfConfig) -> str:
    """Returns the activation; InputError for one that the decoder does not have."""
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise config.refuse(
            "hidden_act", " or ".join(_ACTIVATIONS), "models with another are not read"
        )
    return _ACTIVATIONS[name]


def sequence_length(config: HfConfig, max_length: int | None, default: int) -> int:
    """Returns the longest sequence: the model's, or a shorter one that is wanted."""
    own = config.integer("max_position_embeddings", default)
    if max_length is None:
        return own
    if not 1 <= max_length <= own:
        raise InputError(
            f"--max_length must be between 1 and the model's max_position_embeddings, got "
            f"{max_length} for {own} in {config.where}: lower it."
        )
    return max_length


def rotary_base(config: HfConfig, default: float) -> float:
    """Returns the base of rotary positions; InputError for scaled or partial ones.

    Checkpoints have rope_theta and rope_scaling; transformers 5 writes rope_parameters.
    """
    parameters = config.get("rope_parameters", {})
    scaling = config.get("rope_scaling", {})
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else "unknown"
        if kind not in (None, "default"):
            raise config.refuse(
                name, "of type default", "models with scaled rotary positions are not read"
            )
    for fields in (config.values, parameters):
        if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise InputError(
                f"partial_rotary_factor must be 1, got {fields['partial_rotary_factor']} in "
                f"{config.where}: models that rotate a part of each head are not read."
            )
    nested = HfConfig(parameters, f"rope_parameters of {config.where}")
    return nested.number("rope_theta", config.number("rope_theta", default))


def check_window(config: HfConfig, name: str, length: int) -> None:
    """Refuses attention that sees less than the whole sequence."""
    if config.get(name) is None:
        return
    window = config.integer(name)
    if window < length:
        raise config.refuse(
            name,
            f"null or at least the sequence length {length}",
            f"import it with --max_length {window}, up to which attention sees everything",
        )


def common_fields(
    config: HfConfig,
    max_length: int,
    *,
    num_experts: tuple[int, ...],
    kv_heads_default: int | None = None,
    base_default: float = 10000.0,
    epsilon_default: float = 1e-6,
) -> dict[str, Any]:
    """Returns the fields of our configuration that all of these families have alike."""
    embed_dim, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.get("head_dim")
    # A field that is there and null means as many as heads; a missing one the family's default.
    is_missing = "num_key_value_heads" not in config.values and kv_heads_default is not None
    kv_heads = kv_heads_default if is_missing else config.integer("num_key_value_heads", num_heads)
    return {
        "num_experts": num_experts,
        "vocab_size": config.integer("vocab_size"),
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "attention_head_dim": None if head_dim is None else config.integer("head_dim"),
        "max_length": max_length,
        "num_selected_experts": config.integer("num_experts_per_tok"),
        # transformers, and what serves its checkpoints, drops no token.
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "auxiliary_loss_weight": config.number("router_aux_loss_coef", 0.001),
        "is_gated": True,
        "activation": activation(config),
        "has_mlp_bias": False,
        "position_embedding": "rotary",
        "rotary_base": rotary_base(config, base_default),
        "norm": "rms_norm",
        "has_tied_embeddings": config.flag("tie_word_embeddings", False),
        "init_stddev": config.number("initializer_range", 0.02),
        "norm_epsilon": config.number("rms_norm_eps", epsilon_default),
        "dtype": compute_dtype(config),
    }


def compute_dtype(config: HfConfig) -> str:
    """Returns "bfloat16" for checkpoints in it, else "float32", which holds float16 too."""
    name = config.get("dtype", config.get("torch_dtype", "float32"))
    return "bfloat16" if name == "bfloat16" else "float32"


def common_hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of config.json that all of these families have alike."""
    fields = {
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "hidden_size": config.embed_dim,
        "initializer_range": config.init_stddev,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_selected_experts,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "router_aux_loss_coef": config.auxiliary_loss_weight,
        "tie_word_embeddings": config.has_tied_embeddings,
        "vocab_size": config.vocab_size,
    }
    if config.attention_head_dim is not None:
        fields["head_dim"] = config.attention_head_dim
    return fields


def one_count(config: ModelConfig, field: str) -> int:
    """Returns the number of experts of every MoE layer; InputError if layers differ.

    Args:
      config: the model.
      field: of config.json, which has room for one number.
    """
    counts = sorted({count for count in config.num_experts if count})
    if len(counts) != 1:
        raise InputError(
            f"{field} of config.json is one number for all layers, got num_experts "
            f"{list(config.num_experts)}: plan with a uniform count, as --num_experts "
            f"{counts[0] if counts else 8}, or keep this package's own format."
        )
    return counts[0]


class MoeNames(NamedTuple):
    """Names of a layer's MoE block in checkpoints.

    Attributes:
      block: of the block, after "model.layers.N.".
      gate: projection of an expert that goes through the activation.
      up: the one that is multiplied with it.
      down: back to the residual stream.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


QWEN_NAMES = MoeNames()


def entries(config: ModelConfig, names: MoeNames = QWEN_NAMES) -> Iterator[Entry]:
    """Yields where the parameters are, with a tensor for each projection of each expert."""
    yield from _around_experts(config, names.block)
    dim, mlp = config.embed_dim, config.mlp_dim
    for layer in config.moe_layers:
        experts = f"model.layers.{layer}.{names.block}.experts"
        for expert in range(config.num_experts[layer]):
            for ours, theirs, shape in (
                ("wg", names.gate, (mlp, dim)),
                ("wi", names.up, (mlp, dim)),
                ("wo", names.down, (dim, mlp)),
            ):
                yield Entry(
                    f"layers_{layer}/moe/experts/{ours}",
                    f"{experts}.{expert}.{theirs}.weight",
                    shape,
                    expert,
                    is_transposed=True,
                )


def fused_entries(config: ModelConfig) -> Iterator[Entry]:
    """Yields the same where a layer's experts are two tensors, as transformers 5 has them."""
    yield from _around_experts(config, "mlp")
    dim, mlp = config.embed_dim, config.mlp_dim
    for layer in config.moe_layers:
        experts, count = f"model.layers.{layer}.mlp.experts", config.num_experts[layer]
        for expert in range(count):
            one = slice(expert, expert + 1)
            for ours, theirs, shape, part in (
                ("wg", "gate_up_proj", (count, 2 * mlp, dim), (one, slice(0, mlp))),
                ("wi", "gate_up_proj", (count, 2 * mlp, dim), (one, slice(mlp, 2 * mlp))),
                ("wo", "down_proj", (count, dim, mlp), (one,)),
            ):
                yield Entry(
                    f"layers_{layer}/moe/experts/{ours}",
                    f"{experts}.{theirs}",
                    shape,
                    expert,
                    part,
                    is_transposed=True,
                )


def _around_experts(config: ModelConfig, block: str) -> Iterator[Entry]:
    """Yields everything but the experts; `block` is the MoE block's name."""
    dim = config.embed_dim
    yield Entry("token_embedder/embedding", "model.embed_tokens.weight", (config.vocab_size, dim))
    if not config.has_tied_embeddings:
        yield Entry("output_embedder/embedding", "lm_head.weight", (config.vocab_size, dim))
    yield Entry("final_norm/scale", "model.norm.weight", (dim,))
    for layer, count in enumerate(config.num_experts):
        ours, theirs = f"layers_{layer}", f"model.layers.{layer}"
        for norm, name in (
            ("pre_attention_norm", "input_layernorm"),
            ("pre_mlp_norm", "post_attention_layernorm"),
        ):
            yield Entry(f"{ours}/{norm}/scale", f"{theirs}.{name}.weight", (dim,))
        yield from _attention(config, f"{ours}/attention", f"{theirs}.self_attn")
        if not count:
            yield from _mlp(f"{ours}/mlp", f"{theirs}.mlp", dim, config.dense_width)
            continue
        router = f"{ours}/moe/router/kernel"
        width = config.router_width(layer)
        yield Entry(router, f"{theirs}.{block}.gate.weight", (width, dim), is_transposed=True)
        if config.shared_mlp_dim:
            shared = f"{theirs}.{block}.shared_expert"
            yield from _mlp(f"{ours}/moe/shared", shared, dim, config.shared_mlp_dim)
        if config.has_shared_gate:
            gate = f"{theirs}.{block}.shared_expert_gate.weight"
            yield Entry(f"{ours}/moe/shared_gate/kernel", gate, (1, dim), is_transposed=True)


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    dim, head_dim = config.embed_dim, config.head_dim
    heads = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    for name, count in heads.items():
        width, letter = count * head_dim, name[0]
        projection = f"{theirs}.{letter}_proj"
        yield Entry(
            f"{ours}/{name}/kernel", f"{projection}.weight", (width, dim), is_transposed=True
        )
        if config.attention_bias != "none":
            yield Entry(f"{ours}/{name}/bias", f"{projection}.bias", (width,))
        if config.qk_norm != "none" and name != "value":
            normed = head_dim if config.qk_norm == "head" else width
            yield Entry(f"{ours}/{name}_norm/scale", f"{theirs}.{letter}_norm.weight", (normed,))
    shape = (dim, config.num_heads * head_dim)
    yield Entry(f"{ours}/out/kernel", f"{theirs}.o_proj.weight", shape, is_transposed=True)
    if config.attention_bias == "all":
        yield Entry(f"{ours}/out/bias", f"{theirs}.o_proj.bias", (dim,))


def _mlp(ours: str, theirs: str, dim: int, mlp: int) -> Iterator[Entry]:
    for name, projection, shape in (
        ("wg", "gate_proj", (mlp, dim)),
        ("wi", "up_proj", (mlp, dim)),
        ("wo", "down_proj", (dim, mlp)),
    ):
        yield Entry(
            f"{ours}/{name}/kernel", f"{theirs}.{projection}.weight", shape, is_transposed=True
        )
