"""`uncurl bench` on eight host devices. The times mean nothing here; all else does."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from uncurl_jax import artifacts
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.cli import main
from uncurl_jax.config import ModelConfig
from uncurl_jax.deployment import (
    bench,
    bench_cells,
    bench_programs,
    bench_summary,
    bench_view,
)
from uncurl_jax.deployment.bench_settings import (
    BenchModel,
    BenchSettings,
    Layout,
    backbone_name,
    resolve_layout,
)
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.reporting import report_bench
from uncurl_jax.models.architecture import init_params

MODEL = ModelConfig(
    num_experts=(8,),
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=16,
    eval_capacity_factor=1.0,
    min_capacity=1,
    dtype="float32",
)
# Experts over all eight devices, which are a mesh of 4 * 2.
PLACEMENT = {
    "expert_partitions": 2,
    "model_partitions": 1,
    "expert_axes": [["data", "expert"]],
    "reason": "not read",
}
GIN = """
from __gin__ import dynamic_registration
from uncurl_jax import config
config.ModelConfig.num_experts = (8,)
config.ModelConfig.vocab_size = 32
config.ModelConfig.embed_dim = 16
config.ModelConfig.num_heads = 2
config.ModelConfig.mlp_dim = 24
config.ModelConfig.max_length = 16
config.ModelConfig.dtype = 'float32'
"""
OPTIONS = {
    "devices": (1, 8),
    "length": 8,
    "decode_batches": (1,),
    "decode_steps": 2,
    "layer_calls": 2,
    "repeats": 3,
    "warmup": 1,
}
QUICK = {**OPTIONS, "measure": ("forward",), "devices": (1,)}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with a gin file, a placement and one finished benchmark, bench.json."""
    root = tmp_path_factory.mktemp("bench")
    (root / "model.gin").write_text(GIN)
    artifacts.write_json(root / "placement.json", PLACEMENT)
    bench.run_bench(
        out=root / "bench.json",
        model=MODEL,
        layouts=("sharded", "placement"),
        placement=root / "placement.json",
        **OPTIONS,
    )
    return root


@pytest.fixture
def record(directory) -> dict:
    return artifacts.read_json(directory / "bench.json")


def of_layout(record: dict, layout: str) -> dict:
    (cell,) = [cell for cell in record["cells"] if cell["layout"] == layout]
    return cell


