"""Runs a serving artifact with jax and numpy (and flatbuffers, which jax.export reads files with).

This file imports nothing else: `uncurl export` puts a copy of it into every artifact, as run.py.

    python run.py                     # compares every model with its reference outputs
    python run.py --model rte --ids 87 108 111 --steps 8

In a program of your own:

    from run import Artifact
    model = Artifact("DIR").load("rte")
    read = model.prefill(inputs, lengths)       # inputs [b, l]: bos_id, the prompt's ids
    token = read["logits"].argmax(-1)
    step = model.decode(read["cache"], token, lengths)   # positions: the tokens read so far
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export

SCHEMA = "uncurl_jax artifact 1"
MANIFEST = "manifest.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
}
# Of a reference; the other arrays of its file are outputs.
INPUTS = ("inputs", "lengths", "tokens", "targets", "target_positions", "target_mask")

PathLike = str | os.PathLike[str]
Program = Callable[..., dict[str, Any]]


class ArtifactError(ValueError):
    """An artifact or a request that breaks a rule; the message is one sentence."""


def read_manifest(directory: PathLike) -> dict[str, Any]:
    """Returns the manifest of an artifact; ArtifactError if the directory holds none."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"An artifact must hold {MANIFEST}, got {directory} without it: give a directory that "
            "uncurl export wrote."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} must hold JSON, got {error}: export again.") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(
            f'{path} must have the schema "{SCHEMA}", got {schema!r}: export again.'
        )
    return manifest


def sha256_of_file(path: PathLike) -> str:
    """Returns the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_files(directory: PathLike, manifest: Mapping[str, Any]) -> None:
    """Raises ArtifactError unless every file has the size and hash that the manifest says."""
    for name, entry in manifest["files"].items():
        path = Path(directory) / name
        if not path.is_file():
            raise ArtifactError(
                f"An artifact must hold the files of its manifest, got {directory} without {name}: "
                "copy it again."
            )
        if path.stat().st_size != entry["bytes"] or sha256_of_file(path) != entry["sha256"]:
            raise ArtifactError(
                f"{path} must have the SHA-256 that the manifest says, {entry['sha256'][:12]}..., "
                "got other bytes: copy the artifact again."
            )


def read_tensors(path: PathLike) -> dict[str, np.ndarray]:
    """Returns {name: array} of a safetensors file, memory-mapped."""
    try:
        with Path(path).open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                array = data[start:stop].view(DTYPES[entry["dtype"]])
                tensors[name] = array.reshape(entry["shape"])
        return tensors
    except FileNotFoundError:
        raise ArtifactError(
            f"An artifact must hold its weights, got nothing at {path}: copy it again."
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ArtifactError(
            f"{path} must be a whole safetensors file, got {error}: copy it again."
        ) from None


class Artifact:
    """The models of a directory; arrays and programs that models share are loaded once.

    Attributes:
      directory: where it lies.
      manifest: its manifest.json.
    """

    def __init__(self, directory: PathLike):
        """Reads the manifest and maps the weights; nothing goes to a device yet."""
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self._tensors: dict[str, np.ndarray] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                self._tensors |= read_tensors(self.directory / name)
        self._arrays: dict[str, jax.Array] = {}
        self._programs: dict[str, Program] = {}

    @property
    def names(self) -> list[str]:
        """The models' names, as the manifest orders them."""
        return list(self.manifest["models"])

    def load(self, name: str) -> Model:
        """Returns a model, its weights on the default device."""
        if name not in self.manifest["models"]:
            raise ArtifactError(
                f"A model must be one of the artifact's, got {name!r}: it holds "
                f"{', '.join(self.names)}."
            )
        entry = self.manifest["models"][name]
        weights = {path: self._array(tensor) for path, tensor in entry["weights"].items()}
        programs = {kind: self._program(kind, file) for kind, file in entry["programs"].items()}
        bos_id = self.manifest["vocabulary"]["bos_id"]
        return Model(name, entry, self.manifest["max_length"], weights, programs, bos_id)

    def _array(self, name: str) -> jax.Array:
        if name not in self._arrays:
            if name not in self._tensors:
                raise ArtifactError(
                    f"An artifact must hold every weight that its manifest names, got "
                    f"{self.directory} without {name}: copy it again."
                )
            self._arrays[name] = jnp.asarray(self._tensors[name])
        return self._arrays[name]

    def _program(self, kind: str, file: str) -> Program:
        if file not in self._programs:
            path = self.directory / file
            try:
                exported = export.deserialize(bytearray(path.read_bytes()))
            except FileNotFoundError:
                raise ArtifactError(
                    f"An artifact must hold its programs, got nothing at {path}: copy it again."
                ) from None
            platform = jax.default_backend().replace("gpu", "cuda")
            if platform not in exported.platforms:
                raise ArtifactError(
                    f"A program runs on {', '.join(exported.platforms)}, got {platform}."
                )
            # The cache is overwritten in place.
            donated = (1,) if kind == "decode" else ()
            self._programs[file] = jax.jit(exported.call, donate_argnums=donated)
        return self._programs[file]


