"""What a plan knows of each accelerator. A device is what the compiler counts: a chip, or one of the two TensorCores of
a TPU7x or a v4. (On a v4 itself, JAX makes the two one device; its compiler without one does not.)

Sources: peaks as in flops.py; memory as the TPU compiler states its limit ("exceeds available HBM (95.74G)"); of GPUs,
the share that the trainer takes of what nvidia-smi shows of an H100 SXM5 and an A100 SXM4 of 80 GB; HBM and link rates
from the vendors' data sheets and, for TPU links, the scaling book's usable rates (jax-ml.github.io/scaling-book, "TPU
networking"). To the host's memory: the scaling book's 16 GB/s a chip, 32 on v6e ("TPU specs"), as much assumed of a
TPU7x; GPUs' PCIe 5 and 4 with 16 lanes, by their data sheets. Between slices: the data center network bandwidth of
Google Cloud's pages of each TPU (docs.cloud.google.com/tpu/docs/v5p: 50 Gbit/s a chip; v5e and v6e: 6.4 and 25.6 Tbit/s
a pod of 256); a v4's is assumed to be a v5p's, a TPU7x's a v6e's.
"""

from dataclasses import dataclass, field

from k2jax.errors import ConfigError
from k2jax.model.flops import PEAK_FLOPS
from k2jax.parallel.host_memory import GPU_SHARE

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Chip:
    """One device, and its links to the others.

    TPU links: one to each side along each axis of a torus. GPU links: all of a device's NVLinks together, which reach
    the `domain` devices of its host. `network_bytes_per_s`: a device's share of the network, each way; between hosts of
    GPUs, and between slices of TPUs.
    """

    name: str
    kind: str  # JAX's device_kind
    hbm_bytes: int  # that a program may use
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # one direction
    host_bytes_per_s: float  # to the host's memory, and as much back
    cores: int = 1  # of a device, that share the grid of a kernel
    devices_per_chip: int = 1
    peak_share: float = 1.0  # of flops.py's peak, which is of a device as JAX has it on the hardware
    wraps_from: int = 4  # an axis of a slice of this size closes to a ring; shorter ones are lines
    domain: int = 0  # GPU: devices of a host
    network_bytes_per_s: float = field(kw_only=True)

    @property
    def peak_flops(self) -> float:
        return PEAK_FLOPS[self.kind] * self.peak_share

    @property
    def is_tpu(self) -> bool:
        return self.domain == 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", int(15.25 * GIB), 0.61e12, 45e9, 8e9, devices_per_chip=2, peak_share=0.5,
             network_bytes_per_s=3.125e9),
        Chip("v5e", "TPU v5 lite", int(15.75 * GIB), 0.82e12, 45e9, 16e9, wraps_from=16, network_bytes_per_s=3.125e9),
        Chip("v5p", "TPU v5", int(95.74 * GIB), 2.77e12, 90e9, 16e9, cores=2, network_bytes_per_s=6.25e9),
        Chip("v6e", "TPU v6 lite", int(31.25 * GIB), 1.64e12, 90e9, 32e9, wraps_from=16, network_bytes_per_s=12.5e9),
        Chip("tpu7x", "TPU7x", int(94.75 * GIB), 3.69e12, 90e9, 16e9, devices_per_chip=2, network_bytes_per_s=6.25e9),
        Chip("h100", "NVIDIA H100", int(GPU_SHARE * 81_559 * MIB), 3.35e12, 450e9, 64e9, domain=8,
             network_bytes_per_s=50e9),
        Chip("a100", "NVIDIA A100", int(GPU_SHARE * 81_920 * MIB), 2.04e12, 300e9, 32e9, domain=8,
             network_bytes_per_s=25e9),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name, as v5p:8x8x8 or h100:16. ConfigError names the known ones."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ConfigError(
            f"topology {topology!r}: unknown accelerator {name!r}; known: {', '.join(CHIPS)}, as in v5p:8x8x8, "
            f"v5p:8x8x8*2, v6e:16x16 or h100:16"
        )
    return CHIPS[name]
