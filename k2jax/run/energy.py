"""Energy of a host's GPUs by NVIDIA's own counters; a stated power where there are none."""

from importlib.util import find_spec

# Watts of one device at most, by the start of JAX's `device_kind`: NVIDIA's data sheets of the SXM modules; for TPU v4
# what Jouppi et al. 2023 (arXiv 2304.01433, table 4) measured at most. Google has published none for later TPUs.
WATTS = {"NVIDIA A100": 400.0, "NVIDIA H100": 700.0, "NVIDIA H200": 700.0, "TPU v4": 192.0}


def stated_watts(device_kind: str) -> float | None:
    """Of one device; None where no maker says."""
    return next((watts for name, watts in WATTS.items() if device_kind.startswith(name)), None)


def joules() -> float | None:
    """That all GPUs of this host have used since their driver was loaded; None without GPUs that count it, or without
    the package nvidia-ml-py."""
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        used_mj = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]  # millijoules
    except pynvml.NVMLError:  # no driver, or a device older than Volta
        return None
    return sum(used_mj) / 1e3 if handles else None
