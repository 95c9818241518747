"""A small synthetic world: text in eight domains and three tasks that a tiny model can learn.

Each domain has its own words, so that experts have something to specialise in. Everything is
generated from a seed; rows stay below 96 bytes. Meant for tests, tutorials and smoke runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uncurl_jax import artifacts
from uncurl_jax.data import metrics
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import TRAIN, VALIDATION, Example, Row, Task, read_jsonl
from uncurl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Domain:
    """The words of one domain; no word occurs in two domains."""

    name: str
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    adjectives: tuple[str, ...]
    negation: str
    hedge: str


def _domain(name: str, nouns: str, verbs: str, objects: str, adjectives: str, adverbs: str):
    negation, hedge = adverbs.split()
    words = (tuple(group.split()) for group in (nouns, verbs, objects, adjectives))
    return Domain(name, *words, negation=negation, hedge=hedge)


DOMAINS: tuple[Domain, ...] = (
    _domain(
        "sea",
        "sailor diver whale captain pirate",
        "hoists steers anchors sights tows",
        "sail reef harbor ship island",
        "salty deep stormy",
        "never maybe",
    ),
    _domain(
        "farm",
        "farmer cow shepherd goat rooster",
        "herds milks plows feeds shears",
        "barn hay field flock tractor",
        "muddy rural sturdy",
        "seldom perhaps",
    ),
    _domain(
        "kitchen",
        "cook baker chef waiter butcher",
        "fries bakes boils chops serves",
        "soup bread cake onion pasta",
        "tasty spicy sweet",
        "hardly possibly",
    ),
    _domain(
        "music",
        "singer drummer pianist violin choir",
        "plays hums tunes sings records",
        "song chord melody opera tempo",
        "loud lyrical gentle",
        "nowhere presumably",
    ),
    _domain(
        "space",
        "pilot comet rocket rover alien",
        "orbits launches scans lands probes",
        "moon planet crater star galaxy",
        "distant lunar airless",
        "scarcely supposedly",
    ),
    _domain(
        "sport",
        "goalie coach runner boxer skater",
        "kicks throws wins blocks trains",
        "ball race goal match medal",
        "athletic swift sweaty",
        "rarely likely",
    ),
    _domain(
        "law",
        "judge lawyer witness jury clerk",
        "sues defends accuses appeals signs",
        "verdict trial bail crime oath",
        "strict solemn legal",
        "barely allegedly",
    ),
    _domain(
        "garden",
        "bee tulip gardener snail oak",
        "waters prunes digs plants trims",
        "hedge flower lawn seed root",
        "leafy mossy sunny",
        "nohow seemingly",
    ),
)

TOPIC_OPTIONS = tuple(domain.name for domain in DOMAINS)
ENTAILMENT_OPTIONS = ("Yes", "No", "Maybe")

_Maker = Callable[[np.random.Generator], dict[str, Any]]


def _pick(generator: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(generator.integers(len(words)))]


def _draw_domain(generator: np.random.Generator) -> int:
    return int(generator.integers(len(DOMAINS)))


def _sentence(generator: np.random.Generator, domain: Domain, adverb: str = "") -> str:
    """A sentence such as "the salty sailor never hoists the sail."."""
    words = [
        "the",
        _pick(generator, domain.adjectives),
        _pick(generator, domain.nouns),
        *([adverb] if adverb else []),
        _pick(generator, domain.verbs),
        "the",
        _pick(generator, domain.objects),
    ]
    return " ".join(words) + "."


def _topic_row(generator: np.random.Generator) -> dict[str, Any]:
    domain = DOMAINS[_draw_domain(generator)]
    text = f"{_sentence(generator, domain)} {_sentence(generator, domain)}"
    return {"text": text, "label": domain.name}


def _entailment_row(generator: np.random.Generator) -> dict[str, Any]:
    """The premise is certain, negated or hedged, in its domain's own word."""
    domain = DOMAINS[_draw_domain(generator)]
    place = int(generator.integers(3))
    noun, verb = _pick(generator, domain.nouns), _pick(generator, domain.verbs)
    target = _pick(generator, domain.objects)
    adverb = ("", f" {domain.negation}", f" {domain.hedge}")[place]
    return {
        "premise": f"the {noun}{adverb} {verb} the {target}.",
        "hypothesis": f"the {noun} {verb}",
        "label": ("entailment", "contradiction", "neutral")[place],
    }


def _choice_row(generator: np.random.Generator) -> dict[str, Any]:
    """The right choice continues in the premise's domain, the wrong one in another."""
    domain = _draw_domain(generator)
    other = (domain + 1 + int(generator.integers(len(DOMAINS) - 1))) % len(DOMAINS)
    label = int(generator.integers(2))
    right, wrong = _sentence(generator, DOMAINS[domain]), _sentence(generator, DOMAINS[other])
    choices = (wrong, right) if label else (right, wrong)
    return {
        "premise": _sentence(generator, DOMAINS[domain]),
        "choice1": choices[0],
        "choice2": choices[1],
        "question": "effect",
        "label": label,
    }


def _read_topic(path: Path) -> Iterator[Example]:
    for row in read_jsonl(path):
        yield _example(row, f"{row.text('text')} Topic:", TOPIC_OPTIONS, row.label(TOPIC_OPTIONS))


