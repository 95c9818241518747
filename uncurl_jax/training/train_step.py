"""One optimizer step as a pure, compiled function; the same for every stage and mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.serialization
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.models.architecture import abstract_params, build, read_batch
from uncurl_jax.models.decoder import Params, moe_metrics
from uncurl_jax.partitioning import ExpertAxes, replicated
from uncurl_jax.training import distillation, losses, optimizer


class TrainState(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: float32 tree.
      opt_state: the state of `optimizer.make_optimizer`.
    """

    step: jax.Array
    params: Params
    opt_state: Any


def _optimizer_of(config: TrainConfig) -> optax.GradientTransformation:
    return optimizer.make_optimizer(
        config.optimizer,
        config.schedule_steps or config.num_steps,
        config.trainable,
        config.begin_step,
    )


def new_state(params: Params, config: TrainConfig) -> TrainState:
    """Returns `begin_step` with a fresh optimizer state, sharded as the parameters are."""
    transformation = _optimizer_of(config)
    shardings = _state_shardings(jax.eval_shape(transformation.init, params), params)
    opt_state = jax.jit(transformation.init, out_shardings=shardings)(params)
    return TrainState(step_counter(config.begin_step, params), params, opt_state)


def step_counter(step: int, params: Params) -> jax.Array:
    """Returns an int32 scalar on all devices of the parameters.

    That is where the compiled step leaves it; from elsewhere the second step would be another
    program than the first, and compiled too.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    everywhere = None
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(lambda: jnp.int32(step), out_shardings=everywhere)()


def _state_shardings(abstract_opt_state: Any, params: Params) -> Any:
    """Shardings for an optimizer state: moments follow their parameter, scalars are replicated."""
    of_parameter = {
        _path_names(path): array.sharding
        for path, array in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    some_sharding = next(iter(of_parameter.values()))
    if not isinstance(some_sharding, NamedSharding):
        return None
    everywhere = NamedSharding(some_sharding.mesh, PartitionSpec())
    depth = {len(names) for names in of_parameter}

    def find(path: tuple[Any, ...], _: Any) -> NamedSharding:
        names = _path_names(path)
        return next(
            (of_parameter[names[-n:]] for n in depth if names[-n:] in of_parameter), everywhere
        )

    return jax.tree_util.tree_map_with_path(find, abstract_opt_state)


def _path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if hasattr(entry, "key"))


def state_dict(opt_state: Any) -> Any:
    """Turns an optimizer state into nested dicts, as checkpoints store it."""
    return flax.serialization.to_state_dict(opt_state)


def from_state_dict(template: Any, values: Any) -> Any:
    """Inverse of `state_dict`; `template` is an optimizer state of the same structure."""
    return flax.serialization.from_state_dict(template, values)


def abstract_state(model: ModelConfig, config: TrainConfig, mesh: Mesh | None) -> tuple[Any, Any]:
    """Returns (parameters, optimizer state) as ShapeDtypeStructs with shardings, to restore."""
    params = abstract_params(model, mesh, config.expert_axes)
    transformation = _optimizer_of(config)
    opt_state = jax.eval_shape(transformation.init, params)
    if mesh is not None:
        shardings = _state_shardings(opt_state, params)
        opt_state = jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=sharding
            ),
            opt_state,
            shardings,
        )
    return params, opt_state


def make_train_step(
    model: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | None = None,
    num_groups: int | None = None,
    target_length: int | None = None,
    teacher: distillation.Teacher | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the compiled step (state, batch, seed) -> (state, metrics); the state is donated.

    Stages that differ in seed alone share one compiled program. If the weighted targets of every
    row lie within `target_length` places, logits are computed there alone; the loss is the same.
    With a `teacher` the step takes its parameters as a fourth argument, on the same mesh; they are
    neither changed nor donated. The teacher runs as in evaluation: without jitter, and with its
    evaluation capacity.
    """
    return _compiled_step(
        model,
        config.optimizer,
        config.schedule_steps or config.num_steps,
        config.begin_step,
        config.trainable,
        config.accumulation_steps,
        mesh,
        num_groups,
        config.expert_axes,
        target_length,
        teacher,
    )


