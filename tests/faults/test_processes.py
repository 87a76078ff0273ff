"""Two processes over loopback are one run: they save, die, resume and stop together."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from faults import runs
from faults.test_preempt import SLOW_STEPS

LOOPBACK = {"0100007F", "0" * 16 + "FFFF0000" + "0100007F", "0" * 24 + "01000000"}


@pytest.mark.fault("A5", "C2", "E7", "F7")
@pytest.mark.processes
def test_two_processes_are_one_run(straight, start, tmp_path):
    """Both are killed; resumed by two processes, or by one, the run is the undisturbed one of one process, bit for bit.

    As many devices in all, that is. With two of them a sum has one order only, whoever adds up: Gloo or XLA.
    """
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1)
    pair[0].wait_for("saved 10")
    for trainer in pair:
        trainer.signal(signal.SIGKILL)
    for trainer in pair:
        trainer.wait(-signal.SIGKILL)
    alone = runs.copy_run(workdir, tmp_path / "alone", last_step=10)

    told = start(alone).wait(0)
    assert "resuming after step 10 of 25" in told
    told, told_by_second = (trainer.wait(0) for trainer in runs.pair(start, workdir, devices=1))
    assert any(line.startswith("resuming after step") for line in told)
    for run in (alone, workdir):
        assert runs.ledger_rows(run) == runs.ledger_rows(straight)
        assert runs.ledger(run).records() == runs.ledger(straight).records()
        assert runs.meta(run, 25)["digests"] == runs.meta(straight, 25)["digests"]
        runs.ledger(run).verify()
        assert not runs.leftovers(run)

    # Only the first writes and speaks.
    assert [line for line in told_by_second if not line.startswith("[Gloo]")] == []
    assert [row["step"] for row in runs.metric_rows(workdir)] == list(range(1, 26))
    launches = json.loads((workdir / "environment.json").read_text())["launches"]
    assert [launch["devices"]["processes"] for launch in launches] == [2, 2]

    # Damage that only the second reads: both go back to the step before, neither waits for the other.
    files = (workdir / "checkpoints" / "25" / "moments" / "ocdbt.process_1" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    told, _ = (trainer.wait(0) for trainer in runs.pair(start, workdir, devices=1))
    assert any(line.startswith("refused: process 1: checkpoint 25: ") for line in told)
    assert {"resuming after step 20 of 25", "saved 25"} <= set(told)
    [kept] = (workdir / "abandoned").iterdir()
    assert kept.name.startswith("25-")


@pytest.mark.fault("E4")
def test_drift_ends_both(straight, start, tmp_path):
    """Each refuses by itself: none is left waiting for the other."""
    pair = runs.pair(start, runs.copy_run(straight, tmp_path / "run"), {"seed": 3}, devices=1)
    for trainer in pair:
        assert "seed: 22238 -> 3" in trainer.wait_for_error(78)


SLOW_READER = """
import os, time
from k2jax.training import program
make_loader = program.make_loader
def slow(*arguments, **others):
    for batch in make_loader(*arguments, **others):
        time.sleep(0.3 * int(os.environ["JAX_PROCESS_ID"]))
        yield batch
