"""How many cores this process may use: a container or a batch job has fewer than the machine."""

import os
from pathlib import Path

ROOT = Path("/")


def cores() -> int:
    """Those that the scheduler may put this process on, and no more than its cgroups' quota of CPU time; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    else:
        found = os.cpu_count() or 1
    return max(1, int(min([found, *_quotas()])))


def _quotas() -> list[float]:
    """In cores, of every cgroup that this process is in; a part of one counts as none, but the first."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no Linux
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        mounts = ["unified", ""] if number == "0" and not controllers else [controllers, "cpu"]
        if mounts[1] == "cpu" and "cpu" not in controllers.split(","):
            continue
        # Within a container the path is often that on the host, where its own cgroup is at the mount's top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                found.append(_quota((ROOT / "sys/fs/cgroup" / mount).joinpath(*parts[:depth])))
    return [quota for quota in found if quota]


def _quota(folder: Path) -> float | None:
    """Of one cgroup, of either version."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None
