"""Tests of cache_writer.py, cache_builder.py and token_cache.py."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uncurl_jax.data import metrics, synthetic
from uncurl_jax.data.cache_writer import CacheWriter, encode_example
from uncurl_jax.data.jsonl_task import JsonlTask
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.tasks import Example
from uncurl_jax.data.token_cache import Batch, TokenCache, bucket_length, build_token_cache
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError

ROWS = [
    {"q": "ab", "o": ["x", "yz"], "label": 1},
    {"q": "c", "o": ["u", "v", "w"], "label": 0},
    {"q": "def", "o": ["k"], "label": 0},
]
TASK = JsonlTask("tiny", "t.jsonl", "v.jsonl", "{q}?", options_field="o")


def ids(text):
    """Byte ids; "$" stands for the end of text."""
    return [1 if char == "$" else ord(char) + 3 for char in text]


@pytest.fixture
def built(write_jsonl, tmp_path):
    write_jsonl("t.jsonl", ROWS)
    write_jsonl("v.jsonl", ROWS[:1])
    manifests = build_token_cache(
        TASK, data_dir=tmp_path, vocabulary="bytes", out=tmp_path / "cache", max_length=16
    )
    return tmp_path / "cache", manifests


@pytest.fixture
def cache(built):
    return TokenCache.open(built[0] / "train")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A cache of 11 rows, each with one option; row i holds the id 10 + i and end of text."""
    directory = tmp_path_factory.mktemp("many") / "train"
    writer = CacheWriter(directory, ByteVocabulary())
    for row in range(11):
        writer.add_row([10 + row, 1], example=row)
    fields = {"task": "many", "split": "train", "kind": "language_modeling", "max_length": 2}
    writer.finish({**fields, "metrics": [], "primary_metric": "", "sources": []})
    return TokenCache.open(directory)


def test_one_row_is_prompt_option_and_end_of_text(cache):
    rows = [cache.tokens[a:b].tolist() for a, b in itertools.pairwise(cache.offsets)]
    texts = ["ab? x$", "ab? yz$", "c? u$", "c? v$", "c? w$", "def? k$"]
    assert rows == [ids(text) for text in texts]
    assert cache.prompt_lengths.tolist() == [3, 3, 2, 2, 2, 4]
    assert cache.example.tolist() == [0, 0, 1, 1, 1, 2]
    assert cache.option.tolist() == [0, 1, 0, 1, 2, 0]
    assert cache.is_target.tolist() == [False, True, True, False, False, True]
    assert cache.tokens.dtype == np.uint16 and cache.offsets.dtype == np.int64
    assert cache.prompt_lengths.dtype == cache.example.dtype == cache.option.dtype == np.int32


def test_examples_and_prompts_come_back(cache):
    first, second, third = cache.examples()
    assert (first.prompt, first.options, first.label) == ("ab?", ("x", "yz"), 1)
    assert (second.idx, third.targets) == (1, ("k",))
    assert [cache.prompt(place) for place in range(3)] == [ids("ab?"), ids("c?"), ids("def?")]
    assert list(cache.rows_of(1)) == [2, 3, 4]


