"""Cycles of a TPU kernel, from the instruction bundles that the compiler writes with `--xla_jf_dump_llo_text`.

A TensorCore issues one bundle a cycle, in order; waits for memory come on top. In long stretches of code the compiler
packs products closer than the matrix units take them; they wait then, so that a part takes no less than its products
do. A kernel is cut at its loops and conditionals, and whoever knows the kernel says how often each of them runs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:(?:LB|PF|PB|CT|LH|LE)\s*)?:\s*>*\s*\{")
REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
BRANCH = re.compile(r"sbr\.rel(?: \(!?%p\w+\))? target = \$region(\d+)")
VMEM = re.compile(r"^\s*#allocation\w* \[.*space=vmem, size = 0x([0-9a-f]+)", re.MULTILINE)
MATMUL = re.compile(r"= vmatmul\.\S*")
MATMUL_ROWS = {True: 16, False: 8}  # of the left side that one instruction takes: bfloat16, float32
DELAY = 5  # a branch and the bundles after it that run whatever it does
SMALLEST = 48  # bundles of a part that is counted apart: those of a window's transfer are fewer


class Part(NamedTuple):
    """A loop's body, or what a condition guards: bundles [first, stop)."""

    first: int
    stop: int
    is_loop: bool


class Program(NamedTuple):
    """A compiled kernel."""

    name: str
    parts: tuple[Part, ...]  # by their first bundle, outer ones before those within; the whole program comes first
    uses: tuple[tuple[int, ...], ...]  # of every bundle: how many slots of each unit it uses
    units: dict[str, tuple[int, int]]  # {name: (column in `uses`, slots a bundle)}
    matmul_rows: tuple[int, ...]  # of every bundle: that its products take in
    vmem_bytes: int

    @property
    def spills(self) -> int:
        """Instructions that store a register to memory for want of registers."""
        return sum(use[self.units["VSTORE:SPILL"][0]] for use in self.uses)


def read_program(folder: Path, kernel: str) -> Program:
    """The dump in `folder` of the one kernel whose name has `kernel` in it."""
    final = _only(folder, kernel)
    texts = _bundles(final.read_text())
    starts = {int(region): i for i, text in enumerate(texts) for region in REGION.findall(text)}
    parts = {(0, len(texts)): False}
    for i, text in enumerate(texts):
        for region in BRANCH.findall(text):
            if int(region) not in starts:
                continue  # out of the program: the other core of two
            target = starts[int(region)]
            first, stop = (target, i + DELAY) if target <= i else (i + DELAY, target)
            if stop - first >= SMALLEST:
                parts[first, stop] = parts.get((first, stop), False) or target <= i
    found = [Part(first, stop, is_loop) for (first, stop), is_loop in parts.items()]
    found.sort(key=lambda part: (part.first, -part.stop))
    prefix = final.name.removesuffix("-final_bundles.txt").rpartition("-")[0]
    (table,) = folder.glob(f"{prefix}-*-final_hlo-static-per-bundle-utilization.txt")
    (original,) = folder.glob(f"{prefix}-*-original.txt")
    uses, units = _utilization(table.read_text())
    vmem_bytes = sum(int(size, 16) for size in VMEM.findall(original.read_text()))
    matmul_rows = tuple(sum(MATMUL_ROWS["bf16" in product] for product in MATMUL.findall(text)) for text in texts)
    return Program(kernel, tuple(found), uses, units, matmul_rows, vmem_bytes)


def _only(folder: Path, kernel: str) -> Path:
    found = [p for p in folder.glob(f"*{kernel}*-final_bundles.txt") if "schedule-analysis" not in p.name]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} kernels with {kernel} in their name, not one")
    return found[0]


def _bundles(text: str) -> list[str]:
    found: list[str] = []
    for line in text.splitlines():
        if BUNDLE.match(line):
            found.append(line)
        elif found:
            found[-1] += line
    return found


def _utilization(text: str) -> tuple[tuple[tuple[int, ...], ...], dict[str, tuple[int, int]]]:
    head, rows = text.split("== UTILIZATION:\n")
    _, names, slots = head.strip().splitlines()[:3]
    units = {name: (i, int(n)) for i, (name, n) in enumerate(zip(names.split(", "), slots.split(), strict=True))}
    return tuple(tuple(map(int, row.split())) for row in rows.strip().splitlines()), units


def cycles(program: Program, runs: Sequence[float], rows_per_cycle: int) -> float:
    """Of the whole program.

    Args:
        runs: how often each part runs, the whole program's first.
        rows_per_cycle: that all matrix units together take.
    Raises ValueError where there are not as many parts, as after a change of the kernel or of the compiler.
    """
    if len(runs) != len(program.parts):
        shapes = [f"{'loop' if p.is_loop else 'if'} of {p.stop - p.first}" for p in program.parts]
        raise ValueError(f"{program.name} has {len(shapes)} parts ({', '.join(shapes)}), {len(runs)} were expected")
    owner = [0] * program.parts[0].stop
    for number, part in enumerate(program.parts):
        owner[part.first : part.stop] = [number] * (part.stop - part.first)
    bundles, products = [0] * len(runs), [0.0] * len(runs)
    for number, rows in zip(owner, program.matmul_rows, strict=True):
        bundles[number] += 1
        products[number] += rows / rows_per_cycle
    return sum(count * max(b, p) for count, b, p in zip(runs, bundles, products, strict=True))
