"""Artifacts of programs against the checkpoints that they were made of."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.evaluator import evaluate_model
from uncurl_jax.export import runner
from uncurl_jax.export.manifest import ExportOptions
from uncurl_jax.export.quantization import quantize
from uncurl_jax.export.runner import Artifact, read_tensors
from uncurl_jax.export.sources import open_sources, write_weights
from uncurl_jax.export.stablehlo import export_stablehlo
from uncurl_jax.export.tensor_file import MemoryWriter
from uncurl_jax.models.decoder import Decoder


@pytest.fixture(scope="module")
def artifact(shared):
    return Artifact(shared)


def prompts(batch: int, length: int):
    """Rows of different lengths, and how long each is."""
    generator = np.random.default_rng(batch)
    lengths = generator.integers(1, length + 1, batch).astype(np.int32)
    lengths[0] = length
    inputs = generator.integers(1, 259, (batch, length)).astype(np.int32)
    inputs[:, 0] = 0
    return np.where(np.arange(length) < lengths[:, None], inputs, 0), lengths


@functools.cache
def compiled(config):
    """The forward pass of a checkpoint's own code."""
    decoder = Decoder(config)
    return jax.jit(
        lambda params, tokens, mask: decoder.apply(
            {"params": params}, tokens, mask, mutable=["router_observations"]
        )
    )


def whole(checkpoint, tokens, lengths, params=None):
    """Logits and router choices of one dropless forward pass, padded to one shape."""
    model = load_model(checkpoint)
    config = dataclasses.replace(model.config, eval_capacity_factor=None)
    rows, width = tokens.shape
    tokens = np.pad(tokens, ((0, 5 - rows), (0, 96 - width)))
    mask = np.arange(96) < np.pad(lengths, (0, 5 - rows))[:, None]
    logits, found = compiled(config)(params or model.params, tokens, mask)
    (choice,) = found["router_observations"]["layers_0"]["moe"]["observation"]
    return jax.tree.map(lambda array: np.asarray(array)[:rows, :width], (logits, choice))


