"""SuperGLUE's eight tasks: official JSONL files or TFDS rows to examples with prompts.

Files are read as <data_dir>/<Task>/{train,val}.jsonl, as SuperGLUE publishes them. The wording
follows the style of arXiv 2409.01483 ("Given that ... Does it follow that ..."); the question
stands at the end of each prompt, because rows that are too long lose text from the left.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uncurl_jax.data import metrics
from uncurl_jax.data.tasks import TRAIN, VALIDATION, Example, Metric, Row, Task, read_jsonl
from uncurl_jax.errors import InputError

NO_YES = ("No", "Yes")
_FALSE_TRUE = (False, True)


def _labelled(
    prompt: str,
    options: tuple[str, ...],
    label: int | None,
    idx: int,
    group: tuple[int, ...] = (),
) -> Example:
    targets = () if label is None else (options[label],)
    return Example(prompt, options, label, idx, group, targets)


def _end(text: str) -> str:
    """Closes a sentence that has no final punctuation."""
    return text if text.endswith((".", "!", "?", '"', "'", ":", ";", ")")) else text + "."


def _ask(text: str) -> str:
    """Ends a clause with a question mark in place of its own final punctuation."""
    return text.rstrip(".!? ") + "?"


def _boolq(row: Row) -> Iterator[Example]:
    prompt = f"{_end(row.text('passage'))} Question: {_ask(row.text('question'))} Yes or no?"
    yield _labelled(prompt, NO_YES, row.label(_FALSE_TRUE), row.integer("idx"))


def _cb(row: Row) -> Iterator[Example]:
    prompt = (
        f"Given that {_end(row.text('premise'))} Does it follow that "
        f"{_ask(row.text('hypothesis'))} Yes, no, or maybe?"
    )
    label = row.label(("entailment", "contradiction", "neutral"))
    yield _labelled(prompt, ("Yes", "No", "Maybe"), label, row.integer("idx"))


def _copa(row: Row) -> Iterator[Example]:
    kind = row.label(("cause", "effect"), "question")
    if kind is None:
        row.text("question")  # Raises: the field is missing.
    asked = "What was the cause of this?" if kind == 0 else "What happened as a result?"
    prompt = f"{_end(row.text('premise'))} {asked}"
    options = (row.text("choice1"), row.text("choice2"))
    yield _labelled(prompt, options, row.label((0, 1)), row.integer("idx"))


def _multirc(row: Row) -> Iterator[Example]:
    passage = row.row("passage")
    for question in passage.rows("questions"):
        for answer in question.rows("answers"):
            yield _multirc_example(
                passage.text("text"),
                question.text("question"),
                answer.text("text"),
                label=answer.label((0, 1)),
                idx=answer.integer("idx"),
                group=(row.integer("idx"), question.integer("idx")),
            )


def _multirc_example(
    passage: str,
    question: str,
    answer: str,
    *,
    label: int | None,
    idx: int,
    group: tuple[int, ...],
) -> Example:
    prompt = (
        f"{_end(passage)} Question: {question} Suggested answer: {_end(answer)} "
        f"Is this answer right? Yes or no?"
    )
    return _labelled(prompt, NO_YES, label, idx, group)


def _record(row: Row) -> Iterator[Example]:
    passage = row.row("passage")
    text = passage.text("text", strip=False)  # Spans count from the very first character.
    entities = []
    for span in passage.rows("entities"):
        start, end = span.integer("start"), span.integer("end")
        if not 0 <= start <= end < len(text):
            raise row.error("entities", f"spans within {len(text)} characters", [start, end])
        entities.append(text[start : end + 1])
    for query in row.rows("qas"):
        answers = None
        if "answers" in query.values:
            answers = [answer.text("text") for answer in query.rows("answers")]
        yield _record_example(text, query.text("query"), entities, answers, query.integer("idx"))


def _record_example(
    passage: str, query: str, entities: list[str], answers: list[str] | None, idx: int
) -> Example:
    """Options are the different entities in order of appearance; every right one is a target."""
    parts = (part.strip() for part in passage.split("@highlight"))
    text = " ".join(_end(part) for part in parts if part)
    prompt = f"{text} Which name does @placeholder stand for in: {query}"
    options = tuple(dict.fromkeys(name for name in (e.strip() for e in entities) if name))
    targets = tuple(dict.fromkeys(answers or ()))
    label = next((i for i, option in enumerate(options) if option in targets), None)
    return Example(prompt, options, label, idx, targets=targets)


def _rte(row: Row) -> Iterator[Example]:
    prompt = (
        f"Given that {_end(row.text('premise'))} Does it follow that "
        f"{_ask(row.text('hypothesis'))} Yes or no?"
    )
    label = row.label(("entailment", "not_entailment"))
    yield _labelled(prompt, ("Yes", "No"), label, row.integer("idx"))


def _wic(row: Row) -> Iterator[Example]:
    prompt = (
        f"{_end(row.text('sentence1'))} {_end(row.text('sentence2'))} Does the word "
        f'"{row.text("word")}" mean the same in both sentences? Yes or no?'
    )
    yield _labelled(prompt, NO_YES, row.label(_FALSE_TRUE), row.integer("idx"))


def _wsc(row: Row) -> Iterator[Example]:
    spans = row.row("target")
    yield from _wsc_example(
        row,
        noun=spans.text("span1_text"),
        pronoun=spans.text("span2_text"),
        pronoun_index=spans.integer("span2_index"),
    )


def _wsc_example(row: Row, *, noun: str, pronoun: str, pronoun_index: int) -> Iterator[Example]:
    """Marks the pronoun that is asked about as *it*; its index counts words split at spaces."""
    marked = _mark(row, row.text("text").split(), pronoun, pronoun_index)
    prompt = f'{_end(marked)} Does "*{pronoun}*" mean "{noun}"? Yes or no?'
    yield _labelled(prompt, NO_YES, row.label(_FALSE_TRUE), row.integer("idx"))


def _mark(row: Row, words: list[str], pronoun: str, index: int) -> str:
    """Puts asterisks around the pronoun nearest to `index`.

    In a few rows the published index is off by one or two words.
    """
    length = len(pronoun.split())
    pattern = re.compile(rf"(?<!\w){re.escape(pronoun)}(?!\w)", re.IGNORECASE)
    for start in sorted(range(len(words)), key=lambda place: abs(place - index)):
        span, count = pattern.subn(r"*\g<0>*", " ".join(words[start : start + length]), count=1)
        if count:
            return " ".join([*words[:start], span, *words[start + length :]])
    raise row.error("span2_text", "a word of the text", pronoun)


@dataclasses.dataclass(frozen=True)
class _Family:
    """One SuperGLUE task: its names, its reader and how it is scored."""

    config: str
    directory: str
    read_row: Callable[[Row], Iterator[Example]]
    options: tuple[str, ...] | None
    metrics: tuple[Metric, ...] = (metrics.accuracy,)
    primary_metric: str = "accuracy"
    classes: tuple[Any, ...] = _FALSE_TRUE

    def read_file(self, path: Path) -> Iterator[Example]:
        """Yields the examples of an official file."""
        for row in read_jsonl(path):
            yield from self.read_row(row)

    def task(self) -> Task:
        """The task on the official files."""
        return Task(
            name=f"superglue_{self.config}",
            splits={
                TRAIN: f"{self.directory}/train.jsonl",
                VALIDATION: f"{self.directory}/val.jsonl",
            },
            read_file=self.read_file,
            metrics=self.metrics,
            primary_metric=self.primary_metric,
            options=self.options,
        )


_NLI3 = ("entailment", "contradiction", "neutral")
_NLI2 = ("entailment", "not_entailment")

_FAMILIES = (
    _Family("boolq", "BoolQ", _boolq, NO_YES),
    _Family(
        "cb",
        "CB",
        _cb,
        ("Yes", "No", "Maybe"),
        metrics=(metrics.accuracy, metrics.macro_f1),
        primary_metric=metrics.MEAN,
        classes=_NLI3,
    ),
    _Family("copa", "COPA", _copa, None, classes=(0, 1)),
    _Family(
        "multirc",
        "MultiRC",
        _multirc,
        NO_YES,
        metrics=(metrics.f1a, metrics.exact_match),
        primary_metric=metrics.MEAN,
        classes=(0, 1),
    ),
    _Family(
        "record",
        "ReCoRD",
        _record,
        None,
        metrics=(metrics.max_token_f1, metrics.max_exact_match),
        primary_metric=metrics.MEAN,
    ),
    _Family("rte", "RTE", _rte, ("Yes", "No"), classes=_NLI2),
    _Family("wic", "WiC", _wic, NO_YES),
    _Family("wsc", "WSC", _wsc, NO_YES),
)
_BY_CONFIG = {family.config: family for family in _FAMILIES}

TASKS: tuple[Task, ...] = tuple(family.task() for family in _FAMILIES)
"""The eight tasks on their official files, named superglue_<config>."""


def from_tfds(config: str) -> Task:
    """Returns a task that reads `super_glue/<config>` of TensorFlow Datasets.

    The examples are the same as those of the official files. The data directory given to `read`
    is TFDS's; the data set must have been prepared there, nothing is downloaded.

    Args:
      config: "boolq", "cb", "copa", "multirc", "record", "rte", "wic" or "wsc".

    Returns:
      A task with the same name, metrics and options.

    Raises:
      InputError: If there is no such config.
    """
    if config not in _BY_CONFIG:
        raise InputError(
            f"A SuperGLUE config must be one of {', '.join(_BY_CONFIG)}, got {config!r}."
        )
    return _TfdsTask(**vars(_BY_CONFIG[config].task()), family=_BY_CONFIG[config])


@dataclasses.dataclass(frozen=True)
class _TfdsTask(Task):
    """A task whose rows come from a prepared TFDS data set."""

    family: _Family = _FAMILIES[0]

    def source_files(self, data_dir: str | Path, split: str) -> tuple[Path, ...]:
        """Returns the record files of the split."""
        builder = self._builder(data_dir, split)
        return tuple(Path(path) for path in builder.info.splits[split].filepaths)

    def read(self, data_dir: str | Path, split: str) -> Iterator[Example]:
        """Yields the examples of a split, in the order they were written."""
        import tensorflow_datasets as tfds

        builder = self._builder(data_dir, split)
        rows = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
        for number, values in enumerate(rows):
            row = Row(_plain(values), f"super_glue/{self.family.config} {split} row {number}")
            yield from _read_tfds_row(self.family, row)

    def _builder(self, data_dir: str | Path, split: str) -> Any:
        import tensorflow_datasets as tfds

        name = f"super_glue/{self.family.config}"
        builder = tfds.builder(name, data_dir=str(data_dir), try_gcs=False)
        if not builder.is_prepared() or split not in builder.info.splits:
            raise InputError(
                f"TFDS's {name} must be prepared with a {split} split in {data_dir}: "
                f"run `tfds build {name} --data_dir {data_dir}` first."
            )
        return builder


def _plain(value: Any) -> Any:
    """Turns TFDS's numpy values into Python's: bytes to text, arrays to lists."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _read_tfds_row(family: _Family, row: Row) -> Iterator[Example]:
    """Turns a flattened TFDS row into the official nesting's example; label -1 is no label."""
    label = None
    if "label" in row.values and row.integer("label") >= 0:
        label = row.integer("label")
    if family.config == "multirc":
        idx = row.row("idx")
        yield _multirc_example(
            row.text("paragraph"),
            row.text("question"),
            row.text("answer"),
            label=label,
            idx=idx.integer("answer"),
            group=(idx.integer("paragraph"), idx.integer("question")),
        )
    elif family.config == "record":
        idx = row.row("idx").integer("query")
        answers = row.items("answers") or None
        yield _record_example(
            row.text("passage"), row.text("query"), row.items("entities"), answers, idx
        )
    else:
        values = {key: value for key, value in row.values.items() if key != "label"}
        if label is not None:
            values["label"] = family.classes[label]
        official = Row(values, row.where)
        if family.config == "wsc":
            yield from _wsc_example(
                official,
                noun=row.text("span1_text"),
                pronoun=row.text("span2_text"),
                pronoun_index=row.integer("span2_index"),
            )
        else:
            yield from family.read_row(official)
