"""Checkpoints that T5X wrote by itself become ours; here both layouts are made by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
import tensorstore as ts

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.adopt import adopt_checkpoint
from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.checkpoints.state_writer import nested
from uncurl_jax.errors import InputError

VOCABULARY = {"name": "bytes", "spec": "bytes", "size": 30, "hash": "0" * 64}
msgpack = flax.serialization.msgpack_serialize
FILES = (layout.MODEL_CONFIG_FILE, layout.PROVENANCE_FILE, layout.VOCABULARY_FILE)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for key, value in tree.items():
        inner = (
            flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
        found |= inner
    return found


def write_legacy(directory: Path, step: int, params: dict[str, Any], *, version: int = 3) -> Path:
    """Writes a step as T5X did: norms in the msgpack file, the rest as zarr arrays beside it."""
    place = directory / f"checkpoint_{step}"
    place.mkdir(parents=True)
    leaves: dict[str, Any] = {}
    for name, array in flat(params).items():
        if "norm" in name:
            leaves[name] = array
            continue
        folder = f"target.{name.replace('/', '.')}"
        stored = array.view(np.uint16) if version == 2 else array
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{place}/{folder}/"},
            "metadata": {"compressor": {"id": "gzip", "level": 1}, "shape": list(array.shape)},
            "dtype": stored.dtype.name,
        }
        ts.open(spec, create=True).result().write(stored).result()
        # T5X stores the path relative to the step.
        leaves[name] = {**spec, "kvstore": {"driver": "file", "path": f"{folder}/"}}
    state = {"step": np.int32(step), "param_states": {"mu": np.zeros(2)}}
    contents = {"version": version, "optimizer": {"target": nested(leaves), "state": state}}
    (place / "checkpoint").write_bytes(msgpack(contents))
    return place


@pytest.fixture
def run(tmp_path, config, save_checkpoint) -> Path:
    """What T5X leaves: steps in our layout without our JSON files."""
    directory = save_checkpoint(tmp_path / "run", config)
    for name in FILES:
        (directory / name).unlink()
    (directory / "config.gin").write_text("# T5X's\n")
    return directory


def test_three_files_make_a_run_of_t5x_ours(run, config):
    with pytest.raises(InputError, match=r"without model_config\.json"):
        layout.resolve(run)
    adopted = adopt_checkpoint(run, config, VOCABULARY)
    assert adopted.steps == [7] and Path(adopted.directory) == run
    found = describe(run)
    assert found["num_experts"] == [8, 0, 4]
    assert found["vocabulary"] == VOCABULARY
    assert found["provenance"]["source"] == {"path": str(run), "layout": "orbax"}


def test_one_step_of_a_run_may_be_named(run, config):
    assert adopt_checkpoint(run / "checkpoint_7", config, VOCABULARY).steps == [7]
    assert all((run / name).exists() for name in FILES)


def test_a_checkpoint_is_adopted_once(run, config):
    adopt_checkpoint(run, config, VOCABULARY)
    with pytest.raises(InputError, match=r"is adopted once, got .* with model_config\.json"):
        adopt_checkpoint(run, config, VOCABULARY)


def test_another_model_than_the_arrays_is_refused_and_nothing_written(run, config):
    with pytest.raises(InputError, match=r"experts/wi is \[8, 16, 24\] instead of \[4, 16, 24\]"):
        adopt_checkpoint(run, config.with_experts(4), VOCABULARY)
    assert not any((run / name).exists() for name in FILES)


def test_what_is_no_run_is_refused(tmp_path, config, run):
    with pytest.raises(InputError, match="must be an existing directory"):
        adopt_checkpoint(tmp_path / "nowhere", config, VOCABULARY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds checkpoint_<step> directories that were saved"):
        adopt_checkpoint(tmp_path / "empty", config, VOCABULARY)
    with pytest.raises(InputError, match="--out is for steps in T5X's older layout"):
        adopt_checkpoint(run, config, VOCABULARY, out=tmp_path / "new")
    large = {**VOCABULARY, "size": 33}
    with pytest.raises(InputError, match="at least the vocabulary's size, got 32 for bytes"):
        adopt_checkpoint(run, config, large)


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (3, "bfloat16"), (2, "bfloat16")])
def test_steps_of_the_older_layout_are_copied_value_by_value(
    version, dtype, tmp_path, config, make_params
):
    params = make_params(config, dtype=dtype)
    write_legacy(tmp_path / "old", 3, make_params(config, seed=1), version=3)
    write_legacy(tmp_path / "old", 9, params, version=version)
    said: list[str] = []
    adopted = adopt_checkpoint(
        tmp_path / "old", config, VOCABULARY, out=tmp_path / "new", progress=said.append
    )
    assert adopted.steps == [3, 9] and len(said) == 2
    reader = layout.StateReader(tmp_path / "new")
    assert reader.checkpoint.step == 9
    assert int(reader.read("state/step")) == 9
    expected = flat(params)
    assert reader.parameters().keys() == expected.keys()
    for name, array in expected.items():
        found = reader.read(f"target/{name}")
        assert found.dtype == array.dtype, name
        np.testing.assert_array_equal(found, array)
    assert describe(tmp_path / "new")["provenance"]["source"]["layout"] == "t5x"


def test_one_step_of_the_older_layout_may_be_named(tmp_path, config, make_params):
    write_legacy(tmp_path / "old", 3, make_params(config))
    place = write_legacy(tmp_path / "old", 9, make_params(config))
    assert adopt_checkpoint(place, config, VOCABULARY, out=tmp_path / "new").steps == [9]


def test_a_step_that_was_moved_is_read_where_it_is(tmp_path, config, make_params):
    write_legacy(tmp_path / "old", 3, make_params(config))
    os.rename(tmp_path / "old", tmp_path / "moved")
    adopted = adopt_checkpoint(tmp_path / "moved", config, VOCABULARY, out=tmp_path / "new")
    assert adopted.steps == [3]


def test_a_missing_array_of_the_older_layout_is_named(tmp_path, config, make_params):
    place = write_legacy(tmp_path / "old", 3, make_params(config))
    (place / "target.token_embedder.embedding" / ".zarray").unlink()
    with pytest.raises(InputError, match="must be readable, got token_embedder/embedding of"):
        adopt_checkpoint(tmp_path / "old", config, VOCABULARY, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_model_than_the_older_layout_holds_is_refused(tmp_path, config, make_params):
    write_legacy(tmp_path / "old", 3, make_params(config))
    with pytest.raises(InputError, match=r"router/kernel is \[16, 8\] instead of .*no scanned"):
        adopt_checkpoint(tmp_path / "old", config.with_experts(4), VOCABULARY, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_older_layout_needs_a_new_directory(tmp_path, config, make_params, run):
    write_legacy(tmp_path / "old", 3, make_params(config))
    with pytest.raises(InputError, match=r"are copied to a new directory, got .* without --out"):
        adopt_checkpoint(tmp_path / "old", config, VOCABULARY)
    with pytest.raises(InputError, match="An output must not exist yet"):
        adopt_checkpoint(tmp_path / "old", config, VOCABULARY, out=run)
    with pytest.raises(InputError, match="are copied to a file system, got --out gs://bucket/new"):
        adopt_checkpoint(tmp_path / "old", config, VOCABULARY, out="gs://bucket/new")
    write_legacy(run, 8, make_params(config))
    with pytest.raises(InputError, match="Steps of one layout are adopted together, got both"):
        adopt_checkpoint(run, config, VOCABULARY, out=tmp_path / "new")


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"\xff\xff", "must be the msgpack file that T5X wrote"),
        (flax.serialization.msgpack_serialize({"version": 1}), "must be of version 2 or 3, got 1"),
        (
            flax.serialization.msgpack_serialize({"version": 3, "a": 1}),
            "must hold optimizer/target",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(contents, sentence, tmp_path, config):
    place = tmp_path / "old" / "checkpoint_3"
    place.mkdir(parents=True)
    (place / "checkpoint").write_bytes(contents)
    with pytest.raises(InputError, match=sentence):
        adopt_checkpoint(tmp_path / "old", config, VOCABULARY, out=tmp_path / "new")
