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
from uncurl_jax.cli import (
    convert_commands,
    export_commands,
    recipe_commands,
    serve_command,
    t5x_commands,
)
from uncurl_jax.cli.gin_config import bound, bound_value, configured
from uncurl_jax.errors import InputError

# Modules that --gin.X=Y may name, as `module.name.parameter`, without a gin file importing them.
_STUDY_MODULES = ("uncurl_jax.config", "uncurl_jax.experiments.study")
GIN_MODULES: dict[str, tuple[str, ...]] = {
    "gin": _STUDY_MODULES,
    "cache": ("uncurl_jax.data.token_cache",),
    "train": ("uncurl_jax.config", "uncurl_jax.training.trainer"),
    "calibrate": (
        "uncurl_jax.evaluation.calibration",
        "uncurl_jax.evaluation.layerwise_calibration",
    ),
    "merge-statistics": (),
    "plan": ("uncurl_jax.pruning.plan",),
    "inspect-plan": (),
    "verify": (),
    "prune": ("uncurl_jax.checkpoints.transform",),
    "import": (),
    "export": (),
    "verify-artifact": (),
    "evaluate": ("uncurl_jax.evaluation.evaluator",),
    "compare": ("uncurl_jax.evaluation.evaluator",),
    "inspect": (),
    "sweep": (*_STUDY_MODULES, "uncurl_jax.experiments.sweep"),
    "report": (),
    "gate": (),
    "quickstart": (*_STUDY_MODULES, "uncurl_jax.experiments.quickstart"),
    "pilot": (*_STUDY_MODULES, "uncurl_jax.experiments.pilot"),
    "placement": ("uncurl_jax.config",),
    "bench": ("uncurl_jax.config", "uncurl_jax.deployment.bench"),
    "aot": ("uncurl_jax.config", "uncurl_jax.training.trainer"),
    "recipes": recipe_commands.GIN_MODULES,
    "serve": serve_command.GIN_MODULES,
    "t5x": ("uncurl_jax.config",),
}

Options = dict[str, Any]

# What must stand in the environment before a command imports JAX.
ENVIRONMENT: dict[str, dict[str, str]] = {
    "aot": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Nothing is run, so a second process does no harm.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Of any slice: the topology's name decides. Without them libtpu looks, and warns.
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
    },
}

# What a command is configured with if no --gin_file is given.
DEFAULT_GIN_FILES = {
    "quickstart": "gin/runs/quickstart.gin",
    "pilot": "gin/runs/pilot.gin",
}


def initialize_distributed(options: Options, *, saves_on_sigterm: bool = False) -> None:
    """Joins the other processes if asked to, before anything else touches JAX.

    JAX's preemption service swallows SIGTERM, so it is for those alone that ask it when to stop.
    """
    if not options.pop("distributed", False):
        return
    import jax

    names = {
        "coordinator_address": ("JAX_COORDINATOR_ADDRESS", str),
        "num_processes": ("JAX_NUM_PROCESSES", int),
        "process_id": ("JAX_PROCESS_ID", int),
        "heartbeat_timeout_seconds": ("JAX_HEARTBEAT_TIMEOUT_SECONDS", int),
    }
    given = {
        name: kind(os.environ[variable])
        for name, (variable, kind) in names.items()
        if variable in os.environ
    }
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    jax.distributed.initialize(**given)


