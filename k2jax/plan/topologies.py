"""TPUs that are not here: their compiler runs on any machine that has libtpu (the extra `tpu`)."""

import os
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


def use_tpu_compiler(dump: str | None = None) -> None:
    """Environment for the compiler without a TPU; before jax is imported. `dump`: where it writes its programs."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def devices(topology: str) -> list[Any]:
    """Of any topology that a plan knows."""
    return tpu_devices(topology)


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a slice such as "v5p:8x8x8", to compile for. ConfigError where there is no such slice."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever libtpu and the plugin raise: RuntimeError, JaxRuntimeError, ...
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"topology {topology!r}: {reason}; it is GENERATION:SHAPE, as v5p:8x8x8 or v6e:16x16, with a generation "
            f"of {', '.join(GENERATIONS)}"
        ) from error
