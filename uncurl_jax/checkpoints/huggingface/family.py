"""What a model family is: how its config.json and its tensors' names translate to ours.

A new family is one more `Family` in `families.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError

_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a parameter of ours, or one expert of it, is in a tensor of theirs.

    The part of the tensor, transposed if `is_transposed` (a PyTorch Linear is [out, in]) and
    reshaped, is the parameter.

    Attributes:
      parameter: name of ours, for example "layers_0/attention/query/kernel".
      tensor: name of theirs.
      shape: of the whole tensor.
      expert: which expert of the parameter; None for parameters that have no expert axis.
      part: of the tensor; () is all of it.
      is_transposed: whether its last two axes are exchanged.
    """

    parameter: str
    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    part: tuple[slice, ...] = ()
    is_transposed: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part, before it is transposed."""
        if not self.part:
            return self.shape
        slices = (*self.part, *(slice(None) for _ in self.shape[len(self.part) :]))
        pairs = zip(slices, self.shape, strict=True)
        return tuple(len(range(*part.indices(size))) for part, size in pairs)


class HfConfig:
    """Reads fields of a config.json; what is missing or wrong becomes one sentence."""

    def __init__(self, values: Mapping[str, Any], where: str):
        """Takes the parsed file and its name for messages."""
        self.values = values
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is, `default` if it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """Returns a positive integer."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise self.refuse(name, "a positive integer", "download the file again")
        return value

    def number(self, name: str, default: float) -> float:
        """Returns a number that is not negative."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise self.refuse(name, "a number of at least 0", "download the file again")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns a truth value."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.refuse(name, "true or false", "download the file again")
        return value

    def require(self, name: str, allowed: tuple[Any, ...], remedy: str) -> None:
        """Refuses a field that is given and has none of the allowed values."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise self.refuse(name, " or ".join(map(repr, (*allowed, None))), remedy)

    def refuse(self, name: str, rule: str, remedy: str) -> InputError:
        """Returns the error for a field that breaks `rule`."""
        got = repr(self.values.get(name))
        return InputError(
            f"{name} must be {rule}, got {got if len(got) < 80 else got[:80] + '...'} in "
            f"{self.where}: {remedy}."
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share one architecture in transformers.

    Attributes:
      model_type: of config.json.
      architecture: the class that its architectures names.
      to_model_config: HfConfig, the longest sequence wanted (None for the model's own) -> ours.
        InputError for what our model cannot express.
      to_hf_config: ours -> the fields of config.json that describe it. InputError for what
        config.json cannot express.
      entries: where every parameter is, in the names that checkpoints on the hub have.
      other_entries: other names that the family's checkpoints may have; read, never written.
      ignored: end of names of tensors that are no parameters, such as buffers.
      aliases: names of tensors that checkpoints may have beside the token embedding, and that must
        be equal to it; read, never written.
    """

    model_type: str
    architecture: str
    to_model_config: Callable[[HfConfig, int | None], ModelConfig]
    to_hf_config: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], Iterator[Entry]]
    other_entries: tuple[Callable[[ModelConfig], Iterator[Entry]], ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
