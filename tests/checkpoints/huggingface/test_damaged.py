"""Truncated, corrupt, missing, disagreeing and malicious directories: one sentence each."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from uncurl_jax.checkpoints.convert import import_checkpoint
from uncurl_jax.checkpoints.huggingface.tensor_files import (
    TensorSpec,
    TensorWriter,
    create_file,
    read_header,
    read_tensor,
    shards,
)
from uncurl_jax.checkpoints.layout import open_reader
from uncurl_jax.errors import InputError

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16),
    "c": np.zeros((2, 0), np.float16),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def with_header(path: Path, change) -> Path:
    """Writes a file again whose header was changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def test_tensors_are_read_as_the_formats_own_library_wrote_them(file):
    header = read_header(file)
    assert header.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        found = read_tensor(header[name])
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
    part = read_tensor(header["a"], (slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(part, TENSORS["a"][1:3, :2])


def test_tensors_are_written_as_the_formats_own_library_reads_them(tmp_path):
    path = tmp_path / "y.safetensors"
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in TENSORS.items()]
    writer = TensorWriter(create_file(path, specs))
    writer.write("b", TENSORS["b"])
    writer.write("a", TENSORS["a"][:, 2:], (slice(0, 3), slice(2, 4)))
    writer.write("a", TENSORS["a"][:, :2], (slice(0, 3), slice(0, 2)))
    writer.write("c", TENSORS["c"])
    writer.sync()
    writer.close()
    found = load_file(path)
    for name, array in TENSORS.items():
        assert found[name].tobytes() == array.tobytes()


def test_tensors_are_divided_in_order_and_a_large_one_is_alone():
    specs = [TensorSpec(str(size), np.dtype(np.float32), (size,)) for size in (2, 3, 9, 1, 1)]
    groups = shards(specs, 20)
    assert [[spec.shape[0] for spec in group] for group in groups] == [[2, 3], [9], [1, 1]]


def test_a_file_cut_off_anywhere_is_refused(file):
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="must be whole"):
            read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="must be whole"):
        read_header(file)


def test_a_file_that_becomes_shorter_is_found_out(file):
    header = read_header(file)
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(InputError, match="fewer bytes than when it was opened"):
        for info in header.values():
            read_tensor(info)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda header: "[" * 100_000, "no JSON"),
        (lambda header: '"x"', "no JSON object"),
        (lambda header: '{"a": 1', "no JSON"),
        (lambda header: '{"a": 1, "a": 2}', "a twice"),
        (lambda header: header.update(a=3), "a described as 3"),
        (lambda header: header["a"].update(shape=[3, -4]), "a described as"),
        (lambda header: header["a"].update(shape=[3, 5]), "bytes for a, F32"),
        (lambda header: header["a"].update(shape=[3, 4.0]), "a described as"),
        (lambda header: header["a"].update(shape=[True, 4]), "a described as"),
        (lambda header: header["a"].update(data_offsets=[8, 4]), "bytes for a"),
        (lambda header: header["a"].update(data_offsets=[1 << 60, (1 << 60) + 48]), "at byte"),
        (lambda header: header["a"].pop("dtype"), "must be of type F32, F16, BF16, got None"),
        (lambda header: header["a"].update(dtype="F8_E4M3"), "quantised .* take the original"),
        (lambda header: header.pop("b") and None, r"at byte|describes"),
        (
            lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"]),
            "bytes for b",
        ),
    ],
)
def test_headers_that_are_wrong_are_refused(change, sentence, file):
    def changed(header):
        result = change(header)
        return result if isinstance(result, str) and result[:1] in '["{' else None

    with_header(file, changed)
    with pytest.raises(InputError, match=sentence):
        read_header(file)


def test_a_header_longer_than_the_file_or_the_limit_is_refused(file):
    data = file.read_bytes()
    for length in (0, len(data), 1 << 62):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(InputError, match="must be whole"):
            read_header(file)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_change_of_a_byte_does_more_than_refuse(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    path = directory / "x.safetensors"
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        for info in read_header(path).values():
            read_tensor(info)
    except InputError as error:
        assert str(error).count(". ") == 0 and str(error).endswith(".")


def refuse(directory, sentence: str) -> None:
    """The import refuses it and leaves nothing."""
    out = directory.parent / "C"
    before = sorted(path.name for path in directory.parent.iterdir())
    with pytest.raises(InputError, match=sentence):
        import_checkpoint(directory, out)
    assert sorted(path.name for path in directory.parent.iterdir()) == before


def index_of(directory):
    path = directory / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_missing_shards_are_named(make_directory):
    directory = make_directory("mixtral", num_shards=4)
    (directory / "model-00003-of-00004.safetensors").unlink()
    refuse(directory, "without model-00003-of-00004.safetensors: download it")


def test_truncated_shards_are_refused(make_directory):
    directory = make_directory("mixtral", num_shards=2)
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(directory, "must be whole, got .*model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        ".safetensors",
        7,
        "a\nb.safetensors",
    ],
)
def test_names_that_lead_out_of_the_directory_are_refused(name, make_directory):
    directory = make_directory("mixtral", num_shards=2)
    path, index = index_of(directory)
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    path.write_text(json.dumps(index))
    refuse(directory, "must name files of its own directory that end in .safetensors")


