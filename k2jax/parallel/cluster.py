"""The control plane: the processes of one run, what they decide together, and how they end together.

What steers control flow (which checkpoint, whether it is good, whether the configuration is the run's) is decided once
and received by all, through `decide`, `together` and `agree`; nothing else asks which process this is. It goes through
the key-value store of JAX's coordination service, which process 0 serves, never through the devices: a process that
failed elsewhere is then no collective that hangs, and each wait has a limit.

A thread of every process says every few seconds that it lives, and looks whether another has failed: the devices'
collectives wait for a lost process for ever, and only leaving the program ends them.
"""

import atexit
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed as service  # the key-value store has no public name
from jax.experimental import multihost_utils

from k2jax import errors, stopping
from k2jax.errors import ConfigError, PeerError, Preempted, RunError
from k2jax.parallel.place import alone, bypass_proxies, find_place

T = TypeVar("T")
START_S = 300  # in which all processes must have come together
LIMIT_S = 1800  # for what one process does while the others wait: reading its part of a large checkpoint
HEARTBEAT_S = 100  # by which JAX itself aborts; ours is sooner and says who
ALONE_S = 7 * 86_400
BEAT_S, GONE_S = 4.0, 32.0  # between signs of life; without one for so long a process counts as gone
GRACE_S = 5.0  # for the main thread to leave by itself, with its own line and code
LEAVE_S = 15.0  # process 0 serves the store: it leaves when the others have, or after this
OF_A_COLLECTIVE = r"Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|coordination service|[Cc]onnection (reset|closed)"
ROOT = "k2jax/"
ERRORS = {error.__name__: error for error in (RunError, *errors.BY_NEED)}  # the worst first

_calls, _syncs = itertools.count(1), itertools.count(1)
_kept: list[Any] = []  # what C code holds on to
_ending = threading.Event()  # in order
_jax_on_sigterm: list[Callable[[int], None]] = []  # what tells its preemption service
_abort_line: list[str] = []  # the last is what an abort means by now


def initialize() -> None:
    """Joins the processes of this run; call once, before anything touches a device.

    Also with one process, because JAX's preemption service (SIGTERM: save, then exit) exists only then. The program
    ends with 70 and one line when several processes are claimed and do not come together in START_S.
    """
    stopping.watch()
    # A step on CPU takes its temporaries when it is dispatched, not when it starts: those of steps in flight add up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    bypass_proxies("metadata.google.internal", "169.254.169.254")
    place = find_place(START_S) or alone()
    bypass_proxies(place.address.rpartition(":")[0])
    jax.config.update("jax_check_proxy_envs", False)  # it warns of those that were just set
    if place.count > 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # On a CPU a collective holds a thread until its peers come, and XLA has no more threads than devices: a few
        # that each device begins in another order would wait for one another for ever. XLA reads this variable.
        os.environ.setdefault("NPROC", str(max(64, os.cpu_count() or 1)))
    # Alone there is no peer to miss, and a process stopped for a while (Ctrl-Z) would end itself when it goes on.
    heartbeat_s = HEARTBEAT_S if place.count > 1 else ALONE_S
    bind = {"coordinator_bind_address": place.address} if place.bind else {}
    if place.count > 1:
        _exit_in_order_on_abort()
        _abort_line.append(
            f"{place.found_by} says process {place.index} of {place.count}, coordinator {place.address}, and they did "
            f"not come together in {START_S} s: start the same command on all of them, or, for one process alone, "
            f"unset what says so"
        )
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=heartbeat_s,
        shutdown_timeout_seconds=int(LEAVE_S) * 4,
        **bind,
    )
    _take_sigterm_back()
    if place.count > 1:
        _abort_line.append("another process is gone, or the runtime gave up: see above")
        errors.leave_with(_Peers())
        stopping.leave_by(_Peers().leave)
        watch = threading.Thread(target=_watch, name="k2jax-watch", daemon=True)
        watch.start()
        atexit.register(_stop_watching, watch)  # before JAX, which registered earlier, takes leave of the store


def index() -> int:
    """Of this process."""
    return service.global_state.process_id


def count() -> int:
    """Of all processes of the run."""
    return service.global_state.num_processes


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return index() == 0


def preempted() -> bool:
    """True on every process before the same step, after a SIGTERM, SIGINT or SIGHUP to any. Call it once a step.

    JAX stops at one number, the highest that a process had given it when the signal came, plus one; before the first
    call that is 1. So calls are counted here: with the steps of a resumed run, an early signal would be lost.
    """
    call = next(_syncs)
    if call == 1 and _jax_on_sigterm:
        stopping.at_a_step(lambda: _jax_on_sigterm[0](signal.SIGTERM))
    return multihost_utils.reached_preemption_sync_point(call)


