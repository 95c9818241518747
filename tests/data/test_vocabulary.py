"""Tests of vocabulary.py."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from uncurl_jax.data.vocabulary import (
    ByteVocabulary,
    Gpt2Vocabulary,
    SentencePieceVocabulary,
    load_vocabulary,
)
from uncurl_jax.errors import InputError

CORPUS = ["the cat sat on the mat", "a dog ran to the cat", "no or yes", "maybe the dog sat"]


def write_sentencepiece(path, **options):
    stream = io.BytesIO()
    train: Any = sentencepiece.SentencePieceTrainer.train
    defaults = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
        **(defaults | options),
    )
    path.write_bytes(stream.getvalue())
    return path


def write_gpt2(directory, pieces=None, merges=("h i", "Ġ hi")):
    names = ["!", "h", "i", "Ġ", "hi", "Ġhi", "<|endoftext|>", *"<|endoftx>"]
    names = list(dict.fromkeys(names)) if pieces is None else pieces
    (directory / "encoder.json").write_text(json.dumps({p: i for i, p in enumerate(names)}))
    text = "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges)
    (directory / "vocab.bpe").write_text(text, encoding="utf-8")
    return directory


def test_bytes_are_shifted_by_three():
    vocabulary = ByteVocabulary()
    assert vocabulary.encode("Hi é") == [75, 108, 35, 198, 172]  # 72+3, 105+3, 32+3, c3+3, a9+3
    assert vocabulary.encode_after_space("Hi") == [35, 75, 108]
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (259, 0, 1)


def test_decoding_stops_at_the_first_end_of_text_and_skips_padding():
    vocabulary = ByteVocabulary()
    assert vocabulary.decode([75, 0, 2, 108, 999, 1, 75]) == "Hi"


@given(st.text())
def test_bytes_round_trip(text):
    vocabulary = ByteVocabulary()
    if all(not 0xD800 <= ord(char) < 0xE000 for char in text):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_sentencepiece_model_round_trips_and_joins_as_one_text(tmp_path):
    path = write_sentencepiece(tmp_path / "tiny.model")
    vocabulary = load_vocabulary(str(path))
    joined = vocabulary.encode("the cat") + vocabulary.encode_after_space("sat")
    assert joined == vocabulary.encode("the cat sat")
    assert vocabulary.decode([*joined, vocabulary.eos_id, 5]) == "the cat sat"
    assert (vocabulary.name, vocabulary.size, vocabulary.eos_id) == ("tiny.model", 40, 1)
    assert vocabulary.encode_batch(CORPUS) == [vocabulary.encode(text) for text in CORPUS]
    assert vocabulary.encode_batch([]) == []


def test_a_sentencepiece_model_without_its_own_space_gets_one(tmp_path):
    path = write_sentencepiece(tmp_path / "tiny.model", add_dummy_prefix=False)
    vocabulary = SentencePieceVocabulary(path)
    joined = vocabulary.encode("the cat") + vocabulary.encode_after_space("sat")
    assert joined == vocabulary.encode("the cat sat")


def test_a_sentencepiece_model_must_have_padding_at_zero(tmp_path):
    path = write_sentencepiece(tmp_path / "bad.model", pad_id=-1, unk_id=0, eos_id=1)
    with pytest.raises(InputError, match="must have padding at id 0"):
        load_vocabulary(str(path))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "bad.model"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="must be a SentencePiece model"):
        load_vocabulary(str(path))


def test_gpt2_moves_the_piece_at_id_zero_to_the_end(tmp_path):
    vocabulary = load_vocabulary(str(write_gpt2(tmp_path)))
    num_pieces = len(json.loads((tmp_path / "encoder.json").read_text()))
    # "hi" is piece 4, " hi" piece 5, "!" moves from 0 to the first free id.
    assert vocabulary.encode("hi hi!") == [4, 5, num_pieces]
    assert vocabulary.decode([4, 5, num_pieces, vocabulary.eos_id, 4]) == "hi hi!"
    assert (vocabulary.size, vocabulary.eos_id) == (num_pieces + 1, 6)
    assert vocabulary.encode_batch(["hi", "!"]) == [[4], [num_pieces]]
    assert vocabulary.encode_after_space("hi") == [5]


def test_the_end_of_text_string_in_a_text_is_plain_text(tmp_path):
    vocabulary = Gpt2Vocabulary(*(write_gpt2(tmp_path) / n for n in ("encoder.json", "vocab.bpe")))
    ids = vocabulary.encode("<|endoftext|>")
    assert vocabulary.eos_id not in ids and vocabulary.decode(ids) == "<|endoftext|>"


def test_two_paths_load_the_same_vocabulary_as_their_directory(tmp_path):
    write_gpt2(tmp_path)
    pair = load_vocabulary(f"{tmp_path / 'encoder.json'},{tmp_path / 'vocab.bpe'}")
    directory = load_vocabulary(str(tmp_path))
    assert pair == directory and hash(pair) == hash(directory)
    assert load_vocabulary(directory.spec) == pair
    assert pair != ByteVocabulary()
    assert pair.describe() == {
        "name": "encoder.json",
        "spec": pair.spec,
        "size": pair.size,
        "hash": pair.hash,
    }


@pytest.mark.parametrize(
    ("pieces", "merges", "message"),
    [
        (["!", "h", "i"], (), "must hold the piece <\\|endoftext\\|>"),
        (["<|endoftext|>", "h"], (), "at an id above 0"),
        (None, ("h i x",), "must hold two pieces per line, got 'h i x'"),
        (None, ("q q",), "must belong to the pieces of encoder.json"),
    ],
)
def test_malformed_gpt2_files_are_refused(tmp_path, pieces, merges, message):
    write_gpt2(tmp_path, pieces, merges)
    with pytest.raises(InputError, match=message):
        load_vocabulary(str(tmp_path))


def test_an_encoder_with_gaps_or_no_json_is_refused(tmp_path):
    write_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(InputError, match=r"must map each piece to one id of 0\.\.n-1"):
        load_vocabulary(str(tmp_path))
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(InputError, match="must hold JSON"):
        load_vocabulary(str(tmp_path))


def test_unknown_specs_and_missing_files_are_refused(tmp_path):
    for spec in ("byte", "a,b,c"):
        with pytest.raises(InputError, match='A vocabulary must be "bytes"'):
            load_vocabulary(spec)
    for spec in (str(tmp_path / "no.model"), str(tmp_path), "no,files"):
        with pytest.raises(InputError, match="A vocabulary file must exist"):
            load_vocabulary(spec)


def test_importing_the_data_package_imports_no_framework():
    modules = (
        "vocabulary tasks superglue jsonl_task metrics language_modeling token_cache cache_writer "
        "cache_builder synthetic registry seqio_tasks seqio_vocabulary"
    )
    code = (
        "import importlib, sys\n"
        f"for name in {modules.split()!r}: importlib.import_module('uncurl_jax.data.' + name)\n"
        "heavy = {'jax', 'tensorflow', 'seqio', 'gin', 'flax', 'orbax', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