def test_an_index_that_disagrees_with_its_files_is_refused(make_directory):
    directory = make_directory("mixtral", num_shards=2)
    path, index = index_of(directory)
    first, *_, last = index["weight_map"]
    index["weight_map"][first] = index["weight_map"][last]
    path.write_text(json.dumps(index))
    refuse(directory, "must agree on what is where")
    path.write_text("{}")
    refuse(directory, "must hold weight_map")
    path.write_text("{")
    refuse(directory, "must hold JSON")


def test_pickled_weights_are_refused_unread(make_directory):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("evil",)

    directory = make_directory("mixtral")
    (directory / "model.safetensors").rename(directory / "weights")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refuse(directory, "must be safetensors, got .* the pickled pytorch_model.bin")
    assert not Path("evil").exists()
    (directory / "pytorch_model.bin").unlink()
    refuse(directory, "with neither: download the weights too")


def test_links_to_files_are_followed_as_in_the_cache_of_the_hub(make_directory, tmp_path):
    directory = make_directory("mixtral")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (directory / "model.safetensors").rename(blobs / "0123")
    (directory / "model.safetensors").symlink_to("../blobs/0123")
    assert open_reader(f"hf:{directory}").parameters()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_local_experts": 4}, r"must agree, got .* unknown .*experts\.4"),
        ({"num_local_experts": 6}, r"must agree, got .* missing .*experts\.5"),
        ({"num_hidden_layers": 4}, r"missing model\.layers\.3"),
        ({"intermediate_size": 16}, r"is \[12, 24\] instead of \[16, 24\]"),
        ({"vocab_size": 64}, r"embed_tokens\.weight is \[61, 24\] instead of \[64, 24\]"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false where lm_head"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight is \[12, 24\]"),
        ({"num_experts_per_tok": 9}, r"num_experts\[0\]=5 is below num_selected_experts=9"),
        ({"model_type": "deepseek_v3"}, "model_type must be one of mixtral"),
    ],
)
def test_config_and_weights_that_disagree_are_refused(fields, sentence, make_directory):
    refuse(make_directory("mixtral", **fields), sentence)


def test_a_missing_or_broken_config_is_refused(make_directory):
    directory = make_directory("mixtral")
    (directory / "config.json").write_text("[]")
    refuse(directory, "must hold a JSON object")
    (directory / "config.json").unlink()
    refuse(directory, "without config.json")


def test_experts_of_two_dtypes_are_refused(make_directory):
    directory = make_directory("mixtral")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    refuse(directory, r"one dtype, got bfloat16 and float32 for layers_1/moe/experts/wg")


def test_an_output_projection_that_is_the_embedding_may_be_stored_twice(make_directory):
    directory = make_directory("qwen3_moe_tied")
    tensors = load_file(directory / "model.safetensors")
    before = open_reader(f"hf:{directory}").metadata
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert open_reader(f"hf:{directory}").metadata == before


def test_a_tokenizer_that_does_not_match_is_refused(make_directory):
    directory = make_directory("mixtral", eos_token_id=60)
    refuse_before = json.loads((directory / "tokenizer.json").read_text())
    assert len(refuse_before["model"]["vocab"]) == 61
    import_checkpoint(directory, directory.parent / "fine")
    vocab = refuse_before["model"]["vocab"]
    vocab["one too many"] = 61
    (directory / "tokenizer.json").write_text(json.dumps(refuse_before))
    refuse(directory, r"must belong to its model, got ids up to 61 .* 62 in .* vocab_size 61")
    (directory / "tokenizer.json").unlink()
    refuse(directory, "needs one tokenizer, got none, .* give --vocabulary")


def test_an_id_that_the_tokenizer_does_not_have_is_refused(make_directory):
    directory = make_directory("qwen2_moe", eos_token_id=[2, 60], vocab_size=61)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["w41"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(directory, "must belong to its model, got ids up to 60")
