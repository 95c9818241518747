"""Which model is placed; what comes from files is tested with the command (tests/cli)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment.subjects import find_subject
from uncurl_jax.errors import InputError

MODEL = ModelConfig((8, 0, 4), 32, 16, 2, 24, 16)


def test_a_model_is_placed_as_it_is():
    assert find_subject(MODEL) == (MODEL, None, None, None)


@pytest.mark.parametrize(("given", "after"), [(2, (2, 0, 2)), ((4, 1), (4, 0, 1))])
def test_counts_are_a_question_about_a_prune(given, after):
    subject = find_subject(MODEL, num_experts=given)
    assert subject.model.num_experts == after
    assert subject.num_experts_before == (8, 0, 4)
    assert subject.loads is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_experts": (2, 2, 2)}, "got 3 numbers for 2 MoE layers: give 2 or one"),
        ({"num_experts": 5}, r"must lie in \[1, 4\] in layer 2, got 5"),
        ({"num_experts": 2, "plan": "p"}, "A prune is given once, got --plan and --num_experts"),
        ({"num_experts": 2, "statistics": "s"}, "got them with --num_experts: leave them out"),
        ({"plan": "p", "statistics": "s"}, "got them with --plan, which holds its own"),
        ({"plan": "nowhere.json"}, "A file must exist, got nothing at nowhere.json"),
    ],
)
def test_what_contradicts_itself_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        find_subject(MODEL, **options)


def test_a_model_with_an_encoder_is_refused():
    fields: dict[str, Any] = {"num_encoder_layers": 1, "position_embedding": "relative"}
    model = dataclasses.replace(MODEL, num_experts=(4, 4), **fields)
    with pytest.raises(InputError, match="uncurl placement takes decoders alone"):
        find_subject(model)
