"""`uncurl aot`: what is asked for, what the report says, and real compilations for TPU slices.

The last need libtpu and minutes each; they have the marker `aot` (make test-aot).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uncurl_jax.cli import commands, main
from uncurl_jax.config import DistillationConfig, ModelConfig
from uncurl_jax.deployment import aot
from uncurl_jax.deployment.aot_request import Request, make_request
from uncurl_jax.deployment.placement import Placement
from uncurl_jax.deployment.slices import load_slice
from uncurl_jax.errors import InputError
from uncurl_jax.partitioning import make_mesh

ROOT = Path(__file__).parents[2]
KIB, GIB = 2**10, 2**30
ENCODER_DECODER = ModelConfig(
    (4, 4), 32, 16, 2, 24, 16, num_encoder_layers=1, position_embedding="relative"
)


@pytest.fixture(scope="module")
def ask(stage, slice_of_eight) -> Callable[..., Request]:
    """Returns ask(**options): a request for the slice of eight."""

    def make(config: dict | None = None, **options: Any) -> Request:
        return make_request(stage(**(config or {})), slice_of_eight, **options)

    return make


def placement(**changes: Any) -> Placement:
    values: dict[str, Any] = {
        **{"slice": "v5e-8", "num_devices": 8, "mode": "train", "batch": 16, "length": 8},
        **{"accumulation_steps": 1, "num_experts": (8, 0, 4), "model_hash": ""},
        **{"expert_partitions": 4, "model_partitions": 1, "expert_axes": (("expert",), (), ())},
    }
    return Placement(**{**values, **changes})


def test_options_replace_what_the_stage_says(ask, small_model):
    plain = ask()
    assert (plain.model, plain.length, plain.rows_at_a_time) == (small_model, 8, 16)
    assert plain.programs == ("train", "calibrate", "evaluate", "decode")
    changed = ask(
        {"accumulation_steps": 2, "length": 6},
        num_experts=2,
        programs_wanted=["decode"],
        batch_size=32,
        expert_partitions=2,
        model_partitions=2,
    )
    assert changed.model.num_experts == (2, 0, 2)
    assert (changed.programs, changed.length, changed.rows_at_a_time) == (("decode",), 6, 16)
    assert (changed.config.expert_partitions, changed.config.model_partitions) == (2, 2)
    assert ask(num_experts=(4, 2), length=3).model.num_experts == (4, 0, 2)
    # A stage that goes on from a checkpoint takes the checkpoint's model.
    assert ask({"model": None}, model=small_model).model == small_model


def test_a_placement_sets_mesh_and_axes(ask):
    config = ask(placement=placement()).config
    assert config.expert_partitions == 4
    assert config.expert_axes == (("expert",), (), ())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"programs_wanted": ["trian"]}, r"one of train, .* got 'trian': nearest train\."),
        ({}, {"programs_wanted": [""]}, r"got '': choose some, with commas"),
        ({"model": None}, {}, r"aot needs a model, got a stage that goes on .* give --checkpoint"),
        (
            {"distillation": DistillationConfig()},
            *({}, r"without a teacher, .*TrainConfig\.distillation=None"),
        ),
        ({}, {"batch_size": 12}, r"got 12 for 8 \* 1: nearest --batch 8 or 16\."),
        ({}, {"batch_size": 4}, r"got 4 for 8 \* 1: nearest --batch 8\."),
        ({"accumulation_steps": 4}, {}, r"got 16 for 8 \* 4: nearest --batch 32\."),
        ({}, {"expert_partitions": 3}, r"chips of v5e-8, got 3 \* 1 for 8: nearest .* 2\."),
        ({}, {"expert_partitions": 8, "model_partitions": 2}, r"8 \* 2 for 8: nearest .* 4\."),
        ({}, {"model_partitions": 5}, r"divide the chips of v5e-8, got 5 for 8: nearest 4\."),
        ({}, {"length": 9}, r"from 1 to the model's max_length=8, got 9\."),
        ({}, {"length": 0}, r"got 0\."),
        ({}, {"num_experts": (2, 2, 2)}, r"one per MoE layer, got 3 for 2 MoE layers\."),
        (
            {},
            {"model": ENCODER_DECODER},
            r"uncurl aot takes decoders alone, got an enc",
        ),
        ({"expert_axes": ((), ())}, {}, r"one entry per layer, got 2 for 3 layers"),
        (
            {},
            {"placement": placement(), "expert_partitions": 2},
            r"--placement says how the mesh is divided, got it beside .* leave out one",
        ),
        (
            {},
            {"placement": placement(num_experts=(8, 0, 8))},
            r"for the slice and the model, got one for v5e-8 and num_experts \[8, 0, 8\]",
        ),
        (
            {},
            {"placement": placement(slice="v5e-16", num_devices=16)},
            r"got one for v5e-16 .* with v5e-8 .* make the placement again",
        ),
    ],
)
def test_a_request_that_cannot_be_is_refused(ask, config, options, message):
    with pytest.raises(InputError, match=message):
        ask(config, **options)


@pytest.fixture(scope="module")
def report(ask) -> dict[str, Any]:
    """Evaluation with experts over four of eight devices of the CPU."""
    lines: list[str] = []
    request = ask(programs_wanted=["evaluate"], expert_partitions=4)
    found = aot.check(request, make_mesh(expert_partitions=4), lines.append)
    return {**found, "lines": lines}


def test_a_report_holds_memory_communication_and_work(report):
    assert (report["fits"], report["sentence"]) == (True, None)
    assert report["mesh"] == {"data": 2, "expert": 4, "model": 1}
    evaluated = report["programs"]["evaluate"]
    hbm = evaluated["hbm"]
    assert hbm["available_bytes"] == 16e9
    assert hbm["needed_bytes"] == (
        hbm["arguments_bytes"]
        + hbm["outputs_bytes"]
        - hbm["aliased_bytes"]
        + hbm["temporaries_bytes"]
        + hbm["code_bytes"]
    )
    assert hbm["arguments_bytes"] >= sum(evaluated["argument_bytes"].values()) > 0
    totals = evaluated["collectives"]["totals"]
    assert totals["all-to-all"] == {
        "count": 4,
        "bytes_per_device": 4 * KIB,
        "bytes_on_the_wire_per_device": 3 * KIB,
    }
    rows = [r for r in evaluated["collectives"]["by_layer"] if r["kind"] == "all-to-all"]
    assert [(row["layer"], row["count"], row["direction"]) for row in rows] == [
        (0, 2, "forward"),
        (2, 2, "forward"),
    ]
    assert evaluated["flops_per_chip"] >= evaluated["model_flops_per_chip"] > 0
    assert set(evaluated["seconds"]) == {"lower", "compile"}
    assert {"jax", "jaxlib", "flax", "uncurl_jax"} <= set(report["versions"])
    json.dumps(report, allow_nan=False)


def test_progress_and_summary_say_the_main_numbers(report):
    assert report["lines"][0] == "evaluate: compiling for v5e-8 (seconds to minutes)"
    assert "of 14.9 GiB per chip; 4 all-to-all (0.0 MiB)" in report["lines"][1]
    summary = aot.summarize(report)
    assert summary["programs"]["evaluate"]["all_to_alls"] == 4
    assert summary["slice"] == "v5e-8"


def test_a_program_that_does_not_fit_is_said_with_numbers_and_remedies(ask):
    request = ask(programs_wanted=["evaluate"])
    small = dataclasses.replace(request.slice, hbm_bytes_per_chip=50_000)
    report = aot.check(request._replace(slice=small), make_mesh())
    assert not report["fits"]
    assert not report["programs"]["evaluate"]["fits"]
    sentence = report["sentence"]
    assert sentence.startswith("evaluate must fit v5e-8's 0.0 GiB of HBM per chip, got 0.0 GiB, of")
    assert "the rest what it computes for 2 rows per chip: try " in sentence
    assert sentence.endswith("a slice with more chips or more memory per chip.")


def result(needed: float, rows: int = 8, **sizes: int) -> dict[str, Any]:
    names = ("expert_parameters", "other_parameters", "expert_optimizer", "other_optimizer")
    return {
        "hbm": {"needed_bytes": needed, "available_bytes": 100, "is_lower_bound": False},
        "argument_bytes": dict.fromkeys((*names, "cache", "batch"), 0) | sizes,
        "rows_per_chip_at_a_time": rows,
    }


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        # 20 of state and 180 for 8 rows: 4 rows would take 110, 2 rows 65.
        (
            "train",
            result(200, other_parameters=20),
            ["--gin.config.TrainConfig.accumulation_steps=4", "--batch 16"],
        ),
        ("evaluate", result(200, other_parameters=20), ["--batch 16"]),
        # The cache shrinks with the rows.
        ("decode", result(150, cache=120, other_parameters=20), ["--batch 32"]),
        # Experts 80, others 10, computed 60: with 40 of experts 50 and 50/90 of 60 are 83.
        (
            "train",
            result(150, rows=1, expert_parameters=30, expert_optimizer=50, other_parameters=10),
            ["--expert_partitions 2", "pruning to 4 experts (--num_experts 4)"],
        ),
        # Forward what is computed stays: 10 + 20 + 60, not 10 + 40 + 60.
        (
            "evaluate",
            result(150, rows=1, expert_parameters=80, other_parameters=10),
            ["--expert_partitions 4", "pruning to 2 experts (--num_experts 2)"],
        ),
        # Divided among all eight chips 8 + 10 + 82, as one expert on every chip.
        (
            "evaluate",
            result(170, rows=1, expert_parameters=80, other_parameters=8),
            ["--expert_partitions 8", "pruning to 1 experts (--num_experts 1)"],
        ),
        ("train", result(400, rows=1, other_parameters=300), []),
    ],
)
def test_remedies_are_the_smallest_changes_that_would_do(ask, name, found, expected):
    request = ask({"batch_size": 64}, num_experts=8)
    remedies = aot.remedies(request, make_mesh(), name, found)
    assert [text for text in remedies if "slice" not in text] == expected


def test_pruning_and_dividing_together_is_a_remedy_where_neither_is(ask):
    # Of 32 experts, 10 each, eight chips hold four each: 10 + 40 + 70. Of 16 two: 10 + 20 + 70.
    found = result(400, rows=1, expert_parameters=320, other_parameters=10)
    first, *_ = aot.remedies(ask(num_experts=32), make_mesh(), "evaluate", found)
    assert (
        first == "pruning to 16 experts and dividing them (--num_experts 16 --expert_partitions 8)"
    )


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.5G) exceeds available HBM (15.75G).",
            19.5 * GIB + 512,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.5G.",
            17.25 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: something else", 1000),
    ],
)
def test_sizes_are_read_from_what_the_compiler_says(message, needed):
    hbm = aot.hbm_of_refusal(message, arguments=512, available=1000)
    assert (hbm["needed_bytes"], hbm["is_lower_bound"]) == (needed, True)


GIN = """
from __gin__ import dynamic_registration
from uncurl_jax import config
from uncurl_jax.training import trainer
include 'gin/models/tiny.gin'
trainer.train.config = @config.TrainConfig()
config.TrainConfig.model = @config.ModelConfig()
config.TrainConfig.num_steps = 10
config.TrainConfig.batch_size = 16
config.TrainConfig.optimizer = @config.OptimizerConfig()
config.OptimizerConfig.peak_learning_rate = 1e-3
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Returns call(*options): exit status and stderr of `uncurl aot`, run where run.gin lies."""
    monkeypatch.chdir(tmp_path)
    for name, value in commands.ENVIRONMENT["aot"].items():
        monkeypatch.setenv(name, value)
    Path("run.gin").write_text(GIN)

    def run(*options: str) -> tuple[int, str]:
        try:
            status = main(["aot", *options])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--slice v5e-16", "aot needs a stage to compile, got no TrainConfig: give --gin_file"),
        ("--gin_file run.gin --slice v5e-17", "got v5e-17: nearest v5e-16"),
        ("--gin_file run.gin --slice v5e-16 --batch 24", "nearest --batch 16 or 32."),
        ("--gin_file run.gin --slice v5e-16 --programs train,eval", "nearest evaluate."),
        ("--gin_file run.gin --slice v5e-16 --num_experts x", "counts must be whole numbers"),
        ("--gin_file run.gin --slice v5e-16 --placement none.json", "got nothing at none.json"),
        ("--gin_file run.gin --slice v5e-16 --checkpoint none", "none"),
    ],
)
def test_wrong_options_end_with_a_sentence_and_write_nothing(call, options, message):
    status, error = call(*options.split(), "--out", "out.json")
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("out.json").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here"
)
def test_without_libtpu_the_sentence_says_what_to_install(call):
    status, error = call("--gin_file", "run.gin", "--slice", "v5e-16", "--out", "out.json")
    assert status == 2
    assert "aot compiles with libtpu, got no such package" in error
    assert "pip install 'uncurl_jax[aot]', or pip install 'libtpu==" in error
    assert not Path("out.json").exists()


def compile_in_a_process(
    directory: Path, gin_file: str, *options: str
) -> tuple[int, str, dict[str, Any]]:
    """Returns status, stderr and report of `uncurl aot` as users run it."""
    out = directory / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uncurl_jax.cli", "aot"),
            *("--gin_file", gin_file, "--out", str(out), *options),
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr, json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture
def compile_354m(tmp_path) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """Returns compile_354m(*options): status, stderr and report of the paper's pretraining."""

    def run(*options: str) -> tuple[int, str, dict[str, Any]]:
        (tmp_path / "report.json").unlink(missing_ok=True)
        return compile_in_a_process(tmp_path, "gin/runs/paper_pretrain.gin", *options)

    return run


