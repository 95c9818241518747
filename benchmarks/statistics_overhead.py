"""Measures what router statistics add to the plain forward pass, as a paired ratio in one run.

python benchmarks/statistics_overhead.py --out benchmarks/results/statistics_overhead.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

import environment
import jax
import numpy as np

from uncurl_jax.artifacts import refuse_existing, write_json
from uncurl_jax.config import ModelConfig, alternating_experts
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.evaluation.calibration import router_observer
from uncurl_jax.models.architecture import init_params
from uncurl_jax.models.decoder import Decoder


def main() -> None:
    """Parses the command line, times, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--embed_dim", type=int, default=512)
    parser.add_argument("--mlp_dim", type=int, default=2048)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    out = refuse_existing(arguments.out)
    config = ModelConfig(
        num_experts=alternating_experts(arguments.num_layers, arguments.num_experts),
        vocab_size=arguments.vocab_size,
        embed_dim=arguments.embed_dim,
        num_heads=8,
        mlp_dim=arguments.mlp_dim,
        max_length=arguments.length,
        eval_capacity_factor=None,
        dtype=arguments.dtype,
    )
    params = init_params(config, 0)
    shape = (arguments.batch_size, arguments.length)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape).astype(np.int32)
    batch = Batch(tokens, tokens, np.ones(shape, np.float32), np.ones(shape, bool))
    decoder = Decoder(config)
    forward = jax.jit(lambda p, b: decoder.apply({"params": p}, b.inputs, b.mask))

    @jax.jit
    def without_logits(p: Any, b: Any) -> Any:
        """The forward pass up to one position's logits, which is what calibration needs."""
        last = np.full((b.inputs.shape[0], 1), b.inputs.shape[1] - 1, np.int32)
        return decoder.apply({"params": p}, b.inputs, b.mask, logit_positions=last)

    variants = {
        "forward": forward,
        "forward_without_logits": without_logits,
        "statistics": router_observer(config),
        "statistics_with_outputs": router_observer(config, collect=("outputs",)),
    }
    for function in variants.values():
        jax.block_until_ready(function(params, batch))
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        for name in order.sample(list(variants), len(variants)):
            begin = time.perf_counter()
            jax.block_until_ready(variants[name](params, batch))
            seconds[name].append(time.perf_counter() - begin)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)

    def ratio(name: str, base: str) -> dict[str, float]:
        pairs = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}

    record = {
        **environment.describe(("uncurl_jax", "jax", "numpy")),
        "backend": jax.devices()[0].device_kind,
        "model": config.to_dict(),
        "tokens_per_batch": int(tokens.size),
        "rounds": arguments.rounds,
        "median_seconds": {n: round(statistics.median(v), 4) for n, v in seconds.items()},
        "ratio_to_forward": {
            n: ratio(n, "forward") for n in ("statistics", "statistics_with_outputs")
        },
        "ratio_to_forward_without_logits": {
            n: ratio(n, "forward_without_logits") for n in ("statistics", "statistics_with_outputs")
        },
    }
    write_json(out, record)
    print(json.dumps({"out": str(out), **record["ratio_to_forward"]}))


if __name__ == "__main__":
    main()
