"""Measures memory and time of a calibration layer by layer; prints, and writes, JSON.

    python benchmarks/layerwise_calibration.py CHECKPOINT --tokens 32768 --length 256 --out FILE

Rows are random tokens, so no task is needed; what is measured does not depend on their meaning,
though random tokens spread over the experts in their own way. Memory is the resident set of this
process above what it is after JAX has started and run one operation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import describe

from uncurl_jax.checkpoints import layout
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.evaluation.layerwise_calibration import calibrate_layer_by_layer
from uncurl_jax.evaluation.layerwise_job import Seconds


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Lets VmHWM begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def random_rows(checkpoint: layout.CheckpointPath, tokens: int, length: int) -> TokenCache:
    """A training split of `tokens` random tokens in rows of `length`, in memory."""
    vocabulary = checkpoint.vocabulary()
    rows = -(-tokens // length)
    generator = np.random.default_rng(0)
    low = min(3, vocabulary["size"] - 1)
    manifest = {
        "task": "random_tokens",
        "split": "train",
        "kind": "language_modeling",
        "hash": f"random {rows} x {length}",
        "vocabulary": vocabulary,
        "rows": rows,
        "target_rows": rows,
        "tokens": rows * length,
        "max_row_length": length,
    }
    arrays = {
        "tokens": generator.integers(low, vocabulary["size"], rows * length, dtype=np.int32),
        "offsets": np.arange(rows + 1, dtype=np.int64) * length,
        "prompt_lengths": np.zeros(rows, np.int32),
        "example": np.arange(rows, dtype=np.int32),
        "option": np.zeros(rows, np.int32),
        "is_target": np.ones(rows, bool),
    }
    return TokenCache(Path("random_tokens"), manifest, arrays)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs once and returns what is to be written."""
    checkpoint = layout.resolve(arguments.checkpoint)
    config = checkpoint.model_config()
    cache = random_rows(checkpoint, arguments.tokens, arguments.length)
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    reset_peak()
    base = resident_bytes("VmRSS")
    seconds = Seconds()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        statistics = calibrate_layer_by_layer(
            checkpoint.step_directory,
            cache,
            out=Path(folder) / "statistics.npz",
            batch_size=arguments.batch_size,
            collect=tuple(arguments.collect or ()),
            activations_dir=arguments.activations_dir,
            seconds=seconds,
        )
    total = time.perf_counter() - start
    stored = layout.StateReader(checkpoint).parameters().values()
    layers = statistics.layers.values()
    environment = describe(("uncurl_jax", "jax", "jaxlib", "numpy", "tensorstore"))
    return {
        "benchmark": "layerwise_calibration",
        # Without paths, which say where, not what.
        "command": f"python benchmarks/layerwise_calibration.py CHECKPOINT --tokens "
        f"{arguments.tokens} --length {arguments.length} --batch_size {arguments.batch_size}"
        + "".join(f" --collect {group}" for group in arguments.collect or ())
        + (" --activations_dir DIR" if arguments.activations_dir else ""),
        "versions": environment["versions"],
        "device": {"kind": jax.devices()[0].device_kind, **environment["device"]},
        "model": {
            "num_experts": list(config.num_experts),
            "embed_dim": config.embed_dim,
            "mlp_dim": config.mlp_dim,
            "dtype": config.dtype,
            "checkpoint_bytes": sum(
                int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in stored
            ),
        },
        "tokens": statistics.tokens,
        "experts_chosen": [int(np.count_nonzero(fields.selected)) for fields in layers],
        "seconds": round(total, 3),
        "parts_seconds": {name: round(value, 3) for name, value in vars(seconds).items()},
        "resident_bytes": {
            "base": base,
            "peak": resident_bytes("VmHWM"),
            "peak_above_base": resident_bytes("VmHWM") - base,
        },
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--collect", action="append", help="outputs, all_outputs; repeatable")
    parser.add_argument("--activations_dir", help="keep activations in files there")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    result = json.dumps(measure(arguments), indent=2)
    if arguments.out:
        Path(arguments.out).write_text(result + "\n")
    print(result)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