def _read_entailment(path: Path) -> Iterator[Example]:
    for row in read_jsonl(path):
        prompt = f"{row.text('premise')} So {row.text('hypothesis')}?"
        label = row.label(("entailment", "contradiction", "neutral"))
        yield _example(row, prompt, ENTAILMENT_OPTIONS, label)


def _read_choice(path: Path) -> Iterator[Example]:
    for row in read_jsonl(path):
        options = (row.text("choice1"), row.text("choice2"))
        yield _example(row, row.text("premise"), options, row.label((0, 1)))


def _example(row: Row, prompt: str, options: tuple[str, ...], label: int | None) -> Example:
    targets = () if label is None else (options[label],)
    return Example(prompt, options, label, row.integer("idx"), targets=targets)


@dataclasses.dataclass(frozen=True)
class _Family:
    name: str
    directory: str
    make_row: _Maker
    read_file: Callable[[Path], Iterator[Example]]
    options: tuple[str, ...] | None

    def task(self) -> Task:
        files = {TRAIN: f"{self.directory}/train.jsonl", VALIDATION: f"{self.directory}/val.jsonl"}
        return Task(
            self.name,
            files,
            self.read_file,
            (metrics.accuracy,),
            "accuracy",
            options=self.options,
        )


_FAMILIES = (
    _Family("synthetic_topic", "SyntheticTopic", _topic_row, _read_topic, TOPIC_OPTIONS),
    _Family(
        "synthetic_entailment",
        "SyntheticEntailment",
        _entailment_row,
        _read_entailment,
        ENTAILMENT_OPTIONS,
    ),
    _Family("synthetic_choice", "SyntheticChoice", _choice_row, _read_choice, None),
)

TASKS: tuple[Task, ...] = tuple(family.task() for family in _FAMILIES)

CORPUS_TASK = LanguageModelingTask(
    "synthetic_corpus",
    train_file="SyntheticCorpus/train.txt",
    validation_file="SyntheticCorpus/val.txt",
)


def generate_documents(
    num_documents: int, *, seed: int, sentences_per_document: int = 8
) -> Iterator[str]:
    """Yields documents of one domain each.

    Most sentences are plain; every third is negated or hedged, as in `synthetic_entailment`.
    """
    generator = np.random.default_rng(seed)
    for _ in range(num_documents):
        domain = DOMAINS[_draw_domain(generator)]
        adverbs = ("", "", "", "", domain.negation, domain.hedge)
        yield " ".join(
            _sentence(generator, domain, _pick(generator, adverbs))
            for _ in range(sentences_per_document)
        )


def write_corpus(
    path: str | Path, *, num_documents: int = 2000, seed: int = 0, sentences_per_document: int = 8
) -> Path:
    """Writes a text file of documents separated by blank lines.

    Args:
      path: the file to write; it must not exist.
      num_documents: documents, each in one of the eight domains.
      seed: of the generator; one seed gives one file.
      sentences_per_document: sentences, about 35 bytes each.

    Returns:
      The path.

    Raises:
      InputError: If the file exists.
    """
    documents = generate_documents(
        num_documents, seed=seed, sentences_per_document=sentences_per_document
    )
    path = artifacts.refuse_existing(path)
    with artifacts.atomic_file(path) as partial:
        partial.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def write_tasks(
    directory: str | Path,
    *,
    num_train: int = 2000,
    num_validation: int = 200,
    num_documents: int = 2000,
    seed: int = 0,
) -> Path:
    """Writes the three tasks and the corpus in SuperGLUE's layout.

    <directory>/{SyntheticTopic,SyntheticEntailment,SyntheticChoice}/{train,val}.jsonl and
    <directory>/SyntheticCorpus/{train,val}.txt. No row occurs twice, in one split or across.

    Args:
      directory: where to write; created if needed, but the four folders must not exist.
      num_train: rows per training split.
      num_validation: rows per validation split.
      num_documents: training documents of the corpus; validation has a tenth, at least one.
      seed: of the generators.

    Returns:
      The directory.

    Raises:
      InputError: If a folder exists or more rows are asked for than there are different ones.
    """
    directory = Path(directory)
    for offset, family in enumerate(_FAMILIES):
        generator = np.random.default_rng([seed, offset])
        rows = _different_rows(family, generator, num_train + num_validation)
        with artifacts.atomic_directory(directory / family.directory) as partial:
            _write_rows(partial / "train.jsonl", rows[:num_train])
            _write_rows(partial / "val.jsonl", rows[num_train:])
    with artifacts.atomic_directory(directory / "SyntheticCorpus") as partial:
        write_corpus(partial / "train.txt", num_documents=num_documents, seed=seed)
        held_out = max(num_documents // 10, 1)
        write_corpus(partial / "val.txt", num_documents=held_out, seed=seed + 1)
    return directory


def _different_rows(
    family: _Family, generator: np.random.Generator, count: int
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(20 * count + 100):
        if len(rows) == count:
            return list(rows.values())
        row = family.make_row(generator)
        rows.setdefault(json.dumps(row), row)
    raise InputError(
        f"{family.name} has about {len(rows)} different rows, got a request for {count}: "
        f"ask for fewer."
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps({**row, "idx": idx}) + "\n" for idx, row in enumerate(rows))
    path.write_text("".join(lines), encoding="utf-8")
