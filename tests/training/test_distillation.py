"""Distillation terms by hand, in the step, on a mesh, and in whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import DistillationConfig, ModelConfig, TrainConfig
from uncurl_jax.data.token_cache import Batch, TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import init_params
from uncurl_jax.partitioning import make_mesh, place_batch
from uncurl_jax.pruning.grouping import GroupingOptions
from uncurl_jax.pruning.layer_plan import LayerPlan, PlanSource
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.training import distillation, train_step
from uncurl_jax.training.trainer import train

BOTH = DistillationConfig(logit_weight=0.5, router_weight=2.0, temperature=2.0)
LABELS = (0, 1, 0)


# The terms on arrays.


def logits_of(*probabilities: float) -> jax.Array:
    return jnp.log(jnp.array([[probabilities]], jnp.float32))


def test_the_logit_term_is_the_divergence_of_the_weighted_targets():
    teacher = jnp.concatenate([logits_of(0.5, 0.5), logits_of(0.9, 0.1)], axis=1)
    student = jnp.concatenate([logits_of(0.25, 0.75), logits_of(0.1, 0.9)], axis=1)
    weights = jnp.array([[3.0, 0.0]])
    # KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln 3 / 2 = 0.1438, three times.
    found = distillation.logit_divergence(student, teacher, weights, 1.0)
    assert float(found) == pytest.approx(3 * (np.log(2) - np.log(3) / 2), rel=1e-5)


def test_the_temperature_divides_logits_and_its_square_multiplies_the_term():
    # At temperature 2 the odds 1 : 9 become 1 : 3, so this is the case above, times 4.
    teacher, student = logits_of(0.5, 0.5), logits_of(0.1, 0.9)
    found = distillation.logit_divergence(student, teacher, jnp.ones((1, 1)), 2.0)
    assert float(found) == pytest.approx(4 * (np.log(2) - np.log(3) / 2), rel=1e-5)


def test_the_router_term_compares_sums_inside_clusters():
    # Clusters {0, 2} and {1}: the teacher says 1/2 and 1/2.
    teacher, student = logits_of(0.2, 0.5, 0.3), logits_of(0.25, 0.75)
    found = distillation.router_divergence(student, teacher, jnp.ones((1, 1), bool), LABELS)
    assert float(found) == pytest.approx(np.log(2) - np.log(3) / 2, rel=1e-5)


def test_dropped_experts_are_renormalised_away():
    found = distillation.cluster_log_probabilities(logits_of(0.2, 0.6, 0.2), (0, -1, 1))
    np.testing.assert_allclose(np.exp(found), [[[0.5, 0.5]]], rtol=1e-6)


def test_a_router_wider_than_its_experts_is_summed_too():
    teacher = logits_of(0.2, 0.5, 0.3)
    mask = jnp.ones((1, 1), bool)
    found = distillation.router_divergence(teacher, teacher, mask, LABELS, LABELS)
    assert float(found) == pytest.approx(0.0, abs=1e-6)


def test_padding_counts_in_neither_term():
    teacher, student = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    nothing = jnp.zeros((1, 1))
    assert distillation.logit_divergence(student, teacher, nothing, 1.0) == 0.0
    assert distillation.router_divergence(student, teacher, nothing > 0, (0, 1)) == 0.0


def test_no_gradient_reaches_the_teacher():
    teacher, student = logits_of(0.2, 0.5, 0.3), logits_of(0.25, 0.75)

    def routers(student, teacher):
        return distillation.router_divergence(student, teacher, jnp.ones((1, 1), bool), LABELS)

    def predictions(student, teacher):
        return distillation.logit_divergence(student, teacher, jnp.ones((1, 1)), 1.0)

    to_student, to_teacher = jax.grad(routers, argnums=(0, 1))(student, teacher)
    # The gradient of a softmax's divergence: student minus teacher.
    np.testing.assert_allclose(to_student, [[[-0.25, 0.25]]], atol=1e-6)
    assert not to_teacher.any()
    other = logits_of(0.5, 0.5)
    to_student, to_teacher = jax.grad(predictions, argnums=(0, 1))(student, other)
    np.testing.assert_allclose(to_student, [[[-0.25, 0.25]]], atol=1e-6)
    assert not to_teacher.any()


# The step.


def make_batch(seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, 259, (8, 17)).astype(np.int32)
    mask = np.arange(16) < generator.integers(5, 17, (8, 1))
    weights = (mask & (np.arange(16) >= 3)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, mask)


def spec_of(model: ModelConfig, labels: tuple[int, ...] = LABELS, weights=BOTH):
    clusters = (distillation.Clusters(0, labels),) if weights.router_weight else ()
    return distillation.Teacher(model, clusters, weights)


def run(model, config, teacher, steps=2, mesh=None, *, seed=1, **arguments):
    """Returns the last state and each step's metrics; the teacher has the parameters of seed 7."""
    step = train_step.make_train_step(model, config, mesh, teacher=teacher, **arguments)
    state = train_step.new_state(init_params(model, seed, mesh), config)
    taught = () if teacher is None else (init_params(teacher.model, 7, mesh),)
    metrics = []
    for index in range(steps):
        state, values = step(state, place_batch(make_batch(index), mesh), 0, *taught)
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def close_gradients(left: train_step.TrainState, right: train_step.TrainState) -> None:
    """Compares Adam's first moments, which are linear in the gradients; parameters are not."""
    moments = [
        [
            np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if "mu" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ]
        for state in (left, right)
    ]
    scale = max(np.abs(moment).max() for moment in moments[1])
    assert scale > 0
    for one, other in zip(*moments, strict=True):
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-4)


