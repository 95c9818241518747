"""Statistics layer by layer equal those of the whole model, and read little."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.calibration import calibrate_model, sample_router_inputs
from uncurl_jax.evaluation.layerwise_calibration import calibrate_layer_by_layer
from uncurl_jax.evaluation.layerwise_job import Seconds
from uncurl_jax.models.architecture import init_params
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import (
    COLLECTIONS,
    RouterStatistics,
    collected,
    require_same_source,
)

LENGTH = 96
COUNTS = ("tokens", "selected", "kept", "coactivation")
# A dense layer between MoE layers of two sizes and one after them, two of every four experts,
# gated, with a shared expert, no biases, rotary grouped-query attention with norms, and so few
# slots that many assignments are dropped.
RICH = ModelConfig(
    num_experts=(4, 0, 6, 4, 0),
    vocab_size=260,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=96,
    num_selected_experts=2,
    normalize_gates=True,
    eval_capacity_factor=0.4,
    is_gated=True,
    activation="silu",
    has_mlp_bias=False,
    shared_mlp_dim=20,
    has_shared_gate=True,
    dense_mlp_dim=28,
    position_embedding="rotary",
    norm="rms_norm",
    num_kv_heads=1,
    attention_bias="none",
    qk_norm="head",
    has_tied_embeddings=False,
    init_stddev=0.3,
    dtype="float32",
)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def rich(tmp_path_factory, save_checkpoint) -> Path:
    directory = tmp_path_factory.mktemp("rich") / "checkpoint"
    return save_checkpoint(directory, RICH, jax.device_get(init_params(RICH, 1)))


class RecordingReader(layout.StateReader):
    """Remembers which arrays, and which experts of them, were asked for."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.requests: list[tuple[str, int | None]] = []

    def stream(self, requests: Any) -> Any:
        def remembered():
            for request in requests:
                self.requests.append(request)
                yield request

        return super().stream(remembered())


def assert_same(
    found: RouterStatistics, expected: RouterStatistics, tolerance: float = 1e-4
) -> None:
    require_same_source(found.manifest, expected.manifest)
    assert found.manifest["batches"] == expected.manifest["batches"]
    for layer, fields in expected.layers.items():
        assert collected(found.layers[layer]) == collected(fields)
        for name, array in fields._asdict().items():
            got = getattr(found.layers[layer], name)
            if name in COUNTS:
                np.testing.assert_array_equal(got, array, err_msg=f"{name} of {layer}")
            elif array is not None:
                # Relative to the largest: sums of both signs may cancel to nearly nothing.
                scale = np.abs(array).max()
                np.testing.assert_allclose(
                    got / scale, array / scale, atol=tolerance, err_msg=f"{name} of {layer}"
                )


def both(path, cache, tmp_path, *, batch_size=8, collect=(), **arguments):
    """Returns statistics layer by layer, and those of the whole model on one device."""
    found = calibrate_layer_by_layer(
        path,
        cache,
        out=tmp_path / "layerwise.npz",
        batch_size=batch_size,
        collect=collect,
        quiet=True,
        **arguments,
    )
    whole = calibrate_model(
        load_model(path),
        cache,
        batch_size=batch_size,
        length=LENGTH,
        collect=collect,
        quiet=True,
        max_batches=arguments.get("max_batches"),
    )
    return found, whole


def test_a_plain_model_gives_the_statistics_of_the_whole_pass(checkpoint, caches, tmp_path):
    found, whole = both(checkpoint, caches["train"], tmp_path, max_batches=2)
    assert_same(found, whole)
    assert_same(RouterStatistics.load(tmp_path / "layerwise.npz"), whole)


def test_a_rich_model_with_drops_gives_the_same_counts_sums_and_outputs(rich, caches, tmp_path):
    found, whole = both(rich, caches["train"], tmp_path, collect=tuple(COLLECTIONS))
    assert_same(found, whole)
    dropped = sum(float((f.selected - f.kept).sum()) for f in found.layers.values())
    assert dropped > 0.1 * sum(float(f.selected.sum()) for f in found.layers.values())


def test_without_optional_statistics_none_are_kept(rich, caches, tmp_path):
    found, whole = both(rich, caches["train"], tmp_path)
    assert found.manifest["collected"] == []
    assert_same(found, whole)


def test_activations_in_files_give_the_same_bits_and_leave_nothing(rich, caches, tmp_path):
    in_memory, _ = both(rich, caches["train"], tmp_path, collect=("outputs",))
    found = calibrate_layer_by_layer(
        rich,
        caches["train"],
        out=tmp_path / "mapped.npz",
        batch_size=8,
        collect=("outputs",),
        activations_dir=tmp_path / "activations",
        quiet=True,
    )
    assert found.hash == in_memory.hash
    assert list((tmp_path / "activations").iterdir()) == []


def test_dropless_keeps_every_assignment(rich, caches, tmp_path):
    found = calibrate_layer_by_layer(
        rich, caches["train"], out=tmp_path / "out.npz", is_dropless=True, quiet=True
    )
    for fields in found.layers.values():
        np.testing.assert_array_equal(fields.kept, fields.selected)
    assert found.manifest["eval_capacity_factor"] is None


