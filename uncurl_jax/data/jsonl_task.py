"""A task of the caller's own: a JSONL file, a prompt template and a list of options."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uncurl_jax.data import metrics
from uncurl_jax.data.tasks import TRAIN, VALIDATION, Example, Row, Task, read_jsonl
from uncurl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class JsonlTask:
    """Describes a task on JSONL files; a gin file can fill it.

    Example: rows {"text": "Great fun.", "stars": 1} with

        JsonlTask(
            name="reviews", train_file="train.jsonl", validation_file="val.jsonl",
            template="Review: {text} Good or bad?", options=("Bad", "Good"), label_field="stars",
        )

    Attributes:
      name: unique name of letters, digits and "_".
      train_file: relative to the data directory.
      validation_file: relative to the data directory; "" if there is none.
      template: prompt with {field} for a field of the row; {{ and }} stand for braces. Put what
        matters most at the end: long rows lose text from the left.
      options: the same options for every row; or
      options_field: the field that lists a row's own options.
      label_field: the right answer: an option's index, its text, true/false for two options, or a
        list of accepted texts.
      idx_field: an integer field that numbers the rows; "" to count them from 0.
      metrics: names of metrics (`metrics.get_metric`).
      primary_metric: the value that is the score, or "mean" for the mean of all.
    """

    name: str
    train_file: str
    validation_file: str
    template: str
    options: tuple[str, ...] = ()
    options_field: str = ""
    label_field: str = "label"
    idx_field: str = ""
    metrics: tuple[str, ...] = ("accuracy",)
    primary_metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Checks everything that needs no file."""
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.name or not self.name.replace("_", "a").isalnum():
            raise InputError(
                f"A task's name must consist of letters, digits and _, got {self.name!r}."
            )
        if bool(self.options) == bool(self.options_field):
            raise InputError(
                f"Task {self.name} must have either options or options_field, got "
                f"options={self.options} and options_field={self.options_field!r}."
            )
        if any(not isinstance(option, str) or not option.strip() for option in self.options):
            raise InputError(
                f"Options of task {self.name} must be texts that are not empty, got {self.options}."
            )
        template_fields(self.template)
        for metric in self.metrics:
            metrics.get_metric(metric)

    def to_task(self) -> Task:
        """Returns the task; register it to use it by name."""
        files = {TRAIN: self.train_file, VALIDATION: self.validation_file}
        return Task(
            name=self.name,
            splits={split: file for split, file in files.items() if file},
            read_file=self.read_file,
            metrics=tuple(metrics.get_metric(name) for name in self.metrics),
            primary_metric=self.primary_metric,
            options=self.options or None,
        )

    def read_file(self, path: Path) -> Iterator[Example]:
        """Yields the examples of a file.

        Raises:
          InputError: If a row lacks a field of the template or its label is no option, naming
            file and line.
        """
        fields = template_fields(self.template)
        for number, row in enumerate(read_jsonl(path)):
            values = {field: _text_of(row, field) for field in fields}
            options = self._options_of(row)
            label, targets = self._label_of(row, options)
            yield Example(
                prompt=self.template.format(**values).strip(),
                options=options,
                label=label,
                idx=row.integer(self.idx_field) if self.idx_field else number,
                targets=targets,
            )

    def _options_of(self, row: Row) -> tuple[str, ...]:
        if self.options:
            return self.options
        options = row.items(self.options_field)
        if not options or any(not isinstance(text, str) or not text.strip() for text in options):
            raise row.error(self.options_field, "a list of texts that are not empty", options)
        return tuple(text.strip() for text in options)

    def _label_of(self, row: Row, options: tuple[str, ...]) -> tuple[int | None, tuple[str, ...]]:
        if self.label_field not in row.values:
            return None, ()
        value: Any = row.values[self.label_field]
        if isinstance(value, list):
            right = [i for i, option in enumerate(options) if option in value]
            if right and all(isinstance(text, str) for text in value):
                return right[0], tuple(value)
        elif isinstance(value, str) and value.strip() in options:
            return options.index(value.strip()), (value.strip(),)
        elif isinstance(value, bool) and len(options) == 2:
            return int(value), (options[value],)
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
            return value, (options[value],)
        rule = f"the text or index of one of the options {list(options)}"
        raise row.error(self.label_field, rule, value)


def template_fields(template: str) -> tuple[str, ...]:
    """Returns the field names of a template, in order of first use.

    Raises:
      InputError: If braces do not match or hold anything but a field's name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"A template must have matching braces, got {template!r} ({error}): "
            f"write {{{{ and }}}} for literal braces."
        ) from None
    fields: dict[str, None] = {}
    for _, field, format_spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or format_spec or conversion:
            raise InputError(
                f"A template must hold plain field names in braces, got {template!r}: "
                f"write {{text}} for the field text."
            )
        fields[field] = None
    if not fields:
        raise InputError(
            f"A template must use at least one field of the row, got {template!r}: add {{field}}."
        )
    return tuple(fields)


def _text_of(row: Row, field: str) -> str:
    """Returns a field as text; numbers are written out."""
    if isinstance(row.values.get(field), int | float) and not isinstance(row.values[field], bool):
        return str(row.values[field])
    return row.text(field)
