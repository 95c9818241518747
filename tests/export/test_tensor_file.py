"""Files of tensors against the safetensors library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from uncurl_jax.export import tensor_file
from uncurl_jax.export.runner import ArtifactError, read_tensors
from uncurl_jax.export.tensor_file import TensorWriter, write_tensors


@pytest.fixture
def tensors():
    generator = np.random.default_rng(0)
    return {
        "a/bf16": generator.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b": generator.normal(size=(2, 2, 2)).astype(np.float32),
        "c/int8": np.arange(-3, 4, dtype=np.int8),
        "d": np.asarray([7, -1], np.int32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_arrays_come_back_with_their_bytes(tensors, tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_the_library_reads_the_same(tensors, tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_the_library_writes_is_read(tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "y.safetensors", metadata={"a": "b"})
    found = read_tensors(tmp_path / "y.safetensors")
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_writer_begins_a_new_file_when_one_is_full(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 40)
    writer = TensorWriter(tmp_path / "weights")
    for name, array in tensors.items():
        writer.add(name, array)
    writer.flush()
    files = sorted((tmp_path / "weights").iterdir())
    assert [path.name for path in files] == ["00001.safetensors", "00002.safetensors"]
    # 30 and 32 bytes fill the first.
    assert [list(read_tensors(path)) for path in files] == [
        ["a/bf16", "b"],
        ["c/int8", "d", "empty"],
    ]
    assert writer.num_bytes == 30 + 32 + 7 + 8
    assert writer.shapes["b"] == ((2, 2, 2), np.float32)


@pytest.mark.parametrize("size", [4, 30, 200])
def test_a_file_cut_short_is_refused(tensors, tmp_path, size):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="must be a whole safetensors file"):
        read_tensors(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="must hold its weights, got nothing at"):
        read_tensors(tmp_path / "x.safetensors")