@contextlib.contextmanager
def show_progress(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields show(done, total) of a progress bar with remaining time.

    The delay keeps an empty bar from standing before the sentence about a wrong input.
    """
    from tqdm import tqdm

    with tqdm(desc=name, file=sys.stderr, unit=unit, delay=1.0) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                # What an interrupted run had done says nothing about speed.
                bar.total, bar.initial, bar.n = total, done, done
            bar.update(done - bar.n)

        yield show


def only_first_process(result: Any) -> Any:
    """Returns what the first process prints, None in the others."""
    import jax

    return result if jax.process_index() == 0 else None


def _check_writable(out: str | Path) -> None:
    """Checks, before any work, that an output or what it lies in is a directory to write to."""
    if "://" in str(out):
        return
    path = Path(out).absolute()
    found = next(folder for folder in (path, *path.parents) if folder.exists())
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        reason = "cannot be written" if found.is_dir() else "is a file"
        raise InputError(
            f"An output must lie in a directory that can be written, got {out} where {found} "
            f"{reason}: choose another --out."
        )


def new_output(path: str) -> Path:
    """Returns the path of an output that does not exist yet and can be written."""
    out = refuse_existing(path)
    _check_writable(path)
    return out


@contextlib.contextmanager
def _open_task(
    options: Options, default_split: str, *, is_evaluation: bool = False
) -> Iterator[Any]:
    """Opens a token cache, or builds one for a named task in a temporary directory.

    With "seqio:<name>" the task comes from SeqIO: a registered one, or one of ours registered there
    if --data_dir is given; an evaluation then leaves the metrics to SeqIO's Evaluator.
    """
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.data import registry
    from uncurl_jax.data.cache_builder import SEQIO_PREFIX, build_token_cache
    from uncurl_jax.data.token_cache import TokenCache
    from uncurl_jax.data.vocabulary import load_vocabulary

    task, given_split = options.pop("task"), options.pop("split", None)
    split = given_split or default_split
    data_dir, vocabulary = options.pop("data_dir", None), options.get("vocabulary")
    path = Path(task)
    if path.is_dir():
        inner = path / split
        found = TokenCache.open(inner if inner.is_dir() else path)
        if given_split is not None and found.split != given_split:
            raise InputError(
                f"--split must be the split of the token cache, got {given_split} for "
                f"{found.directory}, which holds {found.split}: leave out one of them."
            )
        if vocabulary is not None:
            loaded = load_vocabulary(vocabulary)
            found.check_vocabulary(loaded.hash, loaded.name)
        yield found
        return
    if os.sep in task and not task.startswith(SEQIO_PREFIX):
        raise InputError(
            f"--task must be a token cache's directory or a task's name, got {task}, which does "
            "not exist: check the path."
        )
    checkpoint = layout.resolve(options["checkpoint"])
    if task.startswith(SEQIO_PREFIX):
        name = task.removeprefix(SEQIO_PREFIX)
        if data_dir is not None:
            name = _register_with_seqio(name, data_dir, checkpoint, vocabulary)
            task = SEQIO_PREFIX + name
        if is_evaluation:
            options["seqio_task"] = name
    elif data_dir is None:
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


def _register_with_seqio(name: str, data_dir: str, checkpoint: Any, vocabulary: str | None) -> str:
    from uncurl_jax.data import registry, seqio_tasks
    from uncurl_jax.data.vocabulary import load_vocabulary

    return seqio_tasks.register_seqio_task(
        registry.get_task(name),
        data_dir,
        load_vocabulary(vocabulary or checkpoint.vocabulary()["spec"]),
        checkpoint.model_config().max_length,
    )


def show_gin(options: Options) -> Any:
    """`uncurl gin`."""
    import gin

    from uncurl_jax.cli.gin_show import resolved

    del options
    result = resolved()
    print(gin.config_str(), file=sys.stderr)
    return result


def cache(options: Options) -> Any:
    """`uncurl cache`."""
    from tqdm import tqdm

    from uncurl_jax.data import token_cache

    out = new_output(options.pop("out"))
    done: dict[str, int] = {}
    # The delay keeps an empty bar from standing before the sentence about a wrong input.
    with tqdm(unit="row", desc="cache", file=sys.stderr, delay=1e-3) as bar:

        def show(split: str, rows: int) -> None:
            bar.set_description(f"cache {split}", refresh=False)
            bar.update(rows - done.get(split, 0))
            done[split] = rows

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
    initialize_distributed(options, saves_on_sigterm=True)
    from uncurl_jax.training import trainer

    _check_writable(options["out"])
    if "checkpoint" in options:
        options["initial_checkpoint"] = options.pop("checkpoint")
    if "placement" in options:
        options["config"] = _placed_config(options)
    if "validation" in options:
        options["validation"] = _validation(options["validation"])
    result = configured(trainer.train)(**options)
    return only_first_process(
        {
            "checkpoint": str(result.checkpoint),
            "step": result.step,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 3),
            "metrics": result.metrics,
        }
    )


def _validation(directory: str) -> Any:
    """Opens the token cache that early stopping scores."""
    import functools

    from uncurl_jax.data.token_cache import TokenCache
    from uncurl_jax.evaluation.evaluator import validation_score
    from uncurl_jax.training.early_stopping import Validation

    cache = TokenCache.open(directory)
    record = {"task": cache.task, "split": cache.split, "hash": cache.hash}
    return Validation(functools.partial(validation_score, cache=cache), record)


def _placed_config(options: Options) -> Any:
    """Takes --placement out of the options; returns the stage's configuration with its mesh."""
    import dataclasses

    import jax

    from uncurl_jax.checkpoints import layout
    from uncurl_jax.deployment.placement import load_placement
    from uncurl_jax.training import trainer

    placed = load_placement(options.pop("placement"))
    config = bound_value(trainer.train, "config")
    if config is None:
        raise InputError(
            "--placement needs a stage to place, got no TrainConfig: give --gin_file, as "
            "gin/runs/pretrain.gin."
        )
    model = config.model
    if "initial_checkpoint" in options:
        model = layout.resolve(options["initial_checkpoint"]).model_config()
    if model is not None:
        placed.check_training(
            num_devices=jax.device_count(),
            num_experts=model.num_experts,
            batch_size=config.batch_size,
            parts=config.accumulation_steps,
        )
    values = {
        "expert_partitions": placed.expert_partitions,
        "model_partitions": placed.model_partitions,
        "expert_axes": placed.expert_axes,
    }
    for name, unset in (("expert_partitions", 1), ("model_partitions", 1), ("expert_axes", None)):
        if getattr(config, name) not in (unset, values[name]):
            raise InputError(
                f"--placement sets TrainConfig.{name} to {values[name]}, got another in the gin "
                f"configuration, {getattr(config, name)}: leave out one of them."
            )
    return dataclasses.replace(config, **values)


def calibrate(options: Options) -> Any:
    """`uncurl calibrate`."""
    calibrate_with = _calibration(options)
    initialize_distributed(options)
    out = new_output(options.pop("out"))
    if "inputs_out" in options:
        _check_writable(options["inputs_out"])
    with _open_task(options, "train") as task_cache:
        options.pop("vocabulary", None)
        run = configured(calibrate_with)
        statistics = run(cache=task_cache, out=out, **options)
    return only_first_process(_statistics_line(out, statistics))


def _calibration(options: Options) -> Callable[..., Any]:
    """Chooses the function that calibrates; options that only the other one has are refused."""
    from uncurl_jax.evaluation import calibration, layerwise_calibration

    is_layerwise = options.pop("layer_by_layer", False)
    foreign = (
        ("shard", "expert_partitions", "model_partitions", "distributed")
        if is_layerwise
        else ("activations_dir",)
    )
    given = [name for name in foreign if name in options]
    if given:
        raise InputError(
            f"--{given[0]} must come {'without' if is_layerwise else 'with'} --layer_by_layer, "
            "got it otherwise: leave it out."
        )
    if is_layerwise:
        return layerwise_calibration.calibrate_layer_by_layer
    return calibration.calibrate_checkpoint


def _statistics_line(out: Path, statistics: Any) -> dict[str, Any]:
    return {
        "out": str(out),
        "task": statistics.manifest["task"],
        "tokens": statistics.tokens,
        "moe_layers": sorted(statistics.layers),
        "collected": statistics.manifest["collected"],
        "hash": statistics.hash,
    }


def merge_statistics(options: Options) -> Any:
    """`uncurl merge-statistics`."""
    from uncurl_jax.pruning import statistics

    out = new_output(options["out"])
    merged = statistics.merge_statistics(options["statistics"])
    merged.save(out)
    return _statistics_line(out, merged)


def plan(options: Options) -> Any:
    """`uncurl plan`."""
    from uncurl_jax.pruning import plan as plan_lib
    from uncurl_jax.pruning.router_inputs import RouterInputs
    from uncurl_jax.pruning.statistics import RouterStatistics

    out = new_output(options.pop("out"))
    statistics = RouterStatistics.load(options.pop("statistics"))
    is_diagnosed, workers = options.pop("diagnose", False), options.pop("workers", 0)
    weights = _plan_weights(options, is_needed=is_diagnosed)
    if weights is not None:
        weights.check_source(statistics.manifest["checkpoint_hash"])
        options["weights"] = weights
    if "router_inputs" in options:
        options["router_inputs"] = RouterInputs.load(options["router_inputs"])
    if "eval_capacity_factor" not in bound(plan_lib.make_plan):
        # Overflow is predicted for the capacity that the statistics were taken at.
        factor = statistics.manifest.get("eval_capacity_factor", 1.0)
        options["eval_capacity_factor"] = factor
    file_format = options.pop("format", None)
    result = configured(plan_lib.make_plan)(statistics, **options)
    convert_commands.check_plan(result, statistics.manifest, file_format)
    if is_diagnosed and weights is not None:
        with show_progress("diagnose", "layer") as show:
            result = weights.measure(
                result, options.get("router_inputs"), workers=workers, progress=show
            )
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
        "verdict": result.verdict,
        "hash": result.hash,
    }


