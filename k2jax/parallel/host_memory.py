"""Memory that a trainer takes: a GPU's, as much as a plan assumes; and without accelerators the host's, in huge pages
and kept by the process between steps.

XLA's CPU backend allocates the temporaries of every step with malloc. glibc gives large blocks back to the kernel when
they are freed, and every step faults all its pages in again. Measured with 4.2 GB of temporaries (58M weights, 4,096
tokens), pages of 4 KiB being faulted in at 7 us each:

    glibc's defaults              1.2 million faults a step   9.5 s a step
    freed memory kept             none                        6.0 s
    the same, in huge pages       none                        5.7 s

5.7 GB are resident then. Each step in flight would take as much again (cluster.initialize sees to that).
Accelerators have allocators of their own.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

# Parameters of glibc's mallopt(3). Only the main arena can hold on to blocks of any size, so there is only that one.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # malloc asks the kernel for transparent huge pages; glibc 2.35 and newer
# Of a GPU's memory: JAX takes 0.75 unless told, and a plan counts on this share (plan/chips.py). The rest is CUDA's.
GPU_SHARE = 0.92


def take_gpu_memory() -> None:
    """Before JAX finds its devices. What the user's environment says stays."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))


def _is_glibc_without_accelerator() -> bool:
    names = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")
    has_accelerator = any(True for name in names for _ in Path("/dev").glob(name))
    return not has_accelerator and platform.libc_ver()[0] == "glibc"


def use_huge_pages() -> None:
    """Starts this program once more, in this process, with the setting that glibc reads at the start only.

    For the first lines of a program. Does nothing where GLIBC_TUNABLES is set, on accelerators or without glibc.
    """
    if "GLIBC_TUNABLES" not in os.environ and _is_glibc_without_accelerator():
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Call it before threads start: a thread keeps the arena it has. Does nothing on accelerators or without glibc."""
    if not _is_glibc_without_accelerator():
        return
    # A limit of -1 is none; the largest that fits an int would be 2 GiB.
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 26)):
        libc.mallopt(parameter, value)
