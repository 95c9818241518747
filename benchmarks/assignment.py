"""Times exact solvers of the linear assignment problem that aligns two experts.

    python benchmarks/assignment.py --out benchmarks/results/assignment.json

Takes about fifteen minutes at 4096 hidden units, most of them in solvers that do badly. Solvers of
packages that are not installed (lap or lapx, lapjv) are left out. One thread each; times are minima
over the repeats. Every solver's objective, summed in float64 from float64 products, is compared
with that of scipy on those.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import environment
import numpy as np
import scipy.optimize
import threadpoolctl

from uncurl_jax.artifacts import write_json
from uncurl_jax.pruning.assignment import best_assignment

Solver = Callable[[np.ndarray], np.ndarray]


def pairs_of_experts(
    num_hidden: int, embed: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (kind, reference, member): features [mlp, 2 * embed] float32."""
    generator = np.random.default_rng(seed)

    def normal() -> np.ndarray:
        return generator.standard_normal((num_hidden, 2 * embed), dtype=np.float32)

    def spread() -> np.ndarray:
        return np.exp(0.7 * generator.standard_normal((num_hidden, 1))).astype(np.float32)

    first, order = normal(), generator.permutation(num_hidden)
    yield "unrelated", first, normal()
    for noise in (0.5, 2.0):
        yield f"related, noise {noise}", first, first[order] + noise * normal()
    # Trained experts differ in the norms of their units and share directions (their mean).
    mean = 0.5 * generator.standard_normal((1, 2 * embed), dtype=np.float32)
    norms = spread()
    trained = first * norms + mean
    yield "trained-like, related", trained, (first * norms + mean)[order] + spread() * normal()
    yield "trained-like, unrelated", trained, normal() * spread() + mean


def scipy_plain(products: np.ndarray) -> np.ndarray:
    return scipy.optimize.linear_sum_assignment(products, maximize=True)[1]


def scipy_negated(products: np.ndarray) -> np.ndarray:
    return scipy.optimize.linear_sum_assignment(np.negative(products, dtype=np.float64))[1]


def scipy_transposed(products: np.ndarray) -> np.ndarray:
    costs = np.ascontiguousarray(np.negative(products.T, dtype=np.float64))
    return np.argsort(scipy.optimize.linear_sum_assignment(costs)[1])


def scipy_rows_reduced(products: np.ndarray) -> np.ndarray:
    costs = np.negative(products, dtype=np.float64)
    costs -= costs.min(axis=1, keepdims=True)
    return scipy.optimize.linear_sum_assignment(costs)[1]


def scipy_columns_reduced(products: np.ndarray) -> np.ndarray:
    costs = np.negative(products, dtype=np.float64)
    costs -= costs.min(axis=0)
    costs -= costs.min(axis=1, keepdims=True)
    return scipy.optimize.linear_sum_assignment(costs)[1]


def scipy_rows_presorted(products: np.ndarray) -> np.ndarray:
    """Rows whose best product is largest come first."""
    order = np.argsort(-products.max(axis=1), kind="stable")
    columns = scipy.optimize.linear_sum_assignment(np.negative(products[order], dtype=np.float64))[
        1
    ]
    result = np.empty_like(columns)
    result[order] = columns
    return result


def scipy_auctioned(products: np.ndarray) -> np.ndarray:
    """Dual warm start: two bids for each row in Python, then scipy on what is left of the costs."""
    costs = np.negative(products, dtype=np.float64)
    prices, bid = costs.min(axis=0), np.empty(len(costs))
    owner = np.full(len(costs), -1)
    free = list(range(len(costs)))
    for _ in range(2):
        outbid = []
        for row in free:
            np.subtract(costs[row], prices, out=bid)
            column = int(bid.argmin())
            best, bid[column] = bid[column], np.inf
            prices[column] -= bid.min() - best
            if owner[column] >= 0:
                outbid.append(int(owner[column]))
            owner[column] = row
        free = outbid
    costs -= prices
    costs -= costs.min(axis=1, keepdims=True)
    return scipy.optimize.linear_sum_assignment(costs)[1]


def reduced(products: np.ndarray) -> np.ndarray:
    costs = np.negative(products, dtype=np.float64)
    costs -= costs.min(axis=1, keepdims=True)
    costs -= costs.min(axis=0)
    return costs


def solvers() -> dict[str, Solver]:
    found: dict[str, Solver] = {
        "scipy": scipy_plain,
        "scipy, negated": scipy_negated,
        "scipy, transposed": scipy_transposed,
        "scipy, rows reduced": scipy_rows_reduced,
        "scipy, columns then rows reduced": scipy_columns_reduced,
        "scipy, rows presorted": scipy_rows_presorted,
        "scipy, auction first": scipy_auctioned,
        "best_assignment (rows then columns reduced)": best_assignment,
    }
    try:
        import lap
    except ImportError:
        print("left out: lap, lapx (not installed)", file=sys.stderr)
    else:
        found["lap.lapjv"] = lambda products: lap.lapjv(np.negative(products, dtype=np.float64))[1]
    try:
        import lapjv
    except ImportError:
        print("left out: lapjv (not installed)", file=sys.stderr)
    else:
        found["lapjv, float32"] = lambda products: lapjv.lapjv(np.negative(products))[0]
        found["lapjv, rows then columns reduced"] = lambda products: lapjv.lapjv(reduced(products))[
            0
        ]
        found["lapjv, float64"] = lambda products: lapjv.lapjv(
            np.negative(products, dtype=np.float64)
        )[0]
    return found


def measure(kind: str, reference: np.ndarray, member: np.ndarray, repeats: int) -> dict:
    start = time.perf_counter()
    products = reference @ member.T
    seconds_products = time.perf_counter() - start
    exact = reference.astype(np.float64) @ member.T.astype(np.float64)
    rows = np.arange(len(exact))
    scipys = scipy_plain(exact)
    objective = exact[rows, scipys].sum()
    record: dict = {
        "experts": kind,
        "seconds_products_float32": round(seconds_products, 4),
        "identity": exact.trace() / objective,
        "solvers": {},
    }
    for name, solve in solvers().items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = solve(products)
            times.append(time.perf_counter() - start)
        assert len(set(found.tolist())) == len(rows), name
        record["solvers"][name] = {
            "seconds": round(min(times), 4),
            "relative_loss": float((objective - exact[rows, found].sum()) / abs(objective)),
            "same_as_float64": float((found == scipys).mean()),
        }
        print(f"{kind}: {name} {min(times):.3f} s", file=sys.stderr)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mlp_dim", type=int, default=4096)
    parser.add_argument("--embed_dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write; otherwise standard output alone")
    options = parser.parse_args()
    with threadpoolctl.threadpool_limits(1):
        records = [
            measure(*pair, options.repeats)
            for pair in pairs_of_experts(options.mlp_dim, options.embed_dim, options.seed)
        ]
    packages = ("numpy", "scipy", "lap", "lapx", "lapjv")
    result = {
        **environment.describe(packages),
        "mlp_dim": options.mlp_dim,
        "embed_dim": options.embed_dim,
        "threads": 1,
        "experts": records,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
