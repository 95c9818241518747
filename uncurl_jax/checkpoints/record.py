"""The three JSON files beside the steps of a checkpoint directory, as one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from uncurl_jax.artifacts import PARTIAL_SUFFIX
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

    def check_directory(self, directory: epath.Path) -> bool:
        """Checks that steps may be saved in a directory; returns whether it is new.

        Raises:
          InputError: If it holds something else, or steps of another model or vocabulary.
        """
        if not directory.exists():
            return True
        # Killed before model_config.json was written, `write` leaves nothing but these.
        first = {layout.VOCABULARY_FILE, layout.PROVENANCE_FILE}
        if directory.is_dir() and all(
            entry.name in first or entry.name.endswith(PARTIAL_SUFFIX)
            for entry in directory.iterdir()
        ):
            return True
        if not (directory / layout.MODEL_CONFIG_FILE).exists():
            raise InputError(
                "A checkpoint directory must be new, empty or hold checkpoints of the same model, "
                f"got {directory} without {layout.MODEL_CONFIG_FILE}: choose another directory."
            )
        self._check_same(directory)
        return False

    def _check_same(self, directory: epath.Path) -> None:
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
