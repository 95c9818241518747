"""From a checkpoint and a task to a decision: calibrate, plan, prune, fine-tune, evaluate, gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncurl_jax.artifacts import read_json, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.config import TrainConfig
from uncurl_jax.data import registry
from uncurl_jax.data.cache_builder import SEQIO_PREFIX
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import gate as gate_lib
from uncurl_jax.experiments import sweep
from uncurl_jax.experiments.reporting.report import write_report
from uncurl_jax.experiments.study import StudyConfig, task_name

PILOT_FILE = "pilot.json"
NOT_GIVEN = (
    "No model was trained from scratch, so this pilot can give the lossless threshold (how far one "
    "can prune without losing against the unpruned model), and not the beneficial one (whether a "
    "small model from scratch would have done as well)."
)


def run_pilot(
    *,
    checkpoint: str,
    task: Any,
    target_num_experts: Sequence[int],
    out: str | os.PathLike[str],
    warmup: TrainConfig,
    finetune: TrainConfig,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    gate: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = ("uncurl",),
    routers: Sequence[str] = ("reference",),
    prunes_finetuned: bool = False,
    max_length: int | None = None,
    calibration_max_batches: int | None = None,
    keep_checkpoints: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs a study of one checkpoint on one task, its report and its gates; resumable.

    Args:
      checkpoint: what to prune; the same number of experts in every MoE layer.
      task: a registered name, "seqio:<name>", a JsonlTask, or any name if data_dir has train.jsonl
        and val.jsonl of rows {"prompt", "options", "label"}.
      target_num_experts: D, several.
      out: directory of the study; pilot.json, gate_<model>.json, report.html go there too.
      warmup: router-only stage after a prune.
      finetune: stage of every model, the unpruned one too.
      data_dir: where the task's files lie.
      cache_dir: token caches, as for a sweep.
      gate: limits that a pruned model must keep, a file as configs/gates/default.json.
      seeds: three or more, or nothing can be decided.
      methods: of grouping.
      routers: treatments.
      prunes_finetuned: fine-tune first, then prune, as if the checkpoint were one of the task.
      max_length: tokens per row, at most the model's.
      calibration_max_batches: None calibrates on the whole training split.
      keep_checkpoints: whether pruned, fine-tuned checkpoints stay, to be served.
      quiet: no progress bars.

    Returns:
      What pilot.json holds: the recommendation, verdicts of the gates, which threshold is given.

    Raises:
      InputError: If the checkpoint's layers differ, or as for a sweep.
    """
    path = layout.resolve(checkpoint)
    model = path.model_config()
    counts = {count for count in model.num_experts if count}
    if len(counts) != 1:
        raise InputError(
            f"A pilot needs a checkpoint with one number of experts in all MoE layers, got "
            f"{list(model.num_experts)} in {checkpoint}: use plan and prune."
        )
    if gate is not None:
        gate_lib.load_gate(gate)
    found = find_task(task, data_dir)
    config = StudyConfig(
        title=f"Pilot: {task_name(found)}, {counts.copy().pop()} experts pruned to "
        + ", ".join(map(str, target_num_experts)),
        model=model,
        pretrain=None,
        warmup=warmup,
        finetune=finetune,
        corpus=None,
        tasks=(found,),
        source_num_experts=tuple(counts),
        target_num_experts=tuple(target_num_experts),
        methods=tuple(methods),
        routers=tuple(routers),
        seeds=tuple(seeds),
        checkpoint=os.path.abspath(str(path)),
        has_scratch=False,
        prunes_finetuned=prunes_finetuned,
        vocabulary=path.vocabulary()["spec"],
        max_length=max_length,
        calibration_max_batches=calibration_max_batches,
        keep_checkpoints=keep_checkpoints,
    )
    sweep.run_sweep(config, out=out, data_dir=data_dir, cache_dir=cache_dir, quiet=quiet)
    report = write_report(out)
    verdicts = {}
    if gate is not None:
        for name in gate_lib.candidate_names(report):
            verdict = gate_lib.judge(Path(out) / "report.json", gate, candidate=name)
            write_json(Path(out) / f"gate_{name}.json", verdict)
            verdicts[name] = verdict["passed"]
    result = {
        "report": os.fspath(Path(out) / "report.html"),
        "headline": report["headline"],
        "recommendation": report.get("recommendation"),
        "gates": verdicts,
        "thresholds": NOT_GIVEN,
    }
    write_json(Path(out) / PILOT_FILE, result)
    return read_json(Path(out) / PILOT_FILE)


def find_task(task: Any, data_dir: str | os.PathLike[str] | None) -> Any:
    """Returns a task as a study takes it; see `run_pilot`.

    Raises:
      InputError: If the name is not registered and there are no files of that form.
    """
    if not isinstance(task, str) or task.startswith(SEQIO_PREFIX):
        return task
    try:
        return registry.get_task(task).name
    except InputError:
        if data_dir is None or not (Path(data_dir) / "train.jsonl").is_file():
            raise
    return JsonlTask(
        name=task,
        train_file="train.jsonl",
        validation_file="val.jsonl",
        template="{prompt}",
        options_field="options",
    )
