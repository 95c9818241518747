"""Tasks that no model has learned: nothing is concluded about pruning, however small the drop."""

from __future__ import annotations

import numpy as np
import pytest

from uncurl_jax.data.metrics import Score, accuracy, macro_f1
from uncurl_jax.data.tasks import Example
from uncurl_jax.experiments.evidence import paired, thresholds
from uncurl_jax.experiments.evidence.answers import Evidence, TaskExamples, _best_guess
from uncurl_jax.experiments.reporting import report_page, report_recommendation
from uncurl_jax.experiments.reporting.report import summarize

SCORE = Score((accuracy,), "accuracy")
# 120 of 200 are "no".
LABELS = [0] * 120 + [1] * 80


def examples_of(task: str, texts=("no", "yes")) -> list[Example]:
    return [Example(f"{task} {i}", tuple(texts), label, i) for i, label in enumerate(LABELS)]


def make_task(task: str, rate: float | None) -> tuple[list[dict], Evidence]:
    """8 experts, and pruned to 2, three seeds; right at `rate`, or always "no" if None."""
    examples = examples_of(task)
    generator = np.random.default_rng(0)
    runs, predictions = [], {}
    for kind, experts in (("unpruned", 8), ("pruned", 2), ("scratch", 2)):
        for seed in range(3):
            answers = [0] * 200
            if rate is not None:
                right = generator.random(200) < rate
                answers = np.where(right, LABELS, 1 - np.array(LABELS)).tolist()
            name = f"{task}-{kind}-{seed}"
            predictions[name] = answers
            pruned = kind == "pruned"
            score = SCORE(examples, answers)
            runs.append(
                {
                    "run": name,
                    "kind": kind,
                    "source_num_experts": 8 if pruned else None,
                    "num_experts": experts,
                    "num_experts_per_layer": [experts],
                    "method": "uncurl" if pruned else None,
                    "router": "reference" if pruned else None,
                    "task": task,
                    "seed": seed,
                    "score": score,
                    "interval": [score - 5, score + 5],
                    "fraction_tokens_left_behind": 0.0,
                    "parameters": experts,
                    "active_parameters": 1,
                    "bytes": experts,
                }
            )
    samples = paired.sample_scores(SCORE, examples, list(predictions.values()))
    guess = _best_guess(TaskExamples(task, tuple(examples), np.ones(200, int), SCORE))
    return runs, Evidence(dict(zip(predictions, samples, strict=True)), (), guess)


def find(**rates):
    made = {task: make_task(task, rate) for task, rate in rates.items()}
    rows = summarize([run for runs, _ in made.values() for run in runs])
    return rows, thresholds.find_thresholds(rows, {t: e for t, (_, e) in made.items()})


def test_the_best_guess_is_the_most_frequent_answer_by_the_tasks_own_metric():
    examples = tuple(examples_of("rte"))
    guess = _best_guess(TaskExamples("rte", examples, np.ones(200, int), SCORE))
    assert guess is not None
    assert (guess.option, guess.text, guess.sample.score) == (0, "no", 60.0)
    f1 = _best_guess(
        TaskExamples("cb", examples, np.ones(200, int), Score((macro_f1,), "macro_f1"))
    )
    assert f1 is not None
    # F1 of "no" is 2 * 0.6 / 1.6 = 75 %, of "yes" 0; macro F1 is half.
    assert f1.sample.score == pytest.approx(37.5)


def test_models_that_always_give_one_answer_reach_no_threshold():
    """Drop and gap are exactly 0 here, which would be lossless and beneficial."""
    rows, (finding,) = find(rte=None)
    assert finding["candidates"][0]["drop"]["mean"] == 0
    for verdict in ("lossless", "beneficial"):
        assert (finding[verdict]["status"], finding[verdict]["reached"]) == ("unlearned", None)
    assert finding["guessing"] == {"option": "no", "score": 60.0, "is_beaten": False}
    (said,) = report_page.sentences(finding)
    assert 'always giving the same answer ("no"), which scores 60.00 %' in said
    advice = report_recommendation.recommend(rows, [finding])
    assert advice["tasks"]["rte"] == {"decision": "none", "candidate": None}
    assert advice["lead"].startswith("Decide nothing")
    assert "Deploy" not in advice["text"]


def test_models_that_are_barely_above_the_guess_have_not_been_shown_to_learn():
    _, (finding,) = find(rte=0.62)
    assert finding["lossless"]["status"] == "unlearned"


def test_a_learned_task_is_judged_as_before():
    _, (finding,) = find(rte=0.85)
    assert finding["guessing"]["is_beaten"]
    assert finding["lossless"]["status"] in ("reached", "not_reached")


def test_the_mean_names_the_tasks_that_were_not_learned():
    _, findings = find(rte=0.85, cb=None)
    mean = findings[-1]
    assert mean["task"] == "mean"
    assert mean["guessing"]["is_beaten"]
    assert mean["guessing"]["tasks_not_beaten"] == ["cb"]
    assert mean["lossless"]["status"] != "unlearned"
    assert any("cb was not learned" in said for said in report_page.sentences(mean))
    _, findings = find(rte=None, cb=None)
    assert findings[-1]["lossless"]["status"] == "unlearned"