def test_bfloat16_strays_from_float32_as_the_whole_pass_does(caches, tmp_path, save_checkpoint):
    """One layer of experts before another: rounding sends some tokens to other experts."""
    config = dataclasses.replace(
        RICH, dtype="bfloat16", num_experts=(4, 0, 4), eval_capacity_factor=None
    )
    params = jax.tree.map(lambda a: a.astype("bfloat16"), init_params(config, 1))
    path = save_checkpoint(tmp_path / "half", config, jax.device_get(params))
    found, whole = both(path, caches["train"], tmp_path, collect=("outputs",))
    model = load_model(path)
    exact = calibrate_model(
        model._replace(config=dataclasses.replace(config, dtype="float32")),
        caches["train"],
        batch_size=8,
        length=LENGTH,
        collect=("outputs",),
        quiet=True,
    )
    for layer, fields in exact.layers.items():
        assert found.layers[layer].tokens == fields.tokens
        for name in ("gram", "logit_sum", "prob_mass", "gate_mass", "output_norm", "selected"):
            expected = getattr(fields, name)
            errors = [
                np.linalg.norm(getattr(statistics.layers[layer], name) - expected)
                / np.linalg.norm(expected)
                for statistics in (found, whole)
            ]
            assert errors[0] < 2 * errors[1] + 2e-3, name
            assert errors[0] < 0.05, name


def test_the_sample_of_inputs_is_the_same(rich, caches, tmp_path):
    calibrate_layer_by_layer(
        rich,
        caches["train"],
        out=tmp_path / "out.npz",
        batch_size=8,
        inputs_out=tmp_path / "inputs.npz",
        sample_tokens=100,
        quiet=True,
    )
    found = RouterInputs.load(tmp_path / "inputs.npz")
    expected = sample_router_inputs(
        load_model(rich), caches["train"], num_tokens=100, batch_size=8, length=LENGTH
    )
    assert found.manifest == expected.manifest
    assert found.layers.keys() == expected.layers.keys()
    for layer, array in expected.layers.items():
        assert array.shape == (100, RICH.embed_dim)
        np.testing.assert_allclose(found.layers[layer], array, atol=1e-4)


def test_experts_that_no_token_chose_are_never_read(caches, tmp_path, config, save_checkpoint):
    """A router whose last two columns are zero, beside columns along the norm's bias."""
    params = jax.tree.map(np.array, jax.device_get(init_params(config, 0)))
    for layer in ("layers_0", "layers_1"):
        params[layer]["pre_mlp_norm"]["bias"][:] = 100.0
        kernel = params[layer]["moe"]["router"]["kernel"]
        kernel[:, :2], kernel[:, 2:] = np.abs(kernel[:, :2]), -1.0
        for array in params[layer]["moe"]["experts"].values():
            array[2:] = np.nan
    path = save_checkpoint(tmp_path / "dead", config, params)
    reader = RecordingReader(path)
    found = calibrate_layer_by_layer(
        reader, caches["train"], out=tmp_path / "out.npz", collect=("outputs",), quiet=True
    )
    assert found.layers[0].selected[2:].tolist() == [0.0, 0.0]
    read = [(name, index) for name, index in reader.requests if index is not None]
    assert {index for _, index in read} <= {0, 1}
    assert len(read) == len(set(read))
    chosen = {
        (f"target/layers_{layer}/moe/experts/{name}", expert)
        for layer, fields in found.layers.items()
        for expert in np.flatnonzero(fields.selected).tolist()
        for name in ("wi", "wo", "wi_bias", "wo_bias")
    }
    assert set(read) == chosen


def test_nothing_after_the_last_router_is_read(rich, caches, tmp_path):
    reader = RecordingReader(rich)
    seconds = Seconds()
    calibrate_layer_by_layer(
        reader, caches["train"], out=tmp_path / "out.npz", quiet=True, seconds=seconds
    )
    read = {name for name, index in reader.requests if index is not None}
    assert {name.split("/")[1] for name in read} == {"layers_0", "layers_2"}
    # layers_4 and the final norm are in the fingerprint alone, hence once.
    names = [name for name, _ in reader.requests]
    assert names.count("target/layers_3/moe/router/kernel") == 2
    assert names.count("target/layers_4/mlp/wi/kernel") == 1
    assert min(dataclasses.astuple(seconds)) > 0


def refused(message, checkpoint, cache, tmp_path, **arguments):
    out = tmp_path / "refused" / "statistics.npz"
    with pytest.raises(InputError, match=re.escape(message)):
        calibrate_layer_by_layer(checkpoint, cache, out=out, quiet=True, **arguments)
    assert not out.parent.exists()


def test_nan_in_an_expert_is_named(config, model, caches, tmp_path, save_checkpoint):
    params = jax.tree.map(np.array, jax.device_get(model.params))
    params["layers_0"]["moe"]["experts"]["wo"][1] = np.nan
    directory = save_checkpoint(tmp_path / "nan", config, params)
    message = "layers_0/moe/experts/wo expert 1 (512 values)"
    refused(message, directory, caches["train"], tmp_path)


def test_wrong_requests_are_refused_before_any_work(
    config, checkpoint, model, caches, tmp_path, save_checkpoint, zero_params
):
    cache = caches["train"]
    refused("max_batches must be at least 1", checkpoint, cache, tmp_path, max_batches=0)
    refused("A global batch must be a positive", checkpoint, cache, tmp_path, batch_size=0)
    refused("collect must be", checkpoint, cache, tmp_path, collect=("inputs",))
    refused("sample_tokens must be at least 1", checkpoint, cache, tmp_path, sample_tokens=0)
    dense = dataclasses.replace(config, num_experts=(0, 0))
    directory = save_checkpoint(tmp_path / "dense", dense, zero_params(dense))
    refused("Calibration needs a model with experts", directory, cache, tmp_path)
    other = save_checkpoint(tmp_path / "other", config, jax.device_get(model.params))
    record = json.loads((other / "vocabulary.json").read_text())
    (other / "vocabulary.json").write_text(json.dumps({**record, "hash": "f" * 64}))
    refused("A token cache must use the model's vocabulary", other, cache, tmp_path)
    (tmp_path / "out.npz").write_text("precious")
    with pytest.raises(InputError, match="An output must not exist yet"):
        calibrate_layer_by_layer(checkpoint, cache, out=tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_text() == "precious"
