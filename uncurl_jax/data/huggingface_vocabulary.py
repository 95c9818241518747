"""Tokenizers of Hugging Face checkpoints, read with the `tokenizers` library alone.

Such a vocabulary has no padding of its own at id 0: rows are filled with 0, which may also be a
piece of text, and what is filling is told from masks. What begins a row is the tokenizer's too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncurl_jax import artifacts
from uncurl_jax.data.vocabulary import Vocabulary
from uncurl_jax.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_MODEL_FILES = ("generation_config.json", "config.json")
# What is read beside tokenizer.json, where it is there.
SETTINGS_FILES = (_SETTINGS_FILE, *_MODEL_FILES)


class HuggingFaceVocabulary(Vocabulary):
    """tokenizer.json of a directory, with the ids that the files beside it begin and end texts by.

    Text is encoded as `transformers` does without special tokens, so that the names of special
    tokens in a text become those tokens.
    """

    def __init__(self, directory: str | Path) -> None:
        """Loads tokenizer.json, and tokenizer_config.json and config.json if they are there.

        Raises:
          InputError: If tokenizer.json is missing or damaged, no token ends a text, or more than
            one begins it.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise InputError(f"A vocabulary file must exist, got {path}: check --vocabulary.")
        self._processor: Any = _load(path)
        settings = _optional_json(directory / _SETTINGS_FILE)
        ids = self._processor.get_vocab(with_added_tokens=True)
        self.name = path.name
        self.spec = str(directory)
        self.size = max(ids.values(), default=-1) + 1
        self.eos_id = _eos_id(directory, settings, ids)
        self.bos_id = _bos_id(self._processor, directory, settings, ids)
        self.hash = artifacts.sha256_of_json(
            {
                "kind": "huggingface",
                "tokenizer": artifacts.sha256_of_file(path),
                "bos_id": self.bos_id,
                "eos_id": self.eos_id,
            }
        )
        self._anchor = self.encode("a")

    def encode(self, text: str) -> list[int]:
        """Returns the ids; some tokenizers put a space before the first word themselves."""
        return self._processor.encode(text, add_special_tokens=False).ids

    def encode_after_space(self, text: str) -> list[int]:
        """Returns the ids of `text` after a word and a space."""
        ids = self.encode(f"a {text}")
        count = len(self._anchor)
        return ids[count:] if ids[:count] == self._anchor else self.encode(f" {text}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, on several threads."""
        encodings = self._processor.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self.size

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids, skip_special_tokens=True)


def _load(path: Path) -> Any:
    import tokenizers

    try:
        processor = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The Rust binding raises bare Exception.
        raise InputError(
            f"{path} must be a tokenizer of the tokenizers library, got {error}: download it again."
        ) from None
    processor.no_truncation()
    processor.no_padding()
    return processor


def _optional_json(path: Path) -> dict[str, Any]:
    values = artifacts.read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object: download it again.")
    return values


def _token_id(
    name: str, directory: Path, settings: dict[str, Any], ids: dict[str, int]
) -> int | None:
    """Returns the id of a special token that the settings name, None if they name none."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    if token not in ids:
        raise InputError(
            f"{_SETTINGS_FILE} and {TOKENIZER_FILE} must be of one tokenizer, got {name} "
            f"{json.dumps(token)} that is no token in {directory}: download both again."
        )
    return ids[token]


def _eos_id(directory: Path, settings: dict[str, Any], ids: dict[str, int]) -> int:
    found = _token_id("eos_token", directory, settings, ids)
    for name in _MODEL_FILES if found is None else ():
        value = _optional_json(directory / name).get("eos_token_id")
        # Chat models may have several; the first one ends an answer.
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and found is None:
            found = value
    if found is None or not 0 <= found <= max(ids.values()):
        raise InputError(
            f"A tokenizer needs a token that ends a text, got none of its own in {directory}: set "
            f"eos_token in {_SETTINGS_FILE}."
        )
    return found


def _bos_id(
    processor: Any, directory: Path, settings: dict[str, Any], ids: dict[str, int]
) -> int | None:
    """Returns the id that a decoder's input begins with, None if it begins with the text."""
    start = _optional_json(directory / "config.json").get("decoder_start_token_id")
    if type(start) is int:
        return start
    named = _token_id("bos_token", directory, settings, ids)
    is_added = settings.get("add_bos_token")
    if is_added is not None:
        return named if is_added else None
    plain = processor.encode("a", add_special_tokens=False).ids
    whole = processor.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    before = whole[: starts[0]] if starts else whole
    if len(before) > 1:
        raise InputError(
            f"A tokenizer may put one token before a text, got {before} in {directory}: this "
            "tokenizer is of another kind of model."
        )
    return before[0] if before else None