def test_the_manifest_says_what_the_cache_is(built, cache):
    manifest = built[1]["train"]
    assert manifest == cache.manifest
    expected = {
        "format_version": 1,
        "task": "tiny",
        "split": "train",
        "kind": "rank_classification",
        "max_length": 16,
        "rows": 6,
        "target_rows": 3,
        "examples": 3,
        "tokens": 6 + 7 + 5 + 5 + 5 + 7,
        "truncated_rows": 0,
        "dropped_tokens": 0,
        "max_row_length": 7,
        "max_options": 3,
        "metrics": ["accuracy"],
        "primary_metric": "accuracy",
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["vocabulary"] == ByteVocabulary().describe()
    (source,) = manifest["sources"]
    assert source["file"] == "t.jsonl" and len(source["sha256"]) == 64
    assert sorted(path.name for path in built[0].iterdir()) == ["train", "validation"]
    assert (cache.kind, cache.split, cache.task) == ("rank_classification", "train", "tiny")
    assert (cache.num_rows, cache.num_target_rows) == (6, 3)
    assert cache.vocabulary_hash == ByteVocabulary().hash and cache.hash == manifest["hash"]
    cache.verify()


def test_the_hash_depends_on_the_content_and_not_on_the_place(built, write_jsonl, tmp_path):
    for name, rows in (("same", ROWS), ("other", ROWS[::-1])):
        write_jsonl(f"{name}/t.jsonl", rows)
    got = {
        name: build_token_cache(
            TASK,
            data_dir=tmp_path / name,
            vocabulary=ByteVocabulary(),
            out=tmp_path / f"{name}_cache",
            max_length=16,
            splits=["train"],
        )["train"]["hash"]
        for name in ("same", "other")
    }
    assert got["same"] == built[1]["train"]["hash"] != got["other"]


def test_a_long_prompt_loses_tokens_from_the_left_alike_for_all_options():
    example = Example("abcdef", ("x", "yz"), 0, 0)
    encoded = encode_example(example, ByteVocabulary(), 7)
    # " yz$" has 4 tokens, which leaves 3 for the prompt of both options.
    assert encoded == (ids("def"), [ids(" x$"), ids(" yz$")], 3)
    assert encode_example(example, ByteVocabulary(), 4).prompt == []


def test_truncated_rows_and_dropped_tokens_are_counted(write_jsonl, tmp_path):
    write_jsonl("t.jsonl", ROWS)
    manifest = build_token_cache(
        TASK,
        data_dir=tmp_path,
        vocabulary="bytes",
        out=tmp_path / "cache",
        max_length=6,
        splits=("train",),
    )["train"]
    # "ab?" with " yz$" loses 1 token in 2 rows; "def?" with " k$" loses 1 in 1 row.
    assert manifest["truncated_rows"] == 3 and manifest["dropped_tokens"] == 3
    assert manifest["max_row_length"] == 6


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    vocabulary = ByteVocabulary()
    vocabulary.size = 1 << 17
    writer = CacheWriter(tmp_path / "cache", vocabulary)
    writer.add_row([100_000, 1], example=0)
    fields = {"task": "t", "split": "s", "kind": "language_modeling", "max_length": 2}
    writer.finish({**fields, "metrics": [], "primary_metric": "", "sources": []})
    cache = TokenCache.open(tmp_path / "cache")
    assert cache.tokens.dtype == np.int32 and cache.tokens.tolist() == [100_000, 1]


def test_a_text_is_cut_into_whole_rows(tmp_path):
    (tmp_path / "text.txt").write_text("ab\n\nc\n\ndef", encoding="utf-8")
    task = LanguageModelingTask("text", "text.txt")
    manifests = build_token_cache(
        task, data_dir=tmp_path, vocabulary="bytes", out=tmp_path / "cache", max_length=4
    )
    cache = TokenCache.open(tmp_path / "cache" / "train")
    assert list(manifests) == ["train"]
    assert cache.tokens.tolist() == ids("ab$c") + ids("$def")
    assert cache.manifest["dropped_tokens"] == 1  # The last end of text.
    assert (cache.kind, cache.max_options, cache.examples()) == ("language_modeling", 1, [])
    (batch,) = cache.sequential_batches(2, length=4)
    assert batch.weights.tolist() == [[1] * 4] * 2 and batch.mask.all()
    with pytest.raises(InputError, match="Ranking needs examples with options, got language_mod"):
        cache.option_batches(1, length=4)
    with pytest.raises(InputError, match="has no metrics on options"):
        cache.score()


def test_a_batch_is_shifted_masked_and_weighted(cache):
    (batch,) = cache.sequential_batches(4, length=8)
    assert isinstance(batch, Batch)
    targets = ["ab? yz$", "c? u$", "def? k$", ""]
    assert batch.targets.tolist() == [(ids(text) + [0] * 8)[:8] for text in targets]
    assert batch.inputs.tolist() == [([0, *ids(text)] + [0] * 8)[:8] for text in targets]
    assert batch.mask.sum(axis=1).tolist() == [7, 5, 7, 0]
    assert batch.weights.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0] * 8,
    ]
    assert (batch.inputs.dtype, batch.targets.dtype) == (np.int32, np.int32)
    assert (batch.weights.dtype, batch.mask.dtype) == (np.float32, np.bool_)


def test_sequential_batches_hold_each_row_once(cache):
    batches = list(cache.sequential_batches(4, length=7, rows="all"))
    real = np.concatenate([batch.targets[batch.mask.any(axis=1)] for batch in batches])
    assert len(batches) == 2 and len(real) == 6
    assert [row[row > 0].tolist() for row in real] == [
        cache.tokens[a:b].tolist() for a, b in itertools.pairwise(cache.offsets)
    ]


def test_option_batches_keep_the_options_of_an_example_together(cache):
    batches = list(cache.option_batches(1, length=7))
    assert [ids.tolist() for _, ids in batches] == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    # With room for two examples of three options, six rows hold all three examples.
    ((batch, row_ids),) = cache.option_batches(2, length=7)
    assert row_ids.tolist() == [0, 1, 2, 3, 4, 5] and batch.targets.shape == (6, 7)


