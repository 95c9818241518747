"""Runs a study: every stage once, one record per evaluated model, resumable at any point.

Layout of a study's directory (with --shard, of each shard_<i>_of_<n>/ in it):
  study.json                          title, device, versions, settings
  runs.jsonl                          one line per evaluated model
  caches/<task>/{train,validation}    token caches
  pretrained/<n>_experts/             checkpoints
  calibration/<n>_experts/<task>.npz  router statistics
  runs/<run>/                         pruning_plan.json, pruned/, warmed_up/, finetuned/ and
                                      metrics.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from uncurl_jax import __version__
from uncurl_jax.artifacts import (
    append_json_line,
    atomic_file,
    read_json,
    read_json_lines,
    write_json,
)
from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.checkpoints.weights import CheckpointWeights
from uncurl_jax.config import TrainConfig
from uncurl_jax.data import registry, token_cache
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.calibration import calibrate_checkpoint
from uncurl_jax.evaluation.evaluator import evaluate_checkpoint
from uncurl_jax.experiments import study
from uncurl_jax.experiments.study import PRUNED, UNPRUNED, StudyConfig, WorkItem, task_name
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, make_mesh
from uncurl_jax.pruning.affinity import AFFINITIES
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.methods import COMPOSITE, Method, get_method
from uncurl_jax.pruning.plan import FILE_NAME, PruningPlan, make_plan
from uncurl_jax.pruning.router import TREATMENTS
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.training import trainer

RUNS_FILE = "runs.jsonl"
STUDY_FILE = "study.json"


def run_sweep(
    config: StudyConfig,
    *,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Runs a study, or goes on with it where it was interrupted.

    Args:
      config: what to compare.
      out: directory of the study.
      data_dir: where the tasks' files lie, for token caches that do not exist yet.
      cache_dir: where token caches lie as <task>/<split>; built there if missing. By default
        caches/ in the study's directory.
      shard: (i, n) does part i of n, on its own, in shard_<i>_of_<n>/; reports read all parts.
      quiet: no progress bars.

    Returns:
      The records of runs.jsonl, old and new.

    Raises:
      InputError: If `out` holds a study with other settings, or a task or its data is missing.
    """
    # Absolute, because Orbax refuses to write below a relative directory.
    directory = Path(os.path.abspath(out))
    items = study.work_items(config)
    if shard is not None:
        directory /= f"shard_{shard[0]}_of_{shard[1]}"
        items = study.shard(items, *shard)
    check_choices(config)
    runner = _Runner(config, directory, data_dir, cache_dir, quiet)
    runner.check()
    runner.write_study()
    records = _read_records(directory / RUNS_FILE)
    finished = {record["run"] for record in records}
    bar = tqdm(
        items,
        desc="study",
        unit="model",
        file=sys.stderr,
        disable=quiet,
    )
    for item in bar:
        bar.set_postfix_str(item.run)
        if item.run not in finished:
            record = runner.run(item)
            append_json_line(directory / RUNS_FILE, record)
            records.append(record)
        if not config.keep_checkpoints:
            runner.remove_checkpoints(item)
    return records


def check_choices(config: StudyConfig) -> None:
    """Raises InputError if a name is unknown or a batch does not divide among the devices.

    Writes nothing, and reads nothing but the configuration.
    """
    _single_methods(config)
    if (COMPOSITE in config.methods) != (config.layer_methods is not None):
        raise InputError(
            f"layer_methods must come with method 'composite', got {config.layer_methods} with "
            f"methods {config.methods}: give both or neither."
        )
    for router in config.routers:
        require_choice("routers", router, TREATMENTS)
    require_choice("affinity", config.affinity, AFFINITIES)
    for name in ("pretrain", "warmup", "finetune"):
        stage = getattr(config, name)
        mesh = make_mesh(
            expert_partitions=stage.expert_partitions, model_partitions=stage.model_partitions
        )
        shards = axis_size(mesh, TOKEN_AXES)
        if stage.batch_size % shards:
            raise InputError(
                f"{name}.batch_size must be a multiple of the {shards} devices that share a batch, "
                f"got {stage.batch_size}: choose a multiple, or hide some of the devices."
            )


