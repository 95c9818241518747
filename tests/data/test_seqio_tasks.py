"""Tests of seqio_tasks.py and seqio_vocabulary.py against SeqIO itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from uncurl_jax.data import registry, seqio_tasks, synthetic
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.data.seqio_vocabulary import from_seqio_vocabulary, seqio_vocabulary
from uncurl_jax.data.tasks import Task
from uncurl_jax.data.token_cache import TokenCache, build_token_cache
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError

BYTES = ByteVocabulary()

CB = [
    {"premise": f"P{i}.", "hypothesis": f"h{i}", "label": label, "idx": i}
    for i, label in enumerate(["entailment", "contradiction", "neutral", "entailment", "neutral"])
]
MULTIRC = [
    {
        "idx": paragraph,
        "passage": {
            "text": f"T{paragraph}.",
            "questions": [
                {
                    "question": f"q{question}?",
                    "idx": question,
                    "answers": [
                        {"text": f"a{i}", "idx": 10 * paragraph + 5 * question + i, "label": i % 2}
                        for i in range(2 + question)
                    ],
                }
                for question in range(2)
            ],
        },
    }
    for paragraph in range(3)
]
RECORD = [
    {
        "idx": i,
        "passage": {
            "text": "Ann and Bob Lee met Bob.",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 14}, {"start": 20, "end": 22}],
        },
        "qas": [{"query": "@placeholder sang.", "idx": i, "answers": [{"text": name}]}],
    }
    for i, name in enumerate(["Ann", "Bob Lee", "Bob", "Ann"])
]
ROWS = {"CB": CB, "MultiRC": MULTIRC, "ReCoRD": RECORD}


@pytest.fixture(autouse=True)
def clean_registries():
    """Leaves SeqIO's registries and ours as they were."""
    yield
    for name in seqio_tasks._REGISTERED:
        seqio.TaskRegistry.remove(name)
    seqio_tasks._REGISTERED.clear()


@pytest.fixture
def data_dir(write_jsonl, tmp_path):
    for name, rows in ROWS.items():
        for split in ("train", "val"):
            write_jsonl(f"{name}/{split}.jsonl", rows)
    return tmp_path


def build(task, data_dir, out, **options):
    return build_token_cache(
        task, data_dir=data_dir, vocabulary="bytes", out=out, max_length=80, **options
    )


def evaluate(name: str, scores: np.ndarray, **options: Any) -> Any:
    """Runs seqio.Evaluator with the given row scores, in shuffled order."""
    evaluator: Any = seqio.Evaluator(
        name, seqio.DecoderFeatureConverter(pack=False), eval_split="validation", **options
    )

    def score_fn(dataset):
        places = [int(place) for place, _ in dataset.as_numpy_iterator()]
        return [(place, float(scores[place])) for place in reversed(places)]

    metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score_fn)
    result = metrics.result()[name]
    evaluator.close()
    return result


@pytest.mark.parametrize("name", ["cb", "multirc", "record"])
@pytest.mark.parametrize("seed", [0, 1])
def test_seqios_evaluator_gives_the_numbers_of_metrics(data_dir, tmp_path, name, seed):
    task = registry.get_task(name)
    build(task, data_dir, tmp_path / "cache")
    cache = TokenCache.open(tmp_path / "cache" / "validation")
    scores = np.random.default_rng(seed).normal(size=cache.num_rows)
    expected = cache.score().values(cache.examples(), cache.predictions(scores))
    registered = seqio_tasks.register_seqio_task(task, data_dir, BYTES, 80)
    assert evaluate(registered, scores) == expected
    assert len(expected) == 3


