"""Which process of how many this is: by the environment's word, else by what JAX finds out about the cluster."""

import os
import socket
from typing import NamedTuple

from jax._src.clusters import ClusterEnv  # the detection itself has no public name

from k2jax.errors import ConfigError

SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Place(NamedTuple):
    """Of this process among those of the run."""

    address: str  # of the coordinator, HOST:PORT
    count: int
    index: int
    local_devices: list[int] | None  # None: all that are here
    found_by: str
    bind: bool  # the coordinator listens on that address alone: it has no authentication


def find_place(limit_s: int) -> Place | None:
    """None where nothing says that there are several processes. ConfigError for what is set in part.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID if set; else the cluster that JAX detects: Slurm and
    Open MPI by variables of a step, TPU pods by Google's metadata server, Kubernetes by its own. A job's variables that
    are left in a shell or container are no cluster to it.
    """
    given = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    if given:
        return _as_set(given)
    found = next((env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and _is_present(env)), None)
    if found is None:
        return None
    try:
        count = found.get_process_count()
        if count == 1:
            return None
        detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, limit_s)
    except Exception as error:  # KeyError, ValueError, RuntimeError: whatever the cluster's word gives
        raise ConfigError(
            f"this looks like a process on a cluster ({found.name}), but its place there cannot be told "
            f"({type(error).__name__}: {error}): set {', '.join(SETTINGS)}, or take the cluster's variables out of the "
            f"environment to run one process"
        ) from error
    address, count, index, local_devices = detected
    return Place(address, count, index, local_devices, f"the cluster ({found.name})", bind=False)


def _is_present(env: type[ClusterEnv]) -> bool:
    try:
        return env.is_env_present()
    except Exception as error:
        raise ConfigError(
            f"cannot find out whether this is a process on a cluster ({env.name}: {type(error).__name__}: {error}): "
            f"set {', '.join(SETTINGS)}; for one process, JAX_NUM_PROCESSES=1"
        ) from error


def _as_set(given: dict[str, str]) -> Place | None:
    if given.get("JAX_NUM_PROCESSES") == "1":
        return None
    missing = [name for name in SETTINGS if name not in given]
    if missing:
        raise ConfigError(f"{', '.join(given)} is set: set {' and '.join(missing)} too")
    address, count, index = (given[name] for name in SETTINGS)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)) or ":" not in address:
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: expected "
            f"HOST:PORT, a number of processes, and one below it"
        )
    return Place(address, int(count), int(index), None, "the environment", bind=index == "0")


def alone() -> Place:
    """One process, with a coordinator on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Place(f"127.0.0.1:{free.getsockname()[1]}", 1, 0, None, "nothing", bind=True)


def bypass_proxies(*hosts: str) -> None:
    """What the processes say to each other, and to the machine's own services, goes through no proxy."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        old = [part for part in os.environ.get(name, "").split(",") if part]
        if name == "no_grpc_proxy" and not old:
            continue  # gRPC then takes no_proxy
        new = [host for host in ("127.0.0.1", "localhost", *hosts) if host not in old]
        os.environ[name] = ",".join([*old, *new])
