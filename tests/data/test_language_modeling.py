"""Tests of language_modeling.py."""

from __future__ import annotations

import gzip
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncurl_jax.data.language_modeling import (
    LanguageModelingTask,
    encode_documents,
    pack,
    read_documents,
)
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError

TEXT = "one\ntwo\n\n\nthree\r\n \nfour"


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_documents_are_separated_by_blank_lines(tmp_path, suffix, opener):
    path = tmp_path / f"text.txt{suffix}"
    with opener(path, "wb") as stream:
        stream.write(TEXT.encode())
    assert list(read_documents(path)) == ["one\ntwo", "three", "four"]


def test_three_documents_are_packed_into_rows_of_four():
    # Bytes + 3, each document followed by 1: a b 1 | c 1 | d e f 1 -> abbreviated stream of 9.
    documents = encode_documents(["ab", "c", "def"], ByteVocabulary())
    rows = [row.tolist() for row in pack(documents, 4)]
    assert rows == [[100, 101, 1, 102], [1, 103, 104, 105], [1]]


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), max_size=9), st.integers(1, 12)
)
def test_packing_keeps_every_token_in_order(documents, length):
    rows = list(pack(documents, length))
    stream = [token for document in documents for token in document]
    assert np.concatenate([*rows, []]).astype(int).tolist() == stream
    assert all(len(row) == length for row in rows[:-1])
    assert all(1 <= len(row) <= length for row in rows)


def test_more_documents_than_a_tokeniser_batch_are_all_encoded():
    encoded = list(encode_documents((str(i) for i in range(600)), ByteVocabulary()))
    assert len(encoded) == 600 and encoded[599] == [56, 60, 60, 1]


def test_a_row_needs_a_token():
    with pytest.raises(InputError, match="at least one token, got length 0"):
        list(pack([[1]], 0))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"\xff\xfe"),
        ("a.xz", b"no"),
        ("a.gz", b"no"),
        ("b.gz", gzip.compress(b"a" * 99)[:-9]),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"must be UTF-8, plain or whole \.gz or \.xz"):
        list(read_documents(tmp_path / name))


def test_a_missing_split_or_file_is_refused(tmp_path):
    task = LanguageModelingTask("text", "train.txt")
    assert dict(task.splits) == {"train": "train.txt"}
    with pytest.raises(InputError, match=r"needs the text file .*train\.txt for its train split"):
        list(task.read_documents(tmp_path, "train"))
    with pytest.raises(InputError, match="has the splits train, got 'validation'"):
        list(task.read_documents(tmp_path, "validation"))
