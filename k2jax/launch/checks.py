"""The checks of preflight, each over all hosts of a run."""

import hashlib
import json
import secrets
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, PeerError, StorageError
from k2jax.launch import measure
from k2jax.launch.hosts import Hosts
from k2jax.launch.spec import mesh_on
from k2jax.launch.survey import Check, ask, odd
from k2jax.parallel import cluster
from k2jax.plan.chips import CHIPS, GIB
from k2jax.training.optimizer import first_state
from k2jax.training.placement import split_moments, state_bytes

CLOCK_ROUNDS = 5


@dataclass
class Options:
    """Of preflight's command line."""

    workdir: Path | BucketPath
    hosts: Hosts | None = None
    config_digest: str = ""
    lock_digest: str = ""
    code_digest: str = ""
    clock_limit_s: float = 2.0
    wait_s: float = 60.0  # until shared storage shows what another host wrote
    collective_limit_s: float = 300.0
    disk_bytes: int = 2**26
    loader_s: float = 3.0
    step_s: float = 0.0  # what the loader must keep up with; 0: the plan's, if the workdir has one


def run_checks(config: ConfigDict, options: Options, say: Callable[[Check], None]) -> list[Check]:
    """All checks, each reported to `say` when it is done; call it on every process."""
    done = []
    for look in (versions, devices, clocks, storage, disk, all_reduce, memory, loader):
        check = Check(look.__name__.replace("_", "-"))
        look(check, config, options)
        say(check)
        done.append(check)
    return done


def versions(check: Check, config: ConfigDict, options: Options) -> None:
    """The same packages, code and configuration everywhere, and what was launched."""
    flat = json.dumps(configuration.flatten(configuration.to_dict(config)), sort_keys=True)
    settings = hashlib.sha256(flat.encode()).hexdigest()
    answers = ask(check, lambda: measure.what_runs(config, settings))
    for key in sorted({key for answer in answers for key in answer.value}):
        usual, others = odd(answers, lambda value, key=key: value.get(key))
        for answer in others:
            check.blame([answer], f"has {key} {_short(answer.value.get(key))}, others have {_short(usual)}")
    expected = {"configuration": options.config_digest, "requirements.lock": options.lock_digest}
    expected["code"] = options.code_digest
    for key, wanted in expected.items():
        for answer in answers:
            if wanted and answer.value[key] != wanted:
                check.blame([answer], f"has {key} {_short(answer.value[key])}, launched was {_short(wanted)}")
    if answers:
        check.values = answers[0].value
        shown = ("k2jax", "python", "jax", "libtpu", "commit", "configuration")
        check.says = ", ".join(f"{key} {_short(check.values[key])}" for key in shown if key in check.values)


def devices(check: Check, config: ConfigDict, options: Options) -> None:
    """As many everywhere, of one kind, as many in all as the mesh and the topology need."""

    def look() -> dict[str, Any]:
        return {
            "kind": jax.local_devices()[0].device_kind,
            "local": jax.local_device_count(),
            "all": jax.device_count(),
        }

    answers = ask(check, look)
    if not answers:
        return
    kind, others = odd(answers, lambda value: value["kind"])
    for answer in others:
        check.blame([answer], f"has {answer.value['kind']}, others have {kind}")
    local, others = odd(answers, lambda value: value["local"])
    total, processes = answers[0].value["all"], cluster.count()
    hosts = options.hosts
    wanted = hosts.devices // processes if hosts else local
    for answer in answers:
        if answer.value["local"] != wanted:
            of = f"{hosts.topology} in {processes} process(es) has" if hosts else "others have"
            check.blame([answer], f"has {answer.value['local']} device(s), {of} {wanted}")
    if hosts and hosts.chip and _chip_of(kind) != hosts.chip.name:
        check.blame(answers, f"has {kind}, {hosts.topology} is {hosts.chip.kind}")
    try:
        mesh_on(config, total, f"this run ({kind})")
    except ConfigError as error:
        if check.ok:
            check.blame(answers, str(error))
    check.values = {"kind": kind, "devices": total, "processes": processes}
    check.says = f"{total} {kind}, {local} on each of {processes} process(es)"