def test_scores_of_rows_become_predictions_and_a_score(cache):
    predictions = cache.predictions(np.array([-2, -1, -3, -1, -2, -9]))
    assert predictions == [1, 1, 0]
    score = cache.score()
    assert score.values(cache.examples(), predictions) == {
        "accuracy": pytest.approx(200 / 3),
        "score": pytest.approx(200 / 3),
    }
    interval = metrics.confidence_interval(cache.examples(), predictions, score, 100)
    assert interval.low < 200 / 3 < interval.high
    with pytest.raises(InputError, match=r"one per row, \(6,\), got \(2,\)"):
        cache.predictions(np.zeros(2))


def test_an_epoch_holds_each_target_row_once_and_differs_from_the_next(many):
    stream = np.concatenate(
        [b.targets[:, 0] for b in itertools.islice(many.train_batches(4, length=2, seed=0), 11)]
    )
    epochs = stream.reshape(4, 11)
    assert all(sorted(epoch) == list(range(10, 21)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_the_order_of_a_seed_never_changes(many):
    """A golden order: runs resumed with another version of numpy see the same rows."""
    first = next(many.train_batches(11, length=2, seed=7)).targets[:, 0].tolist()
    assert first == GOLDEN_ORDER


GOLDEN_ORDER = [16, 13, 14, 20, 19, 10, 12, 18, 17, 15, 11]


def test_only_target_rows_are_trained_on(cache):
    batches = itertools.islice(cache.train_batches(3, length=7, seed=0), 5)
    wrong = [ids("ab? x$"), ids("c? v$"), ids("c? w$")]
    for batch in batches:
        assert all(row[row > 0].tolist() not in wrong for row in batch.targets)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    seed=st.integers(0, 2**32),
    start=st.integers(0, 40),
    share=st.integers(1, 5),
    processes=st.integers(1, 4),
)
def test_batches_resume_exactly_and_processes_share_the_global_batch(
    many, seed, start, share, processes
):
    size = share * processes
    whole = many.train_batches(size, length=3, seed=seed)
    expected = next(itertools.islice(whole, start, None))
    resumed = next(many.train_batches(size, length=3, seed=seed, start_step=start))
    parts = [
        next(
            many.train_batches(
                size,
                length=3,
                seed=seed,
                start_step=start,
                process_index=index,
                process_count=processes,
            )
        )
        for index in range(processes)
    ]
    joined = Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    for other in (resumed, joined):
        assert all(np.array_equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_sequential_and_option_batches(cache, processes):
    def parts(method, *args, **kwargs):
        streams = [
            list(method(*args, **kwargs, process_index=i, process_count=processes))
            for i in range(processes)
        ]
        return zip(*streams, strict=True)

    expected = cache.sequential_batches(6, length=7, rows="all")
    for whole, split in zip(
        expected, parts(cache.sequential_batches, 6, length=7, rows="all"), strict=True
    ):
        assert np.array_equal(whole.targets, np.concatenate([part.targets for part in split]))
    expected = cache.option_batches(2, length=7)
    for whole, split in zip(expected, parts(cache.option_batches, 2, length=7), strict=True):
        assert np.array_equal(whole.row_ids, np.concatenate([part.row_ids for part in split]))


def test_progress_is_reported_every_thousand_rows_and_at_the_end(tmp_path):
    synthetic.write_tasks(tmp_path / "data", num_train=200, num_validation=10, num_documents=2)
    calls = []
    build_token_cache(
        "synthetic_topic",
        data_dir=tmp_path / "data",
        vocabulary="bytes",
        out=tmp_path / "cache",
        max_length=96,
        progress=lambda split, rows: calls.append((split, rows)),
    )
    assert calls == [("train", 1000), ("train", 1600), ("validation", 80)]


@pytest.mark.parametrize(("length", "expected"), [(1, 32), (32, 32), (33, 64)])
def test_lengths_are_rounded_up_to_buckets(length, expected):
    assert bucket_length(length) == expected


def test_a_failure_leaves_nothing_behind(write_jsonl, tmp_path):
    write_jsonl("t.jsonl", ROWS)
    write_jsonl("v.jsonl", [{"q": "a"}])
    with pytest.raises(InputError, match=r"v\.jsonl:1: a row must have the field 'o'"):
        build_token_cache(
            TASK, data_dir=tmp_path, vocabulary="bytes", out=tmp_path / "cache", max_length=16
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "v.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_length": 3}, "must fit into max_length=3, got 4 tokens in example 0"),
        ({"task": "tini"}, "A task must be a registered one, got 'tini'"),
        ({"vocabulary": "byte"}, "A vocabulary must be"),
        ({"splits": ["test"]}, "has the splits train, validation, got 'test'"),
        ({"data_dir": "nowhere"}, "does not exist: check the data directory"),
    ],
)
def test_a_wrong_request_is_refused(write_jsonl, tmp_path, change, message):
    write_jsonl("t.jsonl", ROWS)
    write_jsonl("v.jsonl", ROWS)
    request = {
        "task": TASK,
        "data_dir": tmp_path,
        "vocabulary": "bytes",
        "max_length": 16,
        "out": tmp_path / "cache",
    } | change
    with pytest.raises(InputError, match=message):
        build_token_cache(**request)
    assert not (tmp_path / "cache").exists()


