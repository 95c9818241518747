"""`uncurl placement`, and `uncurl train --placement`: what they write, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = ("--batch", "16", "--length", "96")


@pytest.fixture
def slice_file(tmp_path):
    """As a v5e-16, but of eight chips, as many as this process has devices."""
    values = json.loads((ROOT / "configs/slices/v5e-16.json").read_text())
    values |= {"name": "v5e-8", "topology": "2x4", "num_chips": 8, "num_hosts": 2}
    path = tmp_path / "v5e-8.json"
    path.write_text(json.dumps(values))
    return path


def test_a_placement_of_a_pruned_checkpoint(uncurl, world):
    """The counts before come from its provenance, the loads from the plan there."""
    done = uncurl(
        *("placement", "--checkpoint", world["finetuned"], "--slice", "v5e-16", *STEP),
        *("--out", "placement.json", "--picture", "placement.svg"),
    )
    result = done.result
    assert result["num_experts"] == [2, 3]
    assert result["fewest_chips"] == {"before": 1, "after": 1}
    assert set(result["estimates"]["drop_fraction"]) == {"0", "1"}
    written = json.loads(Path("placement.json").read_text())
    assert written["model"]["num_experts_before"] == [4, 4]
    assert written["expert_axes"] == result["expert_axes"]
    assert len(written["model"]["fingerprint"]) == 64
    assert Path("placement.svg").read_text().startswith("<?xml")
    assert "train on v5e-16: 16 chips of 16 GB" in done.err
    assert done.err.splitlines()[-1] == result["reason"]


def test_a_placement_before_and_after_a_plan(uncurl, world):
    done = uncurl(
        *("placement", "--checkpoint", world["pretrained"], "--plan", world["pruning_plan.json"]),
        *("--slice", "v5e-16", *STEP, "--mode", "serve", "--out", "placement.json"),
    )
    assert done.result["num_experts"] == [2, 3]
    assert json.loads(Path("placement.json").read_text())["model"]["num_experts_before"] == [4, 4]
    assert "before pruning, 1 after." in done.err


def test_a_placement_of_a_gin_file_alone(uncurl, world):
    arguments = ("--gin_file", world["model.gin"], "--slice", "configs/slices/v5e-64.json")
    done = uncurl("placement", *arguments, "--batch", "64", "--length", "64", "--num_experts", "2")
    assert done.result["num_experts"] == [2, 2] and done.result["out"] is None
    assert not list(Path.cwd().iterdir())


def test_training_takes_a_placement(uncurl, world, slice_file):
    """On the eight devices of this process; the placement's mesh is the run's."""
    os.symlink(world["model.gin"], "model.gin")
    placed = uncurl(
        *("placement", "--checkpoint", world["pruned"], "--slice", slice_file),
        *("--batch", "8", "--length", "96", "--out", "placement.json"),
        *("--expert_partitions", "4"),
    ).result
    done = uncurl(
        *("train", "--gin_file", world["finetune.gin"], "--checkpoint", world["pruned"]),
        *("--cache", world["caches/topic/train"], "--gin.NUM_STEPS=1", "--out", "placed"),
        *("--placement", "placement.json"),
    )
    assert done.result["step"] == 1
    record = json.loads(Path("placed/train_config.json").read_text())["train_config"]
    for name in ("expert_partitions", "model_partitions", "expert_axes"):
        assert record[name] == placed[name]
    assert record["expert_partitions"] == 4


@pytest.fixture
def place(refuse, world):
    def run(sentence: str, *arguments: object, checkpoint: object = None) -> str:
        source = checkpoint or world["pretrained"]
        given = ("--checkpoint", source, "--out", "new.json", "--picture", "new.png", *arguments)
        defaults = {"--slice": "v5e-16", "--batch": "16", "--length": "96"}
        for name, value in defaults.items():
            if name not in arguments:
                given += (name, value)
        return refuse(sentence, "placement", *given)

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--slice v5e-15", "A slice must be one of v5e-16, ..., got v5e-15: nearest v5e-16"),
        ("--expert_partitions 3", "got 3 * 1 on the 16 chips of v5e-16: nearest 4 * 1"),
        ("--expert_partitions 16 --model_partitions 2", "got 16 * 2 on the 16 chips"),
        ("--model_partitions 8", "model_partitions must divide heads, hidden units and the chips"),
        ("--batch 12 --model_partitions 1", "got 12 rows on 16 chips of v5e-16: nearest 16."),
        ("--batch 0", "batch, length and accumulation_steps must be at least 1"),
        ("--length 97", "must not be above the model's max_length=96, got 97"),
        ("--accumulation_steps 3", "accumulation_steps must divide batch, got 3 and 16"),
        ("--headroom 1.5", "headroom must lie in [0, 1), got 1.5"),
        ("--headroom 0.99999", "A layout must fit in 0.0 GB of a chip of v5e-16"),
        ("--max_drop_fraction 0.1", "got neither --statistics nor --plan: give one of them"),
        ("--mode serve --accumulation_steps 2", "accumulation_steps does not belong to mode serve"),
        ("--param_dtype bfloat16", "param_dtype does not belong to mode train, got bfloat16"),
        ("--num_experts 5", "must lie in [1, 4] in layer 0, got 5"),
        ("--plan p --num_experts 2", "got --plan and --num_experts: leave out one of them"),
        ("--plan nowhere.json", "A file must exist, got nothing at nowhere.json"),
        ("--batch many", "argument --batch: invalid int value: 'many'"),
        ("--mode run", "argument --mode: invalid choice: 'run'"),
    ],
)
def test_a_wrong_option_is_refused(arguments, sentence, place):
    place(sentence, *arguments.split())


def test_a_picture_of_another_kind_is_refused(refuse, world):
    arguments = ("--checkpoint", world["pretrained"], "--slice", "v5e-16", *STEP)
    refuse("must be .svg or .png, got x.gif", "placement", *arguments, "--picture", "x.gif")


def test_an_output_that_exists_is_refused(refuse, world):
    arguments = ("--checkpoint", world["pretrained"], "--slice", "v5e-16", *STEP)
    refuse("must not exist yet", "placement", *arguments, "--out", world["metrics.json"])


def test_no_model_and_two_models_are_refused(refuse, place, world):
    arguments = ("placement", "--slice", "v5e-16", *STEP)
    refuse("needs a model, got none with num_experts, vocab_size", *arguments)
    refuse(
        "needs a model, got none with vocab_size, embed_dim, num_heads, mlp_dim, max_length: give "
        "--checkpoint, or a --gin_file that binds ModelConfig, as gin/models/354m.gin.",
        *(*arguments, "--gin.config.ModelConfig.num_experts=(4,)"),
    )
    place("got --checkpoint and gin bindings of ModelConfig", "--gin_file", world["model.gin"])


def test_files_of_another_model_are_refused(place, world):
    sentence = "A plan file must be of the model that is placed, got num_experts [4, 4] for"
    place(sentence, "--plan", world["pruning_plan.json"], checkpoint=world["pruned"])
    sentence = "A statistics file must be of the model that is placed, got num_experts [4, 4]"
    place(sentence, "--statistics", world["statistics.npz"], checkpoint=world["pruned"])


def test_capacity_that_drops_more_than_the_limit_names_the_factor(place, world):
    arguments = ("--statistics", world["statistics.npz"], "--max_drop_fraction", "0.001")
    said = place("Capacity must drop at most 0.10% of a layer's assignments, got about", *arguments)
    assert "with capacity_factor 1.2 and groups of " in said
    assert float(said.rstrip(".").split()[-1]) > 1.2


@pytest.fixture
def placed(uncurl, world, slice_file):
    """Returns placed(*options): a placement of the pruned checkpoint for eight chips."""

    def make(*options: str) -> str:
        uncurl(
            *("placement", "--checkpoint", world["pruned"], "--slice", slice_file),
            *("--batch", "8", "--length", "96", "--out", "placement.json", *options),
        )
        return "placement.json"

    return make


@pytest.fixture
def train(refuse, world, uncurl):
    os.symlink(world["model.gin"], "model.gin")

    def run(sentence: str, *arguments: object, checkpoint: str = "pruned") -> None:
        refuse(
            sentence,
            *("train", "--gin_file", world["finetune.gin"], "--checkpoint", world[checkpoint]),
            *("--cache", world["caches/topic/train"], "--out", "new", *arguments),
        )

    return run


def test_a_placement_for_other_devices_is_refused(train, uncurl, world):
    uncurl(
        *("placement", "--checkpoint", world["pruned"], "--slice", "v5e-16", *STEP),
        *("--out", "placement.json"),
    )
    sentence = "must multiply to the devices present, got data ... = 16 for 8 devices: nearest is"
    train(sentence, "--placement", "placement.json")


def test_a_placement_for_another_model_batch_or_mode_is_refused(train, placed):
    path = placed()
    train(
        "got num_experts [2, 3] for a model of [4, 4]",
        *("--placement", path),
        checkpoint="pretrained",
    )
    train(
        "got batch 8 in 1 parts for batch_size 16",
        "--placement",
        path,
        "--gin.config.TrainConfig.batch_size=16",
    )
    Path(path).unlink()
    train('must be made with --mode train, got "serve"', "--placement", placed("--mode", "serve"))


def test_a_placement_beside_another_mesh_is_refused(train, placed):
    binding = "--gin.config.TrainConfig.expert_partitions=8"
    sentence = "--placement sets TrainConfig.expert_partitions to ..., got another in the gin"
    train(sentence, "--placement", placed("--expert_partitions", "2"), binding)


def test_something_else_than_a_placement_is_refused(train, world):
    train("A placement must be an object with schema", "--placement", world["metrics.json"])
    train("A file must exist, got nothing at nowhere.json", "--placement", "nowhere.json")
