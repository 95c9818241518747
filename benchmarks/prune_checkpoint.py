"""Time and memory of offline pruning on a synthetic checkpoint larger than memory.

    python benchmarks/prune_checkpoint.py --work /tmp/prune --out benchmarks/results/prune.json

The defaults are 354M+128e: 13B parameters in bfloat16, 26 GB, of which a copy pruned to 64 experts
is written, then one to 8: give them 45 GB of disk and, on two cores, an hour and a half. Rehearse
with

    python benchmarks/prune_checkpoint.py --num_layers 2 --num_experts 16 --targets 4

Router and experts are random, so that assignments are the slow kind. Clusters are uneven as
k-means makes them: one giant, some of three to five, and singletons. Memory is the sum over this
process's children, sampled every 50 ms, above what the pruning process has after its imports.
"""

from __future__ import annotations

import argparse
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

import environment
import numpy as np

PACKAGES = ("jax", "numpy", "scipy", "orbax-checkpoint", "tensorstore")
SPARE_BYTES = 2 * 2**30


def model_config(options: argparse.Namespace, num_experts: int) -> Any:
    from uncurl_jax.config import ModelConfig

    return ModelConfig(
        num_experts=tuple(num_experts * (i % 2 == 0) for i in range(options.num_layers)),
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_heads=max(1, options.embed_dim // 64),
        mlp_dim=options.mlp_dim,
        max_length=1024,
    )


def num_bytes(options: argparse.Namespace, num_experts: int) -> int:
    from uncurl_jax.checkpoints.parameters import expected_parameters

    shapes = expected_parameters(model_config(options, num_experts)).values()
    return 2 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def write_checkpoint(directory: Path, options: argparse.Namespace) -> None:
    """Writes random parameters expert by expert."""
    import ml_dtypes
    from etils import epath
    from tqdm import tqdm

    from uncurl_jax.checkpoints import layout
    from uncurl_jax.checkpoints.parameters import expected_parameters, is_expert_array
    from uncurl_jax.checkpoints.state_writer import StateWriter, create_state

    config = model_config(options, options.num_experts)
    dtype = np.dtype(ml_dtypes.bfloat16)
    targets = {
        f"target/{name}": layout.ArrayMetadata(shape, dtype)
        for name, shape in expected_parameters(config).items()
    }
    step = epath.Path(directory) / "checkpoint_0"
    directory.mkdir(parents=True)
    create_state(step, {**targets, "state/step": layout.ArrayMetadata((), np.dtype(np.int32))})
    writer = StateWriter(step)
    writer.write({"state/step": np.zeros((), np.int32)}).result()
    generator = np.random.default_rng(options.seed)
    pieces = [
        (key, index)
        for key, (shape, _) in targets.items()
        for index in (range(shape[0]) if is_expert_array(key) else [None])
    ]
    pending = None
    for key, index in tqdm(pieces, desc="source", unit="array", file=sys.stderr):
        shape = targets[key].shape if index is None else targets[key].shape[1:]
        array = generator.standard_normal(shape, dtype=np.float32)
        array *= np.float32(0.02)
        if pending is not None:
            pending.result()
        pending = writer.write({key: array.astype(dtype)}, index)
    if pending is not None:
        pending.result()
    files = {
        layout.VOCABULARY_FILE: {"name": "none", "spec": "none", "size": 0, "hash": "0"},
        layout.PROVENANCE_FILE: {"created_by": "benchmarks/prune_checkpoint.py"},
        layout.MODEL_CONFIG_FILE: config.to_dict(),
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value))


def uneven_sizes(num_experts: int, num_clusters: int, generator: np.random.Generator) -> list[int]:
    """Returns how many members each cluster has: one giant, some of three to five, singletons."""
    merged = num_experts - num_clusters
    extra = [0] * num_clusters
    extra[0] = min(merged, int(generator.integers(4, 12)))
    left, cluster = merged - extra[0], 1
    while left and cluster < num_clusters:
        extra[cluster] = min(left, int(generator.integers(2, 5)))
        left -= extra[cluster]
        cluster += 1
    for cluster in range(left):  # few clusters: all grow
        extra[cluster % num_clusters] += 1
    return [1 + count for count in extra]