@pytest.mark.parametrize(
    ("name", "batch", "length"),
    [
        ("base", 4, 23),
        ("pruned", 1, 1),
        pytest.param("pruned", 5, 90, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_are_the_checkpoint(artifact, checkpoints, name, batch, length):
    model = artifact.load(name)
    inputs, lengths = prompts(batch, length)
    tokens = np.pad(inputs, ((0, 0), (0, 2)))
    new = np.random.default_rng(9).integers(1, 259, (batch, 2)).astype(np.int32)
    rows = np.arange(batch)
    for step in range(2):
        tokens[rows, lengths + step] = new[:, step]
    logits, choice = whole(checkpoints[name], tokens, lengths + 2)

    def check_choice(routing, where):
        for field, observed in (
            ("expert_index", "expert_index"),
            ("gate", "gate"),
            ("router_logits", "logits"),
        ):
            found = np.asarray(routing["layers_0"][field])
            expected = np.asarray(choice[observed])
            np.testing.assert_allclose(found[where[0]], expected[where[1]], rtol=1e-5, atol=1e-5)

    result = model.prefill(inputs, lengths)
    assert set(result["routing"]) == {"layers_0"}
    np.testing.assert_allclose(result["logits"], logits[rows, lengths - 1], rtol=1e-5, atol=1e-5)
    is_real = np.arange(length) < lengths[:, None]
    check_choice(result["routing"], (is_real, np.pad(is_real, ((0, 0), (0, 2)))))
    for step in range(2):
        result = model.decode(result["cache"], new[:, step], lengths + step)
        expected = logits[rows, lengths + step]
        np.testing.assert_allclose(result["logits"], expected, rtol=1e-5, atol=1e-5)
        check_choice(result["routing"], ((rows, 0), (rows, lengths + step)))


def test_rows_that_have_ended_change_nothing_for_the_others(artifact):
    model = artifact.load("base")
    inputs, lengths = prompts(4, 23)
    token = np.asarray([7, 8, 9, 10], np.int32)
    some = model.decode(
        model.prefill(inputs, lengths)["cache"],
        token,
        lengths,
        np.asarray([True, False, True, False]),
    )
    every = model.decode(model.prefill(inputs, lengths)["cache"], token, lengths)
    np.testing.assert_allclose(some["logits"][::2], every["logits"][::2], rtol=1e-5, atol=1e-5)


def test_scores_are_log_probabilities_of_the_targets(artifact, checkpoints):
    model = artifact.load("pruned")
    inputs, lengths = prompts(4, 23)
    targets = np.random.default_rng(1).integers(1, 259, (4, 3)).astype(np.int32)
    places = np.stack([np.maximum(lengths - 3 + i, 0) for i in range(3)], axis=1)
    mask = np.asarray([[1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1]], bool)
    found = model.score(inputs, lengths, targets, places, mask)
    logits, _ = whole(checkpoints["pruned"], inputs, lengths)
    log = np.asarray(jax.nn.log_softmax(logits))[np.arange(4)[:, None], places, targets]
    np.testing.assert_allclose(
        found["token_log_probabilities"], np.where(mask, log, 0), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        found["log_likelihood"], (log * mask).sum(axis=1), rtol=1e-5, atol=1e-5
    )


def test_a_greedy_answer_is_made_of_the_most_likely_tokens(artifact, checkpoints):
    given = [[50, 60, 70], [80]]
    found = artifact.load("base").generate(given, 4)
    for prompt, answer in zip(given, found, strict=True):
        tokens = [0, *prompt]
        for _ in range(4):
            row = np.asarray([tokens], np.int32)
            logits, _ = whole(checkpoints["base"], row, np.asarray([len(tokens)]))
            tokens.append(int(logits[0, -1].argmax()))
        assert answer == tokens[-4:]


def test_experts_that_models_share_are_stored_once(shared, read_manifest):
    manifest = read_manifest(shared)
    base, pruned = (manifest["models"][name]["weights"] for name in ("base", "pruned"))
    (path,) = (shared / "weights").iterdir()
    tensors = read_tensors(path)
    # The pruned model's experts are 2 and 0 of the base.
    assert manifest["models"]["base"]["expert_map"] == {"layers_0": [0, 1, 2, 3]}
    assert manifest["models"]["pruned"]["expert_map"] == {"layers_0": [2, 0]}
    assert tensors["layers_0/moe/experts/wi"].shape == (4, 16, 32)
    different = {name for name in base if pruned[name] != base[name]}
    assert different == {"layers_0/moe/router/kernel", "layers_0/moe/expert_map"}
    # Everything of the pruned model but its router and map.
    counts = [tensors[name].nbytes for name in pruned.values() if "experts" not in name]
    own = tensors[pruned["layers_0/moe/router/kernel"]].nbytes + 4 * 2
    experts = [array.nbytes // 2 for name, array in tensors.items() if "experts/" in name]
    assert manifest["saved_by_sharing_bytes"] == sum(counts) - own + sum(experts)


def test_shared_arrays_are_on_the_device_once(artifact):
    base, pruned = artifact.load("base"), artifact.load("pruned")
    name = "layers_0/moe/experts/wo"
    assert base.weights[name] is pruned.weights[name]


def test_the_manifest_says_where_things_come_from(shared, checkpoints, cache, read_manifest):
    manifest = read_manifest(shared)
    assert (manifest["schema"], manifest["format"]) == (runner.SCHEMA, "stablehlo")
    assert manifest["max_length"] == 96 and manifest["quantization"] is None
    assert manifest["vocabulary"]["spec"] == "bytes" and manifest["vocabulary"]["eos_id"] == 1
    entry = manifest["models"]["pruned"]
    assert entry["checkpoint"]["step"] == 5 and len(entry["checkpoint"]["fingerprint"]) == 64
    assert entry["provenance"]["created_by"] == "test"
    assert entry["task"] == cache.task
    example = cache.examples()[0]
    assert entry["prompt"]["example"]["prompt"] == example.prompt
    assert manifest["models"]["base"]["task"] == "synthetic_choice"
    assert manifest["models"]["base"]["scores"] is None
    files = {
        path.relative_to(shared).as_posix()
        for path in shared.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(manifest["files"]) == files and "run.py" in files
    runner.check_files(shared, manifest)


def test_the_score_is_that_of_the_evaluation(shared, checkpoints, cache, read_manifest):
    scores = read_manifest(shared)["models"]["pruned"]["scores"]
    model = load_model(checkpoints["pruned"])
    config = dataclasses.replace(model.config, eval_capacity_factor=None)
    expected = evaluate_model(model._replace(config=config), cache, quiet=True).summary
    for name in ("score", "interval", "metrics", "num_examples"):
        assert scores["artifact"][name] == expected[name]
        assert scores["checkpoint"][name] == expected[name]
    assert scores["token_cache"]["hash"] == cache.hash


@pytest.fixture(scope="module")
def quantized(checkpoints, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "artifact"
    options = ExportOptions(quantization="int8", max_length=90, caches={"base": cache})
    return out, export_stablehlo({"base": checkpoints["base"]}, out, options)


def test_int8_experts_are_a_quarter_and_close(quantized, checkpoints, read_manifest):
    out, summary = quantized
    manifest = read_manifest(out)
    assert manifest["quantization"] == "int8" and manifest["max_length"] == 90
    (path,) = (out / "weights").iterdir()
    tensors = read_tensors(path)
    assert tensors["layers_0/moe/experts/wi"].dtype == np.int8
    assert tensors["layers_0/moe/experts/wi_scale"].shape == (4, 32)
    assert tensors["layers_0/moe/experts/wo_scale"].shape == (4, 16)
    assert tensors["position_embedder/embedding"].shape == (90, 16)
    found = summary["models"]["base"]["against_checkpoint"]
    assert 1e-4 < found["difference"] < 0.3
    assert 0 <= summary["models"]["base"]["scores"]["artifact"]["score"] <= 100
    # The program multiplies by the scales: it equals a model of the rounded kernels.
    inputs, lengths = prompts(3, 30)
    logits = Artifact(out).load("base").prefill(inputs, lengths)["logits"]
    params = load_model(checkpoints["base"]).params
    experts = params["layers_0"]["moe"]["experts"]
    for name in ("wi", "wo"):
        values, scale = quantize(experts[name])
        experts[name] = values * scale[:, None]
    expected, _ = whole(checkpoints["base"], inputs, lengths, params)
    np.testing.assert_allclose(logits, expected[np.arange(3), lengths - 1], rtol=1e-5, atol=1e-5)


def test_a_bfloat16_artifact_is_half_and_keeps_routers_wide(checkpoints, save_checkpoint, tmp_path):
    (source,) = open_sources({"base": checkpoints["base"]}, dtype="bfloat16")
    wide, narrow = MemoryWriter(), MemoryWriter()
    write_weights([dataclasses.replace(source, config=source.config)], narrow)
    write_weights(open_sources({"base": checkpoints["base"]}), wide)
    assert set(wide.arrays) == set(narrow.arrays)
    for name, array in narrow.arrays.items():
        is_wide = "router" in name or "norm" in name
        assert array.dtype == wide.arrays[name].dtype or not is_wide
        if not is_wide and not name.endswith("expert_map"):
            assert array.dtype.name == "bfloat16"
            np.testing.assert_array_equal(array, wide.arrays[name].astype(array.dtype))


def refused(sentence, checkpoints, out, **options):
    with pytest.raises(InputError, match=sentence):
        export_stablehlo(checkpoints, out, ExportOptions(**options))


def test_an_output_that_exists_is_refused(checkpoints, tmp_path):
    refused("must not exist yet", checkpoints, tmp_path)


def test_other_architectures_are_refused(checkpoints, save_checkpoint, make_params, tmp_path):
    model = load_model(checkpoints["base"])
    other = dataclasses.replace(model.config, mlp_dim=8)
    path = save_checkpoint(tmp_path / "other", other, make_params(other))
    both = {"a": checkpoints["base"], "b": path}
    refused("must differ in nothing but their experts", both, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(checkpoints, tmp_path, cache):
    base, out = {"base": checkpoints["base"]}, tmp_path / "out"
    refused("quantization must be \"int8\", or None, got 'int4'", base, out, quantization="int4")
    refused("dtype must be", base, out, dtype="float16")
    refused("max_length must lie between 1 and the model's 96, got 97", base, out, max_length=97)
    refused("A model's name must be of letters", {"../a": checkpoints["base"]}, out)
    refused(
        "Rows must fit the artifact's max_length=20",
        base,
        out,
        max_length=20,
        caches={"base": cache},
    )
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_that_is_not_finite_leaves_nothing(
    checkpoints, save_checkpoint, make_params, tmp_path
):
    config = load_model(checkpoints["base"]).config
    params = make_params(config)
    params["layers_0"]["moe"]["experts"]["wi"][1, 0, 0] = np.nan
    path = save_checkpoint(tmp_path / "bad", config, params)
    refused("layers_0/moe/experts/wi expert 1", {"bad": path}, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad"]


def test_a_vocabulary_that_has_moved_is_asked_for(checkpoints, save_checkpoint, tmp_path):
    model = load_model(checkpoints["base"])
    path = save_checkpoint(tmp_path / "moved", model.config, jax.device_get(model.params))
    record = json.loads((path / "vocabulary.json").read_text())
    (path / "vocabulary.json").write_text(json.dumps({**record, "spec": "gone.model"}))
    refused("give its files with --vocabulary", {"moved": path}, tmp_path / "out")
    (path / "vocabulary.json").write_text(json.dumps({**record, "hash": "0" * 64}))
    refused("needs the vocabulary of its checkpoint", {"moved": path}, tmp_path / "out")
