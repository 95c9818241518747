"""Reads the collectives of a compiled program: kind, bytes, group, layer, direction.

The input is the text of an optimised HLO module after SPMD partitioning (`compiled.as_text()`), in
which shapes are those of one device. Synchronous and asynchronous (-start, -done) forms, combined
collectives with tuple shapes, every way to print replica groups, and loops whose number of passes
the compiler knows are understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

ALL_TO_ALL, ALL_REDUCE, ALL_GATHER = "all-to-all", "all-reduce", "all-gather"
KINDS = (
    ALL_TO_ALL,
    ALL_REDUCE,
    ALL_GATHER,
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
FORWARD, BACKWARD, OTHER = "forward", "backward", "other"

_BITS = {
    "pred": 8,
    "token": 0,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
    # s4, u8, f32, f8e4m3fn, ...: the number says it.
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" = s(?:32|64)\[\]\S* constant\((\d+)\)")
_LESS_THAN = re.compile(r" compare\(.*?, \S*?%([\w.\-]+)\), direction=LT")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_ELEMENT = re.compile(r" get-tuple-element\(.*?%?([\w.\-]+)\), index=(\d+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_DONE = re.compile(r"-done\(.*?%?([\w.\-]+)\)")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_REPLICAS = re.compile(r"\breplica_count=(\d+)")


class Part(NamedTuple):
    """What one collective carries for one layer.

    Attributes:
      layer: index of the decoder layer; None outside layers.
      direction: "forward", "backward" (of a gradient), or "other": losses, optimizer, metrics.
      bytes_per_device: payload, see Collective.
    """

    layer: int | None
    direction: str
    bytes_per_device: int


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      times: how often one run of the program executes it: loops count every pass.
      is_times_known: False if it stands in a loop whose passes the compiler does not know; such a
        loop counts as one pass.
      group_size: devices that take part in it together.
      parts: what it carries, per layer and direction; compilers combine collectives of several
        layers. Bytes are those of the whole output for all-gather, of the whole input for
        reduce-scatter, and of input or output, which are equally large, for the others.
    """

    kind: str
    times: int
    is_times_known: bool
    group_size: int
    parts: tuple[Part, ...]

    @property
    def bytes_per_device(self) -> int:
        """Payload of one execution on one device."""
        return sum(part.bytes_per_device for part in self.parts)


class _Instruction(NamedTuple):
    computation: str
    name: str
    kind: str
    shape: str
    is_start: bool
    line: str


class _Call(NamedTuple):
    caller: str
    called: str
    trips: int | None
    # Of a loop whose line does not say how many passes it makes.
    condition: str | None = None


class _Module(NamedTuple):
    entry: str
    num_devices: int
    instructions: list[_Instruction]
    calls: list[_Call]
    # (instruction, index) -> op_name of the element of a combined collective.
    element_names: dict[tuple[str, int], str]
    # instruction -> its line.
    lines: dict[str, str]


def wire_bytes(kind: str, payload: float, group_size: int) -> float:
    """Bytes that a device sends for a payload, by a bandwidth-optimal algorithm.

    (g - 1) / g of the payload for all-to-all, all-gather and reduce-scatter, twice that for
    all-reduce, all of it for the others.
    """
    share = (group_size - 1) / group_size
    if kind == ALL_REDUCE:
        return 2 * share * payload
    if kind in (ALL_TO_ALL, ALL_GATHER, "reduce-scatter", "ragged-all-to-all"):
        return share * payload
    return payload


def find_collectives(text: str) -> list[Collective]:
    """Returns the collectives of an optimised HLO module, in the order of its text.

    Those among one device alone are left out: they move nothing. Every branch of a conditional
    counts, though one of them runs.

    Raises:
      ValueError: If the text is not an HLO module with an entry computation.
    """
    module = _scan(text)
    times = _executions(module)
    found = []
    for instruction in module.instructions:
        count, is_known = times.get(instruction.computation, (0, True))
        group_size = _group_size(instruction, module.num_devices)
        if count and group_size > 1:
            parts = _parts(instruction, group_size, module)
            found.append(Collective(instruction.kind, count, is_known, group_size, parts))
    return found


def count(
    collectives: Iterable[Collective], kind: str, *, direction: str | None = None
) -> dict[int | None, int]:
    """Returns {layer: executions} of one kind; a combined collective counts in each of its layers.

    Args:
      collectives: of one program.
      kind: one of KINDS.
      direction: of the parts that count; None for any.
    """
    counts: dict[int | None, int] = {}
    for collective in collectives:
        if collective.kind != kind:
            continue
        layers = {part.layer for part in collective.parts if direction in (None, part.direction)}
        for layer in layers:
            counts[layer] = counts.get(layer, 0) + collective.times
    return counts


