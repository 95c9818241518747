"""Runs T5X's train, eval and infer as parsed gin files configure them.

What this adds to T5X: everything that can be wrong is compared before T5X starts, and a directory
that T5X trains in gets the three JSON files by which our own commands know a checkpoint.
"""

# T5X is on no package index, so the type checker may not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import gin
import jax
import numpy as np
import t5x
import tensorflow as tf
from absl import logging
from etils import epath
from t5x import eval as t5x_eval
from t5x import infer as t5x_infer
from t5x import train as t5x_train
from t5x import utils

from uncurl_jax import __version__
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.record import Record
from uncurl_jax.data.seqio_vocabulary import from_seqio_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import tasks
from uncurl_jax.t5x_adapter.model import SmoeDecoderModel

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "train": t5x_train.train,
    "eval": t5x_eval.evaluate,
    "infer": t5x_infer.infer,
}


def run(mode: str) -> dict[str, Any]:
    """Runs T5X.

    Args:
      mode: "train", "eval" or "infer"; the parsed gin files bind its function.

    Returns:
      A JSON-compatible summary: where the results are, and the scores if there are any.

    Raises:
      InputError: If the configuration does not fit the checkpoint, the task or the devices.
    """
    function = FUNCTIONS[mode]
    if "model" not in _bound(function):
        raise InputError(
            f"uncurl t5x {mode} needs a gin file that binds {mode}.{function.__name__}, got none: "
            "give --gin_file gin/t5x/pretrain.gin, finetune.gin, eval.gin or infer.gin."
        )
    values = gin.get_bindings(function)
    if not isinstance(values["model"], SmoeDecoderModel):
        raise InputError(
            "uncurl t5x runs models of this package, got MODEL = "
            f"{type(values['model']).__name__}: bind model.SmoeDecoderModel, or use t5x.main."
        )
    _check_datasets(values)
    # Host memory is JAX's business, accelerators are none of TensorFlow's.
    tf.config.experimental.set_visible_devices([], "GPU")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_not_orbax)
    runner = {"train": _train, "eval": _evaluate, "infer": _infer}[mode]
    return runner(gin.get_configurable(function), values)


def _bound(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return gin.get_bindings(function, resolve_references=False)
    except ValueError:  # No gin file names the function.
        return {}


def _is_not_orbax(record: Any) -> bool:
    """T5X says when it saves; Orbax says each step of it."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _train(train: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    model: SmoeDecoderModel = values["model"]
    directory = epath.Path(values["model_dir"])
    if not layout.is_remote(directory):
        directory = directory.resolve()
    config = values["checkpoint_cfg"]
    source = None if config.restore is None else config.restore.path
    if source is not None:
        _check_checkpoint(source, model)
    record = Record(model.config, _provenance(values, source), _vocabulary(model))
    is_new = record.check_directory(directory)
    # No process may look at the directory after another one has begun to fill it.
    utils.sync_global_devices("uncurl_jax:t5x:checked")
    if is_new and jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        record.write(directory)
    utils.sync_global_devices("uncurl_jax:t5x:ready")
    step, _ = train(**values | {"model_dir": os.fspath(directory)})
    return {
        "checkpoint": os.fspath(directory),
        "step": int(step),
        "metrics": _last_metrics(directory),
    }


def _evaluate(evaluate: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    source, out = values["restore_checkpoint_cfg"].path, epath.Path(values["output_dir"])
    _check_checkpoint(source, values["model"])
    evaluate(**values)
    return {"out": str(out), "checkpoint": source, "metrics": _last_metrics(out)}


def _infer(infer: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    source, out = values["restore_checkpoint_cfg"].path, epath.Path(values["output_dir"])
    _check_checkpoint(source, values["model"])
    done = sorted(out.glob(f"*-{values['mode']}.*.COMPLETED"))
    if done:
        raise InputError(
            f"INFER_OUTPUT_DIR must hold no results of this mode yet, got {done[0]}: choose "
            "another."
        )
    infer(**values)
    files = sorted(str(path) for path in out.glob(f"*-{values['mode']}.jsonl*"))
    return {"out": [name for name in files if not name.endswith(".COMPLETED")]}


def _check_datasets(values: dict[str, Any]) -> None:
    model, partitioner = values["model"], values["partitioner"]
    configs = [values.get("dataset_cfg")]
    configs += [values.get(f"{name}_dataset_cfg") for name in ("train", "train_eval", "infer_eval")]
    for config in configs:
        if config is None:
            continue
        tasks.check_fits(config.mixture_or_task_name, model.config.max_length)
        if config.batch_size % partitioner.data_mesh_size:
            raise InputError(
                f"BATCH_SIZE must be a multiple of data * expert partitions, got "
                f"{config.batch_size} on {partitioner.data_mesh_size}: choose a multiple of "
                f"{partitioner.data_mesh_size}."
            )


def _check_checkpoint(path: str, model: SmoeDecoderModel) -> None:
    checkpoint = layout.resolve(path)
    layout.check_architecture(checkpoint, model.config)
    stored, own = checkpoint.vocabulary(), _vocabulary(model)
    if stored["hash"] != own["hash"]:
        raise InputError(
            f"A task must use the checkpoint's vocabulary, got {own['name']} ({own['hash'][:12]}) "
            f"for {checkpoint} with {stored['name']} ({stored['hash'][:12]}): build the token "
            "cache with the checkpoint's vocabulary."
        )


def _vocabulary(model: SmoeDecoderModel) -> dict[str, Any]:
    return from_seqio_vocabulary(model.output_vocabulary).describe()


def _provenance(values: dict[str, Any], source: str | None) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "created_by": f"T5X {t5x.__version__} through uncurl_jax {__version__}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "t5x": t5x.__version__},
        "task": values["train_dataset_cfg"].mixture_or_task_name,
        "gin": gin.config_str(),
    }
    if source is not None:
        checkpoint = layout.resolve(source)
        provenance["source"] = {
            "path": str(checkpoint),
            "fingerprint": layout.fingerprint(checkpoint),
            "provenance": checkpoint.provenance(),
        }
    return provenance


def _last_metrics(directory: epath.Path) -> dict[str, Any]:
    """Returns what SeqIO's JSONLogger wrote last for each task."""
    suffix = "-metrics.jsonl"
    found = {}
    for path in sorted((directory / "inference_eval").glob(f"*{suffix}")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines:
            found[path.name.removesuffix(suffix)] = json.loads(lines[-1])
    return found
