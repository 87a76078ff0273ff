"""Which machines a topology's name means: slices, hosts, devices, and what clouds call them.

Names are those of tools/plan.py: v5p:8x8x8, v5p:8x8x8*2 (two slices), h100:16; and cpu:2x4, two hosts that play four
devices each, to try a launch. Sources: cloud.google.com/tpu/docs (versions, queued resources, "TPUs in GKE") for types,
runtime versions and chips of a host; cloud.google.com/kubernetes-engine for labels.
"""

import math
import re
from typing import NamedTuple

from k2jax.errors import ConfigError
from k2jax.plan.chips import CHIPS, Chip

CHIPS_OF_HOST = 4  # of a slice that has more than one
SMALL = 8  # chips of a v5e or v6e slice that are still one host
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e


class Names(NamedTuple):
    """What Google calls a kind of accelerator."""

    accelerator: str  # the Cloud TPU API's, before "-NUMBER"; "" where there is none
    per_chip: int  # that number counts TensorCores, or chips
    runtime: str  # of a TPU VM
    gke: str  # the node label's
    gke_gpu: str = ""


NAMES = {
    "v4": Names("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Names("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Names("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Names("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Names("", 2, "", "tpu7x"),  # on GKE alone
    "h100": Names("H100", 1, "", "nvidia-h100-80gb"),
    "a100": Names("A100-80GB", 1, "", "nvidia-a100-80gb"),
}


class Hosts(NamedTuple):
    """The machines of a topology."""

    topology: str
    kind: str  # v5p, h100, cpu
    shape: str  # of a slice, 8x8x8; of GPUs and CPUs ""
    slices: int
    hosts_per_slice: int
    chips_per_host: int
    devices_per_host: int  # as JAX counts them there

    @property
    def hosts(self) -> int:
        return self.slices * self.hosts_per_slice

    @property
    def devices(self) -> int:
        return self.hosts * self.devices_per_host

    @property
    def chips(self) -> int:
        return self.hosts * self.chips_per_host

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.kind)

    @property
    def is_tpu(self) -> bool:
        return self.chip is not None and self.chip.is_tpu

    @property
    def platform(self) -> str:
        """JAX's name of it."""
        return "tpu" if self.is_tpu else "gpu" if self.is_gpu else "cpu"

    @property
    def is_gpu(self) -> bool:
        return self.chip is not None and not self.chip.is_tpu

    @property
    def names(self) -> Names:
        return NAMES[self.kind]

    @property
    def accelerator_type(self) -> str:
        """Of a slice, such as v5p-1024."""
        return f"{self.names.accelerator}-{self.names.per_chip * self.chips // self.slices}"

    def describe(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        many = f"{self.hosts_per_slice} host(s) with {self.devices_per_host} device(s) each"
        return f"{self.topology}: {slices}{many}, {self.devices} devices in all"


def parse(topology: str) -> Hosts:
    """The machines of a name. ConfigError for one that is none."""
    kind = topology.partition(":")[0]
    if kind == "cpu":
        return _cpus(topology)
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology={topology}: unknown accelerator {kind!r}; known: {', '.join(CHIPS)}, cpu, as in v5p:8x8x8, "
            f"v5p:8x8x8*2, h100:16, cpu:2x4"
        )
    return _tpus(topology, CHIPS[kind]) if CHIPS[kind].is_tpu else _gpus(topology, CHIPS[kind])


def _cpus(topology: str) -> Hosts:
    found = re.fullmatch(r"cpu:([1-9]\d*)x([1-9]\d*)", topology)
    if not found:
        raise ConfigError(f"--topology={topology}: of CPUs it is cpu:HOSTSxDEVICES, as cpu:2x4")
    hosts, devices = int(found[1]), int(found[2])
    return Hosts(topology, "cpu", "", 1, hosts, devices, devices)


def _gpus(topology: str, chip: Chip) -> Hosts:
    found = re.fullmatch(r"\w+:([1-9]\d*)", topology)
    number = int(found[1]) if found else 0
    if not number or (number > chip.domain and number % chip.domain):
        raise ConfigError(
            f"--topology={topology}: of GPUs it is {chip.name}:NUMBER, below {chip.domain} (of one host) or a multiple "
            f"of it"
        )
    of_host = min(number, chip.domain)
    return Hosts(topology, chip.name, "", 1, number // of_host, of_host, of_host)


def _tpus(topology: str, chip: Chip) -> Hosts:
    flat = chip.name in ("v5e", "v6e")
    size = r"[1-9]\d*"
    found = re.fullmatch(rf"\w+:({size}(?:x{size}){{{1 if flat else 2}}})(?:\*({size}))?", topology)
    chips = math.prod(map(int, found[1].split("x"))) if found else 0
    if not found or (found[1] not in FLAT if flat else chips % CHIPS_OF_HOST):
        shapes = f"one of {', '.join(FLAT)}" if flat else "AxBxC chips, a multiple of 4, as 2x2x1 or 8x8x8"
        raise ConfigError(
            f"--topology={topology}: of {chip.name} it is {chip.name}:SHAPE[*SLICES], SHAPE {shapes}"
        )
    hosts = 1 if flat and chips <= SMALL else chips // CHIPS_OF_HOST
    devices = 2 if chip.name == "tpu7x" else 1  # a v4's two cores are one device
    of_host = chips // hosts
    return Hosts(topology, chip.name, found[1], int(found[2] or 1), hosts, of_host, of_host * devices)


def is_default_shape(hosts: Hosts) -> bool:
    """Whether a slice of that many chips has this shape where only their number is named."""
    sizes = sorted(map(int, hosts.shape.split("x")))
    return (
        len(sizes) == 2 or all(size & (size - 1) == 0 for size in sizes) and sizes[-1] <= 2 * max(sizes[0], 1)
    )
