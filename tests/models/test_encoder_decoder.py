"""Encoder-decoders against transformers on the same parameters, and against themselves."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.checkpoints.parameters import expected_parameters
from uncurl_jax.config import ModelConfig
from uncurl_jax.data.token_cache import Batch
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation import generation
from uncurl_jax.models import architecture
from uncurl_jax.models.attention import distance_buckets
from uncurl_jax.models.decoder import Decoder, moe_metrics
from uncurl_jax.partitioning import make_mesh, place_batch

_path = Path(__file__).parent / "switch_reference.py"
_spec = importlib.util.spec_from_file_location("switch_reference", _path)
assert _spec is not None and _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

TOLERANCE = 1e-4
CONFIGS: dict[str, ModelConfig] = reference.CONFIGS
RELU = CONFIGS["relu"]
every_model = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def params_of(config: ModelConfig) -> Any:
    return jax.tree.map(jnp.asarray, reference.nested(reference.random_params(config)))


def named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def arguments_of(config: ModelConfig) -> dict[str, np.ndarray]:
    inputs = reference.make_inputs(config)
    prompt = {"encoder_inputs": inputs["prompt"], "encoder_mask": inputs["prompt_mask"]}
    return {"inputs": inputs["inputs"], "mask": inputs["mask"], **prompt}


def run(config: ModelConfig, params: Any, **arguments: Any) -> tuple[np.ndarray, dict[int, Any]]:
    """Returns logits and each MoE layer's observation."""

    @jax.jit
    def apply(params: Any, arguments: Any):
        return architecture.build(config).apply(
            {"params": params}, **arguments, mutable=["router_observations"]
        )

    logits, sown = apply(params, arguments)
    observed: Any = sown["router_observations"]
    layers = {n: observed[f"layers_{n}"]["moe"]["observation"][0] for n in config.moe_layers}
    return np.asarray(logits), jax.tree.map(np.asarray, layers)


def generated(config: ModelConfig, params: Any, prompts: list[list[int]], count: int) -> np.ndarray:
    """Greedy answers with the cache, zeros from the end of the text on."""
    rows = [[*prompt, config.encoder_end_id] for prompt in prompts]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    inputs = np.zeros((len(rows), lengths.max() + 2), np.int32)
    for place, row in enumerate(rows):
        inputs[place, : len(row)] = row
    compiled = generation.compiled_generate(config, count, True, reference.END)
    tokens = np.asarray(compiled(params, inputs, lengths, np.float32(1), 0))
    return np.where(np.cumsum(tokens == reference.END, axis=1) > 0, 0, tokens)


def compare(config: ModelConfig, expected: dict[str, np.ndarray]) -> None:
    """Compares logits, router logits of both stacks and greedy answers with transformers'."""
    params, inputs = params_of(config), reference.make_inputs(config)
    logits, layers = run(config, params, **arguments_of(config))
    mask = {True: inputs["prompt_mask"], False: inputs["mask"]}
    np.testing.assert_allclose(
        logits[mask[False]], expected["logits"][mask[False]], rtol=0, atol=TOLERANCE
    )
    for layer, observed in layers.items():
        is_token = mask[config.is_encoder_layer(layer)]
        np.testing.assert_allclose(
            observed["logits"][is_token],
            expected[f"router_logits_{layer}"][is_token],
            rtol=0,
            atol=TOLERANCE,
            err_msg=f"layer {layer}",
        )
    greedy = generated(config, params, reference.prompts(inputs), reference.NEW_TOKENS)
    np.testing.assert_array_equal(greedy, expected["greedy"])


@every_model
def test_logits_routers_and_greedy_answers_equal_those_recorded_of_transformers(name):
    expected = reference.load(name)
    # The references are worth comparing with: logits and answers of rows differ.
    assert expected["logits"].std() > 0.5
    assert len({tuple(row) for row in expected["greedy"].tolist()}) == len(expected["greedy"])
    compare(CONFIGS[name], expected)


@pytest.mark.hf
@every_model
def test_logits_routers_and_greedy_answers_equal_those_of_transformers(name):
    pytest.importorskip("torch", reason="comparing with transformers needs torch")
    pytest.importorskip("transformers", reason="comparing with transformers needs transformers")
    expected = reference.transformers_results(CONFIGS[name])
    compare(CONFIGS[name], expected)
    for key, recorded in reference.load(name).items():
        np.testing.assert_allclose(expected[key], recorded, rtol=0, atol=TOLERANCE, err_msg=key)