def all_to_alls(report: dict[str, Any], name: str, direction: str) -> dict[int, int]:
    """Returns {layer: all-to-alls per step} of one program and direction."""
    return {
        row["layer"]: row["count"]
        for row in report["programs"][name]["collectives"]["by_layer"]
        if (row["kind"], row["direction"]) == ("all-to-all", direction)
    }


MOE_LAYERS = range(0, 24, 2)
SLICES = sorted(path.stem for path in (ROOT / "configs" / "slices").glob("*.json"))


@pytest.mark.aot
@pytest.mark.parametrize("name", SLICES)
def test_all_programs_compile_for_every_slice(tmp_path, name):
    chips = load_slice(name, ROOT / "configs" / "slices").num_chips
    (tmp_path / "run.gin").write_text(GIN)
    status, error, report = compile_in_a_process(
        tmp_path,
        *("run.gin", "--slice", name, "--batch", str(2 * chips), "--expert_partitions", "8"),
        *("--gin.config.TrainConfig.accumulation_steps=2",),
        *("--gin.config.ModelConfig.eval_capacity_factor=1.0",),
    )
    assert status == 0, error
    assert report["mesh"] == {"data": chips // 8, "expert": 8, "model": 1}
    # MoE layers 0 and 2, of which calibration runs the experts of the first alone.
    counts = {name: all_to_alls(report, name, "forward") for name in report["programs"]}
    both = {0: 2, 2: 2}
    assert counts == {"train": {0: 4, 2: 4}, "calibrate": {0: 2}, "evaluate": both, "decode": {}}
    for program in report["programs"].values():
        assert program["collectives"]["in_loops_of_unknown_length"] == 0


@pytest.mark.aot
def test_354m_with_64_experts_trains_on_v5e_64_within_16_gb(compile_354m):
    status, error, report = compile_354m(
        *("--slice", "v5e-64", "--gin.NUM_EXPERTS=64", "--expert_partitions", "64"),
        *("--batch", "64", "--programs", "train"),
    )
    assert status == 0, error
    train = report["programs"]["train"]
    assert train["fits"]
    assert 8 * GIB / 2 < train["hbm"]["needed_bytes"] <= 16e9
    for direction in ("forward", "backward"):
        assert all_to_alls(report, "train", direction) == dict.fromkeys(MOE_LAYERS, 2)
    # 64 experts of 20 slots (1024 tokens, capacity factor 1.2), 1024 numbers of 2 bytes.
    exchanged = train["collectives"]["totals"]["all-to-all"]["bytes_per_device"]
    assert exchanged == 48 * 64 * 20 * 1024 * 2


@pytest.mark.aot
def test_354m_pruned_to_8_exchanges_tokens_only_if_experts_are_divided(compile_354m):
    options = ("--slice", "v5e-64", "--gin.NUM_EXPERTS=8", "--programs", "evaluate")
    status, error, replicated = compile_354m(*options, "--batch", "64")
    assert status == 0, error
    assert all_to_alls(replicated, "evaluate", "forward") == {}
    status, error, divided = compile_354m(*options, "--batch", "64", "--expert_partitions", "8")
    assert status == 0, error
    assert all_to_alls(divided, "evaluate", "forward") == dict.fromkeys(MOE_LAYERS, 2)


@pytest.mark.aot
def test_128_replicated_experts_do_not_fit_and_the_sentence_says_what_would(compile_354m):
    status, error, report = compile_354m(
        *("--slice", "v5e-16", "--gin.NUM_EXPERTS=128", "--batch", "16", "--programs", "train"),
    )
    assert status == 1
    assert report["fits"] is False
    sentence = error.splitlines()[-1]
    assert sentence == f"uncurl aot: {report['sentence']}"
    # Parameters and two moments of 12.96e9 float32 numbers are 145 GiB, and there is more.
    assert "train must fit v5e-16's 14.9 GiB of HBM per chip, got at least 3" in sentence
    assert "GiB, of which 146.9 are parameters, optimizer and inputs" in sentence
    assert "pruning to 32 experts and dividing them (--num_experts 32 --expert_par" in sentence
