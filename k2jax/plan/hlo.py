"""Reads a compiled program's text: its computations, and of each instruction what a plan needs.

The text is XLA's "scheduled HLO": instructions stand in the order in which the device starts them.
"""

import math
import re
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
ON_HOST = "S(5)"  # in the layout of an array that lies in the host's memory
MOVES = {"copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "transpose", "reshape", "pad",
         "reverse", "broadcast"}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Instruction(NamedTuple):
    name: str
    result: str  # its type as text
    opcode: str
    rest: str  # operands and attributes

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, where there is one (TPU)."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else None

    @property
    def result_bytes(self) -> int:
        return array_bytes(self.result)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    def called(self, attribute: str = "calls") -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def channel(self) -> str | None:
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found.group(1) if found else None

    @property
    def rendezvous(self) -> str | None:
        """Of a collective between slices of TPUs: a send of what goes in and a receive of what comes out share it."""
        found = re.search(r'_megascale_runtime".*?_rendezvous="([^"]*)"', self.rest)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def collective(self) -> str | None:
        """Of COLLECTIVES, also for the start of an asynchronous one."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None


class Program:
    """A program's computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                found = _INSTRUCTION.match(line)
                if found:
                    current.append(Instruction(*found.groups()))
            elif line.endswith("{"):
                found = _COMPUTATION.match(line)
                if found:
                    current = self.computations.setdefault(found.group(2), [])
                    if found.group(1):
                        self.entry = found.group(2)

    @cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All by name: names are unique in a program."""
        return {i.name: i for body in self.computations.values() for i in body}

    @cached_property
    def shapes(self) -> dict[str, str]:
        """The result's type of every instruction."""
        return {name: i.result for name, i in self.instructions.items()}

    def trip_count(self, loop: Instruction) -> int:
        """How often a while loop runs. ValueError where its condition is not `counter < constant`.

        A loop that the compiler unrolled adds more than 1 to its counter, one that it took turns out of starts above 0.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition = self._named(loop.called("condition"))
        compare = next((i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.rest), None)
        counter, limit = (condition.get(name) for name in compare.operands) if compare else (None, None)
        if not counter or not limit or limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            raise ValueError(f"{loop.name}: its condition is not of a counter and a constant: turns unknown")
        index = int(re.search(r"index=(\d+)", counter.rest).group(1))
        body = self._named(loop.called("body"))
        result = list(body.values())[-1]
        added = [body[name] for name in body[result.operands[index]].operands if name in body]
        steps = [int(i.rest.split(")")[0]) for i in added if i.opcode == "constant"]
        start = self.instructions[self.instructions[loop.operands[0]].operands[index]]
        while start.opcode == "copy":
            start = self.instructions[start.operands[0]]
        first = int(start.rest.split(")")[0]) if start.opcode == "constant" else 0
        return -(-(int(limit.rest.split(")")[0]) - first) // (steps[0] if steps else 1))

    def _named(self, computation: str | None) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations[computation or ""]}

    def moved_bytes(self, i: Instruction) -> int:
        """What an operation reads and writes: of an array that it cuts, or writes a part of in place, that part."""
        body = self._named(i.called()) if i.opcode == "fusion" else {i.name: i}
        users: dict[str, list[Instruction]] = {}
        for inner in body.values():
            for name in inner.operands:
                users.setdefault(name, []).append(inner)
        arguments = [inner.name for inner in body.values() if inner.opcode == "parameter"]
        inputs = arguments if i.opcode == "fusion" else i.operands

        def uses(name: str) -> list[tuple[str, Instruction]]:
            """(name there, user): the same bytes seen as another array are no use of their own."""
            return [
                use
                for user in users.get(name, [])
                for use in (uses(user.name) if user.opcode == "bitcast" else [(name, user)])
            ]

        read = sum(_read_bytes(self.shapes.get(name, ""), uses(name)) for name in inputs)
        root = list(body.values())[-1]
        results = [body.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root]
        written = 0
        for result in results:
            end = result
            while end.opcode in ("bitcast", "convert", "copy") and end.operands[0] in body:
                end = body[end.operands[0]]
            in_place = end.opcode == "dynamic-update-slice"
            written += array_bytes(self.shapes.get(end.operands[1], "")) if in_place else result.result_bytes
        return read + written

    def is_copy(self, i: Instruction) -> bool:
        """Whether an operation computes nothing but places: its arrays come out as they went in, or as a constant."""
        body = self.within(i) if i.opcode == "fusion" else [i]
        arrays = [j for j in body if any(array_shapes(j.result)) and j.opcode not in ("fusion", "tuple")]
        kinds = {j.opcode for j in arrays} - {"parameter", "constant", "bitcast", "get-tuple-element"}
        return bool(kinds) and kinds <= MOVES

    def host_copy(self, i: Instruction) -> tuple[int, int]:
        """(bytes, direction) of an operation, or the start of one, that copies between the device's memory and the
        host's: direction 1 to the host, -1 from it; (0, 0) of any other."""
        kind = i.opcode.removesuffix("-start")
        if kind == "fusion":  # around a copy, on GPU
            return max((self.host_copy(inner) for inner in self.within(i)), default=(0, 0))
        if kind not in ("copy", "dynamic-slice", "dynamic-update-slice"):
            return 0, 0
        source = self.shapes.get(i.operands[1 if kind == "dynamic-update-slice" else 0], "")
        if ON_HOST not in source + i.result:
            return 0, 0
        cut = re.search(r"dynamic_slice_sizes=\{([\d,]*)\}", i.rest)
        copied = _ARRAY.sub(rf"\1[{cut.group(1)}]", source) if cut else source
        return array_bytes(copied), -1 if ON_HOST in source else 1

    def within(self, instruction: Instruction) -> list[Instruction]:
        """Of the computation that a fusion or call runs; those that it calls in turn included."""
        name = instruction.called() or instruction.called("to_apply")
        body = self.computations[name] if name else []
        return [inner for i in body for inner in ([i] if i.opcode != "fusion" else [i, *self.within(i)])]


