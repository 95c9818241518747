"""Replaying the plan that a checkpoint carries."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from uncurl_jax.artifacts import write_json
from uncurl_jax.checkpoints.inspect import describe
from uncurl_jax.checkpoints.layout import StateReader, fingerprint, resolve
from uncurl_jax.checkpoints.state_writer import StateWriter
from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.checkpoints.verify import verify_checkpoint
from uncurl_jax.errors import InputError


@pytest.fixture
def source(tmp_path, config, save_checkpoint):
    return save_checkpoint(tmp_path / "run", config)


@pytest.fixture
def pruned(tmp_path, source, labels, plan_for):
    prune_checkpoint(source, plan_for(source, labels), tmp_path / "pruned")
    return tmp_path / "pruned"


def finetuned(tmp_path, pruned):
    """What training would make of `pruned`: other parameters, and a provenance that names it."""
    reader = StateReader(pruned)
    params = {}
    for name in reader.parameters():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = reader.read(f"target/{name}") * np.float32(1.5)
    checkpoint = resolve(pruned)
    provenance = {
        "created_by": "uncurl_jax 0",
        "source": {
            "path": str(checkpoint),
            "fingerprint": fingerprint(pruned),
            "provenance": checkpoint.provenance(),
        },
    }
    out = tmp_path / "finetuned"
    with CheckpointStore(
        out,
        model_config=checkpoint.model_config(),
        provenance=provenance,
        vocabulary=checkpoint.vocabulary(),
    ) as store:
        store.save(3, params)
    return out


def test_a_pruned_checkpoint_is_confirmed_array_by_array(source, pruned):
    calls = []
    got = verify_checkpoint(pruned, progress=lambda *call: calls.append(call))
    assert got["verified"] is True and got["difference"] is None
    assert [entry["status"] for entry in got["chain"]] == ["verified", "not verifiable"]
    assert got["chain"][0]["arrays"] == len(StateReader(pruned).metadata)
    assert got["chain"][0]["pieces"] == 6
    assert got["chain"][1]["path"] == str(resolve(source))
    assert calls[-1] == ("verify", 13, 13)
    json.dumps(got, allow_nan=False)


def test_the_first_array_that_differs_is_named(pruned):
    step = resolve(pruned).step_directory
    key = "target/layers_0/moe/experts/wo"
    changed = StateReader(pruned).read(key, 1)
    changed[0, 0] += 1
    StateWriter(step).write({key: changed}, 1).result()
    got = verify_checkpoint(pruned)
    assert got["verified"] is False
    assert (got["difference"]["array"], got["difference"]["expert"]) == (key, 1)
    assert got["difference"]["expected"] != got["difference"]["found"]
    assert got["chain"][0]["status"] == "differs"


def test_an_edited_hash_or_configuration_is_a_difference(pruned):
    hashes = json.loads((pruned / "hashes.json").read_text())
    key = "target/final_norm/scale"
    write_json(pruned / "hashes.json", {**hashes, "arrays": {**hashes["arrays"], key: "0" * 64}})
    assert verify_checkpoint(pruned)["difference"]["array"] == f"hashes.json: {key}"
    config = resolve(pruned).model_config().to_dict()
    write_json(pruned / "model_config.json", {**config, "norm_epsilon": 0.1})
    difference = verify_checkpoint(pruned)["difference"]
    assert difference["array"] == "model_config.json: norm_epsilon"
    assert (difference["expected"], difference["found"]) == ("1e-05", "0.1")


def test_a_source_that_was_moved_is_given(tmp_path, source, pruned):
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="needs the checkpoint that it was pruned from"):
        verify_checkpoint(pruned)
    assert verify_checkpoint(pruned, tmp_path / "elsewhere")["verified"] is True


def test_another_source_is_refused(tmp_path, config, make_params, save_checkpoint, pruned):
    other = save_checkpoint(tmp_path / "other", config, params=make_params(config, seed=1))
    with pytest.raises(InputError, match="needs the checkpoint with fingerprint"):
        verify_checkpoint(pruned, other)


def test_what_was_never_pruned_is_refused(source):
    with pytest.raises(InputError, match="whose provenance names no plan"):
        verify_checkpoint(source)


def test_an_edited_plan_is_refused(pruned):
    provenance = resolve(pruned).provenance()
    write_json(pruned / "provenance.json", {**provenance, "plan_hash": "0" * 64})
    with pytest.raises(InputError, match="must hold the plan that it names"):
        verify_checkpoint(pruned)


def test_a_chain_of_prunes_and_trainings_is_followed(tmp_path, source, pruned, plan_for):
    tuned = finetuned(tmp_path, pruned)
    again = tmp_path / "again"
    prune_checkpoint(tuned, plan_for(tuned, {0: [0, 1, 1], 2: [0, 1]}), again)
    got = verify_checkpoint(again)
    assert got["verified"] is True
    statuses = [entry["status"] for entry in got["chain"]]
    assert statuses == ["verified", "not verifiable", "verified", "not verifiable"]
    assert [entry["created_by"] for entry in got["chain"]] == [
        "prune",
        "uncurl_jax 0",
        "prune",
        "test",
    ]
    chain = describe(again)["chain"]
    assert [link["path"] for link in chain] == [entry["path"] for entry in got["chain"]]
    assert chain[2]["plan_hash"] == resolve(pruned).provenance()["plan_hash"]

    # The given checkpoint may be the trained one.
    assert [entry["status"] for entry in verify_checkpoint(tuned)["chain"]] == statuses[1:]
    # Without the older checkpoints the newest prune can still be replayed.
    shutil.rmtree(source)
    got = verify_checkpoint(again)
    assert got["verified"] is True
    assert [entry["status"] for entry in got["chain"]][2] == "not verifiable"
    assert "must be an existing directory" in got["chain"][2]["reason"]