program.make_loader = slow
"""


@pytest.mark.processes
def test_a_slow_host_has_a_name(start, tmp_path):
    """The second waits for its data. Both have the same step time, in the rows of metrics as on the clock."""
    short = {"stages.0.chunks": 1, "stages.0.steps_per_chunk": 10, "stages.1.steps_per_chunk": 1, "log.every_steps": 3}
    workdir = tmp_path / "run"
    told, _ = (trainer.wait(0) for trainer in runs.pair(start, workdir, short, devices=1, patch=SLOW_READER))
    named = [line for line in told if line.startswith("slow: ")]
    assert named and all(line.startswith(f"slow: process 1 on {socket.gethostname()} takes 0.3") for line in named)
    rows = [row["hosts"] for row in runs.whole_metric_rows(workdir) if "hosts" in row]
    known = rows[-1]
    assert known["process"] == [0, 1] and known["host"] == [socket.gethostname()] * 2
    assert known["data_wait_s"][0] < 0.2 < known["data_wait_s"][1] <= known["own_s"][1]
    assert min(known["step_s"]) > 0.2 and min(known["host_gib"]) > 0


def listening(process):
    """The addresses that a process listens on, in hexadecimal as the kernel has them."""
    held, found = {os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()}, set()
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in held:
                found.add(local.split(":")[0])
    return found


@pytest.mark.fault("A2", "S11")
def test_sigterm_to_one_stops_both(start, tmp_path):
    """Both save the same step and end with 75. Seen red without the address that the coordinator is bound to."""
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1)
    pair[0].wait_for("step 11 ")
    ports = [listening(trainer.process) for trainer in pair]
    assert ports[0] & LOOPBACK and ports[0] | ports[1] <= LOOPBACK, ports
    pair[1].signal(signal.SIGTERM)
    errors = [trainer.wait_for_error(75) for trainer in pair]
    step = runs.checkpoint_steps(workdir)[-1]
    assert 11 <= step < 25
    assert all(f"step {step} is saved" in error for error in errors)
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, step + 1))
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)


@pytest.mark.fault("A2")
@pytest.mark.processes
def test_sigterm_to_both_and_again_while_they_save(straight, start, tmp_path):
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1, patch=SLOW_STEPS)
    pair[0].wait_for("step 6 ")
    for line in ("step 6 ", "saving "):
        pair[0].wait_for(line)
        for trainer in pair:
            trainer.signal(signal.SIGTERM)
    errors = [trainer.wait_for_error(75) for trainer in pair]
    [step] = runs.checkpoint_steps(workdir)
    assert all(f"step {step} is saved" in error for error in errors)
    assert f"resuming after step {step} of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


DIES_SAVING = """
import signal
from k2jax.run import storage
serialize = storage._Arrays.serialize
async def dies(self, values, infos, args=None):
    if "/12." in str(infos[0].parent_dir) and self._part == "moments":
        os.kill(os.getpid(), signal.SIGKILL)
    return await serialize(self, values, infos, args)
storage._Arrays.serialize = dies"""


@pytest.mark.fault("A5")
@pytest.mark.processes
@pytest.mark.parametrize("index", [0, 1])
def test_a_kill_of_one_while_both_save(straight, start, tmp_path, index):
    """The other ends, half a step is no checkpoint, and one process alone goes on before it."""
    workdir, every = tmp_path / "run", {"checkpoint.every_steps": 12}
    patch = on_one(index, DIES_SAVING)
    pair = runs.pair(start, workdir, every, devices=1, patch=patch, environment=runs.READ_ONLY_CACHE)
    pair[index].wait(-signal.SIGKILL)
    pair[1 - index].wait(70, 60)
    assert runs.checkpoint_steps(workdir) == [10] and any("/12." in name for name in runs.leftovers(workdir))
    assert "resuming after step 10 of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight) and not runs.leftovers(workdir)


# What one process of two meets, by where: a patch of its program that raises, or damages, there alone.
FAULTS = {
    "loader": """
from k2jax.data import loader
read = loader.BatchSource.__getitem__
def broken(self, index):
    if index == 5: raise StorageError("planted: the store cannot be read")
    return read(self, index)
loader.BatchSource.__getitem__ = broken""",
    "store": """
from k2jax.training import setup
def broken(*_): raise StorageError("planted: the store cannot be read")
setup.open_data = broken""",
    "ledger": """
from k2jax.training.metrics import Recorder
record = Recorder._record
def broken(self, step, *rest):
    if step == 7: raise StorageError("planted: the ledger cannot be written")
    return record(self, step, *rest)
Recorder._record = broken""",
    "save": """
from k2jax.run.checkpoint import Checkpoints
def broken(*_, **__): raise StorageError("planted: the save fails")
Checkpoints.save = broken""",
    "report": """
from k2jax import train as program
def broken(*_, **__): raise StorageError("planted: the report fails")
program.report = broken""",
    "bug": """
from k2jax.training.metrics import Recorder
record = Recorder._record
def broken(self, step, *rest):
    return record(self, step, *rest) if step != 7 else 1 // 0
Recorder._record = broken""",
}
ON_ONE = """
import os
from k2jax.errors import StorageError
if os.environ["JAX_PROCESS_ID"] == "{index}":
    {lines}