@functools.lru_cache(maxsize=32)
def _compiled_step(
    model,
    optimizer_config,
    num_steps,
    begin_step,
    trainable,
    accumulation,
    mesh,
    num_groups,
    expert_axes: ExpertAxes | None,
    target_length,
    teacher,
):
    module = build(model, mesh, num_groups, expert_axes)
    # Router logits are observed if they are compared.
    has_router_term = teacher is not None and bool(teacher.clusters)
    mutable = ["intermediates", *(["router_observations"] if has_router_term else [])]
    transformation = optimizer.make_optimizer(optimizer_config, num_steps, trainable, begin_step)
    schedule = optimizer.learning_rate_schedule(optimizer_config, num_steps)

    def teach(
        spec: distillation.Teacher, teacher_params: Params, arguments: dict[str, Any]
    ) -> distillation.Observed:
        logits, sown = build(spec.model, mesh, num_groups, expert_axes).apply(
            {"params": jax.lax.stop_gradient(teacher_params)}, **arguments, mutable=mutable[1:]
        )
        return distillation.observed(logits, sown, spec.model)

    def loss_of_part(
        params: Params, part: Any, totals: losses.BatchTotals, key: jax.Array, teacher_params: Any
    ):
        """Loss of one part of the batch; the parts' losses and gradients add up."""
        read = read_batch(model, part, target_length)
        logits, sown = module.apply(
            {"params": params},
            **read.arguments,
            is_training=True,
            mutable=mutable,
            rngs={"jitter": key},
        )
        tokens = losses.token_loss(logits, read.targets, read.weights)
        metrics = moe_metrics(sown.get("intermediates", {}))
        metrics = {name: value / accumulation for name, value in metrics.items()}
        cross_entropy = tokens.cross_entropy / totals.weight
        loss = cross_entropy + metrics["auxiliary_loss"] + metrics["router_z_loss"]
        metrics["cross_entropy"] = cross_entropy
        metrics["token_accuracy"] = tokens.correct / totals.weight
        if teacher is not None:
            added = distillation.terms(
                distillation.observed(logits, sown, model),
                teach(teacher, teacher_params, read.arguments),
                read,
                totals,
                spec=teacher,
                model=model,
            )
            loss += added.loss
            metrics |= added.metrics
        return loss, metrics

    gradient = jax.value_and_grad(loss_of_part, has_aux=True)

    def step(state: TrainState, batch: Any, seed: jax.Array, teacher_params: Any = None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        totals = losses.BatchTotals(
            jnp.maximum(batch.weights.sum(), 1.0),
            tuple(
                jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
                for mask in read_batch(model, batch, target_length).masks
            ),
        )
        if accumulation == 1:
            (loss, metrics), grads = gradient(state.params, batch, totals, key, teacher_params)
        else:
            parts = jax.tree.map(
                # Part i takes rows i, i + n, ...: each device keeps rows of every part.
                lambda a: a.reshape(-1, accumulation, *a.shape[1:]).swapaxes(0, 1),
                batch,
            )

            def add_part(carry: Any, indexed_part: Any):
                index, part = indexed_part
                part_key = jax.random.fold_in(key, index)
                out = gradient(state.params, part, totals, part_key, teacher_params)
                return jax.tree.map(jnp.add, carry, out), None

            indexed = (jnp.arange(accumulation), parts)
            first = jax.tree.map(lambda a: a[0], indexed)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(gradient, state.params, first[1], totals, key, teacher_params),
            )
            ((loss, metrics), grads), _ = jax.lax.scan(add_part, zeros, indexed)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        metrics |= {
            "loss": loss,
            # Of what is trained alone, so that the compiler can leave out the other gradients.
            "gradient_norm": optax.tree.norm(optimizer.trained_leaves(grads, trainable)),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "num_tokens": batch.mask.sum(dtype=jnp.int32),
        }
        params = cast(Params, optax.apply_updates(state.params, updates))
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = None
    if mesh is not None:
        # The state goes in and comes out alike, so that one program takes all steps.
        params = abstract_params(model, mesh, expert_axes)
        opt_state = jax.eval_shape(transformation.init, params)
        shardings = TrainState._make(
            [
                replicated(mesh),
                jax.tree.map(lambda array: array.sharding, params),
                _state_shardings(opt_state, params),
            ]
        )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
