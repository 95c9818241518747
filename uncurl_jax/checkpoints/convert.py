"""Imports and exports: the same arrays in another format, a few at a time.

Memory stays near a few experts, or the largest other array; what was killed goes on where it
stopped.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from uncurl_jax.artifacts import sha256_of_json
from uncurl_jax.checkpoints import flaxformer, layout, pruned
from uncurl_jax.checkpoints.accounting import Accounts, Piece, account_copy
from uncurl_jax.checkpoints.huggingface import checkpoint as huggingface
from uncurl_jax.checkpoints.pruned import Progress, new_output, stage
from uncurl_jax.checkpoints.replay import Replayed, Seconds
from uncurl_jax.checkpoints.sinks import (
    NewCheckpoint,
    build,
    make_sink,
    open_result,
    peak_resident_bytes,
    recorded_hashes,
)
from uncurl_jax.checkpoints.state_writer import num_bytes, num_elements
from uncurl_jax.checkpoints.work_directory import open_work_directory
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


class _Request(NamedTuple):
    """What is to be made of what."""

    reader: layout.ArrayReader
    name: str  # "import" or "export"
    file_format: str
    dtype: str | None = None
    max_shard_bytes: int | None = None
    vocabulary: dict[str, Any] | None = None


def import_checkpoint(
    directory: layout.PathLike,
    out: layout.PathLike,
    *,
    max_length: int | None = None,
    vocabulary: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a checkpoint of this package from a Hugging Face directory.

    The bits of all numbers stay as they are. config.json and the tokenizer go along.

    Args:
      directory: holds config.json and safetensors files; with or without "hf:" before it.
      out: directory to make; local or gs://.
      max_length: the longest sequence, which the key-value cache has room for; None is the model's
        own max_position_embeddings.
      vocabulary: spec of the tokenizer, for directories without tokenizer.json alone.
      progress: called with ("import", done, total), which count experts and batches of arrays.

    Returns:
      A JSON-compatible summary: "out", "source", "model_type", "fingerprint", "num_experts" (per
      layer), "parameters", "bytes" {"before", "after"}, "pieces" {"total", "resumed"}, "seconds",
      "parts" (see `replay.Seconds`) and "peak_resident_bytes".

    Raises:
      InputError: If the directory is damaged or of an unknown family, config.json and weights
        disagree, there is no tokenizer, or `out` exists; no new file is left then.
    """
    checkpoint = huggingface.resolve(directory, max_length)
    record = _vocabulary(checkpoint, vocabulary)
    reader = huggingface.HuggingFaceReader(checkpoint)
    request = _Request(reader, "import", "uncurl", vocabulary=record)
    return {"model_type": checkpoint.family.model_type, **_convert(request, out, progress)}


def import_t5x(
    directory: layout.PathLike,
    out: layout.PathLike,
    config: ModelConfig,
    vocabulary: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a checkpoint of this package from an encoder-decoder that T5X trained with Flaxformer.

    The bits of all numbers stay as they are.

    Args:
      directory: of `checkpoint_<step>` directories in either of T5X's layouts, or one of these.
      out: directory to make; local or gs://; gets step 0.
      config: the architecture, which T5X's own files say in gin.
      vocabulary: {"name", "spec", "size", "hash"} of the tokeniser.
      progress: called with ("import", done, total), which count experts and batches of arrays.

    Returns:
      As `import_checkpoint`, with "step" in place of "model_type".

    Raises:
      InputError: If there is no such step, it does not hold the parameters of the model, or `out`
        exists; no new file is left then.
    """
    checkpoint = flaxformer.resolve(directory, config, vocabulary)
    request = _Request(flaxformer.FlaxformerReader(checkpoint), "import", "uncurl")
    return {"step": checkpoint.step, **_convert(request, out, progress)}


def export_checkpoint(
    checkpoint: layout.PathLike | layout.CheckpointPath,
    out: layout.PathLike,
    *,
    file_format: str = "hf",
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a Hugging Face directory, which transformers loads without code, from a checkpoint.

    Args:
      checkpoint: as for `layout.resolve`; of our own models those that a family of transformers
        expresses exactly.
      out: directory to make.
      file_format: "hf".
      dtype: what numbers are stored as, "bfloat16", "float16" or "float32"; None leaves their bits
        as they are (training leaves float32).
      max_shard_bytes: the largest file; None is 5 GB.
      progress: called with ("export", done, total), which count experts and batches of arrays.

    Returns:
      As `import_checkpoint`.

    Raises:
      InputError: If config.json cannot express the model (unequal counts, router "remap"), an
        option is unknown, or `out` exists; no new file is left then.
    """
    if file_format != "hf":
        raise InputError(f'--format must be "hf", got {file_format!r}: choose it.')
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}: choose one.")
    reader = layout.open_reader(checkpoint)
    summary = _convert(_Request(reader, "export", "hf", dtype, max_shard_bytes), out, progress)
    model_type = huggingface.resolve(summary["out"]).family.model_type
    return {"model_type": model_type, **summary}


