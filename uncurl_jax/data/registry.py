"""Tasks by name: SuperGLUE's eight, the synthetic ones and the caller's own."""

from __future__ import annotations

import difflib

from uncurl_jax.data import superglue, synthetic
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import Task
from uncurl_jax.errors import InputError

AnyTask = Task | LanguageModelingTask

_TASKS: dict[str, AnyTask] = {
    task.name: task for task in (*superglue.TASKS, *synthetic.TASKS, synthetic.CORPUS_TASK)
}
_SHORT_NAMES = {task.name.removeprefix("superglue_"): task.name for task in superglue.TASKS}


def task_names() -> tuple[str, ...]:
    """Returns the full names of all tasks, sorted."""
    return tuple(sorted(_TASKS))


def find_task(name: str) -> AnyTask:
    """Returns the task of that name, of either kind.

    Args:
      name: a full name, or a SuperGLUE task's short name ("rte"), in any case.

    Raises:
      InputError: If there is none; the message names the nearest.
    """
    key = name.lower()
    task = _TASKS.get(name) or _TASKS.get(_SHORT_NAMES.get(key, key))
    if task is None:
        known = [*_TASKS, *_SHORT_NAMES]
        near = difflib.get_close_matches(key, known, n=3) or list(task_names())
        raise InputError(
            f"A task must be a registered one, got {name!r}: nearest {', '.join(near)}."
        )
    return task


def get_task(name: str) -> Task:
    """Returns the task with options of that name.

    Raises:
      InputError: If there is none, or it is a language-modelling task, which has no options.
    """
    task = find_task(name)
    if not isinstance(task, Task):
        raise InputError(
            f"A task with options is needed, got {name!r}, which is plain text: "
            f"use it for training and calibration only."
        )
    return task


def register_task(task: AnyTask) -> None:
    """Makes a task known by its name.

    Raises:
      InputError: If the name is taken by another task.
    """
    if _TASKS.get(task.name, task) != task or task.name.lower() in _SHORT_NAMES:
        raise InputError(f"A task's name must be new, got {task.name!r}: choose another.")
    _TASKS[task.name] = task