def test_a_cache_built_through_seqio_equals_one_built_directly(data_dir, tmp_path):
    for name in ROWS:
        task = registry.get_task(name)
        direct = build(task, data_dir, tmp_path / f"{name}_direct")["validation"]
        registered = seqio_tasks.register_seqio_task(task, data_dir, BYTES, 80)
        through = build(f"seqio:{registered}", ".", tmp_path / f"{name}_seqio")["validation"]
        assert through["files"] == direct["files"] and through["truncated_rows"] == 0
        same = set(direct) - {"sources", "hash", "truncated_rows", "dropped_tokens"}
        assert {key: through[key] for key in same} == {key: direct[key] for key in same}


def test_training_rows_are_the_right_options(data_dir, tmp_path):
    task = registry.get_task("multirc")
    build(task, data_dir, tmp_path / "cache")
    direct = TokenCache.open(tmp_path / "cache" / "train")
    name = seqio_tasks.register_seqio_task(task, data_dir, BYTES, 80)
    seqio_task = seqio.get_mixture_or_task(name)
    rows = list(seqio_task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
    batches = direct.sequential_batches(len(rows), length=80)
    (expected,) = batches
    joined = [np.concatenate([row["inputs"], row["targets"]]) for row in rows]
    assert [row.tolist() for row in joined] == [
        row[mask].tolist() for row, mask in zip(expected.targets, expected.mask, strict=True)
    ]
    assert all(row["targets"][-1] == BYTES.eos_id for row in rows)
    assert seqio_task.num_input_examples("train") == len(rows) == 15
    assert seqio_task.num_input_examples("validation") == 30
    assert "idx" not in rows[0]
    build(f"seqio:{name}", ".", tmp_path / "through", splits=["train"])
    through = TokenCache.open(tmp_path / "through" / "train")
    assert through.kind == "text_to_text" and through.num_target_rows == 15


def test_the_decoder_converter_gives_our_batches(data_dir, tmp_path):
    name = seqio_tasks.register_seqio_task(registry.get_task("cb"), data_dir, BYTES, 80)
    build("cb", data_dir, tmp_path / "cache")
    cache = TokenCache.open(tmp_path / "cache" / "validation")
    converted = seqio.get_dataset(
        name,
        {"inputs": 70, "targets": 10},
        seqio.DecoderFeatureConverter(pack=False),
        "validation",
        shuffle=False,
    )
    rows = list(converted.as_numpy_iterator())
    (ours,) = cache.sequential_batches(len(rows), length=80, rows="all")
    for place, row in enumerate(rows):
        assert np.array_equal(row["decoder_input_tokens"], ours.inputs[place])
        assert np.array_equal(row["decoder_target_tokens"], ours.targets[place])
        assert np.array_equal(row["decoder_loss_weights"], ours.weights[place])


def test_some_examples_can_be_scored_but_not_parts_of_one(data_dir):
    name = seqio_tasks.register_seqio_task(registry.get_task("cb"), data_dir, BYTES, 80)
    # Six rows are two examples; row 0 is "Yes" (right) and row 4 "No" (right).
    scores = np.array([1, 0, 0, 0, 1, 0.0])
    assert evaluate(name, scores, num_examples=6)["accuracy"] == 100.0
    with pytest.raises(ValueError, match="Every option of an example must be scored, got 5 rows"):
        evaluate(name, scores, num_examples=5)


def test_a_text_task_gives_packed_rows(tmp_path):
    synthetic.write_tasks(tmp_path / "data", num_train=9, num_validation=9, num_documents=10)
    task = synthetic.CORPUS_TASK
    build(task, tmp_path / "data", tmp_path / "direct")
    name = seqio_tasks.register_language_modeling_task(task, tmp_path / "data", BYTES, 80)
    assert seqio_tasks.register_language_modeling_task(task, tmp_path / "data", BYTES, 80) == name
    build(f"seqio:{name}", ".", tmp_path / "seqio")
    for split in ("train", "validation"):
        direct, through = (TokenCache.open(tmp_path / kind / split) for kind in ("direct", "seqio"))
        assert through.kind == direct.kind == "language_modeling"
        assert np.array_equal(through.tokens, direct.tokens)
        assert np.array_equal(through.offsets, direct.offsets)
    assert seqio.get_mixture_or_task(name).num_input_examples("train") == 10
    converted = seqio.get_dataset(
        name, {"targets": 80}, seqio.DecoderFeatureConverter(pack=False), "train", shuffle=False
    )
    (first,) = converted.take(1).as_numpy_iterator()
    batch = next(TokenCache.open(tmp_path / "direct" / "train").sequential_batches(1, length=80))
    assert np.array_equal(first["decoder_target_tokens"], batch.targets[0])
    assert np.array_equal(first["decoder_input_tokens"], batch.inputs[0])


@pytest.fixture
def foreign_task():
    """A SeqIO task of somebody else's, with SeqIO's byte vocabulary and no options."""
    name = "data_test_foreign"

    rows: Any = {"inputs": ["2+2", "1+10"], "targets": ["4", "11"]}

    def dataset_fn(split, shuffle_files=False, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(rows)

    source: Any = seqio.FunctionDataSource(dataset_fn, ["train"], num_input_examples={"train": 2})
    seqio.TaskRegistry.add(
        name,
        source=source,
        output_features={
            key: seqio.Feature(seqio.ByteVocabulary(), add_eos=key == "targets")
            for key in ("inputs", "targets")
        },
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    seqio.MixtureRegistry.add("data_test_mixture", [(name, 1.0)])
    yield name
    seqio.MixtureRegistry.remove("data_test_mixture")
    seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("kind", ["task", "mixture"])
def test_any_seqio_task_or_mixture_becomes_a_cache(foreign_task, tmp_path, kind):
    name = foreign_task if kind == "task" else "data_test_mixture"
    calls = []
    build(f"seqio:{name}", ".", tmp_path / "cache", progress=lambda *call: calls.append(call))
    cache = TokenCache.open(tmp_path / "cache" / "train")
    rows = [cache.tokens[a:b].tolist() for a, b in itertools.pairwise(cache.offsets)]
    assert rows == [[*BYTES.encode("2+24"), 1], [*BYTES.encode("1+1011"), 1]]
    assert cache.prompt_lengths.tolist() == [3, 4] and cache.kind == "text_to_text"
    assert [(ex.prompt, ex.targets) for ex in cache.examples()] == [
        ("2+2", ("4",)),
        ("1+10", ("11",)),
    ]
    assert calls == [("train", 2)] and cache.vocabulary_hash == BYTES.hash


def test_long_inputs_lose_tokens_from_the_left_and_long_targets_are_refused(foreign_task, tmp_path):
    seqio_tasks.build_seqio_cache(foreign_task, out=tmp_path / "cache", max_length=5)
    cache = TokenCache.open(tmp_path / "cache" / "train")
    assert cache.prompt(1) == BYTES.encode("10")
    assert cache.manifest["truncated_rows"] == 1 and cache.manifest["dropped_tokens"] == 2
    with pytest.raises(InputError, match="must fit into max_length=2, got 3 tokens in row 1"):
        seqio_tasks.build_seqio_cache(foreign_task, out=tmp_path / "short", max_length=2)


def test_a_foreign_task_with_options_is_ranked_by_accuracy(tmp_path):
    """`idx` and `is_correct` are what T5's rank_classification preprocessor writes."""
    name = "data_test_ranked"
    rows: Any = {
        "inputs": np.array([[5, 6]] * 4, np.int32),
        "targets": np.array([[70, 1], [71, 1], [72, 1], [73, 1]], np.int32),
        "idx": np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32),
        "is_correct": np.array([False, True, True, False]),
    }

    def dataset_fn(split, shuffle_files=False, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(rows)

    source: Any = seqio.FunctionDataSource(dataset_fn, ["validation"])
    feature = seqio.Feature(seqio_vocabulary(BYTES), add_eos=False)
    seqio.TaskRegistry.add(
        name,
        source=source,
        output_features={"inputs": feature, "targets": feature},
        preprocessors=[],
    )
    build(f"seqio:{name}", ".", tmp_path / "cache")
    seqio.TaskRegistry.remove(name)
    cache = TokenCache.open(tmp_path / "cache" / "validation")
    assert [ex.label for ex in cache.examples()] == [1, 0]
    assert cache.examples()[0].options == ("C", "D")
    predictions = cache.predictions(np.array([0, 1, 0, 1.0]))
    assert cache.score().values(cache.examples(), predictions)["accuracy"] == 50.0


def test_our_vocabulary_works_behind_seqios_interface():
    wrapped = seqio_vocabulary(BYTES)
    assert wrapped.vocab_size == 259 and (wrapped.eos_id, wrapped.pad_id) == (1, 0)
    assert wrapped.encode("aé") == [100, 198, 172] == wrapped.encode_tf("aé").numpy().tolist()
    encoded = tf.data.Dataset.from_tensors("aé").map(wrapped.encode_tf)
    assert next(encoded.as_numpy_iterator()).tolist() == [100, 198, 172]
    assert wrapped.decode([100, 1, 100]) == "a"
    assert wrapped.decode_tf(tf.constant([100, 101])).numpy() == b"ab"
    assert wrapped.decode_tf(tf.constant([[100, 1], [101, 0]])).numpy().tolist() == [b"a", b"b"]
    assert wrapped == seqio_vocabulary(ByteVocabulary()) and wrapped != BYTES
    assert hash(wrapped) == hash(BYTES) and wrapped.unk_id is None and wrapped.bos_id == 0
    assert from_seqio_vocabulary(wrapped) is BYTES
    assert from_seqio_vocabulary(seqio.ByteVocabulary()) == BYTES


def test_vocabularies_that_we_cannot_read_are_refused():
    for vocabulary in (seqio.ByteVocabulary(extra_ids=100), seqio.PassThroughVocabulary(9)):
        with pytest.raises(InputError, match="without extra ids, got"):
            from_seqio_vocabulary(vocabulary)


def test_one_name_stands_for_one_task(data_dir):
    task = registry.get_task("cb")
    name = seqio_tasks.register_seqio_task(task, data_dir, BYTES, 80)
    assert seqio_tasks.register_seqio_task(task, data_dir, BYTES, 80) == name == "superglue_cb"
    with pytest.raises(InputError, match="name must be new, got 'superglue_cb'"):
        seqio_tasks.register_seqio_task(task, data_dir, BYTES, 81)
    other = seqio_tasks.register_seqio_task(task, data_dir, BYTES, 81, name="cb_81")
    assert other == "cb_81"
    text = LanguageModelingTask("superglue_cb", "x.txt")
    with pytest.raises(InputError, match="name must be new"):
        seqio_tasks.register_language_modeling_task(text, data_dir, BYTES, 80)


def test_missing_files_are_found_at_registration(tmp_path):
    task = registry.get_task("cb")
    assert isinstance(task, Task)
    with pytest.raises(InputError, match="superglue_cb needs the file"):
        seqio_tasks.register_seqio_task(task, tmp_path, BYTES, 80)
    assert "superglue_cb" not in seqio.TaskRegistry.names()


def test_unknown_tasks_and_other_vocabularies_are_refused(foreign_task, tmp_path):
    with pytest.raises(InputError, match=r"must be registered before .*, got 'nothing'"):
        build("seqio:nothing", ".", tmp_path / "cache")
    other = ByteVocabulary()
    other.hash = "0" * 64
    with pytest.raises(InputError, match=r"got bytes \(0{12}\) and bytes \(8da402fee9f1\)"):
        seqio_tasks.build_seqio_cache(
            foreign_task, out=tmp_path / "cache", max_length=9, vocabulary=other
        )
