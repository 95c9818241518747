"""Pruning of checkpoints on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.optimize

from uncurl_jax.artifacts import write_json
from uncurl_jax.checkpoints.layout import StateReader, fingerprint, finished_steps, resolve
from uncurl_jax.checkpoints.parameters import is_expert_array
from uncurl_jax.checkpoints.store import restore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan

LABELS = {0: [0, 1, 0, 2, 1, 0, 2, 0], 2: [0, 1, 1, 0]}


def read_parameters(path):
    reader = StateReader(path)
    return {name: reader.read(f"target/{name}") for name in reader.parameters()}


def merged_by_hand(experts, labels, reference, weights):
    """Aligns and merges one layer in float64, with scipy's assignment and plain loops."""
    experts = {name: np.asarray(array).astype(np.float64) for name, array in experts.items()}
    result = {name: [] for name in experts}
    for cluster, kept in enumerate(reference):
        sums = {name: 0.0 for name in experts}
        for z in np.flatnonzero(np.array(labels) == cluster):
            wi, wo = experts["wi"], experts["wo"]
            product = wi[kept].T @ wi[z] + wo[kept] @ wo[z].T
            order = scipy.optimize.linear_sum_assignment(-product)[1]
            sums["wi"] = sums["wi"] + weights[z] * wi[z][:, order]
            sums["wi_bias"] = sums["wi_bias"] + weights[z] * experts["wi_bias"][z][order]
            sums["wo"] = sums["wo"] + weights[z] * wo[z][order]
            sums["wo_bias"] = sums["wo_bias"] + weights[z] * experts["wo_bias"][z]
        for name, value in sums.items():
            result[name].append(value)
    return {name: np.stack(values) for name, values in result.items()}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_result_equals_a_reference_in_memory(
    tmp_path, config, make_params, save_checkpoint, dtype, tolerance, plan_for
):
    source = save_checkpoint(tmp_path / "run", config, params=make_params(config, dtype=dtype))
    plan = plan_for(source, LABELS)
    prune_checkpoint(source, plan, tmp_path / "pruned")
    before, after = read_parameters(source), read_parameters(tmp_path / "pruned")
    expected_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    assert set(before) == set(after)
    assert all(array.dtype == expected_dtype for array in after.values())
    for layer, labels in LABELS.items():
        prefix = f"layers_{layer}/moe"
        decided = plan.layer(layer)
        experts = {
            name: before[f"{prefix}/experts/{name}"] for name in ("wi", "wi_bias", "wo", "wo_bias")
        }
        expected = merged_by_hand(experts, labels, decided.reference, decided.weights)
        for name, array in expected.items():
            got = after[f"{prefix}/experts/{name}"].astype(np.float64)
            np.testing.assert_allclose(got, array, rtol=tolerance, atol=tolerance)
        kernel = before[f"{prefix}/router/kernel"][:, list(decided.reference)]
        np.testing.assert_array_equal(after[f"{prefix}/router/kernel"], kernel)
    for name in before:
        if "/moe/" not in name:
            np.testing.assert_array_equal(after[name], before[name])


def test_keeping_every_expert_changes_nothing_but_their_order(
    tmp_path, config, save_checkpoint, plan_for
):
    source = save_checkpoint(tmp_path / "run", config)
    labels = {0: [3, 1, 0, 2, 7, 6, 5, 4], 2: [0, 1, 2, 3]}
    prune_checkpoint(source, plan_for(source, labels), tmp_path / "pruned")
    before, after = read_parameters(source), read_parameters(tmp_path / "pruned")
    for name, array in before.items():
        order = labels[int(name.split("_")[1][0])] if "/moe/" in name else None
        got = after[name]
        if order is not None:
            got = got[order] if is_expert_array(name) else got[:, order]
        assert got.tobytes() == array.tobytes(), name


