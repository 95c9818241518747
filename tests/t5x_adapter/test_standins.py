from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator

import pytest

from uncurl_jax.t5x_adapter import standins

PACKAGES = ("airio", "jestimator")


@pytest.fixture
def missing(monkeypatch) -> Iterator[tuple[str, ...]]:
    """The packages that are stood in for; what was there before comes back."""
    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGES:
            monkeypatch.delitem(sys.modules, name)
    yield standins.install()
    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGES:
            del sys.modules[name]


def test_what_is_there_already_stays(missing):
    before = {name: sys.modules[name] for name in missing}
    assert standins.install() == ()
    assert {name: sys.modules[name] for name in missing} == before
    assert all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def test_nothing_is_an_instance_of_airios_classes(missing):
    if "airio" not in missing:
        pytest.skip("airio is installed")
    core = importlib.import_module("airio.core")
    for name in ("DatasetProviderBase", "Task", "Mixture", "AirIODatasetIterator"):
        assert not isinstance("a task", getattr(core, name))


def test_what_is_called_says_what_is_missing(missing):
    if set(missing) != set(PACKAGES):
        pytest.skip("airio or jestimator is installed")
    amos = importlib.import_module("jestimator.amos")
    with pytest.raises(ImportError, match=r"jestimator\.amos\.amos needs the package jestimator"):
        amos.amos(learning_rate=1.0)
    core = importlib.import_module("airio.core")
    with pytest.raises(ImportError, match=r"get_vocabularies needs the package airio"):
        core.dataset_providers.get_vocabularies("task")


def test_other_names_are_missing_in_words(missing):
    if "airio" not in missing:
        pytest.skip("airio is installed")
    core = importlib.import_module("airio.core")
    with pytest.raises(AttributeError, match=r"airio\.core\.PyGrain is not there, because airio"):
        _ = core.PyGrain
    assert not hasattr(core, "__file__")
