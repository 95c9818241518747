"""Vocabularies: text to token ids and back, with one convention for padding.

Id 0 is padding (SeqIO's convention): it starts each decoder input and fills rows up. Tokenizers of
Hugging Face have conventions of their own, see `huggingface_vocabulary`. Nothing is downloaded; a
vocabulary is "bytes" or files that the caller names.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError

PAD_ID = 0

_GPT2_END_OF_TEXT = "<|endoftext|>"


class Vocabulary(abc.ABC):
    """Maps text to ids in [0, size) and back; id 0 fills rows up.

    Attributes:
      name: "bytes" or the name of the vocabulary's file, for people.
      spec: what `load_vocabulary` needs to load it again.
      size: number of ids; embedding tables have at least that many rows.
      eos_id: id that ends a document or an answer.
      bos_id: id that decoder inputs begin with, so that the first token of a row can be predicted;
        None where the model knows no such id and sees rows from their second token on.
      hash: SHA-256 of the content; two vocabularies with one hash encode alike.
    """

    name: str
    spec: str
    size: int
    eos_id: int
    bos_id: int | None = PAD_ID
    hash: str

    @property
    def pad_id(self) -> int:
        """The id that rows are filled with, 0 in every vocabulary."""
        return PAD_ID

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an end-of-text id."""

    def encode_after_space(self, text: str) -> list[int]:
        """Returns the ids of `text` as they are where a space stands before it."""
        return self.encode(f" {text}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text; faster than one call per text where that is possible."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Returns the text of ids that stand for text and hold no end-of-text id."""

    def _is_text(self, token: int) -> bool:
        return PAD_ID < token < self.size

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text up to the first end-of-text id; padding and unknown ids are left out."""
        kept = []
        for token in ids:
            token = int(token)
            if token == self.eos_id:
                break
            if self._is_text(token):
                kept.append(token)
        return self._decode(kept)

    def describe(self) -> dict[str, Any]:
        """Returns {"name", "spec", "size", "hash"}, what manifests and checkpoints record."""
        return {"name": self.name, "spec": self.spec, "size": self.size, "hash": self.hash}

    def __eq__(self, other: object) -> bool:
        """Whether both encode alike."""
        return isinstance(other, Vocabulary) and self.hash == other.hash

    def __hash__(self) -> int:
        """Hash consistent with equality."""
        return hash(self.hash)

    def __repr__(self) -> str:
        """A line for people."""
        return f"{type(self).__name__}(spec={self.spec!r}, size={self.size})"


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: id = byte + 3, with padding 0, end of text 1 and unknown 2 (as ByT5)."""

    _OFFSET = 3

    def __init__(self) -> None:
        """Needs nothing."""
        self.name = "bytes"
        self.spec = "bytes"
        self.size = 256 + self._OFFSET
        self.eos_id = 1
        self.hash = artifacts.sha256_of_json({"kind": "bytes", "offset": self._OFFSET})

    def encode(self, text: str) -> list[int]:
        """Returns one id per UTF-8 byte."""
        return [byte + self._OFFSET for byte in text.encode("utf-8")]

    def _decode(self, ids: list[int]) -> str:
        data = bytes(token - self._OFFSET for token in ids if token >= self._OFFSET)
        return data.decode("utf-8", errors="replace")


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model file with padding at id 0 (T5's layout: pad 0, eos 1, unk 2)."""

    def __init__(self, path: str | Path) -> None:
        """Loads the model.

        Raises:
          InputError: If the file is missing, is no SentencePiece model, or lacks padding at id 0
            or an end-of-text id.
        """
        path = Path(path)
        _require_file(path)
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise InputError(
                f"A .model vocabulary must be a SentencePiece model, got {path} ({error}): "
                f"check --vocabulary."
            ) from None
        if self._processor.pad_id() != PAD_ID or self._processor.eos_id() < 0:
            raise InputError(
                f"A SentencePiece vocabulary must have padding at id 0 and an end-of-text id, got "
                f"pad {self._processor.pad_id()} and eos {self._processor.eos_id()} in {path}: "
                f"train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1."
            )
        self.name = path.name
        self.spec = str(path)
        self.size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        self.hash = artifacts.sha256_of_file(path)
        self._anchor: list[int] = self._processor.encode("a")

    def encode(self, text: str) -> list[int]:
        """Returns the piece ids; most models put a space before the first word themselves."""
        return self._processor.encode(text)

    def encode_after_space(self, text: str) -> list[int]:
        """Returns the ids of `text` after a word and a space.

        Models differ in whether they add, keep or strip a leading space, so a word stands before.
        """
        ids = self.encode(f"a {text}")
        num_anchor = len(self._anchor)
        return ids[num_anchor:] if ids[:num_anchor] == self._anchor else self.encode(f" {text}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, on several threads."""
        return self._processor.encode(list(texts), num_threads=-1) if texts else []

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class Gpt2Vocabulary(Vocabulary):
    """GPT-2's byte-level BPE from its two published files, with padding at id 0.

    GPT-2 gives id 0 to the piece "!". Here that piece moves to the first free id (50257 for the
    published files), so that id 0 is padding and the size is one more (50258). A pretrained
    embedding table is adapted by copying row 0 to a new last row. The end of text stays
    "<|endoftext|>" (50256), and that string in a text is encoded as plain characters.
    """

    def __init__(self, encoder_json: str | Path, vocab_bpe: str | Path) -> None:
        """Loads the two files.

        Raises:
          InputError: If a file is missing or is not of that format.
        """
        encoder_json, vocab_bpe = Path(encoder_json), Path(vocab_bpe)
        _require_file(encoder_json)
        _require_file(vocab_bpe)
        pieces = _read_pieces(encoder_json)
        self._processor: Any = _byte_level_bpe(pieces, vocab_bpe)
        self._moved_id = len(pieces)
        self.name = encoder_json.name
        self.spec = f"{encoder_json},{vocab_bpe}"
        self.size = len(pieces) + 1
        self.eos_id = pieces[_GPT2_END_OF_TEXT]
        self.hash = artifacts.sha256_of_json(
            {
                "kind": "gpt2",
                "encoder": artifacts.sha256_of_file(encoder_json),
                "merges": artifacts.sha256_of_file(vocab_bpe),
                "id_0_moved_to": self._moved_id,
            }
        )

    def encode(self, text: str) -> list[int]:
        """Returns the piece ids; white space is kept exactly."""
        return self._move(self._processor.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, on several threads."""
        encodings = self._processor.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._move(encoding.ids) for encoding in encodings]

    def _move(self, ids: list[int]) -> list[int]:
        return [token or self._moved_id for token in ids]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode([0 if token == self._moved_id else token for token in ids])


def load_vocabulary(spec: str) -> Vocabulary:
    """Loads a vocabulary from its spec.

    Args:
      spec: "bytes"; the path of a SentencePiece file ending in .model; a directory that holds
        tokenizer.json (Hugging Face), or encoder.json and vocab.bpe (GPT-2); or those two paths
        joined by a comma.

    Returns:
      The vocabulary; its `.spec` loads it again.

    Raises:
      InputError: If the spec is none of these or a file is missing or malformed.
    """
    if spec == "bytes":
        return ByteVocabulary()
    if spec.endswith(".model"):
        return SentencePieceVocabulary(spec)
    if "," in spec:
        paths = [part.strip() for part in spec.split(",")]
        if len(paths) == 2:
            return Gpt2Vocabulary(*paths)
    elif (Path(spec) / "tokenizer.json").is_file():
        from uncurl_jax.data.huggingface_vocabulary import HuggingFaceVocabulary

        return HuggingFaceVocabulary(spec)
    elif Path(spec).is_dir():
        return Gpt2Vocabulary(Path(spec) / "encoder.json", Path(spec) / "vocab.bpe")
    raise InputError(
        'A vocabulary must be "bytes", a .model file, a directory with tokenizer.json or with '
        'encoder.json and vocab.bpe, or "encoder.json,vocab.bpe", got '
        f"{spec!r}: check --vocabulary."
    )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"A vocabulary file must exist, got {path}: check --vocabulary.")


def _read_pieces(path: Path) -> dict[str, int]:
    """Reads encoder.json: piece to id, ids 0..n-1."""
    try:
        pieces = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must hold JSON, got {error}: use GPT-2's encoder.json.") from None
    is_mapping = isinstance(pieces, dict) and all(type(i) is int for i in pieces.values())
    if not is_mapping or sorted(pieces.values()) != list(range(len(pieces))):
        raise InputError(
            f"{path} must map each piece to one id of 0..n-1: use GPT-2's encoder.json."
        )
    if not pieces.get(_GPT2_END_OF_TEXT):
        raise InputError(
            f"{path} must hold the piece {_GPT2_END_OF_TEXT} at an id above 0: "
            f"use GPT-2's encoder.json."
        )
    return pieces


def _byte_level_bpe(pieces: dict[str, int], vocab_bpe: Path) -> Any:
    """Builds the `tokenizers` pipeline of GPT-2 from its pieces and merges."""
    import tokenizers

    lines = vocab_bpe.read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bad = next((merge for merge in merges if len(merge) != 2), None)
    if bad is not None:
        raise InputError(
            f"{vocab_bpe} must hold two pieces per line, got {' '.join(bad)!r}: "
            f"use GPT-2's vocab.bpe."
        )
    try:
        model = tokenizers.models.BPE(vocab=pieces, merges=merges)
    except Exception as error:  # The Rust binding raises bare Exception for a merge not in vocab.
        raise InputError(
            f"{vocab_bpe} must belong to the pieces of encoder.json, got {error}: "
            f"use the two files of one model."
        ) from None
    pipeline: Any = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = tokenizers.decoders.ByteLevel()
    return pipeline
