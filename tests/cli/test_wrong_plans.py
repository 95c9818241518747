"""Wrong statistics, plans and checkpoints: one sentence on stderr, status 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.pruning.plan import PruningPlan, make_plan
from uncurl_jax.pruning.statistics import RouterStatistics


@pytest.fixture
def plan(refuse, world):
    def run(sentence: str, *arguments: object, statistics: object = None) -> str:
        source = statistics or world["statistics.npz"]
        return refuse(sentence, "plan", "--statistics", source, "--out", "new", *arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--num_experts 5", "must lie in [1, 4] in layer 0, got 5: choose no more experts"),
        ("--num_experts 4,5", "must lie in [1, 4] in layer 1, got 5: choose no more experts"),
        ("--num_experts 0", "must lie in [1, 4] in layer 0, got 0"),
        ("--num_experts 2,2,2", "must be one number or one per MoE layer, got 3 numbers for"),
        ("", "A plan needs num_experts or total_experts, got None and None: give one of them."),
        ("--num_experts 2 --method uncrl", "method must be one of ...; did you mean uncurl?"),
        ("--num_experts 2 --router men", "router must be one of ...; did you mean mean?"),
        ("--num_experts 2 --affinity cosin", "affinity must be one of ...did you mean cosine?"),
        ("--num_experts 2 --seed -1", "seed must not be negative, got -1"),
        ("--num_experts 2 --gate_compensation --router reinit", "got router 'reinit': use "),
    ],
)
def test_a_plan_of_wrong_options_is_refused(arguments, sentence, plan):
    plan(sentence, *arguments.split())


@pytest.mark.parametrize("name", ["nowhere.npz", "data"])
def test_a_plan_without_statistics_is_refused(name, plan, world):
    sentence = "A router statistics file must exist, got ...: run calibration first"
    plan(sentence, "--num_experts", "2", statistics=world[name])


def test_a_plan_from_something_else_than_statistics_is_refused(plan, world):
    sentence = "study.gin must be a whole router statistics file (.npz"
    plan(sentence, "--num_experts", "2", statistics=world["study.gin"])


def test_a_plan_below_the_experts_that_a_token_selects_is_refused(plan, rewrite_statistics, world):
    """D = 1 for a model of top-2 routing."""
    statistics = RouterStatistics.load(world["statistics.npz"])
    manifest = {**statistics.manifest, "num_selected_experts": 2}
    RouterStatistics(statistics.layers, manifest).save("top2.npz")
    sentence = "num_experts[0]=1 is below num_selected_experts=2 after pruning: choose at least"
    plan(sentence, "--num_experts", "1", statistics="top2.npz")


def test_a_plan_from_statistics_without_tokens_is_refused(plan, rewrite_statistics):
    def empty(manifest, arrays):
        for array in arrays.values():
            array[...] = 0

    sentence = "Statistics must hold at least one token, got 0 on task 'synthetic_topic'"
    plan(sentence, "--num_experts", "2", statistics=rewrite_statistics(empty))


def test_nan_in_statistics_is_named_with_layer_and_expert(plan, rewrite_statistics):
    def spoil(manifest, arrays):
        arrays["layers_1/gram"][2] = np.nan

    sentence = "must be finite, got NaN or infinity in gram of layer 1, expert 2"
    plan(sentence, "--num_experts", "2", statistics=rewrite_statistics(spoil))


def test_a_plan_from_statistics_that_were_edited_is_refused(plan, rewrite_statistics):
    def edit(manifest, arrays):
        arrays["layers_0/selected"][0] += 1

    sentence = "must match the hash stored in it, got another content: calibrate again"
    plan(sentence, "--num_experts", "2", statistics=rewrite_statistics(edit))


@pytest.fixture
def prune(refuse, world):
    def run(sentence: str, *, checkpoint: object = None, plan: object = None) -> str:
        source = checkpoint or world["pretrained"]
        plan = plan or world["pruning_plan.json"]
        arguments = ("--checkpoint", source, "--plan", plan, "--out", "new")
        return refuse(sentence, "prune", *arguments)

    return run


def plan_for(checkpoint: object, world) -> str:
    """Makes a plan whose statistics claim to be of that checkpoint."""
    statistics = RouterStatistics.load(world["statistics.npz"])
    manifest = {**statistics.manifest, "checkpoint_hash": layout.fingerprint(str(checkpoint))}
    make_plan(RouterStatistics(statistics.layers, manifest), num_experts=2).save("other.json")
    return "other.json"


def test_a_prune_without_a_plan_is_refused(prune):
    prune("A file must exist, got nothing at nowhere.json", plan="nowhere.json")


def test_a_prune_with_something_else_than_a_plan_is_refused(prune, world):
    prune("study.gin must hold JSON", plan=world["study.gin"])
    prune("metrics.json: A plan must be an object with format", plan=world["metrics.json"])


@pytest.mark.parametrize("field", ["seed", "method", "layers"])
def test_a_plan_that_was_edited_is_refused(field, prune, world):
    values = json.loads((world.root / "pruning_plan.json").read_text())
    if field == "layers":
        values["layers"][0]["selected"][0] += 1
    else:
        values[field] = {"seed": 5, "method": "random"}[field]
    Path("edited.json").write_text(json.dumps(values))
    sentence = "edited.json: A plan's hash must match its content, got "
    prune(f"{sentence}...: make the plan again instead of editing it", plan="edited.json")


def test_statistics_of_another_checkpoint_are_refused(prune, world):
    """The finetuned model was pruned already; its plan is not for the pretrained one."""
    plan = plan_for(world["finetuned"], world)
    sentence = "A plan must be of the checkpoint that is pruned, got a plan for "
    fingerprint = layout.fingerprint(world["pretrained"])
    prune(f"{sentence}...pretrained/checkpoint_3 with fingerprint {fingerprint}", plan=plan)


def test_a_plan_for_a_checkpoint_that_was_pruned_already_is_refused(prune, world):
    sentence = "got num_experts (4, 4) in the plan and (2, 3) in "
    prune(sentence, checkpoint=world["finetuned"])


def test_nan_in_the_weights_is_named_with_layer_and_expert(prune, world, save_changed):
    def spoil(params):
        params["layers_1"]["moe"]["experts"]["wo"][3, 0, :2] = np.nan
        params["layers_0"]["moe"]["router"]["kernel"][1, 1] = np.inf

    checkpoint = save_changed(spoil)
    sentence = "All parameters must be finite, got NaN or infinity in ...layers_0/moe/router/"
    sentence += "kernel (1 values)...layers_1/moe/experts/wo expert 3 (2 values)"
    prune(sentence, checkpoint=checkpoint, plan=plan_for(checkpoint, world))


def test_a_checkpoint_of_another_architecture_is_refused(prune, refuse, world, save_changed):
    checkpoint = save_changed(lambda params: None)
    path = checkpoint / "model_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "mlp_dim": 64}))
    sentence = "A checkpoint must hold the parameters of its architecture, got ...layers_0/moe/"
    prune(sentence, checkpoint=checkpoint)
    refuse(sentence, "inspect", checkpoint)
    sentence = "A checkpoint must hold the arrays of the model to restore, got ..."
    for command in ("evaluate", "calibrate"):
        arguments = ("--checkpoint", checkpoint, "--task", world["caches/topic"])
        refuse(f"{sentence}wi is [4, 16, 32] instead of", command, *arguments, "--out", "new")
    path.write_text(json.dumps({**values, "rotary": True}))
    sentence = "must have the fields of this version, got unknown ['rotary'] and missing []"
    prune(sentence, checkpoint=checkpoint)


def test_something_else_than_a_checkpoint_is_refused(prune, world):
    prune("A checkpoint must be an existing directory, got nowhere", checkpoint="nowhere")
    prune("A checkpoint directory holds model_config.json and", checkpoint=world["data"])
    path = world.root / "pretrained" / "checkpoint_3" / "state"
    prune("model_config.json", checkpoint=path)


def test_the_plan_that_the_tests_change_is_a_good_one(world):
    """Otherwise the refusals above would prove nothing."""
    assert PruningPlan.load(world["pruning_plan.json"]).num_experts == (2, 3)
