"""Collectives of compiled programs: sizes worked by hand, and every form of the text."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uncurl_jax.deployment.collectives import (
    Collective,
    Part,
    count,
    direction_of,
    find_collectives,
    layer_of,
    summarize,
    wire_bytes,
)
from uncurl_jax.partitioning import TOKEN_AXES, make_mesh

ROWS = PartitionSpec(TOKEN_AXES)
BY_DATA, BY_EXPERT = PartitionSpec("data"), PartitionSpec("expert")


def compiled_for_eight(
    body: Callable, in_spec: PartitionSpec, out_spec: PartitionSpec, dtype: type = np.float32
) -> list[Collective]:
    """Collectives of `body` on x [16, 32], on 2 * 4 devices; by rows a device holds [2, 32]."""
    mesh = make_mesh(expert_partitions=4)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct((16, 32), dtype)
    return find_collectives(jax.jit(mapped).lower(x).compile().as_text() or "")


@pytest.mark.parametrize(
    ("body", "specs", "kind", "group_size", "payload", "on_the_wire"),
    [
        # 2 * 32 numbers of 4 bytes in and out; a ring sends 3/4 of them twice.
        pytest.param(
            lambda x: jax.lax.psum(x, "expert"),
            (ROWS, BY_DATA),
            "all-reduce",
            4,
            256,
            384,
            id="sum",
        ),
        # [4, 32] come out, of which half was there.
        pytest.param(
            lambda x: jax.lax.all_gather(x, "data", tiled=True),
            (ROWS, BY_EXPERT),
            *("all-gather", 2, 512, 256),
            id="gather",
        ),
        # A quarter of [2, 32] stays.
        pytest.param(
            lambda x: jax.lax.all_to_all(x, "expert", 1, 0, tiled=True),
            (ROWS, ROWS),
            *("all-to-all", 4, 256, 192),
            id="exchange",
        ),
        # [16, 32] go in, an eighth comes out.
        pytest.param(
            lambda x: jax.lax.psum_scatter(x, TOKEN_AXES, tiled=True),
            (PartitionSpec(), ROWS),
            *("reduce-scatter", 8, 2048, 1792),
            id="scatter",
        ),
        # Everything goes to the neighbour.
        pytest.param(
            lambda x: jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]),
            (ROWS, ROWS),
            *("collective-permute", 4, 256, 256),
            id="permute",
        ),
    ],
)
def test_sizes_of_compiled_collectives_are_those_of_the_arithmetic(
    body, specs, kind, group_size, payload, on_the_wire
):
    (found,) = compiled_for_eight(body, *specs)
    assert (found.kind, found.times, found.group_size) == (kind, 1, group_size)
    assert found.bytes_per_device == payload
    assert summarize([found])["totals"][kind] == {
        "count": 1,
        "bytes_per_device": payload,
        "bytes_on_the_wire_per_device": on_the_wire,
    }


def test_half_the_bits_are_half_the_bytes():
    (found,) = compiled_for_eight(
        lambda x: jax.lax.all_gather(x, "data", tiled=True), ROWS, BY_EXPERT, jnp.int16
    )
    assert found.bytes_per_device == 256


def test_a_loop_counts_every_pass():
    def body(x: jax.Array) -> jax.Array:
        def once(total: jax.Array, _: None):
            return jax.lax.psum(total, TOKEN_AXES) * 0.1, None

        def five_times(total: jax.Array, _: None):
            return jax.lax.scan(once, total, None, length=5)

        return jax.lax.scan(five_times, x, None, length=3)[0]

    (found,) = compiled_for_eight(body, ROWS, ROWS)
    assert (found.times, found.is_times_known, found.bytes_per_device) == (15, True, 256)
    assert summarize([found])["totals"]["all-reduce"]["bytes_per_device"] == 15 * 256


def test_a_program_of_one_device_has_none():
    text = jax.jit(lambda x: x @ x.T).lower(np.ones((4, 4))).compile().as_text()
    assert find_collectives(text or "") == []


HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

"""


def entry(*lines: str) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"{HEADER}{SUM}ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}}}\n"


def one(line: str) -> Collective:
    (found,) = find_collectives(entry(f"%x = {line}"))
    return found


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
        ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=1] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_are_read_in_every_notation(groups, size):
    found = one(f"f32[4]{{0}} all-reduce(%p), {groups}, to_apply=%sum")
    assert (found.group_size, found.bytes_per_device) == (size, 16)


def test_a_group_of_one_device_moves_nothing():
    text = entry(
        "%x = f32[4]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%sum",
        "%y = f32[4]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
    )
    assert find_collectives(text) == []


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        ("(f32[2,3]{1,0}, s8[5]{0}) all-reduce(%a, %b), to_apply=%sum", "all-reduce", 29),
        ("(f32[2]{0}, f32[3]{0}) all-reduce-start(%a, %b), to_apply=%sum", "all-reduce", 20),
        ("(f32[4]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}", "all-gather", 128),
        (
            "((f32[4]{0}, f32[2]{0}), (f32[32]{0}, f32[16]{0})) all-gather-start(%p, %q)",
            *("all-gather", 192),
        ),
        ("((f32[8,2]), f32[8,2], u32[], u32[]) all-to-all-start(%p)", "all-to-all", 64),
        (
            "(bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            *("collective-permute", 8),
        ),
        ("bf16[64,20,16]{2,1,0:T(8,128)(2,1)S(1)} all-to-all(%p)", "all-to-all", 40960),
        ("(pred[3]{0:T(128)}, /*index=1*/f8e4m3fn[2]{0}) all-to-all(%p)", "all-to-all", 5),
        ("s4[6]{0} all-gather(%p)", "all-gather", 3),
        ("f32[4]{0} reduce-scatter(%p), dimensions={0}, to_apply=%sum", "reduce-scatter", 128),
    ],
)
def test_payloads_are_read_in_every_form(line, kind, payload):
    found = one(line)
    assert (found.kind, found.bytes_per_device) == (kind, payload)


