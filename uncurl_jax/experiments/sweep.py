"""Runs a study: every stage once, one record each, resumable at any point.

What lies where is listed in `stage_runner`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from uncurl_jax import __version__
from uncurl_jax.artifacts import atomic_file, read_json, read_json_lines, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.data import registry
from uncurl_jax.data.cache_builder import SEQIO_PREFIX
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import VALIDATION, Task
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import stages as stages_lib
from uncurl_jax.experiments import study, study_estimate
from uncurl_jax.experiments.stage_runner import (
    RUN_SCHEMA,
    RUNS_FILE,
    StageRunner,
    named_tasks,
    settings_of,
    single_methods,
)
from uncurl_jax.experiments.stages import Stage, StageGraph
from uncurl_jax.experiments.study import StudyConfig, WorkItem, task_name
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, make_mesh
from uncurl_jax.pruning.affinity import AFFINITIES
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.methods import COMPOSITE, get_method
from uncurl_jax.pruning.router import TREATMENTS

STUDY_FILE = "study.json"
STUDY_SCHEMA = "uncurl_jax study 2"
_PROGRESS_FILE = "progress.json"


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
      The records of evaluated models in runs.jsonl, old and new.

    Raises:
      InputError: If `out` holds a study with other settings or of another version of this package,
        or a task, its data or its labels are missing.
    """
    items, runner = _prepare(config, out, data_dir, cache_dir, shard, quiet)
    directory = _directory(out, shard)
    _write_study(config, directory)
    progress = _Progress(runner, items, directory, quiet)
    try:
        for item in items:
            for stage in runner.left(item):
                progress.begin(stage)
                runner.make(stage)
                progress.end(stage)
            if not config.keep_checkpoints:
                runner.remove_checkpoints(item)
    finally:
        progress.close()
    return [r for r in runner.records.values() if r["stage"] == stages_lib.EVALUATE]