def _plan_weights(options: Options, *, is_needed: bool) -> Any:
    """Opens --checkpoint (and --base_checkpoint) for planning, None if it is not given."""
    from uncurl_jax.checkpoints.weights import CheckpointWeights

    checkpoint, base = options.pop("checkpoint", None), options.pop("base_checkpoint", None)
    if checkpoint is not None:
        return CheckpointWeights(checkpoint, base)
    if base is not None or is_needed:
        name = "--diagnose" if is_needed else "--base_checkpoint"
        raise InputError(f"{name} needs the checkpoint that was calibrated: give --checkpoint too.")
    return None


def inspect_plan(options: Options) -> Any:
    """`uncurl inspect-plan`."""
    from uncurl_jax.experiments.reporting import plan_view
    from uncurl_jax.pruning.plan import PruningPlan

    picture = new_output(options["picture"]) if "picture" in options else None
    loaded = PruningPlan.load(options["plan"])
    print(plan_view.format_plan(loaded), file=sys.stderr)
    if picture is not None:
        plan_view.write_page(loaded, picture)
    return {**plan_view.describe_plan(loaded), "picture": None if picture is None else str(picture)}


def verify(options: Options) -> Any:
    """`uncurl verify`."""
    from uncurl_jax.checkpoints.verify import verify_checkpoint

    with show_progress("verify", "piece") as show:
        return verify_checkpoint(
            options["checkpoint"],
            options.get("source"),
            workers=options.get("workers"),
            progress=lambda _, done, total: show(done, total),
        )


