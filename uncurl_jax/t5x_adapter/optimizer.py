"""The optimizer of `uncurl train` behind T5X's interface."""

# T5X is on no package index, so the type checker may not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

import optax
from t5x import optimizers

from uncurl_jax.config import OptimizerConfig
from uncurl_jax.training.optimizer import learning_rate_schedule, make_optimizer


def adamw(config: OptimizerConfig, num_steps: int, begin_step: int = 0) -> optimizers.OptaxWrapper:
    """Returns AdamW with warm-up, decay and clipping, the same transformation as ours.

    The schedule is inside: T5X's `learning_rate_fn` is only logged.

    Args:
      config: what `uncurl train` takes.
      num_steps: step at which the learning rate has decayed to its end, counted from this
        optimizer's own beginning, not from T5X's step.
      begin_step: step of the schedule to begin at.
    """
    return optimizers.OptaxWrapper(make_optimizer(config, num_steps, "all", begin_step))


def learning_rate(config: OptimizerConfig, num_steps: int, first_step: int = 0) -> optax.Schedule:
    """Returns the learning rate of `adamw` by T5X's step, for its log.

    Args:
      config: as for `adamw`.
      num_steps: as for `adamw`.
      first_step: T5X's step when the optimizer began.
    """
    schedule = learning_rate_schedule(config, num_steps)
    return lambda step: schedule(step - first_step)