def dry_run(
    config: StudyConfig,
    *,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Says what `run_sweep` would do, and what it would cost; writes nothing.

    Args:
      config: what to compare.
      out: directory of the study, which may have been begun.
      data_dir: as in `run_sweep`.
      cache_dir: as in `run_sweep`.
      shard: as in `run_sweep`.

    Returns:
      {"stages": per kind {"done", "left", "tokens", "seconds"}, "tokens", "seconds", "basis",
      "models"}; tokens and seconds are of what is left.
    """
    items, runner = _prepare(config, out, data_dir, cache_dir, shard, True)
    left: dict[str, Stage] = {}
    for item in items:
        left.update((stage.name, stage) for stage in runner.left(item))
    done = [stage for stage in runner.graph.stages.values() if stage.name not in left]
    return study_estimate.describe(
        config, list(left.values()), done, list(runner.records.values()), [i.run for i in items]
    )


def _directory(out: str | os.PathLike[str], shard: tuple[int, int] | None) -> Path:
    # Absolute, because Orbax refuses to write below a relative directory.
    directory = Path(os.path.abspath(out))
    return directory if shard is None else directory / f"shard_{shard[0]}_of_{shard[1]}"


def _prepare(
    config: StudyConfig,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    shard: tuple[int, int] | None,
    quiet: bool,
) -> tuple[list[WorkItem], StageRunner]:
    """Checks everything and writes nothing; returns the models and what makes them."""
    directory = _directory(out, shard)
    items = study.work_items(config)
    if shard is not None:
        items = study.shard(items, *shard)
    check_choices(config)
    caches = Path(cache_dir) if cache_dir is not None else directory / "caches"
    _check_tasks(config, caches, data_dir)
    _check_study(config, directory / STUDY_FILE)
    runner = StageRunner(
        config,
        StageGraph(config, items),
        directory,
        data_dir=data_dir,
        cache_dir=caches,
        records=_read_records(directory / RUNS_FILE),
        versions=_versions(),
        quiet=quiet,
    )
    return items, runner


def check_choices(config: StudyConfig) -> None:
    """Raises InputError if a name is unknown or a batch does not divide among the devices.

    Writes nothing, and reads nothing but the configuration.
    """
    for name in single_methods(config):
        get_method(name)
    if (COMPOSITE in config.methods) != (config.layer_methods is not None):
        raise InputError(
            f"layer_methods must come with method 'composite', got {config.layer_methods} with "
            f"methods {config.methods}: give both or neither."
        )
    for router in config.routers:
        require_choice("routers", router, TREATMENTS)
    require_choice("affinity", config.affinity, AFFINITIES)
    for name in ("pretrain", "warmup", "prefinetune", "finetune"):
        stage = getattr(config, name)
        if stage is None:
            continue
        mesh = make_mesh(
            expert_partitions=stage.expert_partitions, model_partitions=stage.model_partitions
        )
        shards = axis_size(mesh, TOKEN_AXES)
        if stage.batch_size % shards:
            raise InputError(
                f"{name}.batch_size must be a multiple of the {shards} devices that share a batch, "
                f"got {stage.batch_size}: choose a multiple, or hide some of the devices."
            )


def _check_tasks(
    config: StudyConfig, caches: Path, data_dir: str | os.PathLike[str] | None
) -> None:
    """Checks tasks, files, labels and vocabulary before any work."""
    vocabulary = load_vocabulary(config.vocabulary)
    if config.checkpoint is not None:
        given = layout.resolve(config.checkpoint).vocabulary()
        if given["hash"] != vocabulary.hash:
            raise InputError(
                f"vocabulary must be that of the checkpoint, got {vocabulary.name} for "
                f"{config.checkpoint}, which has {given['name']}: set StudyConfig.vocabulary."
            )
    corpus = None if config.corpus is None else task_name(config.corpus)
    evaluated = [task_name(task) for task in config.tasks]
    for task in config.tasks:
        if isinstance(task, LanguageModelingTask) or task_name(task) == corpus:
            raise InputError(
                f"tasks must have options to choose from, got {task_name(task)}, which is "
                "plain text: leave it out."
            )
        if isinstance(task, str) and not (caches / task).exists():
            registry.get_task(task)
    for task in named_tasks(config):
        name = task_name(task)
        if (caches / name).exists():
            for split in ("train", "validation") if name in evaluated else ("train",):
                cache = TokenCache.open(caches / name / split)
                cache.check_vocabulary(vocabulary.hash, vocabulary.name)
                if name in evaluated:
                    cache.score()
                if split == "validation":
                    _check_labels(name, cache.examples())
            continue
        if isinstance(task, str) and task.startswith(SEQIO_PREFIX):
            continue
        if data_dir is None:
            raise InputError(
                f"Task {name} needs a token cache in {caches / name} or a data "
                "directory to build it from: pass --data_dir or --cache_dir."
            )
        found: Any = registry.find_task(task) if isinstance(task, str) else task
        if isinstance(found, JsonlTask):
            found = found.to_task()
        for split in found.splits:
            found.source_files(data_dir, split)
        if name in evaluated and isinstance(found, Task):
            _check_labels(name, found.read(Path(data_dir), VALIDATION))


def _check_labels(task: str, examples: Iterable[Any]) -> None:
    for example in examples:
        if example.label is None and not example.targets:
            raise InputError(
                f"The validation split of a task must have labels, got example {example.idx} of "
                f"{task} without one: give a file with labels, or leave the task out."
            )


def _check_study(config: StudyConfig, path: Path) -> None:
    if not path.exists():
        return
    begun = read_json(path)
    if begun.get("schema") != STUDY_SCHEMA:
        raise InputError(
            f"A study must be of this version ({STUDY_SCHEMA}), got {begun.get('schema')!r} in "
            f"{path}: go on with the version that began it, or choose another --out."
        )
    settings = settings_of(config)
    if begun["config"] != settings:
        names = sorted(set(settings) | set(begun["config"]))
        differing = [n for n in names if begun["config"].get(n) != settings.get(n)]
        raise InputError(
            f"A study goes on with the settings it began with, got other values of "
            f"{', '.join(differing)} than {path}: restore them or choose another --out."
        )


def _write_study(config: StudyConfig, directory: Path) -> None:
    if not (directory / STUDY_FILE).exists():
        value = {
            "schema": STUDY_SCHEMA,
            "title": config.title,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": _versions(),
            "config": settings_of(config),
        }
        write_json(directory / STUDY_FILE, value)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the whole records; removes one cut short at the end, which would spoil the next."""
    if not path.exists():
        return []
    records = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        schema = record.get("schema") if isinstance(record, dict) else None
        version = record["versions"]["uncurl_jax"] if schema == RUN_SCHEMA else None
        if version != __version__:
            raise InputError(
                f"{path}:{number}: a study goes on with the version that began it, got a record of "
                f"{version or schema!r} for {__version__}: install that version, or choose another "
                "--out."
            )
    if not path.read_bytes().endswith(b"\n"):
        with atomic_file(path) as partial:
            text = "".join(json.dumps(record) + "\n" for record in records)
            partial.write_text(text, encoding="utf-8")
    return records


class _Progress:
    """Shows what is done, running and left, on stderr and in progress.json."""

    def __init__(self, runner: StageRunner, items: list[WorkItem], directory: Path, quiet: bool):
        self._runner = runner
        self._path = directory / _PROGRESS_FILE
        self._left: dict[str, Stage] = {}
        for item in items:
            self._left.update((stage.name, stage) for stage in runner.left(item))
        self._done = len(runner.records)
        self._begin = time.perf_counter()
        self._bar = tqdm(
            total=self._done + len(self._left),
            initial=self._done,
            desc="study",
            unit="stage",
            file=sys.stderr,
            disable=quiet,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} stages{postfix}",
        )

    def begin(self, stage: Stage) -> None:
        """Shows that a stage is running."""
        seconds = study_estimate.remaining_seconds(
            list(self._left.values()), list(self._runner.records.values())
        )
        left = "time left unknown" if seconds is None else study_estimate.format_seconds(seconds)
        self._bar.set_postfix_str(f"{stage.name}; {left} left")
        self._write(stage.name, seconds)

    def end(self, stage: Stage) -> None:
        """Counts a stage as done."""
        self._left.pop(stage.name, None)
        self._done += 1
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the last state in progress.json."""
        self._bar.close()
        if self._path.parent.exists():
            self._write(None, 0.0 if not self._left else None)

    def _write(self, running: str | None, seconds: float | None) -> None:
        write_json(
            self._path,
            {
                "done": self._done,
                "running": running,
                "left": len(self._left),
                "estimated_seconds_left": seconds,
                "seconds_of_this_call": round(time.perf_counter() - self._begin, 1),
            },
        )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "uncurl_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
