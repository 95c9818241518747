"""`uncurl export --format saved_model`: the programs as signatures of a TensorFlow SavedModel.

TensorFlow runs the StableHLO of `programs` with its operation XlaCallModule, so loading needs
TensorFlow alone, and TensorFlow Serving can serve the directory. A request there holds no state;
hence a signature that generates whole answers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from uncurl_jax.artifacts import atomic_directory, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.export import runner, scores
from uncurl_jax.export.manifest import (
    ExportOptions,
    Prepared,
    common_fields,
    files_of,
    model_entry,
    prepare,
    shared_entry,
    summarize,
    write_reference,
    write_vocabulary,
)
from uncurl_jax.export.programs import PLATFORMS, Weights, make_functions
from uncurl_jax.export.reference import checkpoint_outputs, reference_inputs
from uncurl_jax.export.sources import Source, write_weights
from uncurl_jax.export.tensor_file import MemoryWriter

SAVED_MODEL = "1"  # TensorFlow Serving takes the directories of a model for its versions.
_RUN_FILE = "run.py"
# TensorFlow 2.21 reads versions up to 1.13.7, and later ones read earlier ones (StableHLO promises
# five years); JAX 0.10 writes 1.15.
_STABLEHLO_VERSION = "1.13.0"
_OUTPUTS = {
    "next_token": ("next_token", "logits"),
    "score": ("log_likelihood", "token_log_probabilities"),
    "generate": ("tokens",),
}


def export_saved_model(
    checkpoints: Mapping[str, layout.PathLike],
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """Writes OUT/1, a SavedModel of one or more models, with a manifest beside it.

    Signatures are `next_token`, `score` and `generate`, with the model's name and "_" in front if
    there are several models; `serving_default` is the first model's `next_token`.

    Args:
      checkpoints: {name of the model: checkpoint}.
      out: directory to make.
      options: of the export.
      max_new_tokens: that `generate` makes.

    Returns:
      A JSON-compatible summary, as `export_stablehlo`.

    Raises:
      InputError: As `export_stablehlo`, or if TensorFlow is not installed.
      RuntimeError: If TensorFlow does not reproduce the checkpoints.
    """
    options = options or ExportOptions()
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            "A SavedModel is written with TensorFlow, which is not installed: pip install "
            "tensorflow-cpu, or take --format stablehlo, which needs none."
        )
    prepared = prepare(checkpoints, out, options)
    longest = prepared.sources[0].config.max_length
    if not 1 <= max_new_tokens < longest:
        raise InputError(
            f"max_new_tokens must be at least 1 and below max_length={longest}, got "
            f"{max_new_tokens}."
        )
    with atomic_directory(out) as directory:
        manifest = _write(directory, prepared, options, max_new_tokens)
    return summarize(out, prepared.sources, manifest)


def _write(
    directory: Path, prepared: Prepared, options: ExportOptions, max_new_tokens: int
) -> dict[str, Any]:
    """Writes everything into a directory and tries it there; returns the manifest."""
    from uncurl_jax.export import saved_model_runner

    sources, vocabulary, caches = prepared
    quantization, progress = options.quantization, options.progress
    writer = MemoryWriter()
    weights = write_weights(sources, writer, quantization=quantization, progress=progress)
    arrays = {name: jnp.asarray(array) for name, array in writer.arrays.items()}
    entries: dict[str, Any] = {}
    programs: dict[str, dict[str, export.Exported]] = {}
    for source in sources:
        config = dataclasses.replace(source.config, num_experts=weights.pools, expert_map=None)
        functions = serving_functions(config, max_new_tokens, vocabulary.eos_id)
        own = {path: arrays[name] for path, name in weights.tensors[source.name].items()}
        programs[source.name] = export_serving(functions, own, config)
        prefix = f"{source.name}_" if len(sources) > 1 else ""
        entry = entries[source.name] = {
            **model_entry(source),
            **shared_entry(source, weights),
            "signatures": {kind: f"{prefix}{kind}" for kind in functions},
        }
        progress(f"programs of {source.name}")
        run = {kind: jax.jit(e.call) for kind, e in programs[source.name].items()}
        _add_results(source, entry, own, run, directory, vocabulary.size, quantization)
        if source.name in caches:
            cache = caches[source.name]
            model = runner.Model(source.name, entry, config.max_length, own, run)
            measure = functools.partial(scores.rank_score, model, cache)
            entry |= scores.described(source, cache, measure, options.evaluate)
    _save(directory / SAVED_MODEL, writer.arrays, entries, programs)
    progress("SavedModel")
    shutil.copyfile(Path(saved_model_runner.__file__), directory / _RUN_FILE)
    manifest = {
        "schema": runner.SCHEMA,
        "format": "saved_model",
        "saved_model": SAVED_MODEL,
        "models": entries,
        "vocabulary": write_vocabulary(vocabulary, directory),
        **common_fields(sources, quantization),
        "max_new_tokens": max_new_tokens,
        "saved_by_sharing_bytes": weights.num_shared_bytes,
        "files": files_of(directory),
    }
    write_json(directory / runner.MANIFEST, manifest)
    try:
        saved_model_runner.check(directory)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    return manifest


def serving_functions(
    config: ModelConfig, max_new_tokens: int, eos_id: int
) -> dict[str, Callable[..., dict[str, jax.Array]]]:
    """Returns what a server without state can offer, without what routers chose.

    Args:
      config: the model, its `num_experts` the lengths of the expert arrays.
      max_new_tokens: n of `generate`.
      eos_id: ends an answer; padding (0) stands behind it.
    """
    functions = make_functions(config)

    def score(weights: Weights, *inputs: jax.Array) -> dict[str, jax.Array]:
        result = functions["score"](weights, *inputs)
        return {name: result[name] for name in _OUTPUTS["score"]}

    def next_token(weights: Weights, inputs: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        logits = functions["prefill"](weights, inputs, lengths)["logits"]
        return {"next_token": logits.argmax(axis=-1).astype(jnp.int32), "logits": logits}

    def generate(weights: Weights, inputs: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        first = functions["prefill"](weights, inputs, lengths)

        def step(index: jax.Array, state: Any) -> Any:
            logits, cache, tokens, is_done = state
            token = jnp.where(is_done, 0, logits.argmax(axis=-1).astype(jnp.int32))
            tokens = tokens.at[:, index].set(token)
            positions = lengths + index
            is_done |= (token == eos_id) | (positions >= config.max_length)
            read = functions["decode"](weights, cache, token, positions, ~is_done)
            return read["logits"], read["cache"], tokens, is_done

        tokens = jnp.zeros((inputs.shape[0], max_new_tokens), jnp.int32)
        begin = (first["logits"], first["cache"], tokens, jnp.zeros((inputs.shape[0],), bool))
        return {"tokens": jax.lax.fori_loop(0, max_new_tokens, step, begin)[2]}

    return {"next_token": next_token, "score": score, "generate": generate}


def export_serving(
    functions: Mapping[str, Callable[..., Any]], weights: Weights, config: ModelConfig
) -> dict[str, export.Exported]:
    """Exports them with symbolic batch and lengths."""
    shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in weights.items()}
    limits = [f"l <= {config.max_length}"]
    exported = {}
    for kind, function in functions.items():
        b, length, t = export.symbolic_shape("b, l, t", constraints=limits)
        arguments = [((b, length), jnp.int32), ((b,), jnp.int32)]
        if kind == "score":
            arguments += [((b, t), jnp.int32), ((b, t), jnp.int32), ((b, t), jnp.bool_)]
        exported[kind] = export.export(jax.jit(function), platforms=PLATFORMS)(
            shapes, *(jax.ShapeDtypeStruct(*argument) for argument in arguments)
        )
    return exported


def _add_results(
    source: Source,
    entry: dict[str, Any],
    weights: Weights,
    run: Mapping[str, Callable[..., Any]],
    directory: Path,
    vocabulary_size: int,
    quantization: str | None,
) -> None:
    """Runs a model's programs on reference inputs, by JAX, and writes both."""
    inputs = reference_inputs(source.config, vocabulary_size)
    expected = checkpoint_outputs(source, inputs)
    prompt = (inputs["inputs"], inputs["lengths"])
    scored = (*prompt, inputs["targets"], inputs["target_positions"], inputs["target_mask"])
    outputs = {
        "prefill_logits": run["next_token"](weights, *prompt)["logits"],
        "token_log_probabilities": run["score"](weights, *scored)["token_log_probabilities"],
    }
    outputs = {name: np.asarray(array) for name, array in outputs.items()}
    known = {name: expected[name] for name in outputs}
    entry["against_checkpoint"] = runner.compare(outputs, known)
    kept = known if quantization is None else outputs
    generated = np.asarray(run["generate"](weights, *prompt)["tokens"])
    write_reference(directory / entry["reference"], inputs, {**kept, "generated": generated})


