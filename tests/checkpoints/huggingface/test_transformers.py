"""Live against transformers: what we read is what it reads, and what we write it loads."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import warnings
from typing import Any

import numpy as np
import pytest

from uncurl_jax.checkpoints.convert import export_checkpoint, import_checkpoint
from uncurl_jax.checkpoints.layout import fingerprint, resolve
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.data.huggingface_vocabulary import HuggingFaceVocabulary
from uncurl_jax.evaluation.generation import generate
from uncurl_jax.models.architecture import build

TOLERANCE = 1e-4
MOE = ["mixtral", "olmoe", "olmoe_normalized", "qwen2_moe", "qwen3_moe", "qwen3_moe_tied"]

_IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(not _IS_INSTALLED, reason="needs torch and transformers: make test-hf"),
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        # Of their own imports.
        warnings.simplefilter("ignore")
        return importlib.import_module("transformers")


@pytest.fixture
def theirs(transformers):
    """Returns theirs(directory): the model as transformers loads it, with nothing left over."""
    import torch  # pyright: ignore[reportMissingImports]

    def load(directory) -> Any:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not found[problem], found
        return model.eval()

    return load


@pytest.fixture
def assert_same_model(theirs):
    """Returns assert_same_model(directory, checkpoint): logits and greedy tokens are the same."""
    import torch  # pyright: ignore[reportMissingImports]

    def check(directory, checkpoint, seed: int = 5) -> None:
        model, expected = load_model(checkpoint), theirs(directory)
        config = dataclasses.replace(model.config, dtype="float32", eval_capacity_factor=None)
        model = model._replace(config=config)
        tokens = np.random.default_rng(seed).integers(3, config.vocab_size, (4, 10))
        ids = torch.tensor(tokens)
        with torch.no_grad():
            logits = expected(ids).logits.numpy()
            continued = expected.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=None,
                pad_token_id=0,
            ).numpy()
        ours = build(config).apply({"params": model.params}, tokens.astype(np.int32))
        np.testing.assert_allclose(np.asarray(ours), logits, rtol=0, atol=TOLERANCE)
        made = generate(model, tokens.tolist(), max_new_tokens=8, eos_id=-1, bos_id=None)
        assert made == continued[:, 10:].tolist()

    return check


def size_of(directory) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_every_family_computes_the_same(name, make_directory, assert_same_model):
    directory = make_directory(name, seed=11)
    assert_same_model(directory, f"hf:{directory}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MOE)
def test_pruned_directories_load_and_compute_what_we_compute(
    name, dtype, make_directory, plan_for, assert_same_model, tmp_path
):
    source = make_directory(name, dtype=dtype, seed=12, num_shards=2)
    config = resolve(f"hf:{source}").model_config()
    layers = {
        layer: [z % 3 for z in range(config.num_experts[layer])] for layer in config.moe_layers
    }
    plan = plan_for(f"hf:{source}", layers)
    out = tmp_path / "pruned"
    prune_checkpoint(f"hf:{source}", plan, out, file_format="hf", max_shard_bytes=30_000)
    assert size_of(out) < 0.9 * size_of(source)
    assert_same_model(out, f"hf:{out}")
    # And the long way gives a checkpoint of ours with the same results.
    import_checkpoint(source, tmp_path / "C")
    prune_checkpoint(tmp_path / "C", plan, tmp_path / "P")
    assert_same_model(out, tmp_path / "P")


def test_what_transformers_saves_itself_is_read(name, make_directory, theirs, tmp_path):
    """In both of its layouts: a tensor for each expert's projection, or a layer's experts fused."""
    source = make_directory(name, dtype="float32")
    model = theirs(source)
    for is_original in (True, False):
        saved = tmp_path / f"saved_{is_original}"
        model.save_pretrained(saved, save_original_format=is_original, max_shard_size="40KB")
        assert fingerprint(f"hf:{saved}") == fingerprint(f"hf:{source}")
        if is_original:
            assert resolve(f"hf:{saved}").model_config() == resolve(f"hf:{source}").model_config()


def test_the_tokenizer_begins_and_ends_texts_as_ours_does(make_directory, transformers, tmp_path):
    for has_bos in (True, False):
        source = make_directory("mixtral", has_bos=has_bos)
        import_checkpoint(source, tmp_path / f"C{has_bos}")
        export_checkpoint(tmp_path / f"C{has_bos}", tmp_path / f"out{has_bos}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"out{has_bos}")
        ours = HuggingFaceVocabulary(tmp_path / f"C{has_bos}" / "huggingface")
        text = "w1 c a w7"
        begin = [] if ours.bos_id is None else [ours.bos_id]
        assert tokenizer(text).input_ids == begin + ours.encode(text)
        assert (ours.bos_id is not None) == has_bos
        assert tokenizer.eos_token_id == ours.eos_id


def test_our_own_models_load_there(
    tmp_path, config, make_params, save_checkpoint, assert_same_model
):
    gpt2 = dataclasses.replace(config, num_experts=(0, 0), vocab_size=40, max_length=24)
    llama_like = dataclasses.replace(
        gpt2,
        num_experts=(4, 0),
        num_selected_experts=2,
        is_gated=True,
        activation="silu",
        has_mlp_bias=False,
        position_embedding="rotary",
        norm="rms_norm",
        qk_norm="head",
        num_kv_heads=1,
        attention_bias="none",
        has_tied_embeddings=False,
    )
    for name, model, expected in (("a", gpt2, "gpt2"), ("b", llama_like, "qwen3_moe")):
        save_checkpoint(tmp_path / name, model)
        export_checkpoint(tmp_path / name, tmp_path / f"{name}_hf")
        written = json.loads((tmp_path / f"{name}_hf" / "config.json").read_text())
        assert written["model_type"] == expected
        assert_same_model(tmp_path / f"{name}_hf", tmp_path / name)
