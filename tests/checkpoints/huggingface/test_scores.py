"""Imported models on token caches: scores and statistics against what transformers said."""

from __future__ import annotations

import numpy as np
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.data.cache_writer import CacheWriter
from uncurl_jax.data.huggingface_vocabulary import HuggingFaceVocabulary
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.calibration import calibrate_checkpoint
from uncurl_jax.evaluation.layerwise_calibration import calibrate_layer_by_layer
from uncurl_jax.evaluation.rank_classification import score_rows

PROMPT = 5


def make_cache(directory, path, tokens):
    """The recorded rows, of which the tokens after the fifth are scored."""
    writer = CacheWriter(directory / "cache", HuggingFaceVocabulary(path))
    for place, row in enumerate(tokens):
        writer.add_row(row, prompt_length=PROMPT, example=place)
    writer.finish(
        {
            "task": "recorded",
            "split": "train",
            "kind": "language_modeling",
            "max_length": tokens.shape[1],
            "metrics": [],
            "primary_metric": "",
            "sources": [],
        }
    )
    return TokenCache.open(directory / "cache")


def test_log_likelihoods_without_a_bos_are_those_of_transformers(
    reference, make_directory, tmp_path
):
    expected = reference("qwen2_moe")
    path = make_directory("qwen2_moe", has_bos=False)
    cache = make_cache(tmp_path, path, expected.tokens)
    batches = cache.sequential_batches(3, length=16)
    scores = score_rows(
        load_model(f"hf:{path}"),
        ((batch, np.arange(3)) for batch in batches),
        num_rows=3,
        target_length=cache.target_length,
        quiet=True,
    )
    logits = expected.logits.astype(np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.arange(PROMPT, expected.tokens.shape[1])
    by_hand = [
        sum(log_probability[row, place - 1, expected.tokens[row, place]] for place in places)
        for row in range(3)
    ]
    np.testing.assert_allclose(scores.log_likelihood, by_hand, atol=1e-3)
    np.testing.assert_array_equal(scores.num_tokens, len(places))


@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_statistics_layer_by_layer_of_a_directory_are_those_of_the_model(
    name, reference, make_directory, tmp_path
):
    path = make_directory(name)
    cache = make_cache(tmp_path, path, reference(name).tokens)
    both = [
        calibrate(f"hf:{path}", cache, out=tmp_path / f"{calibrate.__name__}.npz", quiet=True)
        for calibrate in (calibrate_checkpoint, calibrate_layer_by_layer)
    ]
    assert both[0].manifest["checkpoint_hash"] == both[1].manifest["checkpoint_hash"]
    assert both[0].layers.keys() == both[1].layers.keys()
    for layer in both[0].layers:
        for first, second in zip(both[0].layers[layer], both[1].layers[layer], strict=True):
            if first is not None:
                np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_tokenizer_is_refused(reference, make_directory, tmp_path):
    path = make_directory("mixtral", has_bos=False)
    cache = make_cache(tmp_path, path, reference("mixtral").tokens)
    other = make_directory("mixtral", has_bos=True)
    with pytest.raises(InputError, match="A token cache must use the model's vocabulary"):
        calibrate_layer_by_layer(f"hf:{other}", cache, out=tmp_path / "s.npz", quiet=True)
    (other / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        calibrate_layer_by_layer(f"hf:{other}", cache, out=tmp_path / "s.npz", quiet=True)
