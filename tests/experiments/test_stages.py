"""The graph of a study: which stages there are, what they begin with, what they share."""

from __future__ import annotations

import dataclasses

import pytest

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.mixtures import MixtureConfig
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.stages import StageGraph
from uncurl_jax.experiments.study import FinetuneGrid, StudyConfig, work_items

MODEL = ModelConfig(
    num_experts=(8, 0), vocab_size=260, embed_dim=16, num_heads=2, mlp_dim=32, max_length=64
)
STAGE = TrainConfig(OptimizerConfig(1e-3), num_steps=10, batch_size=4)
CONFIG = StudyConfig(
    title="A study",
    model=MODEL,
    pretrain=STAGE,
    warmup=dataclasses.replace(STAGE, trainable="router"),
    finetune=STAGE,
    corpus="synthetic_corpus",
    tasks=("rte",),
    source_num_experts=(8,),
    target_num_experts=(2,),
    methods=("uncurl",),
    seeds=(5,),
)
MIXTURE = MixtureConfig(tasks=("rte", "multirc"), corpus_share=0.5)


def graph(**settings) -> StageGraph:
    config = dataclasses.replace(CONFIG, **settings)
    return StageGraph(config, work_items(config))


def chain(found: StageGraph, run: str) -> list[str]:
    return [stage.name for stage in found.needed_by(found.results[run])]


def test_the_stages_of_a_pruned_model_by_hand():
    found = graph(has_scratch=False)
    run = "8to2-uncurl-reference-rte-seed5"
    assert chain(found, run) == [
        "caches/rte",
        "caches/synthetic_corpus",
        "pretrained/8_experts",
        "calibration/8_experts/rte.npz",
        f"runs/{run}/pruning_plan.json",
        f"runs/{run}/pruned",
        f"runs/{run}/warmed_up",
        f"runs/{run}/finetuned",
        f"runs/{run}/metrics.json",
    ]
    warmed = found.stages[f"runs/{run}/warmed_up"].training
    assert warmed is not None
    assert (warmed.seed, warmed.trainable) == (5, "router")
    # 10 steps x 4 rows x 64 tokens.
    assert found.stages[f"runs/{run}/finetuned"].tokens == 2560


def test_models_are_prefinetuned_alike_and_those_that_can_share_it_do():
    found = graph(prefinetune=STAGE, mixture=MIXTURE, tasks=("rte", "cb"))
    initial = {
        name.split("/")[1]: found.stages[name].inputs["model"]
        for name in found.stages
        if name.endswith("/finetuned")
    }
    assert initial == {
        "8-unpruned-rte-seed5": "prefinetuned/8_experts-seed5",
        "8-unpruned-cb-seed5": "prefinetuned/8_experts-seed5",
        "2-scratch-rte-seed5": "prefinetuned/2_experts-seed5",
        "2-scratch-cb-seed5": "prefinetuned/2_experts-seed5",
        "8to2-uncurl-reference-rte-seed5": "runs/8to2-uncurl-reference-rte-seed5/prefinetuned",
        "8to2-uncurl-reference-cb-seed5": "runs/8to2-uncurl-reference-cb-seed5/prefinetuned",
    }
    stages = [s for s in found.stages.values() if s.kind == "prefinetune"]
    assert len({(s.training, s.tokens) for s in stages}) == 1
    # Of the mixture's tasks the evaluated one is left out; its texts are looked at.
    assert found.stages["caches/prefinetune_mixture"].inputs == {
        "task0": "caches/rte",
        "task1": "caches/cb",
        "mixed0": "caches/multirc",
        "corpus": "caches/synthetic_corpus",
    }


