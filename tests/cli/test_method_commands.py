"""Optional statistics, shards, fitted routers, diagnostics and audit from the command line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.router_inputs import RouterInputs
from uncurl_jax.pruning.statistics import RouterStatistics

COLLECT = "--collect outputs --collect all_outputs --inputs_out inputs.npz --sample_tokens 64"
PLAN = "plan --statistics whole.npz --num_experts 2"


@pytest.fixture(scope="module")
def made(world, run_all, tmp_path_factory):
    """Runs the commands of this file in one process; returns (directory, {name: Done})."""
    directory = tmp_path_factory.mktemp("methods")
    task = f"--checkpoint {world['pretrained']} --task {world['caches']}/topic --batch_size 4"
    commands = {
        "whole": f"calibrate {task} {COLLECT} --out whole.npz",
        "shard 0": f"calibrate {task} --shard 0/2 --out shard0.npz",
        "shard 1": f"calibrate {task} --shard 1/2 --out shard1.npz",
        "plain": f"calibrate {task} --out plain.npz",
        "layers": f"calibrate {task} --layer_by_layer --out layers.npz",
        "merge": "merge-statistics shard1.npz shard0.npz --out merged.npz",
        **{
            method: f"{PLAN} --method {method} --checkpoint {world['pretrained']} "
            f"--out {method}.json"
            for method in ("reap", "ean", "hc_smoe", "weight", "router_norm", "mc_smoe")
        },
        "composite": f"{PLAN} --method composite --layer_methods frequency,uncurl --out c.json",
        "total": "plan --statistics whole.npz --total_experts 6 --multiple_of 2 --out total.json",
        "fit": f"{PLAN} --router fit --gate_compensation --checkpoint {world['pretrained']} "
        "--router_inputs inputs.npz --diagnose --out fit.json",
        "inspect": "inspect-plan fit.json --picture fit.html",
        "prune": f"prune --checkpoint {world['pretrained']} --plan fit.json --out pruned",
        "verify": "verify pruned",
        "other": f"{PLAN} --router reinit --seed 3 --out other.json",
        "prune 3": f"prune --checkpoint {world['pretrained']} --plan other.json --out other",
        "remap": f"{PLAN} --router remap --out remap.json",
        "prune remap": f"prune --checkpoint {world['pretrained']} --plan remap.json --out wide",
        "evaluate remap": f"evaluate --checkpoint wide --task {world['caches']}/topic --out m.json",
    }
    done = run_all(directory, [command.split() for command in commands.values()])
    return directory, dict(zip(commands, done, strict=True))


def test_optional_statistics_are_collected_and_named(made):
    directory, done = made
    assert done["whole"].result["collected"] == ["outputs", "all_outputs"]
    statistics = RouterStatistics.load(directory / "whole.npz")
    embed = statistics.layers[0].output_sum.shape[1]
    assert statistics.layers[0].all_output_sum.shape == (4, embed)
    assert RouterInputs.load(directory / "inputs.npz").layers[1].shape == (64, embed)


@pytest.mark.parametrize("name", ["merge", "layers"])
def test_merged_shards_and_layer_by_layer_give_the_plain_statistics(made, name):
    directory, done = made
    assert done[name].status == 0, done[name].err
    expected = RouterStatistics.load(directory / "plain.npz")
    got = RouterStatistics.load(directory / {"merge": "merged.npz", "layers": "layers.npz"}[name])
    assert got.tokens == expected.tokens
    for layer, fields in expected.layers.items():
        for field, array in fields._asdict().items():
            if array is not None:
                np.testing.assert_allclose(
                    getattr(got.layers[layer], field), array, rtol=1e-4, err_msg=field
                )


@pytest.mark.parametrize("method", ["reap", "ean", "hc_smoe", "weight", "router_norm"])
def test_every_method_plans_from_the_command_line(made, method):
    directory, done = made
    assert done[method].result["num_experts"] == [2, 2]
    plan = PruningPlan.load(directory / f"{method}.json")
    assert {layer.method for layer in plan.layers} == {method}
    assert plan.alignment == ("none" if method == "hc_smoe" else "features")


def test_counts_per_layer_follow_the_total(made):
    assert sum(made[1]["mc_smoe"].result["num_experts"]) == 4
    counts = made[1]["total"].result["num_experts"]
    assert sum(counts) == 6 and all(count % 2 == 0 for count in counts)


def test_a_composite_plan_has_a_method_per_layer(made):
    assert made[1]["composite"].status == 0, made[1]["composite"].err
    plan = PruningPlan.load(made[0] / "c.json")
    assert [layer.method for layer in plan.layers] == ["frequency", "uncurl"]


def test_a_diagnosed_plan_is_shown_as_table_page_and_json(made):
    directory, done = made
    result = done["inspect"].result
    assert result["verdict"].partition(":")[0] in ("good", "caution", "poor")
    for layer in result["layers"]:
        assert layer["router_kl_after"] <= layer["router_kl_before"]
        assert layer["output_error"] >= 0
        assert layer["mean_norm_ratio"] > 0
    assert "silhouette" in done["inspect"].err and "plan: " in done["inspect"].err
    page = (directory / "fit.html").read_text()
    assert page.count("<svg") == 3 and result["verdict"] in page


def test_a_pruned_checkpoint_is_verified(made):
    directory, done = made
    assert done["verify"].status == 0, done["verify"].err
    assert layout.resolve(directory / "pruned").model_config().num_experts == (2, 2)


def test_a_changed_array_is_named_with_status_1(made, run_alone, tmp_path):
    """The second plan's checkpoint says that it was made by the first plan."""
    directory, done = made
    assert done["prune 3"].status == 0, done["prune 3"].err
    provenance = json.loads((directory / "pruned" / "provenance.json").read_text())
    changed = tmp_path / "changed"
    shutil.copytree(directory / "other", changed)
    (changed / "provenance.json").write_text(json.dumps(provenance))
    refused = run_alone(tmp_path, "verify", "changed")
    assert refused.status == 1
    result = json.loads(refused.out)
    assert not result["verified"] and result["difference"]


