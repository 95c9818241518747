"""`uncurl t5x` where T5X is not needed, or not there."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.t5x_adapter import availability


@pytest.fixture
def run_of_t5x(world, tmp_path):
    """A checkpoint without our JSON files, as T5X leaves it by itself."""
    shutil.copytree(world.root / "pretrained", tmp_path / "run")
    for path in (tmp_path / "run").glob("*.json"):
        path.unlink()
    (tmp_path / "model.gin").write_text((world.root / "model.gin").read_text())
    return tmp_path / "run"


def test_a_checkpoint_is_adopted_by_the_model_of_a_gin_file(uncurl, run_of_t5x):
    done = uncurl("t5x", "adopt", "run", "--gin_file", "model.gin", "--vocabulary", "bytes")
    assert done.result["checkpoint"] == str(run_of_t5x)
    found = describe(run_of_t5x)
    assert found["num_experts"] == [4, 4] and found["vocabulary"]["name"] == "bytes"
    assert done.result["steps"] == found["steps"]


def test_what_adopt_lacks_is_named(refuse, run_of_t5x):
    sentence = "is adopted as that of a model, got no ModelConfig: give the --gin_file that"
    refuse(sentence, "t5x", "adopt", "run", "--vocabulary", "bytes")
    sentence = "the following arguments are required: --vocabulary"
    refuse(sentence, "t5x", "adopt", "run", "--gin_file", "model.gin")
    sentence = "must hold the parameters of its architecture"
    arguments = ("--gin_file", "model.gin", "--gin.config.ModelConfig.mlp_dim=8")
    refuse(sentence, "t5x", "adopt", "run", "--vocabulary", "bytes", *arguments)


def test_a_wrong_mode_or_option_is_refused_with_what_there_is(refuse):
    refuse("argument MODE: invalid choice: 'trian'", "t5x", "trian")
    sentence = "got --t5x_scr: nearest --t5x_src"
    refuse(sentence, "t5x", "train", "--t5x_scr", "t5x")


def test_a_directory_that_is_no_t5x_is_refused(refuse, tmp_path):
    sentence = "must be a checkout of T5X, got ...without t5x/__init__.py"
    arguments = ("--gin_file", "gin/t5x/eval.gin", "--t5x_src", tmp_path)
    refuse(sentence, "t5x", "eval", *arguments)
    refuse(sentence, "gin", "--show", "gin/t5x/eval.gin", "--t5x_src", tmp_path)


@pytest.mark.skipif(
    availability.SOURCE_VARIABLE in os.environ or importlib.util.find_spec("t5x") is not None,
    reason="T5X is here",
)
def test_a_missing_t5x_is_explained_before_any_work(refuse):
    sentence = "T5X must be importable, got no module t5x: give --t5x_src DIR"
    refuse(sentence, "t5x", "train", "--gin_file", "gin/t5x/pretrain.gin")
