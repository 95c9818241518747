"""Writes recorded/*.npz with transformers; run it by hand when a model is added.

    python tests/checkpoints/huggingface/record_references.py [NAME...]

It needs torch and transformers (`make test-hf` makes such an environment). Values come from names
and a seed (conftest.random_tensors), so that a file holds nothing but what transformers says.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

# By name, because they are installed nowhere else.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

_spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent / "conftest.py")
assert _spec is not None and _spec.loader is not None
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 10, "intermediate_size": 14}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 5, "intermediate_size": 12}),
    "olmoe": (
        "OlmoeConfig",
        SMALL | {"num_experts": 6, "intermediate_size": 12, "num_experts_per_tok": 3},
    ),
    "olmoe_normalized": (
        "OlmoeConfig",
        SMALL
        | {"num_experts": 4, "intermediate_size": 12, "norm_topk_prob": True}
        | {"attention_bias": True, "num_key_value_heads": 4},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SMALL | EXPERTS | {"shared_expert_intermediate_size": 9, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL
        | EXPERTS
        | {"head_dim": 10, "norm_topk_prob": True, "decoder_sparse_step": 2}
        | {"num_hidden_layers": 4},
    ),
    "qwen3_moe_tied": (
        "Qwen3MoeConfig",
        SMALL | EXPERTS | {"head_dim": 6, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 2, "layer_norm_epsilon": 1e-3},
    ),
}


def record(name: str) -> None:
    config_class, values = MODELS[name]
    config = getattr(transformers, config_class)(**values)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        saved = json.loads((path / "config.json").read_text())
        with safe_open(path / "model.safetensors", "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, it is no dict
        shared.write_directory(path, saved, shared.random_tensors(shapes))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()
    generator = np.random.default_rng(7)
    tokens = generator.integers(3, config.vocab_size, (3, 14)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        continued = model.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()
    about = {
        "config": saved,
        "shapes": shapes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    shared.RECORDED.mkdir(exist_ok=True)
    np.savez_compressed(
        shared.RECORDED / f"{name}.npz",
        about=json.dumps(about),
        tokens=tokens,
        logits=logits.astype(np.float32),
        greedy=continued[:, tokens.shape[1] :].astype(np.int32),
    )
    print(name, logits.std(), continued[:, tokens.shape[1] :].tolist())


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        record(chosen)
