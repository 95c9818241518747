"""Evaluating a checkpoint: files, losses by hand, matching of generated text, refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.evaluator import evaluate_checkpoint, evaluate_model, match_option
from uncurl_jax.models.decoder import Decoder

BYTES = load_vocabulary("bytes")


@pytest.fixture(scope="module")
def evaluated(checkpoint, caches, tmp_path_factory):
    """Rank classification on all eight devices, as the command line does it."""
    out = tmp_path_factory.mktemp("metrics") / "new" / "metrics.json"
    summary = evaluate_checkpoint(
        checkpoint, caches["entailment"], out=out, examples_per_batch=3, quiet=True
    )
    return out, summary


def test_metrics_file_says_what_was_measured_and_on_what(evaluated, checkpoint, caches):
    out, summary = evaluated
    assert json.loads(out.read_text()) == summary
    assert (summary["task"], summary["split"]) == ("synthetic_entailment", "validation")
    low, high = summary["interval"]
    assert 0 <= low <= summary["score"] <= high <= 100
    assert summary["metrics"] == {"accuracy": summary["score"]}
    assert summary["num_examples"] == 11 == sum(summary["prediction_counts"].values())
    assert summary["fraction_tokens_left_behind"] == 0.0
    assert summary["settings"] == {
        "mode": "rank",
        "is_length_normalized": False,
        # Three, rounded up to the eight devices.
        "examples_per_batch": 8,
        "eval_capacity_factor": None,
    }
    assert summary["checkpoint"] == {
        "path": str(layout.resolve(checkpoint)),
        "step": 3,
        "fingerprint": layout.fingerprint(checkpoint),
        "num_experts": [4, 4],
    }
    assert summary["token_cache_hash"] == caches["entailment"].hash
    assert summary["device"] == {"kind": jax.devices()[0].device_kind, "count": 8}
    assert summary["versions"]["jax"] == jax.__version__


def test_predictions_file_has_a_line_per_example_that_the_score_follows_from(evaluated, caches):
    out, summary = evaluated
    lines = (out.parent / "metrics.predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    examples = caches["entailment"].examples()
    assert [row["idx"] for row in rows] == [example.idx for example in examples]
    for row, example in zip(rows, examples, strict=True):
        assert row["label"] == example.label
        assert len(row["log_likelihoods"]) == len(example.options)
        assert row["prediction"] == int(np.argmax(row["log_likelihoods"]))
        assert row["predicted_text"] == example.options[row["prediction"]]
    right = [row["prediction"] == row["label"] for row in rows]
    assert summary["score"] == pytest.approx(100 * np.mean(right))


def test_eight_devices_predict_what_one_device_predicts(evaluated, model, caches):
    out, _ = evaluated
    lines = (out.parent / "metrics.predictions.jsonl").read_text().splitlines()
    alone = evaluate_model(model, caches["entailment"], examples_per_batch=8, quiet=True)
    for line, expected in zip(lines, alone.predictions, strict=True):
        row = json.loads(line)
        assert row["prediction"] == expected["prediction"]
        np.testing.assert_allclose(row["log_likelihoods"], expected["log_likelihoods"], rtol=1e-5)


def test_loss_on_plain_text_is_the_mean_over_tokens(model, caches):
    cache = caches["corpus"]
    result = evaluate_model(model, cache, examples_per_batch=4, quiet=True)
    apply = jax.jit(lambda tokens: Decoder(model.config).apply({"params": model.params}, tokens))
    losses = []
    for row in range(cache.num_rows):
        targets = np.asarray(cache.tokens[cache.offsets[row] : cache.offsets[row + 1]], int)
        inputs = np.zeros((1, len(targets)), np.int32)
        inputs[0, 1:] = targets[:-1]
        logits = np.asarray(apply(inputs), np.float64)[0]
        log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += (-log_probability[np.arange(len(targets)), targets]).tolist()
    loss = np.mean(losses)
    summary = result.summary
    assert summary["score"] == pytest.approx(loss, rel=1e-5)
    assert summary["metrics"]["cross_entropy"] == summary["score"]
    assert summary["metrics"]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert summary["num_tokens"] == len(losses)
    assert summary["num_examples"] == cache.num_rows
    assert summary["interval"][0] < loss < summary["interval"][1]
    assert summary["settings"]["mode"] == "loss"
    assert result.predictions == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", 0),
        (" yes. ", 0),
        ("NO!", 1),
        ("no way", 2),
        ("No way, sir", 2),
        ("no, never", 1),
        ("not at all", -1),
        ("maybe", -1),
        ("", -1),
        ("yes-no", 0),
    ],
)
def test_a_generated_text_matches_an_option_by_hand(text, expected):
    """Case and punctuation do not count; whole words from the start; the longest option wins."""
    assert match_option(text, ("Yes", "No", "No way")) == expected


def test_an_option_of_punctuation_alone_matches_no_longer_text():
    assert match_option("anything", ("?", "thing")) == -1


def test_of_two_options_that_read_the_same_the_first_is_taken():
    assert match_option("a b c", ("A b!", "a B")) == 0


def test_generated_text_is_matched_and_scored(checkpoint, caches, tmp_path):
    out = tmp_path / "generated.json"
    cache = caches["entailment"]
    summary = evaluate_checkpoint(
        checkpoint,
        cache,
        out=out,
        mode="generate",
        examples_per_batch=4,
        max_new_tokens=60,
        quiet=True,
    )
    lines = (tmp_path / "generated.predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == summary["num_examples"] == 11
    for row, example in zip(rows, cache.examples(), strict=True):
        assert row["prediction"] == match_option(row["text"], example.options)
    assert summary["num_unmatched"] == sum(row["prediction"] == -1 for row in rows)
    right = [row["prediction"] == row["label"] for row in rows]
    assert summary["score"] == pytest.approx(100 * np.mean(right))
    lengths = [len(cache.prompt(index)) for index in range(11)]
    # 60 of 96 positions are for new tokens: the prompts that are longer than 36 lost their begin.
    assert summary["num_shortened_prompts"] == sum(length > 36 for length in lengths) > 0
    assert summary["settings"]["max_new_tokens"] == 60


def refused(message, checkpoint, cache, tmp_path, **arguments):
    out = tmp_path / "refused" / "metrics.json"
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate_checkpoint(checkpoint, cache, out=out, quiet=True, **arguments)
    assert not out.parent.exists()


def test_an_unknown_mode_is_refused(checkpoint, caches, tmp_path):
    message = 'mode must be "rank" or "generate", got \'ranking\''
    refused(message, checkpoint, caches["choice"], tmp_path, mode="ranking")


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_no_examples_in_a_batch_are_refused(mode, checkpoint, caches, tmp_path):
    message = "examples_per_batch must be at least 1, got 0"
    refused(message, checkpoint, caches["choice"], tmp_path, mode=mode, examples_per_batch=0)


@pytest.mark.parametrize("count", [0, 96])
def test_impossible_numbers_of_new_tokens_are_refused(count, checkpoint, caches, tmp_path):
    message = f"max_new_tokens must be at least 1 and below max_length=96, got {count}"
    refused(message, checkpoint, caches["choice"], tmp_path, mode="generate", max_new_tokens=count)


def test_generation_on_plain_text_is_refused(checkpoint, caches, tmp_path):
    message = "Generation needs a task with prompts, got the plain text synthetic_corpus"
    refused(message, checkpoint, caches["corpus"], tmp_path, mode="generate")


@pytest.mark.parametrize("name", ["metrics.json", "metrics.predictions.jsonl"])
def test_neither_output_is_overwritten(name, checkpoint, caches, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"must not exist yet, got .*{name}"):
        evaluate_checkpoint(checkpoint, caches["choice"], out=tmp_path / "metrics.json")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_another_vocabulary_than_the_caches_is_refused(
    config, model, caches, tmp_path, save_checkpoint
):
    directory = save_checkpoint(tmp_path / "other", config, jax.device_get(model.params))
    record = json.loads((directory / "vocabulary.json").read_text())
    (directory / "vocabulary.json").write_text(json.dumps({**record, "hash": "f" * 64}))
    message = "A token cache must use the model's vocabulary, got bytes"
    refused(message, directory, caches["choice"], tmp_path)


def test_rows_longer_than_the_model_are_refused(
    config, caches, tmp_path, save_checkpoint, zero_params
):
    short = dataclasses.replace(config, max_length=40)
    directory = save_checkpoint(tmp_path / "short", short, zero_params(short))
    refused("Rows must fit the model's max_length=40", directory, caches["choice"], tmp_path)


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_nan_in_a_parameter_is_named_with_its_expert(
    mode, config, model, caches, tmp_path, save_checkpoint
):
    params = jax.tree.map(np.array, jax.device_get(model.params))
    params["layers_0"]["moe"]["experts"]["wi"][2, 0, 0] = np.nan
    directory = save_checkpoint(tmp_path / "nan", config, params)
    message = "layers_0/moe/experts/wi expert 2 (1 values)"
    refused(message, directory, caches["choice"], tmp_path, mode=mode, max_new_tokens=2)


def test_activations_that_overflow_with_finite_parameters_are_an_error_of_the_program(
    config, model, caches, tmp_path, save_checkpoint
):
    params = jax.tree.map(np.array, jax.device_get(model.params))
    params["token_embedder"]["embedding"] *= 1e30
    directory = save_checkpoint(tmp_path / "huge", config, params)
    with pytest.raises(RuntimeError, match="Log-likelihoods must be finite, got NaN or infinity"):
        evaluate_checkpoint(directory, caches["choice"], out=tmp_path / "m.json", quiet=True)


def test_a_split_without_labels_is_refused_before_the_model_runs(checkpoint, tmp_path):
    data = tmp_path / "data" / "SyntheticTopic"
    data.mkdir(parents=True)
    (data / "val.jsonl").write_text(json.dumps({"text": "the sailor", "idx": 0}) + "\n")
    build_token_cache(
        "synthetic_topic",
        vocabulary="bytes",
        out=tmp_path / "cache",
        max_length=64,
        data_dir=tmp_path / "data",
        splits=("validation",),
    )
    cache = TokenCache.open(tmp_path / "cache" / "validation")
    message = "A metric needs labelled examples, got example 0 without a label"
    refused(message, checkpoint, cache, tmp_path)


def test_generation_needs_a_vocabulary(checkpoint, caches):
    with pytest.raises(InputError, match="Generation needs a vocabulary to decode with"):
        evaluate_model(load_model(checkpoint), caches["choice"], mode="generate", quiet=True)


def test_dropless_evaluation_overrides_the_capacity_of_the_model(
    config, model, caches, tmp_path, save_checkpoint
):
    tight = dataclasses.replace(config, eval_capacity_factor=0.25)
    directory = save_checkpoint(tmp_path / "tight", tight, jax.device_get(model.params))
    cache = caches["entailment"]
    drops = [
        evaluate_checkpoint(
            directory, cache, out=tmp_path / f"{flag}.json", is_dropless=flag, quiet=True
        )
        for flag in (False, True)
    ]
    assert drops[0]["fraction_tokens_left_behind"] > 0.05
    assert drops[0]["settings"]["eval_capacity_factor"] == 0.25
    assert drops[1]["fraction_tokens_left_behind"] == 0.0
    assert drops[1]["settings"]["eval_capacity_factor"] is None
