"""Times one MoE layer, forward and with gradients, against its floors and against other layers.

    python benchmarks/moe_layer.py --out benchmarks/results/moe_layer_cpu.json \\
        --tokens 2048 --embed_dim 512 --mlp_dim 2048 --topk 2 --experts 8 32 --dtype float32

The defaults are for one accelerator. Every alternative gets the same tokens, routing and kernels:

dense                 one feed-forward network of the same active FLOPs, no experts
separate_kernels      tokens already sorted, the same number for each expert: one batched product
ours                  this package's layer, nothing dropped
ours_skewed           the same where the router prefers some experts (--skew)
ours_capacity         the same with --capacity_factor, drops what is beyond it
ours_with_router      ours and the router in front of it, float32 at highest precision
gather_capacity       sort, gather into [experts, capacity, d], batched product, gather back; JAX's
                      own gradients; drops
einsum_dispatch       one-hot dispatch and combine in groups of 2048 tokens, as Mesh TensorFlow,
                      Flaxformer and V-MoE do it; drops
ragged_dot            sort and jax.lax.ragged_dot, what MaxText uses where it has no kernel
tokamax_ragged_dot    sort and tokamax.ragged_dot, where that package can be imported

With --parts the pieces of ours are timed instead, each on its own: the products of rows by the
blocks' kernel, activation, dispatch and combine, and finding the slots.

A ratio of 0.8 to dense says that dense takes 0.8 of the alternative's time. Alternatives that fail
(out of memory, not supported there) or exceed --limit seconds a call are named with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import environment
import jax
import jax.numpy as jnp
import numpy as np
from rounds import ratio, summary, time_rounds

from uncurl_jax.artifacts import refuse_existing, write_json
from uncurl_jax.models import expert_parallel, grouped_matmul, routing
from uncurl_jax.models.expert_mlp import Experts
from uncurl_jax.models.expert_parallel import apply_moe

gelu = functools.partial(jax.nn.gelu, approximate=True)


def ours(x, index, gate, wi, wo, *, capacity=None):
    out = apply_moe(
        x[None],
        index[None],
        gate[None],
        jnp.ones((1, len(x)), bool),
        Experts(wi, wo),
        gelu,
        capacity=capacity,
        mesh=None,
    )
    return out.y[0]


def ours_with_router(x, router, wi, wo, *, topk):
    logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    choice = routing.choose_experts(logits, topk, normalize_gates=False)
    return ours(x, choice.expert_index, choice.gate, wi, wo)


def dense(x, wi, wo):
    return (gelu(x @ wi) @ wo).astype(jnp.float32)


def separate_kernels(x, wi, wo):
    return jnp.einsum("ecf,efd->ecd", gelu(jnp.einsum("ecd,edf->ecf", x, wi)), wo).astype(
        jnp.float32
    )


def gather_capacity(x, index, gate, wi, wo, *, capacity):
    num_experts, (tokens, topk) = len(wi), index.shape
    ranks, _ = routing.ranks_within_expert(index, jnp.ones(tokens, bool), num_experts)
    num_slots = num_experts * capacity
    slot = jnp.where(ranks < capacity, index * capacity + ranks, num_slots)
    token = jnp.broadcast_to(jnp.arange(tokens)[:, None], (tokens, topk))
    token_of_slot = jnp.full((num_slots,), tokens).at[slot].set(token, mode="drop")
    slots = x.at[token_of_slot].get(mode="fill", fill_value=0)
    y = separate_kernels(slots.reshape(num_experts, capacity, -1), wi, wo)
    y = y.reshape(num_slots, -1).at[slot].get(mode="fill", fill_value=0)
    return jnp.einsum("tkd,tk->td", y, gate)


def einsum_dispatch(x, index, gate, wi, wo, *, capacity_factor, group_size=2048):
    num_experts, topk = len(wi), index.shape[1]
    group_size = min(group_size, len(x))
    capacity = math.ceil(group_size * topk * capacity_factor / num_experts)

    def one_group(x, index, gate):
        ranks, _ = routing.ranks_within_expert(index, jnp.ones(len(x), bool), num_experts)
        to_expert = jax.nn.one_hot(index, num_experts, dtype=x.dtype)
        to_slot = jax.nn.one_hot(ranks, capacity, dtype=x.dtype)  # zeros beyond the capacity
        dispatch = jnp.einsum("tke,tkc->tec", to_expert, to_slot)
        weights = jnp.einsum("tke,tkc,tk->tec", to_expert, to_slot, gate.astype(x.dtype))
        return dispatch, weights

    groups = jax.tree.map(lambda a: a.reshape(-1, group_size, a.shape[-1]), (x, index, gate))
    dispatch, weights = jax.vmap(one_group)(*groups)
    slots = jnp.einsum("gtd,gtec->egcd", groups[0], dispatch)
    hidden = gelu(jnp.einsum("egcd,edf->egcf", slots, wi))
    y = jnp.einsum("egcf,efd->egcd", hidden, wo)
    return jnp.einsum("egcd,gtec->gtd", y, weights).reshape(x.shape).astype(jnp.float32)


def sorted_product(x, index, gate, wi, wo, *, product):
    topk = index.shape[1]
    order = jnp.argsort(index.reshape(-1))
    sizes = jnp.bincount(index.reshape(-1), length=len(wi)).astype(jnp.int32)
    hidden = gelu(product(x[order // topk], wi, sizes))
    y = product(hidden, wo, sizes)
    y = jnp.zeros((index.size, x.shape[1]), y.dtype).at[order].set(y)
    return jnp.einsum("tkd,tk->td", y.reshape(*index.shape, -1).astype(jnp.float32), gate)


def make_routing(generator, tokens: int, num_experts: int, topk: int, skew: float):
    """Draws distinct experts per token; expert i's log-odds fall by `skew` over all experts."""
    odds = -skew * np.arange(num_experts) / num_experts
    scores = odds + generator.gumbel(size=(tokens, num_experts))
    index = np.argsort(-scores, axis=1)[:, :topk].astype(np.int32)
    return jnp.asarray(index), jnp.asarray(generator.random((tokens, topk)), jnp.float32)