def test_an_existing_output_is_refused(built, tmp_path):
    with pytest.raises(InputError, match="An output must not exist yet"):
        build_token_cache(TASK, data_dir=tmp_path, vocabulary="bytes", out=built[0], max_length=16)


def test_a_split_without_rows_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("ab")
    with pytest.raises(InputError, match="at least one row, got none from train of text"):
        build_token_cache(
            LanguageModelingTask("text", "text.txt"),
            data_dir=tmp_path,
            vocabulary="bytes",
            out=tmp_path / "cache",
            max_length=9,
        )


def test_ids_outside_the_vocabulary_and_examples_without_options_are_refused(tmp_path):
    writer = CacheWriter(tmp_path / "cache", ByteVocabulary())
    for row, got in (([3, 259], r"ids 3\.\.259"), ([-1], r"ids -1\.\.-1"), ([], "an empty row")):
        with pytest.raises(InputError, match=f"Row 0 must hold ids of bytes .*, got {got}"):
            writer.add_row(row, example=0)
    writer.close()
    with pytest.raises(InputError, match="at least one option, got none for example 5"):
        encode_example(Example("p", (), None, 5), ByteVocabulary(), 9)


def test_opening_something_else_is_refused(built, tmp_path):
    with pytest.raises(InputError, match=r"without it: name one split, as .*train"):
        TokenCache.open(built[0])
    with pytest.raises(InputError, match="without it: build one first"):
        TokenCache.open(tmp_path / "nowhere")
    path = built[0] / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"format_version": 0}, {"format": "other"}):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match="must be a token cache of format version 1"):
            TokenCache.open(built[0] / "train")
    path.write_text(json.dumps(manifest | {"rows": 7}))
    with pytest.raises(InputError, match=r"must have shape \(8,\) as the manifest says, got"):
        TokenCache.open(built[0] / "train")


def test_changed_files_are_found(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0] / "train", copy)
    tokens = np.load(copy / "tokens.npy")
    tokens[0] += 1
    np.save(copy / "tokens.npy", tokens)
    with pytest.raises(InputError, match=r"tokens\.npy differs from its hash"):
        TokenCache.open(copy).verify()
    path = built[0] / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"task": "tiny"', '"task": "other"'))
    with pytest.raises(InputError, match=r"manifest\.json differs from its own hash"):
        TokenCache.open(built[0] / "train").verify()


def test_another_vocabulary_is_refused_with_both_names(cache):
    cache.check_vocabulary(ByteVocabulary().hash)
    with pytest.raises(InputError, match=r"got bytes \(8da402fee9f1\) .* and spm \(0{12}\)"):
        cache.check_vocabulary("0" * 64, "spm")


def test_wrong_batch_requests_are_refused_at_once(cache, built):
    train = {"length": 7, "seed": 0}
    for request, message in (
        (lambda: cache.train_batches(2, length=6, seed=0), "length=6 is below the longest row"),
        (lambda: cache.sequential_batches(2, length=6), "choose length >= 7"),
        (lambda: cache.option_batches(2, length=6), "choose length >= 7"),
        (lambda: cache.train_batches(0, **train), "positive multiple of the processes, got 0"),
        (lambda: cache.train_batches(3, **train, process_count=2), "got 3 rows on 2 processes"),
        (lambda: cache.train_batches(2, **train, process_index=1), "got 1 of 1"),
        (lambda: cache.train_batches(2, **train, start_step=-1), "must be >= 0, got -1 and 0"),
        (lambda: cache.train_batches(2, length=7, seed=-1), "must be >= 0, got 0 and -1"),
        (lambda: cache.sequential_batches(2, length=7, rows="some"), 'must be "targets" or "all"'),
        (lambda: cache.option_batches(0, length=7), "at least 1, got 0"),
        (lambda: bucket_length(0), "must be positive, got 0 and 32"),
    ):
        with pytest.raises(InputError, match=message):
            request()


def test_training_without_labels_is_refused(write_jsonl, tmp_path):
    write_jsonl("t.jsonl", [{"q": "a", "o": ["b"]}])
    build_token_cache(
        TASK,
        data_dir=tmp_path,
        vocabulary="bytes",
        out=tmp_path / "cache",
        max_length=16,
        splits=["train"],
    )
    with pytest.raises(InputError, match="needs rows with a right option, got none"):
        TokenCache.open(tmp_path / "cache" / "train").train_batches(1, length=9, seed=0)
