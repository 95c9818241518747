"""The choice: what wins and why, the fewest chips, and the sentence when nothing can be had."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from uncurl_jax.config import ModelConfig, alternating_experts
from uncurl_jax.deployment.interconnect import MeshShape
from uncurl_jax.deployment.job import Job
from uncurl_jax.deployment.layouts import Request
from uncurl_jax.deployment.planner import fewest_chips, make_placement
from uncurl_jax.deployment.slices import load_slice
from uncurl_jax.errors import InputError

DIRECTORY = Path(__file__).parents[2] / "configs" / "slices"
V5E = load_slice("v5e-16", DIRECTORY)
LARGE = ModelConfig(
    num_experts=alternating_experts(24, 8),
    vocab_size=50258,
    embed_dim=1024,
    num_heads=16,
    mlp_dim=4096,
    max_length=1024,
    num_selected_experts=2,
    capacity_factor=1.25,
    eval_capacity_factor=1.25,
)
BEFORE = alternating_experts(24, 128)
SMALL = ModelConfig((8, 0, 4), 32, 16, 2, 24, 16, min_capacity=1)


@pytest.fixture(scope="module")
def served():
    """354M with 8 of 128 experts left, 8192 tokens a chip of a v5e-16."""
    return make_placement(Request(LARGE, Job("serve", 128, 1024), V5E, num_experts_before=BEFORE))


def test_pruned_experts_are_replicated_and_all_to_alls_go(served):
    """12 layers of 2 all-to-alls; 16 experts' slots on 16 chips, 12 * 2 * 2 * 1.25 * ... bytes."""
    chosen = served.chosen
    assert chosen.mesh == MeshShape(16, 1, 1)
    assert {choice.experts.axes for choice in chosen.layers.values()} == {()}
    assert sum(chosen.wire_bytes_per_token.values()) == 0
    assert served.reason.startswith("data 16 x expert 1 x model 1 is fastest by estimate: ")
    assert (
        "replicating the 8 experts of layers 0, 2, ..., 22 takes 1.6 GB per chip and removes "
        "24 all-to-alls among "
    ) in served.reason


def test_pruning_saves_chips(served):
    """26.7 GB of bf16 do not fit in one chip of 16 GB, 2.5 GB do."""
    assert served.fewest_chips == (4, 1)
    whole = dataclasses.replace(LARGE, num_experts=BEFORE)
    assert fewest_chips(served.request, whole) == 4


def test_unpruned_experts_are_divided(served):
    whole = dataclasses.replace(LARGE, num_experts=BEFORE)
    report = make_placement(dataclasses.replace(served.request, model=whole))
    groups = {choice.experts.group for choice in report.chosen.layers.values()}
    assert min(groups) > 1
    assert report.chosen.memory.total <= report.request.budget_bytes
    assert "dividing the 128 experts of layers 0, 2, ..., 22 over" in report.reason


def test_the_choice_is_the_fastest_of_the_feasible(served):
    feasible = [layout for layout in served.layouts if layout.problem is None]
    assert served.chosen.times.total == min(layout.times.total for layout in feasible)
    keys = [(layout.mesh.model, layout.expert_axes(24), layout.mesh) for layout in served.layouts]
    assert len(set(keys)) == len(keys)
    # What has other names for the same chips is listed once.
    whole = [layout for layout in served.layouts if not any(layout.expert_axes(24))]
    assert len({layout.mesh.model for layout in whole}) == len(whole)


def test_every_way_to_place_a_kind_of_layer_is_listed_once(served):
    """Whole, or divided over 2, 4 or 8 of 16 chips in blocks or in strides, or over all."""
    (kind,) = served.kinds
    assert kind.layers == tuple(range(0, 24, 2))
    options = [choice.experts for mesh, choice in kind.options if mesh.model == 1]
    assert sorted(experts.group for experts in options) == [1, 2, 2, 4, 4, 8, 8, 16]
    (whole,) = (choice for _, choice in kind.options if kind.chosen_for(served.chosen, choice))
    assert whole.experts.axes == () and kind.options[0][0] == served.chosen.mesh


def test_layers_of_unequal_counts_get_unequal_places(slice_of_eight):
    """With room for the small layer alone, the large one is divided."""
    model = dataclasses.replace(
        SMALL, num_experts=(64, 0, 2), embed_dim=256, mlp_dim=1024, max_length=16
    )
    small = dataclasses.replace(slice_of_eight, hbm_bytes_per_chip=150_000_000)
    request = Request(model, Job("serve", 1024, 16), small, model_partitions=1)
    chosen = make_placement(request).chosen
    assert chosen.layers[0].experts.group > 1
    assert chosen.layers[2].experts.group == 1
    assert chosen.memory.total <= 135_000_000


def test_a_model_without_experts_is_placed_too(slice_of_eight):
    report = make_placement(
        Request(SMALL.with_experts(0), Job("train", 16, 16, "float32"), slice_of_eight)
    )
    assert report.chosen.layers == {} and report.fewest_chips == (None, 1)
    assert report.reason.startswith("The model has no experts: data ")


def small_request(slice_, **changes) -> Request:
    values = {"model": SMALL, "job": Job("train", 16, 16, "float32"), "slice": slice_}
    return Request(**{**values, **changes})