def alternatives(options: argparse.Namespace, num_experts: int) -> dict[str, Any]:
    """Returns {name: (function, differentiable arguments, other arguments)}."""
    generator = np.random.default_rng(options.seed)
    dtype = jnp.dtype(options.dtype)
    tokens, dim, mlp, topk = options.tokens, options.embed_dim, options.mlp_dim, options.topk

    def normal(*shape: int, scale: float = 1.0, kind: Any = dtype) -> jax.Array:
        key = jax.random.key(int(generator.integers(2**31)))
        return (scale * jax.random.normal(key, shape)).astype(kind)

    x = normal(tokens, dim)
    wi, wo = normal(num_experts, dim, mlp, scale=0.02), normal(num_experts, mlp, dim, scale=0.02)
    router = normal(dim, num_experts, scale=0.02, kind=jnp.float32)
    index, gate = make_routing(generator, tokens, num_experts, topk, 0.0)
    skewed, _ = make_routing(generator, tokens, num_experts, topk, options.skew)
    capacity = math.ceil(tokens * topk * options.capacity_factor / num_experts)
    ragged = functools.partial(sorted_product, product=jax.lax.ragged_dot)
    einsum = functools.partial(einsum_dispatch, capacity_factor=options.capacity_factor)
    share = tokens * topk // num_experts
    found: dict[str, Any] = {
        "dense": (dense, (x, normal(dim, topk * mlp), normal(topk * mlp, dim)), ()),
        "separate_kernels": (separate_kernels, (normal(num_experts, share, dim), wi, wo), ()),
        "ours_with_router": (
            functools.partial(ours_with_router, topk=topk),
            (x, router, wi, wo),
            (),
        ),
    }

    def routed(name: str, layer: Callable[..., Any], chosen: jax.Array = index) -> None:
        def reordered(x, gate, wi, wo, chosen):
            return layer(x, chosen, gate, wi, wo)

        found[name] = (reordered, (x, gate, wi, wo), (chosen,))

    routed("ours", ours)
    routed("ours_skewed", ours, skewed)
    routed("ours_capacity", functools.partial(ours, capacity=capacity))
    routed("gather_capacity", functools.partial(gather_capacity, capacity=capacity))
    routed("einsum_dispatch", einsum)
    routed("ragged_dot", ragged)
    try:
        tokamax: Any = importlib.import_module("tokamax")
        routed("tokamax_ragged_dot", functools.partial(sorted_product, product=tokamax.ragged_dot))
    except ImportError as error:
        found["tokamax_ragged_dot"] = str(error)
    counts = np.bincount(np.asarray(index).ravel(), minlength=num_experts)
    heavy = np.bincount(np.asarray(skewed).ravel(), minlength=num_experts)
    mean = counts.mean()
    found["loads"] = {
        "largest_over_mean": round(float(counts.max() / mean), 3),
        "largest_over_mean_skewed": round(float(heavy.max() / mean), 3),
        "dropped_at_capacity": round(
            float(np.maximum(counts - capacity, 0).sum() / counts.sum()), 4
        ),
    }
    return found


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], others: tuple[Any, ...]):
    """Returns (forward, forward and backward), each without arguments."""
    out = jax.eval_shape(function, *arguments, *others)
    cotangent = jax.random.normal(jax.random.key(0), out.shape).astype(out.dtype)

    def with_gradients(arguments, others, cotangent):
        out, pull_back = jax.vjp(lambda *a: function(*a, *others), *arguments)
        return out, pull_back(cotangent)

    forward = jax.jit(lambda arguments, others: function(*arguments, *others))
    both = jax.jit(with_gradients)
    return (
        functools.partial(forward, arguments, others),
        functools.partial(both, arguments, others, cotangent),
    )


