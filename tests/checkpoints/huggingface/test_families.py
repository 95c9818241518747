from __future__ import annotations

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.convert import import_checkpoint
from uncurl_jax.checkpoints.huggingface.families import FAMILIES, find_family
from uncurl_jax.checkpoints.huggingface.family import HfConfig
from uncurl_jax.checkpoints.layout import resolve
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.evaluation.generation import generate
from uncurl_jax.models.architecture import build

TOLERANCE = 1e-4


def logits_of(model, tokens):
    # Compiled as a whole, which takes a third of the time of compiling one operation after another.
    apply = jax.jit(build(model.config).apply)
    return np.asarray(apply({"params": model.params}, tokens))


def model_config(values):
    config = HfConfig(values, "config.json")
    return find_family(config).to_model_config(config, None)


def test_logits_equal_those_of_transformers(name, reference, make_directory, tmp_path):
    expected = reference(name)
    import_checkpoint(make_directory(name), tmp_path / "C")
    model = load_model(tmp_path / "C")
    assert model.config.dtype == "float32"
    np.testing.assert_allclose(
        logits_of(model, expected.tokens), expected.logits, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt2"])
def test_greedy_tokens_with_the_cache_equal_those_of_transformers(name, reference, make_directory):
    expected = reference(name)
    continued = generate(
        load_model(f"hf:{make_directory(name)}"),
        expected.tokens.tolist(),
        max_new_tokens=expected.greedy.shape[1],
        eos_id=-1,
        # Nothing stands before the recorded prompts.
        bos_id=None,
    )
    assert continued == expected.greedy.tolist()


def test_a_directory_itself_is_the_same_model(reference, make_directory):
    expected = reference("qwen3_moe")
    model = load_model(f"hf:{make_directory('qwen3_moe', num_shards=3)}")
    np.testing.assert_allclose(
        logits_of(model, expected.tokens), expected.logits, rtol=0, atol=TOLERANCE
    )


def test_configurations_of_the_hub_mean_the_same_as_those_of_transformers_5(name, reference):
    """Checkpoints on the hub have rope_theta, torch_dtype and num_experts."""
    values = dict(reference(name).config)
    expected = model_config(values)
    if "rope_parameters" in values:
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        values["rope_scaling"] = None
    if values["model_type"] != "mixtral" and "num_local_experts" in values:
        values["num_experts"] = values.pop("num_local_experts")
    values["torch_dtype"] = values.pop("dtype")
    assert model_config(values) == expected


def test_fields_that_are_missing_have_the_defaults_of_transformers():
    """MixtralConfig() and its fields are those of Mixtral-8x7B."""
    small = {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096}
    small |= {"intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32}
    config = model_config({**small, "num_experts_per_tok": 2})
    assert config.num_experts == (8, 8)
    assert config.kv_heads == 8
    assert config.rotary_base == 1e6
    assert config.norm_epsilon == 1e-5
    assert config.max_length == 131072
    assert (
        model_config({**small, "num_experts_per_tok": 2, "num_key_value_heads": None}).kv_heads
        == 32
    )


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({}, (6, 6, 6, 6)),
        ({"decoder_sparse_step": 2}, (0, 6, 0, 6)),
        ({"mlp_only_layers": [0, 2]}, (0, 6, 0, 6)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (0, 0, 0, 6)),
    ],
)
def test_layers_without_experts_are_where_transformers_has_them(fields, counts, reference):
    values = reference("qwen3_moe").config | {"decoder_sparse_step": 1, **fields}
    assert model_config(values).num_experts == counts


REFUSED = [
    ("mixtral", {"sliding_window": 32}, "sliding_window must be null or at least .* 64, got 32"),
    ("mixtral", {"sliding_window": "all"}, "sliding_window must be a positive integer"),
    ("mixtral", {"rope_scaling": {"type": "yarn"}}, "rope_scaling must be of type default"),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        "rope_parameters must be of type default",
    ),
    ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "--max_length 8"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv must be None, got 8.0 in config.json: models that clip"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act must be silu .* got 'gelu'"),
    ("qwen2_moe", {"quantization_config": {"quant_method": "fp8"}}, "take the original one"),
    ("qwen2_moe", {"architectures": ["Qwen2MoeForSequenceClassification"]}, "with that head"),
    ("qwen2_moe", {"num_experts": "six"}, "num_experts must be a positive integer, got 'six'"),
    ("qwen2_moe", {"hidden_size": None}, "hidden_size must be a positive integer, got None"),
    ("qwen2_moe", {"mlp_only_layers": "1"}, "mlp_only_layers must be a list of layers"),
    ("qwen2_moe", {"num_attention_heads": 5}, "num_heads must divide embed_dim"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function must be gelu_new"),
    ("gpt2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ("mixtral", {"rms_norm_eps": -1}, "rms_norm_eps must be a number of at least 0, got -1"),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), REFUSED)
def test_what_our_decoder_does_not_have_is_refused(name, fields, sentence, reference):
    with pytest.raises(ValueError, match=sentence):
        model_config(reference(name).config | fields)


def test_unknown_families_are_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"mixtral, olmoe.*got 'mixtrall'.*nearest is mixtral"):
        model_config({"model_type": "mixtrall"})
    with pytest.raises(ValueError, match=r"one of mixtral.*got None in config.json"):
        model_config({})
    for name in FAMILIES:
        with pytest.raises(ValueError, match=r"must be|must hold"):
            model_config({"model_type": name, "vocab_size": -1, "n_embd": 0, "hidden_size": 0})


def test_a_long_sequence_is_refused_and_a_short_one_taken(reference, make_directory):
    from uncurl_jax.checkpoints.huggingface import checkpoint

    path = make_directory("olmoe")
    assert checkpoint.resolve(path, 16).model_config().max_length == 16
    with pytest.raises(ValueError, match=r"between 1 and .* got 65 for 64"):
        checkpoint.resolve(path, 65).model_config()
    with pytest.raises(ValueError, match="cannot shorten learned positions"):
        checkpoint.resolve(make_directory("gpt2"), 16).model_config()
    assert resolve(f"hf:{path}").model_config().max_length == 64