def _single_methods(config: StudyConfig) -> list[Method]:
    """Returns the methods that group layers in a study; InputError if one is unknown."""
    names = [*(name for name in config.methods if name != COMPOSITE), *(config.layer_methods or ())]
    return [get_method(name) for name in dict.fromkeys(names)]


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the whole records; removes one cut short at the end, which would spoil the next."""
    if not path.exists():
        return []
    records = read_json_lines(path)
    if not path.read_bytes().endswith(b"\n"):
        with atomic_file(path) as partial:
            text = "".join(json.dumps(record) + "\n" for record in records)
            partial.write_text(text, encoding="utf-8")
    return records


class _Runner:
    """Makes the artifacts of a study, each once; whatever exists whole is not made again."""

    def __init__(
        self,
        config: StudyConfig,
        directory: Path,
        data_dir: str | os.PathLike[str] | None,
        cache_dir: str | os.PathLike[str] | None,
        quiet: bool,
    ):
        self._config = config
        self._directory = directory
        self._data_dir = data_dir
        self._cache_dir = Path(cache_dir) if cache_dir is not None else directory / "caches"
        self._quiet = quiet
        self._tasks = {task_name(task): task for task in (config.corpus, *config.tasks)}

    def check(self) -> None:
        """Checks tasks, files and vocabulary before any work."""
        vocabulary = load_vocabulary(self._config.vocabulary)
        corpus = task_name(self._config.corpus)
        for task in self._config.tasks:
            if isinstance(task, LanguageModelingTask) or task_name(task) == corpus:
                raise InputError(
                    f"tasks must have options to choose from, got {task_name(task)}, which is "
                    "plain text: leave it out."
                )
            if isinstance(task, str) and not (self._cache_dir / task).exists():
                registry.get_task(task)
        for name, task in self._tasks.items():
            if (self._cache_dir / name).exists():
                for split in ("train", "validation"):
                    if name == corpus and split == "validation":
                        continue
                    cache = TokenCache.open(self._cache_dir / name / split)
                    cache.check_vocabulary(vocabulary.hash, vocabulary.name)
                    if name != corpus:
                        cache.score()
                continue
            if self._data_dir is None:
                raise InputError(
                    f"Task {name} needs a token cache in {self._cache_dir / name} or a data "
                    "directory to build it from: pass --data_dir or --cache_dir."
                )
            found: Any = registry.find_task(task) if isinstance(task, str) else task
            if isinstance(found, JsonlTask):
                found = found.to_task()
            for split in found.splits:
                found.source_files(self._data_dir, split)

    def write_study(self) -> None:
        """Writes study.json, or checks that it is the same study.

        Raises:
          InputError: If the directory holds another study.
        """
        path = self._directory / STUDY_FILE
        settings = json.loads(json.dumps(dataclasses.asdict(self._config)))
        if path.exists():
            begun = read_json(path)["config"]
            differing = [name for name in settings if begun.get(name) != settings[name]]
            if begun != settings:
                raise InputError(
                    f"A study goes on with the settings it began with, got other values of "
                    f"{', '.join(differing)} than {path}: restore them or choose another --out."
                )
            return
        value = {
            "title": self._config.title,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": _versions(),
            "config": settings,
        }
        write_json(path, value)

    def run(self, item: WorkItem) -> dict[str, Any]:
        """Makes one model of the study and returns its record."""
        started = time.perf_counter()
        seconds: dict[str, float] = {}

        def timed(stage: str, make: Callable[[], Path]) -> Path:
            begin = time.perf_counter()
            path = make()
            seconds[stage] = round(time.perf_counter() - begin, 3)
            return path

        home = self._directory / "runs" / item.run
        checkpoint = timed("pretrain", lambda: self._source(item))
        plan = zero_shot = None
        untrained = checkpoint
        if item.kind == PRUNED:
            statistics = timed("calibrate", lambda: self._statistics(item))
            plan = timed("plan", lambda: self._plan(item, statistics, home))
            source, plan_file = checkpoint, plan
            checkpoint = timed("prune", lambda: self._pruned(source, plan_file, home))
            untrained = pruned = checkpoint
            checkpoint = timed(
                "warmup",
                lambda: self._trained(self._config.warmup, item, pruned, home / "warmed_up"),
            )
        if self._config.has_zero_shot:
            path = home / "zero_shot.json"
            zero_shot = timed("zero_shot", lambda: self._metrics(item, untrained, path))
        initial = checkpoint
        checkpoint = timed(
            "finetune",
            lambda: self._trained(self._config.finetune, item, initial, home / "finetuned"),
        )
        path = home / "metrics.json"
        metrics = read_json(timed("evaluate", lambda: self._metrics(item, checkpoint, path)))
        seconds["total"] = round(time.perf_counter() - started, 3)
        record = self._record(item, checkpoint, metrics, plan, seconds)
        if zero_shot is not None:
            found = read_json(zero_shot)
            record["zero_shot"] = {name: found[name] for name in ("score", "interval")}
        return record

    def remove_checkpoints(self, item: WorkItem) -> None:
        """Removes what `keep_checkpoints` False does not keep of a recorded run."""
        if self._config.prunes_finetuned and item.kind == UNPRUNED:
            return
        for name in ("pruned", "warmed_up", "finetuned"):
            shutil.rmtree(self._directory / "runs" / item.run / name, ignore_errors=True)

    def _record(
        self,
        item: WorkItem,
        checkpoint: Path,
        metrics: dict[str, Any],
        plan: Path | None,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        model = describe(checkpoint)
        return {
            "run": item.run,
            **dataclasses.asdict(item),
            "num_experts_per_layer": model["num_experts"],
            "score": metrics["score"],
            "interval": metrics["interval"],
            "metrics": metrics["metrics"],
            "num_examples": metrics["num_examples"],
            "fraction_tokens_left_behind": metrics["fraction_tokens_left_behind"],
            "parameters": model["parameters"],
            "active_parameters": model["active_parameters"],
            "bytes": model["bytes"],
            "checkpoint": checkpoint.relative_to(self._directory).as_posix()
            if self._config.keep_checkpoints
            else None,
            "plan": None if plan is None else plan.relative_to(self._directory).as_posix(),
            "seconds": seconds,
            "versions": _versions(),
        }

    def _cache(self, name: str) -> Path:
        path = self._cache_dir / name
        if not path.exists():
            token_cache.build_token_cache(
                self._tasks[name],
                vocabulary=self._config.vocabulary,
                out=path,
                max_length=self._config.row_length,
                data_dir=os.fspath(self._data_dir or "."),
            )
        return path

    def _pretrained(self, count: int) -> Path:
        out = self._directory / "pretrained" / f"{count}_experts"
        model = self._config.model.with_experts(count)
        stage = dataclasses.replace(self._config.pretrain, model=model)
        return self._finish_training(stage, self._cache(task_name(self._config.corpus)), out, None)

    def _source(self, item: WorkItem) -> Path:
        """Returns what a model of the study begins with."""
        pretrained = self._pretrained(item.pretrained_num_experts)
        if item.kind != PRUNED or not self._config.prunes_finetuned:
            return pretrained
        unpruned = dataclasses.replace(
            item, kind=UNPRUNED, num_experts=item.pretrained_num_experts, method=None, router=None
        )
        home = self._directory / "runs" / unpruned.run
        return self._trained(self._config.finetune, unpruned, pretrained, home / "finetuned")

    def _calibration_file(self, item: WorkItem, suffix: str) -> Path:
        folder = self._directory / "calibration" / f"{item.pretrained_num_experts}_experts"
        seed = f"-seed{item.seed}" if self._config.prunes_finetuned else ""
        return folder / f"{item.task}{seed}{suffix}"

    def _trained(self, stage: TrainConfig, item: WorkItem, initial: Path, out: Path) -> Path:
        stage = dataclasses.replace(stage, seed=item.seed)
        return self._finish_training(stage, self._cache(item.task), out, initial)

    def _finish_training(
        self, stage: TrainConfig, cache: Path, out: Path, initial: Path | None
    ) -> Path:
        if not trainer.is_finished(out):
            trainer.train(
                stage, cache=cache / "train", out=out, initial_checkpoint=initial, quiet=self._quiet
            )
        return out

    def _statistics(self, item: WorkItem) -> Path:
        path = self._calibration_file(item, ".npz")
        if not path.exists():
            # A kill between the two files of a calibration leaves inputs without statistics.
            self._router_inputs(item).unlink(missing_ok=True)
            calibrate_checkpoint(
                self._source(item),
                TokenCache.open(self._cache(item.task) / "train"),
                out=path,
                batch_size=self._config.calibration_batch_size,
                max_batches=self._config.calibration_max_batches,
                is_dropless=self._config.is_dropless_evaluation,
                collect=self._collected,
                inputs_out=self._router_inputs(item) if self._has_inputs else None,
                sample_tokens=self._config.sample_tokens,
                quiet=self._quiet,
            )
        return path

    @property
    def _collected(self) -> tuple[str, ...]:
        """Optional statistics that some method of the study needs."""
        methods = _single_methods(self._config)
        return tuple(sorted({group for method in methods for group in method.collect}))

    @property
    def _has_inputs(self) -> bool:
        return "fit" in self._config.routers

    def _router_inputs(self, item: WorkItem) -> Path:
        return self._calibration_file(item, ".inputs.npz")

    def _plan(self, item: WorkItem, statistics: Path, home: Path) -> Path:
        path = home / FILE_NAME
        if not path.exists():
            factor = None if self._config.is_dropless_evaluation else self._eval_capacity_factor
            router = str(item.router)
            inputs = RouterInputs.load(self._router_inputs(item)) if router == "fit" else None
            is_composite = item.method == COMPOSITE
            plan = make_plan(
                RouterStatistics.load(statistics),
                num_experts=item.num_experts,
                method=str(item.method),
                layer_methods=self._config.layer_methods if is_composite else None,
                router=router,
                affinity=self._config.affinity,
                alignment=self._config.alignment,
                # Gates are unknown until a re-initialised router is trained, and kept by "remap".
                gate_compensation=self._config.gate_compensation
                and router not in ("reinit", "remap"),
                eval_capacity_factor=factor,
                seed=item.seed,
                weights=CheckpointWeights(self._source(item)),
                router_inputs=inputs,
            )
            plan.save(path)
        return path

    @property
    def _eval_capacity_factor(self) -> float | None:
        return self._config.model.eval_capacity_factor

    def _pruned(self, source: Path, plan: Path, home: Path) -> Path:
        out = home / "pruned"
        if not out.exists():
            prune_checkpoint(source, PruningPlan.load(plan), out)
        return out

    def _metrics(self, item: WorkItem, checkpoint: Path, path: Path) -> Path:
        if not path.exists():
            # A kill between the two files of an evaluation leaves predictions without metrics.
            path.with_name(f"{path.stem}.predictions.jsonl").unlink(missing_ok=True)
            evaluate_checkpoint(
                checkpoint,
                TokenCache.open(self._cache(item.task) / "validation"),
                out=path,
                examples_per_batch=self._config.examples_per_batch,
                is_length_normalized=self._config.is_length_normalized,
                is_dropless=self._config.is_dropless_evaluation,
                quiet=self._quiet,
            )
        return path


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "uncurl_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