def _save(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    entries: Mapping[str, Any],
    programs: Mapping[str, Mapping[str, export.Exported]],
) -> None:
    """Writes the SavedModel: a variable for each array, a function for each signature."""
    tf: Any = importlib.import_module("tensorflow")
    module = tf.Module()
    module.arrays = {
        name: tf.Variable(array, trainable=False, name=name.replace("/", ".").replace(":", "."))
        for name, array in arrays.items()
    }
    signatures: dict[str, Any] = {}
    for model, entry in entries.items():
        own = [module.arrays[entry["weights"][p]] for p in sorted(entry["weights"])]
        for kind, exported in programs[model].items():
            signature = _signature(kind, exported, own)
            signatures[entry["signatures"][kind]] = signature
            if kind == "next_token":
                signatures.setdefault("serving_default", signature)
    tf.saved_model.save(module, str(path), signatures=signatures)


def _signature(kind: str, exported: export.Exported, weights: Sequence[Any]) -> Any:
    """Makes a TensorFlow function of an exported program."""
    tf: Any = importlib.import_module("tensorflow")
    xla: Any = importlib.import_module("tensorflow.compiler.tf2xla.python.xla")
    names = ("inputs", "lengths", "targets", "target_positions", "target_mask")
    own = exported.in_avals[len(weights) :]

    def dims(shape: Any) -> list[int | None]:
        return [size if isinstance(size, int) else None for size in shape]

    specs = [
        tf.TensorSpec(dims(aval.shape), tf.dtypes.as_dtype(aval.dtype), name=name)
        for aval, name in zip(own, names, strict=False)
    ]

    module = _portable(exported)

    def call(*arguments: Any) -> dict[str, Any]:
        given = [*weights, *arguments]
        results = xla.call_module(
            [tf.convert_to_tensor(given[index]) for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=module,
            Tout=[tf.dtypes.as_dtype(aval.dtype) for aval in exported.out_avals],
            Sout=[tf.TensorShape(dims(aval.shape)) for aval in exported.out_avals],
            platforms=[platform.upper() for platform in exported.platforms],
        )
        # JAX flattens dicts by their sorted keys.
        return dict(zip(sorted(_OUTPUTS[kind]), results, strict=True))

    return tf.function(call, input_signature=specs, autograph=False).get_concrete_function()


def _portable(exported: export.Exported) -> bytes:
    """Writes a program's StableHLO again in the version that TensorFlow reads."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        return stablehlo.serialize_portable_artifact(module, _STABLEHLO_VERSION)
