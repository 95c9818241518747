from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from uncurl_jax.checkpoints.convert import export_checkpoint, import_checkpoint
from uncurl_jax.checkpoints.layout import fingerprint, open_reader, resolve
from uncurl_jax.checkpoints.verify import verify_checkpoint
from uncurl_jax.errors import InputError

WEIGHTS = "model.safetensors"


def hashes_of(directory):
    """{tensor: (dtype, shape, bytes)}, read with the format's own library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                array = file.get_tensor(name)
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_import_and_export_give_the_same_bits(name, dtype, make_directory, tmp_path):
    source = make_directory(name, dtype=dtype, num_shards=3)
    imported = import_checkpoint(source, tmp_path / "C")
    exported = export_checkpoint(tmp_path / "C", tmp_path / "out")
    assert hashes_of(tmp_path / "out") == hashes_of(source)
    assert config_of(tmp_path / "out") == config_of(source)
    assert imported["fingerprint"] == exported["fingerprint"] == fingerprint(f"hf:{source}")
    assert imported["model_type"] == exported["model_type"] == config_of(source)["model_type"]


def test_one_file_and_many_hold_the_same(make_directory, tmp_path):
    source = make_directory("mixtral", dtype="bfloat16")
    whole = export_checkpoint(f"hf:{source}", tmp_path / "one")
    export_checkpoint(f"hf:{source}", tmp_path / "many", max_shard_bytes=4000)
    assert sorted(path.name for path in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 4
    assert all(path.stat().st_size < 9000 for path in shards)
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == whole["bytes"]["after"]
    assert hashes_of(tmp_path / "many") == hashes_of(tmp_path / "one") == hashes_of(source)


def test_fused_experts_are_read_and_written_one_by_one(make_directory, tmp_path):
    source = make_directory("qwen3_moe", dtype="bfloat16")
    tensors = load_file(source / WEIGHTS)
    for layer in (1, 3):
        block = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{block}.{e}.{name}_proj.weight") for e in range(6)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{block}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{block}.down_proj"] = down
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text(json.dumps(config_of(source)))
    save_file(tensors, fused / WEIGHTS)
    assert fingerprint(f"hf:{fused}") == fingerprint(f"hf:{source}")
    export_checkpoint(f"hf:{fused}", tmp_path / "out")
    assert hashes_of(tmp_path / "out") == hashes_of(source)


def test_the_tokenizer_and_other_files_go_along(make_directory, tmp_path):
    source = make_directory("olmoe")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "modeling_olmoe.py").write_text("raise SystemExit")
    import_checkpoint(source, tmp_path / "C")
    assert resolve(tmp_path / "C").vocabulary()["spec"] == str(tmp_path / "C" / "huggingface")
    (tmp_path / "C").rename(tmp_path / "moved")
    assert resolve(tmp_path / "moved").vocabulary()["spec"] == str(
        tmp_path / "moved" / "huggingface"
    )
    export_checkpoint(tmp_path / "moved", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_olmoe.py").exists()


def test_a_dtype_that_is_asked_for_is_rounded_to(make_directory, tmp_path):
    source = make_directory("qwen2_moe")
    export_checkpoint(f"hf:{source}", tmp_path / "out", dtype="bfloat16")
    assert config_of(tmp_path / "out") == config_of(source) | {"dtype": "bfloat16"}
    rounded = make_directory("qwen2_moe", dtype="bfloat16")
    assert hashes_of(tmp_path / "out") == hashes_of(rounded)


def test_numbers_too_large_for_the_dtype_are_refused(make_directory, tmp_path):
    source = make_directory("gpt2")
    tensors = load_file(source / WEIGHTS)
    tensors["transformer.wte.weight"][3, 2] = 1e5
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(InputError, match=r"token_embedder/embedding above the largest float16"):
        export_checkpoint(f"hf:{source}", tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf_gpt2"]


def test_max_length_shortens_the_cache_and_not_the_exported_model(make_directory, tmp_path):
    source = make_directory("mixtral", sliding_window=16)
    with pytest.raises(InputError, match=r"sliding_window must be .* --max_length 16"):
        import_checkpoint(source, tmp_path / "C")
    import_checkpoint(source, tmp_path / "C", max_length=16)
    assert resolve(tmp_path / "C").model_config().max_length == 16
    export_checkpoint(tmp_path / "C", tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source)
    assert hashes_of(tmp_path / "out") == hashes_of(source)


_CONVERT = """
import os, signal, sys
from uncurl_jax.checkpoints import convert

def progress(stage, done, total):
    if done >= int(sys.argv[4]) >= 0:
        os.kill(os.getpid(), signal.SIGKILL)

getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("function", ["import_checkpoint", "export_checkpoint"])
def test_what_was_killed_goes_on_and_gives_the_same(function, make_directory, tmp_path):
    source = f"hf:{make_directory('mixtral', dtype='bfloat16')}"
    out = tmp_path / "out"
    command = [sys.executable, "-c", _CONVERT, function, source, str(out), "9"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out."))
    for path in (left / "checkpoint", f"hf:{left / 'checkpoint'}"):
        with pytest.raises(InputError):
            resolve(path)
    convert = import_checkpoint if function == "import_checkpoint" else export_checkpoint
    summary = convert(source, out)
    assert summary["pieces"]["resumed"] >= 8
    assert not left.exists()
    assert summary["fingerprint"] == fingerprint(source)
    convert(source, tmp_path / "whole")
    prefix = "hf:" if function == "export_checkpoint" else ""
    readers = [open_reader(f"{prefix}{path}") for path in (out, tmp_path / "whole")]
    for name in readers[0].metadata:
        assert readers[0].read(name).tobytes() == readers[1].read(name).tobytes()


def test_our_own_models_are_exported_where_a_family_expresses_them(
    tmp_path, make_params, save_checkpoint, config
):
    llama_like = dataclasses.replace(
        config,
        num_experts=(4, 4),
        num_selected_experts=2,
        normalize_gates=True,
        is_gated=True,
        activation="silu",
        has_mlp_bias=False,
        position_embedding="rotary",
        norm="rms_norm",
        attention_bias="none",
        has_tied_embeddings=False,
        expert_map=None,
    )
    save_checkpoint(tmp_path / "C", llama_like)
    summary = export_checkpoint(tmp_path / "C", tmp_path / "out", dtype="bfloat16")
    assert summary["model_type"] == "mixtral"
    exported = config_of(tmp_path / "out")
    assert exported["num_local_experts"] == 4
    assert exported["torch_dtype"] == "bfloat16"
    again = resolve(f"hf:{tmp_path / 'out'}").model_config()
    assert again.num_experts == (4, 4)


def test_models_that_no_family_expresses_are_refused(tmp_path, save_checkpoint, config):
    save_checkpoint(tmp_path / "C", config)
    with pytest.raises(InputError, match=r"family that transformers has.*mixtral.*gpt2"):
        export_checkpoint(tmp_path / "C", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["C"]


def test_what_was_imported_is_in_the_chain_of_origins(make_directory, tmp_path):
    source = make_directory("olmoe")
    import_checkpoint(source, tmp_path / "C")
    export_checkpoint(tmp_path / "C", tmp_path / "out")
    provenance = resolve(f"hf:{tmp_path / 'out'}").provenance()
    assert provenance["created_by"] == "export"
    assert provenance["source"]["provenance"]["created_by"] == "import"
    assert provenance["source"]["provenance"]["source"]["path"] == f"hf:{source}"
    with pytest.raises(InputError, match="Only what comes from a prune can be verified"):
        verify_checkpoint(f"hf:{tmp_path / 'out'}")