def relative_error(a: jax.Array, b: jax.Array) -> float:
    a, b = (np.asarray(array, np.float64) for array in (a, b))
    return float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}")


def measure(options: argparse.Namespace, num_experts: int) -> dict[str, Any]:
    found = alternatives(options, num_experts)
    record: dict[str, Any] = {"num_experts": num_experts, "loads": found.pop("loads")}
    skipped: dict[str, str] = {}
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    for name, entry in found.items():
        if isinstance(entry, str) or (options.only and name not in options.only):
            skipped[name] = entry if isinstance(entry, str) else "not asked for"
            continue
        try:
            functions = compiled(*entry)
            for function in functions:
                jax.block_until_ready(function())
                begin = time.perf_counter()
                jax.block_until_ready(function())
                if time.perf_counter() - begin > options.limit:
                    raise TimeoutError(f"over {options.limit} s a call")
            forward[name], both[name] = functions
        except Exception as error:  # whatever a library raises is the reason to record
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if "ours" in forward and "ragged_dot" in forward:
        record["relative_error_to_ragged_dot"] = relative_error(
            forward["ours"](), forward["ragged_dot"]()
        )
    flops = 4.0 * options.tokens * options.topk * options.embed_dim * options.mlp_dim
    for label, functions, times in (("forward", forward, 1), ("forward_backward", both, 3)):
        print(f"{num_experts} experts, {label}", file=sys.stderr)
        seconds = time_rounds(
            functions, rounds=options.rounds, seconds_per_measurement=options.seconds
        )
        record[label] = {
            name: {
                "milliseconds": summary([1e3 * value for value in values]),
                "tflops_per_second": round(times * flops / np.median(values) / 1e12, 2),
                **{
                    f"{floor}_over_this": ratio(seconds[floor], values)
                    for floor in ("dense", "separate_kernels")
                    if floor in seconds
                },
                **({"this_over_ours": ratio(values, seconds["ours"])} if "ours" in seconds else {}),
            }
            for name, values in seconds.items()
        }
    return {**record, "skipped": skipped}


