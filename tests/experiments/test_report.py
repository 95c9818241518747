from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from uncurl_jax import artifacts
from uncurl_jax.data.tasks import Example
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.evidence import answers
from uncurl_jax.experiments.reporting import report, report_page
from uncurl_jax.pruning.grouping import GroupingOptions
from uncurl_jax.pruning.plan import LayerPlan, PlanSource, PruningPlan

MOE_LAYERS = (0, 2, 4)


def make_run(kind, experts, score, *, task="rte", seed=0, source=None, method="uncurl", **others):
    pruned = kind == "pruned"
    run = {
        "schema": "uncurl_jax run 2",
        "stage": "evaluate",
        "name": f"runs/{task}-{kind}-{source}-{experts}-{method}-{seed}/metrics.json",
        "inputs": [],
        "tokens": 4000,
        "run": f"{task}-{kind}-{source}-{experts}-{method if pruned else ''}-{seed}",
        "kind": kind,
        "source_num_experts": source,
        "num_experts": experts,
        "num_experts_per_layer": [experts if i in MOE_LAYERS else 0 for i in range(6)],
        "method": method if pruned else None,
        "router": "reference" if pruned else None,
        "task": task,
        "seed": seed,
        "score": score,
        "interval": [score - 4.0, score + 4.0],
        "metrics": {"accuracy": score},
        "num_examples": 277,
        "fraction_tokens_left_behind": 0.01,
        "parameters": 354_000_000 + 100_000_000 * (experts - 1),
        "active_parameters": 354_000_000,
        "bytes": 4 * (354_000_000 + 100_000_000 * (experts - 1)),
        "checkpoint": None,
        "plan": None,
        "predictions": None,
        "statistics": None,
        "seconds": 12.5,
        "versions": {"jax": "0.10.2", "uncurl_jax": "0.1.0"},
    }
    return {**run, **others}


def make_plan(num_experts=8, num_clusters=2, method="uncurl", task="rte"):
    generator = np.random.default_rng(num_clusters)
    layers = []
    for layer in MOE_LAYERS:
        labels = np.concatenate(
            [
                np.arange(num_clusters),
                generator.integers(0, num_clusters, num_experts - num_clusters),
            ]
        )
        labels[-1] = -1
        sizes = np.bincount(labels[labels >= 0], minlength=num_clusters)
        layers.append(
            LayerPlan(
                layer=layer,
                method=method,
                num_experts=num_experts,
                labels=tuple(labels),
                reference=tuple(range(num_clusters)),
                weights=tuple(0.0 if c < 0 else 1 / int(sizes[c]) for c in labels),
                selected=tuple(generator.integers(10, 1000, num_experts)),
                cluster_sizes=tuple(sizes),
                gate_factors=None,
                fitted_router=None,
                expected_drop_fraction=0.08,
                diagnostics={},
                verdict="caution: 8.0 % of the assignments would overflow.",
                warnings=("layer 0 drops <8 %> of its tokens",) if layer == 0 else (),
            )
        )
    source = PlanSource("c", "s", task, "train", 1000, (num_experts, 0) * 3, 1)
    return PruningPlan(
        method=method,
        router="reference",
        grouping=GroupingOptions(),
        seed=0,
        alignment="features",
        gate_compensation=False,
        eval_capacity_factor=1.0,
        source=source,
        layers=tuple(layers),
    )