# ---- deciding --------------------------------------------------------------------------------------------------------


def decide(what: str, f: Callable[[], T], limit_s: float | None = None, key: str = "") -> T:
    """What `f` gives on process 0, in JSON's types, on every process; or the error that it raises there, on all.

    Calls are matched by their number. One from a thread beside the main one has a `key` that no other has.
    """
    key = _key(what, key)
    if count() == 1:
        return json.loads(json.dumps(f()))
    if is_main():
        outcome = _outcome(f)
        _set(key, outcome)
    else:
        outcome = _get(key, f"process 0, which {what},", limit_s or LIMIT_S)
    return _result(outcome)


def together(what: str, f: Callable[[], T], limit_s: float | None = None, key: str = "") -> T:
    """Every process does `f` and gets its own result, or all raise when any has: the worst error, with every reason.

    `key` as for `decide`.
    """
    key = _key(what, key)
    if count() == 1:
        return f()
    mine: list[T] = []
    _set(f"{key}/{index()}", _outcome(lambda: mine.append(f())))
    if is_main():
        found = [_get(f"{key}/{i}", f"process {i}, which {what},", limit_s or LIMIT_S) for i in range(count())]
        verdict = _worst(found)
        _set(f"{key}/verdict", verdict)
    else:
        verdict = _get(f"{key}/verdict", f"process 0, which {what},", (limit_s or LIMIT_S) + GRACE_S)
    _result(verdict)
    return mine[0]


def gather(what: str, f: Callable[[], T], limit_s: float = LIMIT_S) -> list[T]:
    """What `f` gives on each process, in JSON's types, on every process; or the worst error of any, on all."""
    key = _key(what)
    if count() == 1:
        return [json.loads(json.dumps(f()))]
    _set(f"{key}/{index()}", _outcome(f))
    if is_main():
        found = [_get(f"{key}/{i}", f"process {i}, which {what},", limit_s) for i in range(count())]
        verdict = _worst(found) if any("error" in one for one in found) else {"value": [one["value"] for one in found]}
        _set(f"{key}/all", verdict)
    else:
        verdict = _get(f"{key}/all", f"process 0, which {what},", limit_s + GRACE_S)
    return _result(verdict)


def agree(what: str, values: dict[str, Any]) -> None:
    """Raises ConfigError on every process, naming key and values, unless all have the values of process 0."""
    values = json.loads(json.dumps(values))
    first = decide(f"says its {what}", lambda: values)

    def compare() -> None:
        odd = [key for key in sorted(first.keys() | values.keys()) if first.get(key) != values.get(key)]
        if odd:
            shown = "; ".join(f"{key}: {values.get(key)!r}, process 0 has {first.get(key)!r}" for key in odd[:10])
            raise ConfigError(
                f"process {index()} on {socket.gethostname()} has another {what} than process 0: {shown}: start all "
                f"processes with the same command, code and data"
            )

    together(f"compares its {what}", compare)


def array_of_main(array: np.ndarray) -> np.ndarray:
    """That of process 0 on every process; each has one of its shape and type, and a device."""
    return multihost_utils.broadcast_one_to_all(array) if count() > 1 else array


def post(name: str, value: Any) -> None:
    """Says something of this process, in JSON's types, in the place of what it said under that name before."""
    _set(f"{ROOT}{name}/{index()}", value)


def posted(name: str) -> dict[int, Any]:
    """{process: what it said last}, of those that have said anything; nobody is waited for."""
    return _all(f"{name}/")