def prune(options: Options) -> Any:
    """`uncurl prune`."""
    from uncurl_jax.checkpoints import transform
    from uncurl_jax.pruning.plan import PruningPlan

    # Absolute, because Orbax refuses to write below a relative directory.
    out = options.pop("out")
    out = out if "://" in out else os.path.abspath(new_output(out))
    pruning_plan = PruningPlan.load(options.pop("plan"))
    source = options.pop("checkpoint")
    if "format" in options:
        options["file_format"] = options.pop("format")
    with show_progress("prune", "piece") as show:
        run = configured(transform.prune_checkpoint)
        return run(
            source,
            pruning_plan,
            out,
            progress=lambda _, done, total: show(done, total),
            **options,
        )


def evaluate(options: Options) -> Any:
    """`uncurl evaluate`."""
    initialize_distributed(options)
    from uncurl_jax.evaluation import evaluator

    out = new_output(options.pop("out"))
    with _open_task(options, "validation", is_evaluation=True) as task_cache:
        run = configured(evaluator.evaluate_checkpoint)
        summary = run(cache=task_cache, out=out, **options)
    return only_first_process({"out": str(out), **summary})


def compare(options: Options) -> Any:
    """`uncurl compare`."""
    from uncurl_jax.artifacts import write_json
    from uncurl_jax.experiments import compare as compare_lib

    out = new_output(options.pop("out"))
    paths = [Path(options.pop(name)) for name in ("a", "b")]
    if len({path.is_file() for path in paths}) > 1:
        raise InputError(
            f"A comparison is of two checkpoints or of two metrics.json files, got {paths[0]} and "
            f"{paths[1]}: give two of one kind."
        )
    is_evaluated = paths[0].is_file()
    answers = [compare_lib.load_answers(path) for path in paths] if is_evaluated else []
    if "task" not in options:
        if not is_evaluated:
            raise InputError(
                "Checkpoints are compared on a task, got no --task: give a token cache, or a "
                "task's name and --data_dir."
            )
        result = compare_lib.compare(answers[0], answers[1])
    else:
        # A task given by name is tokenised as A's checkpoint has it.
        first = answers[0].summary["checkpoint"]["path"] if is_evaluated else str(paths[0])
        options["checkpoint"] = first
        with _open_task(options, "validation") as task_cache:
            del options["checkpoint"]
            options.pop("vocabulary", None)
            task = compare_lib.task_of(task_cache)
            if not is_evaluated:
                answers = [_answers(path, task_cache, options) for path in paths]
            result = compare_lib.compare(answers[0], answers[1], task, cache_hash=task_cache.hash)
    print(compare_lib.format_comparison(result), file=sys.stderr)
    write_json(out, result)
    names = ("task", "split", "num_examples", "difference", "flips")
    return {"out": str(out), **{name: result[name] for name in names}}


