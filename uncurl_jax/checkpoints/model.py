"""Loads a checkpoint as a model that is ready to run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uncurl_jax.checkpoints import layout, store
from uncurl_jax.config import ModelConfig
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.models.decoder import Params
from uncurl_jax.partitioning import ExpertAxes


class LoadedModel(NamedTuple):
    """A model in memory.

    Attributes:
      config: its architecture.
      params: float32 parameters on the device or mesh.
      vocabulary: the {"name", "spec", "size", "hash"} it was trained with.
      checkpoint: where it came from.
      mesh: where it is; None on one device.
      expert_axes: mesh axes that divide each layer's experts; see partitioning.ExpertAxes.
    """

    config: ModelConfig
    params: Params
    vocabulary: dict[str, Any]
    checkpoint: layout.CheckpointPath
    mesh: Mesh | None
    expert_axes: ExpertAxes | None = None


def load_model(
    path: layout.PathLike | layout.CheckpointPath,
    mesh: Mesh | None = None,
    expert_axes: ExpertAxes | None = None,
) -> LoadedModel:
    """Restores the parameters of a checkpoint, leaving any optimizer state unread.

    Args:
      path: as for `layout.resolve`.
      mesh: where to put the parameters; the default device if None.
      expert_axes: mesh axes that divide each layer's experts.

    Raises:
      InputError: If there is no such checkpoint or its arrays do not fit its configuration.
    """
    checkpoint = layout.resolve(path)
    config = checkpoint.model_config()
    abstract = abstract_params(config, mesh, expert_axes)
    params = store.restore(checkpoint, abstract_params=abstract).params
    if mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    return LoadedModel(config, params, checkpoint.vocabulary(), checkpoint, mesh, expert_axes)
