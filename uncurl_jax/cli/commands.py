"""One function per command: options -> the JSON that the command prints.

Options hold only what was given, so gin bindings fill in the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uncurl_jax.artifacts import refuse_existing
from uncurl_jax.cli.gin_config import configured
from uncurl_jax.errors import InputError

# Modules that --gin.X=Y may name, as `module.name.parameter`, without a gin file importing them.
GIN_MODULES = ("uncurl_jax.config",)

Options = dict[str, Any]
_DEFAULT_MAX_LENGTH = 512

# What a command is configured with if no --gin_file is given.
DEFAULT_GIN_FILES = {"quickstart": "gin/runs/quickstart.gin"}


def _initialize_distributed(options: Options) -> None:
    """Joins the other processes if asked to, before anything else touches JAX."""
    if not options.pop("distributed", False):
        return
    import jax

    names = {
        "coordinator_address": ("JAX_COORDINATOR_ADDRESS", str),
        "num_processes": ("JAX_NUM_PROCESSES", int),
        "process_id": ("JAX_PROCESS_ID", int),
    }
    given = {
        name: kind(os.environ[variable])
        for name, (variable, kind) in names.items()
        if variable in os.environ
    }
    jax.distributed.initialize(**given)


def _only_first_process(result: Any) -> Any:
    import jax

    return result if jax.process_index() == 0 else None


@contextlib.contextmanager
def _open_task(options: Options, default_split: str) -> Iterator[Any]:
    """Opens a token cache, or builds one for a named task in a temporary directory."""
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.data.token_cache import TokenCache, build_token_cache

    task, split = options.pop("task"), options.pop("split", default_split)
    data_dir, vocabulary = options.pop("data_dir", None), options.get("vocabulary")
    path = Path(task)
    if path.is_dir():
        inner = path / split
        yield TokenCache.open(inner if inner.is_dir() else path)
        return
    checkpoint = layout.resolve(options["checkpoint"])
    if data_dir is None and not task.startswith("seqio:"):
        from uncurl_jax.data import registry

        registry.find_task(task)
        raise InputError(
            f"A named task needs its files, got --task {task} without --data_dir: pass "
            "--data_dir, or a token cache as --task."
        )
    with tempfile.TemporaryDirectory(prefix="uncurl_cache_") as directory:
        build_token_cache(
            task,
            vocabulary=vocabulary or checkpoint.vocabulary()["spec"],
            out=Path(directory) / "cache",
            max_length=checkpoint.model_config().max_length,
            data_dir=data_dir or ".",
            splits=(split,),
        )
        yield TokenCache.open(Path(directory) / "cache" / split)


def cache(options: Options) -> Any:
    """`uncurl cache`."""
    from tqdm import tqdm

    from uncurl_jax.data import token_cache

    out = refuse_existing(options.pop("out"))
    options.setdefault("vocabulary", "bytes")
    options.setdefault("max_length", _DEFAULT_MAX_LENGTH)
    with tqdm(unit="row", desc="cache", file=sys.stderr) as bar:

        def show(split: str, rows: int) -> None:
            bar.set_description(f"cache {split}", refresh=False)
            bar.update(max(rows - bar.n, 0) if rows > bar.n else rows)

        build = configured(token_cache.build_token_cache)
        manifests = build(out=out, progress=show, **options)
    return {
        "out": str(out),
        "splits": {
            split: {
                name: manifest[name]
                for name in ("task", "rows", "examples", "tokens", "truncated_rows", "hash")
            }
            for split, manifest in manifests.items()
        },
    }


def train(options: Options) -> Any:
    """`uncurl train`."""
    _initialize_distributed(options)
    from uncurl_jax.training import trainer

    if "checkpoint" in options:
        options["initial_checkpoint"] = options.pop("checkpoint")
    result = configured(trainer.train)(**options)
    return _only_first_process(
        {
            "checkpoint": str(result.checkpoint),
            "step": result.step,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 3),
            "metrics": result.metrics,
        }
    )


def calibrate(options: Options) -> Any:
    """`uncurl calibrate`."""
    _initialize_distributed(options)
    from uncurl_jax.evaluation import calibration

    out = refuse_existing(options.pop("out"))
    with _open_task(options, "train") as task_cache:
        options.pop("vocabulary", None)
        run = configured(calibration.calibrate_checkpoint)
        statistics = run(cache=task_cache, out=out, **options)
    return _only_first_process(
        {
            "out": str(out),
            "task": statistics.manifest["task"],
            "tokens": statistics.tokens,
            "moe_layers": sorted(statistics.layers),
            "hash": statistics.hash,
        }
    )


def plan(options: Options) -> Any:
    """`uncurl plan`."""
    from uncurl_jax.pruning import plan as plan_lib
    from uncurl_jax.pruning.statistics import RouterStatistics

    out = refuse_existing(options.pop("out"))
    statistics = RouterStatistics.load(options.pop("statistics"))
    result = configured(plan_lib.make_plan)(statistics, **options)
    result.save(out)
    for warning in result.warnings:
        print(f"uncurl plan: warning: {warning}", file=sys.stderr)
    return {
        "out": str(out),
        "method": result.method,
        "num_experts": list(result.num_experts),
        "cluster_sizes": {str(layer.layer): layer.cluster_sizes for layer in result.layers},
        "expected_drop_fraction": {
            str(layer.layer): layer.expected_drop_fraction for layer in result.layers
        },
        "warnings": len(result.warnings),
        "hash": result.hash,
    }


def prune(options: Options) -> Any:
    """`uncurl prune`."""
    from tqdm import tqdm

    from uncurl_jax.checkpoints import transform
    from uncurl_jax.pruning.plan import PruningPlan

    out = options.pop("out")
    pruning_plan = PruningPlan.load(options.pop("plan"))
    source = options.pop("checkpoint")
    with tqdm(desc="prune", file=sys.stderr, unit="step") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(f"prune: {stage}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        run = configured(transform.prune_checkpoint)
        return run(source, pruning_plan, out, progress=show, **options)


def evaluate(options: Options) -> Any:
    """`uncurl evaluate`."""
    _initialize_distributed(options)
    from uncurl_jax.evaluation import evaluator

    out = refuse_existing(options.pop("out"))
    with _open_task(options, "validation") as task_cache:
        run = configured(evaluator.evaluate_checkpoint)
        summary = run(cache=task_cache, out=out, **options)
    return _only_first_process({"out": str(out), **summary})


def inspect(options: Options) -> Any:
    """`uncurl inspect`."""
    from uncurl_jax.checkpoints.inspect import describe

    description = describe(options["checkpoint"])
    for line in _description_lines(description):
        print(line, file=sys.stderr)
    return description


def _description_lines(description: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{description['path']}: step {description['step']}, "
        f"{description['parameters']:,} parameters ({description['active_parameters']:,} active), "
        f"{description['bytes'] / 2**20:,.1f} MiB"
    )
    yield f"{'layer':>5}  {'experts':>7}  {'parameters':>14}  {'active':>14}  {'MiB':>10}"
    for layer in description["layers"]:
        experts = layer["num_experts"] or "dense"
        yield (
            f"{layer['layer']:>5}  {experts:>7}  {layer['parameters']:>14,}  "
            f"{layer['active_parameters']:>14,}  {layer['bytes'] / 2**20:>10,.1f}"
        )


def sweep(options: Options) -> Any:
    """`uncurl sweep`."""
    from uncurl_jax.experiments import sweep as sweep_lib

    records = configured(sweep_lib.run_sweep)(**options)
    return {"out": options["out"], "runs": len(records)}


def report(options: Options) -> Any:
    """`uncurl report`."""
    from uncurl_jax.experiments import report as report_lib

    result = report_lib.write_report(options["directory"])
    print(report_lib.format_table(result["rows"]), file=sys.stderr)
    directory = Path(options["directory"])
    return {
        "report": str(directory / "report.html"),
        "json": str(directory / "report.json"),
        "headline": result["headline"],
    }


def quickstart(options: Options) -> Any:
    """`uncurl quickstart`."""
    from uncurl_jax.experiments import quickstart as quickstart_lib
    from uncurl_jax.experiments import report as report_lib

    result = configured(quickstart_lib.run_quickstart)(**options)
    print(report_lib.format_table(result["rows"]), file=sys.stderr)
    return {
        "report": str(Path(options["out"]) / "report.html"),
        "headline": result["headline"],
    }


COMMANDS: dict[str, Callable[[Options], Any]] = {
    "cache": cache,
    "train": train,
    "calibrate": calibrate,
    "plan": plan,
    "prune": prune,
    "evaluate": evaluate,
    "inspect": inspect,
    "sweep": sweep,
    "report": report,
    "quickstart": quickstart,
}

