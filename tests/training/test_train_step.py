from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from uncurl_jax.config import ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.models.architecture import init_params
from uncurl_jax.partitioning import make_mesh, place_batch
from uncurl_jax.training import train_step

TOLERANCE = 1e-5


def make_batch(seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, 259, (8, 17)).astype(np.int32)
    lengths = generator.integers(5, 17, (8, 1))
    mask = np.arange(16) < lengths
    weights = (mask & (np.arange(16) >= 3)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, mask)


def named(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def run(
    model: ModelConfig,
    config: TrainConfig,
    steps: int,
    mesh: Mesh | None = None,
    target_length: int | None = None,
):
    """Returns the last state and each step's metrics."""
    step = train_step.make_train_step(model, config, mesh, target_length=target_length)
    state = train_step.new_state(init_params(model, config.seed, mesh), config)
    metrics = []
    for index in range(steps):
        state, values = step(state, place_batch(make_batch(index), mesh), config.seed)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def without_router_losses(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, auxiliary_loss_weight=0.0)


@pytest.fixture(scope="module")
def one_device(model, config) -> tuple[Any, list[dict[str, float]]]:
    return run(without_router_losses(model), config, 3)


def test_the_loss_is_the_weighted_mean_of_the_cross_entropy(one_device):
    _, (first, *_) = one_device
    assert first["loss"] == first["cross_entropy"]
    # Fresh parameters are small, so the prediction is nearly uniform over 260 ids.
    assert first["cross_entropy"] == pytest.approx(np.log(260), rel=1e-2)
    assert first["num_tokens"] == make_batch(0).mask.sum()
    assert first["fraction_tokens_left_behind"] == 0.0
    assert first["learning_rate"] == 0.0  # of the warm-up from 0


def test_logits_at_the_targets_alone_give_the_same_step(model, config, one_device):
    state, metrics = one_device
    # Rows of make_batch have at most 13 weighted targets, from place 3 on.
    narrow, narrow_metrics = run(without_router_losses(model), config, 3, target_length=13)
    for wide_values, narrow_values in zip(metrics, narrow_metrics, strict=True):
        assert wide_values == pytest.approx(narrow_values, rel=1e-5)
    expected = named(state.params)
    for name, array in named(narrow.params).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_loss_falls_on_a_batch_that_repeats(model, config):
    step = train_step.make_train_step(without_router_losses(model), config)
    state = train_step.new_state(init_params(model, 0), config)
    losses = []
    for _ in range(5):
        state, metrics = step(state, place_batch(make_batch(0), None), 0)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 5
    assert losses[0] == losses[1] > losses[2] > losses[3] > losses[4]


def test_accumulation_gives_the_gradient_of_the_whole_batch(model, config, one_device):
    # Parts have different numbers of weighted tokens, so a mean of means would be wrong.
    model = without_router_losses(model)
    state, metrics = run(model, dataclasses.replace(config, accumulation_steps=4), 1)
    whole, _ = run(model, config, 1)
    for name in ("loss", "cross_entropy", "token_accuracy", "gradient_norm", "num_tokens"):
        assert metrics[0][name] == pytest.approx(one_device[1][0][name], rel=TOLERANCE), name
    # Adam's first moments after one step are (1 - b1) times the clipped gradient.
    expected, found = named(whole.opt_state), named(state.opt_state)
    moments = [name for name in expected if "/mu/" in name]
    assert len(moments) == len(jax.tree.leaves(state.params))
    scale = max(np.abs(expected[name]).max() for name in moments)
    for name in moments:
        np.testing.assert_allclose(
            found[name] / scale, expected[name] / scale, atol=TOLERANCE, err_msg=name
        )


def test_router_losses_are_added_once_whatever_the_parts(model, config):
    _, (metrics,) = run(model, dataclasses.replace(config, accumulation_steps=2), 1)
    total = metrics["cross_entropy"] + metrics["auxiliary_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=TOLERANCE)
    # Routers begin balanced: the weight 0.01 times a loss near 1.
    assert metrics["auxiliary_loss"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("expert", "model_axis"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_eight_devices_train_the_losses_of_one(expert, model_axis, model, config, one_device):
    mesh = make_mesh(expert_partitions=expert, model_partitions=model_axis)
    state, metrics = run(without_router_losses(model), config, 3, mesh)
    for found, expected in zip(metrics, one_device[1], strict=True):
        for name in ("loss", "cross_entropy", "gradient_norm", "num_tokens", "router_confidence"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE), name
    shardings = {
        name: leaf.sharding
        for name, leaf in (
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        )
    }
    for name, sharding in shardings.items():
        if name.startswith("params/"):
            moments = [n for n in shardings if n.endswith(name.replace("params/", "/mu/"))]
            assert [shardings[n].spec for n in moments] == [sharding.spec]


def test_all_steps_on_a_mesh_are_one_program(model, config):
    mesh = make_mesh(expert_partitions=2)
    # Another length of schedule, so that no other test has made this program.
    config = dataclasses.replace(config, num_steps=config.num_steps + 1)
    step = train_step.make_train_step(model, config, mesh)
    state = train_step.new_state(init_params(model, config.seed, mesh), config)
    before = jax.tree.map(lambda array: array.sharding, state)
    for index in range(2):
        state, _ = step(state, place_batch(make_batch(index), mesh), config.seed)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda array: array.sharding, state) == before


def test_router_only_training_changes_nothing_but_router_kernels(model, config):
    config = dataclasses.replace(config, trainable="router")
    before = named(init_params(model, config.seed))
    state, metrics = run(model, config, 2)
    after = named(state.params)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"layers_0/moe/router/kernel"}
    assert metrics[0]["gradient_norm"] > 0


def test_jitter_depends_on_the_seed_and_the_step_only(model, config):
    model = dataclasses.replace(model, router_jitter=0.5)
    step = train_step.make_train_step(model, config)
    fresh = train_step.new_state(init_params(model, 0), config)
    batch = place_batch(make_batch(0), None)

    def confidence(seed: int, number: int) -> float:
        # The step donates its state, so each call gets a copy.
        state = jax.tree.map(jnp.copy, fresh._replace(step=jnp.int32(number)))
        return float(step(state, batch, seed)[1]["router_confidence"])

    assert confidence(0, 0) == confidence(0, 0)
    assert len({confidence(0, 0), confidence(1, 0), confidence(0, 1)}) == 3


def test_stages_that_differ_in_their_seed_share_one_program(model, config):
    other = dataclasses.replace(config, seed=9)
    assert train_step.make_train_step(model, config) is train_step.make_train_step(model, other)
    longer = dataclasses.replace(config, num_steps=7)
    assert train_step.make_train_step(model, config) is not train_step.make_train_step(
        model, longer
    )


@pytest.mark.parametrize("trainable", ["all", "router"])
def test_an_optimizer_state_survives_its_dict_form(trainable, model, config):
    config = dataclasses.replace(config, trainable=trainable)
    state = train_step.new_state(init_params(model, 0), config)
    values = train_step.state_dict(state.opt_state)
    _, template = train_step.abstract_state(model, config, None)
    restored = train_step.from_state_dict(template, values)
    assert jax.tree.structure(restored) == jax.tree.structure(state.opt_state)
    for left, right in zip(
        jax.tree.leaves(restored), jax.tree.leaves(state.opt_state), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_the_abstract_state_has_the_shardings_of_a_fresh_one(model, config):
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    state = train_step.new_state(init_params(model, 0, mesh), config)
    params, opt_state = train_step.abstract_state(model, config, mesh)
    for abstract, concrete in (
        *zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True),
        *zip(jax.tree.leaves(opt_state), jax.tree.leaves(state.opt_state), strict=True),
    ):
        assert abstract.shape == concrete.shape
        assert abstract.sharding.is_equivalent_to(concrete.sharding, concrete.ndim)