def refused(request: Request) -> str:
    with pytest.raises(InputError) as caught:
        make_placement(request)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_a_mesh_that_does_not_divide_the_slice_names_the_nearest(slice_of_eight):
    sentence = refused(small_request(slice_of_eight, expert_partitions=3))
    assert sentence == (
        "expert_partitions * model_partitions must divide the chips of the slice, got 3 * 1 on "
        "the 8 chips of v5e-8: nearest 4 * 1, which leaves 2 to data."
    )
    sentence = refused(small_request(slice_of_eight, expert_partitions=8, model_partitions=2))
    assert "got 8 * 2 on the 8 chips of v5e-8: nearest 8 * 1" in sentence


def test_a_given_mesh_is_kept(slice_of_eight):
    report = make_placement(small_request(slice_of_eight, expert_partitions=2))
    assert {layout.mesh.expert for layout in report.layouts} == {2}


def test_a_mesh_that_heads_do_not_allow_is_named(slice_of_eight):
    sentence = refused(small_request(slice_of_eight, model_partitions=4))
    assert "got that 2 heads and 24 hidden units do not divide by 4" in sentence
    assert "choose model_partitions 1" in sentence


@pytest.mark.parametrize(
    ("job", "model_partitions", "nearest"),
    [
        (Job("train", 3, 16, "float32"), None, "got 3 rows on 8 chips of v5e-8: nearest 4."),
        (Job("train", 12, 16, "float32"), 1, "got 12 rows on 8 chips of v5e-8: nearest 8 or 16."),
        (Job("train", 24, 16, "float32", 4), 1, "rows in 4 parts on 8 chips of v5e-8: nearest 32."),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest(
    job, model_partitions, nearest, slice_of_eight
):
    request = small_request(slice_of_eight, job=job, model_partitions=model_partitions)
    sentence = refused(request)
    assert sentence.startswith("batch must divide among the devices that hold tokens, got ")
    assert nearest in sentence
    batch = int(nearest.rstrip(".").split()[-1])
    make_placement(dataclasses.replace(request, job=dataclasses.replace(job, batch=batch)))


def test_a_model_that_does_not_fit_names_chips_parts_and_experts():
    whole = dataclasses.replace(LARGE, num_experts=BEFORE)
    request = Request(whole, Job("train", 64, 1024, "float32"), V5E)
    sentence = refused(request)
    assert "must fit in 14.4 GB of a chip of v5e-16 (10% stay free), got at least " in sentence
    assert "on 16 chips: nearest 32 chips or at most " in sentence
    experts = int(sentence.split("at most ")[1].split()[0])
    job = dataclasses.replace(request.job, accumulation_steps=4)
    fitting = dataclasses.replace(request, model=LARGE.with_experts(experts))
    assert make_placement(fitting).chosen.problem is None
    # It was memory for the parameters: parts would not help, or be named.
    assert "accumulation_steps" not in refused(dataclasses.replace(request, job=job))


def test_a_batch_that_does_not_fit_names_the_parts_that_do():
    request = Request(LARGE, Job("train", 512, 1024, "float32"), V5E)
    sentence = refused(request)
    assert "nearest accumulation_steps 16" in sentence
    job = dataclasses.replace(request.job, accumulation_steps=16)
    assert make_placement(dataclasses.replace(request, job=job)).chosen.problem is None


def test_a_given_mesh_that_does_not_fit_names_one_that_does():
    """All 128 experts on each chip take 26 GB; over several they fit."""
    whole = dataclasses.replace(LARGE, num_experts=BEFORE)
    request = Request(whole, Job("serve", 64, 1024), V5E, expert_partitions=1, model_partitions=4)
    make_placement(request)
    tight = dataclasses.replace(V5E, hbm_bytes_per_chip=5_000_000_000)
    sentence = refused(dataclasses.replace(request, slice=tight, model_partitions=1, headroom=0.5))
    assert "got at least" in sentence and "nearest " in sentence


def test_capacity_that_drops_too_much_names_the_factor_that_does_not(slice_of_eight):
    """Of 4 experts one takes half of the tokens and has a quarter of the slots."""
    model = dataclasses.replace(SMALL, num_experts=(4,), capacity_factor=1.0, max_length=1024)
    request = small_request(
        slice_of_eight,
        model=model,
        job=Job("train", 64, 1024, "float32"),
        loads={0: [3.0, 1.0, 1.0, 1.0]},
        max_drop_fraction=0.01,
    )
    sentence = refused(request)
    assert "Capacity must drop at most 1.00% of a layer's assignments, got about 25." in sentence
    assert "in layer 0 with capacity_factor 1.0 and groups of " in sentence
    factor = float(sentence.rstrip(".").split()[-1])
    assert 1.9 < factor < 2.1
    enough = dataclasses.replace(model, capacity_factor=factor)
    report = make_placement(dataclasses.replace(request, model=enough))
    assert max(report.chosen.drop_fractions.values()) <= 0.01
    # Without a limit it is shown only.
    shown = make_placement(dataclasses.replace(request, max_drop_fraction=None))
    assert shown.chosen.drop_fractions[0] == pytest.approx(0.25, abs=0.01)
