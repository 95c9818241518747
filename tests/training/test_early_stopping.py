"""Early stopping: which checkpoint is kept, when a stage stops, how an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.config import EarlyStoppingConfig
from uncurl_jax.errors import InputError
from uncurl_jax.training import early_stopping
from uncurl_jax.training.early_stopping import Validation
from uncurl_jax.training.trainer import is_finished, train

RECORD = {"task": "text", "split": "validation", "hash": "0"}


def total(params) -> float:
    return sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(params))


def scripted(scores: dict[int, float], seen: dict[int, float] | None = None) -> Validation:
    """A validation whose scores are given by step; keeps a sum of each model it sees."""

    def score(model):
        step = model.checkpoint.step
        if seen is not None:
            seen[step] = total(model.params)
        return scores[step]

    return Validation(score, RECORD)


@pytest.fixture
def stopping(config):
    return dataclasses.replace(
        config, num_steps=10, early_stopping=EarlyStoppingConfig(every_steps=1, patience=2)
    )


def first_sum(checkpoint) -> float:
    params = load_model(checkpoint).params
    return total(params)


def test_the_best_checkpoint_is_the_result_and_the_stage_stops(stopping, cache_path, tmp_path):
    """Best at step 3, earliest of equals; nothing better at 4 and 5; so 5 is the last step."""
    seen: dict[int, float] = {}
    scores = {1: 50.0, 2: 40.0, 3: 60.0, 4: 60.0, 5: 10.0}
    result = train(
        stopping,
        cache=cache_path,
        out=tmp_path / "a",
        validation=scripted(scores, seen),
        quiet=True,
    )
    assert (result.step, sorted(seen)) == (5, [1, 2, 3, 4, 5])
    best = early_stopping.result_of(tmp_path / "a")
    assert best == result.checkpoint == tmp_path / "a" / "best" / "checkpoint_3"
    assert first_sum(best) == pytest.approx(seen[3], rel=1e-6)
    assert len(set(seen.values())) == 5
    assert read_json(tmp_path / "a" / "train_summary.json")["best"] == {"step": 3, "score": 60.0}
    lines = read_json_lines(tmp_path / "a" / "metrics.jsonl")
    assert {line["step"]: line["validation_score"] for line in lines} == scores
    assert is_finished(tmp_path / "a")


def test_an_interrupted_stage_stops_where_a_whole_one_does(stopping, cache_path, tmp_path):
    """Stopped after step 4 at a checkpoint of step 2: steps 3 and 4, a new best, are done again."""
    scores = {1: 50.0, 2: 40.0, 3: 60.0, 4: 60.0, 5: 10.0}
    every = dataclasses.replace(stopping, save_every_steps=2)
    whole = train(
        every, cache=cache_path, out=tmp_path / "a", validation=scripted(scores), quiet=True
    )

    class KilledError(Exception):
        pass

    def dies(model):
        if model.checkpoint.step == 4:
            raise KilledError
        return scores[model.checkpoint.step]

    with pytest.raises(KilledError):
        train(
            every,
            cache=cache_path,
            out=tmp_path / "b",
            validation=Validation(dies, RECORD),
            quiet=True,
        )
    assert layout.finished_steps(tmp_path / "b") == [2]
    assert layout.finished_steps(tmp_path / "b" / "best") == [1, 3]
    again = train(
        every, cache=cache_path, out=tmp_path / "b", validation=scripted(scores), quiet=True
    )
    assert again.step == whole.step == 5
    paths = [early_stopping.result_of(tmp_path / part) for part in "ab"]
    assert [path.name for path in paths] == ["checkpoint_3"] * 2
    assert first_sum(paths[0]) == first_sum(paths[1])


def test_without_patience_the_last_step_is_scored_too(stopping, cache_path, tmp_path):
    rare = dataclasses.replace(
        stopping, num_steps=5, early_stopping=EarlyStoppingConfig(every_steps=3, patience=9)
    )
    seen: dict[int, float] = {}
    result = train(
        rare,
        cache=cache_path,
        out=tmp_path / "a",
        validation=scripted({3: 1.0, 5: 2.0}, seen),
        quiet=True,
    )
    assert sorted(seen) == [3, 5]
    assert result.checkpoint.name == "checkpoint_5"


def test_a_model_that_diverged_is_not_scored(stopping, cache_path, tmp_path):
    """The sentence is the trainer's own, and no checkpoint is called the best."""
    optimizer = dataclasses.replace(
        stopping.optimizer, peak_learning_rate=1e38, warmup_steps=0, clip_norm=None
    )
    with pytest.raises(RuntimeError, match=r"must stay finite, got .* lower OptimizerConfig"):
        train(
            dataclasses.replace(stopping, optimizer=optimizer),
            cache=cache_path,
            out=tmp_path / "a",
            validation=scripted({1: 1.0}),
            quiet=True,
        )
    assert layout.finished_steps(tmp_path / "a" / "best") == [1]


@pytest.mark.parametrize("has_config", [True, False])
def test_settings_and_rows_belong_together(has_config, stopping, cache_path, tmp_path):
    settings = stopping if has_config else dataclasses.replace(stopping, early_stopping=None)
    with pytest.raises(InputError, match="needs validation rows and these need it, got one"):
        train(
            settings,
            cache=cache_path,
            out=tmp_path / "a",
            validation=None if has_config else scripted({}),
            quiet=True,
        )
    assert not (tmp_path / "a").exists()


def test_two_parts_of_a_run_see_its_data_and_learning_rate(config, cache_path, tmp_path):
    """Pretraining cut in two: the second part's batches and rates are those of the whole run."""
    whole = dataclasses.replace(config, num_steps=4)
    train(whole, cache=cache_path, out=tmp_path / "whole", quiet=True)
    first = dataclasses.replace(whole, num_steps=2, schedule_steps=4)
    train(first, cache=cache_path, out=tmp_path / "first", quiet=True)
    second = dataclasses.replace(whole, model=None, begin_step=2)
    train(
        second,
        cache=cache_path,
        out=tmp_path / "second",
        initial_checkpoint=tmp_path / "first",
        quiet=True,
    )
    runs = {
        name: read_json_lines(tmp_path / name / "metrics.jsonl")
        for name in ("whole", "first", "second")
    }
    parts = runs["first"] + runs["second"]
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    rates = [[line["learning_rate"] for line in lines] for lines in (runs["whole"], parts)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    # The first step of the second part has the whole run's parameters and batch.
    assert parts[2]["loss"] == pytest.approx(runs["whole"][2]["loss"], rel=1e-5)
    assert layout.finished_steps(tmp_path / "second") == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin_step": 6}, "begin_step must be at least 0 and below num_steps, got 6 and 6"),
        ({"schedule_steps": 5}, "schedule_steps must be at least num_steps, or None, got 5 and 6"),
    ],
)
def test_parts_that_make_no_run_are_refused(settings, message, config):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **settings)
    with pytest.raises(InputError, match="every_steps and patience must be at least 1, got 0"):
        EarlyStoppingConfig(every_steps=0)
    assert json.dumps(dataclasses.asdict(config))
