"""Runs a recipe study: every cell once, one record each, for as long as there is time."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from uncurl_jax import __version__
from uncurl_jax.artifacts import append_json_line, read_json, read_json_lines, write_json
from uncurl_jax.data import token_cache
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.recipes.cell_runner import CellRunner
from uncurl_jax.experiments.recipes.recipe_study import Cell, RecipeStudyConfig, cells
from uncurl_jax.pruning.methods import get_method

STUDY_FILE = "recipe_study.json"
RUNS_FILE = "recipe_runs.jsonl"
SCHEMA = "uncurl_jax recipe study 1"

# What may grow when a study is gone on with.
_GROWING = ("title", "arms", "recipes", "baselines", "domains")


class Progress(NamedTuple):
    """How far a study has come.

    Attributes:
      done: cells with a record.
      left: names of cells without one.
      seconds: of this call.
    """

    done: int
    left: list[str]
    seconds: float


def run_recipes(
    config: RecipeStudyConfig,
    *,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_seconds: float | None = None,
    roles: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    quiet: bool = False,
) -> Progress:
    """Runs a recipe study, or goes on with it; arms, seeds and recipes may have been added.

    Args:
      config: what to compare.
      out: directory of the study.
      data_dir: where the texts lie, for token caches that do not exist yet.
      cache_dir: token caches <task>/<split>; caches/ in `out` by default.
      max_seconds: no pretraining and no cell is begun that, as long as the longest of its kind so
        far, would end later than this after the call; None for no limit.
      roles: arms of these roles alone.
      only: recipes of these names alone, beside the whole models.
      quiet: no progress bars.

    Returns:
      What is done and what is left.

    Raises:
      InputError: If `out` holds a study with other settings, or a recipe, text or cache is wrong.
    """
    begin = time.perf_counter()
    directory = Path(os.path.abspath(out))
    for recipe in config.recipes:
        for method in recipe.methods:
            get_method(method)
    for name in only or ():
        if name not in {recipe.name for recipe in config.recipes}:
            raise InputError(f"A recipe to run must be one of the study's, got {name!r}.")
    _check_study(config, directory / STUDY_FILE)
    caches = Path(cache_dir) if cache_dir is not None else directory / "caches"
    for task in (config.corpus, *config.domains):
        if not (caches / task.name).exists():
            task.source_files(data_dir or ".", "train")
    directory.mkdir(parents=True, exist_ok=True)
    _write_study(config, directory / STUDY_FILE)
    _build_caches(config, caches, data_dir)
    runner = CellRunner(config, directory, caches)
    records = read_json_lines(directory / RUNS_FILE) if (directory / RUNS_FILE).exists() else []
    wanted = [
        cell
        for cell in cells(config)
        if (roles is None or cell.arm.role in roles)
        and (only is None or cell.recipe is None or cell.recipe in only)
    ]
    clock = _Clock(begin, max_seconds)
    done = {record["name"] for record in records if record["stage"] == "cell"}
    todo = [cell for cell in wanted if cell.name not in done]
    bar = tqdm(
        total=len(wanted),
        initial=len(wanted) - len(todo),
        desc="recipes",
        unit="model",
        file=sys.stderr,
        disable=quiet,
    )
    with bar:
        while todo and _make(runner, todo[0], directory, clock):
            todo.pop(0)
            bar.update()
    return Progress(
        len(wanted) - len(todo), [cell.name for cell in todo], time.perf_counter() - begin
    )


class _Clock:
    """Says whether there is time for one more of a kind."""

    def __init__(self, begin: float, max_seconds: float | None):
        self._begin, self._limit = begin, max_seconds
        self._longest: dict[str, float] = {}

    def has_time_for(self, kind: str) -> bool:
        if self._limit is None:
            return True
        return time.perf_counter() - self._begin + self._longest.get(kind, 0.0) < self._limit

    def took(self, kind: str, seconds: float) -> None:
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))


def _make(runner: CellRunner, cell: Cell, directory: Path, clock: _Clock) -> bool:
    """Makes a cell and what it begins with; False if there is no time left for it."""
    count, seed = cell.source_num_experts, cell.arm.pretrain_seed
    common = {"schema": SCHEMA, "versions": versions(), "device": device()}
    if not runner.is_pretrained(count, seed):
        if not clock.has_time_for("pretrain"):
            return False
        found = runner.pretrain(count, seed)
        clock.took("pretrain", found["seconds"])
        name = f"pretrained/{count}_experts_seed{seed}"
        append_json_line(
            directory / RUNS_FILE, {**common, "stage": "pretrain", "name": name, **found}
        )
    kind = f"{cell.kind} {cell.num_experts}"
    if not clock.has_time_for(kind):
        return False
    begin = time.perf_counter()
    found = runner.run(cell)
    clock.took(kind, time.perf_counter() - begin)
    record = {
        **common,
        "stage": "cell",
        "name": cell.name,
        "arm": cell.arm.name,
        "role": cell.arm.role,
        "pretrain_seed": seed,
        "domain": cell.arm.domain,
        "seed": cell.seed,
        "kind": cell.kind,
        "source_num_experts": count,
        "num_experts": cell.num_experts,
        "recipe": cell.recipe,
        **found,
    }
    append_json_line(directory / RUNS_FILE, record)
    return True


def _build_caches(
    config: RecipeStudyConfig, caches: Path, data_dir: str | os.PathLike[str] | None
) -> None:
    for task in (config.corpus, *config.domains):
        if not (caches / task.name).exists():
            token_cache.build_token_cache(
                task,
                vocabulary=config.vocabulary,
                out=caches / task.name,
                max_length=config.model.max_length,
                data_dir=os.fspath(data_dir or "."),
            )


def settings_of(config: RecipeStudyConfig) -> dict[str, Any]:
    """Returns a study's settings as its file holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _check_study(config: RecipeStudyConfig, path: Path) -> None:
    if not path.exists():
        return
    stored = read_json(path)
    if stored.get("schema") != SCHEMA:
        raise InputError(
            f"A recipe study must have schema {SCHEMA!r}, got {stored.get('schema')!r} in {path}: "
            "give another directory."
        )
    mine, theirs = settings_of(config), stored["settings"]
    changed = sorted(k for k in mine if k not in _GROWING and mine[k] != theirs.get(k))
    old = {recipe["name"]: recipe for recipe in theirs["recipes"]}
    changed += [
        f"recipe {recipe['name']}"
        for recipe in mine["recipes"]
        if old.get(recipe["name"], recipe) != recipe
    ]
    if changed:
        raise InputError(
            f"A study must go on with the settings it began with, got other values of "
            f"{', '.join(changed)} than {path}: give another directory, or new recipes new names."
        )


def _write_study(config: RecipeStudyConfig, path: Path) -> None:
    settings = settings_of(config)
    if path.exists():
        # Recipes that earlier calls compared stay in the record.
        names = {recipe["name"] for recipe in settings["recipes"]}
        stored = read_json(path)["settings"]["recipes"]
        settings["recipes"] += [recipe for recipe in stored if recipe["name"] not in names]
    write_json(path, {"schema": SCHEMA, "title": config.title, "settings": settings})


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    return {"uncurl_jax": __version__, "jax": jax.__version__, "numpy": np.__version__}


def device() -> str:
    """Returns the device that cells are made on."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
