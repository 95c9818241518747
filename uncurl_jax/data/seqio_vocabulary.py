"""Our vocabularies behind SeqIO's interface, and SeqIO's as ours; imports TensorFlow lazily."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from uncurl_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from uncurl_jax.errors import InputError


def seqio_vocabulary(vocabulary: Vocabulary) -> Any:
    """Returns a `seqio.Vocabulary` with the ids of ours."""
    return _vocabulary_class()(vocabulary)


@functools.cache
def _vocabulary_class() -> type:
    """Defines the wrapper on first use, because its base class needs TensorFlow."""
    import seqio
    import tensorflow as tf

    class UncurlVocabulary(seqio.Vocabulary):
        """Our vocabulary behind SeqIO's interface."""

        def __init__(self, vocabulary: Vocabulary) -> None:
            super().__init__(extra_ids=0)
            self.vocabulary = vocabulary

        @property
        def bos_id(self) -> int:
            return self.vocabulary.pad_id

        @property
        def eos_id(self) -> int:
            return self.vocabulary.eos_id

        @property
        def unk_id(self) -> None:
            return None

        @property
        def _base_vocab_size(self) -> int:
            return self.vocabulary.size

        def _encode(self, s: str) -> list[int]:
            return self.vocabulary.encode(s)

        def _decode(self, ids: Sequence[int]) -> str:
            return self.vocabulary.decode(ids)

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: Any) -> np.ndarray:
                data = np.asarray(text, object).item()  # Bytes in a graph, a 0-d array eagerly.
                return np.array(self.vocabulary.encode(data.decode("utf-8")), np.int32)

            ids = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            def decode(rows: np.ndarray) -> np.ndarray:
                if rows.ndim == 1:
                    return np.array(self.vocabulary.decode(rows).encode("utf-8"), object)
                return np.array([self.vocabulary.decode(r).encode("utf-8") for r in rows], object)

            text = tf.numpy_function(decode, [ids], tf.string)
            text.set_shape(ids.shape[:-1])
            return text

        def __eq__(self, other: object) -> bool:
            return isinstance(other, UncurlVocabulary) and self.vocabulary == other.vocabulary

        def __hash__(self) -> int:
            return hash(self.vocabulary)

    return UncurlVocabulary


def from_seqio_vocabulary(vocabulary: Any) -> Vocabulary:
    """Returns our vocabulary with the ids of a `seqio.Vocabulary`.

    Raises:
      InputError: If it has extra ids or is of another kind than bytes, SentencePiece or ours.
    """
    import seqio

    if isinstance(vocabulary, _vocabulary_class()):
        return vocabulary.vocabulary
    if not vocabulary.extra_ids:
        if isinstance(vocabulary, seqio.ByteVocabulary):
            return ByteVocabulary()
        if isinstance(vocabulary, seqio.SentencePieceVocabulary):
            return SentencePieceVocabulary(vocabulary.sentencepiece_model_file)
    raise InputError(
        f"A SeqIO task for a token cache must use bytes, SentencePiece or this package's "
        f"vocabularies without extra ids, got {vocabulary}: change its output features."
    )
