"""Times planning from statistics: every method, 12 layers of 128 experts by default, on this CPU.

    python benchmarks/planning.py --out benchmarks/results/planning.json

The statistics are those of random routers with planted groups; weights (of router_norm) are random.
`weight`, which reads the experts, is left out: its time is that of reading them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import environment
import numpy as np

from uncurl_jax.artifacts import refuse_existing, write_json
from uncurl_jax.pruning.methods import method_names
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics, make_manifest

_TOKENS = 4096
_EMBED = 64


def make_statistics(num_layers: int, num_experts: int, seed: int) -> RouterStatistics:
    """Returns statistics of random top-1 routing with groups of about four experts."""
    generator = np.random.default_rng(seed)
    layers = {}
    for layer in range(num_layers):
        groups = generator.normal(size=(_TOKENS, num_experts // 4))
        noise = generator.normal(size=(_TOKENS, num_experts))
        h = groups[:, generator.integers(0, num_experts // 4, num_experts)] + noise
        p = np.exp(h - h.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        chosen = np.eye(num_experts)[h.argmax(axis=1)]
        outputs = generator.normal(size=(num_experts, _EMBED)) * _TOKENS
        layers[layer] = LayerStatistics(
            tokens=_TOKENS,
            gram=h.T @ h,
            logit_sum=h.sum(axis=0),
            selected=chosen.sum(axis=0),
            kept=chosen.sum(axis=0),
            gate_mass=(chosen * p).sum(axis=0),
            prob_mass=p.sum(axis=0),
            coactivation=chosen.T @ chosen,
            routed_prob=chosen.T @ p,
            output_norm=chosen.sum(axis=0) * generator.uniform(0.5, 2.0, num_experts),
            gated_output_norm=(chosen * p).sum(axis=0) * generator.uniform(0.5, 2.0, num_experts),
            output_sum=outputs,
            all_output_sum=outputs,
        )
    manifest = make_manifest(
        checkpoint_hash="random",
        num_experts=(num_experts,) * num_layers,
        num_selected_experts=1,
        task="random",
        split="train",
        vocabulary_hash="random",
        seed=seed,
    )
    return RouterStatistics(layers, manifest)


class RandomWeights:
    """Routers for the method that looks at them."""

    def __init__(self, num_experts: int):
        self._kernel = np.random.default_rng(0).normal(size=(_EMBED, num_experts))

    def router(self, layer: int) -> np.ndarray:
        del layer
        return self._kernel

    def base_router(self, layer: int) -> None:
        del layer

    def experts(self, layer: int) -> dict[str, np.ndarray]:
        raise ValueError(f"Methods that read experts are left out, got one in layer {layer}.")


def main() -> None:
    """Parses the command line, times, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--num_experts", type=int, default=128)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 32, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    out = refuse_existing(arguments.out)
    statistics = make_statistics(arguments.num_layers, arguments.num_experts, seed=0)
    weights = RandomWeights(arguments.num_experts)
    seconds: dict[str, dict[str, list[float]]] = {}
    for repeat in range(arguments.repeats):
        for method in sorted(set(method_names()) - {"weight"}):
            for target in arguments.targets:
                begin = time.perf_counter()
                make_plan(
                    statistics, num_experts=target, method=method, weights=weights, seed=repeat
                )
                taken = time.perf_counter() - begin
                seconds.setdefault(method, {}).setdefault(str(target), []).append(taken)
                print(f"{method} -> {target}: {taken:.2f} s", file=sys.stderr)
    record = {
        **environment.describe(("uncurl_jax", "numpy", "scipy", "scikit-learn")),
        "num_layers": arguments.num_layers,
        "num_experts": arguments.num_experts,
        "seconds": {
            method: {
                target: {"min": round(min(v), 3), "max": round(max(v), 3), "runs": len(v)}
                for target, v in targets.items()
            }
            for method, targets in seconds.items()
        },
    }
    write_json(out, record)
    slowest = max(v["max"] for targets in record["seconds"].values() for v in targets.values())
    print(json.dumps({"out": str(out), "slowest_seconds": slowest}))


if __name__ == "__main__":
    main()
