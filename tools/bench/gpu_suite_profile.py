"""A profiler's trace as time by kind of kernel; gpu_suite.py's section `profile`. Needs no TensorFlow."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from gpu_suite_cases import Row

# Kinds by what a kernel's name says, the first that fits. XLA names a fusion by its operations, libraries their own.
KINDS = {
    "collectives": r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective.?permute|nvshmem",
    "attention backward": r"(sdpa|fmha|flash|attention).*(bprop|bwd|backward|dkv|dq)|compute_dot_do_o|convert_dq",
    "attention forward": r"sdpa|fmha|flash|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|matmul|splitk|(^|_)dot\b|(^|_)dot_|convolution|^ynn",
    "memcpy": r"^memcpy|^memset",
    "gathers and scatters": r"gather|scatter|sort",
    "sums": r"reduce|softmax",
    "arithmetic": r"add|multiply|subtract|divide|exp|tanh|sqrt|logistic|negate|select|maximum|compare|power",
    "casts": r"convert",
    "copies": r"copy|transpose|concatenate|slice|pad|bitcast|broadcast|iota|reverse|fusion",
}
OPTIMIZER = "optimizer, norms"  # by where the operation is in the program, not by its name
LOOPS = re.compile(r"(while|call|conditional)[.\d]*$")  # on CPUs their bodies are events of their own
LONGEST = 3  # kernels named for each kind


class Kernel(NamedTuple):
    """One run of it on a device."""

    name: str
    op: str  # the operation of the program, where the trace says so
    ns: float


def read_trace(path: Path) -> list[Kernel]:
    """Of an .xplane.pb: what ran on the GPU's streams; on a CPU, the operations of the program."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    found = []
    for plane in [p for p in planes if p.name.startswith("/device:GPU")]:
        for line in plane.lines:
            if line.name.startswith("Stream"):  # others tell the same time again, by step, module and operation
                found += [Kernel(e.name, str(dict(e.stats).get("hlo_op", "")), e.duration_ns) for e in line.events]
    if found:
        return found
    for plane in [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                op = dict(event.stats).get("hlo_op")
                if op == event.name and not LOOPS.match(op):
                    found.append(Kernel(event.name, op, event.duration_ns))
    return found


def op_names(program: str) -> dict[str, str]:
    """Where in the function an operation of the compiled program comes from: "jit(train_step)/while/body/dot_general",
    by its name, and by what a kernel makes of that."""
    found = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{op_name="([^"]*)"', program, re.M))
    return {re.sub(r"[.-]", "_", name): place for name, place in found.items()} | found


def kind_of(kernel: Kernel, places: dict[str, str]) -> str:
    kind = next((kind for kind, words in KINDS.items() if re.search(words, kernel.name, re.I)), "other")
    place = places.get(kernel.op) or places.get(kernel.name, "")
    # What the step computes after the loops over microbatches and layers and their derivatives is the update.
    outside = re.match(r"jit\(train_step\)/", place) and not re.search(r"while|jvp|transpose|shard_map", place)
    return OPTIMIZER if outside and kind in ("sums", "arithmetic", "other") else kind


def by_kind(kernels: Iterable[Kernel], places: dict[str, str], steps: int) -> list[Row]:
    """A row for all and one for each kind, the longest first; times and calls of one step."""
    runs: dict[str, dict[str, list[float]]] = {}
    for kernel in kernels:
        runs.setdefault(kind_of(kernel, places), {}).setdefault(kernel.name, []).append(kernel.ns)
    rows = []
    for kind, by_name in runs.items():
        sums = {name: sum(times) / steps / 1e6 for name, times in by_name.items()}
        longest = sorted(sums, key=sums.get, reverse=True)[:LONGEST]
        row = {"kind": kind, "ms": round(sum(sums.values()), 3), "calls": sum(map(len, by_name.values())) / steps}
        rows.append(row | {"longest": ", ".join(f"{name[:60]} {sums[name]:.2f}" for name in longest)})
    rows.sort(key=lambda row: -row["ms"])
    everything = sum(row["ms"] for row in rows)
    for row in rows:
        row["share"] = round(row["ms"] / everything, 4) if everything else 0.0
    return [{"kind": "all", "ms": round(everything, 3), "calls": sum(row["calls"] for row in rows)}, *rows]
