from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from uncurl_jax import artifacts
from uncurl_jax.cli import main
from uncurl_jax.errors import InputError
from uncurl_jax.experiments import gate
from uncurl_jax.experiments.reporting.report import write_report

DEFAULT = Path(__file__).parents[2] / "configs" / "gates" / "default.json"
GOOD, WORSE = "16to8-uncurl-reference", "16to2-frequency-reference"


@pytest.fixture(scope="module")
def study(report_study, tmp_path_factory):
    """Two tasks, three seeds; 16 -> 8 with UNCURL loses 0.1 points, 16 -> 2 loses 9 or more."""
    directory = report_study.write(tmp_path_factory.mktemp("gate") / "study")
    write_report(directory)
    return directory


@pytest.fixture
def report(study):
    return study / "report.json"


def write_gate(directory, **rules):
    path = directory / "gate_rules.json"
    artifacts.write_json(path, {"schema": gate.GATE_SCHEMA, **rules})
    return path


def changed(report, directory, change):
    """Writes the report with something changed."""
    content = artifacts.read_json(report)
    change(content)
    path = directory / "report.json"
    artifacts.write_json(path, content)
    return path


def verdicts_of(result, rule):
    return [verdict for verdict in result["verdicts"] if verdict["rule"] == rule]


def candidate_in(content, task, name):
    finding = next(f for f in content["findings"] if f["task"] == task)
    return next(c for c in finding["candidates"] if gate.candidate_name(c) == name)


def test_the_default_gate_passes_a_good_model_and_fails_a_bad_one(report):
    good = gate.judge(report, DEFAULT, candidate=GOOD)
    assert good["passed"] is True, gate.format_verdicts(good)
    bad = gate.judge(report, DEFAULT, candidate=WORSE)
    assert bad["passed"] is False
    assert all(not verdict["passed"] for verdict in verdicts_of(bad, "max_drop_per_task"))
    # It leaves 7 % of the tokens behind where 5 % may be.
    (first, *_) = verdicts_of(bad, "max_drop_fraction")
    assert (first["value"], first["limit"], first["passed"]) == (0.07, 0.05, False)


def test_drops_are_judged_by_the_upper_end_of_the_interval_or_by_the_mean(report, tmp_path):
    content = artifacts.read_json(report)
    drop = candidate_in(content, "rte", GOOD)["drop"]
    mean, (_, high) = drop["mean"], drop["interval"]
    assert mean < high
    between = (max(mean, 0.0) + high) / 2
    strict = write_gate(
        tmp_path, max_drop_per_task=10, tasks={"rte": {"max_drop_per_task": between}}
    )
    result = gate.judge(report, strict, candidate=GOOD)
    by_task = {v["task"]: v for v in verdicts_of(result, "max_drop_per_task")}
    assert by_task["rte"]["value"] == high and not by_task["rte"]["passed"]
    assert by_task["cb"]["limit"] == 10 and by_task["cb"]["passed"]
    loose = write_gate(tmp_path, max_drop_per_task={"limit": between, "judged_by": "mean"})
    result = gate.judge(report, loose, candidate=GOOD)
    assert result["passed"] and verdicts_of(result, "max_drop_per_task")[1]["value"] == mean
    default = write_gate(tmp_path, judged_by="mean", max_drop_per_task=between)
    assert gate.judge(report, default, candidate=GOOD)["passed"]


def test_a_value_on_the_limit_passes(report, tmp_path):
    content = artifacts.read_json(report)
    high = candidate_in(content, "mean", GOOD)["drop"]["interval"][1]
    assert gate.judge(report, write_gate(tmp_path, max_mean_drop=high), candidate=GOOD)["passed"]
    rules = write_gate(tmp_path, max_mean_drop=high - 1e-9)
    assert not gate.judge(report, rules, candidate=GOOD)["passed"]


