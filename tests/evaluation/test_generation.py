"""Generation with the key-value cache against full forward passes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.generation import Decoded, compiled_decode, generate
from uncurl_jax.models.architecture import abstract_params
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.partitioning import TOKEN_AXES, axis_size, make_mesh, place_batch

NEW = 6
NO_EOS = 259  # an id of the embedding that no vocabulary uses


@pytest.fixture(scope="module")
def prompts(caches):
    cache = caches["entailment"]
    return [cache.prompt(0), cache.prompt(1)[:7], [50]]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    """NEW tokens after each prompt, each the argmax of a forward pass over all tokens so far."""
    apply = jax.jit(lambda tokens: Decoder(model.config).apply({"params": model.params}, tokens))
    results = []
    for prompt in prompts:
        tokens = [0, *prompt]
        for _ in range(NEW):
            padded = np.zeros((1, model.config.max_length), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(np.asarray(apply(padded))[0, len(tokens) - 1])))
        results.append(tokens[-NEW:])
    return results


def test_greedy_tokens_are_the_argmax_of_full_forward_passes(model, prompts, greedy):
    assert len({len(prompt) for prompt in prompts}) == 3
    assert generate(model, prompts, max_new_tokens=NEW, eos_id=NO_EOS) == greedy


def test_a_row_ends_before_the_end_of_text_and_the_others_go_on(model, prompts, greedy):
    eos = greedy[0][2]
    expected = [row[: row.index(eos)] if eos in row else row for row in greedy]
    assert len(expected[0]) <= 2
    assert any(len(row) == NEW for row in expected)
    assert generate(model, prompts, max_new_tokens=NEW, eos_id=eos) == expected


def test_samples_depend_on_the_seed_alone(model, prompts, greedy):
    def sample(seed: int, temperature: float = 1.0):
        return generate(
            model,
            prompts,
            max_new_tokens=NEW,
            eos_id=NO_EOS,
            temperature=temperature,
            seed=seed,
        )

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    # Almost no temperature leaves the most likely token.
    assert sample(3, temperature=1e-4) == greedy


def test_a_prompt_may_fill_the_model_to_its_last_position(model):
    longest = [5] * (model.config.max_length - 2)
    (tokens,) = generate(model, [longest], max_new_tokens=2, eos_id=NO_EOS)
    assert len(tokens) == 2


def test_a_prompt_that_leaves_no_room_is_refused(model):
    with pytest.raises(InputError, match=r"must fit max_length=96, got 95 \+ 2: shorten"):
        generate(model, [[5] * 95], max_new_tokens=2, eos_id=1)


def test_a_negative_temperature_is_refused(model):
    with pytest.raises(InputError, match="temperature must be at least 0, got -1"):
        generate(model, [[5]], max_new_tokens=2, eos_id=1, temperature=-1.0)


def test_a_model_on_a_mesh_is_refused(checkpoint):
    sharded = load_model(checkpoint, make_mesh())
    with pytest.raises(InputError, match="Generation runs on one device"):
        generate(sharded, [[5]], max_new_tokens=2, eos_id=1)


@pytest.mark.parametrize(
    ("expert_partitions", "model_partitions", "expert_axes"),
    [
        (2, 2, None),
        pytest.param(4, 1, None, marks=pytest.mark.slow),
        pytest.param(2, 1, ((), ("data", "expert")), marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_step_on_a_mesh_equal_one_device(
    model, prompts, expert_partitions, model_partitions, expert_axes
):
    # Eight rows of different lengths, of which one has ended.
    rows = [prompts[row % 3][: 3 + row] for row in range(8)]
    inputs = np.zeros((8, 16), np.int32)
    for row, prompt in enumerate(rows):
        inputs[row, 1 : len(prompt) + 1] = prompt
    lengths = np.asarray([len(prompt) + 1 for prompt in rows], np.int32)
    is_running = np.arange(8) != 5

    def run(mesh, params) -> tuple[list[np.ndarray], Decoded]:
        compiled = compiled_decode(model.config, mesh, expert_axes)
        placed_inputs, placed_lengths, running = place_batch((inputs, lengths, is_running), mesh)
        decoded = compiled.prefill(params, placed_inputs, placed_lengths)
        logits = [np.asarray(decoded.logits)]
        for step in range(2):
            token, positions = place_batch(
                (logits[-1].argmax(axis=-1).astype(np.int32), lengths + step), mesh
            )
            decoded = compiled.step(params, decoded.cache, token, positions, running)
            logits.append(np.asarray(decoded.logits))
        return logits, decoded

    mesh = make_mesh(expert_partitions=expert_partitions, model_partitions=model_partitions)
    abstract = abstract_params(model.config, mesh, expert_axes)
    params = jax.device_put(model.params, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    expected, _ = run(None, model.params)
    found, decoded = run(mesh, params)
    for one, several in zip(expected, found, strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-5)
    # Rows, and heads if the model axis divides them, stay where they were put.
    for array in jax.tree.leaves(decoded.cache):
        shards = axis_size(mesh, TOKEN_AXES)
        local = array.sharding.shard_shape(array.shape)
        assert local == (8 // shards, 96, 2 // model_partitions, 8)
