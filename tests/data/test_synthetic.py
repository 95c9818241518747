"""Tests of synthetic.py."""

from __future__ import annotations

import collections
import itertools

import pytest

from uncurl_jax.data import registry, synthetic
from uncurl_jax.data.cache_writer import encode_example
from uncurl_jax.data.language_modeling import read_documents
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError

NAMES = ("synthetic_topic", "synthetic_entailment", "synthetic_choice")


@pytest.fixture
def data_dir(tmp_path):
    return synthetic.write_tasks(
        tmp_path / "data", num_train=60, num_validation=30, num_documents=20
    )


def words_of(domain):
    groups = (domain.nouns, domain.verbs, domain.objects, domain.adjectives)
    return {domain.negation, domain.hedge, *itertools.chain(*groups)}


def test_no_word_is_in_two_domains():
    counts = collections.Counter(word for domain in synthetic.DOMAINS for word in words_of(domain))
    assert len(synthetic.DOMAINS) == 8 and set(counts.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_fits_into_96_bytes_and_has_a_label(data_dir, name):
    for split, size in (("train", 60), ("validation", 30)):
        examples = list(registry.get_task(name).read(data_dir, split))
        assert [example.idx for example in examples] == list(range(size))
        for example in examples:
            encoded = encode_example(example, ByteVocabulary(), 96)
            assert encoded.num_dropped == 0 and example.label is not None


def test_the_longest_possible_rows_fit_into_96_bytes():
    def longest(words):
        return max(map(len, words))

    sentences = [
        len("the    the .") + sum(map(longest, (d.adjectives, d.nouns, d.verbs, d.objects)))
        for d in synthetic.DOMAINS
    ]
    topic = 2 * max(sentences) + len("  Topic: ") + longest(synthetic.TOPIC_OPTIONS)
    choice = 2 * max(sentences) + 1
    assert topic + 1 <= 96 and choice + 1 <= 96


@pytest.mark.parametrize("name", NAMES)
def test_no_row_occurs_in_both_splits(data_dir, name):
    task = registry.get_task(name)
    train, validation = (
        {(ex.prompt, ex.options) for ex in task.read(data_dir, split)}
        for split in ("train", "validation")
    )
    assert len(train) == 60 and not train & validation


def test_the_right_answers_follow_from_the_words(data_dir):
    by_word = {word: domain for domain in synthetic.DOMAINS for word in words_of(domain)}
    for ex in registry.get_task("synthetic_topic").read(data_dir, "train"):
        assert by_word[ex.prompt.split()[1]].name == ex.targets[0]
    for ex in registry.get_task("synthetic_entailment").read(data_dir, "train"):
        domain, adverb = by_word[ex.prompt.split()[1]], ex.prompt.split()[2]
        expected = {domain.negation: "No", domain.hedge: "Maybe"}.get(adverb, "Yes")
        assert ex.targets == (expected,)
    for ex in registry.get_task("synthetic_choice").read(data_dir, "train"):
        assert ex.label is not None
        domains = [by_word[option.split()[1]] for option in ex.options]
        assert domains[ex.label] is by_word[ex.prompt.split()[1]] is not domains[1 - ex.label]


def test_one_seed_gives_one_corpus_and_documents_keep_to_a_domain(tmp_path):
    first = synthetic.write_corpus(tmp_path / "a.txt", num_documents=9, seed=4)
    second = synthetic.write_corpus(tmp_path / "b.txt", num_documents=9, seed=4)
    other = synthetic.write_corpus(tmp_path / "c.txt", num_documents=9, seed=5)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    documents = list(read_documents(first))
    assert len(documents) == 9
    for document in documents:
        words = set(document.replace(".", "").split()) - {"the"}
        assert any(words <= words_of(domain) for domain in synthetic.DOMAINS)


def test_nothing_is_overwritten(data_dir, tmp_path):
    with pytest.raises(InputError, match="An output must not exist yet"):
        synthetic.write_tasks(data_dir)
    with pytest.raises(InputError, match="An output must not exist yet"):
        synthetic.write_corpus(data_dir / "SyntheticCorpus" / "train.txt")


def test_more_rows_than_there_are_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "DOMAINS", synthetic.DOMAINS[:2])
    with pytest.raises(InputError, match=r"synthetic_entailment has about .* different rows"):
        synthetic.write_tasks(tmp_path, num_train=800, num_validation=1)