def test_a_remapped_checkpoint_keeps_its_wide_router_and_is_evaluated(made):
    directory, done = made
    assert done["evaluate remap"].status == 0, done["evaluate remap"].err
    config = layout.resolve(directory / "wide").model_config()
    assert [config.router_width(layer) for layer in (0, 1)] == [4, 4]
    assert config.num_experts == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--method reap", "needs the statistics outputs, which were not collected: calibrate"),
        ("--method weight", "needs the checkpoint's weights, got statistics alone: give --check"),
        ("--router fit", "Router 'fit' needs the checkpoint and a sample of its layers' inputs"),
        ("--router remap --method frequency", "needs every expert in a cluster, got dropped"),
        ("--diagnose", "--diagnose needs the checkpoint that was calibrated: give --checkpoint"),
        ("--max_cluster_size 1", "must hold all experts, got 1 * 2 for 4: raise the cap"),
        ("--multiple_of 3", "must be a multiple of multiple_of=3, got 2 in layer 0"),
        ("--total_experts 4", "needs num_experts or total_experts, got 2 and 4: give one"),
        ("--layer_methods uncurl", "layer_methods must come with method 'composite'"),
        ("--method composite", "'composite' needs layer_methods, one to 2 names"),
        ("--method uncurl_protected --num_protected 3", "must not exceed the experts after"),
        ("--alignment nonne", "alignment must be one of ...; did you mean none?"),
        ("--assign_labels kmean", "assign_labels must be one of ...; did you mean kmeans?"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(made, refuse, arguments, sentence):
    statistics = str(made[0] / "plain.npz")
    command = ("plan", "--statistics", statistics, "--num_experts", "2", *arguments.split())
    refuse(sentence, *command, "--out", "new.json")


def test_a_total_that_no_division_meets_is_refused(made, refuse):
    statistics = str(made[0] / "plain.npz")
    arguments = ("--total_experts", "9", "--out", "new.json")
    refuse("must be a multiple of ... and 8, got 9", "plan", "--statistics", statistics, *arguments)


def test_statistics_that_do_not_add_up_are_refused(made, refuse, world):
    first = str(made[0] / "shard0.npz")
    refuse("must be different files", "merge-statistics", first, first, "--out", "new.npz")
    refuse("got 0/2 where 0/2, 1/2 are its shards", "merge-statistics", first, "--out", "new.npz")
    whole = world["statistics.npz"]
    refuse("must be its shards, got a whole", "merge-statistics", first, whole, "--out", "new.npz")


def test_calibration_options_that_do_not_fit_are_refused(world, refuse):
    task = ("--checkpoint", world["pretrained"], "--task", f"{world['caches']}/topic")
    new = ("--out", "new.npz")
    refuse("collect must be one of", "calibrate", *task, *new, "--collect", "output")
    refuse("must have 0 <= i < n, got 2/2", "calibrate", *task, *new, "--shard", "2/2")
    sentence = "--shard must come without --layer_by_layer"
    refuse(sentence, "calibrate", *task, *new, "--layer_by_layer", "--shard", "0/2")
    sentence = "--distributed must come without --layer_by_layer"
    refuse(sentence, "calibrate", *task, *new, "--layer_by_layer", "--distributed")
    refuse("must come with --layer_by_layer", "calibrate", *task, *new, "--activations_dir", "a")
