"""Mixtures: what is taken, what overlaps with evaluated tasks, the share of plain text."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from uncurl_jax.data import mixtures, synthetic
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.mixtures import MixtureConfig, build_mixture_cache, texts_of
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError

LONG = "The quick brown fox jumps over the lazy dog and then sleeps under the old oak tree."


def make_cache(directory: Path, name: str, prompts: list[str]) -> TokenCache:
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in prompts)
    (directory / f"{name}.jsonl").write_text(text)
    task = JsonlTask(name, f"{name}.jsonl", "", "{text}", ("a", "b"))
    build_token_cache(task, out=directory / name, data_dir=directory, max_length=200)
    return TokenCache.open(directory / name / "train")


@pytest.fixture
def corpus(tmp_path) -> TokenCache:
    synthetic.write_tasks(tmp_path / "data", num_train=4, num_validation=2, num_documents=40)
    build_token_cache(
        "synthetic_corpus", out=tmp_path / "text", data_dir=tmp_path / "data", max_length=32
    )
    return TokenCache.open(tmp_path / "text" / "train")


def build(tmp_path, tasks, corpus=None, evaluated: Collection[str] = (), **settings):
    config = MixtureConfig(tasks=("x",), **settings)
    manifest = build_mixture_cache(
        tasks,
        corpus,
        config,
        evaluated=set(evaluated),
        vocabulary=load_vocabulary("bytes"),
        max_length=200,
        out=tmp_path / "mixture",
    )
    return TokenCache.open(tmp_path / "mixture" / "train"), manifest["mixture"]


def test_examples_of_evaluated_tasks_are_left_out_by_text(tmp_path):
    """The same prompt, and another prompt with the same passage, in other case and spacing."""
    evaluated = make_cache(tmp_path, "evaluated", ["Is it?", f"{LONG}\nIs it true?"])
    mixed = make_cache(
        tmp_path, "mixed", ["is  IT?", f"Read.\n{LONG.upper()}\nAnother question", "Fine", "Is it"]
    )
    cache, report = build(tmp_path, [mixed], evaluated=texts_of([evaluated]))
    assert report == [
        {"task": "mixed", "overlapping": 2, "too_long": 0, "is_text_compared": True, "rows": 2}
    ]
    texts = [bytes(t - 3 for t in cache.tokens[a:b] if t >= 3) for a, b in _bounds(cache)]
    assert [text.split(b" ")[0] for text in texts] == [b"Fine", b"Is"]
    assert cache.prompt_lengths.tolist() == [4, 5]
    cache.verify()


def _bounds(cache):
    return zip(cache.offsets[:-1], cache.offsets[1:], strict=True)


def test_the_share_of_plain_text_counts_rows(tmp_path, corpus):
    mixed = make_cache(tmp_path, "mixed", [f"row {i}" for i in range(30)])
    cache, report = build(tmp_path, [mixed], corpus, corpus_share=0.25)
    assert [line["rows"] for line in report] == [30, 10]
    assert cache.num_target_rows == 40
    assert np.count_nonzero(cache.prompt_lengths == 0) == 10


def test_one_task_gives_at_most_so_many_rows_and_the_draw_is_seeded(tmp_path):
    mixed = make_cache(tmp_path, "mixed", [f"row {i}" for i in range(30)])
    first, report = build(tmp_path / "a", [mixed], max_rows_per_task=7)
    second, _ = build(tmp_path / "b", [mixed], max_rows_per_task=7)
    other, _ = build(tmp_path / "c", [mixed], max_rows_per_task=7, seed=1)
    assert report[0]["rows"] == first.num_rows == 7
    assert first.hash == second.hash != other.hash


def test_short_lines_do_not_count_as_passages():
    assert mixtures.passages(f"Question:\n{LONG}") == {LONG.lower()}


def test_a_mixture_in_which_nothing_is_left_is_refused(tmp_path):
    mixed = make_cache(tmp_path, "mixed", ["Is it?"])
    with pytest.raises(InputError, match="A split must give at least one row"):
        build(tmp_path, [mixed], evaluated=texts_of([mixed]))
    assert not (tmp_path / "mixture").exists()


@pytest.mark.parametrize("settings", [{"tasks": ()}, {"corpus_share": 1.0}])
def test_settings_that_make_no_mixture_are_refused(settings):
    with pytest.raises(InputError, match=r"must name at least one task|corpus_share in \[0, 1\)"):
        MixtureConfig(**{"tasks": ("x",), **settings})