def clocks(check: Check, config: ConfigDict, options: Options) -> None:
    """Against process 0's. What a store's answer takes on its way is in it: the least of some rounds."""

    def offset() -> float:
        found = []
        for _ in range(CLOCK_ROUNDS):
            cluster.together("is ready", lambda: None)
            told = cluster.decide("tells the time", lambda: (time.sleep(0.1), time.time())[1])
            found.append(time.time() - told)
        return min(found)

    mine = offset()  # outside of `ask`: it asks itself
    answers = ask(check, lambda: mine)
    offsets = [answer.value for answer in answers]
    near = [offset for offset in offsets if abs(offset) <= options.clock_limit_s]
    usual = 0.0 if 2 * len(near) >= len(offsets) else statistics.median(offsets)
    for answer in answers:
        off = answer.value - usual
        if abs(off) > options.clock_limit_s:
            way = "ahead of" if off > 0 else "behind"
            check.blame([answer], f"its clock is {abs(off):.1f} s {way} the others': set it by NTP")
    check.values = {"spread_s": max(offsets) - min(offsets), "limit_s": options.clock_limit_s}
    check.says = f"within {check.values['spread_s']:.3f} s, limit {options.clock_limit_s:g} s"


def storage(check: Check, config: ConfigDict, options: Options) -> None:
    """Every process sees what process 0 wrote in the workdir, and process 0 what each wrote."""
    token = cluster.decide("draws a number", lambda: secrets.token_hex(8))
    folder = options.workdir

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / f"preflight-{token}-{cluster.index()}", f"{token} {cluster.index()}")

    def sees(wanted: list[int]) -> dict[str, Any]:
        """Of these processes' files, those that do not come in time; and how long the others took."""
        started = time.monotonic()
        while True:
            missing = [i for i in wanted if not _holds(folder / f"preflight-{token}-{i}", f"{token} {i}")]
            took = time.monotonic() - started
            if not missing or took > options.wait_s:
                return {"missing": missing, "seconds": took, "folder": str(folder)}
            if isinstance(folder, Path) and folder.is_dir():
                list(folder.iterdir())  # some network file systems look again only then
            time.sleep(0.05)

    unseen = f"in {options.wait_s:g} s: it is not one folder; name one on storage that all processes share"
    try:
        ask(check, lambda: write() if cluster.is_main() else None)
        if not check.ok:
            return
        seen = ask(check, lambda: sees([0]))
        for answer in seen:
            if answer.value["missing"]:
                place = answer.value["folder"]
                check.blame([answer], f"does not see what process 0 wrote in --workdir={place} {unseen}")
        wrote = ask(check, lambda: {"process": cluster.index(), "wrote": cluster.is_main() or write()})
        others = [answer.value["process"] for answer in wrote if answer.who not in check.wrong]
        back = cluster.decide("looks at what all wrote", lambda: sees(others))
        lost = [answer for answer in wrote if answer.value["process"] in back["missing"]]
        check.blame(lost, f"wrote in the workdir what process 0 does not see in {back['folder']} {unseen}")
        check.values = {"seen_after_s": max((answer.value["seconds"] for answer in seen), default=0.0)}
        check.says = f"{folder} is one folder on all, seen after {check.values['seen_after_s']:.2f} s at most"
    finally:
        (folder / f"preflight-{token}-{cluster.index()}").unlink(missing_ok=True)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def disk(check: Check, config: ConfigDict, options: Options) -> None:
    """Room for two checkpoints, and how fast they are written and read when all do at once."""
    answers = ask(check, lambda: measure.disk(options.workdir, options.disk_bytes, cluster.index()))
    if not answers:
        return
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: first_state(config))))
    for answer in answers:
        free = answer.value["free_bytes"]
        if free < 2 * size:
            what = f"{_gb(free)} free in --workdir={options.workdir}, two checkpoints take {_gb(2 * size)}: make room"
            check.blame([answer], what, StorageError.exit_code)
    speeds = {key: [answer.value[f"{key}_bytes_per_s"] for answer in answers] for key in ("write", "read")}
    check.values = {
        "free_bytes": min(answer.value["free_bytes"] for answer in answers),
        "checkpoint_bytes": size,
        **{f"{key}_bytes_per_s": sum(found) for key, found in speeds.items()},
    }
    each = "; ".join(f"{key} {min(found) / 1e6:,.0f} MB/s on the slowest" for key, found in speeds.items())
    write_s = size / check.values["write_bytes_per_s"]
    endless = check.values["free_bytes"] >= measure.ENDLESS
    free = "all" if endless else _gb(check.values["free_bytes"])
    check.says = f"{free} free; {each}; a checkpoint of {_gb(size)} takes {write_s:,.1f} s so"