"""


def on_one(index: int, patch: str) -> str:
    return ON_ONE.format(index=index, lines=patch.strip().replace("\n", "\n    "))


@pytest.mark.fault("E6")
@pytest.mark.processes
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_whoever_fails_ends_both_soon_and_says_why(start, tmp_path, fault, index):
    """The raiser with its line and code, at once; the other with 70, or with the same where both waited for it."""
    pair = runs.pair(start, tmp_path / "run", devices=1, patch=on_one(index, FAULTS[fault]))
    raiser, other = pair[index], pair[1 - index]
    code = 70 if fault == "bug" else 74
    raiser.wait(code)
    other.process.wait(30)
    assert other.process.returncode in ((74,) if fault == "store" else (70,)), other.told()
    said = "ZeroDivisionError" if fault == "bug" else "planted: "
    assert said in raiser.errors.read_text()
    assert f"process {index}" in other.errors.read_text() and said in other.errors.read_text()


@pytest.mark.fault("E2", "F3")
@pytest.mark.processes
@pytest.mark.parametrize(
    ("fault", "index", "at"), [("loader", 1, "data"), ("ledger", 0, "step"), ("report", 1, "evaluate")]
)
def test_whoever_hangs_in_the_loop_ends_both(straight, start, tmp_path, fault, index, at):
    """Nothing raises and signs of life go on: the watchdog says who was at what for too long, and where it stood."""
    hangs = FAULTS[fault].replace("raise StorageError", "import time; time.sleep(1000); raise StorageError")
    limits = {"watchdog.data": 400, "watchdog.step": 400, "watchdog.evaluate": 400, f"watchdog.{at}": 30}
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20) if fault == "report" else tmp_path / "run"
    pair = runs.pair(start, workdir, limits, devices=1, patch=on_one(index, hangs))
    for trainer in pair:
        trainer.wait(70)
    told = [trainer.errors.read_text() for trainer in pair]
    assert any(f"was at {at!r} for more than 30 s (watchdog.{at};" in text for text in told)
    assert "in broken" in told[index] or f"process {1 - index} on " in told[index]


# The same where a run is resumed: what is done there, and by whom ("lock": by process 0 alone).
RESUMED = {
    "store": ("from k2jax.training import setup as of; name = 'open_data'", "opens its data", (0, 1)),
    "lock": ("from k2jax.run.holding import OnDisk as of; name = 'take'", "takes the workdir", (0,)),
    "shared": ("from k2jax.run.holding import OnDisk as of; name = 'check'", "looks into", (0, 1)),
    "restore": ("from k2jax.run.checkpoint import Checkpoints as of; name = '_read'", "reads checkpoint 20", (0, 1)),
}
DOES = """
import os, signal, time
def broken(*_, **__):
    {does}
