"""A compiled step played through once: when each operation runs, and which transfers no arithmetic hides.

TPU: operations carry the compiler's own cycles; this project's attention kernels are counted by their bundles. GPU: the
compiler says nothing, so each operation takes what its arithmetic or its bytes need, whichever is more, at stated
shares of the peaks. Collectives and copies to and from the host's memory are by `links.py`; those that share a link
run one after the other, beside the arithmetic from their start to their end, and what is then still to wait for is
exposed.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from k2jax.plan.chips import Chip
from k2jax.plan.hlo import Instruction, Program, array_bytes, array_shapes
from k2jax.plan.kernels import blocks_of_table, flash_costs
from k2jax.plan.links import HOST, NETWORK, Links
from k2jax.plan.topologies import GENERATIONS

GPU_MATRIX_SHARE, GPU_HBM_SHARE = 0.7, 0.85  # of the peaks that long products and copies reach: assumed
KERNEL_SHARE = 0.5  # of the peak, where a kernel's bundles cannot be read: assumed
EIGHT_BITS = re.compile(r"s8\[|f8e4m3fn\[|f8e5m2\[")  # types of inputs that a GPU multiplies at twice the rate
PRODUCTS = {"forward": 2, "backward": 5}  # of attention, each of queries times keys times head_dim
KERNEL = re.compile(r"flash_attention_(forward|backward)(_full|_turned)?")
NO_WORK = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
           "copy-start", "copy-done", "send", "send-done", "recv", "recv-done", "iota", "opt-barrier")  # fmt: skip
FREE = (*NO_WORK, "dynamic-update-slice", "broadcast")


class Transfer(NamedTuple):
    """A collective, a part of one between slices, or a copy to or from the host's memory."""

    name: str
    seconds: float
    links: frozenset[tuple[int, int]]  # that it takes: see links.py
    size: float  # bytes: of a gather's result, of a reduction's operands; between slices, those that leave the device


@dataclass
class Transfers:
    """Seconds that the device waits for some, seconds of them beside arithmetic, and bytes that it takes part in."""

    exposed: float = 0.0
    hidden: float = 0.0
    size: float = 0.0


@dataclass
class Parts:
    """Seconds of a step on one device. They add up to `total`, but for what is hidden and runs beside the rest."""

    matrix: float = 0.0
    elementwise: float = 0.0  # and copies, reductions, gathers, updates
    attention: float = 0.0
    collectives: Transfers = field(default_factory=Transfers)
    slices: Transfers = field(default_factory=Transfers)  # collectives between slices of TPUs, over the network
    host: Transfers = field(default_factory=Transfers)  # copies to and from the host's memory
    copied: float = 0.0  # bytes read and written within the device's memory by operations that compute nothing

    @property
    def transfers(self) -> tuple[Transfers, ...]:
        return self.collectives, self.slices, self.host

    def add(self, other: "Parts", times: float = 1.0) -> None:
        for mine, more in zip((self, *self.transfers), (other, *other.transfers), strict=True):
            for name, value in vars(more).items():
                if not isinstance(value, Transfers):
                    setattr(mine, name, getattr(mine, name) + times * value)

    def over(self, links: frozenset[tuple[int, int]]) -> Transfers:
        """Of these links, those that a transfer over them counts to."""
        axes = {axis for axis, _ in links}
        return self.host if HOST in axes else self.slices if NETWORK in axes else self.collectives

    @property
    def total(self) -> float:
        return self.matrix + self.elementwise + self.attention + sum(part.exposed for part in self.transfers)