def summarize(collectives: Sequence[Collective]) -> dict[str, Any]:
    """Returns JSON: totals by kind, and rows by kind, layer, direction and group size.

    Counts and bytes are those of one run of the program on one device. A combined collective is
    counted once in the totals and in each row that it serves; bytes are never counted twice.
    """
    totals: dict[str, dict[str, Any]] = {
        kind: _no_traffic() for kind in (ALL_TO_ALL, ALL_REDUCE, ALL_GATHER)
    }
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for collective in collectives:
        kind, group = collective.kind, collective.group_size
        _add(totals.setdefault(kind, _no_traffic()), collective, collective.bytes_per_device)
        of_row: dict[tuple[Any, ...], int] = {}
        for part in collective.parts:
            key = (kind, part.layer, part.direction, group)
            of_row[key] = of_row.get(key, 0) + part.bytes_per_device
        for key, payload in of_row.items():
            names = ("kind", "layer", "direction", "group_size")
            row = rows.setdefault(key, dict(zip(names, key, strict=True)) | _no_traffic())
            _add(row, collective, payload)
    order = sorted(rows, key=lambda key: (key[0], key[1] is None, key[1] or 0, key[2:]))
    return {
        "totals": totals,
        "by_layer": [rows[key] for key in order],
        "in_loops_of_unknown_length": sum(not c.is_times_known for c in collectives),
    }


def _no_traffic() -> dict[str, Any]:
    return {"count": 0, "bytes_per_device": 0, "bytes_on_the_wire_per_device": 0}


def _add(traffic: dict[str, Any], collective: Collective, payload: int) -> None:
    traffic["count"] += collective.times
    traffic["bytes_per_device"] += collective.times * payload
    on_the_wire = wire_bytes(collective.kind, payload, collective.group_size)
    traffic["bytes_on_the_wire_per_device"] += round(collective.times * on_the_wire)


def _scan(text: str) -> _Module:
    """Goes through the lines once and keeps what has to do with collectives and calls."""
    lines = iter(text.splitlines())
    header = next(lines, "")
    sizes = [pattern.search(header) for pattern in (_PARTITIONS, _REPLICAS)]
    entry = computation = ""
    instructions: list[_Instruction] = []
    calls: list[_Call] = []
    element_names: dict[tuple[str, int], str] = {}
    start_of_done: dict[str, str] = {}
    constants: dict[str, int] = {}
    limits: dict[str, int] = {}
    line_of: dict[str, str] = {}
    for line in lines:
        if line[:1] not in (" ", "}", ""):
            opened = _COMPUTATION.match(line)
            if opened:
                computation = opened[2]
                entry = computation if opened[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name = found[1]
        line_of[name] = line
        calls.extend(_calls(computation, line))
        constant = _CONSTANT.search(line)
        limit = _LESS_THAN.search(line) if "ROOT" in line else None
        if constant:
            constants[name] = int(constant[1])
        elif limit and limit[1] in constants:
            limits[computation] = constants[limit[1]]
        elif " get-tuple-element(" in line:
            element, op_name = _ELEMENT.search(line), _OP_NAME.search(line)
            if element and op_name:
                element_names[element[1], int(element[2])] = op_name[1]
        elif any(kind in line for kind in KINDS):
            instructions.extend(_collective(computation, name, line[found.end() :]))
            done = _DONE.search(line)
            if done:
                start_of_done[name] = done[1]
    if not entry:
        raise ValueError("A compiled program's text must have an ENTRY computation, got none.")
    return _Module(
        entry,
        math.prod(int(size[1]) for size in sizes if size),
        instructions,
        [
            call if call.condition is None else call._replace(trips=limits.get(call.condition))
            for call in calls
        ],
        # Elements are taken from x-done; what is kept of the pair is x-start.
        {
            (start_of_done.get(name, name), index): op_name
            for (name, index), op_name in element_names.items()
        },
        line_of,
    )


def _calls(computation: str, line: str) -> Iterator[_Call]:
    """Yields the computations that an instruction calls.

    Where the compiler does not write how many passes a loop makes (for TPU it does not), they are
    read off a condition of the form that jax.lax.scan gives: counter < constant, from 0 by 1.
    """
    if " async-done(" in line or " async-update(" in line:
        return
    trips, condition = 1, None
    loop = _WHILE.search(line)
    if loop:
        known = _TRIPS.search(line)
        trips, condition = (int(known[1]), None) if known else (None, loop[1])
    for _, called in _CALLED.findall(line):
        # A condition runs once more than the body; nothing communicates there.
        yield _Call(computation, called, trips, condition)
    branches = _BRANCHES.search(line)
    if branches:
        for called in branches[1].split(","):
            yield _Call(computation, called.strip().lstrip("%"), 1)


def _collective(computation: str, name: str, rest: str) -> Iterator[_Instruction]:
    """Yields the instruction, if `rest` ("shape opcode(operands), ...") is a collective."""
    shape = rest[: _end_of_shape(rest)]
    opcode = _OPCODE.match(rest, len(shape))
    if not opcode or opcode[1].endswith("-done"):
        return
    kind = opcode[1].removesuffix("-start")
    if kind in KINDS:
        yield _Instruction(computation, name, kind, shape, kind != opcode[1], rest)


def _end_of_shape(text: str) -> int:
    """Length of the shape at the beginning of "f32[2]{0} op(" or "(f32[2]{0}, s32[]) op("."""
    depth = 0
    for place, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == " " and depth == 0:
            return place
    return len(text)


def _executions(module: _Module) -> dict[str, tuple[int, bool]]:
    """Returns {computation: (how often it runs, whether that is known)} for one run of the entry.

    Computations do not call themselves.
    """
    callers: dict[str, list[_Call]] = {}
    for call in module.calls:
        callers.setdefault(call.called, []).append(call)
    times: dict[str, tuple[int, bool]] = {module.entry: (1, True)}

    def resolve(name: str) -> tuple[int, bool]:
        if name not in times:
            total, is_known = 0, True
            for call in callers.get(name, ()):
                runs, is_runs_known = resolve(call.caller)
                total += runs * (1 if call.trips is None else call.trips)
                is_known &= is_runs_known and (call.trips is not None or not runs)
            times[name] = (total, is_known)
        return times[name]

    for name in callers:
        resolve(name)
    return times


def _parts(instruction: _Instruction, group_size: int, module: _Module) -> tuple[Part, ...]:
    own_name = _name_of(instruction.name, module.lines)
    scale = group_size if instruction.kind == "reduce-scatter" else 1
    totals: dict[tuple[int | None, str], int] = {}
    for index, shape in enumerate(_result(instruction)):
        name = module.element_names.get((instruction.name, index), own_name)
        key = (layer_of(name), direction_of(name))
        totals[key] = totals.get(key, 0) + scale * _num_bytes(shape)
    return tuple(Part(*key, size) for key, size in totals.items())


def _name_of(instruction: str, lines: dict[str, str], depth: int = 8) -> str:
    """Returns the op_name of an instruction, or of the nearest one that feeds it.

    XLA for TPU gives none to what it makes of an all-gather of few bytes.
    """
    waiting, seen = [instruction], {instruction}
    for _ in range(depth):
        following = []
        for name in waiting:
            line = lines.get(name, "")
            own = _OP_NAME.search(line)
            if own:
                return own[1]
            for operand in _OPERAND.findall(line.partition(" = ")[2].partition("), ")[0]):
                if operand not in seen:
                    seen.add(operand)
                    following.append(operand)
        waiting = following
    return ""


def _result(instruction: _Instruction) -> list[str]:
    """Shapes of the arrays that a collective gives back, one entry per element of its tuple."""
    elements = _elements(instruction.shape)
    if instruction.is_start and instruction.kind != ALL_REDUCE:
        # (operands, results, contexts...); all-reduce-start alone has the results' shape.
        elements = _elements(elements[1])
    return elements


def _elements(shape: str) -> list[str]:
    """Splits "(a, (b, c))" into "a" and "(b, c)"; one array is its own only element."""
    shape = re.sub(r"/\*.*?\*/", "", shape).strip()
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[begin:place].strip())
            begin = place + 1
    return [part for part in parts if part]


