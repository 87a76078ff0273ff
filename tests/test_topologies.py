"""Devices that are not here, by name: GPUs here, TPUs where their kernels are compiled (test_flash_attention.py)."""


import pytest
from compilers import HAS_GPU_COMPILER, on_gpu_compiler

from k2jax.errors import ConfigError
from k2jax.plan import topologies


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("b200:8", "unknown; .*v5p:8x8x8, with a generation of v4, v5e.*h100:64, with a GPU of h100, a100"),
        ("h100", "it is GPU:NUMBER"),
        ("h100:0", "it is GPU:NUMBER"),
        ("h100:2x4", "it is GPU:NUMBER"),
        ("a100:12", "a number below 8 .of one host. or a multiple of it"),
    ],
)
def test_a_name_of_no_devices_is_refused(topology: str, message: str):
    with pytest.raises(ConfigError, match=message):
        topologies.devices(topology)


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="it can")
def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="pip install 'k2jax.gpu.'"):
        topologies.devices("h100:8")


@on_gpu_compiler
@pytest.mark.parametrize(
    ("topology", "hosts", "kind", "capability"),
    [
        ("h100:8", [8], "NVIDIA H100 80GB HBM3", "9.0"),
        ("h100:3", [3], "NVIDIA H100 80GB HBM3", "9.0"),
        ("a100:16", [8, 8], "NVIDIA A100-SXM4-80GB", "8.0"),
    ],
)
def test_gpus_come_in_hosts_of_eight(topology: str, hosts: list[int], kind: str, capability: str):
    found = topologies.devices(topology)
    indices = [device.process_index for device in found]
    assert [indices.count(i) for i in range(max(indices) + 1)] == hosts
    assert {(device.device_kind, device.compute_capability) for device in found} == {(kind, capability)}
