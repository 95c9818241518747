"""Stopping a stage on a validation split, and keeping the checkpoint that scored best there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uncurl_jax.artifacts import read_json
from uncurl_jax.checkpoints import layout, store
from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.config import EarlyStoppingConfig

SCORE = "validation_score"


class Validation(NamedTuple):
    """How a stage is scored while it runs.

    Attributes:
      score: of a model with its current parameters; higher is better. Runs on every process.
      record: what it scores (task, split, hash), kept with the stage's configuration.
    """

    score: Callable[[LoadedModel], float]
    record: dict[str, Any]


def is_over(lines: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the lines of metrics.jsonl end with `patience` scores without a new best."""
    return _has_waited(_history(lines), patience)


def _history(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line[SCORE]) for line in lines if SCORE in line]


def _best(history: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    return max(history, key=lambda pair: (pair[1], -pair[0]), default=None)


def _has_waited(history: Sequence[tuple[int, float]], patience: int) -> bool:
    best = _best(history)
    return best is not None and sum(step > best[0] for step, _ in history) >= patience


class EarlyStopping:
    """Scores a running stage, saves the best checkpoint in best/ and says when to stop."""

    def __init__(
        self,
        config: EarlyStoppingConfig,
        validation: Validation,
        checkpoints: store.CheckpointStore,
        lines: Sequence[dict[str, Any]],
    ):
        """Goes on after what the lines of metrics.jsonl hold.

        Args:
          config: how often, how long.
          validation: what is scored.
          checkpoints: store for best/. It should keep two: if a run was killed after a new best
            and before its next own checkpoint, the best before that is still wanted.
          lines: of the steps that were done already.
        """
        self._config = config
        self._validation = validation
        self._checkpoints = checkpoints
        self._history = _history(lines)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best so far; the earliest of equals."""
        return _best(self._history)

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` scores brought no new best."""
        return _has_waited(self._history, self._config.patience)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether the stage is scored after this step."""
        return step % self._config.every_steps == 0 or step == last_step

    def score(self, step: int, model: LoadedModel) -> float:
        """Scores the model after a step and saves it if it is the best yet."""
        value = self._validation.score(model)
        self._history.append((step, value))
        best = self.best
        if best is not None and best[0] == step:
            self._checkpoints.save(step, model.params)
        return value


def remove_later(directory: Path, step: int) -> None:
    """Removes best checkpoints of steps that a resumed run does again; on the first process."""
    if not directory.exists():
        return
    for later in layout.finished_steps(directory):
        if later > step:
            shutil.rmtree(directory / f"checkpoint_{later}")


def result_of(out: str | os.PathLike[str]) -> Path:
    """Returns the checkpoint that a finished stage left: its best, or without validation its last.

    Args:
      out: the stage's directory, with train_summary.json.
    """
    return Path(out) / read_json(Path(out) / "train_summary.json")["checkpoint"]
