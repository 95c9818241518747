"""Typos in gin files are found from the sources of a package that is never imported."""

from __future__ import annotations

import sys

import pytest

from uncurl_jax.cli import gin_static
from uncurl_jax.errors import InputError

MODULE = '''
import dataclasses
import os.path as paths
raise RuntimeError("this module must not be imported")

@dataclasses.dataclass(frozen=True)
class Settings:
    """Docs."""
    num_steps: int
    seed: int = 0

class Trainer:
    def __init__(self, model, *, learning_rate=0.1):
        pass

class Inherited(Trainer):
    pass

def run(config, out="x"):
    pass

def anything(**kwargs):
    pass

if paths:
    def guarded(step):
        pass
'''
FILE = """
from __gin__ import dynamic_registration
from a_package import library
import a_star
NUM_STEPS = 3
library.run.config = @library.Settings()
eval/library.Settings.num_steps = %NUM_STEPS
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    for name, text in (("a_package", ""), ("a_star", "from a_package.library import *\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "a_package" / "library.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    gin_static._read_source.cache_clear()
    yield
    assert not {"a_package", "a_star"} & set(sys.modules)


@pytest.mark.parametrize(
    "binding",
    [
        "NUM_STEPS=4",
        "library.run.out='y'",
        "eval/library.Settings.seed=1",
        "library.Trainer.learning_rate=1.0",
        "library.run.config=@train/library.Trainer()",
        "library.guarded.step=1",
        # What cannot be told from the source alone is left to gin.
        "library.Inherited.whatever=1",
        "library.anything.whatever=1",
        "a_star.Unknown.whatever=1",
        "config.TrainConfig.num_steps=1",
    ],
)
def test_what_is_there_or_cannot_be_told_passes(binding):
    gin_static.check({"own.gin": FILE}, [binding], ("uncurl_jax.config",))


@pytest.mark.parametrize(
    ("binding", "sentence"),
    [
        ("NUM_STEP=4", "must be used by a gin file, got NUM_STEP: nearest NUM_STEPS"),
        ("libary.run.out=1", "must begin with an imported module, got libary in .*nearest library"),
        ("library.rnu.out=1", "must name something of a_package.library, got .*nearest run"),
        ("library.run.outt=1", "must name a parameter, got library.run.outt in .*nearest out"),
        ("e/library.Settings.sead=1", "got library.Settings.sead in .*nearest seed"),
        ("library.Trainer.modle=1", "got library.Trainer.modle in .*nearest model"),
        ("library.guarded.stepp=1", "got library.guarded.stepp in .*nearest step"),
        ("library.run.config=@library.Setings()", "got library.Setings in .*nearest Settings"),
        ("config.TrainConfig.num_step=1", "got config.TrainConfig.num_step in .*num_steps"),
    ],
)
def test_a_typo_is_named_with_the_nearest(binding, sentence):
    with pytest.raises(InputError, match=sentence):
        gin_static.check({"own.gin": FILE}, [binding], ("uncurl_jax.config",))


def test_a_typo_in_a_file_is_named_with_its_place():
    text = f"{FILE}library.run.outt = 1\n"
    with pytest.raises(InputError, match=r"got library\.run\.outt at own\.gin:8: nearest out"):
        gin_static.check({"own.gin": text}, [], ())
