"""Sampling, stopping and certain text of one row, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.serving.continuation import Continuation, Sampling

VOCABULARY = ByteVocabulary()


def logits_of(token: int) -> np.ndarray:
    return np.eye(VOCABULARY.size)[token] * 50


def feed(row: Continuation, text: str | bytes) -> list[str]:
    """Makes the row choose the bytes of a text; returns the certain text after each."""
    data = text.encode() if isinstance(text, str) else text
    seen = []
    for byte in data:
        row.choose(logits_of(byte + 3))
        seen.append(row.certain_text)
    return seen


def test_a_row_ends_at_an_end_of_text_or_after_max_tokens():
    row = Continuation([5, 6], Sampling(max_tokens=5), VOCABULARY)
    assert feed(row, "ab") == ["a", "ab"] and row.finish_reason is None
    row.choose(logits_of(VOCABULARY.eos_id))
    assert (row.finish_reason, row.text) == ("stop", "ab")
    # The model has read everything that it made.
    assert row.read_ids == [5, 6, *VOCABULARY.encode("ab")]
    row = Continuation([5], Sampling(max_tokens=2), VOCABULARY)
    feed(row, "ab")
    assert (row.finish_reason, row.text) == ("length", "ab")
    assert row.read_ids == [5, *VOCABULARY.encode("a")]


def test_text_ends_before_the_first_stop_and_no_piece_of_it_is_shown_before():
    row = Continuation([], Sampling(max_tokens=20, stop=("END", "NEVER")), VOCABULARY)
    # "EN" may begin END, "N" NEVER; neither has when another letter follows.
    assert feed(row, "xENxNE") == ["x", "x", "x", "xENx", "xENx", "xENx"]
    assert row.finish_reason is None
    assert feed(row, "ND") == ["xENxN", "xENxN"]
    assert (row.finish_reason, row.text) == ("stop", "xENxN")


def test_half_a_character_is_not_shown():
    row = Continuation([], Sampling(max_tokens=20), VOCABULARY)
    assert feed(row, "aé€") == ["a", "a", "aé", "aé", "aé", "aé€"]


def test_samples_follow_the_softmax_and_depend_on_seed_and_row_alone():
    logits = np.log(np.array([0.0 + 1e-9, 1e-9, 1e-9, 0.6, 0.3, 0.1]))

    def draws(seed, number=0, temperature=1.0):
        sampling = Sampling(max_tokens=4000, temperature=temperature, seed=seed)
        row = Continuation([], sampling, VOCABULARY, number)
        return [row.choose(logits) for _ in range(4000)]

    counts = np.bincount(draws(0), minlength=6)[3:] / 4000
    # Five standard errors.
    np.testing.assert_allclose(counts, [0.6, 0.3, 0.1], atol=5 * np.sqrt(0.25 / 4000))
    squared = np.array([0.36, 0.09, 0.01]) / 0.46
    counts = np.bincount(draws(0, temperature=0.5), minlength=6)[3:] / 4000
    np.testing.assert_allclose(counts, squared, atol=5 * np.sqrt(0.25 / 4000))
    assert draws(1) == draws(1)
    assert draws(1) != draws(2) and draws(1) != draws(1, number=1)


def test_logits_that_are_not_finite_are_a_failure():
    row = Continuation([], Sampling(max_tokens=2), VOCABULARY)
    with pytest.raises(RuntimeError, match="Logits must be finite"):
        row.choose(np.full(VOCABULARY.size, np.nan))