class Model:
    """One model; its programs compile for each new shape of their inputs.

    `routing` in the results is {"layers_<i>": {"expert_index": [b, l, k] int32, "gate": [b, l, k]
    float32, "router_logits": [b, l, e] float32}}: what the router chose for each token, in the
    model's own numbering of experts.

    Attributes:
      name: in the artifact.
      entry: what the manifest says of it.
      max_length: of a prompt and its continuation.
      bos_id: what inputs begin with, None if with the prompt itself.
      weights: {parameter path: array on the device}.
    """

    def __init__(
        self,
        name: str,
        entry: Mapping[str, Any],
        max_length: int,
        weights: Mapping[str, Any],
        programs: Mapping[str, Program],
        bos_id: int | None = 0,
    ):
        """Use `Artifact.load`."""
        self.name, self.entry, self.max_length = name, entry, max_length
        self.bos_id = bos_id
        self.weights = weights
        self.programs = programs

    def prefill(self, inputs: Any, lengths: Any) -> dict[str, Any]:
        """Reads prompts into a new cache.

        Args:
          inputs: [b, l] int32: bos_id, then the prompt's ids, then anything.
          lengths: [b] int32, how many of them count, bos_id included.

        Returns:
          {"logits": [b, vocab] float32 of each row's next token, "cache", "routing"}.
        """
        inputs, lengths = self._checked(inputs, lengths)
        return self.programs["prefill"](self.weights, inputs, lengths)

    def decode(
        self, cache: Any, token: Any, positions: Any, is_running: Any = None
    ) -> dict[str, Any]:
        """Reads one more token of each row; the cache given is used up.

        Args:
          cache: of the tokens before.
          token: [b] int32.
          positions: [b] int32, how many tokens the row had before.
          is_running: [b] bool; rows that have ended take no expert's time. All run by default.

        Returns:
          As `prefill`, with l = 1.
        """
        token, positions = np.asarray(token, np.int32), np.asarray(positions, np.int32)
        if token.ndim != 1 or token.shape != positions.shape:
            raise ArtifactError(
                f"token and positions must be of one shape [b], got {token.shape} and "
                f"{positions.shape}."
            )
        if is_running is None:
            is_running = np.ones(token.shape, bool)
        if np.any((positions >= self.max_length) & is_running):
            raise ArtifactError(
                f"positions must be below max_length={self.max_length}, got {positions.max()}: "
                "the row is full."
            )
        return self.programs["decode"](self.weights, cache, token, positions, is_running)

    def score(
        self, inputs: Any, lengths: Any, targets: Any, target_positions: Any, target_mask: Any
    ) -> dict[str, Any]:
        """Returns how likely targets are: with the options of a question, rank classification.

        Args:
          inputs: [b, l] int32: bos_id, then prompt and option without its last id.
          lengths: [b] int32, as in `prefill`.
          targets: [b, t] int32, the ids to score.
          target_positions: [b, t] int32, the place in `inputs` that predicts each: one before it.
          target_mask: [b, t] bool, which of them count.

        Returns:
          {"log_likelihood": [b] float32, nats, "token_log_probabilities": [b, t], "routing"}.
        """
        inputs, lengths = self._checked(inputs, lengths)
        return self.programs["score"](
            self.weights,
            inputs,
            lengths,
            np.asarray(targets, np.int32),
            np.asarray(target_positions, np.int32),
            np.asarray(target_mask, bool),
        )

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continues prompts (lists of ids) greedily; returns lists of max_new_tokens ids."""
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > self.max_length:
            raise ArtifactError(
                f"A prompt and max_new_tokens must fit max_length={self.max_length}, got "
                f"{longest} + {max_new_tokens}: shorten one of them."
            )
        rows = [prompt if self.bos_id is None else [self.bos_id, *prompt] for prompt in prompts]
        positions = np.asarray([len(row) for row in rows], np.int32)
        inputs = np.zeros((len(rows), max(positions)), np.int32)
        for row, ids in enumerate(rows):
            inputs[row, : len(ids)] = ids
        result = self.prefill(inputs, positions)
        tokens = [np.asarray(result["logits"]).argmax(-1)]
        while len(tokens) < max_new_tokens:
            result = self.decode(result["cache"], tokens[-1], positions)
            tokens.append(np.asarray(result["logits"]).argmax(-1))
            positions = positions + 1
        return np.stack(tokens, axis=1).tolist()

    def _checked(self, inputs: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
        inputs, lengths = np.asarray(inputs, np.int32), np.asarray(lengths, np.int32)
        if inputs.ndim != 2 or lengths.shape != inputs.shape[:1] or not inputs.size:
            raise ArtifactError(
                f"inputs must be [b, l] and lengths [b], got {inputs.shape} and {lengths.shape}."
            )
        if inputs.shape[1] > self.max_length:
            raise ArtifactError(
                f"inputs must not be longer than max_length={self.max_length}, got "
                f"{inputs.shape[1]}: shorten the prompt."
            )
        if lengths.min() < 1 or lengths.max() > inputs.shape[1]:
            raise ArtifactError(
                f"lengths must lie between 1 and {inputs.shape[1]}, got {lengths.min()} to "
                f"{lengths.max()}."
            )
        return inputs, lengths


def run_reference(model: Model, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs all programs of a model on reference inputs; returns {name: array [b, ...]}."""
    result = model.prefill(inputs["inputs"], inputs["lengths"])
    is_real = np.arange(inputs["inputs"].shape[1]) < inputs["lengths"][:, None]
    outputs = {"prefill_logits": result["logits"]}
    for layer, choice in result["routing"].items():
        chosen = np.where(is_real[..., None], choice["expert_index"], -1)
        outputs[f"prefill_experts/{layer}"] = chosen
    for step, token in enumerate(inputs["tokens"].T):
        result = model.decode(result["cache"], token, inputs["lengths"] + step)
        outputs[f"decode_logits/{step}"] = result["logits"]
        for layer, choice in result["routing"].items():
            outputs[f"decode_experts/{step}/{layer}"] = choice["expert_index"]
    names = ("inputs", "lengths", "targets", "target_positions", "target_mask")
    scored = model.score(*(inputs[name] for name in names))
    outputs["token_log_probabilities"] = scored["token_log_probabilities"]
    return {name: np.asarray(array) for name, array in outputs.items()}