def test_dropped_experts_leave_the_others_as_they_are(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(
        source, {0: [-1, 1, -1, -1, 0, -1, -1, 2], 2: [-1, -1, 0, -1]}, method="frequency"
    )
    prune_checkpoint(source, plan, tmp_path / "pruned")
    before, after = read_parameters(source), read_parameters(tmp_path / "pruned")
    for name in ("wi", "wi_bias", "wo", "wo_bias"):
        np.testing.assert_array_equal(
            after[f"layers_0/moe/experts/{name}"], before[f"layers_0/moe/experts/{name}"][[4, 1, 7]]
        )
    assert after["layers_2/moe/router/kernel"].shape == (16, 1)


def test_gate_factors_scale_the_outputs(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    identity = {0: list(range(8)), 2: [0, 1, 2, 3]}
    factors = {0: tuple([0.5] * 8), 2: (1.0, 2.0, 0.25, 1.0)}
    prune_checkpoint(source, plan_for(source, identity, gate_factors=factors), tmp_path / "pruned")
    before, after = read_parameters(source), read_parameters(tmp_path / "pruned")
    for layer, values in factors.items():
        for name in ("wo", "wo_bias"):
            key = f"layers_{layer}/moe/experts/{name}"
            scale = np.array(values, np.float32).reshape(-1, *[1] * (before[key].ndim - 1))
            np.testing.assert_array_equal(after[key], before[key] * scale)


def test_result_is_a_checkpoint_of_the_smaller_model(
    tmp_path, config, make_params, save_checkpoint, plan_for
):
    params = make_params(config)
    source = save_checkpoint(
        tmp_path / "run", config, params=params, param_states={"mu": params}, step=40
    )
    plan = plan_for(source, LABELS)
    summary = prune_checkpoint(source, plan, tmp_path / "pruned")

    result = resolve(tmp_path / "pruned")
    assert result.step == 0
    assert finished_steps(tmp_path / "pruned") == [0]
    pruned_config = result.model_config()
    assert pruned_config == ModelConfig(**{**config.to_dict(), "num_experts": (3, 0, 2)})
    assert result.vocabulary() == resolve(source).vocabulary()
    provenance = result.provenance()
    assert provenance["source"]["fingerprint"] == fingerprint(source)
    assert provenance["source"]["step"] == 40
    assert provenance["source"]["provenance"] == {"created_by": "test"}
    assert provenance["plan_hash"] == plan.hash
    assert PruningPlan.from_dict(provenance["plan"]) == plan
    assert set(StateReader(result).metadata) == {
        "state/step",
        *(f"target/{name}" for name in StateReader(source).parameters()),
    }
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), make_params(pruned_config)
    )
    restored = restore(tmp_path / "pruned", abstract_params=template)
    assert restored.params["layers_0"]["moe"]["experts"]["wi"].shape == (3, 16, 24)

    assert summary["num_experts"] == [3, 0, 2]
    assert summary["fingerprint"] == fingerprint(tmp_path / "pruned")
    assert summary["plan_hash"] == plan.hash
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, template)]
    assert summary["parameters"] == {"before": sizes[0], "after": sizes[1]}
    assert summary["bytes"] == {"before": 4 * sizes[0], "after": 4 * sizes[1]}
    for layer in summary["layers"]:
        assert layer["similarity"]["after"] >= layer["similarity"]["before"]
    json.dumps(summary, allow_nan=False)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_the_same_plan_gives_the_same_parameters_with_any_number_of_workers(
    tmp_path, config, save_checkpoint, plan_for
):
    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, LABELS)
    results = [
        prune_checkpoint(source, plan, tmp_path / f"pruned{workers}", workers=workers)
        for workers in (0, 2)
    ]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]


def test_no_chunk_of_the_result_holds_two_experts(tmp_path, config, save_checkpoint, plan_for):
    import tensorstore as ts

    source = save_checkpoint(tmp_path / "run", config)
    prune_checkpoint(source, plan_for(source, LABELS), tmp_path / "pruned")
    kvstore = {
        "driver": "ocdbt",
        "base": f"file://{resolve(tmp_path / 'pruned').state_dir}/",
        "path": "target.layers_0.moe.experts.wi/",
    }
    array = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    assert array.chunk_layout.read_chunk.shape == (1, 16, 24)