setattr(of, name, broken)"""


def resumed_pair(straight, start, tmp_path, place, index, does):
    patch = on_one(index, RESUMED[place][0] + DOES.format(does=does))
    soon = "from k2jax.run import reading; reading.RETRY_WAITS_S = (0.1,)"
    patch = f"from k2jax.parallel import cluster; cluster.LIMIT_S = 25\n{soon}\n{patch}"
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    pair = runs.pair(start, workdir, devices=1, patch=patch, environment=runs.READ_ONLY_CACHE)
    return workdir, pair[index], pair[1 - index]


def of_resumed(soon=None):
    """All cases; those that are not among `soon` for `make test-slow`."""
    cases = [(place, index) for place, (_, _, who) in RESUMED.items() for index in who]
    later = [case for case in cases if soon and case not in soon]
    cases = [pytest.param(*case, marks=pytest.mark.slow if case in later else ()) for case in cases]
    return pytest.mark.parametrize(("place", "index"), cases)


@pytest.mark.fault("E2")
@pytest.mark.processes
@of_resumed(soon=[("store", 1), ("lock", 0), ("restore", 0)])
def test_whoever_hangs_ends_both(straight, start, tmp_path, place, index):
    """Its signs of life go on, from a thread: the limit of what is done together ends it, with who and what."""
    workdir, hung, other = resumed_pair(straight, start, tmp_path, place, index, "time.sleep(1000)")
    other.wait(70)
    told = other.errors.read_text()
    assert f"process {index}, which {RESUMED[place][1]}" in told and "did not answer in" in told
    hung.wait(70)
    assert f"process {1 - index} on " in hung.errors.read_text()
    assert runs.checkpoint_steps(workdir) == [10, 20]


@pytest.mark.fault("E6")
@pytest.mark.processes
@of_resumed(soon=[("store", 0), ("restore", 1)])
def test_whoever_raises_at_a_resume_ends_both(straight, start, tmp_path, place, index):
    raises = "raise cluster.errors.StorageError('planted: no')"
    workdir, *pair = resumed_pair(straight, start, tmp_path, place, index, raises)
    for trainer in pair:
        trainer.wait(74)
        assert "planted: no" in trainer.errors.read_text()
    assert runs.checkpoint_steps(workdir) == [10, 20]


@pytest.mark.fault("E1")
@pytest.mark.processes
@of_resumed(soon=[("lock", 0), ("restore", 1)])
def test_whoever_dies_at_a_resume_ends_the_other(straight, start, tmp_path, place, index):
    kills = "os.kill(os.getpid(), signal.SIGKILL)"
    workdir, dead, other = resumed_pair(straight, start, tmp_path, place, index, kills)
    dead.wait(-signal.SIGKILL)
    other.wait(70, 70)
    assert runs.checkpoint_steps(workdir) == [10, 20]


@pytest.mark.fault("E1")
@pytest.mark.processes
@pytest.mark.parametrize("index", [0, 1])
def test_a_dead_process_ends_the_other(start, tmp_path, index):
    """SIGKILL: the other ends within a minute, with 70 and who is gone; what was saved is good."""
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1)
    pair[0].wait_for("saved 10")
    pair[index].signal(signal.SIGKILL)
    other = pair[1 - index]
    assert other.process.wait(60) == 70, other.told()
    gone = "process 1 on its host failed: gave no sign of life" if index else "another process is gone"
    assert gone in other.errors.read_text() or "process 0 cannot be reached" in other.errors.read_text()
    assert "resuming after step" in str(start(workdir).wait(0))


@pytest.mark.fault("E4")
@pytest.mark.processes
def test_keys_that_steer_must_agree(start, tmp_path):
    """Also those that a resume may change: with other steps to save at, one process would wait for ever."""
    keys = [{"checkpoint.every_steps": 2}, {"checkpoint.every_steps": 3}]
    for trainer in runs.pair(start, tmp_path / "run", each=keys, devices=1):
        error = trainer.wait_for_error(78)
        assert "checkpoint.every_steps: 3, process 0 has 2" in error and "process 1" in error
    assert not (tmp_path / "run" / "epochs").exists()


@pytest.mark.processes
def test_a_workdir_that_is_not_shared_is_found_at_start(start, tmp_path):
    pair = runs.pair(start, tmp_path / "a", devices=1, workdirs=[tmp_path / "a", tmp_path / "b"], patch=SOON_SEEN)
    for trainer in pair:
        assert "is not one folder" in trainer.wait_for_error(78)
    assert not (tmp_path / "b").exists()


SOON_SEEN = "from k2jax.run import holding; holding.SEEN_S = 1"


@pytest.mark.processes
def test_process_0_lists_the_checkpoints_and_the_stores(straight, start, tmp_path):
    """A listing that is out of date on another process changes nothing, and the stores' files it does not list."""
    stale = """
from k2jax.data import storage
storage.file_sizes = None
from orbax.checkpoint import CheckpointManager
CheckpointManager.all_steps = lambda self, read=False: [10]"""
    workdir = runs.copy_run(straight, tmp_path / "run")
    pair = runs.pair(start, workdir, devices=1, patch=on_one(1, stale))
    told, _ = (trainer.wait(0) for trainer in pair)
    assert "resuming after step 25 of 25" in told and not (workdir / "abandoned").exists()


