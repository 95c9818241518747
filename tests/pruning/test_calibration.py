from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.calibration import calibrate
from uncurl_jax.pruning.statistics import (
    LayerStatistics,
    RouterStatistics,
    layer_statistics,
    make_manifest,
)

MANIFEST = make_manifest(
    checkpoint_hash="abc",
    num_experts=(4, 0, 3),
    num_selected_experts=1,
    task="superglue_rte",
    split="train",
    vocabulary_hash="def",
    seed=0,
)


@jax.jit
def observe(batch):
    x, mask = batch
    result = {}
    for layer, count in ((0, 4), (2, 3)):
        logits = x[..., :count] * (1 + layer)
        gate, index = jax.lax.top_k(jax.nn.softmax(logits), 1)
        result[layer] = layer_statistics(logits, index, gate, jnp.ones(index.shape, bool), mask)
    return result


def batches(count=5, start=0):
    for number in range(start, count):
        generator = np.random.default_rng(number)
        yield (
            generator.normal(size=(2, 6, 4)).astype(np.float32),
            generator.random((2, 6)) < 0.8,
        )


def test_calibration_equals_one_pass_over_all_tokens(reference):
    statistics = calibrate(observe, batches(), manifest=MANIFEST)
    rows = np.concatenate([x[mask] for x, mask in batches()])
    assert statistics.tokens == len(rows)
    assert statistics.manifest["batches"] == 5 and statistics.manifest["is_complete"]
    for layer, count in ((0, 4), (2, 3)):
        expected = reference.statistics(rows[:, :count] * (1 + layer))
        for name, b in expected._asdict().items():
            a = getattr(statistics.layers[layer], name)
            assert (a is None) == (b is None)
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
                assert a.dtype == np.float64


@jax.jit
def observe_outputs(batch):
    """Expert z makes (z + 1) x of x in layer 0; nothing is asked of layer 2's experts."""
    x, mask = batch
    scale = jnp.arange(1.0, 5.0)
    gate, index = jax.lax.top_k(jax.nn.softmax(x), 1)
    outputs = scale[index][..., None] * x[:, :, None, :]
    sums = scale[:, None] * jnp.where(mask[..., None], x, 0.0).sum(axis=(0, 1))
    kept = jnp.ones(index.shape, bool)
    return {0: layer_statistics(x, index, gate, kept, mask, outputs, sums)}


def test_calibration_with_outputs_equals_one_pass_over_all_tokens(reference):
    manifest = {**MANIFEST, "num_experts": [4]}
    statistics = calibrate(observe_outputs, batches(), manifest=manifest)
    assert statistics.manifest["collected"] == ["outputs", "all_outputs"]
    rows = np.concatenate([x[mask] for x, mask in batches()])
    every = np.arange(1.0, 5.0)[:, None] * rows[:, None, :]
    expected = reference.statistics(rows, outputs=every)
    for name, array in expected._asdict().items():
        found = getattr(statistics.layers[0], name)
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_calibration_with_outputs_resumes_to_the_same_bytes(tmp_path):
    manifest = {**MANIFEST, "num_experts": [4], "collected": ["outputs", "all_outputs"]}
    whole = calibrate(observe_outputs, batches(), manifest=manifest)
    options = {"resume_from": tmp_path / "partial.npz", "manifest": manifest}

    def interrupted():
        yield from batches(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(observe_outputs, interrupted(), save_every=2, **options)
    assert calibrate(observe_outputs, batches(), **options).hash == whole.hash


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"collected": ["outputs"]}, r"got collected \[\] in .* and \['outputs'\] now"),
        ({"shards": ["0/2"]}, {"shards": ["1/2"]}, r"got shards \['0/2'\] .* and \['1/2'\] now"),
        ({"shards": ["0/2"]}, {}, r"got shards \['0/2'\] .* and \[\] now"),
    ],
)
def test_a_calibration_goes_on_with_the_options_it_began_with(tmp_path, first, then, message):
    partial = tmp_path / "partial.npz"
    calibrate(observe, batches(), manifest={**MANIFEST, **first}, resume_from=partial, save_every=2)
    with pytest.raises(InputError, match=message):
        calibrate(observe, batches(), manifest={**MANIFEST, **then}, resume_from=partial)