def write_plan(path: Path, source: Path, num_clusters: int, options: argparse.Namespace) -> int:
    """Writes a plan of random clusters; returns how many experts it aligns."""
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.pruning.grouping import GroupingOptions
    from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource
    from uncurl_jax.pruning.merging import normalized_weights
    from uncurl_jax.pruning.plan import PruningPlan

    generator = np.random.default_rng(options.seed + num_clusters)
    config = layout.resolve(source).model_config()
    layers = []
    for layer in config.moe_layers:
        sizes = uneven_sizes(options.num_experts, num_clusters, generator)
        labels = generator.permutation(np.repeat(np.arange(num_clusters), sizes))
        selected = generator.integers(1, 10**6, len(labels)).astype(float)
        layers.append(
            LayerPlan(
                layer=layer,
                method="random",
                num_experts=len(labels),
                labels=tuple(labels.tolist()),
                reference=tuple(
                    int(np.argmax(np.where(labels == cluster, selected, -1)))
                    for cluster in range(num_clusters)
                ),
                weights=tuple(normalized_weights(labels, selected).tolist()),
                selected=tuple(selected.tolist()),
                cluster_sizes=tuple(sizes),
                gate_factors=None,
                fitted_router=None,
                expected_drop_fraction=0.0,
                diagnostics={},
                verdict="random clusters for a benchmark",
                warnings=(),
            )
        )
    plan = PruningPlan(
        method="random",
        router="reference",
        grouping=GroupingOptions(),
        seed=0,
        alignment="features",
        gate_compensation=False,
        eval_capacity_factor=None,
        source=PlanSource(
            checkpoint_hash=layout.fingerprint(source),
            statistics_hash="0",
            task="none",
            split="none",
            tokens=0,
            num_experts=config.num_experts,
            num_selected_experts=config.num_selected_experts,
        ),
        layers=tuple(layers),
    )
    plan.save(path)
    return sum(size - 1 for layer in plan.layers for size in layer.cluster_sizes)