def compare(
    outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Compares outputs with the reference, over rows in which every token has the same experts.

    Rounding may turn a router's choice between two experts that it finds about equal, and then
    everything after it; hence the rows. In bfloat16, long rows of large models have such a token.

    Returns:
      {"difference": largest |a - b| / (1 + r), where r is the root mean square of the reference's
      row of logits, and "same_rows": share of the rows whose prompt has the same experts}.
    """

    def same(prefix: str) -> np.ndarray:
        rows = np.ones(len(reference["prefill_logits"]), bool)
        for name, expected in reference.items():
            if name.startswith(prefix):
                rows &= (outputs[name] == expected).reshape(len(rows), -1).all(axis=1)
        return rows

    is_same = same("prefill_experts/")
    worst, alike = 0.0, is_same
    for name in sorted(name for name in reference if "_experts/" not in name):
        if name.startswith("decode_"):
            # Each step goes on with what the steps before it wrote.
            alike = alike & same(name.replace("_logits", "_experts") + "/")
        else:
            alike = is_same
        expected = reference[name][alike]
        size = np.sqrt(np.square(expected).mean(axis=-1, keepdims=True))
        difference = np.abs(outputs[name][alike] - expected) / (1 + size)
        if difference.size:
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
    return {"difference": worst, "same_rows": float(is_same.mean())}


def is_alike(comparison: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether outputs count as those of the reference."""
    return (
        comparison["difference"] <= limits["difference"]
        and comparison["same_rows"] >= limits["same_rows"]
    )


def said(found: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """Returns the end of the sentence that refuses a comparison."""
    return (
        f" to {limits['difference']:g} and have the same experts in "
        f"{100 * limits['same_rows']:g} % of the rows, got {found['difference']:g} and "
        f"{100 * found['same_rows']:g} %."
    )


def check(directory: PathLike) -> dict[str, dict[str, float]]:
    """Checks hashes and reference outputs of an artifact.

    Returns:
      {model: {"difference", "same_rows", "tolerance"}}; see `compare`.

    Raises:
      ArtifactError: If a file differs from the manifest, or an output from the reference.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    artifact = Artifact(directory)
    results = {}
    for name in artifact.names:
        model = artifact.load(name)
        with np.load(artifact.directory / model.entry["reference"]) as archive:
            stored = dict(archive)
        inputs = {key: stored.pop(f"in/{key}") for key in INPUTS}
        reference = {key.removeprefix("out/"): array for key, array in stored.items()}
        where = "same_platform"
        if jax.default_backend() != manifest["versions"]["platform"]:
            where = "other_platform"
        limits = manifest["tolerance"][where]
        found = compare(run_reference(model, inputs), reference)
        results[name] = {**found, "tolerance": limits["difference"]}
        if not is_alike(found, limits):
            raise ArtifactError(
                f"Model {name} must reproduce its reference outputs{said(found, limits)}"
            )
    return results


def main() -> int:
    """Checks the artifact that this file lies in, or generates."""
    parser = argparse.ArgumentParser(description="Check an artifact, or continue a prompt.")
    parser.add_argument("--dir", default=Path(__file__).parent, help="default: where this file is")
    parser.add_argument("--model", help="name of the model that continues --ids")
    parser.add_argument("--ids", type=int, nargs="+", help="ids of the prompt, without bos_id")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    try:
        if options.ids:
            artifact = Artifact(options.dir)
            model = artifact.load(options.model or artifact.names[0])
            print(json.dumps(model.generate([options.ids], options.steps)[0]))
        else:
            print(json.dumps(check(options.dir)))
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
