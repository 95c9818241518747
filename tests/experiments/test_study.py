"""What a study consists of: the list of models by hand, its parts, settings that are refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.study import (
    PRUNED,
    SCRATCH,
    UNPRUNED,
    StudyConfig,
    WorkItem,
    shard,
    task_name,
    work_items,
)

MODEL = ModelConfig(
    num_experts=(8, 0, 8),
    vocab_size=260,
    embed_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_length=96,
    num_selected_experts=2,
)
STAGE = TrainConfig(OptimizerConfig(1e-3), num_steps=2, batch_size=8)
REVIEWS = JsonlTask("reviews", "train.jsonl", "val.jsonl", "{text}", options=("Bad", "Good"))
CONFIG = StudyConfig(
    title="A study",
    model=MODEL,
    pretrain=STAGE,
    warmup=dataclasses.replace(STAGE, trainable="router"),
    finetune=STAGE,
    corpus="synthetic_corpus",
    tasks=("rte",),
    source_num_experts=(8, 4),
    target_num_experts=(4, 2),
)


def changed(**settings) -> StudyConfig:
    return dataclasses.replace(CONFIG, **settings)


def test_models_of_a_study_by_hand():
    """Pruned models start from every larger source; scratch leaves out what is a source too."""
    items = work_items(changed(methods=("uncurl", "frequency")))
    assert items == [
        WorkItem(UNPRUNED, 8, 8, None, None, "rte", 0),
        WorkItem(PRUNED, 8, 4, "uncurl", "reference", "rte", 0),
        WorkItem(PRUNED, 8, 4, "frequency", "reference", "rte", 0),
        WorkItem(PRUNED, 8, 2, "uncurl", "reference", "rte", 0),
        WorkItem(PRUNED, 8, 2, "frequency", "reference", "rte", 0),
        WorkItem(UNPRUNED, 4, 4, None, None, "rte", 0),
        WorkItem(PRUNED, 4, 2, "uncurl", "reference", "rte", 0),
        WorkItem(PRUNED, 4, 2, "frequency", "reference", "rte", 0),
        WorkItem(SCRATCH, None, 2, None, None, "rte", 0),
    ]
    assert [item.run for item in items][:2] == [
        "8-unpruned-rte-seed0",
        "8to4-uncurl-reference-rte-seed0",
    ]
    assert items[-1].run == "2-scratch-rte-seed0"
    assert [item.pretrained_num_experts for item in items] == [8] * 5 + [4] * 3 + [2]


def test_every_task_seed_and_router_gets_its_models():
    config = changed(
        tasks=("rte", REVIEWS), seeds=(0, 1, 2), routers=("reference", "mean"), has_scratch=False
    )
    items = work_items(config)
    pruned = [item for item in items if item.kind == PRUNED]
    # (8 to 4, 8 to 2, 4 to 2) x two methods x two routers x two tasks x three seeds.
    assert len(pruned) == 3 * 2 * 2 * 2 * 3
    assert {item.task for item in items} == {"rte", "reviews"}
    assert {item.seed for item in items} == {0, 1, 2}
    assert not any(item.kind == SCRATCH for item in items)
    assert len({item.run for item in items}) == len(items)


def test_models_that_share_a_task_and_seed_stand_side_by_side():
    items = work_items(changed(tasks=("rte", "cb"), seeds=(0, 1), has_scratch=False))
    places = [(item.source_num_experts, item.task, item.seed) for item in items]
    assert len([a for a, b in itertools.pairwise(places) if a != b]) + 1 == 2 * 2 * 2


@given(count=st.integers(1, 30), size=st.integers(0, 60))
def test_shards_are_disjoint_complete_and_even(count, size):
    items: list = list(range(size))
    parts = [shard(items, index, count) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_out_of_range_is_refused(index, count):
    with pytest.raises(InputError, match=f"0 <= i < n, got {index}/{count}"):
        shard([], index, count)


def test_tasks_are_named_alike_however_they_are_given():
    assert task_name("rte") == "rte"
    assert task_name(REVIEWS) == "reviews"


def test_rows_are_no_longer_than_the_model():
    assert CONFIG.row_length == 96
    assert changed(max_length=64).row_length == 64
    assert changed(max_length=500).row_length == 96


def test_lists_as_gin_gives_them_become_tuples():
    config = changed(tasks=["rte", "cb"], seeds=[1], target_num_experts=[4])
    assert (config.tasks, config.seeds, config.target_num_experts) == (("rte", "cb"), (1,), (4,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks must name at least one, got none"),
        ({"methods": ("uncurl", "uncurl")}, "methods must not repeat, got"),
        ({"target_num_experts": (8,)}, "below the largest source count 8, got 8"),
        ({"target_num_experts": (1,)}, "must be at least top-k=2 and below .* got 1"),
        (
            {"model": dataclasses.replace(MODEL, num_experts=(0, 0)), "target_num_experts": ()},
            "A study needs a model with MoE layers, got a dense one",
        ),
        ({"warmup": STAGE}, "warmup.trainable must be \"router\", got 'all'"),
        (
            {"finetune": dataclasses.replace(STAGE, model=MODEL)},
            "finetune.model must be left out, the stage goes on from a checkpoint",
        ),
    ],
)
def test_settings_that_make_no_study_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        changed(**settings)
