from __future__ import annotations

import json

import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.router_inputs import RouterInputs, sample_tokens

MANIFEST = {"checkpoint_hash": "abc", "task": "superglue_rte", "num_experts": (4, 0, 3)}


def build(seed=0, **manifest):
    generator = np.random.default_rng(seed)
    layers = {layer: generator.normal(size=(5, 3)) for layer in (2, 0)}
    return RouterInputs(layers, {**MANIFEST, **manifest})


def test_inputs_are_float32_in_the_order_of_the_layers():
    inputs = build()
    assert list(inputs.layers) == [0, 2] and inputs.tokens == 5
    assert {array.dtype for array in inputs.layers.values()} == {np.dtype(np.float32)}
    assert inputs.manifest["num_experts"] == [4, 0, 3]  # through JSON, as in the file


def test_inputs_survive_a_file_with_the_same_bytes_and_hash(tmp_path):
    inputs = build()
    for name in ("a.npz", "b"):
        inputs.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b").read_bytes()
    read = RouterInputs.load(tmp_path / "b")
    assert read.hash == inputs.hash and read.manifest == inputs.manifest
    for layer, array in inputs.layers.items():
        assert read.layers[layer].tobytes() == array.tobytes()


def test_the_hash_depends_on_the_manifest_and_on_every_number():
    base = build()
    moved = {layer: array.copy() for layer, array in base.layers.items()}
    moved[2][4, 2] += 1
    swapped = {0: base.layers[2], 2: base.layers[0]}
    hashes = {
        base.hash,
        build(task="superglue_cb").hash,
        RouterInputs(moved, MANIFEST).hash,
        RouterInputs(swapped, MANIFEST).hash,
    }
    assert len(hashes) == 4


def rewrite(path, change):
    """Applies `change(header, arrays)` to a file."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def change_version(header, arrays):
    header["format_version"] = 99


def change_format(header, arrays):
    header["format"] = "uncurl_jax router statistics"


def change_array(header, arrays):
    arrays["layers_0"] = arrays["layers_0"] + 1


def spoil_array(header, arrays):
    arrays["layers_2"][1, 1] = np.nan


def shorten_array(header, arrays):
    arrays["layers_2"] = arrays["layers_2"][:-1]


def narrow_array(header, arrays):
    arrays["layers_2"] = arrays["layers_2"][:, :-1]


def drop_arrays(header, arrays):
    arrays.clear()


def drop_layer(header, arrays):
    del arrays["layers_2"]


def change_manifest(header, arrays):
    header["manifest"]["task"] = "superglue_cb"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_version, "must be of format version 1, got "),
        (change_format, "must be a whole router inputs file"),
        (change_array, "must match the hash stored in it"),
        (change_manifest, "must match the hash stored in it"),
        (drop_layer, "must match the hash stored in it"),
        (spoil_array, "got NaN or infinity in layer 2"),
        (shorten_array, "must match the hash stored in it"),
        (narrow_array, r"with one embed for all layers, got shapes \[\(5, 2\), \(5, 3\)\]"),
        (drop_arrays, r"with one embed for all layers, got shapes \[\]"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "inputs.npz"
    build().save(path)
    rewrite(path, change)
    with pytest.raises(InputError, match=message) as error:
        RouterInputs.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz must be a whole router inputs file"):
        RouterInputs.load(tmp_path / "x.npz")


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    build().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"x\.npz must be a whole router inputs file"):
        RouterInputs.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must exist, got .*none\.npz"):
        RouterInputs.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, r"got shapes \[\]"),
        ({0: np.zeros((2, 3, 4))}, r"got shapes \[\(2, 3, 4\)\]"),
        ({0: np.zeros((0, 3))}, r"got shapes \[\(0, 3\)\]"),
        ({0: np.zeros((2, 3)), 1: np.zeros((2, 4))}, r"got shapes \[\(2, 3\), \(2, 4\)\]"),
        ({0: np.full((2, 3), np.inf)}, "must be finite, got NaN or infinity in layer 0"),
    ],
)
def test_inputs_that_break_a_rule_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        RouterInputs(layers, MANIFEST)


def test_the_source_is_checked_by_checkpoint_and_layers():
    inputs = build()
    inputs.check_source("abc", [0, 2])
    for checkpoint, layers in (("abd", [0, 2]), ("abc", [0]), ("abc", [0, 1, 2])):
        with pytest.raises(InputError, match=r"got abc with layers \[0, 2\] where"):
            inputs.check_source(checkpoint, layers)


def test_sampling_draws_the_same_real_tokens_in_every_layer():
    # Every token carries its number, times 1 or 10.
    numbers = np.arange(12.0).reshape(3, 4)
    layers = {0: numbers[..., None], 3: 10 * np.repeat(numbers[..., None], 2, axis=-1)}
    mask = numbers % 3 != 0  # 8 of 12 tokens are real
    drawn = sample_tokens(layers, mask, 5, seed=1)
    assert drawn[0].shape == (5, 1) and drawn[3].shape == (5, 2)
    assert drawn[0].dtype == np.float32
    chosen = drawn[0][:, 0]
    assert (np.diff(chosen) > 0).all()  # in the order of the batch, none twice
    assert (chosen % 3 != 0).all()
    np.testing.assert_array_equal(drawn[3][:, 1], 10 * chosen)


def test_sampling_depends_on_the_seed_alone():
    layers, mask = {0: np.arange(400.0).reshape(20, 20, 1)}, np.ones((20, 20), bool)
    one, again, other = (sample_tokens(layers, mask, 30, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("num_tokens", [8, 100])
def test_with_few_tokens_all_are_taken(num_tokens):
    numbers = np.arange(12.0).reshape(3, 4)
    drawn = sample_tokens({0: numbers[..., None]}, numbers % 3 != 0, num_tokens, seed=0)
    np.testing.assert_array_equal(drawn[0][:, 0], numbers[numbers % 3 != 0])


def test_layers_may_have_different_tokens(tmp_path):
    inputs = build()
    layers = {0: inputs.layers[0][:3], 2: inputs.layers[2]}
    unequal = RouterInputs(layers, inputs.manifest)
    unequal.save(tmp_path / "inputs.npz")
    loaded = RouterInputs.load(tmp_path / "inputs.npz")
    assert (loaded.tokens, len(loaded.layers[0])) == (5, 3)
