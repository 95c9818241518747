"""Encoder-decoders that transformers can compute too: their parameters, inputs and results.

    python tests/models/switch_reference.py [NAME...]

writes recorded/switch_<name>.npz with torch and transformers (`make test-hf` makes such an
environment). Parameters come from their names and a seed, so that a file holds nothing but what
transformers says. Tests load this file by its path.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.config import ModelConfig

RECORDED = Path(__file__).parent / "recorded"
NEW_TOKENS = 9
END = 1

# T5.1.0 as the published Switch checkpoints have it: ReLU, tied embeddings.
RELU = ModelConfig(
    num_experts=(0, 4, 0, 4, 0, 4, 0, 4),
    num_encoder_layers=4,
    vocab_size=53,
    embed_dim=20,
    num_heads=4,
    attention_head_dim=6,
    mlp_dim=14,
    max_length=24,
    capacity_factor=None,
    eval_capacity_factor=None,
    activation="relu",
    has_mlp_bias=False,
    position_embedding="relative",
    relative_buckets=8,
    relative_max_distance=14,
    norm="rms_norm",
    attention_bias="none",
    attention_scale=1.0,
    has_scaled_logits=True,
    encoder_end_id=END,
    norm_epsilon=1e-3,
    dtype="float32",
)
CONFIGS = {
    "relu": RELU,
    # T5.1.1's networks and output projection in stacks of unequal depth, pruned unevenly.
    "gated_gelu": dataclasses.replace(
        RELU,
        num_experts=(3, 5, 0, 2, 0),
        num_encoder_layers=2,
        is_gated=True,
        activation="gelu",
        has_tied_embeddings=False,
        has_scaled_logits=False,
        relative_buckets=32,
        relative_max_distance=128,
        max_length=40,
    ),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter by its name; each depends on its name and the seed alone."""
    params = {}
    for name, shape in expected_parameters(config).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        values = np.random.default_rng(list(digest)).standard_normal(shape)
        scale = 0.3 if config.is_gated else 0.4
        scale = {"scale": 0.3, "embedding": 1.0}.get(name.rsplit("/", 1)[-1], scale)
        scale = 0.3 if name == "output_embedder/embedding" else scale
        values = 1 + scale * values if name.endswith("scale") else scale * values
        params[name] = values.astype(np.float32)
    return params