def write_study(directory: Path, runs, plans=None, title="A small study") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for run in runs:
        artifacts.append_json_line(directory / "runs.jsonl", run)
    study = {
        **{"schema": "uncurl_jax study 2", "title": title, "device": "8 CPU devices"},
        **{"versions": {"jax": "0.10.2"}, "config": {}},
    }
    artifacts.write_json(directory / "study.json", study)
    for name, plan in (plans or {}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        plan.save(directory / name)
    return directory


def three_seeds(offset_to_scratch: float):
    """8 experts unpruned at 70, 2 from scratch at 60, 8 -> 2 at 60 + offset; seeds shift all."""
    runs = []
    for seed, shift in enumerate((-1.0, 0.0, 1.5)):
        runs += [
            make_run("unpruned", 8, 70 + shift, seed=seed),
            make_run("scratch", 2, 60 + shift, seed=seed),
            make_run(
                "pruned",
                2,
                60 + shift + offset_to_scratch + 0.1 * seed,
                seed=seed,
                source=8,
                plan="plans/a.json",
            ),
        ]
    return runs


def test_a_row_holds_the_mean_and_students_interval_over_seeds():
    scores = [61.0, 63.0, 68.0]
    rows = report.summarize(make_run("unpruned", 8, s, seed=i) for i, s in enumerate(scores))
    expected = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    assert rows[0]["score"] == pytest.approx(64.0)
    assert rows[0]["interval"] == pytest.approx(list(expected))
    assert rows[0]["interval_over"] == "seeds"


def test_a_single_seed_keeps_the_interval_of_its_examples():
    (row,) = report.summarize([make_run("unpruned", 8, 70.0)])
    assert (row["interval"], row["interval_over"]) == ([66.0, 74.0], "examples")
    assert "66.00 to 74.00*" in report.format_table([row])


def test_two_runs_of_one_model_and_seed_are_refused():
    runs = [make_run("unpruned", 8, 70.0), make_run("unpruned", 8, 71.0, run="again")]
    with pytest.raises(InputError, match="one run per model and seed"):
        report.summarize(runs)


def test_the_table_has_one_aligned_line_per_row():
    table = report.format_table(report.summarize(three_seeds(2.0))).splitlines()
    assert len(table) == 2 + 3
    assert table[0].split()[:5] == ["task", "model", "experts", "score", "%"]
    assert "1.05B" in table[2] and "4.22 GB" in table[2]
    assert len({line.index("1.0 %") for line in table[2:]}) == 1
    assert table[4].startswith("rte   pruned, uncurl    8 → 2")


def test_the_report_holds_headline_rows_and_a_page_that_fetches_nothing(tmp_path):
    plans = {"plans/a.json": make_plan()}
    directory = write_study(tmp_path, three_seeds(2.0), plans, title="A <b>study</b>")
    result = report.write_report(directory)
    assert json.loads((directory / "report.json").read_text()) == result
    assert result["num_runs"] == 9 and len(result["rows"]) == 3
    assert result["plans_shown"]["rte"]["plan"] == "plans/a.json"
    page = (directory / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "A &lt;b&gt;study&lt;/b&gt;" in page and "<b>" not in page
    assert "drops &lt;8 %&gt;" in page
    assert page.count("<svg") == page.count("</svg>") > 4
    for forbidden in (
        "http:",
        "https:",
        "<script",
        "src=",
        "@import",
        "//",
        "url(data",
        str(tmp_path),
    ):
        assert forbidden not in page, forbidden


def test_equal_input_gives_equal_bytes(tmp_path):
    pages = []
    for name in ("one", "two"):
        directory = write_study(tmp_path / name, three_seeds(2.0), {"plans/a.json": make_plan()})
        report.write_report(directory)
        pages.append(
            (directory / "report.html").read_bytes() + (directory / "report.json").read_bytes()
        )
    assert pages[0] == pages[1]


def test_a_study_without_pruned_models_is_reported_too(tmp_path):
    result = report.write_report(write_study(tmp_path, [make_run("unpruned", 8, 70.0)]))
    assert result["headline"].startswith("No pruned model was run")
    assert result["plans_shown"] == {}


def test_a_missing_or_empty_runs_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must have a runs\.jsonl"):
        report.write_report(tmp_path)
    (tmp_path / "runs.jsonl").touch()
    with pytest.raises(InputError, match="at least one evaluated model, got none"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "score must be int or float, got 'high'"),
        ({"score": None}, "score must be int or float, got None"),
        ({"seed": True}, "seed must be int, got True"),
        ({"kind": "shrunk"}, "kind must be one of unpruned, scratch, pruned"),
        ({"extra": 1}, "fields must be those of this version, got extra"),
        ({"schema": "uncurl_jax run 1"}, 'schema must be "uncurl_jax run 2", got '),
        ({"stage": "distil"}, "stage must be one of cache, pretrain"),
        ({"versions": {"uncurl_jax": "0.0.9"}}, "all records must be of one version, got 0.0.9"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (
            {"kind": "pruned", "source_num_experts": None},
            "source_num_experts must be int, got None",
        ),
        ({"interval": [1.0]}, r"interval must be \[low, high\]"),
        ({"plan": 3}, "plan must be str or null, got 3"),
    ],
)
def test_a_malformed_run_is_refused_by_file_and_line(tmp_path, change, message):
    runs = [make_run("unpruned", 8, 70.0), {**make_run("unpruned", 4, 70.0), **change}]
    directory = write_study(tmp_path, runs)
    with pytest.raises(InputError, match=rf"runs\.jsonl:2: {message}"):
        report.write_report(directory)
    assert not (directory / "report.html").exists()


def test_a_line_that_is_no_json_or_no_object_or_repeated_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(InputError, match=r"runs\.jsonl:1: a record must be a JSON object"):
        report.load_runs(path)
    path.write_text("{oops\n")
    with pytest.raises(InputError, match=r"runs\.jsonl:1 must be a JSON object"):
        report.load_runs(path)
    line = json.dumps(make_run("unpruned", 8, 70.0)) + "\n"
    path.write_text(line + line)
    with pytest.raises(InputError, match="again after line 1"):
        report.load_runs(path)


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(make_run("unpruned", 8, float("nan"))) + "\n")
    with pytest.raises(InputError, match="score must be finite, got nan"):
        report.load_runs(path)


