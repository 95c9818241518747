from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import (
    LayerStatistics,
    RouterStatistics,
    add_layers,
    collected,
    layer_statistics,
)


def route(logits, top_k):
    """Returns expert_index, gate of the top-k of jax logits."""
    gate, index = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    return index, gate


def batch(seed=0, shape=(3, 5), num_experts=4, top_k=2):
    generator = np.random.default_rng(seed)
    logits = jnp.asarray(generator.normal(size=(*shape, num_experts)), jnp.float32)
    index, gate = route(logits, top_k)
    is_kept = jnp.asarray(generator.random((*shape, top_k)) < 0.7)
    mask = jnp.asarray(generator.random(shape) < 0.6)
    return logits, index, gate, is_kept, mask


def present(statistics):
    """{name: array} of what was collected."""
    return {name: array for name, array in statistics._asdict().items() if array is not None}


def assert_close(got, expected):
    got, expected = present(got), present(expected)
    assert set(got) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def output_batch(seed=0, shape=(3, 5), num_experts=4, top_k=2, embed=3) -> tuple[Any, Any]:
    """A batch, the outputs of every expert on every token, and the chosen ones of them."""
    logits, index, gate, is_kept, mask = batch(seed, shape, num_experts, top_k)
    every = np.random.default_rng(seed + 1).normal(size=(*shape, num_experts, embed))
    every = every.astype(np.float32)
    outputs = np.take_along_axis(every, np.asarray(index)[..., None], axis=-2)
    sums = np.where(np.asarray(mask)[..., None, None], every, 0.0).sum(axis=(0, 1))
    return (logits, index, gate, is_kept, mask, outputs, sums), every


