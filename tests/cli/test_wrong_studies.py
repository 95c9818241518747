"""Wrong studies: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def model_file(world, tmp_path):
    (tmp_path / "model.gin").write_text((world.root / "model.gin").read_text())


@pytest.mark.parametrize(
    ("binding", "sentence"),
    [
        (
            "methods=('uncrl',)",
            "method must be one of ...frequency, ..., got 'uncrl'; did you mean uncurl?",
        ),
        (
            "routers=('men',)",
            "routers must be one of fit, mean, reference, reinit, remap, got 'men'",
        ),
        ("affinity='cosin'", "affinity must be one of centered, cosine, pearson, got 'cosin'"),
        ("tasks=('rtee',)", "A task must be a registered one, got 'rtee': nearest rte"),
        (
            "tasks=('synthetic_corpus',)",
            "tasks must have options to choose from, got ",
        ),
        ("tasks=('rte',)", "Task superglue_rte needs the file ...RTE/train.jsonl"),
        ("target_num_experts=(4,)", "below the largest source count 4, got 4"),
        ("vocabulary='byte'", 'A vocabulary must be "bytes", a .model file'),
        ("seeds=()", "seeds must name at least one, got none"),
        (
            "target_num_expert=(2,)",
            "study.StudyConfig.target_num_expert in ...: nearest target",
        ),
    ],
)
def test_a_study_with_wrong_settings_is_refused_before_any_work(binding, sentence, refuse, world):
    arguments = ("--gin_file", world["study.gin"], "--data_dir", world["data"], "--out", "new")
    refuse(sentence, "sweep", *arguments, f"--gin.study.StudyConfig.{binding}")


def test_a_study_whose_batches_the_devices_cannot_share_is_refused(refuse, world):
    """This process has eight devices."""
    arguments = ("--gin_file", world["study.gin"], "--data_dir", world["data"], "--out", "new")
    sentence = "pretrain.batch_size must be a multiple of the 8 devices that share a batch, got"
    refuse(f"{sentence} 6", "sweep", *arguments, "--gin.config.TrainConfig.batch_size=6")


def test_a_study_without_data_is_refused(refuse, world):
    sentence = "Task synthetic_corpus needs a token cache in ...: pass --data_dir or --cache_dir"
    refuse(sentence, "sweep", "--gin_file", world["study.gin"], "--out", "new")


def test_a_study_that_goes_on_with_other_settings_is_refused(refuse, world):
    arguments = ("--gin_file", world["study.gin"], "--cache_dir", world["study_caches"])
    arguments += ("--out", world["study"], "--shard", "0/2")
    sentence = "goes on with the settings it began with, got other values of seeds than ...study"
    refuse(sentence, "sweep", *arguments, "--gin.SEEDS=(0, 1)")


def test_a_report_of_nothing_is_refused(refuse, world):
    refuse("A study must have a runs.jsonl, found none", "report", world["data"])
    refuse("A study must have a runs.jsonl, found none", "report", "nowhere")
