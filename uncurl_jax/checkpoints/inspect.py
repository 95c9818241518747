"""What a checkpoint is, told from its metadata alone: no array is read."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.provenance import provenance_chain
from uncurl_jax.config import ModelConfig


def describe(path: layout.PathLike | layout.CheckpointPath) -> dict[str, Any]:
    """Describes a checkpoint.

    Args:
      path: as for `layout.resolve`.

    Returns:
      A JSON-compatible dict: "path", "step", "steps" (finished steps of the directory),
      "num_experts" (per layer, 0 is dense), "num_selected_experts", "parameters",
      "active_parameters" (those that one token uses: of the experts, the selected ones), "bytes"
      (of the parameters, uncompressed), "dtypes" {dtype: parameters}, "optimizer_bytes" (0 if no
      state was saved), "layers" (per layer: "layer", "num_experts", "parameters",
      "active_parameters", "bytes"), "model_config", "vocabulary" and "provenance" (None where the
      file is missing, as in a checkpoint of T5X) and "chain" (the checkpoint and all that it was
      made from, the newest first: "path", "created_by", "fingerprint" and "plan_hash").

    Raises:
      InputError: If the checkpoint does not resolve, or its arrays are not its architecture's.
    """
    reader = layout.open_reader(path)
    checkpoint = reader.checkpoint
    config = checkpoint.model_config()
    layout.check_architecture(reader, config)
    parameters = reader.parameters()
    dtypes: collections.Counter[str] = collections.Counter()
    for shape, dtype in parameters.values():
        dtypes[dtype.name] += math.prod(shape)
    optimizer = [
        math.prod(shape) * dtype.itemsize
        for name, (shape, dtype) in reader.metadata.items()
        if name.startswith("state/param_states/")
    ]
    return {
        "path": str(checkpoint),
        "step": checkpoint.step,
        "steps": layout.finished_steps(checkpoint.directory),
        "num_experts": list(config.num_experts),
        "num_selected_experts": config.num_selected_experts,
        **_totals(parameters, config),
        "dtypes": dict(sorted(dtypes.items())),
        "optimizer_bytes": sum(optimizer),
        "layers": [
            {
                "layer": layer,
                "num_experts": config.num_experts[layer],
                **_totals(_of_layer(parameters, layer), config),
            }
            for layer in range(config.num_layers)
        ],
        "model_config": config.to_dict(),
        "vocabulary": _optional(checkpoint, layout.VOCABULARY_FILE),
        "provenance": _optional(checkpoint, layout.PROVENANCE_FILE),
        "chain": [
            {
                "path": link.path,
                "created_by": link.created_by,
                "fingerprint": link.fingerprint,
                "plan_hash": link.plan_hash,
            }
            for link in provenance_chain(checkpoint)
        ],
    }


def _of_layer(
    parameters: Mapping[str, layout.ArrayMetadata], layer: int
) -> dict[str, layout.ArrayMetadata]:
    prefix = f"layers_{layer}/"
    return {name: entry for name, entry in parameters.items() if name.startswith(prefix)}


def _totals(parameters: Mapping[str, layout.ArrayMetadata], config: ModelConfig) -> dict[str, int]:
    total = active = num_bytes = 0
    for name, (shape, dtype) in parameters.items():
        size = math.prod(shape)
        total += size
        num_bytes += size * dtype.itemsize
        if is_expert_array(name):
            size = size // shape[0] * config.num_selected_experts
        active += size
    return {"parameters": total, "active_parameters": active, "bytes": num_bytes}


def _optional(checkpoint: layout.CheckpointPath, name: str) -> Any:
    path = checkpoint.directory / name
    return layout.read_json_at(path) if path.exists() else None
