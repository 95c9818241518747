"""A study as a graph of stages: what has to be made, from what, and how many tokens it takes.

No JAX, no files. A stage's name is where its result lies in the study's directory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from uncurl_jax.config import TrainConfig
from uncurl_jax.experiments.study import (
    DURING_PRETRAINING,
    PRUNED,
    UNPRUNED,
    StudyConfig,
    WorkItem,
    task_name,
)

CACHE, PRETRAIN, MIXTURE, PREFINETUNE = "cache", "pretrain", "prefinetune_cache", "prefinetune"
CALIBRATE, PLAN, PRUNE, WARMUP, FINETUNE = "calibrate", "plan", "prune", "warmup", "finetune"
ZERO_SHOT, TRIAL, TUNE, EVALUATE = "zero_shot", "trial", "tune", "evaluate"
KINDS = (
    *(CACHE, PRETRAIN, MIXTURE, PREFINETUNE, CALIBRATE, PLAN, PRUNE, WARMUP, FINETUNE),
    *(ZERO_SHOT, TRIAL, TUNE, EVALUATE),
)
TRAINED = (PRETRAIN, PREFINETUNE, WARMUP, FINETUNE)
GIVEN = "given"
"""Name of a checkpoint that the study did not make."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One thing to make, once.

    Attributes:
      kind: one of KINDS.
      name: path of the result in the study's directory; unique.
      inputs: role to the name of the stage that makes it. Roles are "cache", "model",
        "statistics", "plan", "tuning", "corpus"; "trial<i>" of a choice; "task<i>", "mixed<i>".
      item: the model it belongs to; None if several share it.
      training: what a trained stage does.
      num_experts: experts per MoE layer that a plan leaves; None for other kinds.
      router: of a plan.
      tokens: that training takes at most; 0 for other kinds, whose caches tell.
    """

    kind: str
    name: str
    inputs: Mapping[str, str]
    item: WorkItem | None = None
    training: TrainConfig | None = None
    num_experts: int | None = None
    router: str | None = None
    tokens: int = 0


class StageGraph:
    """The stages of a study, each after those that it needs.

    Attributes:
      stages: by name.
      results: the name of the last stage of each model, by `WorkItem.run`.
    """

    def __init__(self, config: StudyConfig, items: list[WorkItem]):
        """Lists the stages that some models of a study need."""
        self._config = config
        self.stages: dict[str, Stage] = {}
        self.results = {item.run: self._evaluated(item) for item in items}

    def needed_by(self, name: str) -> list[Stage]:
        """Returns a stage and all before it, in an order in which they can be made."""
        found: dict[str, Stage] = {}

        def visit(name: str) -> None:
            if name in found or name not in self.stages:
                return
            for other in self.stages[name].inputs.values():
                visit(other)
            found[name] = self.stages[name]

        visit(name)
        return list(found.values())

    def _add(self, kind: str, name: str, **values) -> str:
        if name not in self.stages:
            self.stages[name] = Stage(kind, name, values.pop("inputs", {}), **values)
        return name

    def _train(self, kind: str, name: str, stage: TrainConfig, cache: str, **values) -> str:
        inputs = {"cache": cache}
        model = values.pop("model", None)
        if model is not None:
            inputs["model"] = model
        inputs |= values.pop("more", {})
        length = stage.length or self._config.row_length
        tokens = (stage.num_steps - stage.begin_step) * stage.batch_size * length
        return self._add(kind, name, inputs=inputs, training=stage, tokens=tokens, **values)

    def _cache(self, task: object) -> str:
        return self._add(CACHE, f"caches/{task_name(task)}")

    def _evaluated(self, item: WorkItem) -> str:
        home = f"runs/{item.run}"
        cache = self._cache(item.task)
        model, inputs = self._model(item)
        if self._config.has_zero_shot:
            untrained = inputs.pop("untrained")
            inputs["zero_shot"] = self._add(
                ZERO_SHOT,
                f"{home}/zero_shot.json",
                inputs={"cache": cache, "model": untrained},
                item=item,
            )
        inputs.pop("untrained", None)
        return self._add(
            EVALUATE,
            f"{home}/metrics.json",
            inputs={"cache": cache, "model": model, **inputs},
            item=item,
        )

    def _model(self, item: WorkItem) -> tuple[str, dict[str, str]]:
        """Returns the fine-tuned model's stage, and what the record tells of beside it."""
        initial, inputs = self._initial(item)
        more = {}
        if self._config.finetune_grid is not None:
            more["tuning"] = self._tuned(item)
        stage = dataclasses.replace(self._config.finetune, seed=item.seed)
        return self._train(
            FINETUNE,
            f"runs/{item.run}/finetuned",
            stage,
            self._cache(item.task),
            model=initial,
            more=more,
            item=item,
        ), {**inputs, **more}

    def _initial(self, item: WorkItem) -> tuple[str, dict[str, str]]:
        """Returns the stage whose model is fine-tuned, and plan, statistics, untrained model."""
        if item.method == DURING_PRETRAINING:
            source, plan = self._pruned_in_pretraining(item)
            name = f"{item.source_num_experts}to{item.num_experts}-{DURING_PRETRAINING}"
            return self._prefinetuned(source, name, item), {"plan": plan, "untrained": source}
        if item.kind != PRUNED:
            source = self._pretrained(item.pretrained_num_experts)
            name = f"{item.pretrained_num_experts}_experts"
            return self._prefinetuned(source, name, item), {"untrained": source}
        home = f"runs/{item.run}"
        source = self._source(item)
        cache = self._cache(item.task)
        statistics = self._statistics(item, source, cache)
        plan = self._add(
            PLAN,
            f"{home}/pruning_plan.json",
            inputs={"statistics": statistics, "model": source},
            item=item,
            num_experts=item.num_experts,
            router=item.router,
        )
        pruned = self._add(
            PRUNE, f"{home}/pruned", inputs={"model": source, "plan": plan}, item=item
        )
        stage = dataclasses.replace(self._config.warmup, seed=item.seed)
        model = self._train(WARMUP, f"{home}/warmed_up", stage, cache, model=pruned, item=item)
        if self._config.prefinetune is not None and not self._config.prunes_finetuned:
            stage = dataclasses.replace(self._config.prefinetune, seed=item.seed)
            name = f"{home}/prefinetuned"
            model = self._train(PREFINETUNE, name, stage, self._mixture(), model=model, item=item)
        return model, {"statistics": statistics, "plan": plan, "untrained": pruned}

    def _source(self, item: WorkItem) -> str:
        """What is pruned: the pretrained model, or the unpruned one after fine-tuning."""
        if not self._config.prunes_finetuned:
            return self._pretrained(item.pretrained_num_experts)
        count = item.pretrained_num_experts
        unpruned = WorkItem(UNPRUNED, count, count, None, None, item.task, item.seed)
        return self._model(unpruned)[0]

    def _statistics(self, item: WorkItem, source: str, cache: str) -> str:
        seed = f"-seed{item.seed}" if self._config.prunes_finetuned else ""
        return self._add(
            CALIBRATE,
            f"calibration/{item.pretrained_num_experts}_experts/{item.task}{seed}.npz",
            inputs={"model": source, "cache": cache},
        )

    def _pretrained(self, count: int) -> str:
        if self._config.checkpoint is not None or self._config.pretrain is None:
            return GIVEN
        stage = dataclasses.replace(
            self._config.pretrain, model=self._config.model.with_experts(count)
        )
        cache = self._cache(self._config.corpus)
        return self._train(PRETRAIN, f"pretrained/{count}_experts", stage, cache)

    def _prefinetuned(self, source: str, name: str, item: WorkItem) -> str:
        if self._config.prefinetune is None:
            return source
        stage = dataclasses.replace(self._config.prefinetune, seed=item.seed)
        name = f"prefinetuned/{name}-seed{item.seed}"
        return self._train(PREFINETUNE, name, stage, self._mixture(), model=source)

    def _mixture(self) -> str:
        config, mixture = self._config, self._config.mixture
        assert mixture is not None
        names = [task_name(task) for task in config.tasks]
        mixed = [task for task in mixture.tasks if task_name(task) not in names]
        inputs = {f"task{i}": self._cache(task) for i, task in enumerate(config.tasks)}
        inputs |= {f"mixed{i}": self._cache(task) for i, task in enumerate(mixed)}
        if mixture.corpus_share:
            inputs["corpus"] = self._cache(config.corpus)
        return self._add(MIXTURE, "caches/prefinetune_mixture", inputs=inputs)

    def _pruned_in_pretraining(self, item: WorkItem) -> tuple[str, str]:
        """Returns the model pretrained with prunes on the way, and its last plan."""
        config = self._config
        assert config.pretrain is not None
        source, target = item.pretrained_num_experts, item.num_experts
        total = config.pretrain.num_steps
        parts = len(config.pretraining_prunes)
        corpus = self._cache(config.corpus)
        model, plan, done, count, home = None, "", 0, source, f"pretrained/{source}_experts"
        ends = [round(fraction * total) for fraction in config.pretraining_prunes]
        for number, end in enumerate([*ends, total]):
            stage = dataclasses.replace(
                config.pretrain,
                model=config.model.with_experts(source) if number == 0 else None,
                begin_step=done,
                num_steps=end,
                schedule_steps=config.pretrain.schedule_steps or total,
            )
            name = f"{home}-until{end}" if number == 0 else f"{home}/until{end}"
            model = self._train(PRETRAIN, name, stage, corpus, model=model)
            done = end
            if number == parts:
                break
            count = round(source * (target / source) ** ((number + 1) / parts))
            home = f"pretrained/{source}to{target}-{DURING_PRETRAINING}"
            statistics = self._add(
                CALIBRATE,
                f"calibration/{DURING_PRETRAINING}/{model.removeprefix('pretrained/')}.npz",
                inputs={"model": model, "cache": corpus},
            )
            plan = self._add(
                PLAN,
                f"{home}/pruning_plan_{end}.json",
                inputs={"statistics": statistics, "model": model},
                num_experts=count,
                router=item.router,
            )
            inputs = {"model": model, "plan": plan}
            model = self._add(PRUNE, f"{home}/pruned_{end}", inputs=inputs)
        assert model is not None
        return model, plan

    def _tuned(self, item: WorkItem) -> str:
        """Returns the stage that chooses the settings of fine-tuning of a model's seeds."""
        grid = self._config.finetune_grid
        assert grid is not None
        trial = dataclasses.replace(item, seed=grid.seed)
        cache = self._cache(item.task)
        initial, _ = self._initial(trial)
        inputs = {}
        for number, stage in enumerate(grid.points(self._config.finetune)):
            home = f"runs/{trial.run}/trial{number}"
            stage = dataclasses.replace(stage, seed=grid.seed)
            tuned = self._train(
                FINETUNE, f"{home}/finetuned", stage, cache, model=initial, item=trial
            )
            inputs[f"trial{number}"] = self._add(
                TRIAL, f"{home}/metrics.json", inputs={"cache": cache, "model": tuned}, item=trial
            )
        return self._add(TUNE, f"tuning/{item.group}.json", inputs=inputs, item=trial)


def count_by_kind(stages: list[Stage]) -> dict[str, list[Stage]]:
    """Groups stages by kind, in the order of KINDS."""
    ordered = sorted(stages, key=lambda stage: KINDS.index(stage.kind))
    return {k: list(group) for k, group in itertools.groupby(ordered, lambda stage: stage.kind)}
