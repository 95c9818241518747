"""Records of `uncurl bench` in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uncurl_jax import artifacts
from uncurl_jax.deployment import bench, bench_summary, bench_view
from uncurl_jax.errors import InputError
from uncurl_jax.experiments.reporting import report, report_bench


def timing(seconds: float, tokens: int | None = None) -> dict[str, Any]:
    rate = {} if tokens is None else {"tokens_per_second": tokens / seconds}
    return {
        "seconds": seconds,
        "interval": [0.95 * seconds, 1.05 * seconds],
        "confidence": 0.9586,
        "samples": 20,
        "calls_per_sample": 1,
        **rate,
    }


def make_cell(experts: int, layout: str, milliseconds: float, **others: Any) -> dict[str, Any]:
    forward, is_sharded = 1e-3 * milliseconds, layout == "sharded"
    communication = {"kind": "all_to_all", "bytes_per_device": 2**20, **timing(1e-4)}
    kind = {
        "layers": [0, 2],
        "num_experts": experts,
        "communication": communication if is_sharded else None,
        "experts": timing(2e-4),
        "layer": timing(4e-4),
    }
    sent = 2 * 2**20 if is_sharded else 0
    return {
        "model": f"354M+{experts}e",
        "devices": 8,
        "layout": layout,
        "mesh": {"data": 1, "expert": 8, "model": 1},
        "batch": 16,
        "length": 256,
        "tokens": 4096,
        "status": "measured",
        "forward": timing(forward, 4096),
        "prefill": timing(forward, 4096),
        "decode": [{"batch": 64, "rows": 64, **timing(forward / 2, 64)}],
        "moe_layers": [kind],
        "split": {
            "communication_seconds": 2e-4 if is_sharded else 0.0,
            "experts_seconds": 4e-4,
            "routing_seconds": 2e-4,
            "other_seconds": forward - 8e-4,
        },
        "communication": {
            "expected_bytes_per_device": sent,
            "compiled_bytes_per_device": sent,
            "is_equal": True,
        },
        "equality": {"is_equal": True},
        "training": {"status": "measured", "mfu": 0.25, **timing(4 * forward, 4096)},
        **others,
    }


def make_record(**others: Any) -> dict[str, Any]:
    cells = [
        make_cell(128, "sharded", 8.0),
        make_cell(8, "sharded", 6.0),
        make_cell(8, "replicated", 2.0),
        {**make_cell(128, "replicated", 1.0), "status": "out_of_memory"},
    ]
    models = [
        {
            "name": f"354M+{count}e",
            "backbone": "354M",
            "parameters_from": "random",
            "num_experts": [count, count],
            "parameters": count,
        }
        for count in (8, 128)
    ]
    return {
        "schema": report_bench.SCHEMA,
        "versions": {"jax": "0.10.2"},
        "device": {"kind": "TPU <v5e>", "count": 8},
        "is_functional_only": False,
        "note": None,
        "settings": {"batch_per_device": 2, "length": 256, "repeats": 20},
        "models": models,
        "cells": cells,
        "weak_scaling": bench_summary.weak_scaling(cells),
        "speedups": bench_summary.speedups(models, cells),
        **others,
    }


def write_record(path: Path, **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = make_record(**others)
    record["pictures"] = bench_view.write_pictures(record, path)
    artifacts.write_json(path, record)
    return path


def test_a_directory_with_a_benchmark_alone_is_reported(tmp_path):
    write_record(tmp_path / "bench.json")
    result = report.write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == result
    assert result["rows"] == [] and result["title"] == "Benchmarks"
    (measured,) = result["benches"]
    assert measured["file"] == "bench.json" and not measured["is_functional_only"]
    assert measured["sentences"] == [
        "1 of 4 did not fit into the devices' memory.",
        "On 8 devices, 354M+128e (sharded) takes 8 ms for a forward pass, 354M+8e (replicated) "
        "2 ms: 4 times as fast.",
        "Every layout that was compared gives the logits of one device.",
    ]
    assert measured["rows"][0] == [
        *("354M+128e", "8", "sharded", "8", "7.6 to 8.4", "0.2", "0.4", "512,000", "512,000"),
        *("16,000 (64)", "128,000", "25.0", "2", "yes"),
    ]
    assert measured["rows"][3][:4] == ["354M+128e", "8", "replicated", "out of memory"]


def test_the_page_holds_table_and_pictures_and_fetches_nothing(tmp_path):
    write_record(tmp_path / "results" / "bench_h200.json")
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Latency and communication" in page and "results/bench_h200.json" in page
    assert "8 x TPU &lt;v5e&gt;" in page and "<v5e>" not in page
    assert page.count("<svg") == page.count("</svg>") == 2
    assert page.count('role="img"') == 2 and 'aria-label="Latency against experts' in page
    # The paper's times stand beside ours and are marked as the paper's.
    assert "arXiv 2409.01483, Figs. 4, 5" in page
    for forbidden in ("http:", "https:", "<script", "src=", "@import", "//", str(tmp_path)):
        assert forbidden not in page, forbidden


def test_pictures_that_are_gone_leave_the_table(tmp_path):
    path = write_record(tmp_path / "bench.json")
    for picture in bench_view.picture_paths(path):
        picture.unlink()
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page and "512,000" in page


def test_host_devices_are_said_to_be_functional_only(tmp_path):
    write_record(tmp_path / "bench.json", is_functional_only=True, note=bench.FUNCTIONAL_ONLY)
    result = report.write_report(tmp_path)
    assert result["headline"].startswith(
        "8 host devices of one CPU (functional, not performance): 1 of 4"
    )
    assert result["benches"][0]["sentences"][0] == bench.FUNCTIONAL_ONLY
    assert "functional, not performance" in (tmp_path / "report.html").read_text()


def test_a_study_with_a_benchmark_shows_both(tmp_path):
    run = {
        **{"schema": "uncurl_jax run 2", "stage": "evaluate", "name": "runs/a/metrics.json"},
        **{"inputs": [], "tokens": 9, "seconds": 1.0, "versions": {"uncurl_jax": "0.1.0"}},
        **{"run": "a", "kind": "unpruned", "task": "rte", "seed": 0, "num_experts": 8},
        **{"source_num_experts": 8, "method": None, "router": None, "num_experts_per_layer": [8]},
        **{"score": 70.0, "interval": [66.0, 74.0], "num_examples": 277, "metrics": {}},
        **{"fraction_tokens_left_behind": 0.0, "parameters": 9, "active_parameters": 3},
        **{"bytes": 36, "checkpoint": None, "plan": None, "predictions": None, "statistics": None},
    }
    artifacts.append_json_line(tmp_path / "runs.jsonl", run)
    study = {"schema": "uncurl_jax study 2", "title": "A study", "config": {}}
    artifacts.write_json(tmp_path / "study.json", study)
    write_record(tmp_path / "bench.json")
    result = report.write_report(tmp_path)
    assert result["title"] == "A study" and len(result["benches"]) == len(result["rows"]) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.index("<h2>Models") < page.index("<h2>Latency") < page.index("<h2>How to read")


def test_another_schema_or_a_part_of_a_record_is_refused_and_other_files_are_left_alone(tmp_path):
    artifacts.write_json(tmp_path / "bench_of_mine.json", {"seconds": 1})
    artifacts.write_json(tmp_path / "bench_list.json", [1])
    with pytest.raises(InputError, match=r"must have a runs\.jsonl"):
        report.write_report(tmp_path)
    artifacts.write_json(tmp_path / "bench.json", {"schema": "uncurl_jax.bench/2"})
    with pytest.raises(InputError, match=r'must have the schema "uncurl_jax.bench/1", got'):
        report.write_report(tmp_path)
    artifacts.write_json(tmp_path / "bench.json", {"schema": "uncurl_jax.bench/1"})
    with pytest.raises(InputError, match=r"must hold device, versions, .* without device"):
        report.write_report(tmp_path)