def _vocabulary(checkpoint: huggingface.HuggingFaceCheckpoint, given: str | None) -> dict[str, Any]:
    has_tokenizer = (checkpoint.directory / "tokenizer.json").exists()
    if has_tokenizer == (given is not None):
        raise InputError(
            f"An import needs one tokenizer, got {'two' if given else 'none'}, with tokenizer.json "
            f"{'in' if has_tokenizer else 'missing from'} {checkpoint.directory}: "
            f"{'leave out' if given else 'give'} --vocabulary."
        )
    if given is None:
        return checkpoint.vocabulary()
    vocabulary = load_vocabulary(given)
    vocab_size = checkpoint.model_config().vocab_size
    if vocabulary.size > vocab_size:
        raise InputError(
            f"A tokenizer must belong to its model, got {vocabulary.size} ids in {given} and "
            f"vocab_size {vocab_size} in {checkpoint.directory}: check --vocabulary."
        )
    return vocabulary.describe()


def _convert(request: _Request, out: layout.PathLike, progress: Progress | None) -> dict[str, Any]:
    start = time.monotonic()
    out = new_output(out)
    reader = request.reader
    config = reader.checkpoint.model_config()
    layout.check_architecture(reader, config)
    accounts = account_copy(reader, DTYPES[request.dtype] if request.dtype else None)
    fingerprint = layout.fingerprint(reader)
    provenance = pruned.source_provenance(request.name, reader, fingerprint)
    new = NewCheckpoint(
        reader.checkpoint,
        config,
        accounts.targets,
        {**provenance, "dtype": request.dtype, "versions": pruned.versions()},
        request.vocabulary,
    )
    sink = make_sink(new, request.file_format, request.max_shard_bytes)
    seconds = Seconds()
    decided = {
        "format": request.file_format,
        "dtype": request.dtype,
        "shard_bytes": request.max_shard_bytes,
        "model_config": config.to_dict(),
    }
    header = pruned.journal_header(reader, fingerprint, **decided)
    key = sha256_of_json([str(reader.checkpoint), decided])
    with open_work_directory(out, header, key=key, work_name=request.name) as work:
        resumed = len(work.done)
        make = functools.partial(_copies, reader, accounts, seconds)
        build(sink, work, accounts, make, seconds=seconds, report=stage(progress, request.name))
        hashes = pruned.hashes_record(None, recorded_hashes(accounts.pieces, work))
        sink.finish(work.result, hashes)
    result = open_result(out, request.file_format, config)
    before, after = reader.parameters(), result.parameters()
    return {
        "out": os.fspath(out),
        "source": str(reader.checkpoint),
        "fingerprint": layout.fingerprint(result),
        "num_experts": list(config.num_experts),
        "parameters": num_elements(after),
        "bytes": {"before": num_bytes(before), "after": num_bytes(after)},
        "pieces": {"total": len(accounts.pieces), "resumed": resumed},
        "seconds": round(time.monotonic() - start, 3),
        "parts": {name: round(value, 3) for name, value in vars(seconds).items()},
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _copies(
    reader: layout.ArrayReader, accounts: Accounts, seconds: Seconds, pieces: Sequence[Piece]
) -> Generator[Replayed]:
    """Reads pieces, in the dtypes that they are to have."""
    arrays = reader.stream((key, piece.cluster) for piece in pieces for key in piece.keys)
    for piece in pieces:
        made = {}
        for key in piece.keys:
            with seconds.add("read"):
                array = next(arrays)
            dtype = accounts.targets[key].dtype
            # Equal dtypes alone, because a cast may change the bits of a NaN.
            made[key] = array if array.dtype == dtype else _cast(key, array, dtype)
        yield Replayed(piece, made, ())


def _cast(key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds to the nearest number; InputError if one is too large for the dtype."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.isfinite(array).all() and not np.isfinite(result).all():
        raise InputError(
            f"Numbers must fit the dtype they are stored in, got values of {key} above the largest "
            f"{dtype}: choose --dtype bfloat16 or leave it out."
        )
    return result