def test_sums_keep_float64_where_float32_would_lose_tokens():
    big = 2.0**24
    one = LayerStatistics(*(np.ones((2,) * n, np.float32) for n in (0, 2, 1, 1, 1, 1, 1, 2, 2)))

    def count(tokens):
        return {0: one._replace(tokens=np.float32(tokens))}

    manifest = {**MANIFEST, "num_experts": [2]}
    assert calibrate(count, [big, 1.0, 1.0], manifest=manifest).tokens == 2**24 + 2


def test_progress_hears_of_every_batch():
    heard = []
    calibrate(observe, batches(3), manifest=MANIFEST, progress=lambda *seen: heard.append(seen))
    tokens = np.cumsum([mask.sum() for _, mask in batches(3)])
    assert heard == [(1, tokens[0]), (2, tokens[1]), (3, tokens[2])]


def test_an_interrupted_calibration_resumes_to_the_same_bytes(tmp_path):
    whole = calibrate(observe, batches(), manifest=MANIFEST)
    partial = tmp_path / "partial.npz"
    observed = []

    def interrupted(batch):
        if len(observed) == 4:
            raise KeyboardInterrupt
        observed.append(batch)
        return observe(batch)

    options = {"manifest": MANIFEST, "resume_from": partial, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted, batches(), **options)
    saved = RouterStatistics.load(partial).manifest
    assert saved["batches"] == 2 and not saved["is_complete"]
    observed.clear()
    resumed = calibrate(interrupted, batches(), **options)
    assert len(observed) == 3
    assert resumed.hash == whole.hash


def test_a_partial_file_of_another_task_is_refused(tmp_path):
    partial = tmp_path / "partial.npz"
    calibrate(observe, batches(), manifest=MANIFEST, resume_from=partial, save_every=2)
    with pytest.raises(InputError, match="got task 'superglue_rte' and 'superglue_cb'"):
        calibrate(
            observe, batches(), manifest={**MANIFEST, "task": "superglue_cb"}, resume_from=partial
        )


def test_complete_statistics_are_no_partial_file(tmp_path):
    path = tmp_path / "statistics.npz"
    calibrate(observe, batches(2), manifest=MANIFEST).save(path)
    with pytest.raises(InputError, match="got complete statistics"):
        calibrate(observe, batches(2), manifest=MANIFEST, resume_from=path)


def test_resuming_with_fewer_batches_than_done_is_refused(tmp_path):
    partial = tmp_path / "partial.npz"
    calibrate(observe, batches(4), manifest=MANIFEST, resume_from=partial, save_every=4)
    with pytest.raises(InputError, match="got 1 of the 4 already done"):
        calibrate(observe, batches(1), manifest=MANIFEST, resume_from=partial)


def test_nan_is_reported_with_batch_layer_and_expert():
    def spoiled():
        yield from batches(2)
        x, mask = next(batches(1))
        yield np.where(np.arange(4) == 3, np.nan, x).astype(np.float32), mask

    with pytest.raises(InputError, match=r"in gram of layer 0, expert 3 in batch 2: check"):
        calibrate(observe, spoiled(), manifest=MANIFEST)


def test_an_observer_of_other_layers_is_refused():
    with pytest.raises(InputError, match=r"MoE layers \[0, 1\], got layers \[0, 2\] in batch 0"):
        calibrate(observe, batches(), manifest={**MANIFEST, "num_experts": [4, 3]})


def test_no_tokens_at_all_is_refused():
    empty = [(x, np.zeros_like(mask)) for x, mask in batches(2)]
    for given in ([], empty):
        with pytest.raises(InputError, match="at least one token, got 0"):
            calibrate(observe, given, manifest=MANIFEST)


def test_a_model_without_experts_is_refused():
    with pytest.raises(InputError, match="needs a model with experts"):
        calibrate(lambda batch: {}, [1], manifest={**MANIFEST, "num_experts": [0, 0]})


def test_a_manifest_without_its_keys_is_refused():
    with pytest.raises(InputError, match="got none of checkpoint_hash"):
        calibrate(observe, batches(), manifest={"num_experts": [4, 0, 3]})


@pytest.mark.parametrize(("save_every", "path"), [(0, "partial.npz"), (2, None)])
def test_save_every_needs_a_file_and_a_positive_number(tmp_path, save_every, path):
    with pytest.raises(InputError, match="save_every needs a positive number of batches"):
        calibrate(
            observe,
            batches(),
            manifest=MANIFEST,
            save_every=save_every,
            resume_from=tmp_path / path if path else None,
        )