def nested(params: dict[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def make_inputs(config: ModelConfig) -> dict[str, np.ndarray]:
    """Prompts and answers of unequal lengths, filled up with padding on the right."""
    generator = np.random.default_rng(5)
    length = config.max_length - 4
    prompt_lengths, answer_lengths = np.asarray([length, 3, 9]), np.asarray([4, 11, 7])

    def rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask = np.arange(lengths.max()) < lengths[:, None]
        tokens = generator.integers(2, config.vocab_size, mask.shape)
        return np.where(mask, tokens, 0).astype(np.int32), mask

    prompt, prompt_mask = rows(prompt_lengths)
    answer, answer_mask = rows(answer_lengths)
    return {
        "prompt": prompt,
        "prompt_mask": prompt_mask,
        "inputs": np.pad(answer[:, :-1], ((0, 0), (1, 0))),
        "mask": answer_mask,
    }


def hugging_face_tensors(
    config: ModelConfig, params: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of `SwitchTransformersForConditionalGeneration`, by their names there."""
    tensors = {"shared.weight": params["token_embedder/embedding"]}
    if not config.has_tied_embeddings:
        tensors["lm_head.weight"] = params["output_embedder/embedding"]
    norms = {"encoder": "encoder_norm", "decoder": "final_norm"}
    for stack, norm in norms.items():
        tensors[f"{stack}.final_layer_norm.weight"] = params[f"{norm}/scale"]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors[bias] = params[f"{stack}_relative_position/embedding"]
    networks = {"wg": "wi_0", "wi": "wi_1", "wo": "wo"} if config.is_gated else {"wi": "wi"}
    networks |= {"wo": "wo"}
    for layer, count in enumerate(config.num_experts):
        is_encoder = layer < config.num_encoder_layers
        place = layer - (0 if is_encoder else config.num_encoder_layers)
        block = f"{'encoder' if is_encoder else 'decoder'}.block.{place}.layer"
        attentions = {"attention": ("0.SelfAttention", "pre_attention_norm", 0)}
        if not is_encoder:
            attentions["cross_attention"] = ("1.EncDecAttention", "pre_cross_attention_norm", 1)
        last = len(attentions)
        tensors[f"{block}.{last}.layer_norm.weight"] = params[f"layers_{layer}/pre_mlp_norm/scale"]
        for ours, (theirs, norm, number) in attentions.items():
            tensors[f"{block}.{number}.layer_norm.weight"] = params[f"layers_{layer}/{norm}/scale"]
            for name, letter in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
                kernel = params[f"layers_{layer}/{ours}/{name}/kernel"]
                # [embed, heads, head_dim] or [heads, head_dim, embed] as a matrix.
                matrix = kernel.reshape(
                    (config.embed_dim, -1) if name != "out" else (-1, config.embed_dim)
                )
                tensors[f"{block}.{theirs}.{letter}.weight"] = matrix.T
        mlp = f"{block}.{last}.mlp"
        if not count:
            for ours, theirs in networks.items():
                tensors[f"{mlp}.{theirs}.weight"] = params[f"layers_{layer}/mlp/{ours}/kernel"].T
            continue
        moe = f"layers_{layer}/moe"
        tensors[f"{mlp}.router.classifier.weight"] = params[f"{moe}/router/kernel"].T
        for expert in range(count):
            for ours, theirs in networks.items():
                kernel = params[f"{moe}/experts/{ours}"][expert]
                tensors[f"{mlp}.experts.expert_{expert}.{theirs}.weight"] = kernel.T
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def transformers_model(config: ModelConfig) -> Any:
    """Builds transformers' model with random parameters; needs torch.

    Its configuration has one number of experts and no gated networks: routers, experts and T5's
    gated networks are put in where a model differs.
    """
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.models.switch_transformers import modeling_switch_transformers as switch
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    num_decoder_layers = config.num_layers - config.num_encoder_layers
    theirs = SwitchTransformersConfig(
        vocab_size=config.vocab_size,
        d_model=config.embed_dim,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        expert_capacity=1000,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        num_sparse_encoder_layers=config.num_encoder_layers // 2,
        num_sparse_decoder_layers=num_decoder_layers // 2,
        num_heads=config.num_heads,
        num_experts=max(config.num_experts),
        relative_attention_num_buckets=config.relative_buckets,
        relative_attention_max_distance=config.relative_max_distance,
        layer_norm_epsilon=config.norm_epsilon,
        dense_act_fn={"relu": "relu", "gelu": "gelu_new"}[config.activation],
        tie_word_embeddings=config.has_tied_embeddings,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(theirs)
    blocks = [*model.encoder.block, *model.decoder.block]
    for block, count in zip(blocks, config.num_experts, strict=True):
        network = block.layer[-1]
        if config.is_gated or count != (max(config.num_experts) if network.is_sparse else 0):
            theirs.num_experts = max(count, 1)
            kind = switch.SwitchTransformersSparseMLP if count else T5DenseGatedActDense
            network.mlp = kind(theirs)
            for expert in range(count if config.is_gated else 0):
                network.mlp.experts[f"expert_{expert}"] = T5DenseGatedActDense(theirs)
    tensors = hugging_face_tensors(config, random_params(config))
    if not config.has_tied_embeddings:
        # Then the stacks' embeddings are tensors of their own, which in T5 are one.
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"]
    missing = model.load_state_dict(
        {name: torch.tensor(array) for name, array in tensors.items()}, strict=False
    )
    model.tie_weights()
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    expected = tied if config.has_tied_embeddings else set()
    assert not missing.unexpected_keys and set(missing.missing_keys) == expected, missing
    return model.eval()


def transformers_results(config: ModelConfig) -> dict[str, np.ndarray]:
    """Logits, router logits of every layer and greedy answers; needs torch."""
    import torch

    model, inputs = transformers_model(config), make_inputs(config)
    observed: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda *call: observed.append(call[2][2].numpy()))
        for name, module in model.named_modules()
        if name.endswith(".router")
    ]
    prompt = {
        "input_ids": torch.tensor(inputs["prompt"], dtype=torch.long),
        "attention_mask": torch.tensor(inputs["prompt_mask"], dtype=torch.long),
    }
    with torch.no_grad():
        logits = model(
            **prompt, decoder_input_ids=torch.tensor(inputs["inputs"], dtype=torch.long)
        ).logits.numpy()
        for hook in hooks:
            hook.remove()
        # What an encoder reads ends with the end of the text, as in T5.
        rows = [[*row, END] for row in prompts(inputs)]
        width = max(map(len, rows))
        padded = [row + [0] * (width - len(row)) for row in rows]
        masks = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        answers = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(masks),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=END,
            pad_token_id=0,
            # Its cache has room for as many layers as the encoder has.
            use_cache=False,
        )[:, 1:].numpy()
    routers = zip(config.moe_layers, observed, strict=True)
    return {
        "logits": logits,
        "greedy": _filled(answers),
        **{f"router_logits_{layer}": values for layer, values in routers},
    }


def prompts(inputs: dict[str, np.ndarray]) -> list[list[int]]:
    """The prompts without padding."""
    pairs = zip(inputs["prompt"], inputs["prompt_mask"], strict=True)
    return [row[mask].tolist() for row, mask in pairs]


def _filled(answers: np.ndarray) -> np.ndarray:
    """[b, NEW_TOKENS] int32, zeros from the end of the text on."""
    answers = np.pad(answers, ((0, 0), (0, NEW_TOKENS - answers.shape[1])))
    ended = np.cumsum(answers == END, axis=1) > 0
    return np.where(ended, 0, answers).astype(np.int32)


def load(name: str) -> dict[str, np.ndarray]:
    """Returns what `transformers_results` gave when it was recorded."""
    with np.load(RECORDED / f"switch_{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files if key != "about"}


def record(name: str) -> None:
    import torch
    import transformers

    results = transformers_results(CONFIGS[name])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RECORDED.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {**results, "about": json.dumps({"versions": versions})}
    np.savez_compressed(RECORDED / f"switch_{name}.npz", **arrays)
    print(name, results["logits"].std(), results["greedy"].tolist())


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CONFIGS:
        record(chosen)
