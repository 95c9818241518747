"""The whole programs of a model, with the shapes and shardings of what they are given.

Nothing is allocated: arguments are `jax.ShapeDtypeStruct`s, so a program can be lowered for devices
that are not there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.evaluation.calibration import router_observer
from uncurl_jax.evaluation.generation import abstract_cache, compiled_decode
from uncurl_jax.evaluation.rank_classification import compiled_scores
from uncurl_jax.models.architecture import abstract_params, count_parameters
from uncurl_jax.partitioning import batch_sharding, replicated
from uncurl_jax.training import train_step
from uncurl_jax.training.throughput import training_flops_per_token

TRAIN, CALIBRATE, EVALUATE, DECODE = "train", "calibrate", "evaluate", "decode"
PROGRAMS = (TRAIN, CALIBRATE, EVALUATE, DECODE)
_ARGUMENTS = (
    "expert_parameters",
    "other_parameters",
    "expert_optimizer",
    "other_optimizer",
    "cache",
    "batch",
)


class Program(NamedTuple):
    """One compiled function of the toolkit and what it is called with.

    Attributes:
      name: one of PROGRAMS.
      function: from jax.jit, not compiled yet.
      arguments: trees of ShapeDtypeStructs with shardings, by name, in the order of the call.
      num_rows: rows of the global batch that one call takes.
      num_tokens: tokens of them.
    """

    name: str
    function: Any
    arguments: dict[str, Any]
    num_rows: int
    num_tokens: int

    def lower(self) -> Any:
        """Traces and lowers the program for the devices of its arguments' mesh."""
        return self.function.lower(*self.arguments.values())


def build(
    name: str, model: ModelConfig, config: TrainConfig, mesh: Mesh, *, num_rows: int, length: int
) -> Program:
    """Returns a program on a mesh.

    Args:
      name: one of PROGRAMS: an optimizer step; the pass that gathers router statistics; the pass
        that scores rows; or one token of each row with the key-value cache.
      model: the architecture.
      config: optimizer, accumulation and placement of experts; its batch size is not looked at.
      mesh: devices, which need not exist here.
      num_rows: rows of the global batch.
      length: tokens of each row; `decode` has the model's max_length in its cache instead.
    """
    whole = replicated(mesh)
    if name == TRAIN:
        params, opt_state = train_step.abstract_state(model, config, mesh)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        arguments = {
            # _make, because this tuple holds shapes in the places of arrays.
            "state": train_step.TrainState._make([step, params, opt_state]),
            "batch": abstract_batch(num_rows, length, mesh),
            "seed": step,
        }
        function = train_step.make_train_step(model, config, mesh)
        return Program(name, function, arguments, num_rows, num_rows * length)
    arguments = {"params": abstract_params(model, mesh, config.expert_axes)}
    if name == DECODE:
        rows = batch_sharding(mesh)
        token = jax.ShapeDtypeStruct((num_rows,), jnp.int32, sharding=rows)
        arguments |= {
            "cache": abstract_cache(model, num_rows, mesh),
            "token": token,
            "positions": token,
            "is_running": jax.ShapeDtypeStruct((num_rows,), jnp.bool_, sharding=rows),
        }
        function = compiled_decode(model, mesh, config.expert_axes).step
        return Program(name, function, arguments, num_rows, num_rows)
    arguments["batch"] = abstract_batch(num_rows, length, mesh)
    if name == CALIBRATE:
        function = router_observer(model, mesh, expert_axes=config.expert_axes)
    else:
        function = compiled_scores(model, mesh, None, config.expert_axes)
    return Program(name, function, arguments, num_rows, num_rows * length)


def abstract_batch(num_rows: int, length: int, mesh: Mesh) -> Batch:
    """Returns the shapes of a global batch, its rows divided over the devices with tokens."""
    sharding = batch_sharding(mesh)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((num_rows, length), dtype, sharding=sharding)

    ids = array(jnp.int32)
    return Batch(inputs=ids, targets=ids, weights=array(jnp.float32), mask=array(jnp.bool_))


def argument_bytes(program: Program) -> dict[str, int]:
    """Returns bytes per device of what a program is given, by what it is.

    The keys are expert_parameters, other_parameters, expert_optimizer, other_optimizer, cache and
    batch; experts are those of MoE layers, without their routers. Padding of a device's layout is
    not in it.
    """
    sizes: dict[str, int] = dict.fromkeys(_ARGUMENTS, 0)
    for path, array in jax.tree_util.tree_flatten_with_path(program.arguments)[0]:
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        owner = "expert" if "experts" in names else "other"
        if names[0] == "params" or names[:2] == ["state", "params"]:
            key = f"{owner}_parameters"
        elif names[:2] == ["state", "opt_state"]:
            key = f"{owner}_optimizer"
        else:
            key = "cache" if names[0] == "cache" else "batch"
        sizes[key] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return sizes


def model_flops(program: Program, model: ModelConfig, length: int) -> float | None:
    """FLOPs that the model needs for one call, by arithmetic; None for a decode step.

    See training.throughput; a forward pass alone is a third.
    """
    if program.name == DECODE:
        return None
    active = count_parameters(model).active
    of_training = training_flops_per_token(model, active, length) * program.num_tokens
    return of_training if program.name == TRAIN else of_training / 3
