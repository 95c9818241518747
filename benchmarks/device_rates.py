"""Measures what `uncurl placement` reckons with: products, memory, and collectives by size.

python benchmarks/device_rates.py --out benchmarks/results/multi/device_rates_2xh100.json

Each collective runs alone among all devices, several times in one launch, each on the result of
the one before. A time is fitted as latency + bytes sent / bandwidth: the latency is the time of the
smallest payload, the bandwidth what is left of the largest's. The largest deviation of a size in
between is in the record.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uncurl_jax import artifacts
from uncurl_jax.deployment import bench_machine
from uncurl_jax.deployment.bench_programs import random_values
from uncurl_jax.deployment.interconnect import wire_bytes
from uncurl_jax.deployment.timing import Alternative, Timing, time_alternatives

AXIS = "device"


def all_to_all(x: jax.Array, size: int) -> jax.Array:
    del size
    return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def all_reduce(x: jax.Array, size: int) -> jax.Array:
    return jax.lax.psum(x, AXIS) / size


def all_gather_reduce_scatter(x: jax.Array, size: int) -> jax.Array:
    """Both on the whole array: x is this device's part of it."""
    whole = jax.lax.optimization_barrier(jax.lax.all_gather(x, AXIS, tiled=True))
    return jax.lax.psum_scatter(whole, AXIS, tiled=True) / size


COLLECTIVES: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    function.__name__: function for function in (all_to_all, all_reduce, all_gather_reduce_scatter)
}


def sent_bytes(name: str, payload: int, size: int) -> float:
    """What a device sends for a payload in the sense of `interconnect.wire_bytes`."""
    kinds = {"all_gather_reduce_scatter": ("all_gather", "reduce_scatter")}
    return sum(wire_bytes(kind, payload, size) for kind in kinds.get(name, (name,)))


def repeated(body: Callable[[jax.Array], jax.Array], calls: int) -> Callable[..., jax.Array]:
    def one(_: Any, carry: jax.Array) -> jax.Array:
        # A compiler that unrolls the loop must not join its passes.
        return jax.lax.optimization_barrier(body(carry))

    return lambda x: jax.lax.fori_loop(0, calls, one, x)


def collective(name: str, mesh: Mesh, payload: int, calls: int) -> Alternative:
    size = mesh.size
    # bfloat16; where parts are gathered, the payload is what they are together.
    local = payload // 2 // (size if "gather" in name else 1)
    spec = PartitionSpec(AXIS)
    x = random_values((local * size,), jnp.bfloat16, NamedSharding(mesh, spec), 0)
    function = COLLECTIVES[name]
    body = repeated(lambda x: function(x, size), calls)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(x).compile()
    return Alternative(lambda: compiled(x), calls)


def on_one_device(side: int, copied_bytes: int) -> dict[str, Alternative]:
    """A product of square matrices, and an elementwise pass that reads and writes an array."""
    a, b = (random_values((side, side), jnp.bfloat16, None, seed, side**-0.5) for seed in (1, 2))
    calls = 16
    x = random_values((copied_bytes // 2,), jnp.bfloat16, None, 3)
    product = jax.jit(lambda a, b: repeated(lambda c: c @ b, calls)(a)).lower(a, b).compile()
    copy = jax.jit(repeated(lambda x: x * 1.5, calls)).lower(x).compile()
    return {
        "product": Alternative(lambda: product(a, b), calls),
        "copy": Alternative(lambda: copy(x), calls),
    }


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """latency + sent / bandwidth through the smallest and the largest payload."""
    smallest, largest = rows[0], rows[-1]
    latency = smallest["seconds"]
    bandwidth = largest["sent_bytes"] / (largest["seconds"] - latency)
    deviations = [
        (latency + row["sent_bytes"] / bandwidth) / row["seconds"] - 1.0 for row in rows[1:-1]
    ]
    return {
        "latency_seconds": latency,
        "bytes_per_second_one_way": bandwidth,
        "largest_deviation": max(deviations, key=abs, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--largest", type=int, default=28, help="log2 of the bytes of a payload")
    parser.add_argument("--smallest", type=int, default=10)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    artifacts.refuse_existing(args.out)
    size = jax.device_count()
    mesh = Mesh(jax.devices(), (AXIS,))
    payloads = [1 << power for power in range(args.smallest, args.largest + 1, 2)]
    single = on_one_device(args.side, 1 << (args.largest + 3))
    several = {
        f"{name} {payload}": collective(name, mesh, payload, 32 if payload >> 22 else 256)
        for name in COLLECTIVES
        for payload in (payloads if size > 1 else ())
    }
    found = time_alternatives({**single, **several}, repeats=args.repeats, warmup=3)

    def row(name: str, payload: int) -> dict[str, Any]:
        timing: Timing = found[f"{name} {payload}"]
        return {
            "payload_bytes": payload,
            "sent_bytes": sent_bytes(name, payload, size),
            **timing.to_json(),
        }

    rows = {name: [row(name, payload) for payload in payloads] for name in COLLECTIVES if size > 1}
    product, copy = found["product"], found["copy"]
    record = {
        "schema": "uncurl_jax.device_rates/1",
        "command": bench_machine.script_line(),
        "versions": bench_machine.versions(),
        "device": bench_machine.describe_devices(),
        "devices": size,
        "product": {
            "text": f"{args.side} x {args.side} matrices, bfloat16, on one device",
            "flops_per_second": 2 * args.side**3 / product.seconds,
            **product.to_json(),
        },
        "copy": {
            "text": "bytes read and written by an elementwise pass over "
            f"{(1 << (args.largest + 3)) / 2**30:g} GiB, on one device",
            "bytes_per_second": 2 * (1 << (args.largest + 3)) / copy.seconds,
            **copy.to_json(),
        },
        "collectives": rows,
        "fits": {name: fit(of_name) for name, of_name in rows.items()},
    }
    artifacts.write_json(args.out, record)
    print(f"{args.out}: {size} x {record['device']['kind']}")


if __name__ == "__main__":
    main()