def numbers(value: object, path: str = ""):
    """Yields every number of a record with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{place}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


TIMING = {"seconds", "interval", "confidence", "samples", "calls_per_sample"}


def check_timing(timing: dict, *others: str) -> None:
    assert set(timing) == TIMING | set(others)
    low, high = timing["interval"]
    assert 0 < low <= timing["seconds"] <= high
    assert timing["samples"] == OPTIONS["repeats"]


# What a record holds


def test_a_record_has_every_field_and_only_finite_numbers(record):
    assert record["schema"] == "uncurl_jax.bench/1"
    assert set(record) == {
        *("schema", "command", "versions", "device", "is_functional_only", "note", "settings"),
        *("models", "cells", "weak_scaling", "speedups", "pictures"),
    }
    assert all(math.isfinite(number) for _, number in numbers(record))
    assert record["device"]["count"] == 8 and record["device"]["host"]["cores"] >= 1
    assert {"python", "jax", "jaxlib", "flax", "uncurl_jax"} <= set(record["versions"])
    assert record["settings"]["seed"] == 0 and record["settings"]["decode_batches"] == [1]
    assert record["settings"]["inference_parameters"].startswith("compute dtype; routers")
    (model,) = record["models"]
    assert model["parameters_from"] == "random" and model["checkpoint"] is None
    assert model["num_experts"] == [8] and model["name"].endswith("+8e")
    assert ModelConfig.from_dict(model["config"]) == MODEL


def test_a_cell_has_every_measurement(record):
    assert [(cell["devices"], cell["layout"]) for cell in record["cells"]] == [
        (1, "single"),
        (8, "sharded"),
        (8, "placement"),
    ]
    for cell in record["cells"]:
        assert cell["status"] == "measured"
        assert math.prod(cell["mesh"].values()) == cell["devices"]
        assert cell["tokens"] == 2 * cell["devices"] * 8
        for name in ("forward", "prefill"):
            check_timing(cell[name], "tokens_per_second")
            rate = cell["tokens"] / cell[name]["seconds"]
            assert cell[name]["tokens_per_second"] == pytest.approx(rate)
        (one,) = cell["decode"]
        check_timing(one, "batch", "rows", "tokens_per_second")
        # One row decodes; the others that the devices need have ended.
        assert (one["batch"], one["rows"]) == (1, cell["devices"])
        assert one["calls_per_sample"] == 2
        assert one["tokens_per_second"] == pytest.approx(1 / one["seconds"])
        check_timing(cell["launch"])
        check_timing(cell["reference"], "product", "flops_per_second")
        assert cell["memory"]["argument_bytes"] > 0
        for kind in cell["moe_layers"]:
            check_timing(kind["experts"])
            check_timing(kind["layer"])
            assert kind["layer"]["calls_per_sample"] == 2
            if kind["communication"] is not None:
                others = ("kind", "bytes_per_device", "collectives")
                check_timing(kind["communication"], *others)
                # One there and one back: the compiler did not cancel them.
                assert kind["communication"]["collectives"] == 2
        assert sum(cell["split"].values()) == pytest.approx(cell["forward"]["seconds"])


def test_a_record_says_where_the_experts_of_each_layer_are(record):
    for layout, axes in (("sharded", ["expert"]), ("placement", ["data", "expert"])):
        (kind,) = of_layout(record, layout)["moe_layers"]
        assert (kind["layers"], kind["expert_axes"], kind["group_size"]) == ([0], axes, 8)
        # 16 tokens of a device for 8 experts: 2 slots, of each of the 8 devices.
        assert (kind["capacity"], kind["slots_per_expert"]) == (2, 16)


def test_bytes_on_the_wire_are_those_of_the_compiled_program(record):
    """8 experts * 2 slots * 16 * 4 bytes = 1024, there and back, 7/8 of it to others: 1792."""
    assert of_layout(record, "single")["communication"] is None
    for layout in ("sharded", "placement"):
        found = of_layout(record, layout)["communication"]
        assert found["expected_bytes_per_device"] == found["compiled_bytes_per_device"] == 1792
        assert found["is_equal"]
        (kind,) = of_layout(record, layout)["moe_layers"]
        assert kind["communication"]["bytes_per_device"] == 1792


def test_several_devices_give_the_logits_of_one(record):
    assert of_layout(record, "single")["equality"] is None
    for layout in ("sharded", "placement"):
        check = of_layout(record, layout)["equality"]
        assert check["is_equal"] and check["share_within_tolerance"] == 1.0
        assert check["largest_relative_error"] <= check["tolerance"] == 1e-5
        assert check["compared_tokens"] == 16 * 8


def test_weak_scaling_compares_with_one_device(record):
    assert [entry["layout"] for entry in record["weak_scaling"]] == [*("sharded", "placement")]
    one = of_layout(record, "single")["forward"]["seconds"]
    for entry in record["weak_scaling"]:
        first, last = entry["points"]
        assert (first["devices"], first["efficiency"], first["seconds"]) == (1, 1.0, one)
        assert last["devices"] == 8
        assert last["efficiency"] == pytest.approx(one / last["seconds"])


def test_speedups_are_against_the_largest_model_in_its_best_layout():
    """On 8 devices: 128 experts take 4 ms sharded and 5 replicated, 8 experts 3 and 1."""
    seconds = {
        ("large", "sharded"): 4.0,
        ("large", "replicated"): 5.0,
        ("small", "sharded"): 3.0,
        ("small", "replicated"): 1.0,
    }
    cells = [
        {
            "model": model,
            "layout": layout,
            "devices": 8,
            "status": "measured",
            "forward": {"seconds": value},
            "prefill": None,
            "decode": [{"batch": 1, "seconds": 2 * value}],
        }
        for (model, layout), value in seconds.items()
    ]
    cells.append({**cells[0], "layout": "placement", "status": "out_of_memory"})
    models = [
        {"name": "small", "backbone": "354M", "parameters": 8},
        {"name": "large", "backbone": "354M", "parameters": 128},
    ]
    found = bench_summary.speedups(models, cells)
    assert [entry["forward"] for entry in found] == [1.0, 0.8, pytest.approx(4 / 3), 4.0]
    assert all(entry["against"] == {"model": "large", "layout": "sharded"} for entry in found)
    assert found[-1]["decode"] == [{"batch": 1, "speedup": 4.0}] and found[-1]["prefill"] is None


def test_figures_of_host_devices_are_marked_as_functional(record):
    assert record["is_functional_only"] is True
    assert "functional, not performance" in record["note"]


def test_pictures_stand_beside_the_record_and_say_what_they_show(record, directory):
    assert [picture["png"] for picture in record["pictures"]] == [
        *("bench_experts.png", "bench_devices.png")
    ]
    for picture in record["pictures"]:
        assert (directory / picture["png"]).read_bytes().startswith(b"\x89PNG")
        svg = (directory / picture["svg"]).read_text()
        assert '<svg role="img" aria-label="Latency against' in svg
        assert record["models"][0]["name"] in picture["alt"]
        assert "functional, not performance" in picture["alt"]
        assert "the paper" not in svg
    assert {path.name for path in directory.iterdir()} == {
        *("model.gin", "placement.json", "bench.json"),
        *(path.name for path in bench_view.picture_paths(directory / "bench.json")),
    }


def test_the_report_reads_this_schema():
    assert bench.SCHEMA == report_bench.SCHEMA


# Going on


def test_an_interrupted_benchmark_goes_on_where_it_stopped(tmp_path):
    out, partial = tmp_path / "bench.json", tmp_path / "bench.json.partial"
    options = {**QUICK, "devices": (1, 2), "layouts": ("replicated",)}
    # What a kill in the middle of the first line leaves.
    partial.write_text('{"schema": "unc')
    said: list[str] = []

    def interrupt(sentence: str) -> None:
        said.append(sentence)
        if "1 of 2 done" in sentence:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(out=out, model=MODEL, progress=interrupt, **options)
    begun, measured = artifacts.read_json_lines(partial)
    assert begun["schema"] == bench.SCHEMA and measured["layout"] == "single"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json.partial"]

    with pytest.raises(InputError, match="goes on as it began, got other settings than in bench"):
        bench.run_bench(out=out, model=MODEL, **{**options, "seed": 1})
    other = dataclasses.replace(MODEL, mlp_dim=32)
    with pytest.raises(InputError, match="got other models than in bench"):
        bench.run_bench(out=out, model=other, **options)
    assert artifacts.read_json_lines(partial) == [begun, measured]
    elsewhere = {**begun, "device": {**begun["device"], "kind": "TPU v5e"}}
    moved = tmp_path / "new" / "bench.json.partial"
    moved.parent.mkdir()
    artifacts.append_json_line(moved, elsewhere)
    with pytest.raises(InputError, match="got other devices than in bench"):
        bench.run_bench(out=tmp_path / "new" / "bench.json", model=MODEL, **options)

    said.clear()
    result = bench.run_bench(out=out, model=MODEL, progress=said.append, **options)
    assert "1 of 2 measurements were there already." in said
    assert not any("on 1 (single)" in sentence for sentence in said)
    assert result["cells"][0] == measured and result["cells"][1]["devices"] == 2
    assert not partial.exists() and artifacts.read_json(out) == result


# Other inputs


def test_what_an_interrupted_benchmark_measured_can_be_a_record(directory, tmp_path, capsys):
    finished = artifacts.read_json(directory / "bench.json")
    made_last = ("cells", "weak_scaling", "speedups", "pictures")
    head = {name: value for name, value in finished.items() if name not in made_last}
    partial = tmp_path / "bench.json.partial"
    for line in (head, *finished["cells"][:2]):
        artifacts.append_json_line(partial, line)
    out = tmp_path / "so_far.json"
    assert main(["bench", "--so_far", str(partial), "--out", str(out)]) == 0
    record = artifacts.read_json(out)
    assert record["cells"] == finished["cells"][:2] and record["unmeasured"] == 1
    assert all((tmp_path / picture["png"]).is_file() for picture in record["pictures"])
    assert partial.is_file()
    assert "cells that are missing: 1." in " ".join(report_bench.sentences(record))
    capsys.readouterr()
    for source, options, sentence in (
        (partial, ["--out", str(tmp_path / "bench.json")], "another file than the benchmark's own"),
        (partial, ["--out", str(out)], "so_far.json"),
        (partial, ["--out", str(tmp_path / "x.json"), "--repeats", "9"], "got --repeats too"),
        (tmp_path / "none", ["--out", str(tmp_path / "x.json")], "left with measurements in it"),
    ):
        assert main(["bench", "--so_far", str(source), *options]) == 2
        assert sentence in capsys.readouterr().err


def test_a_checkpoint_is_measured_with_its_own_parameters(tmp_path):
    config = dataclasses.replace(MODEL, num_experts=(4,))
    with CheckpointStore(
        tmp_path / "pruned",
        model_config=config,
        provenance={"created_by": "test"},
        vocabulary={"name": "bytes", "spec": "bytes", "size": 32, "hash": "x"},
    ) as checkpoints:
        checkpoints.save(3, init_params(config, 5))
    result = bench.run_bench(
        out=tmp_path / "bench.json",
        checkpoints=[tmp_path / "pruned"],
        **{
            **QUICK,
            "devices": (8,),
            "layouts": ("group:8",),
            "measure": ("forward", "equality", "bytes"),
        },
    )
    (model,), (cell,) = result["models"], result["cells"]
    assert (model["name"], model["parameters_from"]) == ("pruned", "checkpoint")
    assert model["checkpoint"]["step"] == 3 and model["checkpoint"]["fingerprint"]
    assert (cell["layout"], cell["mesh"]) == ("sharded", {"data": 1, "expert": 8, "model": 1})
    assert cell["equality"]["is_equal"]
    # 4 experts on 8 devices are padded to 8; 16 / 4 = 4 slots of 16 * 4 bytes, there and back.
    sent = 2 * 8 * 4 * 16 * 4 * 7 // 8
    assert cell["communication"]["expected_bytes_per_device"] == sent
    assert cell["communication"]["compiled_bytes_per_device"] == sent
    assert cell["communication"]["other_bytes_per_device"] > 0
    assert cell["prefill"] is None and cell["decode"] == [] and cell["split"] is None
    assert str(tmp_path) not in (tmp_path / "bench.json").read_text()


def test_a_dropless_model_gathers_instead(tmp_path):
    """A device sends its 16 tokens of 16 * 4 bytes, index and gate; as large results come back."""
    config = dataclasses.replace(MODEL, num_experts=(4,), eval_capacity_factor=None)
    result = bench.run_bench(
        out=tmp_path / "bench.json",
        model=config,
        **{
            **QUICK,
            "devices": (2,),
            "layouts": ("sharded",),
            "measure": ("forward", "layers", "equality", "bytes"),
        },
    )
    (cell,) = result["cells"]
    (kind,) = cell["moe_layers"]
    assert kind["communication"]["kind"] == bench_programs.GATHER_SCATTER
    assert kind["capacity"] is None and kind["slots_per_expert"] == 8
    sent = 16 * (16 * 4 + 8 + 16 * 4)
    assert kind["communication"]["bytes_per_device"] == sent
    assert kind["communication"]["collectives"] == 2
    assert cell["equality"]["is_equal"]
    assert cell["communication"]["expected_bytes_per_device"] == sent
    assert cell["communication"]["compiled_bytes_per_device"] == sent


def test_the_training_step_is_measured_if_asked_for(tmp_path):
    config = dataclasses.replace(MODEL, num_experts=(4,))
    result = bench.run_bench(out=tmp_path / "bench.json", model=config, has_training=True, **QUICK)
    training = result["cells"][0]["training"]
    others = ("status", "tokens_per_second", "model_flops_per_second", "mfu")
    check_timing(training, *others)
    assert training["status"] == "measured" and training["mfu"] is None
    assert training["tokens_per_second"] == pytest.approx(16 / training["seconds"])
    shown = dict(zip(report_bench.COLUMNS, report_bench.cells(result["cells"][0]), strict=True))
    assert shown["training tokens/s"] == f"{training['tokens_per_second']:,.0f}"
    assert shown["MFU, %"] == "–"


def test_a_benchmark_needs_no_package_but_jax_and_its_kin(tmp_path):
    """As on a machine without SeqIO, TensorFlow and all that only other commands use."""
    absent = (
        *("seqio", "tensorflow", "tensorboardX", "sklearn", "tqdm", "sentencepiece"),
        *("tokenizers", "threadpoolctl"),
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); " + (
        "from uncurl_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "model.gin").write_text(GIN)
    options = "bench --gin_file model.gin --num_experts 4 --devices 1 --measure forward --length 8"
    done = subprocess.run(
        [sys.executable, "-c", code, *options.split(), "--repeats", "2", "--out", "bench.json"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("functional, not performance") == 1
    printed = json.loads(done.stdout)
    assert printed["cells"] == 1 and printed["is_functional_only"] is True
    assert printed["equal_to_one_device"] is None


# Wrong inputs: one sentence, status 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "A benchmark needs a model, got none: give --checkpoint, or --gin_file"),
        ("--num_experts 4", "--num_experts needs an architecture, got none"),
        ("--checkpoint nowhere", "A checkpoint must be an existing directory, got nowhere"),
        ("MODEL --devices 16", "--devices must be from 1 to the 8 present, got 16: choose some of"),
        ("MODEL --devices 0,8", "--devices must be from 1 to the 8 present, got 0"),
        ("MODEL --devices 8,8", "devices must name at least one, each once, got (8, 8)"),
        ("MODEL --layouts shraded", "got 'shraded': nearest sharded"),
        (
            "MODEL --devices 1,8 --layouts group:3",
            "must divide the number of devices, got group:3 on 8: choose group:2 or group:4",
        ),
        ("MODEL --layouts placement", "The layout placement needs a file, got no --placement"),
        (
            "MODEL --devices 3 --placement placement.json",
            "must divide the number of devices, got 2 * 1 on 3: choose --devices 2 or a multiple",
        ),
        ("MODEL --placement nowhere.json", "must exist, got nothing at nowhere.json"),
        (
            "MODEL --placement bench.json",
            "A placement must have expert_partitions, model_partitions, expert_axes, got "
            "bench.json without expert_partitions",
        ),
        (
            "MODEL --num_experts 4 --placement short.json",
            "expert_axes must have one entry per layer, got 2 for 1 layers",
        ),
        (
            "MODEL --decode_batches 1,20",
            "must be 1 or a multiple of the devices that share a batch, got 20 on 8: choose 16 or",
        ),
        ("MODEL --length 17", "max_length of each model, got 17 for ...with 16: choose"),
        ("MODEL --length 16", "together must be at most ...got 16 + 2 for ...: choose --length 14"),
        (
            "MODEL --gin.config.ModelConfig.num_experts=(8,8) "
            "--gin.config.ModelConfig.num_encoder_layers=1 "
            "--gin.config.ModelConfig.position_embedding='relative'",
            "uncurl bench takes decoders alone, got an encoder-decoder, whose first 1 of 2 layers",
        ),
        ("MODEL --repeats 0", "repeats must be at least 1, got 0"),
        ("MODEL --warmup 0", "warmup must be at least 1, got 0: the first round compiles"),
        ("MODEL --measure forwrad", "got 'forwrad': nearest forward"),
        ("MODEL --batch_per_device 0", "batch_per_device must be at least 1, got 0"),
        ("MODEL --out bench.json", "An output must not exist yet, got bench.json"),
        ("MODEL --out other.json", "An output must not exist yet, got other_experts.png"),
        ("MODEL --lengths 8", "got --lengths: nearest --length"),
    ],
)
def test_a_wrong_input_is_refused_in_one_sentence(
    arguments, sentence, directory, tmp_path, monkeypatch, capsys
):
    for name in ("model.gin", "placement.json", "bench.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    artifacts.write_json(tmp_path / "short.json", {**PLACEMENT, "expert_axes": [[], []]})
    (tmp_path / "other_experts.png").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = arguments.replace("MODEL", "--gin_file model.gin").split()
    if "--length" not in words:
        words += ["--length", "8"]
    if "--out" not in words:
        words += ["--out", "new.json"]
    try:
        status = main(["bench", "--decode_steps", "2", *words])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert said.err.count("\n") == 1, said.err
    place = 0
    for part in sentence.split("..."):
        place = said.err.find(part, place)
        assert place >= 0, f"{part!r} is not in {said.err!r}"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# Parts


def test_logits_that_differ_are_found():
    generator = np.random.default_rng(0)
    one = generator.normal(size=(2, 10, 8))
    several = one.copy()
    assert bench_cells.compare_logits(several, one, "float32")["is_equal"]
    several[0, 3] *= 1.1
    found = bench_cells.compare_logits(several, one, "float32")
    assert not found["is_equal"] and found["share_within_tolerance"] == 0.95
    assert found["largest_relative_error"] == pytest.approx(0.1)
    # In bfloat16 one token in twenty may have gone to another expert.
    assert bench_cells.compare_logits(several, one, "bfloat16")["is_equal"]
    several[0, 4] *= 1.1
    assert not bench_cells.compare_logits(several, one, "bfloat16")["is_equal"]


def test_running_out_of_device_memory_is_told_from_other_failures():
    def fail(message: str):
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(bench_cells.OutOfMemoryError, match="8 bytes"):
        bench_cells.in_memory(lambda: fail("RESOURCE_EXHAUSTED: 8 bytes"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        bench_cells.in_memory(lambda: fail("INTERNAL: broken"))


def failing_reference(failures: int) -> bench_programs.Reference:
    """A reference product for which the devices have no memory at first."""
    product = bench_programs.reference_product()
    left = [failures]

    def run():
        left[0] -= 1
        if left[0] >= 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return product.alternative.run()

    return product._replace(alternative=product.alternative._replace(run=run))


def test_layouts_that_do_not_fit_together_are_measured_one_by_one():
    settings = BenchSettings(
        **{**OPTIONS, "layouts": ("sharded", "replicated"), "measure": ()},
        placement=None,
        batch_per_device=2,
        seed=0,
        has_training=False,
    )
    subject = bench_cells.Subject(BenchModel("small", MODEL, None), 2, settings)
    layouts = [resolve_layout(name, 2, 1) for name in settings.layouts]
    cells = bench_cells.measure(subject, layouts, failing_reference(1))
    assert [cell["layout"] for cell in cells] == ["sharded", "replicated"]
    assert [cell["status"] for cell in cells] == ["measured", "measured"]
    lost, kept = bench_cells.measure(subject, layouts, failing_reference(2))
    assert (lost["layout"], lost["status"]) == ("sharded", "out_of_memory")
    assert lost["message"] == "RESOURCE_EXHAUSTED: Out of memory"
    assert (kept["layout"], kept["status"]) == ("replicated", "measured")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_units_and_experts_can_be_divided_together(dtype, tmp_path):
    """A mesh of 2 * 2 * 2; one layer's experts over four devices, another's on each of them."""
    config = dataclasses.replace(MODEL, num_experts=(5, 0, 8), num_selected_experts=2, dtype=dtype)
    placement = {
        "expert_partitions": 2,
        "model_partitions": 2,
        "expert_axes": [["data", "expert"], [], []],
    }
    artifacts.write_json(tmp_path / "placement.json", placement)
    result = bench.run_bench(
        out=tmp_path / "bench.json",
        model=config,
        layouts=("placement",),
        placement=tmp_path / "placement.json",
        has_training=True,
        **{**OPTIONS, "decode_batches": (1, 8)},
    )
    one, eight = result["cells"]
    assert eight["mesh"] == {"data": 2, "expert": 2, "model": 2}
    assert eight["equality"]["is_equal"]
    assert [kind["padded_experts"] for kind in eight["moe_layers"]] == [8, 8]
    assert [step["rows"] for step in eight["decode"]] == [4, 8]
    assert one["training"]["status"] == eight["training"]["status"] == "measured"
    if dtype == "float32":
        assert eight["communication"]["is_equal"]


def test_layers_are_grouped_by_shape_and_place():
    """16 tokens of a device: 2 slots for each of 8 experts, 4 for each of 4."""
    config = dataclasses.replace(MODEL, num_experts=(8, 0, 4, 0, 8))
    axes = (("data", "expert"), (), ("expert",), (), ())
    mixed = Layout("placement", 4, 2, 1, axes)
    kinds = bench_programs.layer_kinds(config, mixed, 16)
    keys = ("layers", "num_experts", "padded_experts", "capacity", "expert_axes", "group_size")
    assert [tuple(getattr(kind, key) for key in keys) for kind in kinds] == [
        ((0,), 8, 8, 2, ("data", "expert"), 8),
        ((2,), 4, 4, 4, ("expert",), 2),
        ((4,), 8, 8, 2, (), 1),
    ]
    assert [kind.communication for kind in kinds] == ["all_to_all", "all_to_all", None]
    assert [kind.bytes_per_device(config, 16) for kind in kinds] == [1792, 1024, 0]
    (padded, divided) = bench_programs.layer_kinds(config, Layout("sharded", 1, 8, 1, None), 16)
    assert (padded.layers, divided.layers) == ((0, 4), (2,))
    assert (divided.num_experts, divided.padded_experts) == (4, 8)


def test_the_names_of_layouts_on_eight_devices():
    everywhere = ((), ())
    assert resolve_layout("sharded", 8, 2) == Layout("sharded", 1, 8, 1, None)
    assert resolve_layout("group:2", 8, 2) == Layout("group:2", 4, 2, 1, None)
    assert resolve_layout("group:8", 8, 2) == Layout("sharded", 1, 8, 1, None)
    assert resolve_layout("group:1", 8, 2) == Layout("replicated", 8, 1, 1, everywhere)
    assert resolve_layout("replicated", 8, 2) == Layout("replicated", 8, 1, 1, everywhere)
    assert resolve_layout("replicated", 1, 2).name == "single"


def test_a_random_model_is_named_as_in_the_paper():
    """Section 3 of arXiv 2409.01483: 354M+8e; only shapes are computed here."""
    config = ModelConfig(
        num_experts=(8, 0) * 12,
        vocab_size=50258,
        embed_dim=1024,
        num_heads=16,
        mlp_dim=4096,
        max_length=1024,
    )
    assert backbone_name(config) == "354M"


def test_random_values_have_the_standard_deviation_asked_for():
    values = np.asarray(bench_programs.random_values((200, 50), "float32", None, 3, 0.5, 1.0))
    assert values.mean() == pytest.approx(1.0, abs=0.02)
    assert values.std() == pytest.approx(0.5, rel=0.02)
    assert len(np.unique(values)) > 9_900
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.3
    others = np.asarray(bench_programs.random_values((200, 50), "float32", None, 4, 0.5, 1.0))
    assert abs(np.corrcoef(values.ravel(), others.ravel())[0, 1]) < 0.05
