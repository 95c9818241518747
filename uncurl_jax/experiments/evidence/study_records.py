"""Reads what a study wrote: runs.jsonl and study.json, of all shards, checked field by field."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import stages

RUN_SCHEMA, STUDY_SCHEMA = "uncurl_jax run 2", "uncurl_jax study 2"
KINDS = ("unpruned", "scratch", "pruned")
_PATHS = ("checkpoint", "plan", "predictions", "statistics")

_NUMBER, _COUNT, _TEXT, _NONE = (int, float), (int,), (str,), (type(None),)
# Of every stage, and besides these of an evaluated model.
_STAGE_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": _TEXT,
    "stage": _TEXT,
    "name": _TEXT,
    "inputs": (list,),
    "tokens": _COUNT,
    "seconds": _NUMBER,
    "versions": (dict,),
}
_MODEL_FIELDS: dict[str, tuple[type, ...]] = {
    "run": _TEXT,
    "kind": _TEXT,
    "source_num_experts": (*_COUNT, *_NONE),
    "num_experts": _COUNT,
    "method": (*_TEXT, *_NONE),
    "router": (*_TEXT, *_NONE),
    "task": _TEXT,
    "seed": _COUNT,
    "num_experts_per_layer": (list,),
    "score": _NUMBER,
    "interval": (list,),
    "metrics": (dict,),
    "num_examples": _COUNT,
    "fraction_tokens_left_behind": _NUMBER,
    "parameters": _COUNT,
    "active_parameters": _COUNT,
    "bytes": _COUNT,
    **{name: (*_TEXT, *_NONE) for name in _PATHS},
}
_PRUNED_FIELDS: dict[str, tuple[type, ...]] = {
    "source_num_experts": _COUNT,
    "method": _TEXT,
    "router": _TEXT,
}
_OPTIONAL_FIELDS: dict[str, tuple[type, ...]] = {
    "zero_shot": (dict, *_NONE),
    "tuned": (dict, *_NONE),
}


def load_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the evaluated models of a study's runs.jsonl; records of other stages are checked too.

    Raises:
      InputError: If the file is missing or holds no evaluated model, or a line is of another
        schema or version of this package than the first, lacks a field, has one that is not known
        or of the wrong type, or repeats a run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A study must have a runs.jsonl, found none at {path}: run it first.")
    runs: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    version = None
    for number, record in enumerate(artifacts.read_json_lines(path), start=1):
        problem = _problem(record)
        if not problem:
            version = version or record["versions"].get("uncurl_jax")
            found = record["versions"].get("uncurl_jax")
            if found != version:
                problem = f"all records must be of one version, got {found} after {version}"
        is_model = not problem and record["stage"] == stages.EVALUATE
        if is_model and record["run"] in seen:
            name = record["run"]
            problem = f"run must be unique, got {name!r} again after line {seen[name]}"
        if problem:
            raise InputError(f"{path}:{number}: {problem}: remove the line and run it again.")
        if is_model:
            seen[record["run"]] = number
            runs.append(record)
    if not runs:
        raise InputError(
            f"{path} must hold at least one evaluated model, got none: run the study first."
        )
    return runs


def load_study(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the runs and settings of a study, of all its shards if it was run in shards.

    Args:
      directory: holds runs.jsonl and study.json, or shard_<i>_of_<n>/ that do.

    Returns:
      The evaluated models, their paths relative to `directory`, and the content of study.json.

    Raises:
      InputError: If a file is missing or malformed, shards are of different studies or versions,
        or a run is there twice.
    """
    parts = study_parts(directory)
    runs: list[dict[str, Any]] = []
    studies: list[dict[str, Any]] = []
    for part in parts or [directory]:
        found = load_runs(part / "runs.jsonl")
        for run in found:
            for name in _PATHS:
                if run[name] is not None:
                    run[name] = (part / run[name]).relative_to(directory).as_posix()
        runs += found
        studies.append(_load_settings(part / "study.json"))
        if _compared(studies[-1]) != _compared(studies[0]):
            raise InputError(
                f"The shards of a study must have the same settings, got others in {part} than in "
                f"{parts[0]}: put them into different directories."
            )
        versions = [run["versions"].get("uncurl_jax") for run in (runs[0], found[0])]
        if versions[0] != versions[1]:
            raise InputError(
                f"The shards of a study must be of one version, got {versions[1]} in {part} and "
                f"{versions[0]} in {parts[0]}: run one of them again."
            )
    names = [run["run"] for run in runs]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(
            f"A run must be in one shard only, got {doubles[0]} in several of {directory}: remove "
            "the shards of an earlier division."
        )
    return runs, studies[0]


def study_parts(directory: Path) -> list[Path]:
    """Returns the directories that hold runs: this one, its shards, or none."""
    parts = [directory] if (directory / "runs.jsonl").exists() else []
    return parts + sorted(path.parent for path in directory.glob("shard_*_of_*/runs.jsonl"))


def _load_settings(path: Path) -> dict[str, Any]:
    study = artifacts.read_json(path)
    if not isinstance(study, dict) or not isinstance(study.get("title"), str):
        raise InputError(f"{path} must be an object with a title: run the study again.")
    if study.get("schema") != STUDY_SCHEMA:
        raise InputError(
            f'{path} must have the schema "{STUDY_SCHEMA}", got {study.get("schema")!r}: report '
            "it with the version that wrote it, or run the study again."
        )
    return study


def _compared(study: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change a study's numbers; whether checkpoints are kept does not."""
    config = study.get("config") or {}
    return {name: value for name, value in config.items() if name != "keep_checkpoints"}


def _problem(record: Any) -> str | None:
    """Says what is wrong with a record, None if nothing is."""
    if not isinstance(record, dict):
        return f"a record must be a JSON object, got {record!r}"
    if record.get("schema") != RUN_SCHEMA:
        return f'schema must be "{RUN_SCHEMA}", got {record.get("schema")!r}'
    if record.get("stage") not in stages.KINDS:
        return f"stage must be one of {', '.join(stages.KINDS)}, got {record.get('stage')!r}"
    required = dict(_STAGE_FIELDS)
    optional: dict[str, tuple[type, ...]] = {}
    if record["stage"] == stages.EVALUATE:
        required |= _MODEL_FIELDS | (_PRUNED_FIELDS if record.get("kind") == "pruned" else {})
        optional = _OPTIONAL_FIELDS
    unknown = sorted(set(record) - set(required) - set(optional))
    if unknown:
        return f"fields must be those of this version, got {unknown[0]}"
    for name, types in (required | {n: t for n, t in optional.items() if n in record}).items():
        if name not in record:
            return f"a record must have the field {name}, got none"
        value = record[name]
        if not isinstance(value, types) or isinstance(value, bool):
            names = ["null" if kind is type(None) else kind.__name__ for kind in types]
            return f"{name} must be {' or '.join(names)}, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} must be finite, got {value!r}"
    return _model_problem(record) if record["stage"] == stages.EVALUATE else None


def _model_problem(record: Mapping[str, Any]) -> str | None:
    if record["kind"] not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}, got {record['kind']!r}"
    interval = record["interval"]
    if len(interval) != 2 or not all(isinstance(end, _NUMBER) for end in interval):
        return f"interval must be [low, high], got {interval!r}"
    for name in ("num_experts", "source_num_experts"):
        if record[name] is not None and record[name] < 1:
            return f"{name} must be at least 1, got {record[name]}"
    return None
