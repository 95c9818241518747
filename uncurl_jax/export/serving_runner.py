"""Restores an Orbax artifact on its serving mesh and compares it with its reference outputs.

A process of its own runs this (see `verify`), because the number of devices is fixed when JAX
starts. It is also an example of how a server places the arrays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from uncurl_jax.checkpoints.serving import restore_arrays
from uncurl_jax.config import ModelConfig
from uncurl_jax.export import runner
from uncurl_jax.export.programs import SCALE_SUFFIX
from uncurl_jax.export.reference import forward_outputs
from uncurl_jax.models.architecture import logical_axes
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.partitioning import ExpertAxes, layer_expert_axes, make_mesh, parameter_spec


def check(directory: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Compares the model on its mesh with the reference.

    Returns:
      {model: {"difference", "same_rows", "tolerance"}}; see `runner.compare`.

    Raises:
      ArtifactError: If an output differs.
    """
    directory = Path(directory)
    manifest = runner.read_manifest(directory)
    ((name, entry),) = manifest["models"].items()
    serving = manifest["serving"]
    sizes = serving["mesh"]
    mesh = make_mesh(
        expert_partitions=sizes["expert"],
        model_partitions=sizes["model"],
        devices=jax.devices()[: serving["num_devices"]],
    )
    config = served_config(manifest, ModelConfig.from_dict(entry["config"]))
    variables = load_variables(directory, manifest, config, mesh)
    with np.load(directory / entry["reference"]) as archive:
        stored = dict(archive)
    inputs = {key: stored[f"in/{key}"] for key in runner.INPUTS}
    reference = {
        key.removeprefix("out/"): array for key, array in stored.items() if key.startswith("out/")
    }
    # As the reference: from the stored arrays, computed in float32.
    wide = dataclasses.replace(config, dtype="float32")
    decoder = Decoder(wide, mesh, expert_axes=_expert_axes(manifest))
    outputs = forward_outputs(decoder, variables, inputs)
    found = runner.compare(outputs, reference)
    limits = manifest["tolerance"]["same_platform"]
    if not runner.is_alike(found, limits):
        raise runner.ArtifactError(
            f"On a mesh of {sizes}, model {name} must reproduce its reference outputs"
            f"{runner.said(found, limits)}"
        )
    return {name: {**found, "tolerance": limits["difference"]}}


def served_config(manifest: dict[str, Any], config: ModelConfig) -> ModelConfig:
    """Returns the model with as many experts as are stored."""
    layers = manifest["serving"]["layers"]
    stored = tuple(
        layers[f"layers_{layer}"]["stored"] if count else 0
        for layer, count in enumerate(config.num_experts)
    )
    return dataclasses.replace(config, num_experts=stored, expert_map=None)


def load_variables(
    directory: Path, manifest: dict[str, Any], config: ModelConfig, mesh: Mesh
) -> dict[str, Any]:
    """Restores the arrays, divided over the mesh, and returns the module's collections."""
    names, expert_axes = logical_axes(config), _expert_axes(manifest)
    abstract = {}
    for path, entry in manifest["arrays"].items():
        # A scale lies as the bias of the same channels would.
        axes = _axes_of(names, path.removesuffix(SCALE_SUFFIX))
        if path.endswith(SCALE_SUFFIX):
            axes = (axes[0], axes[2])
        shape = tuple(entry["shape"])
        top = path.split("/")[0]
        layer = int(top.removeprefix("layers_")) if top.startswith("layers_") else 0
        over = layer_expert_axes(expert_axes, layer)
        sharding = NamedSharding(mesh, parameter_spec(axes, shape, mesh, over))
        abstract[path] = jax.ShapeDtypeStruct(shape, jnp.dtype(entry["dtype"]), sharding=sharding)
    params = restore_arrays(directory / manifest["params"], abstract)
    maps = {
        layer: {"moe": {"row": jnp.asarray(row, jnp.int32)}}
        for layer, row in manifest["serving"]["expert_map"].items()
    }
    return {"params": _dequantized(params, config), "expert_maps": maps}


def _expert_axes(manifest: dict[str, Any]) -> ExpertAxes | None:
    axes = manifest["serving"]["expert_axes"]
    return axes and tuple(tuple(layer) for layer in axes)


def _axes_of(names: Any, path: str) -> tuple[Any, ...]:
    for part in path.split("/"):
        names = names[part]
    return tuple(names)


def _dequantized(tree: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Multiplies int8 kernels by the scales beside them."""
    result = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result[key] = _dequantized(value, config)
        elif not key.endswith(SCALE_SUFFIX):
            scale = tree.get(key + SCALE_SUFFIX)
            if scale is not None:
                value = (value.astype(jnp.float32) * scale[:, None]).astype(config.dtype)
            result[key] = value
    return result


def main() -> int:
    """Checks the artifact that --dir names."""
    parser = argparse.ArgumentParser(description="Check an Orbax artifact on its mesh.")
    parser.add_argument("--dir", required=True)
    try:
        print(json.dumps(check(parser.parse_args().dir)))
    except runner.ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
