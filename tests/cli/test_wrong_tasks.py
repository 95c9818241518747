"""Wrong tasks, data and vocabularies: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import json

import pytest


def test_an_unknown_task_is_refused_with_the_nearest(refuse):
    sentence = "A task must be a registered one, got 'rtee': nearest rte."
    refuse(sentence, "cache", "--task", "rtee", "--out", "new")


def test_a_missing_data_file_is_named(refuse):
    sentence = "needs the file nowhere/RTE/train.jsonl for its train split, which does not exist"
    refuse(sentence, "cache", "--task", "rte", "--data_dir", "nowhere", "--out", "new")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "train.jsonl:2 must hold one JSON object, got"),
        ('{"text": 5, "label": "sea", "idx": 1}', "train.jsonl:2: field 'text' must be a str"),
        ('{"label": "sea", "idx": 1}', "train.jsonl:2: ...'text'"),
        ('{"text": "a", "label": "see", "idx": 1}', "train.jsonl:2: field 'label' must be"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(row, sentence, refuse, tmp_path):
    folder = tmp_path / "data" / "SyntheticTopic"
    folder.mkdir(parents=True)
    good = '{"text": "the sailor", "label": "sea", "idx": 0}'
    (folder / "train.jsonl").write_text(f"{good}\n{row}\n")
    (folder / "val.jsonl").write_text(f"{good}\n")
    arguments = ("--task", "synthetic_topic", "--data_dir", "data", "--out", "new")
    refuse(sentence, "cache", *arguments)


def test_an_unknown_split_is_refused(refuse, world):
    arguments = ("--task", "synthetic_topic", "--data_dir", world["data"], "--out", "new")
    sentence = "has the splits train, validation, got 'test': choose one"
    refuse(sentence, "cache", *arguments, "--split", "test")


def test_rows_too_short_for_an_option_are_refused(refuse, world):
    arguments = ("--task", "synthetic_topic", "--data_dir", world["data"], "--out", "new")
    sentence = "An option and its end of text must fit into max_length=5, got"
    refuse(sentence, "cache", *arguments, "--max_length", "5")


def test_an_unknown_vocabulary_is_refused(refuse, world):
    arguments = ("--task", "synthetic_topic", "--data_dir", world["data"], "--out", "new")
    sentence = 'A vocabulary must be "bytes", a .model file, a directory with tokenizer.json'
    refuse(sentence, "cache", *arguments, "--vocabulary", "byte")


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_task_that_is_neither_a_cache_nor_a_name_is_refused(command, refuse, world):
    def run(sentence: str, task: str, *more: str) -> None:
        arguments = ("--checkpoint", world["pretrained"], "--out", "new", "--task", task)
        refuse(sentence, command, *arguments, *more)

    run("A task must be a registered one, got 'synthetic_topik': nearest", "synthetic_topik")
    run("A named task needs its files, got --task synthetic_topic without", "synthetic_topic")
    run("must be a token cache's directory or a task's name, got no/where", "no/where")
    run("A token cache must hold manifest.json, got ", world["data"])
    run("A token cache must hold manifest.json, got ", world["caches/topic"], "--split", "test")
    sentence = "--split must be the split of the token cache, got validation for ...holds train"
    run(sentence, world["caches/topic/train"], "--split", "validation")


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_vocabulary_given_by_hand_must_be_the_caches(command, refuse, world, tmp_path):
    """A SentencePiece model, given by hand, is not the cache's bytes."""
    import sentencepiece

    text = (world.root / "data" / "SyntheticCorpus" / "train.txt").read_text().splitlines()
    with (tmp_path / "small.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(text),
            model_writer=writer,
            vocab_size=80,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    arguments = ("--checkpoint", world["pretrained"], "--task", world["caches/topic"])
    sentence = "A token cache must use the model's vocabulary, got bytes ...small.model"
    refuse(sentence, command, *arguments, "--out", "new", "--vocabulary", "small.model")


def test_a_checkpoint_of_another_vocabulary_is_refused(refuse, world, save_changed):
    checkpoint = save_changed(lambda params: None)
    record = json.loads((checkpoint / "vocabulary.json").read_text())
    (checkpoint / "vocabulary.json").write_text(json.dumps({**record, "hash": "0" * 64}))
    for command in ("calibrate", "evaluate"):
        arguments = ("--checkpoint", checkpoint, "--task", world["caches/topic"])
        sentence = "A token cache must use the model's vocabulary, got bytes (...: build the"
        refuse(sentence, command, *arguments, "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--mode ranking", 'mode must be "rank" or "generate", got \'ranking\''),
        ("--examples_per_batch 0", "examples_per_batch must be at least 1, got 0"),
        ("--mode generate --max_new_tokens 96", "must be at least 1 and below max_length=96"),
        ("--expert_partitions 3", "must divide the number of devices, got 3 * 1 on 8 devices"),
        ("--gin.evaluator.evaluate_checkpoint.mod=1", "evaluate_checkpoint.mod in ...nearest"),
    ],
)
def test_an_evaluation_with_wrong_options_is_refused(arguments, sentence, refuse, world):
    given = ("--checkpoint", world["pretrained"], "--task", world["caches/topic"])
    refuse(sentence, "evaluate", *given, "--out", "new", *arguments.split())


def test_rows_longer_than_the_model_are_refused(refuse, world, uncurl):
    data = ("--data_dir", world["data"], "--max_length", "128")
    assert uncurl("cache", "--task", "synthetic_corpus", *data, "--out", "long").status == 0
    given = ("--checkpoint", world["pretrained"], "--task", "long")
    for command in ("calibrate", "evaluate"):
        sentence = "Rows must fit the model's max_length=96, got up to 128 tokens in long"
        refuse(sentence, command, *given, "--out", "new")
