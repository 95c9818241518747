from __future__ import annotations

import json

import numpy as np
import pytest

from uncurl_jax.checkpoints.convert import export_checkpoint, import_checkpoint
from uncurl_jax.checkpoints.in_memory import prune_in_memory
from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.checkpoints.layout import open_reader, resolve
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.checkpoints.verify import verify_checkpoint
from uncurl_jax.checkpoints.weights import CheckpointWeights
from uncurl_jax.errors import InputError

MOE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_moe_tied"]


def merging_plan(plan_for, source, count=3, **options):
    """Experts z and z + count, ... are merged, in every layer."""
    config = resolve(source).model_config()
    layers = {
        layer: [z % count for z in range(config.num_experts[layer])] for layer in config.moe_layers
    }
    return plan_for(source, layers, **options)


def weights_of(path):
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if "safetensors" in file.name
    }


@pytest.mark.parametrize("name", MOE)
def test_every_road_to_a_pruned_directory_gives_the_same_bytes(
    name, make_directory, plan_for, tmp_path
):
    source = f"hf:{make_directory(name, dtype='bfloat16', num_shards=2)}"
    plan = merging_plan(plan_for, source)
    direct = prune_checkpoint(source, plan, tmp_path / "direct", file_format="hf")
    import_checkpoint(source, tmp_path / "C")
    # The plan of the directory is the plan of the imported checkpoint: fingerprints are the same.
    prune_checkpoint(tmp_path / "C", plan, tmp_path / "P")
    export_checkpoint(tmp_path / "P", tmp_path / "long")
    prune_checkpoint(source, plan, tmp_path / "Q")
    export_checkpoint(tmp_path / "Q", tmp_path / "middle")
    expected = weights_of(tmp_path / "direct")
    assert weights_of(tmp_path / "long") == weights_of(tmp_path / "middle") == expected
    configs = [
        json.loads((tmp_path / path / "config.json").read_text())
        for path in ("direct", "long", "middle", f"hf_{name}")
    ]
    field = "num_local_experts" if "num_local_experts" in configs[3] else "num_experts"
    assert configs[0] == configs[1] == configs[2] == configs[3] | {field: 3}
    assert direct["bytes"]["after"] < direct["bytes"]["before"]
    sizes = [
        sum(map(len, weights_of(tmp_path / path).values())) for path in ("direct", f"hf_{name}")
    ]
    assert sizes[0] < 0.9 * sizes[1]
    assert (tmp_path / "direct" / "tokenizer.json").exists()


def test_a_pruned_directory_is_verified_and_described(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('qwen3_moe', dtype='bfloat16')}"
    prune_checkpoint(source, merging_plan(plan_for, source), tmp_path / "out", file_format="hf")
    result = verify_checkpoint(f"hf:{tmp_path / 'out'}")
    assert result["verified"] and result["chain"][0]["status"] == "verified"
    described = describe(f"hf:{tmp_path / 'out'}")
    assert described["num_experts"] == [0, 3, 0, 3]
    assert described["dtypes"].keys() == {"bfloat16"}
    assert next(link["created_by"] for link in described["chain"]) == "prune"


def test_a_changed_pruned_directory_is_found_out(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('olmoe', dtype='bfloat16')}"
    prune_checkpoint(source, merging_plan(plan_for, source), tmp_path / "out", file_format="hf")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        last = file.read(1)
        file.seek(-3, 2)
        file.write(bytes([last[0] ^ 1]))
    result = verify_checkpoint(f"hf:{tmp_path / 'out'}")
    assert not result["verified"] and result["difference"]["array"].startswith("target/")


def test_weights_for_planning_are_those_of_the_imported_checkpoint(make_directory, tmp_path):
    source = f"hf:{make_directory('qwen2_moe')}"
    import_checkpoint(source, tmp_path / "C")
    both = [CheckpointWeights(path) for path in (source, tmp_path / "C")]
    assert both[0].fingerprint == both[1].fingerprint
    np.testing.assert_array_equal(both[0].router(0), both[1].router(0))
    experts = [weights.experts(2) for weights in both]
    assert experts[0].keys() == experts[1].keys() == {"wg", "wi", "wo"}
    for key in experts[0]:
        np.testing.assert_array_equal(experts[0][key], experts[1][key])


def test_a_prune_in_memory_reads_directories_too(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('mixtral')}"
    plan = merging_plan(plan_for, source)
    prune_in_memory(source, plan, tmp_path / "memory")
    prune_checkpoint(source, plan, tmp_path / "streamed")
    readers = [open_reader(tmp_path / path) for path in ("memory", "streamed")]
    for name in readers[0].metadata:
        assert readers[0].read(name).tobytes() == readers[1].read(name).tobytes()


def test_unequal_counts_are_refused_before_any_file(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('mixtral')}"
    plan = plan_for(source, {0: [0, 1, 0, 1, 0], 1: [0, 1, 2, 0, 1], 2: [0, 1, 2, 0, 1]})
    with pytest.raises(
        InputError,
        match=r"num_local_experts of config\.json is one number.*"
        r"\[2, 3, 3\].*uniform count, as --num_experts 2",
    ):
        prune_checkpoint(source, plan, tmp_path / "out", file_format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf_mixtral"]
    # Our own format has room for them, and says the same at the export.
    prune_checkpoint(source, plan, tmp_path / "P")
    with pytest.raises(InputError, match="uniform count"):
        export_checkpoint(tmp_path / "P", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_routers_wider_than_experts_are_refused(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('mixtral')}"
    plan = merging_plan(plan_for, source, router="remap")
    with pytest.raises(InputError, match=r"pruned with router 'remap'.*another --router"):
        prune_checkpoint(source, plan, tmp_path / "out", file_format="hf")


def test_an_unknown_format_is_refused(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('mixtral')}"
    with pytest.raises(InputError, match=r"--format must be .uncurl. or .hf., got 'gguf'"):
        prune_checkpoint(source, merging_plan(plan_for, source), tmp_path / "o", file_format="gguf")


def test_a_plan_of_another_directory_is_refused(make_directory, plan_for, tmp_path):
    source = f"hf:{make_directory('mixtral')}"
    plan = merging_plan(plan_for, source)
    other = f"hf:{make_directory('mixtral', seed=1)}"
    with pytest.raises(InputError, match="A plan must be of the checkpoint that is pruned"):
        prune_checkpoint(other, plan, tmp_path / "out", file_format="hf")
