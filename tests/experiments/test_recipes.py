from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from uncurl_jax.artifacts import read_json, read_json_lines
from uncurl_jax.cli import main
from uncurl_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from uncurl_jax.data.language_modeling import LanguageModelingTask
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.recipes import recipe_evidence, recipe_runner
from uncurl_jax.experiments.recipes.recipe_study import (
    CHOOSE,
    CONFIRM,
    Arm,
    Recipe,
    RecipeStudyConfig,
    cells,
)

WORDS = ("tree", "stone", "river", "cloud", "lamp", "chair", "green", "quiet", "walks", "sings")


def stage(steps: int, **fields: Any) -> TrainConfig:
    return TrainConfig(OptimizerConfig(3e-3), num_steps=steps, batch_size=8, **fields)


CONFIG = RecipeStudyConfig(
    title="Recipes",
    model=ModelConfig(
        num_experts=(4, 0),
        vocab_size=260,
        embed_dim=16,
        num_heads=2,
        mlp_dim=16,
        max_length=32,
        eval_capacity_factor=None,
        dtype="float32",
    ),
    pretrain=stage(12, keep_optimizer_state=False, log_every_steps=4),
    warmup=stage(2, trainable="router"),
    finetune=stage(1),
    corpus=LanguageModelingTask("corpus", "corpus.txt"),
    domains=(LanguageModelingTask("rivers", "rivers.txt", "rivers_valid.txt"),),
    arms=(Arm(CHOOSE, 0, "rivers", (0, 1)), Arm(CONFIRM, 1, "rivers", (5,))),
    source_num_experts=(4,),
    target_num_experts=(2,),
    recipes=(
        Recipe("paper", router="reinit"),
        Recipe("frequency", method="frequency"),
        Recipe("distilled", distillation_weight=1.0),
    ),
    baselines=("paper", "frequency"),
    finetune_steps=(2, 4),
    calibration_batch_size=8,
    calibration_max_batches=2,
    sample_tokens=32,
    rows_per_batch=16,
)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Compiling takes most of the time here; what XLA's optimiser gains on so little is nothing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for name, documents in {"corpus": 60, "rivers": 40, "rivers_valid": 12}.items():
        text = "\n\n".join(" ".join(generator.choice(WORDS, 12)) for _ in range(documents))
        (directory / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def study(texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recipes") / "study"
    progress = recipe_runner.run_recipes(CONFIG, out=out, data_dir=texts, quiet=True)
    assert progress.left == [] and progress.done == len(cells(CONFIG)) == 15
    return out


def test_every_cell_is_measured_before_and_after_each_length(study):
    records = read_json_lines(study / recipe_runner.RUNS_FILE)
    found = {r["name"]: r for r in records if r["stage"] == "cell"}
    assert list(found) == [cell.name for cell in cells(CONFIG)]
    pruned = found["choose-pretrain0-rivers/seed0/4to2-distilled"]
    assert pruned["num_experts_per_layer"] == [2, 0]
    assert set(pruned["finetuned"]) == {"2", "4"}
    uniform = math.log(260)
    for measured in (pruned["before"], pruned["warmed_up"], *pruned["finetuned"].values()):
        assert 0 < measured["loss"] < uniform
        assert 0 <= measured["accuracy"] <= measured["cloze_accuracy"] <= 1
        assert np.mean(measured["part_losses"]) == pytest.approx(measured["loss"], rel=0.05)
    whole = found["choose-pretrain0-rivers/seed0/4-whole"]
    assert "warmed_up" not in whole
    # Fine-tuning on the domain lowers the loss of a model that has hardly been trained.
    assert whole["finetuned"]["4"]["loss"] < whole["before"]["loss"]
    pretrained = [r for r in records if r["stage"] == "pretrain"]
    assert [(r["num_experts"], r["pretrain_seed"]) for r in pretrained] == [
        (4, 0),
        (2, 0),
        (4, 1),
        (2, 1),
    ]
    assert all(r["tokens_per_second"] > 0 for r in pretrained)


def test_a_distilled_recipe_ends_elsewhere_than_the_plain_one(study, texts):
    records = read_json_lines(study / recipe_runner.RUNS_FILE)
    runs = {r["name"]: r for r in records if r["stage"] == "cell"}
    plain = dataclasses.replace(CONFIG, recipes=(*CONFIG.recipes, Recipe("uncurl")))
    progress = recipe_runner.run_recipes(
        plain, out=study, data_dir=texts, only=("uncurl",), roles=(CHOOSE,), quiet=True
    )
    assert progress.left == []
    added = {r["name"]: r for r in read_json_lines(study / recipe_runner.RUNS_FILE)}
    name = "choose-pretrain0-rivers/seed0/4to2-"
    assert added[f"{name}uncurl"]["before"] == runs[f"{name}distilled"]["before"]
    assert added[f"{name}uncurl"]["finetuned"] != runs[f"{name}distilled"]["finetuned"]


def test_a_study_stops_when_there_is_no_time_and_goes_on_alike(texts, tmp_path, study):
    small = dataclasses.replace(CONFIG, arms=CONFIG.arms[:1])
    first = recipe_runner.run_recipes(
        small, out=tmp_path / "a", data_dir=texts, max_seconds=1e-6, quiet=True
    )
    assert first.done == 0 and len(first.left) == 10
    second = recipe_runner.run_recipes(small, out=tmp_path / "a", data_dir=texts, quiet=True)
    assert second.left == []
    whole = {r["name"]: r for r in read_json_lines(study / recipe_runner.RUNS_FILE)}
    records = read_json_lines(tmp_path / "a" / recipe_runner.RUNS_FILE)
    assert len([r for r in records if r["stage"] == "cell"]) == 10
    for record in records:
        if record["stage"] == "cell":
            for measured in ("before", "finetuned"):
                assert record[measured] == whole[record["name"]][measured]


def test_other_settings_or_another_recipe_of_a_name_are_refused(study, texts):
    changed = dataclasses.replace(CONFIG, finetune_steps=(2, 5))
    with pytest.raises(InputError, match="other values of finetune_steps than"):
        recipe_runner.run_recipes(changed, out=study, data_dir=texts, quiet=True)
    renamed = dataclasses.replace(CONFIG, recipes=(Recipe("paper"), *CONFIG.recipes[1:]))
    with pytest.raises(InputError, match=r"other values of recipe paper than .* new names"):
        recipe_runner.run_recipes(renamed, out=study, data_dir=texts, quiet=True)
    with pytest.raises(InputError, match="must be one of the study's, got 'papr'"):
        recipe_runner.run_recipes(CONFIG, out=study, data_dir=texts, only=("papr",), quiet=True)


def test_a_missing_text_is_refused_before_anything_is_written(texts, tmp_path):
    lost = dataclasses.replace(CONFIG, corpus=LanguageModelingTask("corpus", "nothing.txt"))
    with pytest.raises(InputError, match=r"nothing\.txt"):
        recipe_runner.run_recipes(lost, out=tmp_path / "out", data_dir=texts, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ()}, "recipes must name at least one"),
        ({"recipes": (Recipe("a"), Recipe("a")), "baselines": ("a",)}, "different names"),
        ({"baselines": ("other",)}, "baselines must be among the recipes"),
        ({"arms": (Arm(CONFIRM, 1, "rivers", (0,)),)}, 'one with role "choose", got none'),
        (
            {"arms": (Arm(CHOOSE, 0, "rivers", (0,)), Arm(CONFIRM, 0, "rivers", (1,)))},
            "pretrainings of their own, got seed 0",
        ),
        ({"arms": (Arm(CHOOSE, 0, "lakes", (0,)),)}, "one of rivers, got 'lakes'"),
        ({"target_num_experts": (4,)}, "below 4, got 4"),
        ({"finetune_steps": (4, 2)}, "finetune_steps must rise"),
        ({"warmup": stage(2)}, 'warmup.trainable must be "router"'),
    ],
)
def test_a_wrong_study_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def records_of(losses: dict[tuple[str, str, int, str | None], list[float]]) -> list[dict[str, Any]]:
    """Records with given losses by (role, arm, experts, recipe); 8 experts are the source."""
    found = []
    for (role, arm, count, recipe), values in losses.items():
        for seed, loss in enumerate(values):
            measured = {
                "loss": loss,
                "accuracy": 0.5,
                "cloze_accuracy": 0.5,
                "fraction_tokens_left_behind": 0.0,
            }
            found.append(
                {
                    "stage": "cell",
                    "role": role,
                    "arm": arm,
                    "kind": "whole" if recipe is None else "pruned",
                    "source_num_experts": count if recipe is None else 8,
                    "num_experts": count,
                    "recipe": recipe,
                    "seed": seed,
                    "before": measured,
                    "finetuned": {"200": measured},
                }
            )
    return found