def test_every_kind_of_model_tries_the_same_settings_with_another_seed():
    grid = FinetuneGrid(learning_rates=(1e-3, 1e-4), num_steps=(10, 20), seed=99)
    found = graph(finetune_grid=grid, seeds=(5, 6))
    tuned = {name: s for name, s in found.stages.items() if s.kind == "tune"}
    assert sorted(tuned) == [
        "tuning/2-scratch-rte.json",
        "tuning/8-unpruned-rte.json",
        "tuning/8to2-uncurl-reference-rte.json",
    ]
    for stage in tuned.values():
        settings = []
        for name in stage.inputs.values():
            training = found.stages[found.stages[name].inputs["model"]].training
            assert training is not None
            assert training.seed == 99
            settings.append((training.optimizer.peak_learning_rate, training.num_steps))
        assert settings == [(1e-3, 10), (1e-3, 20), (1e-4, 10), (1e-4, 20)]
    for seed in (5, 6):
        inputs = found.stages[f"runs/2-scratch-rte-seed{seed}/finetuned"].inputs
        assert inputs["tuning"] == "tuning/2-scratch-rte.json"
    # The trial of a pruned model is a prune of its own.
    assert "runs/8to2-uncurl-reference-rte-seed99/pruned" in found.stages


def test_pruning_during_pretraining_by_hand():
    """8 -> 4 -> 2 after 3 and 6 of 10 steps: equal ratios, one schedule, no step twice."""
    found = graph(pretraining_prunes=(0.3, 0.6), has_scratch=False)
    run = "8to2-during_pretraining-reference-rte-seed5"
    home = "pretrained/8to2-during_pretraining"
    names = chain(found, run)
    assert names == [
        "caches/rte",
        "caches/synthetic_corpus",
        "pretrained/8_experts-until3",
        "calibration/during_pretraining/8_experts-until3.npz",
        f"{home}/pruning_plan_3.json",
        f"{home}/pruned_3",
        f"{home}/until6",
        "calibration/during_pretraining/8to2-during_pretraining/until6.npz",
        f"{home}/pruning_plan_6.json",
        f"{home}/pruned_6",
        f"{home}/until10",
        f"runs/{run}/finetuned",
        f"runs/{run}/metrics.json",
    ]
    counts = [found.stages[name].num_experts for name in names if "plan" in name]
    assert counts == [4, 2]
    parts = [
        found.stages[name].training for name in names if "until" in name and ".npz" not in name
    ]
    assert [(p.begin_step, p.num_steps, p.schedule_steps) for p in parts if p] == [
        (0, 3, 10),
        (3, 6, 10),
        (6, 10, 10),
    ]
    assert found.stages[found.results[run]].inputs["plan"] == f"{home}/pruning_plan_6.json"


def test_a_given_checkpoint_needs_no_pretraining():
    found = graph(
        checkpoint="ckpt", pretrain=None, corpus=None, has_scratch=False, prunes_finetuned=True
    )
    kinds = {stage.kind for stage in found.stages.values()}
    assert "pretrain" not in kinds
    unpruned = found.stages["runs/8-unpruned-rte-seed5/finetuned"]
    assert unpruned.inputs["model"] == "given"
    plan = found.stages["runs/8to2-uncurl-reference-rte-seed5/pruning_plan.json"]
    assert plan.inputs["model"] == unpruned.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefinetune": STAGE}, "prefinetune and mixture belong together, got one of them"),
        ({"pretraining_prunes": (0.6, 0.3)}, r"ascending order, above 0 and below 1, got \(0.6"),
        ({"pretraining_prunes": (1.0,)}, "above 0 and below 1"),
        ({"finetune_grid": FinetuneGrid(seed=5)}, r"must not be one of the study's seeds \(5,\)"),
        ({"finetune_epochs": 0.0}, "finetune_epochs must be positive, and not with"),
        (
            {"finetune_epochs": 1.0, "finetune_grid": FinetuneGrid(num_steps=(5,))},
            "not with finetune_grid.num_steps, got 1.0",
        ),
        ({"pretrain": None}, "needs models to prune, got neither pretrain and corpus nor a chec"),
        ({"checkpoint": "c"}, "has one source_num_experts, and neither has_scratch nor"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **settings)