def _outcome(f: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": f()}
    except Exception as error:
        ours = errors.of_system(error)
        if type(ours) is RunError:
            errors.print_trace(error)  # a bug: its trace stays with who met it
        return {"error": type(ours).__name__, "reason": str(ours), "by": index()}


def _worst(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """One outcome of all: of errors the one that needs a person most, every reason in it."""
    failed = [outcome for outcome in outcomes if "error" in outcome]
    if not failed:
        return {"value": None}
    worst = min((outcome["error"] for outcome in failed), key=list(ERRORS).index)
    reasons: dict[str, list[int]] = {}
    for outcome in failed:
        reasons.setdefault(outcome["reason"], []).append(outcome["by"])
    if len(reasons) == 1 and len(failed) == len(outcomes):
        return {"error": worst, "reason": next(iter(reasons))}
    each = [f"process {', '.join(map(str, by))}: {reason}" for reason, by in reasons.items()]
    return {"error": worst, "reason": "; ".join(each)}


def _result(outcome: dict[str, Any]) -> Any:
    if "error" in outcome:
        raise ERRORS[outcome["error"]](outcome["reason"])
    return outcome["value"]


# ---- ending ----------------------------------------------------------------------------------------------------------


class _Peers:
    """See errors.Peers."""

    def blame(self, error: Exception) -> None:
        """A collective that fails does so because of another process: `_watch` finds out whom, and ends this one."""
        if not isinstance(error, RunError) and re.search(OF_A_COLLECTIVE, str(error)):
            time.sleep(GONE_S + 2 * BEAT_S + GRACE_S)

    def leave(self, code: int, reason: str) -> NoReturn:
        """At once, without the barrier in which JAX would wait for the others."""
        try:
            _set(f"{ROOT}failed/{index()}", {"code": code, "reason": reason, "host": socket.gethostname()})
            _set(f"{ROOT}left/{index()}", {})
            deadline = time.monotonic() + LEAVE_S
            while is_main() and time.monotonic() < deadline and len(_all("left/")) < count():
                time.sleep(0.1)
        except Exception as error:  # the store is gone, and whoever served it
            print(f"process {index()}: could not tell the others: {error}", file=sys.stderr)
        _exit(code)


def _watch() -> None:
    """Says that this process lives, and ends it when another has failed or is gone."""
    seen: dict[int, tuple[Any, float]] = {}
    for beat in itertools.count(1):
        try:
            _set(f"{ROOT}beat/{index()}", beat)
            if is_main():
                _note_who_is_gone(seen)
            failed = {i: failure for i, failure in _all("failed/").items() if i != index()}
        except Exception:
            return None if _ending.is_set() else _lost_process_0()
        if failed:
            time.sleep(GRACE_S)
            for i, failure in failed.items():
                errors.print_error(f"process {i} on {failure['host']} failed: {failure['reason']}")
            with suppress(Exception):
                _set(f"{ROOT}left/{index()}", {})
            stopped = all(failure["code"] == Preempted.exit_code for failure in failed.values())
            _exit(Preempted.exit_code if stopped else PeerError.exit_code)
        if _ending.wait(BEAT_S / 2):
            return


def _stop_watching(watch: threading.Thread) -> None:
    """A thread that is inside C++ when Python ends brings the process down."""
    with suppress(Exception):  # who served the store may have ended, too
        _set(f"{ROOT}ended/{index()}", {})
    _ending.set()
    watch.join(BEAT_S)


def _note_who_is_gone(seen: dict[int, tuple[Any, float]]) -> None:
    now = time.monotonic()
    for i, beat in _all("beat/").items():
        if i not in seen or seen[i][0] != beat:
            seen[i] = beat, now
        elif now - seen[i][1] > GONE_S and i not in _all("failed/") | _all("ended/"):
            gone = f"gave no sign of life for {GONE_S:.0f} s: it was killed, or its host is gone or stopped"
            _set(f"{ROOT}failed/{i}", {"code": 70, "reason": gone, "host": "its host"})
            _set(f"{ROOT}left/{i}", {})


def _lost_process_0() -> None:
    time.sleep(GRACE_S)
    errors.print_error("process 0 cannot be reached: it was killed, or its host is gone")
    _exit(PeerError.exit_code)


def _take_sigterm_back() -> None:
    """JAX's service listens to SIGTERM by a handler in C, in the place of ours: `stopping` calls it, for any signal."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    if address := libc.signal(signal.SIGTERM, None):
        _jax_on_sigterm[:] = [ctypes.CFUNCTYPE(None, ctypes.c_int)(address)]
    stopping.watch()


def _exit_in_order_on_abort() -> None:
    """Where JAX's C++ side misses another process it aborts: with the exit code of that, not of a crash."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        print(f"error: {_abort_line[-1]}", file=sys.stderr)
        _exit(PeerError.exit_code)

    _kept.append(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)


# ---- the store -------------------------------------------------------------------------------------------------------


def _key(what: str, key: str = "") -> str:
    return f"{ROOT}call/{key or format(next(_calls), '06d')} {what}"


def _set(key: str, value: Any) -> None:
    service.global_state.client.key_value_set(key, json.dumps(value), allow_overwrite=True)


def _get(key: str, who: str, limit_s: float) -> Any:
    try:
        return json.loads(service.global_state.client.blocking_key_value_get(key, int(limit_s * 1000)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise PeerError(f"{who} cannot be reached: {str(error).splitlines()[0][:200]}") from error
        raise PeerError(f"{who} did not answer in {limit_s:.0f} s") from error


def _all(folder: str) -> dict[int, Any]:
    """{process: value} of a folder of the store."""
    found = service.global_state.client.key_value_dir_get(ROOT + folder)
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
