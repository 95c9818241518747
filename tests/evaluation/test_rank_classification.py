"""Scoring options in batches against scoring each by itself, on one device and on eight."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.evaluator import evaluate_model
from uncurl_jax.evaluation.rank_classification import (
    examples_that_divide,
    row_length,
    score_rows,
)
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.partitioning import make_mesh

LENGTH = 96


@pytest.fixture(scope="module")
def score_alone(model):
    """Returns (text of a prompt, text of an option) -> (log-likelihood, tokens), in float64."""
    apply = jax.jit(lambda tokens: Decoder(model.config).apply({"params": model.params}, tokens))
    vocabulary = load_vocabulary("bytes")

    def score(prompt: str, option: str) -> tuple[float, int]:
        given = vocabulary.encode(prompt)
        answer = [*vocabulary.encode(" " + option), vocabulary.eos_id]
        row = [0, *given, *answer]
        # Causal attention and dropless experts: what follows the row does not reach it.
        tokens = np.array([row + [7] * (LENGTH - len(row))], np.int32)
        logits = np.asarray(apply(tokens), np.float64)[0]
        log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(given), len(given) + len(answer))
        values = [log_probability[p, token] for p, token in zip(places, answer, strict=True)]
        return sum(values), len(answer)

    return score


@pytest.fixture(scope="module")
def scores(model, caches):
    """Returns (cache name, examples per batch) -> RowScores on one device."""

    def score(name: str, examples_per_batch: int):
        cache = caches[name]
        batches = cache.option_batches(examples_per_batch, length=LENGTH)
        return score_rows(
            model,
            batches,
            num_rows=cache.num_rows,
            target_length=cache.target_length,
            quiet=True,
        )

    return score


@pytest.mark.parametrize("name", ["entailment", "choice"])
def test_scores_equal_those_of_each_option_scored_by_itself(name, caches, scores, score_alone):
    got = scores(name, 4)
    expected = [
        score_alone(example.prompt, option)
        for example in caches[name].examples()
        for option in example.options
    ]
    np.testing.assert_allclose(got.log_likelihood, [s for s, _ in expected], rtol=1e-5)
    np.testing.assert_array_equal(got.num_tokens, [n for _, n in expected])
    assert got.fraction_tokens_left_behind == 0.0


@pytest.mark.parametrize("is_length_normalized", [False, True])
def test_predictions_are_the_best_options_of_the_reference(
    is_length_normalized, model, caches, score_alone
):
    cache = caches["choice"]
    expected = []
    for example in cache.examples():
        values = [score_alone(example.prompt, option) for option in example.options]
        best = [s / n if is_length_normalized else s for s, n in values]
        expected.append(int(np.argmax(best)))
    result = evaluate_model(
        model,
        cache,
        examples_per_batch=4,
        is_length_normalized=is_length_normalized,
        quiet=True,
    )
    assert [row["prediction"] for row in result.predictions] == expected
    right = [example.label for example in cache.examples()]
    accuracy = 100 * np.mean(np.array(expected) == right)
    assert result.summary["score"] == pytest.approx(accuracy)
    assert result.summary["settings"]["is_length_normalized"] is is_length_normalized


def test_normalising_by_length_changes_some_prediction(model, caches):
    """Otherwise the test above would not tell the two apart."""
    cache = caches["entailment"]
    plain, normalized = (
        evaluate_model(
            model, cache, examples_per_batch=4, is_length_normalized=flag, quiet=True
        ).predictions
        for flag in (False, True)
    )
    assert [r["prediction"] for r in plain] != [r["prediction"] for r in normalized]
    assert [r["log_likelihoods"] for r in plain] == [r["log_likelihoods"] for r in normalized]


def test_all_options_of_an_example_share_a_batch_and_every_row_comes_once(caches):
    cache = caches["entailment"]
    seen = []
    for batch, row_ids in cache.option_batches(4, length=LENGTH):
        rows = row_ids[row_ids >= 0]
        assert batch.inputs.shape == (4 * 3, LENGTH)
        for example in np.unique(cache.example[rows]):
            assert set(cache.rows_of(int(example))) <= set(rows.tolist())
        seen += rows.tolist()
    assert seen == list(range(cache.num_rows))


def test_scores_do_not_depend_on_the_batch_nor_on_its_filling(scores):
    small, large = scores("entailment", 4), scores("entailment", 16)
    np.testing.assert_allclose(small.log_likelihood, large.log_likelihood, rtol=1e-5)
    np.testing.assert_array_equal(small.num_tokens, large.num_tokens)


def test_padding_takes_no_slot_and_is_not_counted_as_left_behind(model, caches):
    cache = caches["entailment"]
    real_tokens = int(cache.offsets[-1])
    all_places = 16 * 3 * LENGTH

    def left_behind(num_slots: int) -> float:
        """With one batch, more than half of it padding, and so many slots per expert."""
        factor = 4 * num_slots / all_places
        config = dataclasses.replace(model.config, eval_capacity_factor=factor)
        batches = cache.option_batches(16, length=LENGTH)
        few = model._replace(config=config)
        return score_rows(
            few, batches, num_rows=cache.num_rows, quiet=True
        ).fraction_tokens_left_behind

    assert real_tokens < all_places / 2
    assert left_behind(real_tokens) == 0.0
    assert 0.05 < left_behind(real_tokens // 8) < 1.0


def test_scores_on_eight_devices_equal_those_on_one(checkpoint, caches, scores):
    cache = caches["entailment"]
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    sharded = load_model(checkpoint, mesh)
    size = examples_that_divide(3, mesh)
    assert size == 4
    batches = cache.option_batches(size, length=LENGTH)
    got = score_rows(sharded, batches, num_rows=cache.num_rows, quiet=True)
    expected = scores("entailment", 4)
    np.testing.assert_allclose(got.log_likelihood, expected.log_likelihood, rtol=1e-5)
    np.testing.assert_array_equal(got.num_tokens, expected.num_tokens)
    assert got.fraction_tokens_left_behind == 0.0


def test_a_batch_is_rounded_up_to_the_devices_that_hold_tokens():
    assert examples_that_divide(3, None) == 3
    assert examples_that_divide(3, make_mesh()) == 8
    assert examples_that_divide(9, make_mesh(model_partitions=2)) == 12


def test_rows_longer_than_the_model_are_refused(config, caches):
    short = dataclasses.replace(config, max_length=40)
    with pytest.raises(InputError, match="Rows must fit the model's max_length=40, got up to"):
        row_length(short, caches["entailment"])
    assert row_length(config, caches["entailment"]) <= 96
