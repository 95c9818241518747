"""Tiny Hugging Face checkpoints: config.json and names from transformers, values from a seed.

recorded/<name>.npz holds what transformers made of each; record_references.py writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

RECORDED = Path(__file__).parent / "recorded"


class Reference(NamedTuple):
    """A model and what transformers computes with it in float32."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tokens: np.ndarray  # [b, l] int32
    logits: np.ndarray  # [b, l, vocab] float32
    greedy: np.ndarray  # [b, n] int32, the most likely continuation of each row


def load_reference(name: str) -> Reference:
    with np.load(RECORDED / f"{name}.npz", allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        shapes = {key: tuple(shape) for key, shape in about["shapes"].items()}
        return Reference(about["config"], shapes, file["tokens"], file["logits"], file["greedy"])


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each tensor depends on its name and the seed alone."""
    tensors = {}
    for name, shape in shapes.items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        values = np.random.default_rng(list(digest)).standard_normal(shape)
        is_norm = len(shape) == 1 and name.endswith("weight")
        # Large enough that routers, attention and activations are far from linear.
        tensors[name] = (1 + 0.3 * values if is_norm else 0.4 * values).astype(dtype)
    return tensors


def write_directory(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_shards: int = 1,
) -> Path:
    """Writes a checkpoint directory as the format's own library has it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)))
    if num_shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::num_shards]}
        save_file(part, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


# Of the tiny tokenizer: ids 3 and above.
WORDS = ("a", *"bcdefghijklmnop", *(f"w{number}" for number in range(42)))


def write_tokenizer(path: Path, *, has_bos: bool = True, num_words: int = len(WORDS)) -> None:
    """A word-level tokenizer: 0 unknown, 1 begins a text (if has_bos), 2 ends it."""
    ids = {word: place for place, word in enumerate(("<unk>", "<s>", "</s>", *WORDS[:num_words]))}
    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if has_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


NAMES = sorted(file.stem for file in RECORDED.glob("*.npz"))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every recorded model in turn."""
    return request.param


@pytest.fixture
def reference() -> Callable[[str], Reference]:
    """Returns reference(name)."""
    return load_reference


@pytest.fixture
def make_directory(tmp_path) -> Callable[..., Path]:
    """Returns make_directory(name, dtype="float32", ...): a new directory with a tokenizer."""

    def make(
        name: str,
        *,
        dtype: str = "float32",
        seed: int = 0,
        num_shards: int = 1,
        has_bos: bool = True,
        **changes: Any,
    ) -> Path:
        found = load_reference(name)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        tensors = random_tensors(found.shapes, kind, seed)
        config = {**found.config, "dtype": dtype, **changes}
        path = write_directory(tmp_path / f"hf_{name}", config, tensors, num_shards=num_shards)
        write_tokenizer(path, has_bos=has_bos)
        return path

    return make
