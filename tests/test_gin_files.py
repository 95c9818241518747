"""Every gin file parses, finalises and builds the objects that it names; typos are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gin
import pytest

from uncurl_jax import config
from uncurl_jax.cli import build_parser, gin_config, main
from uncurl_jax.data import token_cache
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import pilot, quickstart, study, sweep
from uncurl_jax.experiments.recipes import recipe_runner, recipe_study
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.training import trainer

FOLDER = Path(__file__).parents[1] / "gin"
# gin/t5x can be parsed where T5X is alone: tests/t5x_adapter/test_t5x_gin_files.py.
FILES = sorted(
    path.relative_to(FOLDER.parent).as_posix()
    for path in FOLDER.rglob("*.gin")
    if path.parent.name != "t5x"
)
MODELS = [name for name in FILES if name.startswith("gin/models/")]
SIZES = [name for name in MODELS if not name.endswith("/base.gin")]
TASKS = [name for name in FILES if name.startswith("gin/tasks/")]
RUNS = [name for name in FILES if name.startswith("gin/runs/")]
# What gin files must be given, and a value to test with.
REQUIRED = {
    "VOCABULARY": "'bytes'",
    "TASK": "'seqio:a_task'",
    "TRAIN_FILE": "'corpus.txt'",
    "CORPUS_FILE": "'corpus.txt'",
    "MIXTURE_TASKS": "('seqio:a_mixture',)",
    "NUM_STEPS": "3",
}


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def text_of(name: str) -> str:
    return (FOLDER.parent / name).read_text(encoding="utf-8")


def needed(name: str) -> list[str]:
    """Macros that have no value in a file nor in those that it includes."""
    included = re.findall(r"^include '(.+)'", text_of(name), re.MULTILINE)
    own = re.findall(r"^(\w+) = %gin\.REQUIRED", text_of(name), re.MULTILINE)
    return own + [macro for file in included for macro in needed(file)]


def parse(name: str, *bindings: str) -> None:
    """Parses a file as `uncurl --gin_file` does, with values for what is required."""
    values = [f"{macro} = {REQUIRED[macro]}" for macro in needed(name)]
    gin_config.parse([name], [*values, *bindings], ())


def test_all_files_are_in_one_of_the_three_folders():
    assert sorted(MODELS + TASKS + RUNS) == FILES
    assert SIZES and TASKS and RUNS


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_for_and_is_written_for_dynamic_registration(name):
    text = text_of(name)
    head = text[: text.index("from __gin__ import dynamic_registration")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Commonly overridden:" in head
    if name not in MODELS:
        assert "Command:" in head and "Required:" in head


@pytest.mark.parametrize("name", TASKS + RUNS)
def test_the_commands_in_the_head_are_commands_of_the_program(name):
    head = re.sub(r"\n#\s+(--)", r" \1", text_of(name).partition("from __gin__")[0])
    commands = re.findall(r"uncurl ((?:cache|train|sweep|quickstart|report|pilot) .+)", head)
    assert commands
    for command in commands:
        words = [word for word in command.split() if word != "..."]
        arguments = [word for word in words if not word.startswith("--gin.")]
        options = build_parser().parse_args(arguments)
        assert set(getattr(options, "gin_file", [])) <= set(FILES)


@pytest.mark.parametrize("num_experts", [0, 1, 8, 13])
@pytest.mark.parametrize("name", SIZES)
def test_a_model_file_builds_the_model_of_any_number_of_experts(name, num_experts):
    parse(name, f"NUM_EXPERTS = {num_experts}")
    model = gin.get_configurable(config.ModelConfig)()
    # Switch Transformers begin with a dense layer.
    first = int(model.has_encoder)
    assert model.num_experts[first::2] == (num_experts,) * (model.num_layers // 2)
    assert set(model.num_experts[1 - first :: 2]) == {0}


@pytest.mark.parametrize(
    ("name", "num_experts", "billions"),
    [
        ("124m", 0, 0.124),
        ("354m", 0, 0.354),
        ("354m", 8, 1.05),
        ("354m", 32, 3.4),
        ("354m", 64, 6.7),
        ("354m", 128, 13.1),
    ],
)
def test_the_papers_models_have_the_papers_sizes(name, num_experts, billions):
    """Section 3 of arXiv 2409.01483, which gives two digits."""
    parse(f"gin/models/{name}.gin", f"NUM_EXPERTS = {num_experts}")
    model = gin.get_configurable(config.ModelConfig)()
    assert count_parameters(model).total / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_builds_the_configuration_of_its_command(name):
    parse(name)
    built = [
        gin.get_bindings(function)["config"]
        for function in (
            trainer.train,
            sweep.run_sweep,
            quickstart.run_quickstart,
            recipe_runner.run_recipes,
        )
        if "config" in gin_config.bound(function)
    ]
    if "finetune" in gin_config.bound(pilot.run_pilot):
        built.append(gin.get_bindings(pilot.run_pilot)["finetune"])
    assert len(built) == 1
    kinds = config.TrainConfig | study.StudyConfig | recipe_study.RecipeStudyConfig
    assert isinstance(built[0], kinds)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_file_configures_the_cache_builder(name):
    parse(name)
    assert {"task", "max_length"} <= gin_config.bound(token_cache.build_token_cache)
    assert gin.get_bindings(token_cache.build_token_cache)["task"]


@pytest.mark.parametrize("name", [name for name in FILES if needed(name)])
def test_a_required_value_that_is_missing_is_named(name):
    names = "|".join(needed(name))
    with pytest.raises(InputError, match=rf"({names}) must be set, got nothing: add --gin"):
        gin_config.parse([name], [], ())


@pytest.mark.parametrize("name", FILES)
def test_a_typo_in_a_binding_is_refused_with_the_nearest_name(name):
    bindings = re.findall(r"^(?:\w+/)?([\w.]+)\.(\w+) = ", text_of(name), re.MULTILINE)
    assert bindings
    for selector, parameter in sorted(set(bindings)):
        with pytest.raises(InputError, match=rf"got {selector}\.{parameter}x .*: nearest .*"):
            parse(name, f"{selector}.{parameter}x = 1")


@pytest.mark.parametrize("name", FILES)
def test_a_typo_in_a_macro_is_refused(name):
    macros = re.findall(r"^([A-Z_]+) = ", text_of(name), re.MULTILINE)
    for macro in macros:
        with pytest.raises(InputError, match=rf"got {macro}X: nearest .*{macro}"):
            parse(name, f"{macro}X = 1")


@pytest.mark.parametrize("name", SIZES + TASKS + [run for run in RUNS if "pilot" not in run])
def test_a_file_is_shown_with_every_default_filled_in(name, capsys):
    bindings = [f"--gin.{macro}={REQUIRED[macro]}" for macro in needed(name)]
    assert main(["gin", "--show", name, *bindings]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert len(shown) == 1
    text = json.dumps(shown)
    assert "@" not in text and "ConfigurableReference" not in text
    assert "# Macros" in captured.err or "# Parameters" in captured.err


def test_a_default_that_no_file_binds_is_shown(capsys):
    assert main(["gin", "--show", "gin/runs/pretrain.gin", "--gin.NUM_EXPERTS=4"]) == 0
    config_shown = json.loads(capsys.readouterr().out)["training.trainer.train"]["config"]
    assert config_shown["class"] == "TrainConfig"
    assert config_shown["max_to_keep"] == 1
    assert config_shown["model"]["num_experts"][0] == 4
    assert config_shown["optimizer"]["epsilon"] == 1e-8


def test_showing_nothing_or_a_typo_is_refused(capsys, tmp_path):
    empty = tmp_path / "empty.gin"
    empty.write_text("from __gin__ import dynamic_registration\n")
    assert main(["gin", "--show", str(empty)]) == 2
    assert "must bind what a command runs" in capsys.readouterr().err
    assert main(["gin", "--show", "gin/runs/pretrain.gin", "--gin.NUM_EXPERT=4"]) == 2
    assert "NUM_EXPERTS" in capsys.readouterr().err