def evidence_of(**confirmed: list[float]) -> recipe_evidence.Evidence:
    losses: dict[tuple[str, str, int, str | None], list[float]] = {
        ("choose", "a", 4, "base"): [3.0, 3.1, 3.2],
        ("choose", "a", 4, "good"): [2.9, 3.0, 3.1],
        ("choose", "a", 4, "bad"): [3.3, 3.3, 3.3],
        ("choose", "a", 4, None): [2.95, 3.05, 3.15],
    }
    for name, values in confirmed.items():
        losses["confirm", "b", 4, name] = values
    return recipe_evidence.Evidence(recipe_evidence.summarize(records_of(losses)))


def test_a_winner_is_confirmed_on_other_arms_by_two_standard_errors():
    evidence = evidence_of(base=[3.0, 3.1, 3.2], good=[2.9, 3.01, 3.1], bad=[1.0, 1.0, 1.0])
    choice = recipe_evidence.choose(evidence, ["base"])
    # "bad" would win where winners are judged, which must not choose it.
    assert choice["candidate"] == "good" and choice["is_confirmed"]
    assert "more than two standard errors" in choice["sentence"]
    assert choice["scores"]["good"] == pytest.approx(3.0)


def test_a_winner_within_two_standard_errors_is_not_confirmed():
    evidence = evidence_of(base=[3.0, 3.1, 3.2], good=[2.9, 3.3, 3.1])
    choice = recipe_evidence.choose(evidence, ["base"])
    assert choice["candidate"] == "good" and not choice["is_confirmed"]
    assert choice["sentence"].startswith("Nothing wins: good")
    unconfirmed = recipe_evidence.choose(evidence_of(), ["base"])
    assert not unconfirmed["is_confirmed"] and "not been confirmed" in unconfirmed["sentence"]