def prune(source: Path, plan_path: Path, out: Path, workers: int | None) -> None:
    """Runs in a process of its own; prints the memory before and the summary."""
    from tqdm import tqdm

    from uncurl_jax.checkpoints.transform import prune_checkpoint
    from uncurl_jax.pruning.plan import PruningPlan

    plan = PruningPlan.load(plan_path)
    base = resident_bytes(os.getpid())
    with tqdm(desc="prune", unit="expert", file=sys.stderr) as bar:

        def show(_: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = prune_checkpoint(source, plan, out, workers=workers, progress=show)
    print(json.dumps({"base_bytes": base, "summary": summary}))


def resident_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def descendants(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for child in text.split()]
    return [*children, *(d for child in children for d in descendants(child))]


class PeakMemory(threading.Thread):
    """Samples the memory of a process and of all below it."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self._process = process
        self._ended = threading.Event()
        self.parent_bytes = self.total_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(0.05):
            parent = resident_bytes(self._process)
            children = sum(resident_bytes(child) for child in descendants(self._process))
            self.parent_bytes = max(self.parent_bytes, parent)
            self.total_bytes = max(self.total_bytes, parent + children)

    def end(self) -> None:
        self._ended.set()
        self.join()


def measured_prune(source: Path, plan: Path, out: Path, workers: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--prune", str(source), str(plan), str(out)]
    command += [] if workers is None else ["--workers", str(workers)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    memory.start()
    output, _ = process.communicate()
    memory.end()
    if process.returncode:
        raise SystemExit(f"the prune ended with {process.returncode}")
    got = json.loads(output.splitlines()[-1])
    base = got["base_bytes"]
    summary = got["summary"]
    return {
        "seconds": summary["seconds"],
        "seconds_with_imports": round(time.monotonic() - start, 1),
        "parts": summary["parts"],
        "workers": summary["workers"],
        "base_gib": round(base / 2**30, 3),
        "peak_above_base_gib": round((memory.total_bytes - base) / 2**30, 3),
        "peak_of_parent_above_base_gib": round((memory.parent_bytes - base) / 2**30, 3),
        "bytes": summary["bytes"],
    }


def time_copying(source: Path, out: Path, target_bytes: int) -> dict[str, float]:
    """Reads every array once; then writes `target_bytes` of one expert's size after another."""
    from etils import epath
    from tqdm import tqdm

    from uncurl_jax.checkpoints import layout
    from uncurl_jax.checkpoints.parameters import is_expert_array
    from uncurl_jax.checkpoints.state_writer import StateWriter, create_state

    reader = layout.StateReader(source)
    pieces = [
        (key, index)
        for key, (shape, _) in reader.metadata.items()
        for index in (range(shape[0]) if is_expert_array(key) else [None])
    ]
    array = np.zeros(0)
    start = time.monotonic()
    for part in tqdm(reader.stream(pieces), desc="read", total=len(pieces), file=sys.stderr):
        array = part if part.nbytes > array.nbytes and part.ndim == 2 else array
    read_seconds = time.monotonic() - start
    count = max(1, target_bytes // array.nbytes)
    step = epath.Path(out) / "checkpoint_0"
    out.mkdir()
    key = "target/experts/wi"
    create_state(step, {key: layout.ArrayMetadata((count, *array.shape), array.dtype)})
    writer = StateWriter(step)
    start = time.monotonic()
    pending = None
    for index in tqdm(range(count), desc="write", file=sys.stderr):
        if pending is not None:
            pending.result()
        pending = writer.write({key: array}, index)
    if pending is not None:
        pending.result()
    write_seconds = time.monotonic() - start
    shutil.rmtree(out)
    return {"read": round(read_seconds, 2), "write": round(write_seconds, 2)}


def time_alignment(source: Path, pairs: int) -> dict[str, float]:
    """Aligns some pairs of experts in a process for each core, with nothing else to do."""
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.pruning.alignment import AlignmentPool

    reader = layout.StateReader(source)
    prefix = "target/layers_0/moe/experts/"
    keys = [key for key in reader.metadata if key.startswith(prefix)]

    def expert(index: int) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): reader.read(key, index) for key in keys}

    reference = expert(0)
    num_experts = reader.metadata[keys[0]].shape[0]
    members = [expert(1 + index % min(4, num_experts - 1)) for index in range(pairs)]
    workers = len(os.sched_getaffinity(0))
    with AlignmentPool(workers, "features") as pool:
        for future in [pool.submit(0, reference, member) for member in members[:workers]]:
            future.result()  # processes have started
        start = time.monotonic()
        futures = [pool.submit(0, reference, member) for member in members]
        aligned = [future.result() for future in futures]
        seconds = time.monotonic() - start
    return {
        "pairs": pairs,
        "workers": workers,
        "products": float(np.mean([a.seconds_products for a in aligned])),
        "assignment": float(np.mean([a.seconds_assignment for a in aligned])),
        "wall_per_pair": seconds / pairs,
    }


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    source = work / "source"
    if not source.exists():
        write_checkpoint(source, options)
    pair = time_alignment(source, options.pairs)
    runs = []
    for target in options.targets:
        plan, out = work / f"plan_{target}.json", work / f"pruned_{target}"
        aligned = write_plan(plan, source, target, options)
        copying = time_copying(source, work / "copied", num_bytes(options, target))
        measured = measured_prune(source, plan, out, options.workers)
        # What the prune cannot take less than: aligning on all cores, or moving the bytes.
        alignment = aligned * pair["wall_per_pair"]
        bound = max(alignment, sum(copying.values()))
        runs.append(
            {
                "num_experts": {"before": options.num_experts, "after": target},
                "aligned_experts": aligned,
                "copying_seconds": copying,
                "alignment_seconds_on_all_cores": round(alignment, 1),
                "assignment_alone_seconds_on_all_cores": round(
                    aligned * pair["assignment"] / pair["workers"], 1
                ),
                "seconds_over_bound": round(measured["seconds"] / bound, 3),
                **measured,
            }
        )
        print(json.dumps(runs[-1]), file=sys.stderr)
        if not options.keep:
            shutil.rmtree(out)
    expert_bytes = 2 * (2 * options.embed_dim * options.mlp_dim)
    return {
        **environment.describe(PACKAGES),
        "source": {
            "num_layers": options.num_layers,
            "num_experts": options.num_experts,
            "embed_dim": options.embed_dim,
            "mlp_dim": options.mlp_dim,
            "bytes": num_bytes(options, options.num_experts),
            "expert_mib": round(expert_bytes / 2**20, 2),
        },
        "one_pair": pair,
        "prunes": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_layers", type=int, default=24, help="every other one has experts")
    parser.add_argument("--num_experts", type=int, default=128)
    parser.add_argument("--embed_dim", type=int, default=1024)
    parser.add_argument("--mlp_dim", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--pairs", type=int, default=8, help="pairs to time the alignment on")
    parser.add_argument("--workers", type=int, help="as for prune_checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="directory for checkpoints; a source in it is used again")
    parser.add_argument("--keep", action="store_true", help="keep the pruned checkpoints")
    parser.add_argument("--out", help="JSON file to write; otherwise standard output alone")
    parser.add_argument("--prune", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        prune(*options.prune, options.workers)
        return
    from uncurl_jax.artifacts import write_json

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        has_source = (work / "source").exists()
        needed = SPARE_BYTES + num_bytes(options, max(options.targets))
        needed += 0 if has_source else num_bytes(options, options.num_experts)
        free = shutil.disk_usage(work).free
        if free < needed:
            print(
                f"skipped: {needed / 2**30:.1f} GiB of disk are needed, {free / 2**30:.1f} GiB are "
                "free; give another --work or a smaller model",
                file=sys.stderr,
            )
            return
        result = run(options, work)
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