def test_the_end_of_an_asynchronous_collective_is_not_counted_again():
    text = entry(
        "%s = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}",
        "%d = f32[32]{0} all-gather-done(%s)",
        "%t = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%t), calls=%wrapped",
        "%v = f32[4]{0} async-done(%u), calls=%wrapped",
    )
    wrapped = "%wrapped (p: f32[4]) -> f32[4] {\n  ROOT %y = f32[4]{0} all-to-all(%p)\n}\n\n"
    found = find_collectives(text.replace(SUM, SUM + wrapped))
    assert sorted((c.kind, c.times, c.bytes_per_device) for c in found) == [
        ("all-gather", 1, 128),
        ("all-to-all", 1, 16),
    ]


LOOP = """%cond (s: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %y = f32[4]{0} all-to-all(%p), replica_groups={}
  ROOT %t = (s32[], f32[4]{0}) tuple(%s, %y)
}

"""


@pytest.mark.parametrize(
    ("limit", "times", "is_known"), [("constant(6)", 6, True), ("parameter(1)", 1, False)]
)
def test_passes_are_read_off_a_condition_if_the_loop_does_not_name_them(limit, times, is_known):
    loop = LOOP.replace("constant(6)", limit)
    text = entry("%w = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body")
    (found,) = find_collectives(text.replace(SUM, SUM + loop))
    assert (found.times, found.is_times_known) == (times, is_known)
    assert summarize([found])["in_loops_of_unknown_length"] == (not is_known)


def test_every_branch_counts_and_unused_computations_do_not():
    branches = "".join(
        f"%{name} (p: f32[4]) -> f32[4] {{\n  ROOT %y = f32[4]{{0}} all-to-all(%p)\n}}\n\n"
        for name in ("left", "right", "unused")
    )
    text = entry("%c = f32[4]{0} conditional(%i, %p, %p), branch_computations={%left, %right}")
    assert len(find_collectives(text.replace(SUM, SUM + branches))) == 2


FORWARD_0 = "jit(step)/jvp(Decoder)/layers_0/moe/shard_map/psum"
BACKWARD_12 = "jit(step)/while/body/transpose(jvp(Decoder))/layers_12/mlp/wi/dot_general"


def test_a_combined_collective_is_attributed_by_its_elements():
    text = entry(
        "%x = (f32[4]{0}, f32[2]{0}, f32[]) all-reduce-start(%p, %q, %r), to_apply=%sum, "
        'metadata={op_name="jit(step)/reduce_sum"}',
        "%d = (f32[4]{0}, f32[2]{0}, f32[]) all-reduce-done(%x)",
        f'%a = f32[4]{{0}} get-tuple-element(%d), index=0, metadata={{op_name="{BACKWARD_12}"}}',
        f'%b = f32[2]{{0}} get-tuple-element(%d), index=1, metadata={{op_name="{FORWARD_0}"}}',
    )
    (found,) = find_collectives(text)
    assert found.parts == (
        Part(12, "backward", 16),
        Part(0, "forward", 8),
        Part(None, "other", 4),
    )
    summary = summarize([found])
    assert summary["totals"]["all-reduce"]["count"] == 1
    assert [
        (row["layer"], row["count"], row["bytes_per_device"]) for row in summary["by_layer"]
    ] == [
        (0, 1, 8),
        (12, 1, 16),
        (None, 1, 4),
    ]
    assert count([found], "all-reduce") == {0: 1, 12: 1, None: 1}
    assert count([found], "all-reduce", direction="forward") == {0: 1}
    assert count([found], "all-to-all") == {}


def test_a_collective_without_a_name_takes_that_of_what_feeds_it():
    text = entry(
        f'%a = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%sum, metadata={{op_name="{FORWARD_0}"}}',
        "%b = f32[4]{0} bitcast(%a)",
        "%x = f32[4]{0} all-reduce(%b), to_apply=%sum",
        "%y = f32[4]{0} all-reduce(%p), to_apply=%sum",
    )
    named, nameless = find_collectives(text)
    assert named.parts == (Part(0, "forward", 16),)
    assert nameless.parts == (Part(None, "other", 16),)


@pytest.mark.parametrize(
    ("name", "layer", "direction"),
    [
        (FORWARD_0, 0, "forward"),
        (BACKWARD_12, 12, "backward"),
        ("jit(scores)/Decoder/layers_3/attention/out/dot_general", 3, "forward"),
        ("jit(step)/transpose(jvp(Decoder))/token_embedder/add_any", None, "backward"),
        ("jit(step)/reduce_sum", None, "other"),
        ("", None, "other"),
    ],
)
def test_names_of_operations_tell_layer_and_direction(name, layer, direction):
    assert (layer_of(name), direction_of(name)) == (layer, direction)


def test_bytes_on_the_wire_follow_the_kind():
    assert wire_bytes("all-to-all", 80, 8) == wire_bytes("all-gather", 80, 8) == 70
    assert wire_bytes("all-reduce", 80, 8) == 140
    assert wire_bytes("collective-permute", 80, 8) == 80


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="must have an ENTRY computation, got none"):
        find_collectives(HEADER + SUM)


def test_an_unknown_element_type_is_refused():
    with pytest.raises(ValueError, match="must have a known width, got opaque"):
        one("opaque[4]{0} all-to-all(%p)")