def test_differences_worked_by_hand():
    found = recipe_evidence.difference([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])
    assert found["mean"] == pytest.approx(-1.0)
    assert found["standard_error"] == pytest.approx(1 / math.sqrt(3))  # sd of (-1, 0, -2) is 1
    assert found["interval"] == pytest.approx(
        [-1 - 4.302653 / math.sqrt(3), -1 + 4.302653 / math.sqrt(3)]
    )
    assert not recipe_evidence.is_better(found)
    assert recipe_evidence.difference([1.0], [2.0])["standard_error"] is None


def test_lengths_at_which_a_pruned_model_beats_its_size_from_scratch():
    rows = recipe_evidence.scratch_lengths(evidence_of())
    better = {(row["recipe"], row["steps"]): row["is_better"] for row in rows}
    assert better == {("base", 200): False, ("good", 200): True, ("bad", 200): False}


def test_the_report_is_made_from_the_two_files_alone(study, tmp_path, capsys):
    for name in (recipe_runner.STUDY_FILE, recipe_runner.RUNS_FILE):
        (tmp_path / name).write_bytes((study / name).read_bytes())
    assert main(["report", str(tmp_path)]) == 0
    assert "tables.md" in capsys.readouterr().out
    report = read_json(tmp_path / "report.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert report["headline"] in page
    row = next(
        row
        for row in report["rows"]
        if (row["arm"], row["recipe"], row["steps"]) == ("choose-pretrain0-rivers", "paper", 4)
    )
    assert f"| 4 to 2 | paper | {_before(report):.3f} | {row['loss']:.4f} ±" in tables
    assert page.count("<svg role=") == 2  # one arm each, one pair of counts
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["report", str(tmp_path)]) == 0
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["report", str(tmp_path), "--margin", "1"]) == 2


def _before(report: dict[str, Any]) -> float:
    return next(
        row["loss"]
        for row in report["rows"]
        if (row["arm"], row["recipe"], row["steps"])
        == ("choose-pretrain0-rivers", "paper", "before")
    )


def test_the_command_needs_a_study(tmp_path, capsys):
    assert main(["recipes", "--out", str(tmp_path / "out")]) == 2
    assert "needs a RecipeStudyConfig, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
