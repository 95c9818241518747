from __future__ import annotations

import json
import re

import matplotlib as mpl
import numpy as np
import pytest

from uncurl_jax import artifacts
from uncurl_jax.experiments.reporting import (
    report_course,
    report_drawing,
    report_evidence,
    report_html,
    report_plans,
    report_recommendation,
    report_scores,
    report_tradeoffs,
)
from uncurl_jax.pruning.affinity import affinity
from uncurl_jax.pruning.plan import make_plan

IDENTITY = ("source_num_experts", "num_experts", "method", "router")


def make_row(kind, experts, scores, *, task="rte", source=None, method="uncurl", **others):
    scores = {str(seed): score for seed, score in enumerate(scores)}
    mean = float(np.mean(list(scores.values())))
    is_pruned = kind == "pruned"
    return {
        **{"task": task, "kind": kind, "num_experts": experts, "score": mean, "scores": scores},
        "source_num_experts": source if is_pruned else None,
        "method": method if is_pruned else None,
        "router": "reference" if is_pruned else None,
        **{"interval": [mean - 1, mean + 1], "interval_over": "seeds", "num_runs": len(scores)},
        **{"parameters": 10**6 * experts, "active_parameters": 10**6, "bytes": 4 * 10**6 * experts},
        **{"fraction_tokens_left_behind": 0.0, "plans": []},
        **others,
    }


def comparison(mean, low, high, seeds=3):
    return {"seeds": seeds, "mean": mean, "interval": [low, high]}


def make_finding(rows, *, beneficial=0, lossless=0, status="not_reached", task="rte"):
    """A finding of which the models with these counts of experts reached a threshold."""
    candidates = [
        {
            **{name: row[name] for name in IDENTITY},
            **{"label": f"{row['method']} (router reference)", "score": row["score"]},
            "factor": row["source_num_experts"] / row["num_experts"],
            "gap": comparison(1.5, 1.0, 2.0),
            "drop": comparison(0.4, -0.2, 0.9),
        }
        for row in rows
        if row["kind"] == "pruned" and row["task"] == task
    ]
    finding = {"task": task, "candidates": candidates}
    for name, count in (("beneficial", beneficial), ("lossless", lossless)):
        reached = next((c for c in candidates if c["num_experts"] == count), None)
        finding[name] = {"status": "reached" if reached else status, "reached": reached}
    return finding


def curve_rows(task="rte"):
    return [
        make_row("unpruned", 16, [80.0, 81.0, 82.0], task=task),
        *(make_row("scratch", n, [s, s + 1, s + 2], task=task) for n, s in ((8, 76), (4, 74))),
        *(
            make_row("pruned", n, [s, s + 1, s + 2], source=16, task=task)
            for n, s in ((8, 79.5), (4, 75.5), (2, 60.0))
        ),
    ]


def test_the_knee_is_marked_on_the_axis_of_the_best_series_where_it_bends():
    rows = curve_rows()
    with report_drawing.drawing_style():
        (figure,) = report_scores.draw_scores(rows, [])
        (short,) = report_scores.draw_scores([r for r in rows if r["num_experts"] > 2], [])
    assert ">knee<" in figure.panels[0] and "decides nothing" in figure.caption
    # Three points are a picture of no bend.
    assert ">knee<" not in short.panels[0] and "knee" not in short.caption


def test_where_a_smaller_model_is_pruned_too_it_stands_for_one_from_scratch():
    rows = [*curve_rows(), make_row("unpruned", 8, [70.0]), make_row("unpruned", 2, [50.0])]
    small = report_scores.trained_small(rows, 16)
    assert [(row["kind"], row["num_experts"]) for row in small] == [
        *(("scratch", 8), ("scratch", 4), ("unpruned", 2)),
    ]


def test_points_that_others_beat_in_both_are_dominated():
    points = [(1.0, 5.0), (2.0, 2.0), (2.0, 3.0), (3.0, 2.0), (4.0, 0.0)]
    assert report_tradeoffs.non_dominated(points) == [True, True, False, False, True]
    # Of two equal points none is better than the other.
    assert report_tradeoffs.non_dominated([(1.0, 1.0), (1.0, 1.0)]) == [True, True]


