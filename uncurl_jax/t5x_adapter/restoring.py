"""What gin files of T5X take from a checkpoint: architecture, step, and parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig


def model_config(checkpoint: str) -> ModelConfig:
    """Returns the architecture of a checkpoint, pruned or not, from its model_config.json."""
    return layout.resolve(checkpoint).model_config()


def step_directory(checkpoint: str) -> str:
    """Returns the `checkpoint_<step>` directory that T5X restores: the latest, or the one given."""
    return str(layout.resolve(checkpoint))


def first_step(checkpoint: str) -> int:
    """Returns the step that a checkpoint was saved at, from which T5X goes on to count."""
    return layout.resolve(checkpoint).step


def last_step(checkpoint: str, num_steps: int) -> int:
    """Returns T5X's total_steps, which counts from the checkpoint's step, for `num_steps` more."""
    return layout.resolve(checkpoint).step + num_steps


def drop_optimizer_state(
    state_dict: Mapping[str, Any],
    target_state_dict: Mapping[str, Any] | None = None,
    *,
    is_resuming: bool = False,
    **kwargs: Any,
) -> Mapping[str, Any]:
    """Keeps parameters and step of the initial checkpoint; T5X begins the optimizer afresh.

    A `state_transformation_fns` for T5X's RestoreCheckpointConfig with fallback_to_scratch: pruned
    checkpoints hold no optimizer state, and that of a larger model would not fit.

    Args:
      state_dict: of the checkpoint.
      target_state_dict: of the model.
      is_resuming: whether the run's own checkpoint is restored, which keeps everything.
      **kwargs: what T5X may add.
    """
    del target_state_dict, kwargs
    if is_resuming:
        return state_dict
    return {"target": state_dict["target"], "state": {"step": state_dict["state"]["step"]}}
