"""Makes checkpoints that T5X wrote by itself readable by this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from uncurl_jax import __version__
from uncurl_jax.artifacts import atomic_directory
from uncurl_jax.checkpoints import layout, legacy_t5x
from uncurl_jax.checkpoints.parameters import differences, expected_parameters, listed
from uncurl_jax.checkpoints.pruned import new_output
from uncurl_jax.checkpoints.record import Record
from uncurl_jax.checkpoints.state_writer import StateWriter, create_state
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_STEP_KEY = "state/step"
_REMEDY = (
    "give the model configuration it was trained with; names and shapes are those of this "
    "package's decoder, one entry per layer (no scanned layers)"
)


class Adopted(NamedTuple):
    """A checkpoint directory that this package reads.

    Attributes:
      directory: with the JSON files and the steps.
      steps: the steps in it.
    """

    directory: epath.Path
    steps: list[int]


def adopt_checkpoint(
    directory: layout.PathLike,
    model_config: ModelConfig,
    vocabulary: Mapping[str, Any],
    *,
    out: layout.PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> Adopted:
    """Adds what this package needs beside the steps that T5X wrote.

    Steps in T5X's present layout (Orbax) stay as they are: model_config.json, provenance.json and
    vocabulary.json are added to their directory. Steps in its older layout are copied, parameters
    alone, to a new directory in the present one, an array at a time.

    Args:
      directory: holds `checkpoint_<step>` directories; or one of these, to take it alone.
      model_config: what the parameters are of; each name and shape is compared.
      vocabulary: {"name", "spec", "size", "hash"} of the tokeniser.
      out: new directory for steps in the older layout; None if there are none.
      progress: called with a line for each step that is copied.

    Raises:
      InputError: If there is no step, one does not hold the parameters of the model, the directory
        is known already, or `out` is missing or not wanted.
    """
    place = epath.Path(directory)
    if not layout.is_remote(place):
        place = epath.Path(os.path.abspath(place))
    if not place.is_dir():
        raise InputError(
            f"A checkpoint must be an existing directory, got {place}: check the path."
        )
    legacy = _legacy_steps(place)
    if vocabulary["size"] > model_config.vocab_size:
        raise InputError(
            "model.vocab_size must be at least the vocabulary's size, got "
            f"{model_config.vocab_size} for {vocabulary['name']} with {vocabulary['size']}: set "
            "ModelConfig.vocab_size."
        )
    provenance = {
        "created_by": f"T5X, adopted by uncurl_jax {__version__}",
        "source": {"path": str(place), "layout": "t5x" if legacy else "orbax"},
    }
    record = Record(model_config, provenance, vocabulary)
    if legacy:
        if out is None:
            raise InputError(
                f"Steps in T5X's older layout are copied to a new directory, got {place} without "
                "--out: give one."
            )
        if layout.is_remote(out):
            raise InputError(
                f"Steps in T5X's older layout are copied to a file system, got --out {out}: give a "
                "path, and copy the result."
            )
        if layout.finished_steps(place):
            raise InputError(
                f"Steps of one layout are adopted together, got both of T5X's in {place}: give one "
                "checkpoint_<step> of it."
            )
        return _copy(legacy, record, out, progress)
    if out is not None:
        raise InputError(
            f"--out is for steps in T5X's older layout, got {place} without any: leave it out; "
            "three JSON files are added there."
        )
    return _add_files(place, record)


def _legacy_steps(place: epath.Path) -> dict[int, epath.Path]:
    candidates = [place, *place.iterdir()]
    numbered = {layout.step_of(entry): entry for entry in candidates if entry.is_dir()}
    return {
        step: entry
        for step, entry in sorted(numbered.items(), key=lambda item: item[0] or 0)
        if step is not None and legacy_t5x.is_legacy_step(entry)
    }


def _add_files(place: epath.Path, record: Record) -> Adopted:
    parent = place if layout.step_of(place) is None else place.parent
    steps = layout.finished_steps(parent)
    if not steps:
        raise InputError(
            f"A directory of T5X checkpoints holds checkpoint_<step> directories that were saved "
            f"to the end, got {place} with none: give the run's MODEL_DIR."
        )
    if (parent / layout.MODEL_CONFIG_FILE).exists():
        raise InputError(
            f"A checkpoint is adopted once, got {parent} with {layout.MODEL_CONFIG_FILE}: use it "
            "as it is."
        )
    for step in steps:
        reader = layout.StateReader(layout.CheckpointPath(parent, step))
        layout.check_architecture(reader, record.model_config)
    record.write(parent)
    return Adopted(parent, steps)


def _copy(
    steps: Mapping[int, epath.Path],
    record: Record,
    out: layout.PathLike,
    progress: Callable[[str], None] | None,
) -> Adopted:
    result = new_output(out)
    expected = expected_parameters(record.model_config)
    readers = {}
    for step, source in steps.items():
        reader = readers[step] = legacy_t5x.LegacyReader(source)
        stored = {name: entry.shape for name, entry in reader.metadata.items()}
        problems = differences(stored, expected)
        if problems:
            raise InputError(
                f"A checkpoint must hold the parameters of its architecture, got {source} with "
                f"{listed(problems)}: {_REMEDY}."
            )
    with atomic_directory(os.fspath(result)) as partial:
        for step, reader in readers.items():
            if progress is not None:
                progress(f"copying step {step}, {len(reader.metadata)} arrays")
            _write_step(epath.Path(partial) / f"{layout.CHECKPOINT_PREFIX}_{step}", step, reader)
        record.write(epath.Path(partial))
    return Adopted(result, list(steps))


def _write_step(step_directory: epath.Path, step: int, reader: legacy_t5x.LegacyReader) -> None:
    targets = {f"{layout.TARGET}/{name}": entry for name, entry in reader.metadata.items()}
    targets[_STEP_KEY] = layout.ArrayMetadata((), np.dtype(np.int32))
    create_state(step_directory, targets)
    writer = StateWriter(step_directory)
    writer.write({_STEP_KEY: np.asarray(step, np.int32)}).result()
    for name in reader.metadata:
        writer.write({f"{layout.TARGET}/{name}": reader.read(name)}).result()