def test_progress_names_what_is_done(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    calls = []
    prune_checkpoint(
        source,
        plan_for(source, LABELS),
        tmp_path / "pruned",
        progress=lambda *call: calls.append(call),
    )
    totals = {stage: total for stage, _, total in calls}
    # 12 experts and one batch of small arrays
    assert totals == {"prune": 13}
    assert [done for _, done, _ in calls] == [0, 1, 5, 7, 9, 11, 13]


def assert_refused_without_a_trace(tmp_path, source, plan, message, out="pruned"):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=message):
        prune_checkpoint(source, plan, tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == before


def test_nan_is_named_by_layer_and_expert_and_nothing_stays(
    tmp_path, config, make_params, save_checkpoint, plan_for
):
    params = make_params(config)
    params["layers_2"]["moe"]["experts"]["wo"][3, 0, 0] = np.nan
    source = save_checkpoint(tmp_path / "run", config, params=params)
    assert_refused_without_a_trace(
        tmp_path, source, plan_for(source, LABELS), r"layers_2/moe/experts/wo expert 3 \(1 values\)"
    )


def test_a_plan_of_another_checkpoint_is_refused(
    tmp_path, config, make_params, save_checkpoint, plan_for
):
    source = save_checkpoint(tmp_path / "run", config)
    other = save_checkpoint(tmp_path / "other", config, params=make_params(config, seed=1))
    assert_refused_without_a_trace(
        tmp_path, other, plan_for(source, LABELS), r"A plan must be of the checkpoint.*fingerprint"
    )


def test_a_plan_of_another_architecture_is_refused(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    other_config = ModelConfig(**{**config.to_dict(), "num_experts": (4, 0, 4)})
    other = save_checkpoint(tmp_path / "other", other_config)
    assert_refused_without_a_trace(
        tmp_path, other, plan_for(source, LABELS), r"got num_experts \(8, 0, 4\) in the plan"
    )


def test_a_checkpoint_that_is_not_its_architecture_is_refused(
    tmp_path, config, save_checkpoint, plan_for
):
    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, LABELS)
    write_json(source / "model_config.json", {**config.to_dict(), "mlp_dim": 32})
    assert_refused_without_a_trace(
        tmp_path, source, plan, r"layers_0/moe/experts/wi is \[8, 16, 24\] instead of \[8, 16, 32\]"
    )


def test_an_existing_output_is_refused(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    (tmp_path / "pruned").mkdir()
    assert_refused_without_a_trace(
        tmp_path, source, plan_for(source, LABELS), "An output must not exist yet"
    )


def test_a_missing_vocabulary_is_refused(tmp_path, config, save_checkpoint, plan_for):
    source = save_checkpoint(tmp_path / "run", config)
    (source / "vocabulary.json").unlink()
    assert_refused_without_a_trace(
        tmp_path, source, plan_for(source, LABELS), r"needs vocabulary\.json"
    )


_MEASURE = """
import json, pathlib, sys
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.pruning.plan import PruningPlan

def status(field):
    # Not resource.getrusage: its maximum includes the parent's memory from before the exec.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

start = status("VmRSS")
summary = prune_checkpoint(sys.argv[1], PruningPlan.load(sys.argv[2]), sys.argv[3], workers=0)
print(json.dumps({"start": start, "peak": status("VmHWM"), "seconds": summary["seconds"]}))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_some_experts(
    tmp_path, make_params, save_checkpoint, record_property, plan_for
):
    config = ModelConfig(
        num_experts=(128, 128),
        vocab_size=512,
        embed_dim=512,
        num_heads=8,
        mlp_dim=1024,
        max_length=64,
    )
    source = save_checkpoint(tmp_path / "run", config)
    expert = 4 * (2 * 512 * 1024 + 512 + 1024)
    layer = 128 * expert
    labels = [min(z, 63) for z in range(128)]
    plan = plan_for(source, {0: labels, 1: labels})
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", _MEASURE]
    command += [str(source), str(tmp_path / "plan.json"), str(tmp_path / "pruned")]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    extra = measured["peak"] - measured["start"]
    record_property("extra_bytes", extra)
    print(f"expert {expert / 1e6:.1f} MB, layer {layer / 1e6:.0f} MB, extra {extra / 1e6:.0f} MB")
    # In one process: some experts read ahead, encoded and decoded; the reference and the member in
    # float32; products, sum and float64 costs, which are [mlp, mlp]; mean and change in float32;
    # what is being written. The rest is what packages load when they are first used.
    assert extra < 24 * expert + 128 * 2**20 < 0.5 * layer
