"""`uncurl gin --show`: what gin files come to, with every default filled in."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import gin

from uncurl_jax.cli.gin_config import bound
from uncurl_jax.errors import InputError

# What gin files configure, and the values that are not built from a dataclass.
_ROOTS = (
    "training.trainer.train",
    "experiments.sweep.run_sweep",
    "experiments.quickstart.run_quickstart",
    "experiments.pilot.run_pilot",
    "data.token_cache.build_token_cache",
    "evaluation.calibration.calibrate_checkpoint",
    "evaluation.evaluator.evaluate_checkpoint",
    "pruning.plan.make_plan",
    "checkpoints.transform.prune_checkpoint",
    "config.ModelConfig",
)
# The same of T5X, where files have imported it.
_T5X_ROOTS = ("t5x.train.train", "t5x.eval.evaluate", "t5x.infer.infer")


def resolved() -> dict[str, Any]:
    """Returns function -> parameters of what the parsed files bind; objects as nested dicts.

    Raises:
      InputError: If they bind nothing that a command runs.
    """
    found: dict[str, Any] = {}
    for name, function in _functions().items():
        if not bound(function):
            continue
        if isinstance(function, type):
            # A model of its own is shown if no stage holds it.
            if not found:
                found[name] = _plain(gin.get_configurable(function)())
            continue
        found[name] = {key: _plain(value) for key, value in gin.get_bindings(function).items()}
    if not found:
        raise InputError(
            "A gin file must bind what a command runs, got none: give a file of gin/runs, "
            "gin/tasks or gin/models, or one that includes it."
        )
    return found


def _functions() -> dict[str, Callable[..., Any]]:
    found = {}
    for name in (*_T5X_ROOTS, *_ROOTS):
        module, _, attribute = name.rpartition(".")
        if name in _T5X_ROOTS:
            if module not in sys.modules:
                continue
        else:
            module = f"uncurl_jax.{module}"
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


def _plain(value: Any) -> Any:
    """Dataclasses as dicts that name their class; other objects by their representation."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    if callable(getattr(value, "describe", None)) and not isinstance(value, type):
        return {"class": type(value).__name__, **_plain(value.describe())}
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{value.__module__}.{name}"