def parts(options: argparse.Namespace, num_experts: int) -> dict[str, Any]:
    """Times the pieces of the layer without drops, on blocks."""
    generator = np.random.default_rng(options.seed)
    dtype, dim, mlp = jnp.dtype(options.dtype), options.embed_dim, options.mlp_dim
    index, gate = make_routing(generator, options.tokens, num_experts, options.topk, 0.0)
    rows, num_blocks = expert_parallel.block_shape(index.size, num_experts)

    def normal(*shape: int) -> jax.Array:
        key = jax.random.key(int(generator.integers(2**31)))
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)

    def find_slots(index: jax.Array) -> tuple[Any, Any]:
        ranks, counts = routing.ranks_within_expert(index, jnp.ones(len(index), bool), num_experts)
        blocks = grouped_matmul.make_blocks(counts, rows, num_blocks, may_be_even=False)
        slot = blocks.first[index] * rows + ranks
        return expert_parallel.invert(slot.astype(jnp.int32), num_blocks * rows), blocks

    slots, blocks = jax.jit(find_slots)(index)
    x, narrow = normal(options.tokens, dim), normal(num_blocks * rows, dim)
    wide = normal(num_blocks * rows, mlp)
    wi, wo = normal(num_experts, dim, mlp), normal(num_experts, mlp, dim)

    def both_ways(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return compiled(function, arguments, ())[1]

    product = functools.partial(grouped_matmul._matmul, is_transposed=False)
    transposed = functools.partial(grouped_matmul._matmul, is_transposed=True)
    pieces = {
        "slots": functools.partial(jax.jit(find_slots), index),
        "dispatch_and_combine_forward_backward": both_ways(
            lambda x, gate: expert_parallel.combine(
                expert_parallel.dispatch(x, slots), gate, slots
            ),
            x,
            gate,
        ),
        "up": functools.partial(jax.jit(product), narrow, wi, blocks),
        "down": functools.partial(jax.jit(product), wide, wo, blocks),
        "gradient_of_hidden": functools.partial(jax.jit(transposed), narrow, wo, blocks),
        "gradient_of_input": functools.partial(jax.jit(transposed), wide, wi, blocks),
        "gradient_of_wi": functools.partial(jax.jit(grouped_matmul._outer), narrow, wide, blocks),
        "gradient_of_wo": functools.partial(jax.jit(grouped_matmul._outer), wide, narrow, blocks),
        "activation_forward_backward": both_ways(gelu, wide),
    }
    seconds = time_rounds(pieces, rounds=options.rounds, seconds_per_measurement=options.seconds)
    flops = 2.0 * index.size * dim * mlp
    return {
        "num_experts": num_experts,
        "rows": num_blocks * rows,
        "rows_per_block": rows,
        "parts": {
            name: {
                "milliseconds": summary([1e3 * value for value in values]),
                **(
                    {}
                    if "forward" in name or name == "slots"
                    else {"tflops_per_second": round(flops / np.median(values) / 1e12, 1)}
                ),
            }
            for name, values in seconds.items()
        },
    }


def print_table(record: dict[str, Any]) -> None:
    print(f"{record['num_experts']} experts", file=sys.stderr)
    for name in record["forward"]:
        row = [record[part][name] for part in ("forward", "forward_backward")]
        text = "   ".join(
            f"{r['milliseconds']['median']:9.3f} ms {r['dense_over_this']['median']:6.3f} of dense"
            for r in row
        )
        print(f"  {name:20s} {text}", file=sys.stderr)
    for name, reason in record["skipped"].items():
        print(f"  {name:20s} skipped: {reason}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--embed_dim", type=int, default=1024)
    parser.add_argument("--mlp_dim", type=int, default=4096)
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--capacity_factor", type=float, default=1.25)
    parser.add_argument("--skew", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.05, help="of one measurement")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds a call may take")
    parser.add_argument("--only", nargs="+", help="alternatives to time, dense among them")
    parser.add_argument("--parts", action="store_true", help="time the pieces of ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.out:
        refuse_existing(options.out)
    result = {
        **environment.describe(("jax", "jaxlib", "flax", "tokamax", "numpy")),
        "backend": jax.devices()[0].device_kind,
        "layer": {
            name: getattr(options, name)
            for name in ("tokens", "embed_dim", "mlp_dim", "topk", "dtype", "capacity_factor")
        },
        "rounds": options.rounds,
        "results": [],
    }
    for num_experts in options.experts:
        if options.parts:
            result["results"].append(parts(options, num_experts))
            print(json.dumps(result["results"][-1], indent=1), file=sys.stderr)
            continue
        record = measure(options, num_experts)
        print_table(record)
        result["results"].append(record)
    if options.out:
        write_json(options.out, result)
    print(json.dumps({"out": options.out}))


if __name__ == "__main__":
    main()
