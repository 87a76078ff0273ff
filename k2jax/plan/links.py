"""How long a collective takes: a stated model of the links, for devices that are not here.

TPU: a slice is a torus (or, along axes too short to close, a grid). A collective sends around rings along the axes that
its group spans, in both directions of those that close. The compiler's text says which algorithm it took: one ring,
or one along every axis at once. GPU: NVLink within a host, and each device's share of the network between hosts, both
at once. Bytes over rates, plus a microsecond for each device passed. Every device has a link of its own to its host's
memory, both ways at once, and of the network between slices of TPUs its share.
"""

import re
from functools import cached_property
from typing import Any

import numpy as np

from k2jax.plan.chips import Chip
from k2jax.plan.hlo import Instruction, Program, across_slices, array_bytes, replica_groups

HOP_S = 1e-6
NETWORK_S = 1e-4  # from one slice to another through both hosts: assumed
HOST, NETWORK = -1, -2  # in the place of an axis: the link to the host's memory, and the one to other slices


class Links:
    """Of the devices of a program, in the order of its partitions."""

    def __init__(self, chip: Chip, devices: list[Any]):
        self.chip, self.devices = chip, devices

    @cached_property
    def places(self) -> np.ndarray:
        """(devices, axes): coordinates of a TPU's chip; host and place within it of a GPU."""
        if self.chip.is_tpu:
            return np.array([device.coords for device in self.devices])
        numbers = np.arange(len(self.devices))
        return np.stack([numbers // self.chip.domain, numbers % self.chip.domain], axis=1)

    def transfer(self, program: Program, collective: Instruction) -> tuple[float, frozenset[tuple[int, int]]]:
        """(seconds from the first byte to the last, the links that it takes: axis and direction) of one run."""
        groups = replica_groups(collective.rest) or [list(range(len(self.devices)))]
        sent = self._wire_bytes(program, collective, len(groups[0]))
        if collective.collective == "collective-permute":
            return self._permute(sent, groups)
        if len(groups[0]) == 1:
            return 0.0, frozenset()
        places = self.places[groups[0]]
        spread = {axis: len(np.unique(places[:, axis])) for axis in range(places.shape[1])}
        axes = [axis for axis, count in spread.items() if count > 1] or [0]
        links = frozenset((axis, direction) for axis in axes for direction in (1, -1))
        if not self.chip.is_tpu:
            hosts, local = spread[0], len(groups[0]) // spread[0]
            within = sent * (local - 1) / local / self.chip.link_bytes_per_s if local > 1 else 0.0
            between = sent * (hosts - 1) / hosts / (local * self.chip.network_bytes_per_s) if hosts > 1 else 0.0
            return max(within, between) + HOP_S * len(groups[0]), links
        rates = [self._axis_rate(axis) for axis in axes]
        one_ring = re.search(r'"emitter":"1D|"strategy":"StrategyRing"', collective.rest)
        rate = max(rates) if one_ring else sum(rates)
        n = len(groups[0])
        return sent * (n - 1) / n / rate + HOP_S * sum(spread[axis] // 2 for axis in axes), links

    def host_copy(self, size: int, direction: int) -> tuple[float, frozenset[tuple[int, int]]]:
        """As `transfer`, of bytes to the host's memory (1) or from it (-1)."""
        return size / self.chip.host_bytes_per_s + HOP_S, frozenset({(HOST, direction)})

    def between_slices(self, i: Instruction, size: int) -> tuple[float, frozenset[tuple[int, int]], float]:
        """As `transfer`, of a send of `size` bytes to other slices; and the bytes that leave the device."""
        kind, slices = across_slices(i)
        share = (slices - 1) / slices  # of a reduce-scatter and an all-to-all
        sent = size * {"ALL_GATHER": slices - 1, "ALL_REDUCE": 2 * share, "ONE_TO_ONE": 1}.get(kind, share)
        return sent / self.chip.network_bytes_per_s + NETWORK_S, frozenset({(NETWORK, 1), (NETWORK, -1)}), sent

    def _axis_rate(self, axis: int) -> float:
        length = int(self.places[:, axis].max()) + 1
        return self.chip.link_bytes_per_s * (2 if length >= self.chip.wraps_from else 1)

    def _wire_bytes(self, program: Program, collective: Instruction, group: int) -> float:
        """What one device would send if each of its group sent it all around; less its own share in `seconds`."""
        operands = sum(array_bytes(program.shapes[name]) for name in collective.operands if name in program.shapes)
        kind = collective.collective
        if kind == "all-gather":
            return operands * group
        if kind == "all-reduce":
            return 2 * operands
        if kind in ("all-to-all", "ragged-all-to-all"):
            return operands * group / 4 if self.chip.is_tpu else operands  # a ring passes it on, a switch does not
        return operands  # reduce-scatter, collective-permute

    def _permute(self, sent: float, pairs: list[list[int]]) -> tuple[float, frozenset[tuple[int, int]]]:
        """The farthest pair decides."""
        first, second = (self.places[[pair[side] for pair in pairs]] for side in (0, 1))
        step, lengths = second - first, self.places.max(axis=0) + 1
        if self.chip.is_tpu:  # the shorter way around a ring
            around = (step + lengths // 2) % lengths - lengths // 2
            step = np.where(lengths >= self.chip.wraps_from, around, step)
        links = frozenset((int(axis), int(np.sign(size))) for axis, size in zip(*_nonzero(step), strict=True))
        if not self.chip.is_tpu:
            between = bool(step[:, 0].any())
            return sent / (self.chip.network_bytes_per_s if between else self.chip.link_bytes_per_s) + HOP_S, links
        hops = int(np.abs(step).sum(axis=1).max())
        return sent * max(hops, 1) / self.chip.link_bytes_per_s + HOP_S * hops, links


def _nonzero(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes and steps along them, of all pairs that move along one."""
    rows, axes = np.nonzero(step)
    return axes, step[rows, axes]