@every_model
def test_the_parameters_are_those_that_checkpoints_expect(name):
    found = named(architecture.abstract_params(CONFIGS[name]))
    shapes = {key: leaf.shape for key, leaf in found.items()}
    assert shapes == expected_parameters(CONFIGS[name])
    axes = named(architecture.logical_axes(CONFIGS[name]))
    assert set(axes) == set(shapes)
    assert tuple(axes["encoder_relative_position/embedding"]) == ("unmodeled", "heads")


def test_layers_are_numbered_over_both_stacks():
    found = expected_parameters(CONFIGS["gated_gelu"])
    for layer in range(5):
        assert (f"layers_{layer}/cross_attention/query/kernel" in found) == (layer >= 2)
        assert (f"layers_{layer}/moe/experts/wg" in found) == (layer in (0, 1, 3))
    counts = architecture.count_parameters(CONFIGS["gated_gelu"])
    assert counts.total == sum(int(np.prod(shape)) for shape in found.values())
    # One of 3, of 5 and of 2 experts is used.
    assert counts.total - counts.active == (2 + 4 + 1) * 3 * 20 * 14


# Positions.


def test_buckets_worked_by_hand():
    # 8 buckets to distance 16: single distances 0 to 3, then from 4, 4*4^(1/4) = 5.66,
    # 4*4^(2/4) = 8 and 4*4^(3/4) = 11.3 on.
    expected = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    assert distance_buckets(8, 16).tolist() == expected


@pytest.mark.parametrize(("buckets", "distance"), [(16, 128), (32, 128), (8, 50), (4, 9)])
def test_buckets_are_those_of_the_logarithm(buckets: int, distance: int):
    exact = buckets // 2
    places = np.arange(distance + 1)
    found = distance_buckets(buckets, distance)
    assert found[:exact].tolist() == list(range(exact))
    shares = np.log(places[exact:] / exact) / np.log(distance / exact) * exact
    # Where the share is a whole number, its logarithm in floating point may be just below it.
    expected = exact + np.minimum(np.floor(shares + 1e-9), exact - 1)
    np.testing.assert_array_equal(found[exact:], expected)


def test_an_encoder_looks_both_ways_and_a_decoder_back_alone():
    params, given = params_of(RELU), arguments_of(RELU)
    before, layers = run(RELU, params, **given)
    prompt = given["encoder_inputs"].copy()
    prompt[0, -1] = prompt[0, -1] % 50 + 2  # the last token of the longest prompt
    after, changed = run(RELU, params, **{**given, "encoder_inputs": prompt})
    first = RELU.moe_layers[0]
    assert np.abs(layers[first]["inputs"][0, 0] - changed[first]["inputs"][0, 0]).max() > 1e-4
    assert np.abs(after[0] - before[0]).max() > 1e-3
    np.testing.assert_allclose(after[1:], before[1:], atol=1e-6)

    answer = given["inputs"].copy()
    answer[1, 6:] = answer[1, 6:] % 50 + 2
    after, _ = run(RELU, params, **{**given, "inputs": answer})
    np.testing.assert_allclose(after[1, :6], before[1, :6], atol=1e-6)
    assert np.abs(after[1, 6:] - before[1, 6:]).max() > 1e-3


def test_padding_of_prompts_and_answers_changes_nothing():
    params, given = params_of(RELU), arguments_of(RELU)
    before, layers = run(RELU, params, **given)
    generator = np.random.default_rng(0)
    changed: dict[str, Any] = dict(given)
    for tokens, mask in (("inputs", "mask"), ("encoder_inputs", "encoder_mask")):
        noise = generator.integers(2, 50, given[tokens].shape)
        changed[tokens] = np.where(given[mask], given[tokens], noise).astype(np.int32)
        assert (changed[tokens] != given[tokens]).any()
    # Longer rows, too.
    changed = {
        key: np.pad(array, ((0, 0), (0, 2)), constant_values=0) for key, array in changed.items()
    }
    after, others = run(RELU, params, **changed)
    mask = given["mask"]
    np.testing.assert_allclose(after[:, :-2][mask], before[mask], atol=1e-5)
    for layer in RELU.moe_layers:
        seen = given["encoder_mask"] if RELU.is_encoder_layer(layer) else mask
        np.testing.assert_allclose(
            others[layer]["logits"][:, :-2][seen], layers[layer]["logits"][seen], atol=1e-5
        )


