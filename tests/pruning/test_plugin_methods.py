"""A method of one's own: in a module that a gin file imports, named like the built-in ones."""

from __future__ import annotations

import importlib
import sys

import gin
import numpy as np
import pytest

from uncurl_jax.cli import gin_config, main
from uncurl_jax.errors import InputError
from uncurl_jax.pruning import methods, plan

MODULE = '''
"""Merges neighbours."""

import numpy as np

from uncurl_jax.pruning.methods import Grouping, GroupRequest, Method, merge, register_method

calls = []


def halves(request: GroupRequest) -> Grouping:
    calls.append(request)
    router = request.parameters.router if request.parameters else None
    labels = np.arange(request.num_experts) * request.num_clusters // request.num_experts
    return merge(request, labels, {"has_router": router is not None})


register_method(Method("my_halves", halves, "merge neighbours"))
'''

GIN = """
from __gin__ import dynamic_registration
import my_pruning_methods
from uncurl_jax.pruning import plan
plan.make_plan.method = 'my_halves'
plan.make_plan.num_experts = 2
plan.make_plan.merge_weights = 'uniform'
"""


@pytest.fixture
def statistics(reference):
    return reference.router_statistics({0: reference.fixed_statistics([1, 2, 9, 4])}, (4,))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A directory with the user's module, importable, and a gin file; forgotten afterwards."""
    (tmp_path / "my_pruning_methods.py").write_text(MODULE)
    (tmp_path / "mine.gin").write_text(GIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    gin.clear_config()
    sys.modules.pop("my_pruning_methods", None)
    methods._METHODS.pop("my_halves", None)


def test_a_gin_file_brings_a_method_into_make_plan(plugin, statistics):
    with pytest.raises(InputError, match="got 'my_halves'"):
        plan.make_plan(statistics, num_experts=2, method="my_halves")
    gin_config.parse(["mine.gin"], [], [])
    made = gin_config.configured(plan.make_plan)(statistics)
    layer = made.layers[0]
    assert made.method == layer.method == "my_halves"
    assert layer.labels == (1, 1, 0, 0)  # by falling selections: 13 before 3
    assert layer.weights == (0.5, 0.5, 0.5, 0.5)
    assert layer.reference == (2, 1)
    assert layer.diagnostics["has_router"] is False
    assert plan.PruningPlan.from_dict(made.to_dict()) == made


def test_the_command_line_plans_with_a_method_from_a_gin_file(plugin, statistics, capsys):
    statistics.save(plugin / "statistics.npz")
    command = "plan --gin_file mine.gin --statistics statistics.npz --out plan.json"
    assert main(command.split()) == 0, capsys.readouterr().err
    made = plan.PruningPlan.load(plugin / "plan.json")
    assert made.method == "my_halves" and made.layers[0].labels == (1, 1, 0, 0)
    assert made.num_experts == (2,)


def test_the_command_line_refuses_what_a_method_of_ones_own_does_wrong(plugin, statistics, capsys):
    wrong = MODULE.replace("return merge(", "return merge and (")
    (plugin / "my_pruning_methods.py").write_text(wrong)
    statistics.save(plugin / "statistics.npz")
    command = "plan --gin_file mine.gin --statistics statistics.npz --out plan.json"
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert "Method 'my_halves' must return a Grouping with labels" in said and "tuple" in said
    assert not (plugin / "plan.json").exists()


def test_a_method_gets_the_whole_request(plugin, statistics):
    gin_config.parse(["mine.gin"], ["plan.make_plan.max_cluster_size = 3"], [])
    gin_config.configured(plan.make_plan)(statistics)
    (request,) = sys.modules["my_pruning_methods"].calls
    assert request.num_clusters == 2 and request.num_experts == 4
    assert request.options.max_cluster_size == 3
    assert request.options.merge_weights == "uniform"
    np.testing.assert_array_equal(request.selected, [1, 2, 9, 4])
    assert isinstance(request.seed, int) and request.parameters is None