@pytest.fixture(scope="module")
def wide(model) -> ModelConfig:
    """Large initial values, so that teacher and student disagree."""
    return dataclasses.replace(model, init_stddev=0.5, auxiliary_loss_weight=0.0)


@pytest.fixture(scope="module")
def narrow(wide) -> ModelConfig:
    return wide.with_experts(2)


@pytest.fixture(scope="module")
def one_device(narrow, wide, config):
    return run(narrow, config, spec_of(wide))


def test_a_student_that_is_its_teacher_gets_no_term_and_the_same_gradients(wide, config):
    spec = spec_of(wide, labels=(0, 1, 2))
    taught, metrics = run(wide, config, spec, seed=7, steps=1)
    alone, expected = run(wide, config, None, seed=7, steps=1)
    assert metrics[0]["distillation_logit_kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics[0]["distillation_router_kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert metrics[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-4)
    close_gradients(taught, alone)


def test_the_terms_are_added_to_the_loss_by_their_weights(one_device):
    first = one_device[1][0]
    added = 0.5 * first["distillation_logit_kl"] + 2.0 * first["distillation_router_kl"]
    assert first["distillation_logit_kl"] > 0.1
    assert first["distillation_router_kl"] > 0.1
    assert first["loss"] == pytest.approx(first["cross_entropy"] + added, rel=1e-5)


def test_a_term_without_weight_is_not_computed(narrow, wide, config):
    weights = DistillationConfig(logit_weight=0.0, router_weight=1.0)
    _, (metrics,) = run(narrow, config, spec_of(wide, weights=weights), steps=1)
    assert "distillation_logit_kl" not in metrics
    assert metrics["distillation_router_kl"] > 0


def test_both_terms_fall_on_a_batch_that_repeats(narrow, wide, config):
    spec = spec_of(wide)
    step = train_step.make_train_step(narrow, config, teacher=spec)
    state = train_step.new_state(init_params(narrow, 1), config)
    teacher = init_params(wide, 7)
    before = jax.tree.map(np.array, teacher)
    found = []
    for _ in range(5):
        state, metrics = step(state, place_batch(make_batch(0), None), 0, teacher)
        found.append({name: float(value) for name, value in metrics.items()})
    for name in ("loss", "distillation_logit_kl", "distillation_router_kl"):
        assert found[1][name] > found[4][name], name
    # Neither donated nor trained.
    jax.tree.map(np.testing.assert_array_equal, teacher, before)


def test_logits_at_the_targets_alone_give_the_same_terms(narrow, wide, config, one_device):
    _, metrics = run(narrow, config, spec_of(wide), target_length=13)
    for found, expected in zip(metrics, one_device[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_accumulation_gives_the_terms_of_the_whole_batch(narrow, wide, config, one_device):
    parts = dataclasses.replace(config, accumulation_steps=4)
    state, metrics = run(narrow, parts, spec_of(wide))
    for found, expected in zip(metrics, one_device[1], strict=True):
        for name in ("loss", "distillation_logit_kl", "distillation_router_kl", "gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    close_gradients(state, one_device[0])


def test_eight_devices_give_the_terms_of_one(narrow, wide, config, one_device):
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    state, metrics = run(narrow, config, spec_of(wide), mesh=mesh)
    for found, expected in zip(metrics, one_device[1], strict=True):
        for name in ("loss", "distillation_logit_kl", "distillation_router_kl", "gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    close_gradients(state, one_device[0])


# Whole runs.


@pytest.fixture(scope="module")
def family(model, cache_path, tmp_path_factory) -> dict[str, Path]:
    """A teacher of three experts, and what it was pruned to: two."""
    root = tmp_path_factory.mktemp("family")
    vocabulary = TokenCache.open(cache_path).manifest["vocabulary"]
    with CheckpointStore(
        root / "teacher", model_config=model, provenance={"created_by": "t"}, vocabulary=vocabulary
    ) as store:
        store.save(0, init_params(dataclasses.replace(model, init_stddev=0.5), 7))
    plan = PruningPlan(
        method="uncurl",
        router="mean",
        grouping=GroupingOptions(),
        seed=0,
        alignment="features",
        gate_compensation=False,
        eval_capacity_factor=None,
        source=PlanSource(
            layout.fingerprint(root / "teacher"), "0" * 64, "text", "train", 10, (3, 0), 1
        ),
        layers=(
            LayerPlan(
                layer=0,
                method="uncurl",
                num_experts=3,
                labels=LABELS,
                reference=(0, 1),
                weights=(0.6, 1.0, 0.4),
                selected=(6.0, 5.0, 4.0),
                cluster_sizes=(2, 1),
                gate_factors=None,
                fitted_router=None,
                expected_drop_fraction=0.0,
                diagnostics={},
                verdict="good: made for a test",
                warnings=(),
            ),
        ),
    )
    prune_checkpoint(root / "teacher", plan, root / "pruned", workers=0)
    return {"teacher": root / "teacher", "pruned": root / "pruned"}


@pytest.fixture(scope="module")
def distilling(config) -> TrainConfig:
    return dataclasses.replace(
        config, model=None, distillation=BOTH, save_every_steps=2, max_to_keep=None, num_steps=4
    )


@pytest.fixture(scope="module")
def distilled(family, distilling, cache_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "distilled"
    train(
        distilling,
        cache=cache_path,
        out=out,
        initial_checkpoint=family["pruned"],
        teacher=family["teacher"],
        quiet=True,
    )
    return out


def test_a_run_records_its_teacher_and_the_terms(family, distilled):
    expected = {
        "path": str(layout.resolve(family["teacher"])),
        "fingerprint": layout.fingerprint(family["teacher"]),
    }
    record = read_json(distilled / "train_config.json")
    assert record["teacher"] == expected
    assert record["train_config"]["distillation"] == dataclasses.asdict(BOTH)
    assert layout.resolve(distilled).provenance()["teacher"] == expected
    lines = read_json_lines(distilled / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("distillation_logit_kl", "distillation_router_kl"):
        assert all(line[name] > 0 for line in lines)
    assert load_model(distilled).config.num_experts == (2, 0)


def test_an_interrupted_run_resumes_to_the_same_bits(
    family, distilling, distilled, cache_path, tmp_path
):
    out = tmp_path / "out"
    for stop in (2, None):
        train(
            distilling,
            cache=cache_path,
            out=out,
            initial_checkpoint=family["pruned"],
            teacher=family["teacher"],
            stop_after_step=stop,
            quiet=True,
        )
    one, other = (
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
        for lines in (read_json_lines(path / "metrics.jsonl") for path in (distilled, out))
    )
    assert one == other
    expected, found = layout.StateReader(distilled), layout.StateReader(out)
    for name in expected.metadata:
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)


def test_a_descendant_of_the_pruned_checkpoint_finds_the_plan(
    family, distilling, distilled, cache_path, tmp_path
):
    train(
        dataclasses.replace(distilling, trainable="router"),
        cache=cache_path,
        out=tmp_path / "out",
        initial_checkpoint=distilled,
        teacher=family["teacher"],
        stop_after_step=1,
        quiet=True,
    )
    assert layout.finished_steps(tmp_path / "out") == [1]


def test_a_student_can_learn_predictions_alone_from_any_teacher_of_its_vocabulary(
    family, distilling, model, cache_path, tmp_path
):
    weights = DistillationConfig(logit_weight=1.0)
    dense = dataclasses.replace(model, num_experts=(0,), embed_dim=4)
    train(
        dataclasses.replace(distilling, model=dense, distillation=weights),
        cache=cache_path,
        out=tmp_path / "out",
        teacher=family["teacher"],
        stop_after_step=1,
        quiet=True,
    )
    (line,) = read_json_lines(tmp_path / "out" / "metrics.jsonl")
    assert line["distillation_logit_kl"] > 0


# What is refused.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logit_weight": -1.0}, "must be at least 0, and one of them above, got -1.0 and 0.0"),
        ({"logit_weight": 0.0}, "one of them above, got 0.0 and 0.0"),
        ({"router_weight": float("nan")}, "got 1.0 and nan"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_weights_and_temperatures_that_mean_nothing_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        DistillationConfig(**values)


@pytest.fixture
def refused(cache_path, tmp_path):
    def check(config: TrainConfig, message: str, **arguments: Any) -> None:
        with pytest.raises(InputError, match=message):
            train(config, cache=cache_path, out=tmp_path / "out", quiet=True, **arguments)
        assert not (tmp_path / "out").exists()

    return check


def test_a_teacher_and_its_weights_must_come_together(family, distilling, config, refused):
    message = "needs a teacher and TrainConfig.distillation, got"
    refused(distilling, f"{message} config.distillation", initial_checkpoint=family["pruned"])
    refused(config, f"{message} a teacher without", teacher=family["teacher"])


def test_a_router_term_needs_a_plan_of_the_teacher(
    family, distilled, distilling, model, cache_path, refused
):
    message = "needs a student that was pruned from its teacher, got"
    fresh = dataclasses.replace(distilling, model=model.with_experts(2))
    refused(fresh, f"{message} a fresh student", teacher=family["teacher"])
    refused(
        distilling,
        rf"{message} .*pruned.* whose provenance has no plan of .*distilled",
        initial_checkpoint=family["pruned"],
        teacher=distilled,
    )


def test_a_teacher_of_another_vocabulary_or_layout_is_refused(
    family, distilling, model, cache_path, refused, tmp_path
):
    vocabulary = TokenCache.open(cache_path).manifest["vocabulary"]
    for name, change, record in (
        ("rows", {"vocab_size": 300}, vocabulary),
        ("short", {"max_length": 8}, vocabulary),
        ("words", {}, {**vocabulary, "hash": "f" * 64}),
    ):
        other = dataclasses.replace(model, **change)
        with CheckpointStore(
            tmp_path / name, model_config=other, provenance=json.loads("{}"), vocabulary=record
        ) as store:
            store.save(0, init_params(other, 0))
    for name, message in (
        ("rows", "same rows of embeddings, got vocab_size 300 of .* and 260"),
        ("short", "read rows as long as the student's, got max_length 8 of .* for length 16"),
        ("words", r"the teacher's vocabulary \(ffffffffffff\)"),
    ):
        refused(distilling, message, initial_checkpoint=family["pruned"], teacher=tmp_path / name)