def test_classes_and_slices_are_judged_and_small_ones_listed(report, tmp_path):
    def change(content):
        for name, count, mean in (("short", 60, 1.0), ("long", 60, 9.0), ("rare", 10, 50.0)):
            candidate_in(content, "cb", GOOD)["drop_by_subset"].append(
                {
                    **{"kind": "slice", "name": name, "num_examples": count, "seeds": 3},
                    **{"mean": mean, "interval": [mean - 2, mean + 2], "over": "seeds"},
                }
            )

    path = changed(report, tmp_path, change)
    rules = write_gate(
        tmp_path,
        max_slice_drop=5.0,
        max_class_drop={"limit": 20.0, "judged_by": "mean"},
        min_slice_examples=50,
    )
    result = gate.judge(path, rules, candidate=GOOD)
    slices = {v["where"]: (v["passed"], v["value"]) for v in verdicts_of(result, "max_slice_drop")}
    assert slices == {"short": (True, 3.0), "long": (False, 11.0)}
    assert {v["where"] for v in verdicts_of(result, "max_class_drop")} == {"yes", "no"}
    listed = [(entry["rule"], entry["task"], entry["where"]) for entry in result["not_judged"]]
    assert listed == [("max_slice_drop", "cb", "rare"), ("max_slice_drop", "rte", None)]
    text = gate.format_verdicts(result)
    assert "Not judged: max_slice_drop, cb rare: fewer than 50 examples." in text
    assert "Not judged: max_slice_drop, rte: the task has no slice." in text


def test_without_predictions_rules_on_classes_fail(report, tmp_path):
    def change(content):
        for candidate in content["findings"][0]["candidates"]:
            candidate["drop_by_subset"] = []

    path = changed(report, tmp_path, change)
    result = gate.judge(path, write_gate(tmp_path, max_class_drop=100), candidate=GOOD)
    assert result["passed"] is False
    assert "no predictions" in verdicts_of(result, "max_class_drop")[0]["reason"]


def test_what_cannot_be_compared_fails(report, tmp_path):
    def change(content):
        candidate_in(content, "rte", GOOD)["drop"] = {"seeds": 0, "against": None}
        candidate_in(content, "cb", GOOD)["drop"] |= {"seeds": 1, "interval": None}

    path = changed(report, tmp_path, change)
    result = gate.judge(path, write_gate(tmp_path, max_drop_per_task=99), candidate=GOOD)
    assert [v["reason"] for v in result["verdicts"]] == [
        "one seed without predictions has no interval",
        "there is no unpruned model with the same seed",
    ]
    assert result["passed"] is False
    seeds = gate.judge(path, write_gate(tmp_path, min_seeds=1), candidate=GOOD)
    assert [(v["value"], v["passed"]) for v in seeds["verdicts"]] == [(1, True), (0, False)]


def test_a_model_that_was_not_run_on_a_task_fails_there(report, tmp_path):
    def change(content):
        finding = next(f for f in content["findings"] if f["task"] == "rte")
        finding["candidates"] = [c for c in finding["candidates"] if gate.candidate_name(c) != GOOD]
        content["rows"] = [
            r
            for r in content["rows"]
            if (r["task"], r["kind"], r["num_experts"]) != ("rte", "pruned", 8)
        ]

    path = changed(report, tmp_path, change)
    rules = write_gate(tmp_path, max_drop_per_task=99, max_drop_fraction=1, min_seeds=1)
    result = gate.judge(path, rules, candidate=GOOD)
    assert {v["rule"] for v in result["verdicts"] if not v["passed"]} == {
        *("max_drop_per_task", "max_drop_fraction", "min_seeds")
    }
    assert all(v["task"] == "rte" for v in result["verdicts"] if not v["passed"])


def test_memory_or_latency_must_be_gained(report, study, tmp_path):
    # 60M + 8M a expert, in 4 bytes: 188M before, 124M after; 12 ms before, 8 ms after.
    saved = 1 - 124 / 188
    rules = write_gate(tmp_path, min_memory_gain=saved + 0.01, min_latency_gain=1 / 3)
    result = gate.judge(report, rules, candidate=GOOD, bench=study / "bench.json")
    memory, latency = result["verdicts"]
    assert memory["value"] == pytest.approx(saved) and not memory["passed"]
    assert latency["value"] == pytest.approx(1 / 3) and latency["passed"] and result["passed"]
    assert latency["reason"] == "12 ms before, 8 ms after, 4 x TPU v5e"
    assert "one must hold" in gate.format_verdicts(result)
    alone = gate.judge(report, rules, candidate=GOOD)
    assert not alone["passed"] and "--bench" in alone["verdicts"][1]["reason"]
    rules = write_gate(tmp_path, min_memory_gain=0.3, min_latency_gain=0.9)
    assert gate.judge(report, rules, candidate=GOOD)["passed"]


