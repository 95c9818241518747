"""From a Hugging Face directory to a smaller one, by commands; and how wrong ones are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from uncurl_jax.checkpoints.layout import open_reader, resolve

_TINY = Path(__file__).parents[1] / "checkpoints" / "huggingface" / "conftest.py"

FINETUNE = """
from __gin__ import dynamic_registration
from uncurl_jax import config
from uncurl_jax.training import trainer
trainer.train.config = @config.TrainConfig()
config.TrainConfig.num_steps = 2
config.TrainConfig.batch_size = 4
config.TrainConfig.optimizer = @config.OptimizerConfig()
config.OptimizerConfig.peak_learning_rate = 1e-2
"""

JOB = {
    "cache": "cache --task cb --data_dir data --vocabulary hf --max_length 40 --out cache",
    "calibrate": "calibrate --layer_by_layer --checkpoint hf:hf --task cache --out s.npz",
    "plan": "plan --statistics s.npz --num_experts 3 --checkpoint hf:hf --diagnose --out plan.json",
    "prune": "prune --checkpoint hf:hf --plan plan.json --format hf --max_shard_bytes 20000 "
    "--out small",
    "verify": "verify hf:small",
    "inspect": "inspect hf:small",
    "evaluate": "evaluate --checkpoint hf:small --task cache --out metrics.json",
    "evaluate named": "evaluate --checkpoint hf:small --task cb --data_dir data --out named.json",
    "generate": "evaluate --checkpoint hf:small --task cache --mode generate --max_new_tokens 3 "
    "--out generated.json",
    "compare": "compare hf:hf hf:small --task cache --out compare.json",
    "distill": "train --gin_file finetune.gin --checkpoint hf:small --teacher hf:hf "
    "--gin.config.TrainConfig.distillation=@config.DistillationConfig() "
    "--cache cache/train --out distilled",
    "import": "import --from_hf small --max_length 48 --out imported",
    "finetune": "train --gin_file finetune.gin --checkpoint imported --cache cache/train "
    "--out tuned",
    "export": "export --checkpoint tuned --format hf --dtype bfloat16 --out tuned_hf",
}


@pytest.fixture(scope="session")
def tiny():
    """The module that makes tiny Hugging Face directories."""
    spec = importlib.util.spec_from_file_location("tiny_huggingface", _TINY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_hf(tiny, path: Path, dtype=np.float32) -> Path:
    found = tiny.load_reference("qwen3_moe")
    config = found.config | {"eos_token_id": 2}
    tiny.write_directory(path, config, tiny.random_tensors(found.shapes, dtype))
    tiny.write_tokenizer(path, has_bos=False)
    return path


@pytest.fixture(scope="session")
def job(tmp_path_factory, tiny, run_all):
    """The directory, and what every command said."""
    root = tmp_path_factory.mktemp("hf_job")
    write_hf(tiny, root / "hf")
    (root / "finetune.gin").write_text(FINETUNE)
    (root / "data" / "CB").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        rows = [
            {
                "premise": " ".join(generator.choice(tiny.WORDS, 8)),
                "hypothesis": " ".join(generator.choice(tiny.WORDS, 4)),
                "label": ("entailment", "contradiction", "neutral")[number % 3],
                "idx": number,
            }
            for number in range(count)
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        (root / "data" / "CB" / f"{split}.jsonl").write_text(text)
    done = run_all(root, [command.split() for command in JOB.values()])
    return root, dict(zip(JOB, done, strict=True))


def test_every_command_of_the_job_says_one_line_of_json(job):
    for done in job[1].values():
        assert done.result


def test_the_pruned_directory_is_smaller_and_verified(job):
    root, done = job
    sizes = [
        sum(path.stat().st_size for path in (root / name).glob("*.safetensors"))
        for name in ("hf", "small")
    ]
    assert sizes[1] < 0.9 * sizes[0]
    assert len(list((root / "small").glob("*.safetensors"))) > 1
    assert done["verify"].result["verified"]
    assert done["inspect"].result["num_experts"] == [0, 3, 0, 3]
    config = json.loads((root / "small" / "config.json").read_text())
    assert config == json.loads((root / "hf" / "config.json").read_text()) | {
        "num_local_experts": 3
    }


def test_rows_are_what_the_tokenizer_makes_of_them(job):
    root, done = job
    manifest = json.loads((root / "cache" / "train" / "manifest.json").read_text())
    assert manifest["bos_id"] is None
    assert done["evaluate"].result["metrics"] == done["evaluate named"].result["metrics"]


def test_training_on_a_directory_itself_lets_its_tokenizer_follow_too(job):
    root, done = job
    assert done["compare"].result["num_examples"] == 6
    tokenizer = root / "distilled" / "huggingface" / "tokenizer.json"
    assert tokenizer.read_bytes() == (root / "hf" / "tokenizer.json").read_bytes()
    assert resolve(root / "distilled").provenance()["teacher"]["path"] == f"hf:{root / 'hf'}"


def test_a_finetuned_model_goes_back_with_its_tokenizer_in_the_dtype_asked_for(job):
    root, _ = job
    assert resolve(root / "imported").model_config().max_length == 48
    tuned = load_file(root / "tuned_hf" / "model.safetensors")
    assert {array.dtype.name for array in tuned.values()} == {"bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (root / "tuned_hf" / name).read_bytes() == (root / "hf" / name).read_bytes()
    config = json.loads((root / "tuned_hf" / "config.json").read_text())
    assert (config["dtype"], config["num_local_experts"]) == ("bfloat16", 3)
    assert config["max_position_embeddings"] == 64
    readers = [open_reader(root / "tuned"), open_reader(f"hf:{root / 'tuned_hf'}")]
    for name in readers[0].parameters():
        first, second = (reader.read(f"target/{name}") for reader in readers)
        np.testing.assert_array_equal(first.astype(second.dtype), second)


WRONG = [
    ("import --from_hf nowhere --out C", "must be an existing directory, got ...nowhere"),
    ("import --from_hf hf --out hf", "An output must not exist yet, got hf"),
    ("import --from_hf hf --max_length 900 --out C", "between 1 and ... got 900 for 64 in"),
    ("import --from_hf hf --vocabulary bytes --out C", "got two, ... leave out --vocabulary"),
    ("export --checkpoint hf:hf --format gguf --out C", "--format must be ...got 'gguf'"),
    (
        "export --checkpoint hf:hf --format hf --dtype int4 --out C",
        "--dtype must be one of ...int4",
    ),
    (
        "export --checkpoint hf:hf --format hf --max_shard_bytes 0 --out C",
        "max_shard_bytes must be at least 1, got 0",
    ),
    ("inspect hf:nowhere", "must be an existing directory"),
    ("calibrate --checkpoint hf:hf --task nowhere --out s.npz", "nowhere"),
]


@pytest.mark.parametrize(("command", "sentence"), WRONG)
def test_wrong_conversions_are_refused(command, sentence, tiny, uncurl, tmp_path):
    write_hf(tiny, tmp_path / "hf")
    done = uncurl(*command.split())
    assert done.status == 2 and done.out == ""
    assert done.err.count("\n") == 1, done.err
    place = 0
    for part in sentence.split("..."):
        place = done.err.find(part, place)
        assert place >= 0, f"{part!r} is not in {done.err!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_prune_with_options_of_another_format_is_refused(job, uncurl, tmp_path):
    root, _ = job
    arguments = ["prune", "--checkpoint", f"hf:{root / 'hf'}", "--plan", root / "plan.json"]
    done = uncurl(*arguments, "--max_shard_bytes", "10", "--out", "C")
    assert done.status == 2 and "--max_shard_bytes goes with --format hf" in done.err
    done = uncurl(*arguments, "--format", "hff", "--out", "C")
    assert done.status == 2 and '--format must be "uncurl" or "hf"' in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--num_experts 2,3", "has one number of experts ... [0, 2, 0, 3]: plan with a uniform"),
        ("--num_experts 3 --router remap", "cannot express routers ... as reference, or give"),
        ("--num_experts 3 --format safetensors", '--format must be "uncurl" or "hf"'),
    ],
)
def test_plans_that_could_not_go_back_are_refused(options, sentence, job, uncurl, tmp_path):
    root, _ = job
    command = ["plan", "--statistics", root / "s.npz", "--out", "plan.json", *options.split()]
    done = uncurl(*command)
    assert done.status == 2 and done.err.count("\n") == 1
    place = 0
    for part in sentence.split("..."):
        place = done.err.find(part, place)
        assert place >= 0, f"{part!r} is not in {done.err!r}"
    assert list(tmp_path.iterdir()) == []
    if "safetensors" not in options:
        assert uncurl(*command, "--format", "uncurl").status == 0
