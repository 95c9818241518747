"""Adding the files of a calibration that was divided among processes or tasks."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics, merge_statistics

ROWS = 24


def logits():
    return np.random.default_rng(0).normal(size=(ROWS, 3))


def part(reference, rows, **manifest):
    outputs = np.random.default_rng(1).normal(size=(ROWS, 3, 2))
    layers = {0: reference.statistics(logits()[rows], outputs=outputs[rows])}
    return reference.router_statistics(layers, (3, 0), **{"batches": 1, **manifest})


def shard(reference, index, count, **manifest):
    return part(reference, slice(index, None, count), shards=[f"{index}/{count}"], **manifest)


def save(tmp_path, *statistics):
    paths = [tmp_path / f"{number}.npz" for number in range(len(statistics))]
    for path, one in zip(paths, statistics, strict=True):
        one.save(path)
    return paths


def test_the_shards_of_a_calibration_add_up_to_the_whole(reference, tmp_path):
    whole = part(reference, slice(None), batches=3)
    paths = save(tmp_path, *(shard(reference, index, 3) for index in range(3)))
    for order in itertools.permutations(paths):
        merged = merge_statistics(order)
        assert merged.manifest["shards"] == ["0/3", "1/3", "2/3"]
        assert merged.manifest["batches"] == 3 and merged.tokens == ROWS
        assert merged.manifest["is_complete"]
        for name in LayerStatistics._fields:
            a, b = (getattr(s.layers[0], name) for s in (merged, whole))
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


def test_files_without_shards_add_up_too(reference, tmp_path):
    halves = [part(reference, rows) for rows in (slice(10), slice(10, None))]
    merged = merge_statistics(save(tmp_path, *halves))
    assert merged.tokens == ROWS and "shards" not in merged.manifest
    assert merged.hash == (halves[0] + halves[1]).hash


def test_one_file_is_itself(reference, tmp_path):
    only = part(reference, slice(None))
    assert merge_statistics(save(tmp_path, only)).hash == only.hash


def test_a_merged_file_is_merged_further(reference, tmp_path):
    shards = [shard(reference, index, 3) for index in range(3)]
    paths = save(tmp_path, shards[0] + shards[1], shards[2])
    assert merge_statistics(paths).hash == (shards[0] + shards[1] + shards[2]).hash


def test_a_missing_shard_is_named(reference, tmp_path):
    paths = save(tmp_path, shard(reference, 0, 3), shard(reference, 2, 3))
    with pytest.raises(InputError, match=r"got 0/3, 2/3 where 0/3, 1/3, 2/3 are its shards"):
        merge_statistics(paths)
    with pytest.raises(InputError, match=r"got 0/3 where"):
        merge_statistics(paths[:1])


def test_shards_of_two_divisions_are_refused(reference, tmp_path):
    paths = save(tmp_path, shard(reference, 0, 2), shard(reference, 1, 2), shard(reference, 1, 3))
    with pytest.raises(InputError, match=r"got 0/2, 1/2, 1/3 where 0/2, 1/2 are its shards"):
        merge_statistics(paths)


def test_a_shard_given_twice_is_refused(reference, tmp_path):
    paths = save(tmp_path, shard(reference, 0, 2), shard(reference, 0, 2, batches=2))
    with pytest.raises(InputError, match="of different tokens, got shard 0/2 twice") as error:
        merge_statistics(paths)
    assert str(paths[1]) in str(error.value)


def test_a_file_given_twice_is_refused(reference, tmp_path, monkeypatch):
    (path,) = save(tmp_path, part(reference, slice(None)))
    monkeypatch.chdir(tmp_path)
    for again in (path, "0.npz", tmp_path / "." / "0.npz"):
        with pytest.raises(InputError, match="must be different files"):
            merge_statistics([path, again])
    shutil.copy(path, tmp_path / "copy.npz")
    with pytest.raises(InputError, match=r"copy\.npz.* got a copy of another file"):
        merge_statistics([path, tmp_path / "copy.npz"])


def test_no_file_at_all_is_refused():
    with pytest.raises(InputError, match=r"must be different files, got \[\]"):
        merge_statistics([])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_hash", "another"),
        ("task", "superglue_cb"),
        ("split", "validation"),
        ("vocabulary_hash", "another"),
        ("seed", 1),
    ],
)
def test_statistics_of_another_source_are_refused(reference, tmp_path, field, value):
    paths = save(tmp_path, shard(reference, 0, 2), shard(reference, 1, 2, **{field: value}))
    with pytest.raises(InputError, match=rf"1\.npz: Statistics can be combined .* got {field} "):
        merge_statistics(paths)


def test_an_incomplete_part_makes_an_incomplete_whole(reference, tmp_path):
    paths = save(tmp_path, shard(reference, 0, 2), shard(reference, 1, 2, is_complete=False))
    assert not merge_statistics(paths).manifest["is_complete"]


def test_a_file_that_is_no_statistics_is_refused_by_name(reference, tmp_path):
    (path,) = save(tmp_path, part(reference, slice(None)))
    (tmp_path / "x.npz").write_bytes(b"cake")
    for other, message in (("x.npz", "must be a whole router statistics"), ("y.npz", "must exist")):
        with pytest.raises(InputError, match=rf"{other}.*{message}|{message}.*{other}"):
            merge_statistics([path, tmp_path / other])


def test_merged_statistics_survive_a_file(reference, tmp_path):
    merged = merge_statistics(save(tmp_path, shard(reference, 0, 2), shard(reference, 1, 2)))
    merged.save(tmp_path / "merged.npz")
    assert RouterStatistics.load(tmp_path / "merged.npz").hash == merged.hash