def test_statistics_of_two_tokens_worked_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [3.0, 1.0], [1.0, 1.0]]]))
    index = jnp.array([[[1], [0], [0]]])
    gate = jnp.array([[[0.75], [0.75], [0.5]]])
    is_kept = jnp.array([[[True], [False], [True]]])
    mask = jnp.array([[True, True, False]])
    got = layer_statistics(logits, index, gate, is_kept, mask)
    log3 = np.log(3.0)
    assert float(got.tokens) == 2
    np.testing.assert_allclose(got.gram, [[log3**2, 0], [0, log3**2]], rtol=1e-6)
    np.testing.assert_allclose(got.logit_sum, [log3, log3], rtol=1e-6)
    np.testing.assert_array_equal(got.selected, [1, 1])
    np.testing.assert_array_equal(got.kept, [0, 1])
    np.testing.assert_allclose(got.gate_mass, [0.75, 0.75])
    np.testing.assert_allclose(got.prob_mass, [1, 1], rtol=1e-6)
    np.testing.assert_array_equal(got.coactivation, [[1, 0], [0, 1]])
    np.testing.assert_allclose(got.routed_prob, [[0.75, 0.25], [0.25, 0.75]], rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_statistics_equal_a_loop_over_tokens(reference, top_k):
    logits, index, gate, is_kept, mask = batch(top_k=top_k)
    got = jax.jit(layer_statistics)(logits, index, gate, is_kept, mask)
    assert all(field.dtype == jnp.float32 for field in present(got).values())
    assert collected(got) == ()
    real = np.asarray(mask)
    assert_close(
        got,
        reference.statistics(np.asarray(logits)[real], top_k, np.asarray(is_kept)[real]),
    )


def test_coactivation_diagonal_is_selected_and_rows_of_routed_prob_sum_to_it():
    got = layer_statistics(*batch())
    np.testing.assert_array_equal(np.diagonal(got.coactivation), got.selected)
    np.testing.assert_allclose(np.sum(got.routed_prob, axis=1), got.selected, rtol=1e-5)


def test_output_sums_worked_by_hand():
    # Tokens 0 and 1 choose experts 1 and 0 with outputs of norm 5 and 13; token 2 is padding.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [3.0, 1.0], [1.0, 1.0]]]))
    index, gate = jnp.array([[[1], [0], [0]]]), jnp.array([[[0.75], [0.5], [0.5]]])
    outputs = jnp.array([[[[3.0, 4.0]], [[5.0, -12.0]], [[9.0, 9.0]]]])
    mask = jnp.array([[True, True, False]])
    # Dropped by the capacity or not, an output counts.
    is_kept = jnp.array([[[True], [False], [True]]])
    got = layer_statistics(logits, index, gate, is_kept, mask, outputs)
    np.testing.assert_allclose(got.output_norm, [13, 5])
    np.testing.assert_allclose(got.gated_output_norm, [6.5, 3.75])
    np.testing.assert_allclose(got.output_sum, [[5, -12], [3, 4]])
    assert got.all_output_sum is None and collected(got) == ("outputs",)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_optional_sums_equal_a_loop_over_tokens(reference, top_k):
    arrays, every = output_batch(top_k=top_k)
    got = jax.jit(layer_statistics)(*arrays)
    assert all(field.dtype == jnp.float32 for field in present(got).values())
    real = np.asarray(arrays[4])
    expected = reference.statistics(
        np.asarray(arrays[0])[real], top_k, np.asarray(arrays[3])[real], every[real]
    )
    assert_close(got, expected)
    assert collected(got) == ("outputs", "all_outputs")


def test_padding_tokens_do_not_count_even_when_they_are_nan():
    (logits, index, gate, is_kept, mask, outputs, sums), _ = output_batch()
    clean = layer_statistics(logits, index, gate, is_kept, mask, outputs, sums)
    spoiled = layer_statistics(
        jnp.where(mask[..., None], logits, jnp.nan),
        index,
        jnp.where(mask[..., None], gate, jnp.nan),
        is_kept,
        mask,
        jnp.where(mask[..., None, None], outputs, jnp.nan),
        sums,
    )
    for name, array in present(clean).items():
        np.testing.assert_array_equal(array, present(spoiled)[name], err_msg=name)


def test_statistics_of_two_halves_add_up_to_the_whole():
    (*arrays, _), every = output_batch(shape=(4, 6))
    real = np.asarray(arrays[4])[..., None, None]

    def part(rows):
        sums = np.where(real, every, 0.0)[rows].sum(axis=(0, 1))
        return layer_statistics(*(array[rows] for array in arrays), all_output_sum=sums)

    halves = [part(rows) for rows in (slice(2), slice(2, 4))]
    total = jax.tree.map(jnp.add, *halves)
    assert_close(total, part(slice(4)))
    assert_close(add_layers({0: halves[0]}, {0: halves[1]})[0], total)


def test_sharded_statistics_equal_unsharded_on_all_local_devices():
    devices = jax.devices()
    (*arrays, _), _ = output_batch(shape=(4 * len(devices), 3))
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(layer_statistics)(*(jax.device_put(array, sharding) for array in arrays))
    assert_close(sharded, layer_statistics(*arrays))


def build(reference, seed=0, **manifest):
    h = np.random.default_rng(seed).normal(size=(20, 3))
    return reference.router_statistics({0: reference.statistics(h)}, (3, 0), **manifest)


def build_with_outputs(reference, seed=0, embed=2, **manifest):
    generator = np.random.default_rng(seed)
    h, outputs = generator.normal(size=(20, 3)), generator.normal(size=(20, 3, embed))
    layers = {0: reference.statistics(h, outputs=outputs)}
    return reference.router_statistics(layers, (3, 0), **manifest)


@pytest.mark.parametrize("make", [build, build_with_outputs])
def test_router_statistics_add_fields_and_counters(reference, make):
    a, b = make(reference, 0, batches=2), make(reference, 1, batches=3)
    total = a + b
    assert total.tokens == 40 and total.manifest["batches"] == 5
    assert_close(total.layers[0], jax.tree.map(np.add, a.layers[0], b.layers[0]))
    assert all(field.dtype == np.float64 for field in present(total.layers[0]).values())


def test_a_manifest_names_what_was_collected(reference):
    assert build(reference).manifest["collected"] == []
    assert build_with_outputs(reference).manifest["collected"] == ["outputs", "all_outputs"]


def test_statistics_with_and_without_outputs_do_not_add(reference):
    with pytest.raises(InputError, match="got collected"):
        _ = build(reference) + build_with_outputs(reference, 1)


def test_half_a_group_of_optional_sums_is_refused(reference):
    fields = build_with_outputs(reference).layers[0]._replace(output_sum=None)
    with pytest.raises(InputError, match="layer 0 must hold a group of optional sums whole"):
        reference.router_statistics({0: fields}, (3,))


def test_adding_an_incomplete_part_is_incomplete(reference):
    partial = build(reference, is_complete=False)
    assert not (build(reference) + partial).manifest["is_complete"]


def test_statistics_of_different_sources_do_not_add(reference):
    with pytest.raises(InputError, match=r"got task 'superglue_rte' and 'superglue_cb'"):
        _ = build(reference) + build(reference, task="superglue_cb")


@pytest.mark.parametrize("make", [build, build_with_outputs])
def test_statistics_survive_a_file_with_the_same_bytes_and_hash(reference, tmp_path, make):
    statistics = make(reference)
    for name in ("a.npz", "b"):
        statistics.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = RouterStatistics.load(tmp_path / "b")
    assert loaded.hash == statistics.hash and loaded.manifest == statistics.manifest
    assert collected(loaded.layers[0]) == collected(statistics.layers[0])
    for name, array in present(statistics.layers[0]).items():
        np.testing.assert_array_equal(present(loaded.layers[0])[name], array)


def test_hash_depends_on_every_array_and_on_the_manifest(reference):
    base = build_with_outputs(reference)
    hashes = {base.hash, build_with_outputs(reference, task="superglue_cb").hash}
    for name in LayerStatistics._fields[1:]:
        fields = base.layers[0]._replace(**{name: getattr(base.layers[0], name) + 1.0})
        hashes.add(RouterStatistics({0: fields}, base.manifest).hash)
    assert len(hashes) == 1 + len(LayerStatistics._fields)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must exist, got .*none\.npz: run calibration first"):
        RouterStatistics.load(tmp_path / "none.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz must be a whole router statistics file"):
        RouterStatistics.load(tmp_path / "x.npz")


def test_an_archive_of_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.ones(3))
    with pytest.raises(InputError, match="must be a whole router statistics file"):
        RouterStatistics.load(tmp_path / "x.npz")


