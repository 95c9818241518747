"""AdamW with warm-up, decay, clipping, and a choice of what is trained."""

from __future__ import annotations

from typing import Any

import jax
import optax

from uncurl_jax.config import OptimizerConfig

_UNDECAYED = ("bias", "wi_bias", "wo_bias", "scale")


def learning_rate_schedule(
    config: OptimizerConfig, num_steps: int, begin_step: int = 0
) -> optax.Schedule:
    """Linear warm-up from 0, then the chosen decay, which reaches 0 at `num_steps`.

    What it returns counts from `begin_step`.
    """
    decay_steps = max(num_steps - config.warmup_steps, 1)
    peak = config.peak_learning_rate
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    whole = decay
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
        whole = optax.join_schedules([warmup, decay], [config.warmup_steps])
    return whole if not begin_step else lambda count: whole(count + begin_step)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(entry.key) for entry in path]


def trained_leaves(tree: Any, trainable: str) -> list[jax.Array]:
    """Returns the leaves of a parameter-shaped tree that "all" or "router" training changes."""
    return [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if trainable == "all" or "router" in _names(path)
    ]


def make_optimizer(
    config: OptimizerConfig, num_steps: int, trainable: str = "all", begin_step: int = 0
) -> optax.GradientTransformation:
    """Returns the optimizer; with trainable "router", all but router kernels get zero updates.

    Clipping sees the gradients of what is trained only. Frozen parameters have no optimizer state.
    """

    def is_decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _names(path)[-1] not in _UNDECAYED, params
        )

    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    adamw = optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config, num_steps, begin_step),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_decayed,
        ),
    )
    if trainable == "all":
        return adamw

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if "router" in _names(path) else "frozen", params
        )

    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, labels)
