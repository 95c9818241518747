"""Mistakes in gin files and bindings: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def model_file(world, tmp_path):
    (tmp_path / "model.gin").write_text((world.root / "model.gin").read_text())


@pytest.fixture
def train(refuse, world):
    """Returns train(sentence, *bindings)."""

    def run(sentence: str, *bindings: str) -> None:
        arguments = ["--gin_file", world["pretrain.gin"], "--out", "new"]
        arguments += ["--cache", world["caches/topic/train"]]
        refuse(sentence, "train", *arguments, *(f"--gin.{b}" for b in bindings))

    return run


@pytest.mark.parametrize(
    ("binding", "sentence"),
    [
        (
            "config.TrainConfig.num_step=4",
            "must name a parameter, got config.TrainConfig.num_step in "
            "config.TrainConfig.num_step=4: nearest num_steps",
        ),
        (
            "config.TrainConfg.num_steps=4",
            "must name something of uncurl_jax.config, got config.TrainConfg...: nearest "
            "TrainConfig",
        ),
        (
            "confg.TrainConfig.num_steps=4",
            "must begin with an imported module, got confg...: nearest config",
        ),
        ("trainer.train.quit=True", "got trainer.train.quit...: nearest quiet"),
        (
            "NUM_STEP=4",
            "A gin macro must be used by a gin file, got NUM_STEP: nearest NUM_STEPS",
        ),
        ("NUM_STEPS=%NUMBER", "A gin macro must have a value, got %NUMBER without one: set"),
        ("NUM_STEPS", "A gin binding must be --gin.NAME=VALUE, got --gin.NUM_STEPS."),
        ("NUM_STEPS=", "A gin binding must be --gin.NAME=VALUE, got --gin.NUM_STEPS=."),
        ("NUM_STEPS=many", "must be a Python literal...in NUM_STEPS=many: put text in quotes"),
        ("NUM_STEPS='many'", "TrainConfig needs values of the right types, got "),
        ("NUM_STEPS=0", "num_steps must be at least 1, got 0"),
        ("NUM_STEPS=%gin.REQUIRED", "NUM_STEPS must be set, got nothing: add --gin.NUM_STEPS="),
        ("config.ModelConfig.num_heads=3", "num_heads must divide embed_dim, got 3 heads and"),
        ("config.ModelConfig.vocab_size=99", "must be at least the vocabulary's size, got 99"),
        ("config.ModelConfig.max_length=40", "tokens must fit length=40 and the model's max_"),
        ("config.OptimizerConfig.schedule='step'", 'schedule must be "linear", "cosine" or '),
    ],
)
def test_a_wrong_binding_is_refused_before_any_work(binding, sentence, train):
    train(sentence, binding)


def test_a_missing_gin_file_is_refused_with_the_nearest(refuse):
    sentence = "A gin file must exist, got gin/runs/pretrian.gin: give a path from here, or one"
    sentence += " that the package has, nearest gin/runs/pretrain.gin"
    refuse(sentence, "train", "--out", "new", "--gin_file", "gin/runs/pretrian.gin")


def test_a_missing_included_file_is_refused_with_its_place(refuse, tmp_path):
    (tmp_path / "own.gin").write_text("# mine\ninclude 'gin/models/tin.gin'\n")
    sentence = "must exist, got gin/models/tin.gin at own.gin:2: ...nearest gin/models/tiny.gin"
    refuse(sentence, "train", "--out", "new", "--gin_file", "own.gin")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "config.TrainConfig.num_step = 4",
            "got config.TrainConfig.num_step at own.gin:3: near",
        ),
        ("config.TrainConfig.num_steps 4", "must parse, got Couldn't parse statement"),
        ("from uncurl_jax import confg", "got No module named 'uncurl_jax.confg' at own.gin:3"),
        ("config.TrainConfig.num_steps = four", "must be a Python literal"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(text, sentence, refuse, tmp_path):
    head = "from __gin__ import dynamic_registration\nfrom uncurl_jax import config\n"
    (tmp_path / "own.gin").write_text(f"{head}{text}\n")
    refuse(sentence, "train", "--out", "new", "--gin_file", "own.gin")


def test_a_file_without_its_imports_is_refused(run_alone, tmp_path):
    """In a process of its own: gin remembers what other files have imported."""
    (tmp_path / "own.gin").write_text("config.TrainConfig.num_steps = 4\n")
    done = run_alone(tmp_path, "train", "--out", "new", "--gin_file", "own.gin")
    assert done.status == 2
    assert "A gin file must import the modules that it binds" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--out", "o"), "train needs config, got no value: give --gin_file FILE"),
        (("sweep", "--out", "o"), "run_sweep needs config, got no value: give --gin_file"),
        (("cache", "--out", "o"), "build_token_cache needs task, got no value: give --task"),
    ],
)
def test_a_command_without_its_gin_file_says_so(arguments, sentence, refuse):
    refuse(sentence, *arguments)


def test_a_required_value_that_no_file_gives_is_named(refuse, world):
    sentence = "train needs cache, got no value: give --cache."
    refuse(sentence, "train", "--gin_file", world["pretrain.gin"], "--out", "o")


def test_a_stage_without_model_or_checkpoint_is_refused(refuse, world):
    arguments = ("--cache", world["caches/topic/train"], "--out", "o")
    sentence = "A stage needs an architecture, got neither config.model nor a checkpoint"
    refuse(sentence, "train", "--gin_file", world["finetune.gin"], *arguments)