@every_model
def test_decoding_with_the_cache_equals_the_full_forward_pass(name):
    config, given = CONFIGS[name], arguments_of(CONFIGS[name])
    params = params_of(config)
    expected, _ = run(config, params, **given)
    model = architecture.build(config)
    prompt = {key: given[key] for key in ("encoder_inputs", "encoder_mask")}

    @jax.jit
    def first(params: Any, inputs: Any):
        return model.apply(
            {"params": params},
            inputs,
            positions=jnp.zeros_like(inputs),
            **prompt,  # pyright: ignore[reportArgumentType]
            decode=True,
            mutable=["cache"],
        )

    @jax.jit
    def later(params: Any, cache: Any, inputs: Any, position: Any):
        return model.apply(
            {"params": params, **cache},
            inputs,
            positions=jnp.full_like(inputs, position),
            decode=True,
            mutable=["cache"],
        )

    logits, cache = first(params, given["inputs"][:, :1])
    found = [logits]
    for place in range(1, given["inputs"].shape[1]):
        logits, cache = later(params, cache, given["inputs"][:, place : place + 1], place)
        found.append(logits)
    mask = given["mask"]
    np.testing.assert_allclose(np.concatenate(found, axis=1)[mask], expected[mask], atol=1e-5)
    abstract = named(generation.abstract_cache(config, 3))
    stored = named(cache["cache"])
    assert set(abstract) == set(stored)


# What a batch is to a model.


def make_batch() -> Batch:
    """A row of 3 + 2 tokens, one of 1 + 4, one that fills the row, and filling."""
    targets = np.asarray(
        [
            [11, 12, 13, 21, 1, 0, 0, 0],
            [14, 22, 23, 24, 1, 0, 0, 0],
            [11, 12, 13, 14, 15, 16, 17, 1],
            [0] * 8,
        ],
        np.int32,
    )
    mask = targets != 0
    prompts = np.asarray([[3], [1], [7], [0]])
    weights = (mask & (np.arange(8) >= prompts)).astype(np.float32)
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return Batch(inputs, targets, weights, mask)


def test_a_row_is_split_into_prompt_and_answer():
    read = architecture.read_batch(RELU, make_batch(), 4)
    np.testing.assert_array_equal(
        read.arguments["encoder_inputs"],
        [
            [11, 12, 13, 1, 0, 0, 0, 0],
            [14, 1, 0, 0, 0, 0, 0, 0],
            [11, 12, 13, 14, 15, 16, 17, 1],
            [0] * 8,
        ],
    )
    np.testing.assert_array_equal(read.arguments["encoder_mask"].sum(axis=1), [4, 2, 8, 0])
    answers = [[21, 1, 0, 0], [22, 23, 24, 1], [1, 0, 0, 0], [0] * 4]
    np.testing.assert_array_equal(read.targets, answers)
    np.testing.assert_array_equal(
        read.arguments["inputs"], [[0, 21, 1, 0], [0, 22, 23, 24], [0, 1, 0, 0], [0] * 4]
    )
    np.testing.assert_array_equal(read.arguments["mask"], np.asarray(answers) != 0)
    np.testing.assert_array_equal(read.weights, np.asarray(answers) != 0)
    for layer, mask in enumerate(read.masks):
        expected = "encoder_mask" if layer < 4 else "mask"
        np.testing.assert_array_equal(mask, read.arguments[expected])


def test_without_an_end_the_encoder_reads_the_prompt_alone():
    config = dataclasses.replace(RELU, encoder_end_id=None)
    read = architecture.read_batch(config, make_batch(), None)
    assert read.targets.shape == (4, 8)
    np.testing.assert_array_equal(read.arguments["encoder_mask"].sum(axis=1), [3, 1, 7, 0])
    np.testing.assert_array_equal(read.arguments["encoder_inputs"][0], [11, 12, 13] + [0] * 5)


def test_a_decoder_reads_whole_rows():
    config = ModelConfig((2,), 53, 8, 2, 8, 8)
    batch = make_batch()
    read = architecture.read_batch(config, batch, 4)
    assert set(read.arguments) == {"inputs", "mask", "logit_positions"}
    np.testing.assert_array_equal(read.arguments["inputs"], batch.inputs)
    np.testing.assert_array_equal(read.arguments["logit_positions"][:, 0], [3, 1, 4, 0])
    assert "logit_positions" not in architecture.read_batch(config, batch).arguments


# Meshes and errors.


