"""Devices that are not here: their compilers run on any machine that has libtpu (the extra `tpu`) or jax's CUDA plugin
(the extra `gpu`)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.errors import ConfigError


class Generation(NamedTuple):
    smallest: str  # slice that the compiler takes
    matrix_rows: int  # of bfloat16 that a TensorCore's matrix units take in a cycle, all together
    matrix_width: int  # of each unit: a row times a square of so many numbers

    @property
    def multiply_adds(self) -> int:
        """In a cycle of a TensorCore."""
        return self.matrix_rows * self.matrix_width**2


# Numbers and widths of the units as in jax's tpu_info; rows a cycle so that the rates are the published ones.
GENERATIONS = {
    "v4": Generation("v4:2x2x1", 4, 128),
    "v5e": Generation("v5e:2x2", 4, 128),
    "v5p": Generation("v5p:2x2x1", 4, 128),
    "v6e": Generation("v6e:2x2", 4, 256),
    "tpu7x": Generation("tpu7x:2x2x1", 4, 256),
}
# GPU.txtpb beside this file describes each to XLA: the H100 SXM5 and the A100 SXM4, both of 80 GB. The A100 numbers
# are of NVIDIA's data sheet (memory, bandwidth, clock) and of the CUDA programming guide's compute capabilities.
GPUS = ("h100", "a100")
GPUS_PER_HOST = 8
MOST_SLICES = 64  # of a topology: the compiler numbers devices by slice and knows no bound of its own


def use_tpu_compiler(dump: str | None = None) -> None:
    """Environment for compilers without their devices; before jax is imported. `dump`: where TPU programs go."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def devices(topology: str) -> list[Any]:
    """Devices such as "v5p:8x8x8" or "h100:64", to compile for. ConfigError where there are none such."""
    name = topology.partition(":")[0]
    if name in GPUS:
        return gpu_devices(topology)
    if name in GENERATIONS:
        return tpu_devices(topology)
    raise ConfigError(
        f"topology {topology!r}: unknown; it is GENERATION:SHAPE for TPUs, as v5p:8x8x8, with a generation of "
        f"{', '.join(GENERATIONS)}, or GPU:NUMBER, as h100:64, with a GPU of {', '.join(GPUS)}"
    )


def gpu_devices(topology: str) -> list[Any]:
    """GPUs such as "h100:8": some of one host, or whole hosts of 8. ConfigError where that cannot be."""
    from jax.experimental import topologies

    name, _, text = topology.partition(":")
    number = int(text) if text.isdecimal() else 0
    if name not in GPUS or not number or (number > GPUS_PER_HOST and number % GPUS_PER_HOST):
        raise ConfigError(
            f"topology {topology!r}: it is GPU:NUMBER, as h100:64, with a GPU of {', '.join(GPUS)} and a number below "
            f"{GPUS_PER_HOST} (of one host) or a multiple of it"
        )
    hosts, of_host = max(number // GPUS_PER_HOST, 1), min(number, GPUS_PER_HOST)
    description = (Path(__file__).parent / f"{name}.txtpb").read_text()
    shape = {"topology": f"1x{hosts}x{of_host}", "target_config": description}
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **shape).devices)
    except NotImplementedError as error:  # no plugin knows the platform
        raise ConfigError(f"topology {topology!r}: needs CUDA's compiler: pip install 'k2jax[gpu]'") from error


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a slice such as "v5p:8x8x8", or of two as "v5p:8x8x8*2", to compile for. ConfigError where there is no
    such slice."""
    from jax.experimental import topologies

    name, several, slices = topology.partition("*")
    if several and not (slices.isdecimal() and 0 < int(slices) <= MOST_SLICES):
        raise ConfigError(f"topology {topology!r}: after * stands the number of slices, 1 to {MOST_SLICES}")
    options = {"num_slices": int(slices)} if several else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # whatever libtpu and the plugin raise: RuntimeError, JaxRuntimeError, ...
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"topology {topology!r}: {reason}; it is GENERATION:SHAPE, as v5p:8x8x8 or v6e:16x16, and *NUMBER where "
            f"there are several such slices, as v5p:8x8x8*2, with a generation of {', '.join(GENERATIONS)}"
        ) from error
