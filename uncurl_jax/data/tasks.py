"""What a task is: examples with a prompt and options, read from files, and how they are scored.

Pure Python. A task is scored by ranking its options: the model's answer to an example is the
option with the largest log-likelihood after the prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uncurl_jax.errors import InputError

Metric = Callable[[Sequence["Example"], Sequence[int]], dict[str, float]]

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with a choice of answers.

    Prompt and option are joined by one space and encoded apart (`vocabulary.encode(prompt)`, then
    `vocabulary.encode_after_space(option)`), so the prompt's tokens do not depend on the option.

    Attributes:
      prompt: text that the model reads; neither starts nor ends with white space.
      options: texts that the model chooses from.
      label: index of the right option (the first of several); None if it is not known.
      idx: the example's number in its data set (SuperGLUE's `idx`), not its place in the file.
      group: key of examples that belong together (MultiRC: paragraph and question); () if alone.
      targets: texts accepted as right; one for most tasks, several for ReCoRD.
      extra: anything else that a metric or a report needs; JSON-compatible.
    """

    prompt: str
    options: tuple[str, ...]
    label: int | None
    idx: int
    group: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def correct_options(self) -> tuple[int, ...]:
        """Indices of the options that count as right, ascending; () if that is not known."""
        return tuple(
            index
            for index, option in enumerate(self.options)
            if index == self.label or option in self.targets
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-compatible dict; `from_dict` reads it back."""
        return {
            "idx": self.idx,
            "group": list(self.group),
            "label": self.label,
            "targets": list(self.targets),
            "options": list(self.options),
            "prompt": self.prompt,
            "extra": self.extra,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Example:
        """Builds an example from `to_dict`'s output."""
        return cls(
            prompt=values["prompt"],
            options=tuple(values["options"]),
            label=values["label"],
            idx=values["idx"],
            group=tuple(values["group"]),
            targets=tuple(values["targets"]),
            extra=dict(values["extra"]),
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """A named set of examples and the way they are scored.

    Attributes:
      name: unique name, also of the SeqIO task.
      splits: "train" and "validation" to a file, relative to the data directory.
      read_file: yields the examples of one file, in the file's order.
      metrics: functions (examples, predicted options) -> {name: percent}.
      primary_metric: the name of the value that is the task's score, or "mean" for the mean of
        all values (SuperGLUE's convention where a task has two).
      options: the options of every example, or None if each example has its own.
    """

    name: str
    splits: Mapping[str, str]
    read_file: Callable[[Path], Iterator[Example]]
    metrics: tuple[Metric, ...]
    primary_metric: str
    options: tuple[str, ...] | None = None

    def source_files(self, data_dir: str | Path, split: str) -> tuple[Path, ...]:
        """Returns the files that `read` reads.

        Raises:
          InputError: If the task has no such split or the file is missing.
        """
        path = Path(data_dir) / split_file(self.name, self.splits, split)
        if not path.is_file():
            raise InputError(
                f"Task {self.name} needs the file {path} for its {split} split, which does not "
                f"exist: check the data directory."
            )
        return (path,)

    def read(self, data_dir: str | Path, split: str) -> Iterator[Example]:
        """Yields the examples of a split, in the file's order.

        Raises:
          InputError: If the split or its file is missing, or a row is malformed (file and line).
        """
        for path in self.source_files(data_dir, split):
            yield from self.read_file(path)


def split_file(task: str, splits: Mapping[str, str], split: str) -> str:
    """Returns the file of `split`, or raises InputError naming the splits there are."""
    if split not in splits:
        raise InputError(
            f"Task {task} has the splits {', '.join(sorted(splits))}, got {split!r}: choose one."
        )
    return splits[split]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a data set with the place it was read from, for errors.

    Attributes:
      values: field name to value.
      where: "file:line", or another place that a person can find.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, field: str, *, strip: bool = True) -> str:
        """Returns a string field, without white space around it unless `strip` is False."""
        value = self._typed(field, str, "a string")
        return value.strip() if strip else value

    def integer(self, field: str) -> int:
        """Returns an integer field; true and false do not count as integers."""
        value = self._typed(field, int, "an integer")
        if isinstance(value, bool):
            raise self.error(field, "an integer", value)
        return value

    def items(self, field: str) -> list[Any]:
        """Returns a list field."""
        return self._typed(field, list, "a list")

    def row(self, field: str) -> Row:
        """Returns a nested object as a row."""
        return Row(self._typed(field, dict, "an object"), self.where)

    def rows(self, field: str) -> list[Row]:
        """Returns a list of nested objects as rows."""
        values = self.items(field)
        bad = next((value for value in values if not isinstance(value, dict)), None)
        if bad is not None:
            raise self.error(field, "a list of objects", bad)
        return [Row(value, self.where) for value in values]

    def label(self, classes: Sequence[Any], field: str = "label") -> int | None:
        """Returns the index of the label in `classes`, or None if the row has no label.

        Raises:
          InputError: If the label is none of the classes.
        """
        if field not in self.values:
            return None
        value = self.values[field]
        for index, known in enumerate(classes):
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return index
        raise self.error(field, " or ".join(json.dumps(known) for known in classes), value)

    def error(self, field: str, rule: str, value: Any) -> InputError:
        """Returns the error for a field whose value breaks `rule`."""
        return InputError(
            f"{self.where}: field {field!r} must be {rule}, got {_shorten(value)}: correct the row."
        )

    def _typed(self, field: str, kind: type, rule: str) -> Any:
        if field not in self.values:
            raise InputError(
                f"{self.where}: a row must have the field {field!r}, got only "
                f"{sorted(self.values)}: add it."
            )
        value = self.values[field]
        if not isinstance(value, kind):
            raise self.error(field, rule, value)
        return value


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSONL file; blank lines are left out.

    Raises:
      InputError: If a line is not a JSON object, naming file and line.
    """
    with Path(path).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{where} must hold one JSON object, got {error}: correct the line."
                ) from None
            if not isinstance(values, dict):
                raise InputError(
                    f"{where} must hold one JSON object, got {_shorten(values)}: correct the line."
                )
            yield Row(values, where)


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
