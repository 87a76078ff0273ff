"""TPUs that are not here: their compiler runs on any machine that has libtpu (the extra `tpu`)."""

import os
from typing import Any

from k2jax.errors import ConfigError

# A generation's smallest slice that the compiler takes, and what a TensorCore's matrix units do in a cycle:
# multiply-adds of bfloat16 (jax's tpu_info has their number and width).
GENERATIONS = {
    "v4": ("v4:2x2x1", 4 * 128 * 128),
    "v5e": ("v5e:2x2", 4 * 128 * 128),
    "v5p": ("v5p:2x2x1", 4 * 128 * 128),
    "v6e": ("v6e:2x2", 2 * 256 * 256),
    "tpu7x": ("tpu7x:2x2x1", 2 * 256 * 256),
}


def use_tpu_compiler(dump: str | None = None) -> None:
    """Environment for the compiler without a TPU; before jax is imported. `dump`: where it writes its programs."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


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
