"""The models of an artifact, ready to run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uncurl_jax.config import ModelConfig
from uncurl_jax.data.vocabulary import Vocabulary, load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.export import runner
from uncurl_jax.serving.routing_sums import layer_number


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """One model of an artifact.

    Attributes:
      name: in the artifact.
      task: what it was made for, None if nobody said.
      options: the answers of every question of its task; None if each has its own.
      example: {"prompt", "options"} of its task, None if not known.
      config: its architecture.
      fingerprint: of the checkpoint that it comes from.
      checkpoint: where that lay, for people.
      members: by layer, for each expert the experts of the unpruned model that it was made from;
        empty if it was not pruned.
      programs: its prefill, decode and score.
    """

    name: str
    task: str | None
    options: tuple[str, ...] | None
    example: Mapping[str, Any] | None
    config: ModelConfig
    fingerprint: str
    checkpoint: str
    members: Mapping[int, list[list[int]]]
    programs: runner.Model

    @property
    def has_statistics(self) -> bool:
        """Whether router statistics of it make sense: it has experts, one per router column."""
        return bool(self.config.moe_layers) and self.config.expert_map is None


@dataclasses.dataclass(frozen=True, eq=False)
class ServedArtifact:
    """An artifact on the device.

    Attributes:
      directory: where it lies.
      models: by name, in the artifact's order.
      vocabulary: of all of them.
      prefix: ids that stand before every prompt: the vocabulary's bos_id, or nothing.
      max_length: tokens that a row may have, the prefix included.
      dtype: that the models compute in.
      quantization: of their experts, None for none.
      bytes_in_memory: of all weights on the device; what models share counts once.
      bytes_apart: what the models would take with nothing shared.
    """

    directory: Path
    models: dict[str, ServedModel]
    vocabulary: Vocabulary
    prefix: tuple[int, ...]
    max_length: int
    dtype: str
    quantization: str | None
    bytes_in_memory: int
    bytes_apart: int


def open_artifact(directory: str | os.PathLike[str]) -> ServedArtifact:
    """Checks the files of an artifact and puts its models on the default device.

    Raises:
      InputError: If the directory is no whole artifact, or its programs do not run here.
    """
    directory = Path(directory)
    try:
        manifest = runner.read_manifest(directory)
        if manifest["format"] != "stablehlo":
            raise InputError(
                f'The server takes artifacts of the format "stablehlo", got {manifest["format"]!r} '
                f"in {directory}: export with --format stablehlo."
            )
        runner.check_files(directory, manifest)
        artifact = runner.Artifact(directory)
        loaded = {name: artifact.load(name) for name in artifact.names}
    except runner.ArtifactError as error:
        raise InputError(str(error)) from None
    models = {name: _served(name, model) for name, model in loaded.items()}
    vocabulary = _vocabulary(directory, manifest["vocabulary"])
    arrays = {id(array): array for model in loaded.values() for array in model.weights.values()}
    return ServedArtifact(
        directory,
        models,
        vocabulary,
        () if vocabulary.bos_id is None else (vocabulary.bos_id,),
        int(manifest["max_length"]),
        manifest["dtype"],
        manifest["quantization"],
        sum(array.nbytes for array in arrays.values()),
        sum(map(_bytes_alone, models.values())),
    )


def _bytes_alone(model: ServedModel) -> int:
    """Returns what a model would take with its own experts only, without those of the others."""
    total = 0
    for path, array in model.programs.weights.items():
        share = 1
        if "/moe/experts/" in path:
            layer = layer_number(path.partition("/")[0])
            share = model.config.num_experts[layer] / array.shape[0]
        total += round(array.nbytes * share)
    return total


def _served(name: str, model: runner.Model) -> ServedModel:
    entry = model.entry
    prompt = entry["prompt"] or {}
    options = prompt.get("options")
    return ServedModel(
        name,
        entry["task"],
        None if options is None else tuple(options),
        prompt.get("example"),
        ModelConfig.from_dict(entry["config"]),
        entry["checkpoint"]["fingerprint"],
        entry["checkpoint"]["name"],
        _members(entry["provenance"]),
        model,
    )


def _members(provenance: Mapping[str, Any] | None) -> dict[int, list[list[int]]]:
    """Reads the plan of the latest prune in a chain of provenances."""
    while provenance is not None and "plan" not in provenance:
        source = provenance.get("source")
        provenance = source.get("provenance") if isinstance(source, Mapping) else None
    if provenance is None:
        return {}
    return {
        layer["layer"]: [
            [expert for expert, label in enumerate(layer["labels"]) if label == number]
            for number in range(max(layer["labels"]) + 1)
        ]
        for layer in provenance["plan"]["layers"]
    }


def _vocabulary(directory: Path, record: Mapping[str, Any]) -> Vocabulary:
    spec = record["spec"]
    if spec != "bytes":
        spec = ",".join(str(directory / part) for part in spec.split(","))
    vocabulary = load_vocabulary(spec)
    if vocabulary.hash != record["hash"]:
        raise InputError(
            f"An artifact must hold the vocabulary that its manifest names "
            f"({record['hash'][:12]}), got another in {directory}: export again."
        )
    return vocabulary
