"""A small study in the documented format, with numbers made up from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax import artifacts
from uncurl_jax.data.tasks import Example
from uncurl_jax.pruning.plan import make_plan
from uncurl_jax.pruning.statistics import RouterStatistics, layer_statistics, make_manifest

TASKS, SEEDS, MOE_LAYERS, NUM_LAYERS = ("rte", "cb"), (0, 1, 2), (0, 2, 4, 6), 8
SOURCE, TARGETS = 16, (8, 4, 2)
METHODS = (("uncurl", "reference"), ("frequency", "reference"))
NUM_EXAMPLES = 400
VERSIONS = {"uncurl_jax": "0.1.0", "jax": "0.10.2", "numpy": "2.3.1", "python": "3.11.7"}


def make_statistics(task: str, num_experts: int = SOURCE, num_tokens: int = 500):
    """Statistics with planted clusters of experts, which differ from layer to layer."""
    generator = np.random.default_rng(sum(map(ord, task)))
    layers = {}
    for layer in MOE_LAYERS:
        planted = np.sort(generator.integers(0, 5, num_experts))
        signal = generator.normal(size=(num_tokens, 5))
        noise = generator.normal(size=(num_tokens, num_experts))
        logits = generator.permutation(signal[:, planted] + 0.6 * noise, axis=1)
        logits += generator.normal(size=num_experts) * 0.5
        probability = np.asarray(jax.nn.softmax(logits, axis=-1))
        index = logits.argmax(axis=1)[None, :, None]
        layers[layer] = layer_statistics(
            jnp.asarray(logits[None]),
            jnp.asarray(index),
            jnp.asarray(np.take_along_axis(probability[None], index, axis=-1)),
            jnp.ones(index.shape, bool),
            jnp.ones((1, num_tokens), bool),
        )
    manifest = make_manifest(
        checkpoint_hash="c" * 8,
        num_experts=[num_experts if i in MOE_LAYERS else 0 for i in range(NUM_LAYERS)],
        num_selected_experts=1,
        task=task,
        split="train",
        vocabulary_hash="v" * 8,
        seed=0,
    )
    return RouterStatistics(layers, manifest)


def accuracy(task: str, kind: str, experts: int, method: str | None) -> float:
    """The made-up truth: pruning beats scratch down to a factor of 4, and nothing is lost at 2."""
    full = 0.72 if task == "rte" else 0.80
    lost = {16: 0.0, 8: 0.001, 4: 0.03, 2: 0.09}[experts]
    scratch = {16: 0.0, 8: 0.03, 4: 0.055, 2: 0.075}[experts]
    if kind == "pruned":
        return full - lost - (0.03 if method == "frequency" else 0.0)
    return full - (scratch if kind == "scratch" else 0.0)


class Study:
    """Writes the study, or parts of it."""

    tasks, seeds, source, targets = TASKS, SEEDS, SOURCE, TARGETS
    make_statistics = staticmethod(make_statistics)

    @staticmethod
    def write(directory: Path, *, is_whole: bool = True) -> Path:
        """Writes runs, study.json, predictions and plans; if whole, all else a report shows."""
        generator = np.random.default_rng(0)
        directory.mkdir(parents=True)
        artifacts.write_json(
            directory / "study.json",
            {
                "schema": "uncurl_jax study 2",
                "title": "A made-up study: 16 experts, two tasks, three seeds",
                "device": "8 x cpu",
                "versions": VERSIONS,
                "config": {"seeds": list(SEEDS), "targets": list(TARGETS), "corpus": "text"},
            },
        )
        for task in TASKS:
            _write_task(directory, task, generator, is_whole)
        if is_whole:
            _write_pretraining(directory, generator)
            _write_placements(directory)
            _write_bench(directory)
        return directory


def _record(directory: Path, stage: str, name: str, **others: Any) -> None:
    record = {
        **{"schema": "uncurl_jax run 2", "stage": stage, "name": name, "inputs": []},
        **{"tokens": 0, "seconds": 1.5, "versions": VERSIONS},
        **others,
    }
    artifacts.append_json_line(directory / "runs.jsonl", record)


def _write_curve(directory: Path, name: str, generator: Any, tokens: int, least: float) -> None:
    path = directory / "curves" / f"{name.replace('/', '__')}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = []
    for step in range(1, 41):
        loss = least + 3.0 * np.exp(-step / 9) + 0.04 * generator.normal()
        line = {"step": 10 * step, "tokens": tokens * step // 40, "loss": round(float(loss), 4)}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def _write_task(directory: Path, task: str, generator: Any, is_whole: bool) -> None:
    labels = generator.integers(0, 2, NUM_EXAMPLES)
    examples = [
        Example(f"{task} question {i}?", ("yes", "no"), int(label), i)
        for i, label in enumerate(labels)
    ]
    artifacts.write_json(
        directory / "tasks" / f"{task}.json",
        {
            **{"task": task, "split": "validation", "metrics": ["accuracy"]},
            "primary_metric": "accuracy",
            "examples": [{**example.to_dict(), "prompt_tokens": 20} for example in examples],
        },
    )
    statistics, name = make_statistics(task), f"calibration/{SOURCE}_experts/{task}.npz"
    if is_whole:
        statistics.save(directory / name)
        _record(directory, "calibrate", name, tokens=500, seconds=4.0)
    models = [("unpruned", SOURCE, None, None), *(("scratch", n, None, None) for n in TARGETS)]
    models += [("pruned", n, method, router) for n in TARGETS for method, router in METHODS]
    difficulty = generator.permutation(NUM_EXAMPLES)
    for kind, experts, method, router in models:
        plan = None
        if kind == "pruned":
            plan = f"plans/{task}-{experts}-{method}.json"
            decided = make_plan(statistics, num_experts=experts, method=method or "")
            (directory / "plans").mkdir(exist_ok=True)
            decided.save(directory / plan)
            _record(directory, "plan", plan, seconds=0.4)
        for seed in SEEDS:
            run = f"{task}-{kind}-{experts}-{method}-{seed}"
            shift = 0.012 * (seed - 1) + 0.003 * generator.normal()
            right = round(NUM_EXAMPLES * (accuracy(task, kind, experts, method) + shift))
            is_right = difficulty < right
            predicted = np.where(is_right, labels, 1 - labels)
            score = 100 * float(is_right.mean())
            predictions = directory / "predictions" / f"{run}.jsonl"
            predictions.parent.mkdir(exist_ok=True)
            lines = [
                {
                    **{"idx": i, "group": [], "label": int(label), "prediction": int(choice)},
                    **{"predicted_text": ("yes", "no")[choice]},
                    "log_likelihoods": [-1.0 - int(choice), -2.0 + int(choice)],
                }
                for i, (label, choice) in enumerate(zip(labels, predicted, strict=True))
            ]
            predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
            if is_whole:
                finetuned = f"runs/{run}/finetuned"
                _write_curve(directory, finetuned, generator, 40_000, 1.0)
                _record(directory, "finetune", finetuned, tokens=40_000, seconds=21.0)
            size = 4 * (60_000_000 + 8_000_000 * experts)
            _record(
                directory,
                "evaluate",
                f"runs/{run}/metrics.json",
                run=run,
                kind=kind,
                source_num_experts=SOURCE if kind == "pruned" else None,
                num_experts=experts,
                method=method,
                router=router,
                task=task,
                seed=seed,
                num_experts_per_layer=[experts if i in MOE_LAYERS else 0 for i in range(8)],
                score=score,
                interval=[score - 4.5, score + 4.5],
                metrics={"accuracy": score},
                num_examples=NUM_EXAMPLES,
                fraction_tokens_left_behind={16: 0.011, 8: 0.02, 4: 0.04, 2: 0.07}[experts],
                parameters=size // 4,
                active_parameters=68_000_000,
                bytes=size,
                checkpoint=None,
                plan=plan,
                predictions=predictions.relative_to(directory).as_posix(),
                statistics=name if kind == "pruned" and is_whole else None,
                tokens=8_000,
                seconds=2.5,
            )


def _write_pretraining(directory: Path, generator: Any) -> None:
    for experts in (SOURCE, *TARGETS):
        name = f"pretrained/{experts}_experts"
        _write_curve(directory, name, generator, 2_000_000, 4.5 - 0.02 * experts)
        _record(directory, "pretrain", name, tokens=2_000_000, seconds=400.0)
        name = f"prefinetuned/{experts}_experts"
        _write_curve(directory, name, generator, 300_000, 2.0 - 0.01 * experts)
        _record(directory, "prefinetune", name, tokens=300_000, seconds=70.0)


def _write_placements(directory: Path) -> None:
    for experts, total in ((16, 12_000.0), (8, 9_000.0), (4, 2_000.0)):
        artifacts.write_json(
            directory / f"placement_{experts}.json",
            {
                "schema": "uncurl_jax placement 1",
                **{"slice": "v5e-16", "mode": "serve", "batch": 64, "length": 256},
                "model": {"num_experts": [experts if i in MOE_LAYERS else 0 for i in range(8)]},
                "estimates": {"wire_bytes_per_token": {"total": total}},
            },
        )


def _write_bench(directory: Path) -> None:
    def timing(seconds: float) -> dict[str, Any]:
        ends = [0.96 * seconds, 1.05 * seconds]
        return {"seconds": seconds, "interval": ends, "tokens_per_second": 2048 / seconds}

    names = {experts: f"124M+{experts}e" for experts in (SOURCE, *TARGETS)}
    cells = [
        {
            **{"model": name, "devices": 4, "layout": "sharded", "status": "measured"},
            **{"tokens": 2048, "forward": timing(1e-3 * (4 + 0.5 * experts)), "prefill": None},
            **{"decode": [], "split": None, "communication": None, "equality": None},
        }
        for experts, name in names.items()
    ]
    artifacts.write_json(
        directory / "bench.json",
        {
            **{"schema": "uncurl_jax.bench/1", "versions": VERSIONS, "is_functional_only": False},
            **{"device": {"kind": "TPU v5e", "count": 4}, "note": None, "pictures": []},
            "settings": {"batch_per_device": 2, "length": 256, "repeats": 20},
            "models": [
                {
                    **{"name": name, "backbone": "124M", "parameters_from": "random"},
                    **{"num_experts": [experts] * 4, "parameters": experts},
                }
                for experts, name in names.items()
            ],
            **{"cells": cells, "weak_scaling": [], "speedups": []},
        },
    )


@pytest.fixture(scope="session")
def report_study():
    return Study