def test_the_mean_over_tasks_is_that_of_each_seed():
    rows = [
        make_row("unpruned", 8, [70.0, 72.0], task="rte"),
        make_row("unpruned", 8, [80.0, 86.0], task="cb"),
        make_row("scratch", 4, [60.0, 61.0], task="rte"),
    ]
    (mean,) = [row for row in report_scores.with_mean(rows) if row["task"] == "mean"]
    assert mean["scores"] == {"0": 75.0, "1": 79.0} and mean["score"] == 77.0
    # Student's t of one degree of freedom at 97.5 % is 12.706; the standard error is 2.
    assert mean["interval"] == pytest.approx([77 - 25.412, 77 + 25.412], abs=1e-3)


def test_one_task_and_rows_that_hold_the_mean_get_no_other():
    rows = curve_rows()
    assert report_scores.with_mean(rows) == rows
    rows = [*rows, *curve_rows("mean")]
    assert report_scores.with_mean(rows) == rows


def test_thresholds_are_drawn_where_they_were_reached_and_nowhere_else():
    rows = curve_rows()
    for reached, names in (((0, 0), []), ((4, 8), ["beneficial", "lossless"])):
        with report_drawing.drawing_style():
            (figure,) = report_scores.draw_scores(
                rows, [make_finding(rows, beneficial=reached[0], lossless=reached[1])]
            )
        (svg,) = figure.panels
        assert [n for n in ("beneficial", "lossless") if f">{n}<" in svg] == names
        assert all(f">{text}<" in svg for text in ("1×", "2×", "4×", "8×", "16", "knee"))
    assert "Beneficial threshold: 4×, uncurl (router reference); lossless" in figure.caption
    assert (
        "uncurl, reference",
        "16",
        "4",
        "4",
        "76.50",
        "75.50 to 77.50",
        "3",
    ) in figure.table.rows


def test_each_source_has_a_panel_of_its_own():
    rows = [*curve_rows(), make_row("unpruned", 8, [70.0]), make_row("pruned", 4, [69], source=8)]
    with report_drawing.drawing_style():
        (figure,) = report_scores.draw_scores(rows, [])
    assert len(figure.panels) == 2
    assert "Z = 16" in figure.panels[0] and "Z = 8" in figure.panels[1]


def test_what_is_not_dominated_is_ringed_and_said_in_the_table():
    rows = curve_rows()
    finding = make_finding(rows)
    for candidate, loss in zip(finding["candidates"], (0.5, 6.5, 21.0), strict=True):
        candidate["drop"] = comparison(loss, loss - 0.3, loss + 0.3)
    with report_drawing.drawing_style():
        (figure,) = report_tradeoffs.draw_tradeoffs(
            rows, [finding], [report_tradeoffs.memory_cost(rows)]
        )
    table = {(line[2], line[3]): line[4:] for line in figure.table.rows}
    assert table["unpruned", "16"] == ("64 MB", "0.00", "–", "yes")
    assert table["uncurl, reference", "8"] == ("32 MB", "0.50", "0.20 to 0.80", "yes")
    # 4 experts from scratch lose 6 points and the pruned one 6.5 at the same size.
    assert table["from scratch", "4"] == ("16 MB", "6.00", "–", "yes")
    assert table["uncurl, reference", "4"][-1] == ""


def test_a_cost_of_one_size_alone_is_not_drawn():
    rows = curve_rows()
    cost = report_tradeoffs.Cost("latency", "ms", {8: 1.0}, "Measured.")
    assert report_tradeoffs.draw_tradeoffs(rows, [make_finding(rows)], [cost]) == []


def test_affinities_are_in_cluster_order_and_the_embedding_has_every_expert(report_study):
    statistics = report_study.make_statistics("rte")
    plan = make_plan(statistics, num_experts=4)
    layer = plan.layers[0]
    order = report_plans._cluster_order(layer)
    assert [layer.labels[expert] for expert in order] == sorted(layer.labels)
    with report_drawing.drawing_style():
        figures = report_plans.draw_plan_figures("rte", plan, statistics.layers)
    clusters, heat, embedding, _ = figures
    assert len(heat.panels) == len(embedding.panels) == len(plan.layers)
    assert len(embedding.table.rows) == sum(layer.num_experts for layer in plan.layers)
    assert len(clusters.table.rows) == sum(layer.num_clusters for layer in plan.layers)
    values = affinity(statistics.layers[0])
    same = np.equal.outer(layer.labels, layer.labels)
    inside = values[same & ~np.eye(16, dtype=bool)].mean()
    assert heat.table.rows[0] == ("0", f"{inside:.3f}", f"{values[~same].mean():.3f}")
    # The planted clusters are seen.
    assert inside > values[~same].mean() + 0.1