class Timeline:
    """Plays a program for a chip."""

    def __init__(self, program: Program, chip: Chip, links: Links):
        self.program, self.chip, self.links = program, chip, links
        self.guessed_kernels: set[str] = set()  # those counted by arithmetic alone
        self.waited_for: Counter[str] = Counter()  # seconds of a step by transfer: what is exposed

    def step(self) -> Parts:
        return self._play(self.program.entry, 1)

    def _play(self, computation: str, times: int) -> Parts:
        parts, under_way = Parts(), {}
        for i in self.program.computations[computation]:
            if i.opcode == "while":
                turns = self.program.trip_count(i)
                parts.add(self._play(i.called("body") or "", times * turns), turns)
            elif i.opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", i.rest.split("branch_computations={", 1)[-1].split("}")[0])
                parts.add(max((self._play(name, times) for name in branches), key=lambda p: p.total))
            elif i.opcode == "call":
                parts.add(self._play(i.called("to_apply") or "", times))
            elif _is_done(i) or (i.opcode == "copy-done" and i.operands[0] in under_way):
                end, links = under_way.pop(self._key(i), (0.0, frozenset()))
                wait, transfers = max(0.0, end - parts.total), parts.over(links)
                transfers.exposed, transfers.hidden = transfers.exposed + wait, transfers.hidden - wait
                self.waited_for[f"{i.result} {i.op_name or self._key(i)}"] += times * wait
            elif (transfer := self._transfer(i)) is not None:
                self._send(i, transfer, parts, under_way, times)
            else:
                self._compute(i, parts)
        return parts

    def _send(
        self, i: Instruction, transfer: Transfer, parts: Parts, under_way: dict[str, tuple], times: int
    ) -> None:
        """Those that share links run one after the other, in the order of their starts; one that is waited for where it
        stands goes first, and holds the others up."""
        took, links, transfers = transfer.seconds, transfer.links, parts.over(transfer.links)
        transfers.size += transfer.size
        sharing = {key: (end, used) for key, (end, used) in under_way.items() if used & links and end > parts.total}
        if _is_start(i):
            begin = max([end for end, _ in sharing.values()], default=parts.total)
            under_way[self._key(i)] = begin + took, links
            transfers.hidden += took
        else:
            transfers.exposed += took
            self.waited_for[transfer.name] += times * took
            under_way |= {key: (end + took, used) for key, (end, used) in sharing.items()}

    def _transfer(self, i: Instruction) -> Transfer | None:
        """What an operation sends, or starts to send."""
        collective = self._collective(i)
        if collective is not None:
            size = max(collective.result_bytes, self._operand_bytes(collective))
            name = f"{collective.collective} {collective.result} {collective.op_name}"
            return Transfer(name, *self.links.transfer(self.program, collective), size)
        if i.opcode == "send" and i.rendezvous:
            return Transfer(i.rendezvous, *self.links.between_slices(i, self._operand_bytes(i)))
        size, direction = self.program.host_copy(i)
        return Transfer(f"{i.opcode} {i.result}", *self.links.host_copy(size, direction), size) if size else None

    def _collective(self, i: Instruction) -> Instruction | None:
        """The collective that an operation is, starts or, where it does no product as well, holds."""
        if i.collective:
            return i
        if i.opcode not in ("fusion", "async-start"):
            return None
        within = self.program.within(i)
        if not _is_start(i) and any(inner.opcode in ("convolution", "dot") for inner in within):
            return None  # a product among the steps of a transfer that others start and end
        return next((inner for inner in within if inner.collective), None)

    def _key(self, i: Instruction) -> str:
        """What a start and its end share: the channel of a collective that the compiler split, the rendezvous of one
        between slices, which begins as its data is sent, or the start's name."""
        if i.opcode == "fusion":
            return next((inner.channel for inner in self.program.within(i) if inner.channel), i.name)
        if i.opcode in ("send", "recv-done"):
            return (i if i.opcode == "send" else self.program.instructions[i.operands[0]]).rendezvous or i.name
        return i.operands[0] if i.opcode.endswith("-done") else i.name

    def _compute(self, i: Instruction, parts: Parts) -> None:
        within = self.program.within(i) if i.opcode == "fusion" else [i]
        if i.opcode not in NO_WORK and self.program.is_copy(i):
            parts.copied += self.program.moved_bytes(i)
        kernels = [inner for inner in within if inner.opcode == "custom-call" and KERNEL.search(inner.name)]
        if kernels and self.chip.is_tpu:
            parts.attention += sum(self._kernel_seconds(kernel) for kernel in kernels)
            return
        products = [p for p in within if p.opcode in ("convolution", "dot") or "__cublas" in p.rest]
        seconds = self._tpu_seconds(i) if self.chip.is_tpu else self._roofline(i, products)
        if products:
            parts.matrix += seconds
        elif "fmha" in i.rest or kernels:
            parts.attention += seconds
        else:
            parts.elementwise += seconds

    # ---- how long ----------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> float:
        """Of a TPU, from its peak: cycles a second."""
        multiply_adds = GENERATIONS[self.chip.name].multiply_adds
        return self.chip.peak_flops / (2 * multiply_adds * self.chip.cores)

    def _tpu_seconds(self, i: Instruction) -> float:
        if i.cycles is not None:
            return i.cycles / self.clock
        if i.opcode in FREE or (i.opcode == "custom-call" and "tpu_custom_call" not in i.rest):
            return 0.0
        return self.program.moved_bytes(i) / self.chip.hbm_bytes_per_s

    def _operand_bytes(self, i: Instruction) -> int:
        return sum(array_bytes(self.program.shapes[name]) for name in i.operands if name in self.program.shapes)

    def _kernel_seconds(self, i: Instruction) -> float:
        direction, kind = KERNEL.search(i.name).groups(default="")
        B, N, T, S, H = self._of_turned(i) if kind == "_turned" else self._of_heads(i, direction)
        length = min(T, S)  # costs are known of as many queries as keys
        try:
            blocks = blocks_of_table(self.chip.name, length, H)
            costs = flash_costs(self.chip.name, length, H, blocks, kind == "_turned")
            cycles, _ = costs[direction + kind]
            return cycles * B * N * (T * S / length**2) / self.chip.cores / self.clock
        except ValueError:
            self.guessed_kernels.add(f"{i.name} {B, N, T, S, H}")
            pairs = T * S if kind == "_full" else T * S / 2
            return 2 * PRODUCTS[direction] * B * N * H * pairs / (KERNEL_SHARE * self.chip.peak_flops)

    def _of_heads(self, i: Instruction, direction: str) -> tuple[int, ...]:
        """(B, N, T, S, H) of a kernel's call."""
        (B, N, T, H), *more = array_shapes(i.result)
        return B, N, T, more[0][2] if direction == "backward" else self._keys(i, T, H), H

    def _of_turned(self, i: Instruction) -> tuple[int, ...]:
        """The same, where q is (B, T, N H): its row sums (B, N, 1, T), a result or an operand, tell."""
        B, T, E = array_shapes(i.result)[0]
        shapes = array_shapes(i.result) + [s for o in i.operands for s in array_shapes(self.program.shapes.get(o, ""))]
        N = next(shape[1] for shape in shapes if len(shape) == 4 and shape[2:] == (1, T))
        return B, N, T, T, E // N

    def _keys(self, forward: Instruction, T: int, H: int) -> int:
        """Of a forward kernel, whose second array of heads are the keys (B, K, S, H)."""
        shapes = [shape for name in forward.operands for shape in array_shapes(self.program.shapes.get(name, ""))]
        heads = [shape for shape in shapes if len(shape) == 4 and shape[3] == H]
        return heads[1][2] if len(heads) > 1 else T

    def _roofline(self, i: Instruction, products: list[Instruction]) -> float:
        if i.opcode in FREE:
            return 0.0
        moved = self.program.moved_bytes(i) / (GPU_HBM_SHARE * self.chip.hbm_bytes_per_s)
        flops = sum(self._product_flops(p) / self._rate(p) for p in products) + self._fused_attention_flops(i)
        return max(moved, flops / (GPU_MATRIX_SHARE * self.chip.peak_flops))

    def _rate(self, product: Instruction) -> float:
        """How many times as fast as in bfloat16: of 8-bit inputs, twice, by the data sheets of Ampere and Hopper."""
        inputs = [self.program.shapes.get(name, "") for name in product.operands[:2]]
        return 2.0 if inputs and all(EIGHT_BITS.match(kind) for kind in inputs) else 1.0

    def _product_flops(self, product: Instruction) -> float:
        """2 x results x numbers added up to each."""
        contracted = re.search(r"lhs_contracting_dim(?:ension)?s(?:\":\[|=\{)([\d\",]*)", product.rest)
        left = array_shapes(self.program.shapes.get(product.operands[0], "")) if product.operands else []
        if not contracted or not left:
            return 0.0
        depth = math.prod(left[0][int(d)] for d in re.findall(r"\d+", contracted.group(1)))
        return 2.0 * depth * math.prod(max(array_shapes(product.result), key=math.prod))

    def _fused_attention_flops(self, i: Instruction) -> float:
        """Of cuDNN's and this project's GPU kernels, causal: q is (B, T, N, H) or (B, N, T, H)."""
        if "fmha" not in i.rest and not KERNEL.search(i.name):
            return 0.0
        shapes = [shape for name in i.operands for shape in array_shapes(self.program.shapes.get(name, ""))]
        q = next((shape for shape in shapes if len(shape) == 4), None)
        if q is None:
            return 0.0
        backward = "Backward" in i.rest or "backward" in i.name
        return PRODUCTS["backward" if backward else "forward"] * float(math.prod(q)) * max(q[1], q[2])


def _is_start(i: Instruction) -> bool:
    return i.opcode == "send" or i.opcode.endswith("-start") or i.name.startswith("async-collective-start")


def _is_done(i: Instruction) -> bool:
    done = i.opcode.endswith("-done") and i.opcode not in ("copy-done", "send-done")
    return done or i.name.startswith("async-collective-done")
