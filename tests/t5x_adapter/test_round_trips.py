"""Checkpoints go from T5X to our commands and back; scores are the same in both runners.

One process does all commands one after the other, as a user would, from a directory of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.data import synthetic
from uncurl_jax.data.token_cache import TokenCache

pytestmark = [pytest.mark.t5x, pytest.mark.usefixtures("t5x")]

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "cache": "cache --task synthetic_corpus --data_dir data --max_length 96 --out caches/text",
    "t5x pretrain": """t5x train --gin_file gin/t5x/pretrain.gin --gin_file gin/models/tiny.gin
        --gin.CACHE="'caches/text'" --gin.MODEL_DIR="'pretrained'" --gin.NUM_EXPERTS=4
        --gin.NUM_STEPS=20 --gin.SAVE_PERIOD=10 --gin.KEEP=None --gin.BATCH_SIZE=8
        --gin.EVAL_STEPS=2 --gin.config.ModelConfig.max_length=96
        --gin.config.OptimizerConfig.warmup_steps=2""",
    "inspect": "inspect pretrained",
    # The token cache of the task is built by its first use, from its file in gin/tasks.
    "t5x first eval": """t5x eval --gin_file gin/tasks/synthetic.gin
        --gin_file gin/t5x/eval.gin --gin.DATA_DIR="'data'" --gin.CACHE="'caches/topic'"
        --gin.CHECKPOINT_PATH="'pretrained'" --gin.EVAL_OUTPUT_DIR="'first'"
        --gin.BATCH_SIZE=16""",
    "calibrate": "calibrate --checkpoint pretrained --task caches/topic --out statistics.npz",
    "plan": "plan --statistics statistics.npz --num_experts 3,2 --out plan.json",
    "prune": "prune --checkpoint pretrained --plan plan.json --out pruned",
    "verify": "verify pruned",
    "t5x finetune": """t5x train --gin_file gin/t5x/finetune.gin --gin.CACHE="'caches/topic'"
        --gin.INITIAL_CHECKPOINT_PATH="'pruned'" --gin.MODEL_DIR="'t5x_finetuned'"
        --gin.BATCH_SIZE=16 --gin.NUM_STEPS=6 --gin.PEAK_LEARNING_RATE=1e-2
        --gin.config.OptimizerConfig.warmup_steps=0""",
    "evaluate t5x": "evaluate --checkpoint t5x_finetuned --task caches/topic --out of_t5x.json",
    "train": """train --gin_file gin/runs/finetune.gin --cache caches/topic/train
        --checkpoint t5x_finetuned --out finetuned --gin.NUM_STEPS=3""",
    "evaluate": "evaluate --checkpoint finetuned --task caches/topic --out ours.json",
    "t5x eval": """t5x eval --gin_file gin/t5x/eval.gin --gin.CACHE="'caches/topic'"
        --gin.CHECKPOINT_PATH="'finetuned'" --gin.EVAL_OUTPUT_DIR="'scores'"
        --gin.BATCH_SIZE=16""",
    "t5x score": """t5x infer --gin_file gin/t5x/infer.gin --gin.CACHE="'caches/topic'"
        --gin.CHECKPOINT_PATH="'finetuned'" --gin.INFER_OUTPUT_DIR="'answers'"
        --gin.BATCH_SIZE=16 --gin.MODE="'score'" """,
    "t5x predict": """t5x infer --gin_file gin/t5x/infer.gin --gin.CACHE="'caches/topic'"
        --gin.CHECKPOINT_PATH="'finetuned'" --gin.INFER_OUTPUT_DIR="'answers'"
        --gin.BATCH_SIZE=16""",
    "generate": """evaluate --checkpoint finetuned --task caches/topic --mode generate
        --max_new_tokens 9 --out generated.json""",
    # What must be refused.
    "again": """t5x infer --gin_file gin/t5x/infer.gin --gin.CACHE="'caches/topic'"
        --gin.CHECKPOINT_PATH="'finetuned'" --gin.INFER_OUTPUT_DIR="'answers'" """,
    "devices": """t5x train --gin_file gin/t5x/finetune.gin --gin.CACHE="'caches/topic'"
        --gin.INITIAL_CHECKPOINT_PATH="'pruned'" --gin.MODEL_DIR="'wrong'"
        --gin.EXPERT_PARTITIONS=3""",
    "place": """t5x train --gin_file gin/t5x/finetune.gin --gin.CACHE="'caches/topic'"
        --gin.INITIAL_CHECKPOINT_PATH="'pruned'" --gin.MODEL_DIR="'answers'" """,
    "other model": """t5x train --gin_file gin/t5x/finetune.gin --gin.CACHE="'caches/topic'"
        --gin.INITIAL_CHECKPOINT_PATH="'pruned'" --gin.MODEL_DIR="'pretrained'" """,
    "no run": "t5x eval",
}
_DRIVER = """
import io, json, sys, contextlib
from uncurl_jax.cli import main
done = {}
for name, command in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    done[name] = [status, out.getvalue(), err.getvalue()]
json.dump(done, open("done.json", "w"))
"""


class World(NamedTuple):
    """The directory in which all commands ran, and what they did."""

    root: Path
    done: dict[str, tuple[int, str, str]]

    def result(self, name: str) -> dict[str, Any]:
        status, out, err = self.done[name]
        assert status == 0, err[-2000:]
        return json.loads(out.splitlines()[-1])

    def refusal(self, name: str) -> str:
        status, _, err = self.done[name]
        assert status == 2, err[-2000:]
        return err.splitlines()[-1]


@pytest.fixture(scope="module")
def world(t5x, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    synthetic.write_tasks(root / "data", num_train=24, num_validation=10, num_documents=12)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    process = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps({name: shlex.split(text) for name, text in COMMANDS.items()}),
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return World(root, json.loads((root / "done.json").read_text()))


def test_t5x_trains_and_leaves_a_checkpoint_of_ours(world):
    assert world.result("t5x pretrain")["step"] == 20
    found = world.result("inspect")
    assert found["steps"] == [0, 10, 20] and found["num_experts"] == [4, 0, 4, 0]
    assert found["optimizer_bytes"] > 2 * found["bytes"] - 100
    assert found["provenance"]["created_by"].startswith("T5X ")
    assert "train.train.model_dir = %MODEL_DIR" in found["provenance"]["gin"]
    reader = layout.StateReader(world.root / "pretrained")
    first = layout.StateReader(world.root / "pretrained" / "checkpoint_0")
    for name in ("layers_0/moe/experts/wi", "layers_2/moe/router/kernel"):
        before, after = first.read(f"target/{name}"), reader.read(f"target/{name}")
        assert np.abs(after - before).max() > 1e-4, name


def test_t5x_builds_the_token_cache_of_a_task_file(world):
    cache = TokenCache.open(world.root / "caches" / "topic" / "validation")
    assert (cache.task, cache.manifest["max_length"]) == ("synthetic_topic", 96)
    (values,) = world.result("t5x first eval")["metrics"].values()
    assert values["step"] == 20 and 0 <= values["score"] <= 100


def test_our_commands_calibrate_plan_and_prune_what_t5x_trained(world):
    assert world.result("calibrate")["moe_layers"] == [0, 2]
    assert world.result("plan")["num_experts"] == [3, 0, 2, 0]
    assert world.result("prune")["num_experts"] == [3, 0, 2, 0]
    assert world.result("verify")["verified"]


def test_t5x_goes_on_from_the_pruned_checkpoint_and_our_evaluation_agrees(world):
    trained = world.result("t5x finetune")
    assert trained["step"] == 6
    (theirs,) = trained["metrics"].values()
    ours = world.result("evaluate t5x")
    assert theirs["step"] == 6
    assert theirs["score"] == ours["score"] and theirs["accuracy"] == ours["metrics"]["accuracy"]
    pruned = layout.StateReader(world.root / "pruned")
    tuned = layout.StateReader(world.root / "t5x_finetuned")
    assert tuned.parameters() == pruned.parameters()
    assert any(name.startswith("state/param_states/") for name in tuned.metadata)
    name = "target/layers_0/moe/router/kernel"
    assert np.abs(tuned.read(name) - pruned.read(name)).max() > 1e-3
    provenance = tuned.checkpoint.provenance()
    assert provenance["source"]["fingerprint"] == world.result("prune")["fingerprint"]


def test_t5x_gives_what_we_trained_the_scores_of_our_evaluation(world):
    (theirs,) = world.result("t5x eval")["metrics"].values()
    ours = world.result("evaluate")
    assert theirs["score"] == ours["score"] and theirs["accuracy"] == ours["metrics"]["accuracy"]

    (file,) = world.result("t5x score")["out"]
    lines = (world.root / file).read_text().splitlines()
    scores = np.array([json.loads(line)["score"] for line in lines])
    predictions = (world.root / "ours.predictions.jsonl").read_text().splitlines()
    expected = np.concatenate([json.loads(line)["log_likelihoods"] for line in predictions])
    assert len(expected) == 80
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_t5x_decodes_the_text_of_our_generation(world):
    (file,) = world.result("t5x predict")["out"]
    lines = [json.loads(line) for line in (world.root / file).read_text().splitlines()]
    ours = (world.root / "generated.predictions.jsonl").read_text().splitlines()
    # A row per option, eight for each example; T5X fills the row, we make nine tokens.
    texts = [json.loads(line)["text"] for line in ours]
    assert len(lines) == 8 * len(texts)
    for place, text in enumerate(texts):
        assert text and lines[8 * place]["prediction"].startswith(text)
        prompts = {line["inputs"]["inputs_pretokenized"] for line in lines[8 * place :][:8]}
        assert len(prompts) == 1


def test_wrong_input_is_refused_in_one_sentence_before_any_work(world):
    assert "must hold no results of this mode yet, got answers/" in world.refusal("again")
    assert "must divide the number of devices, got 3 * 1 on 1" in world.refusal("devices")
    assert "must be new, empty or hold checkpoints of the same model" in world.refusal("place")
    assert "got other values of ['num_experts'] than" in world.refusal("other model")
    assert "needs a gin file that binds eval.evaluate, got none" in world.refusal("no run")
    assert not (world.root / "wrong").exists()