def test_many_experts_are_drawn_as_means_over_blocks(report_study):
    statistics = report_study.make_statistics("rte", num_experts=128)
    plan = make_plan(statistics, num_experts=32, method="frequency_merge")
    with report_drawing.drawing_style():
        heat = report_plans.draw_affinities("rte", plan, statistics.layers)
    assert "mean over up to 2 by 2 pairs" in heat.caption
    assert max(map(len, heat.panels)) < 120_000


def test_dropped_experts_are_marked_in_clusters_and_embedding(report_study):
    statistics = report_study.make_statistics("cb")
    plan = make_plan(statistics, num_experts=4, method="frequency")
    with report_drawing.drawing_style():
        clusters, heat, embedding, _ = report_plans.draw_plan_figures("cb", plan, statistics.layers)
    assert "× was dropped" in clusters.caption and clusters.panels[0].count(">×<") == 4 * 12
    assert sum(line[2] == "dropped" for line in embedding.table.rows) == 4 * 12
    assert heat.table.rows[0][1] == "–"


def test_costs_add_up_by_stage_in_the_order_of_the_stages():
    records = [
        {"stage": "finetune", "seconds": 10, "tokens": 100},
        {"stage": "pretrain", "seconds": 60.5, "tokens": 1000},
        {"stage": "finetune", "seconds": 5, "tokens": 50},
        {"stage": "polish", "seconds": 1, "tokens": 0},
        {"seconds": 3},
    ]
    costs = report_course.sum_costs(records, report_evidence.STAGES)
    assert costs == [
        ("pretrain", 1, 60.5, 1000),
        ("finetune", 2, 15.0, 150),
        ("polish", 1, 1.0, 0),
    ]
    with report_drawing.drawing_style():
        figure = report_course.draw_costs(costs)
    assert figure is not None and figure.table.rows[-1] == ("all", "4", "76.5 s", "1,150")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.25 s"), (90, "90 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_written_with_three_figures(seconds, text):
    assert report_course.format_seconds(seconds) == text


def test_long_curves_are_thinned_but_keep_their_ends():
    assert report_course._evenly(range(1000), 5) == [0, 250, 500, 749, 999]
    assert report_course._evenly([1, 2], 5) == [1, 2]


def test_paths_are_shortened_without_moving():
    assert report_drawing._compact("M 1.004 2 \nL 5.5 2 \nL 5.5 7 \nL 6 8 \nz \n") == (
        "M1 2H5.5V7L6 8z"
    )
    assert report_drawing._compact("M 0 0 \nC 1 2 3 4 5 6 \nL 5 9") == "M0 0C1 2 3 4 5 6V9"


def test_no_stand_in_for_a_colour_of_the_page_is_left():
    rows = curve_rows()
    with report_drawing.drawing_style():
        (figure,) = report_scores.draw_scores(rows, [])
    page = report_html.figure_html(figure)
    assert "var(--ink)" in page and "var(--c0)" in page
    assert re.search(r"#0[0-9a-c]0[0-9a-c]0[0-9a-c]", page) is None


def test_the_users_matplotlibrc_has_no_say(monkeypatch):
    def draw():
        with report_drawing.drawing_style():
            return report_scores.draw_sizes(curve_rows()).panels

    plain = draw()
    monkeypatch.setitem(mpl.rcParams, "font.size", 30)
    assert draw() == plain


def test_the_model_within_a_point_of_unpruned_is_recommended():
    rows = curve_rows()
    finding = make_finding(rows, lossless=8, beneficial=4)
    advice = report_recommendation.recommend(rows, [finding], ["latency of a forward pass"])
    assert advice["lead"] == (
        "Deploy the model pruned from 16 to 8 experts per layer by uncurl (router reference) for "
        "rte."
    )
    assert advice["reasons"] == [
        "rte: it scores 80.5 % (95 % interval 79.5 to 81.5), loses 0.40 points (−0.20 to 0.90, "
        "3 seeds) against the unpruned model, and takes 32 MB in place of 64 MB (50 % less "
        "memory). It is as good as a model of its size trained from scratch."
    ]
    assert advice["tasks"]["rte"]["candidate"]["num_experts"] == 8
    assert advice["not_shown"][0] == "Not measured here: communication between devices."
    assert advice["text"].startswith(advice["lead"])


