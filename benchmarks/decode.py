"""Times greedy decoding of pruned and dense models of one backbone, token by token.

    python benchmarks/decode.py --out benchmarks/results/decode_h200.json

Parameters are random and in the compute dtype, as they are when a model serves; prompts are random.
`--experts 0` is the dense model. Seconds are per decoding step of the whole batch, from
`uncurl_jax.evaluation.generation`'s own loop: one call, its prefill of a short prompt included,
divided by its steps. `bytes_read` counts the parameters a step must read at least: those of as
many experts as there are tokens, of all experts if there are more tokens.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import environment
import jax
import numpy as np
from rounds import ratio, summary, time_rounds

from uncurl_jax.artifacts import refuse_existing, write_json
from uncurl_jax.config import ModelConfig, alternating_experts
from uncurl_jax.evaluation.generation import compiled_generate
from uncurl_jax.models.architecture import count_parameters, init_params


def model_config(options: argparse.Namespace, num_experts: int) -> ModelConfig:
    return ModelConfig(
        num_experts=alternating_experts(options.num_layers, num_experts),
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_heads=options.embed_dim // 64,
        mlp_dim=4 * options.embed_dim,
        max_length=options.max_length,
        dtype=options.dtype,
    )


def make_call(options: argparse.Namespace, num_experts: int, batch_size: int) -> Any:
    """Returns a function that generates `--steps` tokens in each row."""
    config = model_config(options, num_experts)
    params = jax.tree.map(
        lambda array: array.astype(config.dtype), init_params(config, options.seed)
    )
    generator = np.random.default_rng(options.seed)
    prompts = generator.integers(3, config.vocab_size, (batch_size, options.prompt))
    inputs = jax.numpy.asarray(prompts, jax.numpy.int32)
    lengths = jax.numpy.full((batch_size,), options.prompt, jax.numpy.int32)
    compiled = compiled_generate(config, options.steps, True, -1)
    return lambda: compiled(params, inputs, lengths, np.float32(1.0), 0)


def bytes_read(options: argparse.Namespace, num_experts: int, batch_size: int) -> int:
    config = model_config(options, num_experts)
    count = count_parameters(config)
    touched = min(batch_size * config.num_selected_experts, num_experts or 1)
    per_expert = (count.total - count.active) // max(num_experts - 1, 1)
    active = count.active - config.max_length * config.embed_dim
    return jax.numpy.dtype(config.dtype).itemsize * (active + per_expert * (touched - 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 8, 128])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--embed_dim", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.out:
        refuse_existing(options.out)
    results = []
    for batch_size in options.batch_sizes:
        calls = {
            f"{count}_experts" if count else "dense": make_call(options, count, batch_size)
            for count in options.experts
        }
        seconds = time_rounds(calls, rounds=options.rounds, seconds_per_measurement=options.seconds)
        steps = {
            name: [value / options.steps for value in values] for name, values in seconds.items()
        }
        for name, values in steps.items():
            num_experts = 0 if name == "dense" else int(name.split("_")[0])
            median = float(np.median(values))
            results.append(
                {
                    "batch_size": batch_size,
                    "model": name,
                    "milliseconds_per_step": summary([1e3 * value for value in values]),
                    "tokens_per_second": round(batch_size / median, 1),
                    "bytes_read": bytes_read(options, num_experts, batch_size),
                    "gigabytes_per_second": round(
                        bytes_read(options, num_experts, batch_size) / median / 1e9, 1
                    ),
                    **({"over_dense": ratio(values, steps["dense"])} if "dense" in steps else {}),
                }
            )
    record = {
        **environment.describe(("jax", "jaxlib", "flax", "numpy")),
        "backend": jax.devices()[0].device_kind,
        "settings": {
            name: getattr(options, name)
            for name in ("num_layers", "embed_dim", "max_length", "prompt", "steps", "dtype")
        },
        "rounds": options.rounds,
        "results": results,
    }
    if options.out:
        write_json(options.out, record)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
