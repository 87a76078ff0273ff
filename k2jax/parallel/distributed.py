"""Processes of one run: start-up, and stopping together when one of them is preempted."""

import itertools
import os
import socket

import jax
from jax.experimental import multihost_utils

from k2jax.errors import RunError

HEARTBEAT_S = 60  # a peer that is gone this long ends the others
ALONE_S = 7 * 86_400


def initialize() -> None:
    """Joins the processes of this run; call once, before anything touches a device.

    Also with one process, because JAX's preemption service (SIGTERM: save, then exit) exists only then. In order:
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID if set; else the cluster that JAX detects (TPU pods,
    Slurm, MPI); else one process. The coordinator listens on its own address only: it has no authentication.
    """
    # A step on CPU takes its temporaries when it is dispatched, not when it starts: those of steps in flight add up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    if address and not (count and index):
        raise RunError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too")
    common = {"heartbeat_timeout_seconds": HEARTBEAT_S}
    if address:
        bind = {"coordinator_bind_address": address} if index == "0" else {}
        jax.distributed.initialize(address, int(count), int(index), **bind, **common)
        return
    if any(name.startswith(("TPU_WORKER", "SLURM_JOB", "OMPI_", "MEGASCALE_")) for name in os.environ):
        jax.distributed.initialize(**common)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Alone there is no peer to miss, and a process stopped for a while (Ctrl-Z) would end itself when it goes on.
    jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address, heartbeat_timeout_seconds=ALONE_S)


_calls = itertools.count(1)


def preempted() -> bool:
    """True on every process before the same step, after a SIGTERM to any of them. Call it once a step.

    JAX stops at one number, the highest that a process had given it when the signal came, plus one; before the first
    call that is 1. So calls are counted here: with the steps of a resumed run, an early signal would be lost.
    """
    return multihost_utils.reached_preemption_sync_point(next(_calls))