def _answers(checkpoint: Path, cache: Any, options: Options) -> Any:
    """Evaluates a checkpoint without leaving files."""
    from uncurl_jax.evaluation import evaluator
    from uncurl_jax.experiments import compare as compare_lib

    with tempfile.TemporaryDirectory(prefix="uncurl_compare_") as directory:
        metrics = Path(directory) / "metrics.json"
        run = configured(evaluator.evaluate_checkpoint)
        run(checkpoint=str(checkpoint), cache=cache, out=metrics, **options)
        return compare_lib.load_answers(metrics)._replace(name=str(checkpoint))


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

    _check_writable(options["out"])
    if options.pop("dry_run", False):
        from uncurl_jax.experiments.study_estimate import format_plan

        options["config"] = bound_value(sweep_lib.run_sweep, "config")
        if options["config"] is None:
            raise InputError(
                "A sweep needs a study, got no StudyConfig: give --gin_file, as gin/runs/sweep.gin."
            )
        plan = sweep_lib.dry_run(**options)
        print(format_plan(plan), file=sys.stderr)
        return plan
    records = configured(sweep_lib.run_sweep)(**options)
    return {"out": options["out"], "runs": len(records)}


def report(options: Options) -> Any:
    """`uncurl report`."""
    from uncurl_jax.experiments.evidence.effects import format_effects
    from uncurl_jax.experiments.reporting import report as report_lib
    from uncurl_jax.experiments.reporting import report_recipes

    if report_recipes.is_recipe_study(options["directory"]):
        return recipe_commands.report(options)
    result = report_lib.write_report(**options)
    if result["rows"]:
        print(report_lib.format_table(result["rows"]), file=sys.stderr)
    if result["effects"]["rows"]:
        print(f"\n{format_effects(result['effects'])}\n", file=sys.stderr)
    for measured in result["benches"]:
        for sentence in measured["sentences"]:
            print(f"{measured['file']}: {sentence}", file=sys.stderr)
    directory = Path(options["directory"])
    return {
        "report": str(directory / "report.html"),
        "json": str(directory / "report.json"),
        "headline": result["headline"],
    }


def gate(options: Options) -> Any:
    """`uncurl gate`."""
    from uncurl_jax.artifacts import write_json
    from uncurl_jax.experiments import gate as gate_lib

    out = new_output(options.pop("out"))
    rules, report_file = _own_or_given(options.pop("gate")), options.pop("report")
    result = gate_lib.judge(report_file, rules, **options)
    print(gate_lib.format_verdicts(result), file=sys.stderr)
    write_json(out, result)
    return {"out": str(out), "candidate": result["candidate"]["name"], "passed": result["passed"]}


