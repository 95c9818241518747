"""The training loop: one stage from a token cache to a checkpoint, resumable, with metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from uncurl_jax import __version__
from uncurl_jax.artifacts import (
    append_json_line,
    atomic_file,
    read_json,
    read_json_lines,
    write_json,
)
from uncurl_jax.checkpoints import companions, layout, store
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch, TokenCache, bucket_length
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import count_parameters, init_params
from uncurl_jax.partitioning import (
    check_batch_size,
    check_expert_axes,
    make_mesh,
    place_batch,
)
from uncurl_jax.training import (
    distillation,
    early_stopping,
    preemption,
    throughput,
    train_step,
)

_RUN_FILE = "train_config.json"
_SUMMARY_FILE = "train_summary.json"
_METRICS_FILE = "metrics.jsonl"
_BEST = "best"
# Metrics without which a run does not go on.
_FINITE = ("loss", "gradient_norm")
# Settings of TrainConfig that say where a run is computed, not what.
_TOPOLOGY = frozenset({"expert_partitions", "model_partitions", "expert_axes"})


class TrainResult(NamedTuple):
    """What a finished stage leaves.

    Attributes:
      checkpoint: directory of the checkpoint: with early stopping best/checkpoint_<step> in it.
      step: the last step of this call.
      metrics: the last metrics written.
      seconds: wall time of this call.
      tokens: real tokens trained on, by the whole stage.
    """

    checkpoint: Path
    step: int
    metrics: dict[str, float]
    seconds: float
    tokens: int


class _Run(NamedTuple):
    """The stage after its inputs were checked."""

    config: TrainConfig
    model: ModelConfig
    cache: TokenCache
    length: int
    mesh: Mesh | None
    initial: layout.CheckpointPath | None
    teacher: _GivenTeacher | None
    validation: early_stopping.Validation | None
    record: dict[str, Any]
    out: Path


class _GivenTeacher(NamedTuple):
    """A teacher after it was checked."""

    checkpoint: layout.CheckpointPath
    spec: distillation.Teacher
    record: dict[str, str]


def is_finished(out: str | os.PathLike[str]) -> bool:
    """Whether a stage in this directory has run to its end."""
    return (Path(out) / _SUMMARY_FILE).exists()


def train(
    config: TrainConfig,
    *,
    cache: str | os.PathLike[str],
    out: str | os.PathLike[str],
    initial_checkpoint: str | os.PathLike[str] | None = None,
    teacher: str | os.PathLike[str] | None = None,
    validation: early_stopping.Validation | None = None,
    stop_after_step: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains one stage: pretraining, router-only warm-up or fine-tuning.

    An unfinished stage in `out` with the same configuration and inputs goes on from its latest
    checkpoint and gives the losses that an uninterrupted run gives: bit by bit on the same devices
    and processes, and to rounding (sums in another order) on others. Number of devices, number of
    processes, `expert_partitions`, `model_partitions` and `expert_axes` may all change. One thing
    then changes with them: a capacity counts for the tokens of one group, of which there is one for
    each device that holds tokens (data * expert partitions). So beyond rounding the losses agree if
    the model is dropless (`capacity_factor=None`) or no token is dropped on either topology
    (`fraction_tokens_left_behind` is 0); otherwise other tokens are dropped from there on.

    On SIGTERM the current step is finished, its metrics are written and a checkpoint is saved
    whatever `save_every_steps` says; see `preemption`, also for several processes.

    Args:
      config: what to do; `config.model` must be set unless there is an initial checkpoint.
      cache: token cache of the training split.
      out: checkpoint directory, on a file system that all processes share, with
        train_config.json, metrics.jsonl, tensorboard/ and, once finished, train_summary.json
        beside the checkpoints.
      initial_checkpoint: parameters to begin with; the optimizer begins fresh.
      validation: what `config.early_stopping` scores; with it the best checkpoint lies in best/
        of `out`, and `early_stopping.result_of(out)` names it.
      teacher: checkpoint that `config.distillation` learns from, usually the unpruned one.
      stop_after_step: stop early after a checkpoint at this step, as a preemption would.
      quiet: no progress bar.

    Returns:
      The result, of the part that ran.

    Raises:
      InputError: If the inputs do not fit together, or `out` holds something else.
      RuntimeError: If the loss stops being finite.
      preemption.Preempted: After a SIGTERM; a SystemExit with status 143.
    """
    if layout.is_remote(out):
        raise InputError(
            f"A training run appends to files in its output, so that must be on a file system that "
            f"all processes share, got {out}: mount the bucket and give its path."
        )
    run = _check(config, Path(cache), Path(out), initial_checkpoint, teacher, validation)
    is_first_process = jax.process_index() == 0
    checkpoints = store.CheckpointStore(
        run.out,
        model_config=run.model,
        provenance=run.record["provenance"],
        vocabulary=run.record["vocabulary"],
        max_to_keep=config.max_to_keep,
    )
    with preemption.Watch() as watch, checkpoints:
        if is_first_process:
            _carry(run, run.out)
            write_json(run.out / _RUN_FILE, run.record)
        state = _first_state(run, checkpoints.latest_step())
        with _early_stopping(run, int(state.step)) as stopping:
            result = _loop(run, state, checkpoints, watch, stopping, stop_after_step, quiet)
        is_over = result.step == config.num_steps or (stopping is not None and stopping.is_over)
    best = None if stopping is None else stopping.best
    if best is not None and is_over:
        result = result._replace(checkpoint=run.out / _BEST / f"checkpoint_{best[0]}")
    if is_first_process and is_over:
        summary = {
            "checkpoint": f"checkpoint_{result.step}"
            if best is None
            else result.checkpoint.relative_to(run.out).as_posix(),
            **({} if best is None else {"best": {"step": best[0], "score": best[1]}}),
            "step": result.step,
            "tokens": result.tokens,
            "seconds_of_last_call": result.seconds,
            "metrics": result.metrics,
            "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        }
        write_json(run.out / _SUMMARY_FILE, summary)
    return result


@contextlib.contextmanager
def _early_stopping(run: _Run, begin: int) -> Iterator[early_stopping.EarlyStopping | None]:
    config = run.config.early_stopping
    if config is None or run.validation is None:
        yield None
        return
    if jax.process_index() == 0:
        early_stopping.remove_later(run.out / _BEST, begin)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("uncurl_jax early stopping")
    with store.CheckpointStore(
        run.out / _BEST,
        model_config=run.model,
        provenance=run.record["provenance"],
        vocabulary=run.record["vocabulary"],
        max_to_keep=2,
    ) as checkpoints:
        if jax.process_index() == 0:
            _carry(run, run.out / _BEST)
        lines = _lines_until(run.out / _METRICS_FILE, begin)
        yield early_stopping.EarlyStopping(config, run.validation, checkpoints, lines)


def _carry(run: _Run, directory: Path) -> None:
    """Lets what an imported checkpoint came with follow it."""
    if run.initial is not None:
        companions.carry(run.initial, directory)


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Metrics up to a step; what an interrupted run wrote beyond it will be written again."""
    lines = read_json_lines(path) if path.exists() else []
    return [line for line in lines if line["step"] <= step]


def _check(
    config: TrainConfig,
    cache_path: Path,
    out: Path,
    initial: str | os.PathLike[str] | None,
    teacher_path: str | os.PathLike[str] | None,
    validation: early_stopping.Validation | None,
) -> _Run:
    """Checks everything that can be wrong before any work, and writes nothing."""
    cache = TokenCache.open(cache_path)
    initial_path = None
    model = config.model
    provenance: dict[str, Any] = {
        "created_by": f"uncurl_jax {__version__}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "token_cache": {"task": cache.task, "hash": cache.hash},
    }
    if initial is not None:
        initial_path = layout.resolve(initial)
        model = initial_path.model_config()
        if config.model is not None and config.model != model:
            raise InputError(
                f"config.model must be that of the initial checkpoint, got another than "
                f"{initial_path}: leave config.model out, or train from scratch."
            )
        cache.check_vocabulary(initial_path.vocabulary()["hash"])
        provenance["source"] = {
            "path": str(initial_path),
            "fingerprint": layout.fingerprint(initial_path),
            "provenance": initial_path.provenance(),
        }
    if model is None:
        raise InputError(
            "A stage needs an architecture, got neither config.model nor a checkpoint: bind "
            "TrainConfig.model or pass --checkpoint."
        )
    if config.trainable == "router" and not model.moe_layers:
        raise InputError(
            'trainable="router" needs a model with experts, got a dense one: use trainable="all".'
        )
    vocabulary = cache.manifest["vocabulary"]
    if vocabulary["size"] > model.vocab_size:
        raise InputError(
            f"model.vocab_size must be at least the vocabulary's size, got {model.vocab_size} for "
            f"{vocabulary['name']} with {vocabulary['size']}: set ModelConfig.vocab_size."
        )
    if model.has_encoder:
        cache.check_prompts()
    length = config.length or min(bucket_length(cache.max_row_length), model.max_length)
    if not cache.max_row_length <= length <= model.max_length:
        raise InputError(
            f"Rows of up to {cache.max_row_length} tokens must fit length={length} and "
            f"the model's max_length={model.max_length}, got cache {cache_path}: build the cache "
            "with a smaller --max_length or raise TrainConfig.length."
        )
    mesh = make_mesh(
        expert_partitions=config.expert_partitions, model_partitions=config.model_partitions
    )
    mesh = mesh if mesh.size > 1 else None
    check_batch_size(config.batch_size, mesh)
    check_expert_axes(config.expert_axes, model.num_layers)
    if (config.early_stopping is None) != (validation is None):
        raise InputError(
            "TrainConfig.early_stopping needs validation rows and these need it, got one of them: "
            "give --validation with it, or neither."
        )
    teacher = _check_teacher(config, teacher_path, model, initial_path, cache, length)
    if teacher is not None:
        provenance["teacher"] = teacher.record
    # Checks its arguments at once; the batches themselves are made later.
    _train_batches(config, cache, length, start_step=0)
    # The configuration as given; the model is recorded apart because it may come from a checkpoint.
    settings = dataclasses.asdict(dataclasses.replace(config, model=None))
    record = {
        "train_config": settings,
        "model_config": model.to_dict(),
        "length": length,
        "vocabulary": vocabulary,
        "provenance": provenance,
        **({} if teacher is None else {"teacher": teacher.record}),
        **({} if validation is None else {"validation": validation.record}),
    }
    record = json.loads(json.dumps(record))
    if is_finished(out):
        raise InputError(
            f"An output must not exist yet, got a finished run in {out}: choose another --out."
        )
    if (out / _RUN_FILE).exists():
        if _what_is_computed(read_json(out / _RUN_FILE)) != _what_is_computed(record):
            raise InputError(
                f"An unfinished run goes on with the configuration it began with, got another than "
                f"{out / _RUN_FILE}: restore that configuration or choose another --out."
            )
    elif (out / layout.PROVENANCE_FILE).exists() and (
        read_json(out / layout.PROVENANCE_FILE) != record["provenance"]
    ):
        # A run that was killed before it wrote its configuration has left its own provenance.
        raise InputError(
            f"An output must be new or an unfinished run, got {out} which holds a checkpoint of "
            "something else: choose another --out."
        )
    return _Run(config, model, cache, length, mesh, initial_path, teacher, validation, record, out)


def _what_is_computed(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's record that a run has to keep to."""
    settings = record.get("train_config", {})
    settings = {name: value for name, value in settings.items() if name not in _TOPOLOGY}
    return {**record, "train_config": settings}


def _check_teacher(
    config: TrainConfig,
    path: str | os.PathLike[str] | None,
    model: ModelConfig,
    initial: layout.CheckpointPath | None,
    cache: TokenCache,
    length: int,
) -> _GivenTeacher | None:
    if (config.distillation is None) != (path is None):
        given, missing = "a teacher", "config.distillation"
        if path is None:
            given, missing = missing, given
        raise InputError(
            f"Distillation needs a teacher and TrainConfig.distillation, got {given} without "
            f"{missing}: give --teacher with gin/runs/distill.gin, or neither."
        )
    if config.distillation is None or path is None:
        return None
    checkpoint = layout.resolve(path)
    fingerprint = layout.fingerprint(checkpoint)
    spec = distillation.check_teacher(
        checkpoint,
        fingerprint,
        config.distillation,
        model=model,
        initial=initial,
        cache=cache,
        length=length,
    )
    record = {"path": str(checkpoint), "fingerprint": fingerprint}
    return _GivenTeacher(checkpoint, spec, record)


def _train_batches(
    config: TrainConfig, cache: TokenCache, length: int, *, start_step: int
) -> Iterator[Batch]:
    """This process's part of every batch from `start_step` on."""
    return cache.train_batches(
        config.batch_size,
        length=length,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _first_state(run: _Run, latest_step: int | None) -> train_step.TrainState:
    """Returns the state to begin with: resumed, from the initial checkpoint, or fresh."""
    config, mesh = run.config, run.mesh
    if latest_step is not None and not config.keep_optimizer_state and _is_last(run, latest_step):
        # Killed between its last checkpoint, which has no optimizer state, and its summary.
        params = load_model(run.out, mesh, config.expert_axes).params
        return train_step.new_state(params, config)._replace(
            step=train_step.step_counter(latest_step, params)
        )
    if latest_step is not None:
        params, opt_state = train_step.abstract_state(run.model, config, mesh)
        restored = store.restore(
            run.out / f"checkpoint_{latest_step}",
            abstract_params=params,
            abstract_param_states=train_step.state_dict(opt_state),
        )
        values = train_step.from_state_dict(opt_state, restored.param_states)
        counter = train_step.step_counter(restored.step, restored.params)
        state = train_step.TrainState(counter, restored.params, values)
        return jax.tree.map(jnp.asarray, state) if mesh is None else state
    if run.initial is not None:
        params = load_model(run.initial, mesh, config.expert_axes).params
    else:
        params = init_params(run.model, config.seed, mesh, config.expert_axes)
    return train_step.new_state(params, config)


def _is_last(run: _Run, step: int) -> bool:
    """Whether a run ended at a step: its last one, or where early stopping ended it."""
    if step == run.config.num_steps or run.config.early_stopping is None:
        return step == run.config.num_steps
    lines = _lines_until(run.out / _METRICS_FILE, step)
    return early_stopping.is_over(lines, run.config.early_stopping.patience)


def _loop(
    run: _Run,
    state: train_step.TrainState,
    checkpoints: store.CheckpointStore,
    watch: preemption.Watch,
    stopping: early_stopping.EarlyStopping | None,
    stop_after_step: int | None,
    quiet: bool,
) -> TrainResult:
    config = run.config
    begin = int(state.step)
    end = max(begin, min(config.num_steps, stop_after_step or config.num_steps))
    log = _MetricsLog(run, begin, quiet)
    step_function = train_step.make_train_step(
        run.model,
        config,
        run.mesh,
        target_length=run.cache.target_length,
        teacher=None if run.teacher is None else run.teacher.spec,
    )
    taught = ()
    if run.teacher is not None:
        teacher = load_model(run.teacher.checkpoint, run.mesh, config.expert_axes)
        taught = (teacher.params,)
    batches = _train_batches(config, run.cache, run.length, start_step=begin)
    every = config.save_every_steps
    step = begin
    try:
        is_stopping = watch.is_due()
        while step < end and not is_stopping:
            if stopping is not None and stopping.is_over:
                end = step
                break
            batch = place_batch(next(batches), run.mesh)
            state, metrics = step_function(state, batch, config.seed, *taught)
            step += 1
            is_stopping = watch.is_due()
            is_saved = step == end or is_stopping or bool(every and step % every == 0)
            # What is saved was seen to be finite, and a resumed run finds a line for its step.
            is_scored = stopping is not None and stopping.is_due(step, config.num_steps)
            is_due = is_saved or is_scored or step % config.log_every_steps == 0
            scores = {}
            # A model that is not finite is not scored: the log says so, with the remedy.
            if stopping is not None and is_scored and _is_finite(metrics):
                scores[early_stopping.SCORE] = stopping.score(step, _model_of(run, state, step))
                is_saved = is_saved or stopping.is_over
            log.add(step, metrics, scores, is_due=is_due)
            if is_saved:
                is_last = step == config.num_steps or (stopping is not None and stopping.is_over)
                has_state = config.keep_optimizer_state or not is_last
                opt_state = train_step.state_dict(state.opt_state) if has_state else None
                checkpoints.save(step, state.params, opt_state)
        checkpoints.wait()
    finally:
        log.close()
    if step < end:
        raise preemption.Preempted(run.out, step)
    return TrainResult(run.out, end, log.last, log.seconds, log.tokens)


def _is_finite(metrics: dict[str, jax.Array]) -> bool:
    return all(math.isfinite(float(metrics[name])) for name in _FINITE)


def _model_of(run: _Run, state: train_step.TrainState, step: int) -> LoadedModel:
    """The model as it is after a step, to score it."""
    return LoadedModel(
        run.model,
        state.params,
        run.record["vocabulary"],
        layout.CheckpointPath(epath.Path(run.out), step),
        run.mesh,
        run.config.expert_axes,
    )


class _MetricsLog:
    """Writes metrics to JSONL, TensorBoard and the progress bar; only process 0 does."""

    def __init__(self, run: _Run, begin: int, quiet: bool):
        self._is_writer = jax.process_index() == 0
        active = count_parameters(run.model).active
        self._flops = throughput.training_flops_per_token(run.model, active, run.length)
        # A token goes through one of an encoder-decoder's stacks; the estimate is of one stack.
        is_known = not run.model.has_encoder
        device = jax.devices()[0].device_kind
        self._peak = throughput.peak_flops_per_second(device) if is_known else None
        self._started = self._mark = time.perf_counter()
        self._path = run.out / _METRICS_FILE
        lines = _lines_until(self._path, begin)
        self.last: dict[str, float] = lines[-1] if lines else {}
        self.tokens = int(self.last.get("tokens", 0))
        self._uncounted_tokens: list[jax.Array] = []
        if self._is_writer:
            with atomic_file(self._path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self._board = SummaryWriter(str(run.out / "tensorboard"), purge_step=begin + 1)
        self._bar = tqdm(
            total=run.config.num_steps,
            initial=begin,
            desc=f"train {run.out.name}",
            unit="step",
            file=sys.stderr,
            disable=quiet or not self._is_writer,
            mininterval=1.0,
        )

    @property
    def seconds(self) -> float:
        """Wall time since the log was opened."""
        return time.perf_counter() - self._started

    def add(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        scores: dict[str, float],
        *,
        is_due: bool,
    ) -> None:
        """Takes the metrics of a step, still on the device unless they are due to be written.

        Raises:
          RuntimeError: If the metrics are due and the loss or the gradient is not finite.
        """
        metrics = dict(metrics)
        self._uncounted_tokens.append(metrics.pop("num_tokens"))
        self._bar.update(1)
        if not is_due:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens = sum(int(count) for count in jax.device_get(self._uncounted_tokens))
        self._uncounted_tokens.clear()
        self.tokens += tokens
        now = time.perf_counter()
        rate = tokens / max(now - self._mark, 1e-9)
        self._mark = now
        for name in _FINITE:
            if not math.isfinite(values[name]):
                raise RuntimeError(
                    f"The {name} must stay finite, got {values[name]} at step {step} of "
                    f"{self._path.parent}: lower OptimizerConfig.peak_learning_rate and start "
                    "again."
                )
        line = {"step": step, "tokens": self.tokens, **values, **scores, "tokens_per_second": rate}
        shown = {
            "loss": f"{values['loss']:.3f}",
            "drop": f"{values['fraction_tokens_left_behind']:.1%}",
            "tok/s": f"{rate:.3g}",
        }
        if self._peak:
            line["mfu"] = rate * self._flops / (self._peak * jax.device_count())
            shown["mfu"] = f"{line['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self.last = line
        if self._is_writer:
            append_json_line(self._path, line)
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Closes the progress bar and the TensorBoard file."""
        self._bar.close()
        if self._is_writer:
            self._board.close()