def _num_bytes(shape: str) -> int:
    """Bytes of an array or a tuple, without the padding of a device's layout."""
    total = 0
    for dtype, dimensions in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape):
        size = math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d)
        total += -(-size * _bits(dtype) // 8)
    return total


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.match(r"[a-z]+(\d+)", dtype)
    if number is None:
        raise ValueError(f"An HLO element type must have a known width, got {dtype}.")
    return int(number[1])


def _group_size(instruction: _Instruction, num_devices: int) -> int:
    line = instruction.line
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
    if pairs:
        return _longest_chain(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    start = line.find("replica_groups=")
    if start < 0:
        return num_devices
    groups = line[start + len("replica_groups=") :]
    iota = re.match(r"\[([\d,]+)\]<=", groups)
    if iota:
        return int(iota[1].split(",")[-1])
    if groups.startswith(("mesh", "@mesh")):
        return _mesh_group_size(groups)
    first = re.match(r"\{\{([\d,]+)\}", groups)
    return len(first[1].split(",")) if first else num_devices


def _mesh_group_size(groups: str) -> int:
    """Size of a group like mesh['a'=4,'b'=2] {'a','b':(1)2}: a whole axis, or a part of one."""
    mesh, _, rest = groups.partition("{")
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
    axes = rest.partition("}")[0]
    return math.prod(
        int(part) if part else sizes[name]
        for name, part in re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?(?:,|$)", axes)
    )


def _longest_chain(pairs: Sequence[tuple[str, str]]) -> int:
    """Devices that a permutation links, the most of any of its chains; 1 if it moves nothing."""
    target = {source: to for source, to in pairs if source != to}
    longest = 1
    for source in target:
        seen, place = {source}, target[source]
        while place not in seen:
            seen.add(place)
            place = target.get(place, place)
        longest = max(longest, len(seen))
    return longest


def layer_of(op_name: str) -> int | None:
    """Index of the decoder layer that an operation belongs to; None if to none."""
    layer = re.search(r"\blayers_(\d+)\b", op_name)
    return int(layer[1]) if layer else None


def direction_of(op_name: str) -> str:
    """Says whether an operation is of the forward pass, of the backward pass, or of neither."""
    if "transpose(" in op_name:
        return BACKWARD
    return FORWARD if "jvp(" in op_name or "Decoder" in op_name else OTHER
