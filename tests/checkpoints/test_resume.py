"""Prunes that are killed: what they leave, and that the rerun gives the same arrays."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from uncurl_jax.checkpoints.layout import resolve
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.plan import PruningPlan

# Kills itself when `progress` has counted so far; a negative count never does.
_PRUNE = """
import os, signal, sys
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.pruning.plan import PruningPlan

def progress(stage, done, total):
    if done >= int(sys.argv[4]) >= 0:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    plan = PruningPlan.load(sys.argv[2])
    workers = int(sys.argv[5])
    prune_checkpoint(sys.argv[1], plan, sys.argv[3], progress=progress, workers=workers)
"""


def start_prune(tmp_path, source, out, kill_at=-1, workers=0):
    (tmp_path / "prune.py").write_text(_PRUNE)
    arguments = [tmp_path / "prune.py", source, tmp_path / "plan.json", out, kill_at, workers]
    return subprocess.Popen([sys.executable, *map(str, arguments)], start_new_session=True)


def leftover_of(out):
    found = [entry for entry in out.parent.iterdir() if entry.name.startswith(f".{out.name}.")]
    assert len(found) == 1
    return found[0]


def assert_same_arrays(read_arrays, first, second):
    arrays = [read_arrays(path) for path in (first, second)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert array.dtype == arrays[1][name].dtype
        assert array.tobytes() == arrays[1][name].tobytes(), name
    hashes = [json.loads((path / "hashes.json").read_text()) for path in (first, second)]
    assert hashes[0] == hashes[1]


def test_a_prune_that_is_killed_again_and_again_gives_the_same_arrays(
    tmp_path, config, labels, save_checkpoint, plan_for, read_arrays
):
    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, labels)
    plan.save(tmp_path / "plan.json")
    prune_checkpoint(source, plan, tmp_path / "whole")
    before = read_arrays(source)
    out = tmp_path / "out" / "pruned"
    for kill_at in (0, 5, 9, 13):
        process = start_prune(tmp_path, source, out, kill_at)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        for entry in [out.parent, *leftover_of(out).rglob("*")]:
            with pytest.raises(InputError):
                resolve(entry)
    lines = (leftover_of(out) / "journal.jsonl").read_text().splitlines()
    summary = prune_checkpoint(source, plan, out)
    # header, "created", then the pieces
    assert summary["pieces"] == {"total": 6, "resumed": len(lines) - 2}
    assert summary["pieces"]["resumed"] >= 4
    assert_same_arrays(read_arrays, tmp_path / "whole", out)
    assert [entry.name for entry in out.parent.iterdir()] == ["pruned"]
    after = read_arrays(source)
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())


def test_the_summary_after_a_kill_is_that_of_an_uninterrupted_prune(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    source = save_checkpoint(tmp_path / "run", config)
    plan = plan_for(source, labels)
    plan.save(tmp_path / "plan.json")
    whole = prune_checkpoint(source, plan, tmp_path / "whole")
    process = start_prune(tmp_path, source, tmp_path / "pruned", kill_at=9)
    assert process.wait() == -signal.SIGKILL
    resumed = prune_checkpoint(source, plan, tmp_path / "pruned")
    for name in ("fingerprint", "layers", "parameters", "bytes", "num_experts", "warnings"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_byte(
    tmp_path, make_params, save_checkpoint, plan_for, read_arrays
):
    from uncurl_jax.config import ModelConfig

    config = ModelConfig(
        num_experts=(16, 16), vocab_size=32, embed_dim=96, num_heads=2, mlp_dim=384, max_length=12
    )
    source = save_checkpoint(tmp_path / "run", config, params=make_params(config, dtype="bfloat16"))
    plan = plan_for(source, {layer: [z % 5 for z in range(16)] for layer in (0, 1)})
    plan.save(tmp_path / "plan.json")
    prune_checkpoint(source, plan, tmp_path / "whole", workers=2)
    generator = random.Random(0)
    process = start_prune(tmp_path, source, tmp_path / "timed", workers=1)
    start = time.monotonic()
    assert process.wait() == 0
    usual = time.monotonic() - start
    kills, finished = 0, 0
    out = tmp_path / "pruned"
    while kills < 30:
        process = start_prune(tmp_path, source, out, workers=kills % 3)
        try:
            # The first part is imports; a kill there tests nothing.
            process.wait(generator.uniform(0.5, 1.1) * usual)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if not out.exists():
                continue
        finished += 1
        assert_same_arrays(read_arrays, tmp_path / "whole", out)
        shutil.rmtree(out)
    if not finished:
        prune_checkpoint(source, plan, out)
        assert_same_arrays(read_arrays, tmp_path / "whole", out)


def interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out):
    source = save_checkpoint(tmp_path / "run", config)
    plan_for(source, labels).save(tmp_path / "plan.json")
    assert start_prune(tmp_path, source, out, kill_at=5).wait() == -signal.SIGKILL
    return source, PruningPlan.load(tmp_path / "plan.json")


def test_what_a_prune_with_another_plan_left_is_in_the_way(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    out = tmp_path / "pruned"
    source, plan = interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out)
    left = leftover_of(out)
    other = dataclasses.replace(plan, alignment="none")
    with pytest.raises(InputError, match=r"a plan other than that of .*pruned\..*partial"):
        prune_checkpoint(source, other, out)
    assert left.exists()
    shutil.rmtree(left)
    prune_checkpoint(source, other, out)


def test_what_a_prune_of_another_source_left_is_in_the_way(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    out = tmp_path / "pruned"
    source, plan = interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out)
    shutil.rmtree(source)
    save_checkpoint(source, config)  # the same arrays in other files
    with pytest.raises(InputError, match="got another source_manifest than"):
        prune_checkpoint(source, plan, out)


def test_what_a_kill_after_the_last_rename_left_is_in_nobodys_way(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    out = tmp_path / "pruned"
    source, plan = interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out)
    shutil.rmtree(leftover_of(out) / "checkpoint")
    prune_checkpoint(source, dataclasses.replace(plan, alignment="none"), out)
    shutil.rmtree(out)
    assert prune_checkpoint(source, plan, out)["pieces"]["resumed"] == 0


def test_two_processes_do_not_build_the_same_result(
    tmp_path, config, labels, save_checkpoint, plan_for
):
    out = tmp_path / "pruned"
    source, plan = interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out)
    with (leftover_of(out) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="One process at a time may prune to"):
            prune_checkpoint(source, plan, out)
    prune_checkpoint(source, plan, out)


def test_workers_end_when_the_process_is_killed(tmp_path, make_params, save_checkpoint, plan_for):
    from uncurl_jax.config import ModelConfig

    config = ModelConfig(
        num_experts=(6,), vocab_size=32, embed_dim=64, num_heads=2, mlp_dim=512, max_length=12
    )
    source = save_checkpoint(tmp_path / "run", config)
    plan_for(source, {0: [0] * 6}).save(tmp_path / "plan.json")
    process = start_prune(tmp_path, source, tmp_path / "pruned", kill_at=1, workers=2)
    assert process.wait() == -signal.SIGKILL

    def alive():
        # The prune leads a session of its own, so its workers are found by that.
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    if os.getsid(int(entry)) == process.pid:
                        found.append(int(entry))
                except ProcessLookupError:
                    continue
        return found

    deadline = time.monotonic() + 20
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive() == []


def test_data_of_commits_that_were_cut_short_is_removed(
    tmp_path, config, labels, save_checkpoint, plan_for, read_arrays
):
    out = tmp_path / "pruned"
    source, plan = interrupted(tmp_path, config, labels, save_checkpoint, plan_for, out)
    data = leftover_of(out) / "checkpoint" / "checkpoint_0" / "state" / "d"
    stray = data / "0123456789abcdef0123456789abcdef"
    stray.write_bytes(bytes(1000))
    (data / f"{stray.name}.__lock").write_bytes(bytes(10))
    prune_checkpoint(source, plan, out)
    names = {path.name for path in out.rglob("*")}
    assert stray.name not in names and f"{stray.name}.__lock" not in names
    prune_checkpoint(source, plan, tmp_path / "whole")
    assert_same_arrays(read_arrays, tmp_path / "whole", out)


def test_nan_after_a_kill_leaves_nothing(
    tmp_path, config, labels, make_params, save_checkpoint, plan_for
):
    params = make_params(config)
    params["layers_2"]["moe"]["experts"]["wo"][3, 0, 0] = np.nan
    source = save_checkpoint(tmp_path / "run", config, params=params)
    plan = plan_for(source, labels)
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out" / "pruned"
    assert start_prune(tmp_path, source, out, kill_at=5).wait() == -signal.SIGKILL
    with pytest.raises(InputError, match=r"layers_2/moe/experts/wo expert 3 \(1 values\)"):
        prune_checkpoint(source, plan, out)
    assert list(out.parent.iterdir()) == []