def test_a_model_that_only_beats_scratch_is_recommended_where_memory_must_shrink():
    rows = curve_rows()
    advice = report_recommendation.recommend(rows, [make_finding(rows, beneficial=4)])
    assert advice["lead"].startswith("If memory must shrink, deploy the model pruned from 16 to 4")
    assert advice["reasons"][0].endswith("a loss within 1 point was not shown.")


def test_a_verdict_that_many_comparisons_undo_is_called_uncertain():
    rows = curve_rows()
    finding = {**make_finding(rows, lossless=8), "comparisons": 36}
    finding["lossless"]["survives_holm"] = True
    assert "no longer" not in report_recommendation.recommend(rows, [finding])["text"]
    finding["lossless"]["survives_holm"] = False
    text = report_recommendation.recommend(rows, [finding])["text"]
    assert "Counting all 36 comparisons of the study (Holm) this is no longer certain" in text


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("not_reached", "no pruned model is shown to stay within the limit"),
        ("too_few_seeds", "until more seeds are run"),
        ("nothing_to_compare", "there is nothing to compare the pruned models with"),
    ],
)
def test_without_a_threshold_the_unpruned_model_is_kept(status, reason):
    rows = curve_rows()
    advice = report_recommendation.recommend(rows, [make_finding(rows, status=status)])
    assert advice["lead"] == "Keep the unpruned model for rte."
    assert reason in advice["reasons"][0]
    assert advice["tasks"]["rte"] == {"decision": "unpruned", "candidate": None}


def shown(directory, report_study, task="rte"):
    """What `gather` takes, of the study's plan for 4 experts."""
    records = artifacts.read_json_lines(directory / "runs.jsonl")
    path = f"plans/{task}-4-uncurl.json"
    rows = [make_row(r["kind"], r["num_experts"], [1.0]) for r in records if r.get("kind")]
    from uncurl_jax.pruning.plan import PruningPlan

    return {"rows": rows, "plans_shown": {task: {"plan": path}}}, {
        task: PruningPlan.load(directory / path)
    }


@pytest.fixture(scope="module")
def study(report_study, tmp_path_factory):
    return report_study.write(tmp_path_factory.mktemp("figures") / "study")


def test_everything_in_a_whole_study_is_found(study, report_study):
    evidence = report_evidence.gather(study, *shown(study, report_study), [])
    assert evidence.statistics["rte"].hash == report_study.make_statistics("rte").hash
    stages = [curve.stage for curve in evidence.curves]
    assert [stages.count(s) for s in ("pretrain", "prefinetune", "finetune")] == [4, 4, 60]
    assert stages == sorted(stages, key=report_evidence.STAGES.index)
    (wire,) = evidence.measures
    assert wire.values == {4: 2000.0, 8: 9000.0, 16: 12000.0}
    assert "v5e-16" in wire.origin
    assert list(evidence.notes) == ["What is lost, what is gained"]


def test_statistics_that_the_plan_was_not_made_from_are_left_out(report_study, tmp_path):
    directory = report_study.write(tmp_path / "study")
    path = directory / "calibration" / "16_experts" / "rte.npz"
    report_study.make_statistics("cb").save(path)
    evidence = report_evidence.gather(directory, *shown(directory, report_study), [])
    assert evidence.statistics == {}
    assert "is not what the plan was made from" in evidence.notes["What was merged"][0]
    path.write_bytes(b"damaged")
    evidence = report_evidence.gather(directory, *shown(directory, report_study), [])
    assert evidence.statistics == {} and "rte.npz" in evidence.notes["What was merged"][0]


def test_the_shards_of_a_study_are_searched_too(report_study, tmp_path):
    part = report_study.write(tmp_path / "shard_0_of_2")
    report, plans = shown(part, report_study)
    report["plans_shown"]["rte"]["plan"] = "shard_0_of_2/" + report["plans_shown"]["rte"]["plan"]
    evidence = report_evidence.gather(tmp_path, report, plans, [])
    assert set(evidence.statistics) == {"rte"} and len(evidence.curves) == 68
    assert {cost.stage: cost.items for cost in evidence.costs}["pretrain"] == 4


def test_a_placement_that_lacks_a_field_is_refused(report_study, tmp_path):
    directory = report_study.write(tmp_path / "study", is_whole=False)
    (directory / "placement.json").write_text(json.dumps({"schema": "uncurl_jax placement 1"}))
    with pytest.raises(report_evidence.InputError, match=r"placement\.json with KeyError 'model'"):
        report_evidence.gather(directory, *shown(directory, report_study), [])