def all_reduce(check: Check, config: ConfigDict, options: Options) -> None:
    """Other integers from each device: their sum, and each device's own, as they must be on every process."""
    found: list[Any] = []

    def reduce() -> None:
        try:
            found.append(measure.reduce_over_devices())
        except Exception as error:
            found.append(error)

    def look() -> dict[str, Any]:
        thread = threading.Thread(target=reduce, daemon=True)  # a collective that hangs cannot be ended
        thread.start()
        thread.join(options.collective_limit_s)
        if not found:
            raise PeerError(
                f"its all-reduce did not end in {options.collective_limit_s:g} s: look at its network"
            )
        if isinstance(found[0], Exception):
            raise PeerError(f"its all-reduce failed: {str(found[0]).splitlines()[0][:200]}")
        return found[0]

    answers = ask(check, look)
    for answer in answers:
        if not answer.value["sum_is_right"]:
            check.blame(
                [answer], "its sum over all devices is wrong: a device or a link computes wrongly", 70
            )
    wrong = {i for answer in answers for i in answer.value["wrong_devices"]}
    if wrong:
        check.blame(answers, f"received wrong integers from device(s) {sorted(wrong)}", 70)
    if answers:
        check.values = {"seconds": max(answer.value["seconds"] for answer in answers)}
        check.says = f"exact over {jax.device_count()} device(s), {check.values['seconds'] * 1e3:.1f} ms"


def memory(check: Check, config: ConfigDict, options: Options) -> None:
    """The state on a device, and on the host the copy of it that an asynchronous save takes."""
    try:
        state = state_bytes(config, split_moments(config, mesh_on(config, jax.device_count(), "this run")))
    except ConfigError as error:
        check.says = f"not looked at: {error}"
        return

    def look() -> dict[str, Any]:
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        limits = [
            stat["bytes_limit"] - stat.get("bytes_in_use", 0) for stat in stats if "bytes_limit" in stat
        ]
        return {"host": measure.host_memory(), "device": min(limits) if limits else None, "local": len(stats)}

    answers = ask(check, look)
    for answer in answers:
        host, device, copy = answer.value["host"], answer.value["device"], state * answer.value["local"]
        if device is not None and device < state:
            check.blame(
                [answer],
                f"{device / GIB:.1f} GiB are free on a device, the state takes {state / GIB:.1f} GiB",
            )
        if host < copy:
            what = f"{host / GIB:.1f} GiB are free, a save copies {copy / GIB:.1f} GiB to the host"
            check.blame([answer], what)
    if answers:
        check.values = {"host_bytes": min(answer.value["host"] for answer in answers), "state_bytes": state}
        free = [answer.value["device"] for answer in answers if answer.value["device"] is not None]
        device = f", {min(free) / GIB:.1f} GiB free on a device" if free else ""
        host = f"{check.values['host_bytes'] / GIB:.1f} GiB free on a host"
        check.says = f"{host}{device}; the state takes {state / GIB:.2f} GiB a device"


def loader(check: Check, config: ConfigDict, options: Options) -> None:
    """The same data everywhere, read faster than the devices need it."""

    def planned() -> float:
        path = options.workdir / "plan.json"
        plan = files.read_json(path) if path.exists() else {"stages": {}}
        return (plan["stages"].get(config.stages[0].name) or {}).get("step_seconds") or 0.0

    step_s = options.step_s or cluster.decide("reads the plan", planned)
    answers = ask(check, lambda: measure.loader(config, cluster.index(), cluster.count(), options.loader_s))
    if not answers:
        return
    usual, others = odd(answers, lambda value: value["data"])
    check.blame(others, f"has other data than the others, whose manifest is {_short(usual)}")
    rates = [answer.value["tokens_per_s"] for answer in answers if answer.value["tokens_per_s"]]
    for answer in answers:
        rate, tokens = answer.value["tokens_per_s"], answer.value["tokens_a_step"]
        if step_s and rate and rate < tokens / step_s:
            needs = f"a step of {step_s:.3g} s needs {tokens / step_s:,.0f}"
            remedy = "more data.threads or data.workers, or other storage"
            what = f"its loader gives {rate:,.0f} tokens/s, {needs}: {remedy}"
            check.blame([answer], what)
    slowest = min(rates, default=0.0)
    needed = max(answer.value["tokens_a_step"] for answer in answers) / step_s if step_s else None
    check.values = {"tokens_per_s": slowest, "needed_tokens_per_s": needed}
    beside = (
        f"{needed:,.0f} are needed"
        if needed
        else "what is needed is not known: --step-seconds, or a plan in the workdir"
    )
    check.says = f"{slowest:,.0f} tokens/s on the slowest process, {beside}"


def _chip_of(kind: str) -> str | None:
    """Of JAX's name: the longest that it begins with, as "TPU v5 lite" begins with "TPU v5"."""
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind)).name if found else None


def _short(value: Any) -> str:
    """Of a digest the beginning."""
    text = str(value)
    return text[:12] if len(text) >= 40 and " " not in text else text


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