def test_a_functional_record_or_one_without_the_model_gives_no_latency(report, study, tmp_path):
    bench = artifacts.read_json(study / "bench.json")
    path = tmp_path / "bench.json"
    rules = write_gate(tmp_path, min_latency_gain=0.0)
    artifacts.write_json(path, {**bench, "is_functional_only": True})
    result = gate.judge(report, rules, candidate=GOOD, bench=path)
    assert "functional only" in result["verdicts"][0]["reason"] and not result["passed"]
    artifacts.write_json(path, {**bench, "models": bench["models"][1:]})
    result = gate.judge(report, rules, candidate=GOOD, bench=path)
    assert "no forward pass of both" in result["verdicts"][0]["reason"] and not result["passed"]
    artifacts.write_json(path, {**bench, "schema": "uncurl_jax.bench/9"})
    with pytest.raises(InputError, match=r'schema "uncurl_jax.bench/1", got \'uncurl_jax.bench/9'):
        gate.judge(report, rules, candidate=GOOD, bench=path)


def test_the_default_candidate_is_the_one_at_the_lossless_threshold(report, tmp_path):
    def reach(content):
        mean = next(f for f in content["findings"] if f["task"] == "mean")
        mean["lossless"]["reached"] = candidate_in(content, "mean", GOOD)

    rules = write_gate(tmp_path, min_seeds=1)
    path = changed(report, tmp_path, reach)
    assert gate.judge(path, rules)["candidate"]["name"] == GOOD

    def lose(content):
        for finding in content["findings"]:
            finding["lossless"]["reached"] = None

    path = changed(report, tmp_path, lose)
    with pytest.raises(InputError, match=f"--candidate must name the one .* choose of .*{GOOD}, "):
        gate.judge(path, rules)

    def single(content):
        for finding in content["findings"]:
            finding["candidates"] = [
                c for c in finding["candidates"] if gate.candidate_name(c) == WORSE
            ]

    path = changed(path, tmp_path, single)
    assert gate.judge(path, rules)["candidate"]["name"] == WORSE


def test_gate_json_names_its_inputs_and_leaves_the_signature_to_people(report):
    result = gate.judge(report, DEFAULT, candidate=GOOD)
    assert result["signed_off_by"] is None and result["signed_off_at"] is None
    assert result["inputs"]["report"] == {
        **{"file": "report.json", "sha256": artifacts.sha256_of_file(report)}
    }
    assert result["inputs"]["gate"]["sha256"] == artifacts.sha256_of_file(DEFAULT)
    assert result["limits"] == artifacts.read_json(DEFAULT)
    assert result["study_inputs"]["runs.jsonl"] == artifacts.sha256_of_file(
        report.with_name("runs.jsonl")
    )
    assert result["candidate"]["num_experts"] == 8


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_drop_pertask": 1}, "got 'max_drop_pertask': nearest max_drop_per_task"),
        ({"max_mean_drop": -1}, "max_mean_drop must be a number of at least 0, got -1"),
        ({"max_mean_drop": True}, "max_mean_drop must be a number of at least 0, got True"),
        ({"min_memory_gain": 25}, "min_memory_gain must be a fraction of at most 1, got 25"),
        ({"min_seeds": {"limit": 3}}, "min_seeds must be a number"),
        ({"max_mean_drop": {"limt": 3}}, "must be a number or hold limit and judged_by"),
        ({"max_mean_drop": 1, "judged_by": "luck"}, "judged_by must be .* got 'luck'"),
        ({"max_mean_drop": {"limit": 1, "judged_by": 2}}, "judged_by must be .* got 2"),
        ({"tasks": {"cb": {"max_mean_drop": 1}}}, "task cb: a rule must be a known one"),
        ({"tasks": ["cb"]}, "tasks must map a task's name to rules"),
        ({"tasks": {"copa": {"min_seeds": 1}}}, "got 'copa': .* has cb, rte"),
        ({}, "at least one rule"),
        ({"min_slice_examples": 3}, "at least one rule"),
        ({"schema": "uncurl_jax gate 0", "min_seeds": 1}, 'schema "uncurl_jax gate 1", got'),
    ],
)
def test_a_gate_that_is_wrong_is_refused(report, tmp_path, rules, message):
    with pytest.raises(InputError, match=message):
        gate.judge(report, write_gate(tmp_path, **rules), candidate=GOOD)