@pytest.mark.fault("B3")
@pytest.mark.processes
def test_a_copy_that_is_damaged_on_one_process_is_refused_by_both(straight, start, tmp_path):
    """Two replicas: the digest of each is compared, not of one of them."""
    flip = """
from k2jax.run import checkpoint
from_disk, calls = checkpoint.from_disk, []
def broken(x, layout, sharding):
    held = from_disk(x, layout, sharding)
    if x.ndim != 1 or calls:
        return held
    calls.append(1)  # final_norm_D of the first step that is read
    import jax, numpy
    parts = [jax.device_put(numpy.asarray(shard.data) * 2, shard.device) for shard in held.addressable_shards]
    return jax.make_array_from_single_device_arrays(held.shape, held.sharding, parts)
checkpoint.from_disk = broken"""
    workdir = runs.copy_run(straight, tmp_path / "run")
    mesh = {"mesh.replica": 2, "mesh.fsdp": 1}
    pair = runs.pair(start, workdir, mesh, devices=1, patch=on_one(1, flip))
    told, _ = (trainer.wait(0) for trainer in pair)
    refused = "refused: process 1: checkpoint 25: damaged array(s) params/final_norm_D"
    assert any(line.startswith(refused) for line in told), told
    assert "resuming after step 20 of 25" in told
    [entry] = [e for e in runs.journal(workdir) if e["kind"] == "abandon"]
    assert entry["at_step"] == 25 and "damaged array" in entry["why"]


@pytest.mark.fault("B10")
@pytest.mark.processes
def test_a_storage_that_fails_for_a_while_costs_nothing(straight, start, tmp_path):
    """And one that fails for good stops both, and moves nothing."""
    fails = """
import errno
from k2jax.run import reading
from k2jax.run.checkpoint import Checkpoints
reading.RETRY_WAITS_S = (0.1, 0.1)
read, calls = Checkpoints._read, []
def broken(self, *rest):
    calls.append(1)
    if len(calls) <= TIMES: raise OSError(errno.EIO, "Input/output error")
    return read(self, *rest)
Checkpoints._read = broken"""
    workdir = runs.copy_run(straight, tmp_path / "run")
    pair = runs.pair(start, workdir, devices=1, patch=on_one(1, fails.replace("TIMES", "99")))
    for trainer in pair:
        trainer.wait(74)
        error = trainer.error_lines()[-1]
        assert error.startswith("error: process 1: checkpoint 25: cannot be read") and "tried 3 times" in error
    assert not (workdir / "abandoned").exists()
    pair = runs.pair(start, workdir, devices=1, patch=on_one(1, fails.replace("TIMES", "2")))
    assert "resuming after step 25 of 25" in pair[0].wait(0)
    pair[1].wait(0)


@pytest.mark.processes
def test_a_disk_that_is_full_for_a_while_on_one_process_costs_nothing(straight, start, tmp_path):
    """The other waits in the background, and training goes on in both."""
    full = """
import resource, threading
from k2jax import train
from k2jax.run import reading
reading.WRITE_WAITS_S = (0.1,) * 1000
say = train.say
def told(line):
    say(line)
    if line == "saving 21":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        again = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        threading.Timer(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, again)).start()
train.say = told"""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    pair = runs.pair(start, workdir, {"checkpoint.every_steps": 21}, devices=1, patch=on_one(1, full))
    told, _ = (trainer.wait(0) for trainer in pair)
    assert "saved 21" in told
    again = [line for line in pair[1].error_lines() if line.startswith("process 1: ")]
    assert again and all("cannot be written: " in line and "File too large" in line for line in again)
    shutil.rmtree(workdir / "checkpoints" / "25")
    assert "resuming after step 21 of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


@pytest.mark.processes
@pytest.mark.parametrize("mesh", [{"mesh.stage": 2, "mesh.fsdp": 2}, {"mesh.context": 2, "mesh.fsdp": 2}])
def test_the_report_is_made_where_the_run_was(start, tmp_path, mesh):
    keys = {**mesh, "eval.prompts": "('a b',)", "eval.new_tokens": 4, "model.dim": 36, "model.pipeline.microbatches": 2}
    pair = runs.pair(start, tmp_path / "run", keys, devices=2)
    told, _ = (trainer.wait(0) for trainer in pair)
    assert any(line.startswith("sample: ") for line in told)
    assert json.loads((tmp_path / "run" / "validation.json").read_text())["step"] == 25