def quickstart(options: Options) -> Any:
    """`uncurl quickstart`."""
    from uncurl_jax.experiments import quickstart as quickstart_lib
    from uncurl_jax.experiments.reporting import report as report_lib

    _check_writable(options["out"])
    result = configured(quickstart_lib.run_quickstart)(**options)
    print(report_lib.format_table(result["rows"]), file=sys.stderr)
    return {
        "report": str(Path(options["out"]) / "report.html"),
        "headline": result["headline"],
    }


def _own_or_given(path: str) -> Path:
    """Finds a file that comes with the package from any directory."""
    from uncurl_jax.cli.gin_config import files_root

    own = files_root() / path
    return own if own.is_file() and not Path(path).exists() else Path(path)


def pilot(options: Options) -> Any:
    """`uncurl pilot`."""
    from uncurl_jax.experiments import pilot as pilot_lib

    _check_writable(options["out"])
    if "gate" in options:
        options["gate"] = _own_or_given(options["gate"])
    counts = options.pop("target_experts")
    options["target_num_experts"] = (counts,) if isinstance(counts, int) else counts
    if "task" not in options and "task" not in bound(pilot_lib.run_pilot):
        raise InputError(
            "A pilot needs a task, got none: give --task, or bind pilot.run_pilot.task in a gin "
            "file."
        )
    result = configured(pilot_lib.run_pilot)(**options)
    print(result["headline"], file=sys.stderr)
    print(result["thresholds"], file=sys.stderr)
    return result


def placement(options: Options) -> Any:
    """`uncurl placement`."""
    from uncurl_jax.cli.gin_config import files_root
    from uncurl_jax.deployment import placement as placement_lib
    from uncurl_jax.deployment import placement_view, planner
    from uncurl_jax.deployment.slices import load_slice

    out = new_output(options.pop("out")) if "out" in options else None
    picture = new_output(options.pop("picture")) if "picture" in options else None
    if picture is not None:
        placement_view.check_picture(picture)
    configs = files_root() / "configs"
    on_slice = load_slice(options.pop("slice"), configs / "slices", configs / "hosts")
    request, fingerprint = _placement_request(options, on_slice)
    report = planner.make_placement(request)
    print(placement_view.format_report(report), file=sys.stderr)
    if picture is not None:
        placement_view.write_picture(report, picture)
    if out is not None:
        placement_lib.save_report(report, out, fingerprint=fingerprint)
    return {
        "out": None if out is None else str(out),
        "picture": None if picture is None else str(picture),
        **placement_lib.summarize(report),
    }


def _placement_request(options: Options, on_slice: Any) -> tuple[Any, str | None]:
    """Returns what the planner is asked, and the fingerprint of the checkpoint if there is one."""
    import dataclasses

    from uncurl_jax.checkpoints import layout
    from uncurl_jax.config import ModelConfig
    from uncurl_jax.deployment import subjects
    from uncurl_jax.deployment.job import make_job
    from uncurl_jax.deployment.layouts import Request

    checkpoint = None
    if "checkpoint" in options:
        if bound(ModelConfig):
            raise InputError(
                "A placement is of one model, got --checkpoint and gin bindings of ModelConfig: "
                "leave out one of them."
            )
        checkpoint = layout.resolve(options.pop("checkpoint"))
    else:
        missing = [
            field.name
            for field in dataclasses.fields(ModelConfig)
            if field.default is dataclasses.MISSING and field.name not in bound(ModelConfig)
        ]
        if missing:
            raise InputError(
                f"A placement needs a model, got none with {', '.join(missing)}: give "
                "--checkpoint, or a --gin_file that binds ModelConfig, as gin/models/354m.gin."
            )
    subject = subjects.find_subject(
        configured(ModelConfig)() if checkpoint is None else checkpoint.model_config(),
        checkpoint,
        plan=options.pop("plan", None),
        num_experts=options.pop("num_experts", None),
        statistics=options.pop("statistics", None),
    )
    names = ("accumulation_steps", "param_dtype", "cache_length")
    job = make_job(
        options.pop("mode", "train"),
        options.pop("batch"),
        options.pop("length"),
        max_length=subject.model.max_length,
        **{name: options.pop(name) for name in names if name in options},
    )
    request = Request(
        model=subject.model,
        job=job,
        slice=on_slice,
        num_experts_before=subject.num_experts_before,
        loads=subject.loads,
        **options,
    )
    return request, subject.fingerprint