def test_a_wrong_report_or_candidate_is_refused(report, tmp_path):
    with pytest.raises(InputError, match=f"got '16to3-uncurl-reference': choose of .*{GOOD}, "):
        gate.judge(report, DEFAULT, candidate="16to3-uncurl-reference")
    old = changed(report, tmp_path, lambda content: content.update(schema="uncurl_jax report 1"))
    with pytest.raises(InputError, match=r'schema "uncurl_jax report 2", got .* report 1'):
        gate.judge(old, DEFAULT)
    none = changed(report, tmp_path, lambda content: content.update(findings=[]))
    with pytest.raises(InputError, match="judges pruned models, got none"):
        gate.judge(none, DEFAULT)
    with pytest.raises(InputError, match="got nothing at"):
        gate.judge(tmp_path / "no.json", DEFAULT)


def test_the_command_exits_with_the_verdict(report, tmp_path, capsys, monkeypatch):
    # Gates that come with the package are found from any directory.
    monkeypatch.chdir(tmp_path)
    command = ["gate", str(report), "--gate", "configs/gates/default.json"]
    assert main([*command, "--candidate", GOOD, "--out", "good.json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": "good.json", "candidate": GOOD, "passed": True}
    assert f"{GOOD}: passed." in err and "max_drop_per_task" in err
    assert main([*command, "--candidate", WORSE, "--out", "bad.json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert artifacts.read_json(tmp_path / "bad.json")["passed"] is False
    assert main([*command, "--candidate", GOOD, "--out", "good.json"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert main([*command, "--candidate", "none", "--out", "other.json"]) == 2
    assert not (tmp_path / "other.json").exists()


def test_report_takes_margin_and_tolerance_on_the_command_line(report_study, tmp_path, capsys):
    directory = report_study.write(tmp_path / "study", is_whole=False)
    assert main(["report", str(directory), "--margin", "100", "--tolerance", "100"]) == 0
    assert "Effect against unpruned" in capsys.readouterr().err
    content = artifacts.read_json(directory / "report.json")
    assert {f["margin"] for f in content["findings"]} == {100.0}
    assert {f["lossless"]["reached"]["num_experts"] for f in content["findings"]} == {2}
    before = copy.copy((directory / "report.json").read_bytes())
    assert main(["report", str(directory), "--tolerance", "-1"]) == 2
    assert "--tolerance must be points of at least 0, got -1.0" in capsys.readouterr().err
    assert (directory / "report.json").read_bytes() == before


def test_a_model_must_beat_always_giving_the_same_answer(report, tmp_path):
    def guess(score):
        def change(content):
            for row in content["rows"]:
                row["guessing_score"] = score

        return changed(report, tmp_path, change)

    rules = write_gate(tmp_path, min_over_guessing=1.0)
    good = gate.judge(report, rules, candidate=GOOD)
    assert good["passed"] is True
    rows = artifacts.read_json(report)["rows"]
    own = [r for r in rows if r["kind"] == "pruned" and gate.candidate_name(r) == GOOD]
    expected = [r["score"] - r["guessing_score"] for r in own]
    assert sorted(v["value"] for v in good["verdicts"]) == pytest.approx(sorted(expected))
    assert gate.judge(guess(own[0]["score"]), rules, candidate=GOOD)["passed"] is False
    unknown = gate.judge(guess(None), rules, candidate=GOOD)
    assert {v["reason"] for v in unknown["verdicts"]} == {
        "the report has no predictions of this model"
    }
    assert unknown["passed"] is False
