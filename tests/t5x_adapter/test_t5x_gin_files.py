"""The gin files of T5X parse, finalise and build; a typo is found before T5X is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from uncurl_jax.cli import build_parser, gin_config, gin_static, main
from uncurl_jax.cli.t5x_commands import prepare
from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import availability

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "gin" / "t5x"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in FOLDER.glob("*.gin"))
RUNS = {
    "gin/t5x/pretrain.gin": ("train", "t5x.train.train"),
    "gin/t5x/finetune.gin": ("train", "t5x.train.train"),
    "gin/t5x/eval.gin": ("eval", "t5x.eval.evaluate"),
    "gin/t5x/infer.gin": ("infer", "t5x.infer.infer"),
}
BASES = ["gin/t5x/base.gin", "gin/t5x/training.gin"]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def head_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8").partition("from __gin__")[0]


def test_all_files_are_runs_or_included_by_runs():
    assert sorted([*RUNS, *BASES]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_for(name):
    head = head_of(name)
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Commonly overridden:" in head
    if name in RUNS:
        assert "Command:" in head and "Required:" in head and "Expected:" in head


@pytest.mark.parametrize("name", RUNS)
def test_the_command_in_the_head_is_one_of_the_program(name):
    mode, _ = RUNS[name]
    found = re.findall(r"uncurl (t5x .+)", head_of(name))
    assert found
    for command in found:
        words = command.split()
        options = build_parser().parse_args([w for w in words if not w.startswith("--gin.")])
        assert (options.mode, options.gin_file) == (mode, [name])
        texts = gin_config.read_with_includes([name])
        bound = {w.removeprefix("--gin.").partition("=")[0] for w in words if "--gin." in w}
        required = set(re.findall(r"^(\w+) = %gin\.REQUIRED", "\n".join(texts.values()), re.M))
        given = set(re.findall(r"^(\w+) = (?!%gin)", "\n".join(texts.values()), re.M))
        assert required - given <= bound


@pytest.mark.t5x
@pytest.mark.usefixtures("t5x")
class TestWithT5X:
    """What needs T5X's sources."""

    @pytest.mark.parametrize("name", RUNS)
    def test_nothing_in_a_file_is_mistyped(self, name):
        texts = gin_config.read_with_includes([name])
        gin_static.check(texts, [], ("uncurl_jax.config",))

    @pytest.mark.parametrize("name", RUNS)
    def test_a_typo_in_any_binding_is_refused_with_the_nearest_name(self, name):
        """All but those of SeqIO, whose names come by star imports: gin itself finds them."""
        texts = gin_config.read_with_includes([name])
        lines = "\n".join(texts.values())
        bindings = set(re.findall(r"^((?:\w+/)?\w+\.\w+)\.(\w+) = ", lines, re.M))
        assert len(bindings) > 10
        for selector, parameter in sorted(bindings):
            bare = selector.rpartition("/")[2]
            if bare.startswith("seqio."):
                continue
            with pytest.raises(InputError, match=rf"got {bare}\.{parameter}x in .*: nearest "):
                gin_static.check(texts, [f"{selector}.{parameter}x=1"], ())
            module = bare.partition(".")[0]
            with pytest.raises(InputError, match=rf"name something of .*{module}, got {bare}x in"):
                gin_static.check(texts, [f"{selector}x.{parameter}=1"], ())

    @pytest.mark.parametrize(
        ("binding", "sentence"),
        [
            ("NUM_STEP=3", "must be used by a gin file, got NUM_STEP: nearest NUM_STEPS"),
            ("trian.train.model=1", "must begin with an imported module, got trian in trian.train"),
            ("train.train.model=@model.SmoDecoderModel()", "nearest SmoeDecoderModel"),
        ],
    )
    def test_other_typos_are_refused_too(self, binding, sentence):
        texts = gin_config.read_with_includes(["gin/t5x/pretrain.gin"])
        with pytest.raises(InputError, match=sentence):
            gin_static.check(texts, [binding], ())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_typo_in_a_binding_of_seqio_is_found_by_gin(self):
        with pytest.raises(InputError, match=r"got seqio\.Evaluator\.num_exampels .*num_examples"):
            gin_config.parse(["gin/t5x/eval.gin"], ["seqio.Evaluator.num_exampels=3"], ())

    def test_a_typo_ends_a_command_before_anything_slow_is_imported(self):
        """In a process of its own, which says what it has imported at its end."""
        code = (
            "import sys\nfrom uncurl_jax.cli import main\n"
            "status = main(['t5x', 'train', '--gin_file', 'gin/t5x/pretrain.gin', "
            "'--gin.train.train.modle=1'])\n"
            "print(status, sorted({'t5x', 'jax', 'tensorflow', 'seqio'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "2 []\n"
        assert "must name a parameter, got train.train.modle" in done.stderr
        assert "nearest model" in done.stderr

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", RUNS)
    def test_a_file_builds_what_it_names_and_is_shown_with_every_default(
        self, name, capsys, checkpoint, topic_cache
    ):
        values = {
            "CACHE": topic_cache,
            "MODEL_DIR": "out",
            "INITIAL_CHECKPOINT_PATH": checkpoint,
            "CHECKPOINT_PATH": checkpoint,
            "EVAL_OUTPUT_DIR": "out",
            "INFER_OUTPUT_DIR": "out",
        }
        text = "\n".join(gin_config.read_with_includes([name]).values())
        given = [f"--gin.{key}='{value}'" for key, value in values.items() if f"%{key}" in text]
        assert main(["gin", "--show", name, *given]) == 0
        captured = capsys.readouterr()
        shown = json.loads(captured.out)
        _, function = RUNS[name]
        assert list(shown) == [function]
        model = shown[function]["model"]
        assert model["class"] == "SmoeDecoderModel"
        assert model["config"]["min_capacity"] == 4  # A default that no file binds.
        assert model["vocabulary"]["name"] == "bytes"
        # Only lines that people read hold references; values are resolved.
        assert "@" not in captured.out and "ConfigurableReference" not in captured.out
        assert "0x" not in captured.out
        assert "MIXTURE_OR_TASK_NAME" in captured.err


@pytest.fixture
def checkpoint(tmp_path, config, make_params) -> Path:
    from uncurl_jax.checkpoints.store import CheckpointStore
    from uncurl_jax.data.vocabulary import ByteVocabulary

    with CheckpointStore(
        tmp_path / "run",
        model_config=config,
        provenance={},
        vocabulary=ByteVocabulary().describe(),
    ) as store:
        store.save(1, make_params(config))
    return tmp_path / "run"


def test_showing_a_file_of_t5x_without_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv(availability.SOURCE_VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"must be a checkout of T5X, got .*: clone"):
        prepare("gin", {"t5x_src": str(tmp_path)}, ["gin/t5x/eval.gin"], [])


def test_other_commands_and_files_do_not_ask_for_t5x():
    for name, options, files in (
        ("gin", {}, ["gin/runs/pretrain.gin"]),
        ("train", {}, ["gin/runs/pretrain.gin"]),
        ("t5x", {"mode": "adopt"}, []),
    ):
        prepare(name, {**options, "t5x_src": "/nowhere"}, files, [])