def test_a_plan_that_is_missing_or_a_study_without_title_is_refused(tmp_path):
    directory = write_study(tmp_path / "a", three_seeds(2.0))
    with pytest.raises(InputError, match=r"must exist, got nothing at .*a\.json"):
        report.write_report(directory)
    artifacts.write_json(directory / "study.json", {})
    with pytest.raises(InputError, match="must be an object with a title"):
        report.write_report(directory)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (354_000_000, "354M"), (1_050_000_000, "1.05B")],
)
def test_counts_are_written_with_three_figures(value, text):
    assert report_page.format_count(value) == text


def test_the_shards_of_a_study_are_read_together(tmp_path):
    runs = [make_run("scratch", 2, 70.0, seed=seed) for seed in range(3)]
    runs.append(make_run("pruned", 2, 71.0, source=8, plan="plan.json"))
    write_study(tmp_path / "shard_0_of_2", runs[:2])
    write_study(tmp_path / "shard_1_of_2", runs[2:], {"plan.json": make_plan()})
    result = report.write_report(tmp_path)
    assert result["num_runs"] == 4
    assert [row["plans"] for row in result["rows"] if row["kind"] == "pruned"] == [
        ["shard_1_of_2/plan.json"]
    ]


def test_shards_of_another_study_or_with_the_same_run_are_refused(tmp_path):
    run = make_run("scratch", 2, 70.0)
    write_study(tmp_path / "shard_0_of_2", [run])
    write_study(tmp_path / "shard_0_of_3", [run])
    with pytest.raises(InputError, match="must be in one shard only, got rte-scratch"):
        report.write_report(tmp_path)
    study = tmp_path / "shard_0_of_3" / "study.json"
    artifacts.write_json(study, {**artifacts.read_json(study), "config": {"seeds": [1]}})
    with pytest.raises(InputError, match=r"must have the same settings, got others in .*0_of_3"):
        report.write_report(tmp_path)


