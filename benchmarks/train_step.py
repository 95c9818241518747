"""Times whole training steps of models of one backbone; prints their MFU and the formula.

    python benchmarks/train_step.py --out benchmarks/results/train_step_h200.json

MFU = model FLOPs of a step / (seconds * dense bf16 peak of the data sheet), where the model FLOPs
of a token are 6 * active parameters (learned positions left out, k experts per MoE layer counted)
+ 6 * layers * length * width for causal attention; see uncurl_jax/training/throughput.py.
`--experts 0` is the dense model. Rounds are shuffled; ratios are to the dense model.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import environment
import jax
import numpy as np
from rounds import ratio, summary, time_rounds

from uncurl_jax.artifacts import refuse_existing, write_json
from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig, alternating_experts
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.models.architecture import count_parameters, init_params
from uncurl_jax.training import throughput
from uncurl_jax.training.train_step import make_train_step, new_state


def model_config(options: argparse.Namespace, num_experts: int) -> ModelConfig:
    return ModelConfig(
        num_experts=alternating_experts(options.num_layers, num_experts),
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_heads=options.embed_dim // 64,
        mlp_dim=4 * options.embed_dim,
        max_length=options.length,
        capacity_factor=options.capacity_factor or None,
        dtype=options.dtype,
    )


def make_step(options: argparse.Namespace, num_experts: int) -> tuple[Any, dict[str, Any]]:
    """Returns (a function that does one step, facts about the model)."""
    config = model_config(options, num_experts)
    training = TrainConfig(
        optimizer=OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=10),
        num_steps=10**6,
        batch_size=options.batch_size,
        model=config,
    )
    generator = np.random.default_rng(options.seed)
    shape = (options.batch_size, options.length)
    tokens = generator.integers(3, config.vocab_size, shape).astype(np.int32)
    batch = Batch(tokens, tokens, np.ones(shape, np.float32), np.ones(shape, bool))
    batch = jax.tree.map(jax.numpy.asarray, batch)
    step = make_train_step(config, training)
    state = [new_state(init_params(config, options.seed), training)]

    def one_step() -> jax.Array:
        state[0], metrics = step(state[0], batch, options.seed)
        return metrics["loss"]

    begin = time.perf_counter()
    loss = float(one_step())
    seconds = time.perf_counter() - begin
    assert np.isfinite(loss)
    print(f"{num_experts} experts: first step with compilation {seconds:.0f} s", file=sys.stderr)
    count = count_parameters(config)
    flops = throughput.training_flops_per_token(config, count.active, options.length)
    return one_step, {
        "parameters": count.total,
        "active_parameters": count.active,
        "model_flops_per_token": flops,
        "first_loss": round(loss, 4),
        "seconds_to_compile_and_run_once": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 8, 32])
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--embed_dim", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--capacity_factor", type=float, default=1.2, help="0 drops nothing")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.out:
        refuse_existing(options.out)
    device = jax.devices()[0].device_kind
    peak = throughput.peak_flops_per_second(device)
    steps, facts = {}, {}
    for num_experts in options.experts:
        name = f"{num_experts}_experts" if num_experts else "dense"
        steps[name], facts[name] = make_step(options, num_experts)
        gc.collect()
    seconds = time_rounds(
        steps, rounds=options.rounds, seconds_per_measurement=options.seconds, seed=options.seed
    )
    tokens = options.batch_size * options.length
    results = {}
    for name, values in seconds.items():
        per_second = tokens / np.median(values)
        flops = facts[name]["model_flops_per_token"] * per_second
        results[name] = {
            **facts[name],
            "seconds_per_step": summary(values),
            "tokens_per_second": round(per_second),
            "model_tflops_per_second": round(flops / 1e12, 2),
            "mfu": None if peak is None else round(flops / peak, 4),
            **({"over_dense": ratio(values, seconds["dense"])} if "dense" in seconds else {}),
        }
    record = {
        **environment.describe(("jax", "jaxlib", "flax", "optax", "numpy")),
        "backend": device,
        "mfu": "model_flops_per_token * tokens_per_second / peak; model_flops_per_token = 6 * "
        "(active parameters - learned positions) + 6 * layers * length * width",
        "peak_bf16_flops_per_second": peak,
        "tokens_per_step": tokens,
        "rounds": options.rounds,
        "results": results,
    }
    if options.out:
        write_json(options.out, record)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
