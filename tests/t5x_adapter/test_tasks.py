"""Token caches as SeqIO tasks: the rows and the metrics of our own runner."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import seqio

from uncurl_jax.data.seqio_vocabulary import from_seqio_vocabulary
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import tasks
from uncurl_jax.t5x_adapter.features import RowConverter


def features(name: str, split: str) -> list[dict[str, np.ndarray]]:
    """The rows of a split as T5X gets them, in order."""
    lengths = tasks.feature_lengths(name)
    dataset = seqio.get_dataset(
        name,
        task_feature_lengths=lengths,
        dataset_split=split,
        shuffle=False,
        feature_converter=RowConverter(tasks.row_length(name)),
    )
    return list(dataset.as_numpy_iterator())


def assert_same_rows(found: list[dict[str, np.ndarray]], batch) -> None:
    assert len(found) == len(batch.targets)
    for row, values in enumerate(found):
        np.testing.assert_array_equal(values["decoder_input_tokens"], batch.inputs[row])
        np.testing.assert_array_equal(values["decoder_target_tokens"], batch.targets[row])
        np.testing.assert_array_equal(values["decoder_loss_weights"], batch.weights[row])
        np.testing.assert_array_equal(values["decoder_target_tokens"] != 0, batch.mask[row])


@pytest.mark.parametrize(("split", "rows"), [("train", "targets"), ("validation", "all")])
def test_rows_are_those_of_the_cache(split, rows, topic_cache):
    name = tasks.token_cache_task(str(topic_cache))
    cache = TokenCache.open(topic_cache / split)
    found = features(name, split)
    length = tasks.row_length(name) or 0
    (batch,) = cache.sequential_batches(len(found), length=length, rows=rows)
    assert len(found) == (cache.num_target_rows if rows == "targets" else cache.num_rows)
    assert_same_rows(found, batch)


def test_rows_of_text_are_those_of_the_cache(text_cache):
    name = tasks.token_cache_task(str(text_cache))
    cache = TokenCache.open(text_cache / "train")
    found = features(name, "train")
    (batch,) = cache.sequential_batches(len(found), length=64)
    assert_same_rows(found, batch)


def test_rows_carry_their_text_for_what_t5x_writes(topic_cache, validation):
    name = tasks.token_cache_task(str(topic_cache))
    row = next(
        seqio.get_mixture_or_task(name)
        .get_dataset(tasks.feature_lengths(name), "validation", shuffle=False)
        .as_numpy_iterator()
    )
    example = validation.examples()[0]
    assert row["inputs_pretokenized"].decode() == example.prompt
    assert row["targets_pretokenized"].decode().strip() == example.options[0]
    assert row["idx"].tolist() == [0, 0]


def evaluate(name: str, scores: np.ndarray) -> dict[str, float]:
    lengths = tasks.feature_lengths(name)
    evaluator: Any = seqio.Evaluator(
        name, RowConverter(tasks.row_length(name)), "validation", sequence_length=lengths
    )

    def score(dataset):
        return [(int(place), float(scores[place])) for place, _ in dataset.as_numpy_iterator()]

    future, _ = evaluator.evaluate(compute_metrics=True, step=0, score_fn=score)
    values = future.result()[name]
    evaluator.close()
    return {key: float(value) for key, value in values.items()}


def test_the_evaluator_of_seqio_gives_the_metrics_of_the_cache(topic_cache, validation):
    scores = np.random.default_rng(0).standard_normal(validation.num_rows) + validation.is_target
    found = evaluate(tasks.token_cache_task(str(topic_cache)), scores)
    predictions = validation.predictions(scores)
    assert found == validation.score().values(validation.examples(), predictions)
    assert 0 < found["accuracy"] < 100


def test_text_is_scored_by_its_loss_per_token(text_cache):
    cache = TokenCache.open(text_cache / "validation")
    scores = -np.arange(1.0, cache.num_rows + 1)
    found = evaluate(tasks.token_cache_task(str(text_cache)), scores)
    assert found["cross_entropy"] == pytest.approx(-scores.sum() / (64 * cache.num_rows))
    assert found["perplexity"] == pytest.approx(np.exp(found["cross_entropy"]))


def test_a_cache_has_one_name_and_its_own_vocabulary(topic_cache):
    name = tasks.token_cache_task(str(topic_cache))
    assert tasks.token_cache_task(str(topic_cache)) == name
    assert name.startswith("synthetic_topic_")
    assert from_seqio_vocabulary(tasks.vocabulary(name)) == ByteVocabulary()


def test_one_split_may_stand_alone(topic_cache):
    name = tasks.token_cache_task(str(topic_cache / "validation"))
    assert list(seqio.get_mixture_or_task(name).splits) == ["validation"]


def test_a_missing_cache_is_built_from_the_tasks_files_if_they_are_named(data_dir, tmp_path):
    def build(**given):
        build_token_cache("synthetic_topic", max_length=96, **given)

    with pytest.raises(InputError, match=r"must hold manifest\.json"):
        tasks.token_cache_task(str(tmp_path / "new"), build=build)
    name = tasks.token_cache_task(str(tmp_path / "new"), data_dir=str(data_dir), build=build)
    assert TokenCache.open(tmp_path / "new" / "train").num_target_rows > 0
    assert tasks.token_cache_task(str(tmp_path / "new")) == name


def test_what_a_task_lacks_is_named():
    with pytest.raises(InputError, match=r"CACHE must be set, got nothing: add --gin\.CACHE="):
        tasks.token_cache_task(None)
    with pytest.raises(InputError, match="must be a registered SeqIO task or mixture, got 'nix'"):
        tasks.vocabulary("nix")
    with pytest.raises(InputError, match="TASK_FEATURE_LENGTHS must be set for a task that is no"):
        tasks.feature_lengths("nix")
    assert tasks.row_length("nix") is None


def test_rows_that_a_model_cannot_read_are_refused(topic_cache):
    name = tasks.token_cache_task(str(topic_cache))
    longest = max(
        TokenCache.open(topic_cache / split).max_row_length for split in ("train", "validation")
    )
    tasks.check_fits(name, 96)
    with pytest.raises(InputError, match=rf"max_length=40, got up to {longest} tokens"):
        tasks.check_fits(name, 40)
    tasks.check_fits("a task of another origin", 1)


def test_rows_that_begin_otherwise_than_those_of_t5x_are_refused(topic_cache, tmp_path):
    """As token caches of Hugging Face's vocabularies do; here the manifest alone says so."""
    copy = shutil.copytree(topic_cache / "train", tmp_path / "train")
    manifest = json.loads((copy / "manifest.json").read_text())
    for bos_id, words in ((None, "their first token"), (5, "id 5")):
        (copy / "manifest.json").write_text(json.dumps({**manifest, "bos_id": bos_id, "hash": "0"}))
        with pytest.raises(InputError, match=f"that begin with {words}, as their vocabulary"):
            tasks.token_cache_task(str(copy))
