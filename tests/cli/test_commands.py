"""Every command, end to end on a tiny model: what it prints, what it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.statistics import RouterStatistics

COMMANDS = (
    "cache",
    "cache text",
    "train",
    "calibrate",
    "plan",
    "prune",
    "warm up",
    "finetune",
    "evaluate",
    "evaluate named",
    "evaluate text",
    "evaluate generated",
    "inspect",
    "sweep 0",
    "sweep 1",
)


def test_every_command_of_the_job_is_looked_at_here(world):
    assert tuple(world.done) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_one_line_of_json_and_the_status_is_zero(name, world):
    done = world.done[name]
    assert done.status == 0, done.err
    assert done.out.endswith("\n")
    assert isinstance(done.result, dict)


@pytest.mark.parametrize("name", ["train", "calibrate", "evaluate", "sweep 0"])
def test_progress_goes_to_stderr(name, world):
    assert "100%" in world.done[name].err
    assert "Traceback" not in world.done[name].err


def test_cache_reports_the_splits_that_it_wrote(world):
    result = world.done["cache"].result
    assert result["out"] == "caches/topic"
    for split, examples in (("train", 24), ("validation", 10)):
        cache = TokenCache.open(world.root / "caches" / "topic" / split)
        assert result["splits"][split] == {
            "task": "synthetic_topic",
            "rows": 8 * examples,
            "examples": examples,
            "tokens": len(cache.tokens),
            "truncated_rows": 0,
            "hash": cache.hash,
        }


def test_train_leaves_a_checkpoint_of_the_last_step(world):
    result = world.done["train"].result
    assert (result["checkpoint"], result["step"]) == ("pretrained", 3)
    assert np.isfinite(result["metrics"]["loss"])
    assert layout.resolve(world["pretrained"]).step == 3
    # A binding on the command line overrides the gin file.
    assert world.done["finetune"].result["step"] == 2


def test_warm_up_changes_the_router_alone(world):
    before = layout.StateReader(world["pruned"])
    after = layout.StateReader(world["warmed_up"])
    changed = {
        name
        for name in before.parameters()
        if not np.array_equal(before.read(f"target/{name}"), after.read(f"target/{name}"))
    }
    assert changed == {f"layers_{layer}/moe/router/kernel" for layer in (0, 1)}


def test_calibrate_writes_statistics_of_the_training_split(world):
    result = world.done["calibrate"].result
    statistics = RouterStatistics.load(world["statistics.npz"])
    assert result == {
        "out": "statistics.npz",
        "task": "synthetic_topic",
        "tokens": statistics.tokens,
        "moe_layers": [0, 1],
        "collected": [],
        "hash": statistics.hash,
    }
    assert statistics.manifest["split"] == "train"
    assert statistics.manifest["checkpoint_hash"] == layout.fingerprint(world["pretrained"])


def test_plan_is_for_the_counts_and_the_capacity_that_were_observed(world):
    result = world.done["plan"].result
    plan = PruningPlan.load(world["pruning_plan.json"])
    assert result["num_experts"] == [2, 3]
    assert result["hash"] == plan.hash
    assert [sum(sizes) for sizes in result["cluster_sizes"].values()] == [4, 4]
    # The model evaluates dropless, so no overflow is predicted, and nobody is warned of it.
    assert plan.eval_capacity_factor is None
    assert set(result["expected_drop_fraction"].values()) == {0.0}


def test_prune_makes_the_planned_checkpoint(world):
    result = world.done["prune"].result
    assert result["num_experts"] == [2, 3]
    assert result["parameters"]["after"] < result["parameters"]["before"]
    assert layout.resolve(world["pruned"]).model_config().num_experts == (2, 3)
    assert layout.fingerprint(world["pruned"]) == result["fingerprint"]


def test_evaluate_gives_the_content_of_its_file_and_where_it_is(world):
    result = dict(world.done["evaluate"].result)
    assert result.pop("out") == "metrics.json"
    assert json.loads((world.root / "metrics.json").read_text()) == result
    assert result["num_examples"] == 10
    lines = (world.root / "metrics.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 10


def test_a_named_task_and_its_cache_give_the_same_score(world):
    named, cached = world.done["evaluate named"].result, world.done["evaluate"].result
    for name in ("task", "split", "score", "interval", "prediction_counts"):
        assert named[name] == cached[name]


def test_evaluate_measures_the_loss_of_plain_text(world):
    result = world.done["evaluate text"].result
    assert result["settings"]["mode"] == "loss"
    assert result["metrics"]["perplexity"] == pytest.approx(np.exp(result["score"]))


def test_evaluate_can_generate(world):
    result = world.done["evaluate generated"].result
    assert result["settings"]["mode"] == "generate"
    assert result["num_unmatched"] <= result["num_examples"] == 10


def test_inspect_prints_a_table_for_people_and_json_for_programs(world):
    done = world.done["inspect"]
    assert done.result["num_experts"] == [2, 3]
    assert done.result["provenance"]["source"]["path"].endswith("warmed_up/checkpoint_3")
    first, header, *layers = done.err.splitlines()
    assert f"step 2, {done.result['parameters']:,} parameters" in first
    assert header.split() == ["layer", "experts", "parameters", "active", "MiB"]
    assert [line.split()[:2] for line in layers] == [["0", "2"], ["1", "3"]]


def models_of(path):
    """Records of evaluated models."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["stage"] == "evaluate"]