def loss_and_gradients(config: ModelConfig, mesh: Any, num_groups: int | None) -> Any:
    model = architecture.build(config, mesh, num_groups)
    generator = np.random.default_rng(2)
    given = arguments_of(config)
    rows = np.resize(np.arange(3), 8)
    given = {key: array[rows] for key, array in given.items()}
    for tokens, mask in (("inputs", "mask"), ("encoder_inputs", "encoder_mask")):
        given[tokens] = np.where(
            given[mask], generator.integers(2, 50, given[mask].shape), 0
        ).astype(np.int32)
    cotangent = generator.normal(size=(*given["inputs"].shape, config.vocab_size))

    def loss(params: Any, given: Any, cotangent: Any):
        logits, sown = model.apply(
            {"params": params}, **given, is_training=True, mutable=["intermediates"]
        )
        metrics = moe_metrics(sown["intermediates"])
        weighted = jnp.sum(logits * cotangent * given["mask"][..., None]) / given["mask"].sum()
        return weighted + metrics["auxiliary_loss"], (logits, metrics)

    params = params_of(config)
    if mesh is not None:
        abstract = architecture.abstract_params(config, mesh)
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    placed = place_batch((given, cotangent.astype(np.float32)), mesh)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, *placed).compile()
    return compiled.as_text() or "", jax.device_get(compiled(params, *placed))


@pytest.mark.parametrize("factor", [pytest.param(None, marks=pytest.mark.slow), 0.6])
def test_eight_devices_equal_one(factor: float | None):
    config = dataclasses.replace(
        RELU,
        num_experts=(3, 0, 5),
        num_encoder_layers=1,
        max_length=16,
        # Random scores that nothing divides are so large that rounding shows.
        attention_scale=None,
        capacity_factor=factor,
        min_capacity=1,
    )
    mesh = make_mesh(expert_partitions=2, model_partitions=2)
    text, found = loss_and_gradients(config, mesh, None)
    _, expected = loss_and_gradients(config, None, 4)
    assert ("all-to-all" in text) == (factor is not None)
    (loss, (logits, metrics)), gradients = found
    (loss_one, (logits_one, metrics_one)), gradients_one = expected
    assert (metrics["fraction_tokens_left_behind"] > 0.05) == (factor is not None)
    np.testing.assert_allclose(loss, loss_one, atol=1e-5)
    np.testing.assert_allclose(logits, logits_one, atol=1e-5)
    # Slots, and so their use, depend on how many devices divide the experts.
    for name in set(metrics) - {"expert_usage"}:
        np.testing.assert_allclose(metrics[name], metrics_one[name], rtol=1e-5, atol=1e-6)
    for (name, leaf), one in zip(
        named(gradients).items(), named(gradients_one).values(), strict=True
    ):
        scale = np.abs(one).max()
        assert scale > 1e-4, f"{name} gets no gradient"
        np.testing.assert_allclose(leaf / scale, one / scale, atol=1e-4, err_msg=name)


def test_a_decoder_alone_refuses_a_model_with_an_encoder():
    with pytest.raises(InputError, match="Decoder takes decoders alone, got an encoder-decoder"):
        Decoder(RELU).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_an_encoder_decoder_needs_a_prompt():
    with pytest.raises(ValueError, match="needs encoder_inputs, or a cache"):
        architecture.build(RELU).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("which", ["inputs", "encoder_inputs"])
def test_sequences_beyond_the_longest_are_refused(which: str):
    given = {key: np.zeros((1, 2), np.int32) for key in ("inputs", "encoder_inputs")}
    given[which] = np.zeros((1, 25), np.int32)
    with pytest.raises(ValueError, match="longer than max_length=24, got 25"):
        architecture.build(RELU).init(jax.random.key(0), **given)  # pyright: ignore[reportArgumentType]


def test_bfloat16_is_close_to_float32():
    # Without experts: rounding may change the choice between two of them.
    config = dataclasses.replace(
        RELU, num_experts=(0, 0, 0), num_encoder_layers=1, attention_scale=None
    )
    params, given = params_of(config), arguments_of(config)

    def logits(dtype: str) -> np.ndarray:
        model = architecture.build(dataclasses.replace(config, dtype=dtype))
        apply = jax.jit(lambda params: model.apply({"params": params}, **given))  # pyright: ignore[reportArgumentType]
        return np.asarray(apply(params))[given["mask"]]

    exact, rounded = logits("float32"), logits("bfloat16")
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2