def add_predictions(directory: Path, runs, labels, *, slices=None):
    """Gives each run answers with its score, and writes the task they are of."""
    examples = [
        {
            **Example(
                f"q{i}", ("no", "yes"), int(label), i, extra={"slice": slices[i]} if slices else {}
            ).to_dict(),
            "prompt_tokens": 10 + i,
        }
        for i, label in enumerate(labels)
    ]
    artifacts.write_json(
        directory / "tasks" / "rte.json",
        {
            **{"task": "rte", "split": "validation", "metrics": ["accuracy"]},
            **{"primary_metric": "accuracy", "examples": examples},
        },
    )
    for run in runs:
        right = round(run["score"] * len(labels) / 100)
        run["score"] = 100 * right / len(labels)
        predicted = np.where(np.arange(len(labels)) < right, labels, 1 - labels).tolist()
        run["predictions"] = f"runs/{run['run']}.jsonl"
        path = directory / run["predictions"]
        path.parent.mkdir(exist_ok=True)
        lines = [{"idx": i, "prediction": int(option)} for i, option in enumerate(predicted)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


def two_runs(tmp_path, **others):
    runs = [make_run("unpruned", 8, 80.0), make_run("pruned", 2, 60.0, source=8)]
    return add_predictions(tmp_path, runs, np.arange(40) % 2, **others)


def test_predictions_give_scores_by_class_and_by_slice(tmp_path):
    slices = ["hard" if i >= 30 else "easy" for i in range(40)]
    result = report.write_report(write_study(tmp_path, two_runs(tmp_path, slices=slices)))
    unpruned, pruned = result["rows"]
    # The first 32 of 40 are right, and the first 24; every second label is "yes".
    assert unpruned["classes"]["yes"] == {
        **{"num_examples": 20, "score": 80.0, "scores": {"0": 80.0}}
    }
    assert unpruned["slices"]["hard"]["score"] == 20.0
    assert pruned["slices"]["hard"]["score"] == 0.0 and pruned["slices"]["easy"]["score"] == 80.0
    assert [name for name in pruned["slices"] if "prompts" in name] == [
        "prompts of at most 23 tokens",
        "prompts of 24 to 36 tokens",
        "prompts of 37 tokens or more",
    ]
    assert [s["num_examples"] for n, s in pruned["slices"].items() if "prompts" in n] == [
        14,
        13,
        13,
    ]
    drop = result["findings"][0]["candidates"][0]["drop"]
    assert (drop["over"], drop["mean"]) == ("examples", pytest.approx(20.0))
    assert drop["interval"][0] < 20.0 < drop["interval"][1]


def test_predictions_of_shards_are_found(tmp_path):
    directory = tmp_path / "shard_0_of_1"
    directory.mkdir()
    write_study(directory, two_runs(directory))
    assert report.write_report(tmp_path)["rows"][0]["classes"]["no"]["score"] == 80.0


def test_options_that_are_texts_of_their_own_are_no_classes(tmp_path):
    examples = [Example("q", (f"a{i}", f"b{i}"), 0, i) for i in range(40)]
    assert answers.class_members(examples) == []


def test_predictions_that_do_not_belong_to_their_run_are_refused(tmp_path):
    runs = two_runs(tmp_path)
    path = tmp_path / runs[1]["predictions"]
    directory = write_study(tmp_path, [{**runs[0]}, {**runs[1], "score": 61.0}])
    with pytest.raises(InputError, match=r"must give its score 61\.0000, got 60\.0000 from"):
        report.write_report(directory)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(InputError, match=r"jsonl:4: predictions must be of the 40 examples of"):
        report.write_report(directory)
    path.write_text("".join(lines).replace('"prediction": 0', '"prediction": null', 1))
    with pytest.raises(InputError, match="prediction must be the index of an option, got None"):
        report.write_report(directory)
    path.unlink()
    with pytest.raises(InputError, match="predictions must exist, got nothing at"):
        report.write_report(directory)


def test_a_study_of_another_schema_is_refused(tmp_path):
    directory = write_study(tmp_path, [make_run("unpruned", 8, 70.0)])
    study = artifacts.read_json(directory / "study.json")
    artifacts.write_json(directory / "study.json", {**study, "schema": "uncurl_jax study 1"})
    with pytest.raises(InputError, match=r'schema "uncurl_jax study 2", got \'uncurl_jax study 1'):
        report.write_report(directory)


def test_records_of_other_stages_are_checked_and_left_out(tmp_path):
    run = make_run("unpruned", 8, 70.0)
    names = ("schema", "inputs", "tokens", "seconds", "versions")
    stage = {**{name: run[name] for name in names}, "stage": "pretrain", "name": "pretrained/8"}
    directory = write_study(tmp_path, [stage, run])
    assert [found["run"] for found in report.load_runs(directory / "runs.jsonl")] == [run["run"]]
    artifacts.append_json_line(directory / "runs.jsonl", {**stage, "loss": 3.0})
    with pytest.raises(InputError, match=r"runs\.jsonl:3: fields must be those .*, got loss"):
        report.load_runs(directory / "runs.jsonl")
    (directory / "runs.jsonl").write_text(json.dumps(stage) + "\n")
    with pytest.raises(InputError, match="at least one evaluated model, got none"):
        report.load_runs(directory / "runs.jsonl")


def test_a_record_without_a_field_is_refused(tmp_path):
    run = make_run("unpruned", 8, 70.0)
    run.pop("bytes")
    directory = write_study(tmp_path, [run])
    with pytest.raises(InputError, match=r"runs\.jsonl:1: a record must have the field bytes"):
        report.load_runs(directory / "runs.jsonl")


def test_report_names_its_inputs_by_hash(tmp_path):
    directory = write_study(tmp_path, three_seeds(2.0), {"plans/a.json": make_plan()})
    inputs = report.write_report(directory)["inputs"]
    assert inputs["runs.jsonl"] == artifacts.sha256_of_file(directory / "runs.jsonl")
    assert set(inputs) == {"runs.jsonl", "study.json"}


def test_margin_and_tolerance_reach_the_verdicts(tmp_path):
    directory = write_study(tmp_path, three_seeds(-0.5), {"plans/a.json": make_plan()})
    (finding,) = report.write_report(directory)["findings"]
    assert finding["beneficial"]["status"] == "not_reached"
    (finding,) = report.write_report(directory, margin=1.0, tolerance=20.0)["findings"]
    assert finding["beneficial"]["status"] == finding["lossless"]["status"] == "reached"


def test_a_made_up_study_is_reported_with_intervals_over_seeds_and_examples(tmp_path, report_study):
    result = report.write_report(report_study.write(tmp_path / "study", is_whole=False))
    assert [finding["task"] for finding in result["findings"]] == ["cb", "rte", "mean"]
    for finding in result["findings"][:2]:
        for candidate in finding["candidates"]:
            assert candidate["gap"]["over"] == "seeds and examples"
    assert result["effects"]["tasks"] == ["cb", "rte", "mean"]
    assert result["multiple_comparisons"]["comparisons"] == 2 * 3 * 6
