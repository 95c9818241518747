"""The whole job on a small encoder-decoder: calibrate, plan, prune, evaluate, train."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints import layout, verify
from uncurl_jax.checkpoints.model import LoadedModel, load_model
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import DistillationConfig, ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.data.vocabulary import load_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation import generation
from uncurl_jax.evaluation.calibration import (
    calibrate_checkpoint,
    calibrate_model,
    sample_router_inputs,
)
from uncurl_jax.evaluation.evaluator import evaluate_model
from uncurl_jax.evaluation.layerwise_calibration import calibrate_layer_by_layer
from uncurl_jax.models import architecture
from uncurl_jax.partitioning import make_mesh
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.training import trainer

END = 1
LENGTH = 96


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def config(config: ModelConfig) -> ModelConfig:
    """One encoder layer and two of the decoder; experts in both."""
    return dataclasses.replace(
        config,
        num_experts=(4, 0, 4),
        num_encoder_layers=1,
        capacity_factor=None,
        activation="relu",
        has_mlp_bias=False,
        position_embedding="relative",
        norm="rms_norm",
        attention_bias="none",
        attention_scale=1.0,
        has_scaled_logits=True,
        encoder_end_id=END,
        auxiliary_loss_weight=0.0,
    )


@pytest.fixture(scope="module")
def checkpoint(config, save_checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("encoder_decoder") / "source"
    params = jax.device_get(architecture.init_params(config, 0))
    return save_checkpoint(directory, config, params)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def statistics(model, caches) -> RouterStatistics:
    return calibrate_model(model, caches["train"], batch_size=16, length=LENGTH, quiet=True)


@functools.cache
def compiled_alone(config: ModelConfig) -> Any:
    model = architecture.build(config)

    def run(params: Any, encoder_inputs: Any, encoder_mask: Any, inputs: Any):
        return model.apply(
            {"params": params},
            inputs,
            encoder_inputs=encoder_inputs,
            encoder_mask=encoder_mask,
            mutable=["router_observations"],
        )

    return jax.jit(run)


def run_alone(model: LoadedModel, prompt: list[int], answer: list[int]) -> Any:
    """Logits of one answer [n, vocab] and router logits {layer: [tokens, e]}, from plain lists."""
    read = [*prompt, END]
    # One shape; what stands to the right of an answer's token does not reach it.
    encoder_inputs = np.full((1, LENGTH), 9, np.int32)
    encoder_inputs[0, : len(read)] = read
    encoder_mask = np.arange(LENGTH)[None] < len(read)
    inputs = np.full((1, 16), 9, np.int32)
    inputs[0, : len(answer)] = [0, *answer[:-1]]
    logits, sown = compiled_alone(model.config)(model.params, encoder_inputs, encoder_mask, inputs)
    observed = sown["router_observations"]
    sizes = {0: len(read), 2: len(answer)}
    routers = {
        layer: np.asarray(
            observed[f"layers_{layer}"]["moe"]["observation"][0]["logits"][0, :size], np.float64
        )
        for layer, size in sizes.items()
    }
    return np.asarray(logits, np.float64)[0, : len(answer)], routers


def rows_of(cache: TokenCache, rows: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row, with the end of the text."""
    found = []
    for row in rows:
        tokens = cache.tokens[cache.offsets[row] : cache.offsets[row + 1]].tolist()
        length = int(cache.prompt_lengths[row])
        found.append((tokens[:length], tokens[length:]))
    return found


def test_statistics_are_sums_over_what_each_stack_reads(model, caches, statistics):
    cache = caches["train"]
    logits: dict[int, list[np.ndarray]] = {0: [], 2: []}
    for prompt, answer in rows_of(cache, np.flatnonzero(cache.is_target)):
        for layer, values in run_alone(model, prompt, answer)[1].items():
            logits[layer].append(values)
    assert set(statistics.layers) == {0, 2}
    for layer, parts in logits.items():
        h = np.concatenate(parts)
        got = statistics.layers[layer]
        assert got.tokens == len(h)
        np.testing.assert_allclose(got.gram, h.T @ h, rtol=1e-4)
        np.testing.assert_array_equal(got.selected, np.bincount(h.argmax(axis=-1), minlength=4))
    # Prompts are longer than answers: the numbers of tokens tell the stacks apart.
    assert statistics.layers[0].tokens > 2 * statistics.layers[2].tokens
    assert statistics.tokens == statistics.layers[0].tokens


