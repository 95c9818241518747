"""The three JSON files beside the steps of a checkpoint directory, as one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from uncurl_jax.checkpoints import layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_VOCABULARY_KEYS = frozenset({"name", "spec", "size", "hash"})


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint directory says about the arrays in it.

    Attributes:
      model_config: the architecture.
      provenance: JSON-compatible record of where the weights come from.
      vocabulary: {"name", "spec", "size", "hash"} of the tokeniser.
    """

    model_config: ModelConfig
    provenance: Mapping[str, Any]
    vocabulary: Mapping[str, Any]

    def __post_init__(self):
        if set(self.vocabulary) != _VOCABULARY_KEYS:
            raise InputError(
                f"A vocabulary record has the keys {sorted(_VOCABULARY_KEYS)}, got "
                f"{sorted(self.vocabulary)}."
            )

    def check_same(self, directory: epath.Path) -> None:
        """Checks that a directory is of the same model and vocabulary.

        Raises:
          InputError: If not, or if a file is missing.
        """
        expected = {
            layout.MODEL_CONFIG_FILE: self.model_config.to_dict(),
            layout.VOCABULARY_FILE: dict(self.vocabulary),
        }
        for name, values in expected.items():
            stored = layout.read_json_at(directory / name)
            if stored != values:
                differences = sorted(
                    key
                    for key in stored.keys() | values.keys()
                    if stored.get(key) != values.get(key)
                )
                raise InputError(
                    "A checkpoint directory must go on with the model and vocabulary it began "
                    f"with, got other values of {differences} than {directory / name}: choose "
                    "another directory."
                )

    def write(self, directory: epath.Path) -> None:
        """Writes the files; model_config.json last, because it marks the directory as ours."""
        files = {
            layout.VOCABULARY_FILE: dict(self.vocabulary),
            layout.PROVENANCE_FILE: dict(self.provenance),
            layout.MODEL_CONFIG_FILE: self.model_config.to_dict(),
        }
        for name, value in files.items():
            layout.write_json_at(directory / name, value)
