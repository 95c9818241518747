from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from uncurl_jax.data.cache_writer import CacheWriter, encode_example
from uncurl_jax.data.huggingface_vocabulary import HuggingFaceVocabulary
from uncurl_jax.data.tasks import Example
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError

SETTINGS = {"eos_token": "</s>"}


def save(directory: Path, tokenizer: Any, settings: Any = SETTINGS, **files: Any) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def words(*, has_bos: bool = False) -> Any:
    """Ids: the 0, <s> 1, </s> 2, cat 3, sat 4."""
    ids = {word: place for place, word in enumerate(("the", "<s>", "</s>", "cat", "sat"))}
    tokenizer: Any = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


def byte_level() -> Any:
    """GPT-2's and Qwen's kind: a space belongs to the word after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: place for place, piece in enumerate([*alphabet, "Ġc", "at", "</s>"])}
    tokenizer: Any = tokenizers.Tokenizer(models.BPE(ids, [("Ġ", "c"), ("a", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_like() -> Any:
    """Mixtral's kind: a space is put before the first word too."""
    ids = {piece: place for place, piece in enumerate(("<unk>", "</s>", "▁", "a", "c", "t", "▁c"))}
    tokenizer: Any = tokenizers.Tokenizer(models.BPE(ids, [("▁", "c")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def test_texts_become_ids_and_texts_again(tmp_path):
    vocabulary = load_vocabulary(str(save(tmp_path, words())))
    assert isinstance(vocabulary, HuggingFaceVocabulary)
    assert vocabulary.encode("the cat sat") == [0, 3, 4]
    assert vocabulary.encode_batch(["cat", "sat the"]) == [[3], [4, 0]]
    assert (vocabulary.size, vocabulary.eos_id) == (5, 2)
    # Id 0 is a word here, and what follows the end of the text is none.
    assert vocabulary.decode([0, 3, 4, 2, 3]) == "the cat sat"
    assert vocabulary.describe()["name"] == "tokenizer.json"
    assert load_vocabulary(vocabulary.spec) == vocabulary


@pytest.mark.parametrize(("make", "expected"), [(byte_level, " cat"), (sentencepiece_like, None)])
def test_a_text_after_a_space_is_encoded_as_within_a_text(make, expected, tmp_path):
    vocabulary = HuggingFaceVocabulary(save(tmp_path, make()))
    ids = vocabulary.encode_after_space("cat")
    assert vocabulary.encode("a") + ids == vocabulary.encode("a cat")
    if expected is not None:
        assert ids == vocabulary.encode(expected)
    else:
        assert ids != vocabulary.encode(" cat")


@pytest.mark.parametrize(
    ("settings", "has_bos", "files", "bos_id"),
    [
        ({}, False, {}, None),
        ({}, True, {}, 1),
        ({"bos_token": "<s>"}, False, {}, None),
        ({"bos_token": "<s>", "add_bos_token": True}, False, {}, 1),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, False, {}, 1),
        ({"bos_token": "<s>", "add_bos_token": False}, True, {}, None),
        ({}, False, {"config": {"decoder_start_token_id": 0}}, 0),
    ],
)
def test_what_begins_a_row_is_the_tokenizers_to_say(settings, has_bos, files, bos_id, tmp_path):
    directory = save(tmp_path, words(has_bos=has_bos), SETTINGS | settings, **files)
    assert HuggingFaceVocabulary(directory).bos_id == bos_id


@pytest.mark.parametrize(
    ("settings", "files", "eos_id"),
    [
        ({"eos_token": {"content": "sat"}}, {"config": {"eos_token_id": 2}}, 4),
        ({}, {"config": {"eos_token_id": 2}}, 2),
        ({}, {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [3, 2]}}, 3),
    ],
)
def test_what_ends_a_text_is_found_in_its_order(settings, files, eos_id, tmp_path):
    assert HuggingFaceVocabulary(save(tmp_path, words(), settings, **files)).eos_id == eos_id


def test_vocabularies_that_begin_rows_otherwise_are_different(tmp_path):
    first = HuggingFaceVocabulary(save(tmp_path / "a", words()))
    settings = SETTINGS | {"bos_token": "<s>", "add_bos_token": True}
    second = HuggingFaceVocabulary(save(tmp_path / "b", words(), settings))
    assert first != second
    assert first == HuggingFaceVocabulary(save(tmp_path / "c", words()))


@pytest.mark.parametrize(
    ("settings", "files", "sentence"),
    [
        ({"eos_token": "</S>"}, {}, r'got eos_token "</S>" that is no token'),
        ({}, {}, "needs a token that ends a text, got none"),
        ({}, {"config": {"eos_token_id": 9}}, "needs a token that ends a text"),
        ([], {}, "must hold a JSON object"),
    ],
)
def test_tokenizers_whose_files_disagree_are_refused(settings, files, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        HuggingFaceVocabulary(save(tmp_path, words(), settings, **files))


def test_damaged_and_missing_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="must be a tokenizer of the tokenizers library"):
        HuggingFaceVocabulary(tmp_path)
    with pytest.raises(InputError, match="A vocabulary file must exist"):
        HuggingFaceVocabulary(tmp_path / "nowhere")


def write_rows(directory: Path, vocabulary: Any) -> TokenCache:
    """Two rows: prompt "cat", option "sat", end; and one with a prompt of two words."""
    writer = CacheWriter(directory / "cache", vocabulary)
    for number, prompt in enumerate(("cat", "the cat")):
        example = Example(prompt, ("sat",), 0, number)
        writer.add_example(example, encode_example(example, vocabulary, 8))
    writer.finish(
        {
            "task": "t",
            "split": "train",
            "kind": "rank_classification",
            "max_length": 8,
            "metrics": [],
            "primary_metric": "",
            "sources": [],
        }
    )
    return TokenCache.open(directory / "cache")


def test_rows_with_a_bos_begin_with_it(tmp_path):
    vocabulary = HuggingFaceVocabulary(save(tmp_path / "v", words(has_bos=True)))
    cache = write_rows(tmp_path, vocabulary)
    assert cache.bos_id == 1
    (batch,) = cache.sequential_batches(2, length=5)
    np.testing.assert_array_equal(batch.inputs, [[1, 3, 4, 2, 0], [1, 0, 3, 4, 2]])
    np.testing.assert_array_equal(batch.targets, [[3, 4, 2, 0, 0], [0, 3, 4, 2, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_rows_without_a_bos_begin_with_their_first_token(tmp_path):
    vocabulary = HuggingFaceVocabulary(save(tmp_path / "v", words()))
    cache = write_rows(tmp_path, vocabulary)
    assert cache.bos_id is None
    (batch,) = cache.sequential_batches(3, length=4)
    np.testing.assert_array_equal(batch.inputs, [[3, 4, 2, 0], [0, 3, 4, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[4, 2, 0, 0], [3, 4, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])


def test_caches_of_other_vocabularies_say_nothing_of_a_bos(tmp_path):
    from uncurl_jax.data.vocabulary import ByteVocabulary

    cache = write_rows(tmp_path, ByteVocabulary())
    assert "bos_id" not in cache.manifest
    assert cache.bos_id == 0


def test_options_need_something_before_them(tmp_path):
    vocabulary = HuggingFaceVocabulary(save(tmp_path, words()))
    with pytest.raises(InputError, match="got an empty prompt in example 7"):
        encode_example(Example("", ("sat",), 0, 7), vocabulary, 8)
    with pytest.raises(InputError, match="must fit into max_length=2"):
        encode_example(Example("cat", ("sat",), 0, 7), vocabulary, 2)
    assert encode_example(Example("the cat", ("sat",), 0, 7), vocabulary, 3).prompt == [3]