def test_eight_devices_give_the_statistics_of_one(checkpoint, caches, statistics, tmp_path):
    out = tmp_path / "statistics.npz"
    calibrate_checkpoint(
        checkpoint, caches["train"], out=out, batch_size=6, expert_partitions=2, quiet=True
    )
    sharded = RouterStatistics.load(out)
    for layer, expected in statistics.layers.items():
        got = sharded.layers[layer]
        for name in ("tokens", "selected", "kept"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
        for name in ("gram", "logit_sum", "gate_mass", "prob_mass"):
            np.testing.assert_allclose(
                getattr(got, name), getattr(expected, name), rtol=1e-4, err_msg=name
            )


def test_a_sample_of_inputs_has_tokens_of_both_stacks(model, caches, statistics):
    arguments = {"batch_size": 8, "length": LENGTH}
    sample = sample_router_inputs(model, caches["train"], num_tokens=100, **arguments)
    assert {layer: array.shape[0] for layer, array in sample.layers.items()}[0] == 100
    # More than the decoder has: all of its tokens.
    whole = sample_router_inputs(model, caches["train"], num_tokens=10**6, **arguments)
    for layer, fields in statistics.layers.items():
        assert len(whole.layers[layer]) == fields.tokens
        kernel = np.asarray(model.params[f"layers_{layer}"]["moe"]["router"]["kernel"])
        h = whole.layers[layer].astype(np.float64) @ kernel
        np.testing.assert_allclose(h.sum(axis=0), fields.logit_sum, rtol=1e-3)


def test_scores_of_options_equal_those_of_each_by_itself(model, caches):
    cache = caches["entailment"]
    result = evaluate_model(model, cache, examples_per_batch=4, quiet=True)
    found = [score for row in result.predictions for score in row["log_likelihoods"]]
    expected = []
    for prompt, answer in rows_of(cache, range(cache.num_rows)):
        logits, _ = run_alone(model, prompt, answer)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chosen = shifted[np.arange(len(answer)), answer]
        expected.append((chosen - np.log(np.exp(shifted).sum(axis=-1))).sum())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.std(expected) > 1


def test_eight_devices_score_as_one_does(model, checkpoint, caches):
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    one, eight = (
        evaluate_model(loaded, caches["entailment"], examples_per_batch=4, quiet=True)
        for loaded in (model, load_model(checkpoint, mesh))
    )
    assert eight.summary["score"] == one.summary["score"]
    for left, right in zip(one.predictions, eight.predictions, strict=True):
        np.testing.assert_allclose(left["log_likelihoods"], right["log_likelihoods"], rtol=1e-4)


def test_generation_takes_the_likeliest_token_after_the_end_of_the_prompt(model, caches):
    cache = caches["entailment"]
    prompts = [cache.prompt(0), cache.prompt(3)[:7]]
    found = generation.generate(model, prompts, max_new_tokens=5, eos_id=END)
    for prompt, tokens in zip(prompts, found, strict=True):
        answer: list[int] = []
        while len(answer) < 5:
            logits, _ = run_alone(model, prompt, [*answer, 0])
            answer.append(int(logits[-1].argmax()))
            if answer[-1] == END:
                break
        assert tokens == [token for token in answer if token != END]
    assert found[0] != found[1]


def test_a_prompt_and_its_end_must_fit_the_encoder(model):
    assert generation.prompt_room(model.config, 96) == 95
    assert generation.prompt_room(model.config, 97) < 1
    with pytest.raises(InputError, match="must fit max_length=96, got 96 \\+ 2"):
        generation.generate(model, [[5] * 96], max_new_tokens=2, eos_id=END)


# Prunes.


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    reader = layout.StateReader(path)
    return {name: reader.read(f"{layout.TARGET}/{name}") for name in reader.parameters()}


@pytest.fixture(scope="module")
def pruning_plan(statistics) -> PruningPlan:
    """3 experts in the encoder and 2 in the decoder."""
    return make_plan(statistics, num_experts=(3, 2), eval_capacity_factor=None)


@pytest.fixture(scope="module")
def pruned(checkpoint, pruning_plan, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    prune_checkpoint(checkpoint, pruning_plan, out, workers=0)
    return out


def test_a_prune_to_as_many_experts_is_the_identity(checkpoint, statistics, tmp_path):
    plan = make_plan(statistics, num_experts=4, eval_capacity_factor=None)
    prune_checkpoint(checkpoint, plan, tmp_path / "same", workers=0)
    before, after = arrays_of(checkpoint), arrays_of(tmp_path / "same")
    assert before.keys() == after.keys()
    order = {layer.layer: np.asarray(layer.reference) for layer in plan.layers}
    for name, array in before.items():
        if "/moe/" in name:
            places = order[int(name.split("/")[0].removeprefix("layers_"))]
            array = array[places] if "/experts/" in name else array[:, places]
        np.testing.assert_array_equal(after[name], array, name)


def test_a_prune_changes_experts_and_routers_alone_and_is_verified(checkpoint, pruned):
    before, after = arrays_of(checkpoint), arrays_of(pruned)
    assert layout.resolve(pruned).model_config().num_experts == (3, 0, 2)
    for name, array in after.items():
        if "/moe/" not in name:
            np.testing.assert_array_equal(array, before[name], name)
    assert after["layers_0/moe/experts/wi"].shape[0] == 3
    assert after["layers_2/moe/router/kernel"].shape[1] == 2
    assert verify.verify_checkpoint(pruned)["verified"] is True


def test_a_pruned_model_is_evaluated_in_both_ways(pruned, caches):
    model, cache = load_model(pruned), caches["entailment"]
    ranked = evaluate_model(model, cache, examples_per_batch=4, quiet=True).summary
    assert ranked["num_examples"] == 11 and ranked["checkpoint"]["num_experts"] == [3, 0, 2]
    generated = evaluate_model(
        model,
        cache,
        mode="generate",
        vocabulary=load_vocabulary("bytes"),
        max_new_tokens=3,
        quiet=True,
    ).summary
    assert generated["num_examples"] == 11 and generated["num_shortened_prompts"] == 0


# Training.


def train(checkpoint: Path, cache: TokenCache, out: Path, **fields: Any) -> Path:
    teacher = fields.pop("teacher", None)
    settings = TrainConfig(
        OptimizerConfig(peak_learning_rate=1e-2, schedule="constant"),
        **{"num_steps": 3, "batch_size": 8, "log_every_steps": 1, **fields},
    )
    trainer.train(
        settings,
        cache=cache.directory,
        out=out,
        initial_checkpoint=checkpoint,
        teacher=teacher,
        quiet=True,
    )
    return out


def metrics_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_warm_up_changes_the_routers_of_both_stacks_alone(pruned, caches, tmp_path):
    out = train(pruned, caches["train"], tmp_path / "warm", trainable="router")
    before, after = arrays_of(pruned), arrays_of(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"layers_{layer}/moe/router/kernel" for layer in (0, 2)}


def test_finetuning_lowers_the_loss_of_answers_and_not_of_prompts(pruned, caches, tmp_path):
    out = train(pruned, caches["train"], tmp_path / "fine", num_steps=6, length=LENGTH)
    lines = metrics_of(out)
    assert lines[-1]["cross_entropy"] < 0.9 * lines[0]["cross_entropy"]
    # The first loss is that of the answers of the first batch.
    cache, model = caches["train"], load_model(pruned)
    batch = next(cache.train_batches(8, length=LENGTH, seed=0))
    total = tokens = 0.0
    for targets, weights in zip(batch.targets, batch.weights, strict=True):
        first = int(weights.argmax())
        answer = targets[first : first + int(weights.sum())].tolist()
        logits, _ = run_alone(model, targets[:first].tolist(), answer)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chosen = shifted[np.arange(len(answer)), answer]
        total -= (chosen - np.log(np.exp(shifted).sum(axis=-1))).sum()
        tokens += len(answer)
    assert lines[0]["cross_entropy"] == pytest.approx(total / tokens, rel=1e-4)
    changed = {
        name
        for name, array in arrays_of(pruned).items()
        if not np.array_equal(array, arrays_of(out)[name])
    }
    assert changed == set(arrays_of(out))


@pytest.mark.slow
def test_routers_of_both_stacks_learn_from_the_teacher(
    checkpoint, pruned, pruning_plan, caches, tmp_path
):
    # In two parts, so that what they are divided by is that of the whole batch.
    out = train(
        pruned,
        caches["train"],
        tmp_path / "run",
        num_steps=1,
        accumulation_steps=2,
        distillation=DistillationConfig(logit_weight=0.0, router_weight=1.0),
        teacher=checkpoint,
    )
    found = metrics_of(out)[0]["distillation_router_kl"]
    labels = {layer.layer: np.asarray(layer.labels) for layer in pruning_plan.layers}
    student, teacher = load_model(pruned), load_model(checkpoint)
    batch = next(caches["train"].train_batches(8, length=LENGTH, seed=0))
    sums, counts = {0: 0.0, 2: 0.0}, {0: 0, 2: 0}
    for targets, row_weights in zip(batch.targets, batch.weights, strict=True):
        first = int(row_weights.argmax())
        answer = targets[first : first + int(row_weights.sum())].tolist()
        pair = [run_alone(m, targets[:first].tolist(), answer)[1] for m in (teacher, student)]
        for layer in sums:
            p, q = (np.exp(r[layer]) / np.exp(r[layer]).sum(axis=1, keepdims=True) for r in pair)
            mass = np.stack(
                [p[:, labels[layer] == cluster].sum(axis=1) for cluster in range(q.shape[1])], 1
            )
            sums[layer] += (mass * (np.log(mass) - np.log(q))).sum()
            counts[layer] += len(p)
    expected = np.mean([sums[layer] / counts[layer] for layer in sums])
    assert found == pytest.approx(expected, rel=1e-3)


# What is refused.


def test_plain_text_is_refused_before_any_work(checkpoint, model, caches, tmp_path):
    corpus, message = (
        caches["corpus"],
        "with a prompt and an answer, got synthetic_corpus",
    )
    with pytest.raises(InputError, match=message):
        calibrate_checkpoint(checkpoint, corpus, out=tmp_path / "s.npz", quiet=True)
    with pytest.raises(InputError, match=message):
        evaluate_model(model, corpus, quiet=True)
    with pytest.raises(InputError, match=message):
        train(checkpoint, corpus, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_calibration_layer_by_layer_is_refused(checkpoint, caches, tmp_path):
    with pytest.raises(InputError, match="--layer_by_layer takes decoders alone, got an encoder-"):
        calibrate_layer_by_layer(checkpoint, caches["train"], out=tmp_path / "s.npz", quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_another_architecture_is_refused(
    checkpoint, config, caches, save_checkpoint, zero_params, tmp_path
):
    decoder = ModelConfig((4,), 260, 16, 2, 32, 96, dtype="float32")
    teacher = save_checkpoint(tmp_path / "teacher", decoder, zero_params(decoder))
    with pytest.raises(InputError, match="must have the same encoder layers, got num_encoder_la"):
        train(
            checkpoint,
            caches["train"],
            tmp_path / "run",
            distillation=DistillationConfig(),
            teacher=teacher,
        )
    assert not (tmp_path / "run").exists()
