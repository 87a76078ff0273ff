"""What each process of a run takes and waits for, so that a slow host has a name.

Every `log.every_steps` each of them puts its means into the key-value store (parallel/cluster.py), and process 0 takes
what lies there: nobody waits, and what another says may be that much older. A step ends on all devices at once, so
that step times are alike: what tells is `own_s`, of a step the time in which a process did not wait for its devices.
"""

import socket
import statistics
from typing import NamedTuple

from k2jax.parallel import cluster

SLOW = 1.5  # times the median of all, and
OF_A_STEP = 0.1  # more than the median by this share of a step
MOST = 64  # processes in a row: those that have the most time of their own
GIB = 2**30


class Host(NamedTuple):
    """Means of a process over the steps since it last said them."""

    process: int
    host: str
    step: int  # the last of them
    step_s: float
    data_wait_s: float
    own_s: float
    device_gib: float | None  # of its first device, the most up to now
    host_gib: float  # of the process, the most up to now


class Hosts:
    """Says what this process takes; one process alone says nothing."""

    def __init__(self, every: int):
        self.every = every
        self._steps: list[tuple[float, float, float]] = []

    def note(
        self, step: int, step_s: float | None, data_wait_s: float, own_s: float, memory: dict[str, int | None]
    ) -> list[Host]:
        """What is known of all, on process 0 and every so many steps; else []. `step_s` None: with compiling in it."""
        if cluster.count() == 1:
            return []
        if step_s is not None:
            self._steps.append((step_s, data_wait_s, own_s))
        if step % self.every or not self._steps:
            return []
        means = [_short(statistics.fmean(values)) for values in zip(*self._steps, strict=True)]
        self._steps = []
        sizes = [memory[key] for key in ("device_memory_peak_bytes", "host_memory_peak_bytes")]
        gib = [None if size is None else _short(size / GIB) for size in sizes]
        cluster.post("hosts", [cluster.index(), socket.gethostname(), step, *means, *gib])
        return [Host(*values) for _, values in sorted(cluster.posted("hosts").items())] if cluster.is_main() else []


def columns(hosts: list[Host]) -> dict[str, list]:
    """For a row of the metrics: {field: a value of each process}."""
    shown = sorted(sorted(hosts, key=lambda host: -host.own_s)[:MOST])
    return {field: [getattr(host, field) for host in shown] for field in Host._fields}


def slow(hosts: list[Host]) -> list[str]:
    """A line for each that keeps the others waiting."""
    if not hosts:
        return []
    median = statistics.median_low([host.own_s for host in hosts])
    found = [h for h in hosts if h.own_s > max(SLOW * median, median + OF_A_STEP * h.step_s)]
    return [
        f"slow: process {h.process} on {h.host} takes {h.own_s:.3g} s of its own in a step of {h.step_s:.3g} s, "
        f"{h.data_wait_s:.3g} s of it for data; the median of {len(hosts)} processes is {median:.3g} s"
        for h in found
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
