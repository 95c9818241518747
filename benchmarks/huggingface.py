"""Streams a synthetic Qwen3-30B-A3B through import, calibration, plan, prune and export.

    python benchmarks/huggingface.py --layers 12 --dir /scratch --out benchmarks/results/FILE.json

Every stage is the command a user would give, in a process of its own; its memory is the resident
set of it and of all its children together, looked at every 20 ms. Weights are random bfloat16 in
the shapes of the published config.json; --layers takes fewer than its 48 where the disk has no room
for a directory, the imported copy and what is made of them (2.6 times the directory). The directory
and everything made from it are removed in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from environment import describe

from uncurl_jax.checkpoints.huggingface.families import FAMILIES
from uncurl_jax.checkpoints.huggingface.family import HfConfig
from uncurl_jax.checkpoints.huggingface.tensor_files import (
    TensorSpec,
    TensorWriter,
    create_file,
    shards,
)

# huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHARD_BYTES = 4 * 10**9
# Random numbers are drawn once; a tensor is a stretch of them that begins anywhere.
POOL = 2**26
NUM_WORDS = 4000


def write_directory(path: Path, num_layers: int) -> int:
    """Writes the synthetic directory; returns the bytes of its tensors."""
    config = QWEN3_30B_A3B | {"num_hidden_layers": num_layers}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    family = FAMILIES["qwen3_moe"]
    model = family.to_model_config(HfConfig(config, "config.json"), None)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes = {entry.tensor: entry.shape for entry in family.entries(model)}
    specs = [TensorSpec(name, bfloat16, shape) for name, shape in sorted(shapes.items())]
    generator = np.random.default_rng(0)
    pool = (0.02 * generator.standard_normal(POOL, dtype=np.float32)).astype(bfloat16)
    groups = shards(specs, SHARD_BYTES)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        writer = TensorWriter(create_file(path / name, group))
        for spec in group:
            writer.write(spec.name, _random(spec, pool, generator))
            weight_map[spec.name] = name
        writer.sync()
        writer.close()
    total = sum(spec.num_bytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(path)
    return total


def _random(spec: TensorSpec, pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    size = int(np.prod(spec.shape))
    if len(spec.shape) == 1:
        return np.ones(spec.shape, pool.dtype)
    start = int(generator.integers(0, len(pool)))
    return np.resize(np.roll(pool, -start), size).reshape(spec.shape)


def _write_tokenizer(path: Path) -> None:
    words = ("<unk>", "<pad>", "<end>", *(f"w{number}" for number in range(NUM_WORDS)))
    ids = {word: place for place, word in enumerate(words)}
    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def write_task(path: Path, num_tokens: int) -> None:
    """Writes CommitmentBank rows of random words, about as many as asked for."""
    generator = np.random.default_rng(1)
    (path / "CB").mkdir(parents=True)
    labels = ("entailment", "contradiction", "neutral")
    for split in ("train", "val"):
        rows = [
            {
                "premise": " ".join(f"w{n}" for n in generator.integers(0, NUM_WORDS, 100)),
                "hypothesis": " ".join(f"w{n}" for n in generator.integers(0, NUM_WORDS, 20)),
                "label": labels[number % 3],
                "idx": number,
            }
            for number in range(max(1, num_tokens // 128))
        ]
        (path / "CB" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


class Watch(threading.Thread):
    """Looks at the memory of a process and of its children until it ends."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid = pid
        self._is_over = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._is_over.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident, _tree(self._pid))))

    def stop(self) -> None:
        self._is_over.set()
        self.join()


def _tree(pid: int) -> list[int]:
    found = [pid]
    for place in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{place}/task"):
                text = Path(f"/proc/{place}/task/{task}/children").read_text()
                found += [int(child) for child in text.split()]
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return 0


def run_stage(name: str, arguments: str, root: Path) -> dict[str, Any]:
    """Runs a command below `root` and returns what it took."""
    print(f"{name}: uncurl {arguments}", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "uncurl_jax.cli", *arguments.split()],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    watch = Watch(process.pid)
    watch.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - start
    watch.stop()
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}")
    result = json.loads(out)
    kept = ("bytes", "parameters", "parts", "workers", "tokens", "fingerprint", "verified")
    return {
        "stage": name,
        "command": f"uncurl {arguments}",
        "seconds": round(seconds, 1),
        "peak_resident_bytes": watch.peak_bytes,
        **{key: result[key] for key in kept if key in result},
    }


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every weight file, read in blocks."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Does the whole job in a temporary directory."""
    count = arguments.num_experts
    with tempfile.TemporaryDirectory(prefix="uncurl_hf_", dir=arguments.dir) as folder:
        root = Path(folder)
        start = time.monotonic()
        num_bytes = write_directory(root / "hf", arguments.layers)
        made_in = round(time.monotonic() - start, 1)
        write_task(root / "data", arguments.tokens)
        stages = [
            run_stage("import", "import --from_hf hf --max_length 512 --out C", root),
            run_stage(
                "cache",
                "cache --task cb --data_dir data --vocabulary hf --max_length 160 --out cache",
                root,
            ),
            run_stage(
                "calibrate",
                "calibrate --layer_by_layer --checkpoint hf:hf --task cache --out s.npz",
                root,
            ),
            run_stage("plan", f"plan --statistics s.npz --num_experts {count} --out p.json", root),
            run_stage("prune", "prune --checkpoint C --plan p.json --out P", root),
        ]
        shutil.rmtree(root / "C")
        stages.append(run_stage("export", "export --checkpoint P --format hf --out long", root))
        shutil.rmtree(root / "P")
        stages.append(
            run_stage(
                "prune from directory to directory",
                "prune --checkpoint hf:hf --plan p.json --format hf --out direct",
                root,
            )
        )
        hashes = file_hashes(root / "direct")
        is_same = hashes == file_hashes(root / "long")
        sizes = {
            name: sum(file.stat().st_size for file in (root / name).glob("*.safetensors"))
            for name in ("hf", "direct")
        }
    return {
        **describe(("jax", "numpy", "orbax-checkpoint", "tensorstore", "tokenizers")),
        "model": {
            "shape": "Qwen3-30B-A3B, random bfloat16",
            "layers": arguments.layers,
            "layers_of_the_model": QWEN3_30B_A3B["num_hidden_layers"],
            "bytes": num_bytes,
            "num_experts": {"before": QWEN3_30B_A3B["num_experts"], "after": count},
        },
        "directory_made_in_seconds": made_in,
        "weight_file_bytes": {"before": sizes["hf"], "after": sizes["direct"]},
        "both_ways_give_the_same_files": is_same,
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--num_experts", type=int, default=64, help="afterwards")
    parser.add_argument("--tokens", type=int, default=2048, help="to calibrate on")
    parser.add_argument("--dir", help="where the files lie meanwhile")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    Path(arguments.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