def rewrite(path, change):
    """Applies `change(header, arrays)` to a statistics file."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def change_version(header, arrays):
    header["format_version"] = 99


def drop_field(header, arrays):
    del arrays["layers_0/kept"]


def drop_array(header, arrays):
    arrays["layers_0/kept"] = arrays["layers_0/kept"] + 1


def spoil_expert(header, arrays):
    arrays["layers_0/gram"][1, :] = np.nan
    arrays["layers_0/gram"][:, 1] = np.nan


def spoil_tokens(header, arrays):
    arrays["layers_0/tokens"] = np.array(np.inf)


def remove_tokens(header, arrays):
    arrays["layers_0/tokens"] = np.array(0.0)


def resize(header, arrays):
    arrays["layers_0/logit_sum"] = np.zeros(4)


def resize_outputs(header, arrays):
    arrays["layers_0/output_sum"] = np.zeros((4, 2))


def drop_outputs(header, arrays):
    del arrays["layers_0/output_norm"]


def spoil_outputs(header, arrays):
    arrays["layers_0/all_output_sum"][2, 1] = np.inf


def rename_layer(header, arrays):
    for name in list(arrays):
        arrays[name.replace("layers_0", "layers_1")] = arrays.pop(name)


def forget_task(header, arrays):
    del header["manifest"]["task"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_version, "format version 2, got 99"),
        (drop_field, "every statistic, got .*kept.*: it is damaged"),
        (drop_array, "match the hash stored in it"),
        (spoil_expert, "NaN or infinity in gram of layer 0, expert 1"),
        (spoil_tokens, "NaN or infinity in tokens of layer 0"),
        (remove_tokens, r"at least one token, got 0 on task 'superglue_rte'"),
        (resize, r"logit_sum of layer 0 must have shape \(3,\), got \(4,\)"),
        (resize_outputs, r"output_sum of layer 0 must have shape \(3, 2\), got \(4, 2\)"),
        (drop_outputs, "layer 0 must hold a group of optional sums whole"),
        (spoil_outputs, "NaN or infinity in all_output_sum of layer 0, expert 2"),
        (rename_layer, r"cover the MoE layers \[0\], got layers \[1\]"),
        (forget_task, "got none of task: build it with make_manifest"),
    ],
)
def test_a_damaged_file_is_refused_by_name(reference, tmp_path, change, message):
    path = tmp_path / "statistics.npz"
    build_with_outputs(reference).save(path)
    rewrite(path, change)
    with pytest.raises(InputError, match=message) as error:
        RouterStatistics.load(path)
    assert str(path) in str(error.value)
