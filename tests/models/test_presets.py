from __future__ import annotations

from collections.abc import Iterator

import gin
import pytest

from uncurl_jax import config
from uncurl_jax.cli import gin_config
from uncurl_jax.models.architecture import count_parameters


@pytest.fixture(autouse=True)
def clean_gin() -> Iterator[None]:
    yield
    gin.clear_config()


def build(preset: str, num_experts: int) -> config.ModelConfig:
    gin_config.parse([f"gin/models/{preset}.gin"], [f"NUM_EXPERTS = {num_experts}"], [])
    return gin_config.configured(config.ModelConfig)()


@pytest.mark.parametrize(
    ("preset", "num_experts", "millions"),
    [
        ("354m", 0, 354),
        ("354m", 8, 1_050),
        ("354m", 32, 3_400),
        ("354m", 64, 6_700),
        ("354m", 128, 13_000),
        ("124m", 0, 124),
    ],
)
def test_a_preset_has_the_parameters_that_the_paper_gives(
    preset: str, num_experts: int, millions: int
):
    counts = count_parameters(build(preset, num_experts))
    assert counts.total / 1e6 == pytest.approx(millions, rel=0.025)


def test_experts_of_the_preset_stand_in_every_other_layer_and_add_to_the_dense_model():
    dense, moe = build("354m", 0), build("354m", 32)
    assert moe.moe_layers == tuple(range(0, 24, 2))
    one_expert = 2 * 1024 * 4096 + 4096 + 1024
    routers = 12 * 1024 * 32
    difference = count_parameters(moe).total - count_parameters(dense).total
    assert difference == 12 * 31 * one_expert + routers
    assert count_parameters(moe).active == count_parameters(dense).total + routers


def test_switch_base_is_t5_base_with_experts_in_every_other_layer():
    # transformers counts 222,903,552 parameters in t5-base, whose architecture this is when dense.
    dense, moe = build("switch_base", 0), build("switch_base", 8)
    assert count_parameters(dense).total == 222_903_552
    assert moe.moe_layers == tuple(range(1, 24, 2)) and moe.num_encoder_layers == 12
    one_expert, routers = 2 * 768 * 3072, 12 * 768 * 8
    assert count_parameters(moe).total == 222_903_552 + 12 * 7 * one_expert + routers


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_small_presets_build(preset: str):
    model = build(preset, 16)
    assert set(model.num_experts) == {0, 16}
    assert count_parameters(model).total > count_parameters(model).active
