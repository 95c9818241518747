from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from uncurl_jax import artifacts
from uncurl_jax.errors import InputError


def test_an_atomic_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "deep" / "file.txt"
    with artifacts.atomic_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_writer_leaves_the_old_file_as_it_was(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), artifacts.atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_results_have_the_permissions_of_any_other_file(tmp_path: Path):
    with artifacts.atomic_file(tmp_path / "file") as partial:
        partial.write_text("")
    with artifacts.atomic_directory(tmp_path / "directory"):
        pass
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain_directory").mkdir()

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("file") == mode("plain")
    assert mode("directory") == mode("plain_directory")


def test_an_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"), artifacts.atomic_directory(path) as partial:
        (partial / "file").write_text("half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with artifacts.atomic_directory(path) as partial:
        (partial / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_output_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=f"must not exist yet, got {tmp_path}: choose another"):
        artifacts.refuse_existing(tmp_path)
    with pytest.raises(InputError, match="must not exist yet"):
        artifacts.atomic_directory(tmp_path).__enter__()
    assert artifacts.refuse_existing(str(tmp_path / "new")) == tmp_path / "new"


def test_json_round_trips_and_refuses_nan(tmp_path: Path):
    path = tmp_path / "value.json"
    artifacts.write_json(path, {"a": [1, 2.5, None, "ü"]})
    assert artifacts.read_json(path) == {"a": [1, 2.5, None, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(path, float("nan"))
    assert artifacts.read_json(path) == {"a": [1, 2.5, None, "ü"]}


def test_missing_and_malformed_json_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"must exist, got nothing at .*missing\.json"):
        artifacts.read_json(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json must hold JSON, got "):
        artifacts.read_json(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"binary\.json must hold JSON"):
        artifacts.read_json(tmp_path / "binary.json")


def test_appended_lines_are_read_back_in_order(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    for number in range(3):
        artifacts.append_json_line(path, {"number": number})
    assert artifacts.read_json_lines(path) == [{"number": 0}, {"number": 1}, {"number": 2}]
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.append_json_line(path, float("inf"))
    assert len(artifacts.read_json_lines(path)) == 3


def test_a_line_cut_short_by_a_kill_is_left_out_and_overwritten_by_the_next(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"number": 0}\n{"numb')
    assert artifacts.read_json_lines(path) == [{"number": 0}]
    artifacts.append_json_line(path, {"number": 1})
    assert artifacts.read_json_lines(path) == [{"number": 0}, {"number": 1}]
    path.write_bytes(b'{"numb')
    artifacts.append_json_line(path, {"number": 2})
    assert path.read_bytes() == b'{"number": 2}\n'


def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"number": 0}\nnonsense\n')
    with pytest.raises(InputError, match=r"runs\.jsonl:2 must be a JSON object, got "):
        artifacts.read_json_lines(path)


def test_hashes_are_sha256_of_the_bytes(tmp_path: Path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.sha256_of_bytes(b"") == empty
    assert artifacts.sha256_of_bytes(b"abc") == abc
    (tmp_path / "file").write_bytes(b"abc")
    assert artifacts.sha256_of_file(tmp_path / "file") == abc
    large = os.urandom((1 << 20) + 7)
    (tmp_path / "large").write_bytes(large)
    assert artifacts.sha256_of_file(tmp_path / "large") == artifacts.sha256_of_bytes(large)


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys():
    left, right = {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}
    assert artifacts.sha256_of_json(left) == artifacts.sha256_of_json(right)
    assert artifacts.sha256_of_json(left) != artifacts.sha256_of_json({"a": 1, "b": [2, 1]})
    assert artifacts.sha256_of_json(left) == artifacts.sha256_of_bytes(
        json.dumps(left, separators=(",", ":")).encode()
    )