def bench(options: Options) -> Any:
    """`uncurl bench`."""
    from uncurl_jax.config import ModelConfig
    from uncurl_jax.deployment import bench as bench_lib
    from uncurl_jax.deployment.bench_summary import summarize

    if "so_far" in options:
        others = sorted(set(options) - {"so_far", "out"})
        if others or bound(ModelConfig):
            raise InputError(
                "--so_far takes everything from what was measured, got "
                f"{', '.join(f'--{name}' for name in others) or '--gin_file'} too: leave it out."
            )
        record = bench_lib.record_so_far(options["so_far"], options["out"])
        return {"out": str(options["out"]), **summarize(record)}
    options["out"] = new_output(options["out"])
    if bound(ModelConfig):
        options["model"] = configured(ModelConfig)()
    for name in ("num_experts", "devices", "decode_batches"):
        if isinstance(options.get(name), int):
            options[name] = (options[name],)
    run = configured(bench_lib.run_bench)
    record = run(progress=bench_lib.print_progress, **options)
    return {"out": str(options["out"]), **summarize(record)}


def aot(options: Options) -> Any:
    """`uncurl aot`."""
    from uncurl_jax.artifacts import write_json
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.cli.gin_config import files_root
    from uncurl_jax.deployment import aot as aot_lib
    from uncurl_jax.deployment.aot_request import make_request
    from uncurl_jax.deployment.placement import load_placement
    from uncurl_jax.deployment.slices import load_slice
    from uncurl_jax.training import trainer

    out = new_output(options.pop("out"))
    config = bound_value(trainer.train, "config")
    if config is None:
        raise InputError(
            "aot needs a stage to compile, got no TrainConfig: give --gin_file, as "
            "gin/runs/paper_pretrain.gin."
        )
    on_slice = load_slice(options.pop("slice"), files_root() / "configs" / "slices")
    if "checkpoint" in options:
        options["model"] = layout.resolve(options.pop("checkpoint")).model_config()
    if "placement" in options:
        options["placement"] = load_placement(options["placement"])
    for option, name in (("programs", "programs_wanted"), ("batch", "batch_size")):
        if option in options:
            options[name] = options.pop(option)
    request = make_request(config, on_slice, **options)
    report = aot_lib.check(
        request,
        aot_lib.slice_mesh(request),
        say=lambda text: print(f"uncurl aot: {text}", file=sys.stderr, flush=True),
    )
    write_json(out, {"command": " ".join(["uncurl", *sys.argv[1:]]), **report})
    if report["sentence"]:
        print(f"uncurl aot: {report['sentence']}", file=sys.stderr)
    return {"out": str(out), **aot_lib.summarize(report)}


# Commands whose work can end well and yet say no: exit status 1 if the function is true.
HAS_FAILED: dict[str, Callable[[Any], bool]] = {
    "aot": lambda result: not result["fits"],
    "gate": lambda result: not result["passed"],
    "verify": lambda result: not result["verified"],
}

COMMANDS: dict[str, Callable[[Options], Any]] = {
    "gin": show_gin,
    "cache": cache,
    "train": train,
    "calibrate": calibrate,
    "merge-statistics": merge_statistics,
    "plan": plan,
    "inspect-plan": inspect_plan,
    "verify": verify,
    "prune": prune,
    "import": convert_commands.import_hf,
    "export": export_commands.export,
    "verify-artifact": export_commands.verify_artifact,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "sweep": sweep,
    "report": report,
    "gate": gate,
    "quickstart": quickstart,
    "pilot": pilot,
    "placement": placement,
    "bench": bench,
    "aot": aot,
    "recipes": recipe_commands.recipes,
    "serve": serve_command.serve,
    "t5x": t5x_commands.t5x,
}
