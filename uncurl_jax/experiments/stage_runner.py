"""Makes the stages of a study, each once; what exists whole is not made again.

Layout of a study's directory (with --shard, of each shard_<i>_of_<n>/ in it):
  study.json                          title, device, versions, settings
  runs.jsonl                          one line per finished stage; "evaluate" lines are models
  progress.json                       what is done, running and left, and the time it may take
  tasks/<task>.json                   metrics and labelled examples of the validation split
  caches/<task>/{train,validation}    token caches; prefinetune_mixture is one as well
  pretrained/, prefinetuned/          checkpoints that several models begin with
  calibration/<n>_experts/<task>.npz  router statistics
  tuning/<model>.json                 what was tried for fine-tuning, and what was chosen
  runs/<run>/                         pruning_plan.json, pruned/, warmed_up/, prefinetuned/,
                                      finetuned/, metrics.json and metrics.predictions.jsonl
  curves/<stage>.jsonl                training curves, "/" in names as "__"
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.artifacts import append_json_line, read_json, write_json
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.checkpoints.weights import CheckpointWeights
from uncurl_jax.config import TrainConfig
from uncurl_jax.data import mixtures, token_cache
from uncurl_jax.data.cache_writer import RANK_CLASSIFICATION
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.evaluation.calibration import calibrate_checkpoint
from uncurl_jax.evaluation.evaluator import evaluate_checkpoint, validation_score
from uncurl_jax.experiments import stages as stages_lib
from uncurl_jax.experiments.stages import GIVEN, Stage, StageGraph
from uncurl_jax.experiments.study import UNPRUNED, StudyConfig, WorkItem, task_name
from uncurl_jax.pruning.methods import COMPOSITE, get_method
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.training import trainer
from uncurl_jax.training.early_stopping import Validation, result_of

RUNS_FILE = "runs.jsonl"
RUN_SCHEMA = "uncurl_jax run 2"


class StageRunner:
    """Makes stages in one directory.

    Attributes:
      graph: the stages.
      records: of runs.jsonl, by the name of their stage.
    """

    def __init__(
        self,
        config: StudyConfig,
        graph: StageGraph,
        directory: Path,
        *,
        data_dir: str | os.PathLike[str] | None,
        cache_dir: Path,
        records: list[dict[str, Any]],
        versions: dict[str, str],
        quiet: bool,
    ):
        """Goes on with what the directory and its records hold."""
        self._config = config
        self.graph = graph
        self._directory = directory
        self._data_dir = data_dir
        self._cache_dir = cache_dir
        self._versions = versions
        self._quiet = quiet
        self._tasks = {task_name(task): task for task in named_tasks(config)}
        self.records = {record["name"]: record for record in records}

    def path(self, name: str) -> Path:
        """Returns where the result of a stage lies."""
        if name == GIVEN:
            return Path(str(self._config.checkpoint))
        if name.startswith("caches/"):
            return self._cache_dir / name.removeprefix("caches/")
        return self._directory / name

    def exists(self, stage: Stage) -> bool:
        """Whether the result of a stage is there, whole."""
        path = self.path(stage.name)
        return trainer.is_finished(path) if stage.kind in stages_lib.TRAINED else path.exists()

    def left(self, item: WorkItem) -> list[Stage]:
        """Returns the stages that a model still needs, in order."""
        last = self.graph.results[item.run]
        if last in self.records:
            return []
        found: dict[str, Stage] = {}

        def visit(name: str) -> None:
            stage = self.graph.stages.get(name)
            if stage is None or name in found:
                return
            if not self.exists(stage):
                for other in stage.inputs.values():
                    visit(other)
            if name not in self.records or not self.exists(stage):
                found[name] = stage

        visit(last)
        return list(found.values())

    def make(self, stage: Stage) -> None:
        """Makes a stage whose inputs exist, and records it if it has no record yet."""
        begin = time.perf_counter()
        if not self.exists(stage):
            getattr(self, f"_make_{stage.kind}")(stage)
        if stage.kind == stages_lib.CACHE:
            self._write_examples(stage)
        if stage.name not in self.records:
            record = {
                "schema": RUN_SCHEMA,
                "stage": stage.kind,
                "name": stage.name,
                "inputs": sorted(stage.inputs.values()),
                "tokens": self._tokens(stage),
                "seconds": round(time.perf_counter() - begin, 3),
                "versions": self._versions,
                **(self._model_record(stage) if stage.kind == stages_lib.EVALUATE else {}),
            }
            append_json_line(self._directory / RUNS_FILE, record)
            self.records[stage.name] = record

    def remove_checkpoints(self, item: WorkItem) -> None:
        """Removes what `keep_checkpoints` False does not keep of a recorded run."""
        if self._config.prunes_finetuned and item.kind == UNPRUNED:
            return
        homes = [self._directory / "runs" / item.run]
        if self._config.finetune_grid is not None:
            trial = dataclasses.replace(item, seed=self._config.finetune_grid.seed)
            home = self._directory / "runs" / trial.run
            homes += [home, *sorted(home.glob("trial*"))]
        for home in homes:
            for name in ("pruned", "warmed_up", "prefinetuned", "finetuned"):
                shutil.rmtree(home / name, ignore_errors=True)

    def _tokens(self, stage: Stage) -> int:
        path = self.path(stage.name)
        if stage.kind in (stages_lib.CACHE, stages_lib.MIXTURE):
            manifests = sorted(path.glob("*/manifest.json"))
            return sum(read_json(manifest)["tokens"] for manifest in manifests)
        if stage.kind in stages_lib.TRAINED:
            return int(read_json(path / "train_summary.json")["tokens"])
        if stage.kind == stages_lib.CALIBRATE:
            return int(RouterStatistics.load(path).tokens)
        if stage.kind in (stages_lib.EVALUATE, stages_lib.ZERO_SHOT, stages_lib.TRIAL):
            return int(self._open(stage, "validation").manifest["tokens"])
        return 0

    def _open(self, stage: Stage, split: str) -> TokenCache:
        return TokenCache.open(self.path(stage.inputs["cache"]) / split)

    def _model(self, stage: Stage) -> Path:
        """Returns the checkpoint that a stage begins with."""
        name = stage.inputs["model"]
        found = self.graph.stages.get(name)
        is_trained = found is not None and found.kind in stages_lib.TRAINED
        return result_of(self.path(name)) if is_trained else self.path(name)

    def _make_cache(self, stage: Stage) -> None:
        path = self.path(stage.name)
        token_cache.build_token_cache(
            self._tasks[path.name],
            vocabulary=self._config.vocabulary,
            out=path,
            max_length=self._config.row_length,
            data_dir=os.fspath(self._data_dir or "."),
        )

    def _write_examples(self, stage: Stage) -> None:
        """Keeps what scores are computed from, so that the records speak for themselves."""
        name = self.path(stage.name).name
        out = self._directory / "tasks" / f"{name}.json"
        if out.exists() or name not in map(task_name, self._config.tasks):
            return
        cache = TokenCache.open(self.path(stage.name) / "validation")
        if cache.kind != RANK_CLASSIFICATION:
            return
        rows = [cache.rows_of(i)[0] for i in range(cache.manifest["examples"])]
        write_json(
            out,
            {
                "task": cache.task,
                "split": cache.split,
                "metrics": cache.manifest["metrics"],
                "primary_metric": cache.manifest["primary_metric"],
                "examples": [
                    {**example.to_dict(), "prompt_tokens": int(cache.prompt_lengths[row])}
                    for example, row in zip(cache.examples(), rows, strict=True)
                ],
            },
        )

    def _make_prefinetune_cache(self, stage: Stage) -> None:
        def caches(role: str, splits: tuple[str, ...]) -> list[TokenCache]:
            return [
                TokenCache.open(self.path(name) / split)
                for key, name in stage.inputs.items()
                if key.startswith(role)
                for split in splits
            ]

        assert self._config.mixture is not None
        corpus = caches("corpus", ("train",))
        mixtures.build_mixture_cache(
            caches("mixed", ("train",)),
            corpus[0] if corpus else None,
            self._config.mixture,
            evaluated=mixtures.texts_of(caches("task", ("train", "validation"))),
            vocabulary=load_vocabulary(self._config.vocabulary),
            max_length=self._config.row_length,
            out=self.path(stage.name),
        )

    def _train(self, stage: Stage) -> None:
        training = stage.training
        assert training is not None
        if "tuning" in stage.inputs:
            training = self._chosen(training, self.path(stage.inputs["tuning"]))
        if stage.kind == stages_lib.FINETUNE and self._config.finetune_epochs is not None:
            rows = self._open(stage, "train").num_target_rows
            steps = math.ceil(self._config.finetune_epochs * rows / training.batch_size)
            training = dataclasses.replace(training, num_steps=steps)
        out = self.path(stage.name)
        trainer.train(
            training,
            cache=self.path(stage.inputs["cache"]) / "train",
            out=out,
            initial_checkpoint=self._model(stage) if "model" in stage.inputs else None,
            validation=self._validation(stage) if training.early_stopping is not None else None,
            quiet=self._quiet,
        )
        curve = self._directory / "curves" / f"{stage.name.replace('/', '__')}.jsonl"
        with artifacts.atomic_file(curve) as partial:
            shutil.copyfile(out / "metrics.jsonl", partial)

    _make_pretrain = _make_prefinetune = _make_warmup = _make_finetune = _train

    def _validation(self, stage: Stage) -> Validation:
        cache = self._open(stage, "validation")
        score = functools.partial(
            validation_score,
            cache=cache,
            examples_per_batch=self._config.examples_per_batch,
            is_length_normalized=self._config.is_length_normalized,
        )
        return Validation(score, {"task": cache.task, "split": cache.split, "hash": cache.hash})

    def _chosen(self, training: TrainConfig, tuning: Path) -> TrainConfig:
        chosen = read_json(tuning)["chosen"]
        optimizer = dataclasses.replace(
            training.optimizer, peak_learning_rate=chosen["peak_learning_rate"]
        )
        return dataclasses.replace(training, optimizer=optimizer, num_steps=chosen["num_steps"])

    def _make_tune(self, stage: Stage) -> None:
        trials = []
        for name in stage.inputs.values():
            trained = self.graph.stages[self.graph.stages[name].inputs["model"]].training
            assert trained is not None
            trials.append(
                {
                    "peak_learning_rate": trained.optimizer.peak_learning_rate,
                    "num_steps": trained.num_steps,
                    "score": read_json(self.path(name))["score"],
                }
            )
        best = max(trials, key=lambda trial: trial["score"])
        chosen = {name: best[name] for name in ("peak_learning_rate", "num_steps")}
        write_json(self.path(stage.name), {"chosen": chosen, "trials": trials})

    def _make_calibrate(self, stage: Stage) -> None:
        inputs = self._router_inputs(stage.name)
        # A kill between the two files of a calibration leaves inputs without statistics.
        inputs.unlink(missing_ok=True)
        methods = single_methods(self._config)
        calibrate_checkpoint(
            self._model(stage),
            self._open(stage, "train"),
            out=self.path(stage.name),
            batch_size=self._config.calibration_batch_size,
            max_batches=self._config.calibration_max_batches,
            is_dropless=self._config.is_dropless_evaluation,
            collect=tuple(sorted({g for name in methods for g in get_method(name).collect})),
            inputs_out=inputs if "fit" in self._config.routers else None,
            sample_tokens=self._config.sample_tokens,
            quiet=self._quiet,
        )

    def _router_inputs(self, statistics: str) -> Path:
        return self.path(statistics).with_suffix(".inputs.npz")

    def _make_plan(self, stage: Stage) -> None:
        config, router = self._config, str(stage.router)
        method = "uncurl" if stage.item is None else str(stage.item.method)
        source = self._model(stage)
        factor = layout.resolve(source).model_config().eval_capacity_factor
        statistics = stage.inputs["statistics"]
        is_fitted = router == "fit"
        plan = make_plan(
            RouterStatistics.load(self.path(statistics)),
            num_experts=stage.num_experts,
            method=method,
            layer_methods=config.layer_methods if method == COMPOSITE else None,
            router=router,
            affinity=config.affinity,
            alignment=config.alignment,
            # Gates are unknown until a re-initialised router is trained, and kept by "remap".
            gate_compensation=config.gate_compensation and router not in ("reinit", "remap"),
            eval_capacity_factor=None if config.is_dropless_evaluation else factor,
            seed=0 if stage.item is None else stage.item.seed,
            weights=CheckpointWeights(source),
            router_inputs=RouterInputs.load(self._router_inputs(statistics)) if is_fitted else None,
        )
        plan.save(self.path(stage.name))

    def _make_prune(self, stage: Stage) -> None:
        plan = PruningPlan.load(self.path(stage.inputs["plan"]))
        prune_checkpoint(self._model(stage), plan, self.path(stage.name))

    def _evaluate(self, stage: Stage) -> None:
        path = self.path(stage.name)
        # A kill between the two files of an evaluation leaves predictions without metrics.
        path.with_name(f"{path.stem}.predictions.jsonl").unlink(missing_ok=True)
        evaluate_checkpoint(
            self._model(stage),
            self._open(stage, "validation"),
            out=path,
            examples_per_batch=self._config.examples_per_batch,
            is_length_normalized=self._config.is_length_normalized,
            is_dropless=self._config.is_dropless_evaluation,
            quiet=self._quiet,
        )

    _make_zero_shot = _make_trial = _make_evaluate = _evaluate

    def _model_record(self, stage: Stage) -> dict[str, Any]:
        item = stage.item
        assert item is not None
        metrics = read_json(self.path(stage.name))
        model = describe(self._model(stage))
        checkpoint = self._model(stage).relative_to(self._directory).as_posix()
        record = {
            "run": item.run,
            **dataclasses.asdict(item),
            "num_experts_per_layer": model["num_experts"],
            **{
                name: metrics[name]
                for name in (
                    "score",
                    "interval",
                    "metrics",
                    "num_examples",
                    "fraction_tokens_left_behind",
                )
            },
            **{name: model[name] for name in ("parameters", "active_parameters", "bytes")},
            "checkpoint": checkpoint if self._config.keep_checkpoints else None,
            "plan": stage.inputs.get("plan"),
            "statistics": stage.inputs.get("statistics"),
            "predictions": stage.name.replace("metrics.json", "metrics.predictions.jsonl"),
        }
        if "zero_shot" in stage.inputs:
            found = read_json(self.path(stage.inputs["zero_shot"]))
            record["zero_shot"] = {name: found[name] for name in ("score", "interval")}
        if "tuning" in stage.inputs:
            record["tuned"] = read_json(self.path(stage.inputs["tuning"]))
        return record


def named_tasks(config: StudyConfig) -> list[Any]:
    """Returns the corpus, if there is one, the tasks, and the mixture's other tasks."""
    names = [task_name(task) for task in config.tasks]
    mixed = () if config.mixture is None else config.mixture.tasks
    others = [task for task in mixed if task_name(task) not in names]
    return [*([] if config.corpus is None else [config.corpus]), *config.tasks, *others]


def single_methods(config: StudyConfig) -> list[str]:
    """Returns the names of the methods that group layers in a study."""
    names = [name for name in config.methods if name != COMPOSITE]
    names += ["uncurl"] if config.pretraining_prunes else []
    return list(dict.fromkeys([*names, *(config.layer_methods or ())]))


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """Returns a study's settings as study.json holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
