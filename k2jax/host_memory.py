"""Host memory on a machine without accelerators: kept by the process between steps, not given back to the kernel.

XLA's CPU backend allocates the temporaries of every step with malloc, on many threads. glibc gives large blocks back to
the kernel when they are freed, and every step faults all its pages in again: with 4.3 GB of temporaries (58M weights,
4,096 tokens), 1.2 million faults and 9.5 s a step where there are none and 7.0 s. The price is memory: the holes that
steps leave are reused, but up to three are made (14 GB resident there, 3.4 where a step needs 0.8). Accelerators have
allocators of their own.
"""

import ctypes
import platform
from pathlib import Path

# Parameters of glibc's mallopt(3). Only the main arena can hold on to blocks of any size, so there is only that one.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Call it before threads start: a thread keeps the arena it has. Does nothing on accelerators or without glibc."""
    names = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")
    has_accelerator = any(True for name in names for _ in Path("/dev").glob(name))
    if has_accelerator or platform.libc_ver()[0] != "glibc":
        return
    # A limit of -1 is none; the largest that fits an int would be 2 GiB.
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 26)):
        libc.mallopt(parameter, value)
