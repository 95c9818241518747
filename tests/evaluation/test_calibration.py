"""Router statistics of a checkpoint: by an independent sum, on eight devices, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.calibration import calibrate_checkpoint, calibrate_model
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.pruning.statistics import RouterStatistics


@pytest.fixture(scope="module")
def on_eight_devices(checkpoint, caches, tmp_path_factory):
    """As the command line does it: 6 rows a batch become 8."""
    out = tmp_path_factory.mktemp("statistics") / "router_statistics.npz"
    calibrate_checkpoint(checkpoint, caches["train"], out=out, batch_size=6, quiet=True)
    return out


@pytest.fixture(scope="module")
def on_one_device(model, caches):
    return calibrate_model(model, caches["train"], batch_size=16, length=96, quiet=True)


def test_statistics_are_sums_over_the_tokens_of_the_right_answers(model, caches, on_one_device):
    """Each row goes through the model alone and without padding; numpy does the sums."""
    cache = caches["train"]

    def route(tokens):
        _, sown = Decoder(model.config).apply(
            {"params": model.params}, tokens, mutable=["router_observations"]
        )
        return sown["router_observations"]

    route = jax.jit(route)
    logits = {0: [], 1: []}
    for row in np.flatnonzero(cache.is_target):
        targets = np.asarray(cache.tokens[cache.offsets[row] : cache.offsets[row + 1]], int)
        # One shape, and no mask: what stands to the right of a token does not reach it.
        tokens = np.full((1, 96), 9, np.int32)
        tokens[0, 0] = 0
        tokens[0, 1 : len(targets)] = targets[:-1]
        observed = route(tokens)
        for layer in logits:
            found = observed[f"layers_{layer}"]["moe"]["observation"][0]["logits"]
            logits[layer].append(np.asarray(found, np.float64)[0, : len(targets)])
    for layer, parts in logits.items():
        h = np.concatenate(parts)
        p = np.exp(h) / np.exp(h).sum(axis=-1, keepdims=True)
        chosen = np.eye(4)[h.argmax(axis=-1)]
        got = on_one_device.layers[layer]
        assert got.tokens == len(h)
        np.testing.assert_allclose(got.gram, h.T @ h, rtol=1e-4)
        np.testing.assert_allclose(got.logit_sum, h.sum(axis=0), rtol=1e-4)
        np.testing.assert_array_equal(got.selected, chosen.sum(axis=0))
        np.testing.assert_array_equal(got.kept, chosen.sum(axis=0))
        np.testing.assert_allclose(got.gate_mass, (chosen * p).sum(axis=0), rtol=1e-4)
        np.testing.assert_allclose(got.prob_mass, p.sum(axis=0), rtol=1e-4)


def test_eight_devices_give_the_statistics_of_one(on_eight_devices, on_one_device):
    sharded = RouterStatistics.load(on_eight_devices)
    for layer, expected in on_one_device.layers.items():
        got = sharded.layers[layer]
        for name in ("tokens", "selected", "kept", "coactivation"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
        for name in ("gram", "logit_sum", "gate_mass", "prob_mass", "routed_prob"):
            np.testing.assert_allclose(
                getattr(got, name), getattr(expected, name), rtol=1e-4, err_msg=name
            )


def test_the_manifest_says_what_was_observed(on_eight_devices, checkpoint, caches):
    manifest = RouterStatistics.load(on_eight_devices).manifest
    cache = caches["train"]
    lengths = np.diff(cache.offsets)[cache.is_target]
    assert manifest["tokens"] == lengths.sum()
    assert manifest["checkpoint_hash"] == layout.fingerprint(checkpoint)
    assert (manifest["task"], manifest["split"]) == ("synthetic_entailment", "train")
    assert manifest["cache_hash"] == cache.hash
    assert manifest["num_experts"] == [4, 4]
    # 21 rows, 6 a batch rounded up to 8.
    assert (manifest["batch_size"], manifest["batches"]) == (8, 3)


def test_a_limit_of_batches_is_kept(checkpoint, caches, tmp_path):
    statistics = calibrate_checkpoint(
        checkpoint,
        caches["train"],
        out=tmp_path / "part.npz",
        batch_size=8,
        max_batches=2,
        quiet=True,
    )
    cache = caches["train"]
    lengths = np.diff(cache.offsets)[cache.is_target]
    assert statistics.tokens == lengths[:16].sum()


def test_an_interrupted_calibration_goes_on_to_the_same_sums(model, caches, tmp_path):
    partial = tmp_path / "partial.npz"
    arguments = {"batch_size": 8, "length": 96, "quiet": True}
    whole = calibrate_model(model, caches["train"], **arguments)

    class PowerCutError(Exception):
        pass

    class Row(type(caches["train"])):
        """A cache whose reader is cut off after two batches."""

        def sequential_batches(self, *args, **kwargs):
            batches = super().sequential_batches(*args, **kwargs)
            yield next(batches)
            yield next(batches)
            raise PowerCutError

    source = caches["train"]
    names = ("tokens", "offsets", "prompt_lengths", "example", "option", "is_target")
    cut = Row(source.directory, source.manifest, {name: getattr(source, name) for name in names})
    with pytest.raises(PowerCutError):
        calibrate_model(model, cut, partial=partial, save_every=1, **arguments)
    assert RouterStatistics.load(partial).manifest["batches"] == 1
    resumed = calibrate_model(model, source, partial=partial, save_every=1, **arguments)
    assert resumed.hash == whole.hash


def refused(message, checkpoint, cache, tmp_path, **arguments):
    out = tmp_path / "refused" / "statistics.npz"
    with pytest.raises(InputError, match=re.escape(message)):
        calibrate_checkpoint(checkpoint, cache, out=out, quiet=True, **arguments)
    assert not out.parent.exists()


def test_a_partial_file_of_another_calibration_is_named(
    model, checkpoint, caches, tmp_path, on_eight_devices
):
    statistics = RouterStatistics.load(on_eight_devices)
    manifest = {**statistics.manifest, "checkpoint_hash": "0" * 64, "is_complete": False}
    partial = tmp_path / ".statistics.npz.resume.npz"
    RouterStatistics(statistics.layers, manifest).save(partial)
    with pytest.raises(InputError, match=r"interrupted left .*resume\.npz: remove it"):
        calibrate_checkpoint(
            checkpoint, caches["train"], out=tmp_path / "statistics.npz", batch_size=8, quiet=True
        )
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]


def test_a_dense_model_is_refused(config, caches, tmp_path, save_checkpoint, zero_params):
    dense = dataclasses.replace(config, num_experts=(0, 0))
    directory = save_checkpoint(tmp_path / "dense", dense, zero_params(dense))
    message = f"Calibration needs a model with experts, got the dense {directory}"
    refused(message, directory, caches["train"], tmp_path)


def test_another_vocabulary_than_the_caches_is_refused(
    config, model, caches, tmp_path, save_checkpoint
):
    directory = save_checkpoint(tmp_path / "other", config, jax.device_get(model.params))
    record = json.loads((directory / "vocabulary.json").read_text())
    (directory / "vocabulary.json").write_text(json.dumps({**record, "hash": "f" * 64}))
    message = "A token cache must use the model's vocabulary, got bytes"
    refused(message, directory, caches["train"], tmp_path)


def test_rows_longer_than_the_model_are_refused(
    config, caches, tmp_path, save_checkpoint, zero_params
):
    short = dataclasses.replace(config, max_length=40)
    directory = save_checkpoint(tmp_path / "short", short, zero_params(short))
    refused("Rows must fit the model's max_length=40", directory, caches["train"], tmp_path)


def test_nan_in_an_expert_is_named_and_not_the_router_that_it_spoils(
    config, model, caches, tmp_path, save_checkpoint
):
    params = jax.tree.map(np.array, jax.device_get(model.params))
    params["layers_0"]["moe"]["experts"]["wo"][1] = np.nan
    directory = save_checkpoint(tmp_path / "nan", config, params)
    message = "layers_0/moe/experts/wo expert 1 (512 values)"
    refused(message, directory, caches["train"], tmp_path)


def test_an_existing_output_is_kept(checkpoint, caches, tmp_path):
    out = tmp_path / "statistics.npz"
    out.write_text("precious")
    with pytest.raises(InputError, match="An output must not exist yet"):
        calibrate_checkpoint(checkpoint, caches["train"], out=out)
    assert out.read_text() == "precious"


def test_counts_below_one_are_refused(checkpoint, caches, tmp_path):
    message = "max_batches must be at least 1, or None for all, got 0"
    refused(message, checkpoint, caches["train"], tmp_path, max_batches=0)
    message = "A global batch must be a positive multiple of the processes, got 0 rows"
    refused(message, checkpoint, caches["train"], tmp_path, batch_size=0)