def test_sweep_shards_divide_the_models_among_directories_of_their_own(world):
    runs = []
    for index, count in ((0, 1), (1, 2)):
        assert world.done[f"sweep {index}"].result["runs"] == count
        path = world.root / "study" / f"shard_{index}_of_2" / "runs.jsonl"
        runs += [record["run"] for record in models_of(path)]
    assert runs == [
        "4-unpruned-synthetic_topic-seed0",
        "4to2-uncurl-reference-synthetic_topic-seed0",
        "4to2-frequency-reference-synthetic_topic-seed0",
    ]


def test_sweep_keeps_or_removes_checkpoints_as_the_study_says(world):
    study = world.root / "study"
    (kept,) = models_of(study / "shard_0_of_2" / "runs.jsonl")
    assert layout.resolve(study / "shard_0_of_2" / kept["checkpoint"]).step == 2
    for record in models_of(study / "shard_1_of_2" / "runs.jsonl"):
        assert record["checkpoint"] is None
        left = {path.name for path in (study / "shard_1_of_2" / "runs" / record["run"]).iterdir()}
        assert left == {"metrics.json", "metrics.predictions.jsonl", "pruning_plan.json"}
        assert PruningPlan.load(study / "shard_1_of_2" / record["plan"]).num_experts == (2,)


def test_report_prints_a_table_and_writes_the_report(world, uncurl):
    directory = f"{world['study']}/shard_1_of_2"
    done = uncurl("report", directory)
    assert done.result["report"] == f"{directory}/report.html"
    assert done.result["headline"]
    table, effects, *_ = done.err.split("\n\n")
    assert len(table.splitlines()) == 2 + 2
    assert "Effect against equal size from scratch: there is no such model" in effects
    for method in ("uncurl", "frequency"):
        assert f"pruned, {method}" in done.err
    report = json.loads((world.root / "study" / "shard_1_of_2" / "report.json").read_text())
    assert report["num_runs"] == 2


def test_report_of_a_sharded_study_reads_every_shard(world, uncurl):
    done = uncurl("report", world["study"])
    assert done.status == 0, done.err
    report = json.loads((world.root / "study" / "report.json").read_text())
    assert report["num_runs"] == 3


def test_help_lists_every_command_and_each_has_its_own(uncurl):
    done = uncurl("--help")
    names = ("cache", "train", "calibrate", "plan", "prune", "evaluate", "inspect")
    names += ("quickstart", "sweep", "report")
    assert done.status == 0
    for name in names:
        assert name in done.out
        own = uncurl(name, "--help")
        assert own.status == 0
        assert own.out.startswith(f"usage: uncurl {name} ")


def test_version_is_that_of_the_package(uncurl):
    import uncurl_jax

    done = uncurl("--version")
    assert (done.status, done.out) == (0, f"uncurl_jax {uncurl_jax.__version__}\n")


@pytest.mark.slow
def test_a_task_through_seqio_gets_the_score_that_it_gets_without(world, run_alone):
    arguments = ("--checkpoint", "finetuned", "--data_dir", "data", "--out", "metrics_seqio.json")
    done = run_alone(world.root, "evaluate", "--task", "seqio:synthetic_topic", *arguments)
    own = world.done["evaluate"].result
    assert done.result["metrics_by"] == "seqio.Evaluator"
    assert done.result["score"] == own["score"]
    assert done.result["metrics"] == own["metrics"]


@pytest.mark.slow
def test_quickstart_runs_from_nothing_to_a_report_and_again_in_no_time(run_all, tmp_path):
    arguments = ["quickstart", "--gin.STEPS_SCALE=0.01", "--gin.study.StudyConfig.seeds=(0,)"]
    arguments += ["--gin.study.StudyConfig.target_num_experts=(4,)"]
    arguments += ["--gin.quickstart.run_quickstart.num_train=40"]
    arguments += ["--gin.quickstart.run_quickstart.num_validation=20"]
    arguments += ["--gin.quickstart.run_quickstart.num_documents=40"]
    first, again = run_all(tmp_path, [arguments, arguments])
    assert first.result["report"] == "quickstart_out/report.html"
    assert first.result == again.result
    runs = (tmp_path / "quickstart_out" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in runs} == {"unpruned", "pruned", "scratch"}
    assert (tmp_path / "quickstart_out" / "report.html").stat().st_size > 1000
