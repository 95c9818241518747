"""Texts, token caches and records of the reproduction study (docs/reproduction.md).

    python benchmarks/reproduce.py prepare --wikipedia wiki.txt.xz --books books.txt.xz \
        --vocabulary spm.model --out DIR
    uncurl recipes --gin_file gin/runs/reproduce_recipes.gin --cache_dir DIR/caches \
        --gin.VOCABULARY='"spm.model"' --out STUDY --max_seconds 500
    python benchmarks/reproduce.py collect STUDY --out benchmarks/results/reproduction/recipes
    uncurl report benchmarks/results/reproduction/recipes

`prepare` divides the text: encyclopedia articles about people are a domain of their own, the others
are for pretraining; the last books are held out. `collect` adds what a run of the study measured to
what earlier runs, perhaps on other machines, did; the study goes on where the records end if its
directory begins with them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from uncurl_jax.artifacts import append_json_line, read_json, read_json_lines, write_json
from uncurl_jax.data import token_cache
from uncurl_jax.data.language_modeling import LanguageModelingTask, read_documents
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.recipes.recipe_runner import RUNS_FILE, STUDY_FILE

_PERSON = re.compile(r"\bborn\b")
_PERSON_CHARACTERS = 400
_TASKS = (
    LanguageModelingTask("corpus", "corpus.txt"),
    LanguageModelingTask("books", "books.txt", "books_valid.txt"),
    LanguageModelingTask("biographies", "biographies.txt", "biographies_valid.txt"),
)


class _Text:
    """A text file that takes documents until it is long enough."""

    def __init__(self, file: IO[str], most_characters: float):
        self._file, self._room = file, most_characters

    @property
    def is_full(self) -> bool:
        return self._room <= 0

    def add(self, document: str) -> None:
        if not self.is_full:
            text = document[: int(min(self._room, len(document)))]
            self._file.write(text + "\n\n")
            self._room -= len(text)


def prepare(arguments: argparse.Namespace) -> None:
    """Writes texts and token caches."""
    texts = Path(arguments.out) / "texts"
    texts.mkdir(parents=True)
    million = arguments.scale * 1e6
    with (
        (texts / "corpus.txt").open("w") as corpus,
        (texts / "biographies.txt").open("w") as people,
        (texts / "biographies_valid.txt").open("w") as people_valid,
    ):
        _divide_articles(
            read_documents(arguments.wikipedia),
            _Text(corpus, 70 * million),
            _Text(people, 1e12),
            _Text(people_valid, 0.8 * million),
        )
    with (
        (texts / "books.txt").open("w") as books,
        (texts / "books_valid.txt").open("w") as books_valid,
    ):
        held_out, trained = _Text(books_valid, 0.8 * million), _Text(books, 34 * million)
        for place, document in enumerate(read_documents(arguments.books)):
            # Whole books, evenly through the collection, of which a part each is enough.
            if place % 100 == 0:
                held_out.add(document[:20_000])
            else:
                trained.add(document)
    for task in _TASKS:
        manifests = token_cache.build_token_cache(
            task,
            vocabulary=arguments.vocabulary,
            out=Path(arguments.out) / "caches" / task.name,
            max_length=256,
            data_dir=texts,
        )
        for split, manifest in manifests.items():
            print(f"{task.name}/{split}: {manifest['tokens']:,} tokens")


def _divide_articles(
    articles: Iterator[str], corpus: _Text, people: _Text, people_valid: _Text
) -> None:
    number = 0
    for article in articles:
        if not _PERSON.search(article[:_PERSON_CHARACTERS]):
            corpus.add(article)
            continue
        number += 1
        (people_valid if number % 8 == 0 and not people_valid.is_full else people).add(article)


def collect(arguments: argparse.Namespace) -> None:
    """Adds the records of a study to those that are there."""
    study, out = Path(arguments.study), Path(arguments.out)
    mine = read_json(study / STUDY_FILE)
    known: set[tuple[str, str]] = set()
    if (out / STUDY_FILE).exists():
        theirs = read_json(out / STUDY_FILE)
        growing = ("title", "arms", "recipes", "baselines", "domains")
        changed = [
            name
            for name, value in mine["settings"].items()
            if name not in growing and theirs["settings"].get(name) != value
        ]
        if changed:
            raise InputError(
                f"Records to put together must have the same settings, got other values of "
                f"{', '.join(changed)}: choose another --out."
            )
        records = read_json_lines(out / RUNS_FILE)
        known = {(record["stage"], record["name"]) for record in records}
    write_json(out / STUDY_FILE, mine)
    added = 0
    for record in read_json_lines(study / RUNS_FILE):
        if (record["stage"], record["name"]) not in known:
            append_json_line(out / RUNS_FILE, record)
            added += 1
    print(f"{added} records added to {out / RUNS_FILE}")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare")
    command.add_argument("--wikipedia", type=Path, required=True)
    command.add_argument("--books", type=Path, required=True)
    command.add_argument("--vocabulary", required=True)
    command.add_argument("--scale", type=float, default=1.0, help="of the texts' lengths")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=prepare)
    command = commands.add_parser("collect")
    command.add_argument("study")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=collect)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