def across_slices(i: Instruction) -> tuple[str, int]:
    """(kind, slices of a group) of an instruction that has a `rendezvous`.

    Groups are written as slices and devices of each, `"{1,2}x{0:3}"`, or device by device, `{{100000,200000},...}`.
    """
    kind = re.search(r'_megascale_transfer_type="(\w+)"', i.rest).group(1)
    group = re.search(r"_megascale_target=\"?\{+([\d,:]+)", i.rest).group(1)
    ranges = [[int(n) for n in part.split(":")] for part in group.split(",")]
    return kind, sum(ends[-1] - ends[0] + 1 for ends in ranges)


def _read_bytes(shape: str, uses: list[tuple[str, Instruction]]) -> int:
    cuts = ("slice", "dynamic-slice")
    if uses and all(user.opcode in cuts and user.operands[0] == name for name, user in uses):
        return sum(user.result_bytes for _, user in uses)
    if uses and all(user.opcode == "dynamic-update-slice" and user.operands[0] == name for name, user in uses):
        return 0
    return array_bytes(shape)


def array_bytes(text: str) -> int:
    """Of all arrays in a type's text, padding left out."""
    return sum(
        math.prod(int(size) for size in shape.split(",") if size) * _element_bits(kind) // 8
        for kind, shape in _ARRAY.findall(text)
    )


def _element_bits(kind: str) -> int:
    return 8 if kind == "pred" else int(_BITS.search(kind).group())


def array_shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in shape.split(",") if size) for _, shape in _ARRAY.findall(text)]


def replica_groups(rest: str) -> list[list[int]] | None:
    """Of a collective: lists of partition numbers; None where all take part (no groups are written).

    XLA writes them in full, `{{0,1},{2,3}}`, as reshaped ranges, `[2,2]<=[2,2]T(1,0)`, or as axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`.
    """
    import numpy as np

    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    full = pairs or re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", rest)
    if full:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", full.group(1))] or None
    ranges = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if ranges:
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in ranges.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return (numbers if order is None else numbers.transpose(order)).reshape(shape).tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", rest)
    if mesh:
        axes = re.findall(r"'([^']*)'=(\d+)", mesh.group(1))
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        taking_part = [names.index(name) for name in re.findall(r"'([^']*)'", mesh.group(3))]
        rest_axes = [i for i in range(len(names)) if i not in taking_part]
        numbers = np.arange(math.prod(sizes)).reshape(sizes).transpose(*rest_axes, *taking_part)
        return numbers.reshape(-1, math.prod(sizes[i] for i in taking_part)).tolist()
    return None
