from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import init_params
from uncurl_jax.training.trainer import is_finished, train

JSON_FILES = ("model_config.json", "provenance.json", "vocabulary.json")


def metrics_of(out: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = read_json_lines(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    reader = layout.StateReader(path)
    return {name: reader.read(name) for name in reader.metadata}


def assert_same_results(one: Path, other: Path) -> None:
    """Bit-equal metrics and checkpoints, optimizer state included."""
    assert metrics_of(one) == metrics_of(other)
    expected, found = arrays_of(one), arrays_of(other)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def listing(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


@pytest.fixture(scope="module")
def jittery(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """Saves after every second step; jitter shows whether random numbers go on as they were."""
    model = dataclasses.replace(model, router_jitter=0.1)
    return dataclasses.replace(config, model=model, save_every_steps=2, max_to_keep=None)


@pytest.fixture(scope="module")
def finished(jittery, cache_path, tmp_path_factory) -> Path:
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = train(jittery, cache=cache_path, out=out, quiet=True)
    assert result.checkpoint == out
    assert result.step == 6
    assert result.tokens == 6 * 8 * 16
    assert result.metrics["step"] == 6
    return out


def test_a_finished_run_leaves_metrics_checkpoints_and_a_summary(finished, jittery, model):
    lines = read_json_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [step * 8 * 16 for step in range(1, 7)]
    assert lines[0]["learning_rate"] == 0.0
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert layout.finished_steps(finished) == [2, 4, 6]
    assert layout.resolve(finished).model_config() == jittery.model
    assert layout.resolve(finished).vocabulary()["name"] == "bytes"
    assert list((finished / "tensorboard").glob("events.*"))
    summary = read_json(finished / "train_summary.json")
    assert summary["checkpoint"] == "checkpoint_6"
    assert summary["tokens"] == 6 * 8 * 16
    assert summary["metrics"]["loss"] == lines[-1]["loss"]
    assert summary["device"] == {"kind": "cpu", "count": 8}
    assert is_finished(finished)
    assert read_json(finished / "train_config.json")["length"] == 16


def test_an_interrupted_run_resumes_to_the_same_bits(finished, jittery, cache_path, tmp_path):
    out = tmp_path / "out"
    first = train(jittery, cache=cache_path, out=out, stop_after_step=2, quiet=True)
    assert (first.step, first.tokens) == (2, 2 * 8 * 16)
    assert not is_finished(out)
    second = train(jittery, cache=cache_path, out=out, stop_after_step=3, quiet=True)
    assert second.step == 3
    again = train(jittery, cache=cache_path, out=out, stop_after_step=1, quiet=True)
    assert again.step == 3  # what is done stays done
    result = train(jittery, cache=cache_path, out=out, quiet=True)
    assert result.tokens == 6 * 8 * 16
    (out / "checkpoint_3").rename(tmp_path / "checkpoint_3")  # the uninterrupted run has none
    assert_same_results(finished, out)


@pytest.mark.parametrize("log_every_steps", [1, 4])
def test_a_killed_run_resumes_from_its_last_checkpoint(
    log_every_steps, finished, jittery, cache_path, tmp_path
):
    config = dataclasses.replace(jittery, log_every_steps=log_every_steps)
    out = tmp_path / "out"
    train(config, cache=cache_path, out=out, stop_after_step=4, quiet=True)
    # As if killed while step 4 was being saved and a line written.
    (out / "checkpoint_4").rename(out / "checkpoint_4.orbax-checkpoint-tmp-1")
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    result = train(config, cache=cache_path, out=out, quiet=True)
    assert result.tokens == 6 * 8 * 16
    steps = [1, 2, 3, 4, 5, 6] if log_every_steps == 1 else [2, 4, 6]
    expected = [line for line in metrics_of(finished) if line["step"] in steps]
    assert metrics_of(out) == expected
    assert layout.finished_steps(out) == [2, 4, 6]
    assert not list(out.glob("*tmp*"))


@pytest.mark.parametrize("has_configuration", [False, True])
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    has_configuration, finished, jittery, cache_path, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    for name in (*JSON_FILES, "train_config.json")[: 4 if has_configuration else 3]:
        shutil.copy(finished / name, out / name)
    if has_configuration:
        shutil.copy(finished / "metrics.jsonl", out / "metrics.jsonl")
    train(jittery, cache=cache_path, out=out, quiet=True)
    assert_same_results(finished, out)


@pytest.mark.parametrize("keep_optimizer_state", [True, False])
def test_a_run_killed_before_its_summary_is_finished_without_another_step(
    keep_optimizer_state, jittery, cache_path, tmp_path
):
    config = dataclasses.replace(jittery, keep_optimizer_state=keep_optimizer_state)
    out = tmp_path / "out"
    first = train(config, cache=cache_path, out=out, quiet=True)
    summary = read_json(out / "train_summary.json")
    has_state = any(name.startswith("state/param_states") for name in arrays_of(out))
    assert has_state == keep_optimizer_state
    (out / "train_summary.json").unlink()
    second = train(config, cache=cache_path, out=out, quiet=True)
    assert (second.step, second.tokens, second.metrics) == (6, first.tokens, first.metrics)
    again = read_json(out / "train_summary.json")
    assert {**again, "seconds_of_last_call": 0} == {**summary, "seconds_of_last_call": 0}


def test_a_finished_run_is_refused(finished, jittery, cache_path):
    before = listing(finished)
    with pytest.raises(InputError, match=r"must not exist yet, got a finished run in .*finished"):
        train(jittery, cache=cache_path, out=finished, quiet=True)
    assert listing(finished) == before


def test_another_configuration_does_not_go_on_with_a_run(finished, jittery, cache_path, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "train_summary.json").unlink()
    before = listing(out)
    for change in ({"seed": 4}, {"batch_size": 16}, {"num_steps": 7}):
        other = dataclasses.replace(jittery, **change)
        with pytest.raises(
            InputError, match=r"the configuration it began with.*train_config\.json"
        ):
            train(other, cache=cache_path, out=out, quiet=True)
    assert listing(out) == before


def test_a_directory_of_something_else_is_refused_untouched(
    finished, jittery, cache_path, tmp_path
):
    vocabulary = TokenCache.open(cache_path).manifest["vocabulary"]
    pruned = tmp_path / "pruned"
    with CheckpointStore(
        pruned,
        model_config=jittery.model,
        provenance={"created_by": "prune"},
        vocabulary=vocabulary,
    ) as store:
        store.save(0, init_params(jittery.model, 0))
    other = tmp_path / "notes"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(InputError, match=r"got .*pruned which holds a checkpoint of"):
        train(jittery, cache=cache_path, out=pruned, quiet=True)
    with pytest.raises(
        InputError, match=r"must be new, empty or hold .*notes without model_config"
    ):
        train(jittery, cache=cache_path, out=other, quiet=True)
    assert listing(tmp_path) == before


def test_only_the_last_checkpoints_stay(jittery, cache_path, tmp_path):
    config = dataclasses.replace(jittery, save_every_steps=1, max_to_keep=2)
    train(config, cache=cache_path, out=tmp_path / "out", stop_after_step=4, quiet=True)
    assert layout.finished_steps(tmp_path / "out") == [3, 4]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint_*")} == {
        "checkpoint_3",
        "checkpoint_4",
    }


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(jittery, cache_path, tmp_path):
    # Finite parameters whose products are not.
    params = jax.tree.map(lambda leaf: leaf + 1e30, init_params(jittery.model, 0))
    with CheckpointStore(
        tmp_path / "huge",
        model_config=jittery.model,
        provenance={"created_by": "test"},
        vocabulary=TokenCache.open(cache_path).manifest["vocabulary"],
    ) as store:
        store.save(0, params)
    # Not due to be logged before the end, but to be saved at step 2.
    config = dataclasses.replace(jittery, log_every_steps=100)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"must stay finite, got (nan|inf) at step 2 of .*out:"):
        train(config, cache=cache_path, out=out, initial_checkpoint=tmp_path / "huge", quiet=True)
    assert layout.finished_steps(out) == []
    assert read_json_lines(out / "metrics.jsonl") == []
    assert not is_finished(out)


def test_a_router_warm_up_begins_with_a_checkpoint_and_changes_routers_alone(
    finished, jittery, cache_path, tmp_path
):
    config = dataclasses.replace(jittery, model=None, trainable="router", num_steps=2)
    out = tmp_path / "out"
    train(config, cache=cache_path, out=out, initial_checkpoint=finished, quiet=True)
    before, after = arrays_of(finished), arrays_of(out)
    names = {name for name in before if name.startswith("target/")}
    changed = {name for name in names if not np.array_equal(before[name], after[name])}
    assert changed == {"target/layers_0/moe/router/kernel"}
    provenance = layout.resolve(out).provenance()
    assert provenance["source"]["fingerprint"] == layout.fingerprint(finished)
    assert provenance["source"]["provenance"]["token_cache"]["task"] == "text"
    assert load_model(out).config == jittery.model
    # The optimizer began fresh, in its warm-up.
    assert read_json_lines(out / "metrics.jsonl")[0]["learning_rate"] == 0.0


@pytest.mark.slow
def test_experts_divided_among_devices_train_the_same_losses(config, cache_path, tmp_path):
    divided = dataclasses.replace(config, expert_partitions=4, model_partitions=2)
    for name, each in (("one", config), ("other", divided)):
        train(each, cache=cache_path, out=tmp_path / name, quiet=True)
    for one, other in zip(
        metrics_of(tmp_path / "one"), metrics_of(tmp_path / "other"), strict=True
    ):
        for name in ("loss", "cross_entropy", "gradient_norm", "tokens"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.fixture
def refused(cache_path, tmp_path) -> Callable[..., None]:
    """Returns refused(config, message, **arguments): nothing may be written."""

    def check(config: TrainConfig, message: str, **arguments: Any) -> None:
        before = listing(tmp_path)
        arguments = {"cache": cache_path, "out": tmp_path / "out", "quiet": True, **arguments}
        with pytest.raises(InputError, match=message) as raised:
            train(config, **arguments)
        assert len(str(raised.value).splitlines()) == 1
        assert listing(tmp_path) == before

    return check


def test_a_stage_needs_an_architecture(config, refused):
    message = "needs an architecture, got neither config.model nor a checkpoint: bind"
    refused(dataclasses.replace(config, model=None), message)


def test_a_model_other_than_the_checkpoint_s_is_refused(finished, config, refused):
    message = r"config\.model must be that of the initial checkpoint, got another than .*leave"
    refused(config, message, initial_checkpoint=finished)


def test_an_output_in_an_object_store_is_refused(config, refused):
    message = "must be on a file system that all processes share, got gs://bucket/out: mount"
    refused(config, message, out="gs://bucket/out")


def test_a_missing_checkpoint_or_cache_is_refused(config, refused, tmp_path):
    refused(config, "existing directory, got .*none", initial_checkpoint=tmp_path / "none")
    refused(config, r"must hold manifest\.json, got .*none", cache=tmp_path / "none")


def test_a_cache_of_another_vocabulary_is_refused(finished, jittery, cache_path, refused, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(finished, other)
    vocabulary = json.loads((other / "vocabulary.json").read_text())
    (other / "vocabulary.json").write_text(json.dumps({**vocabulary, "hash": "f" * 64}))
    config = dataclasses.replace(jittery, model=None)
    message = r"must use the model's vocabulary, got bytes .*\(ffffffffffff\)"
    refused(config, message, initial_checkpoint=other)


def test_a_vocabulary_larger_than_the_model_s_is_refused(config, model, refused):
    small = dataclasses.replace(model, vocab_size=100)
    message = r"vocab_size must be at least the vocabulary's size, got 100 for bytes with 259"
    refused(dataclasses.replace(config, model=small), message)


@pytest.mark.parametrize(
    ("length", "max_length"), [(8, 16), (32, 16), (None, 8)], ids=["short", "long", "no-room"]
)
def test_rows_must_fit_the_length_and_the_length_the_model(
    length, max_length, config, model, refused
):
    model = dataclasses.replace(model, max_length=max_length)
    config = dataclasses.replace(config, model=model, length=length)
    message = f"Rows of up to 16 tokens must fit length={length or 8} and .*max_length={max_length}"
    refused(config, re.sub(r"\.\*", ".*", message))


def test_router_training_of_a_dense_model_is_refused(config, model, refused):
    dense = dataclasses.replace(model, num_experts=(0, 0))
    config = dataclasses.replace(config, model=dense, trainable="router")
    refused(config, 'trainable="router" needs a model with experts, got a dense one')


def test_a_batch_that_the_devices_cannot_divide_is_refused(config, refused):
    config = dataclasses.replace(config, batch_size=12)
    refused(config, r"batch_size must be a multiple of data \* expert partitions, got 12 on 8")


def test_partitions_that_do_not_fit_the_devices_are_refused(config, refused):
    refused(dataclasses.replace(config, expert_partitions=3), r"got 3 \* 1 on 8 devices")


def test_a_negative_seed_is_refused(config, refused):
    refused(dataclasses.replace(config, seed=-1), "start_step and seed must be >= 0, got 0 and -1")
