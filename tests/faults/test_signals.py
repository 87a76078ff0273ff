"""SIGINT, SIGHUP, SIGTERM whenever they come: a step is saved or nothing is lost, one line, 75; twice Ctrl-C ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from faults import runs
from faults.test_preempt import SLOW_STEPS
from faults.test_processes import on_one

# A shell's background job ignores it, and so would what it starts.
HEARS_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# Where a signal may come that loses nothing: a patch that waits there, having said so.
WAITS = """
import time
def waits(module, name):
    real = getattr(module, name)
    def wait(*arguments, **named):
        print("now", flush=True)
        time.sleep(60)
        return real(*arguments, **named)
    setattr(module, name, wait)
"""
PLACES = {
    "data": "from k2jax.training import setup; waits(setup, 'open_data')",
    "lock": "from k2jax.run.holding import OnDisk; waits(OnDisk, 'take')",
    "restore": "from k2jax.run.checkpoint import Checkpoints; waits(Checkpoints, '_read')",
    "compile": "from k2jax.training import program; waits(program, 'step_function')",
    "loader": "from k2jax.data import loader; waits(loader.BatchSource, '__getitem__')",
    "validate": "from k2jax import ending; waits(ending, 'validate')",
}
SAVING_HANGS = """
import time
from k2jax.run import storage
async def save(self, item, directory):
    print("now", flush=True)
    time.sleep(100)
storage._LateJson._save_fn = save
"""


def slowly(value):
    """A case like another one here: for `make test-slow`."""
    return pytest.param(value, marks=pytest.mark.slow)



def test_sigterm_while_validating_ends_it_soon(straight, start, tmp_path):
    """And the next start validates."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    (workdir / "validation.json").unlink()
    trainer = start(workdir, patch=WAITS + PLACES["validate"])
    trainer.wait_for("now")
    trainer.signal(signal.SIGTERM)
    error = trainer.wait_for_error(75)
    assert "stopped by SIGTERM; step 25 is saved, what ends a run is not made: run the same command" in error
    assert not (workdir / "validation.json").exists() and not trainer.left_behind()
    start(workdir).wait(0)
    assert (workdir / "validation.json").exists() and not runs.leftovers(workdir)


@pytest.mark.fault("A3")
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, slowly(signal.SIGINT), slowly(signal.SIGHUP)])
@pytest.mark.parametrize("place", [place for place in PLACES if place != "validate"])
def test_a_signal_before_the_first_step_ends_it_soon(straight, start, tmp_path, place, number):
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    trainer = start(workdir, patch=HEARS_SIGINT + WAITS + PLACES[place], environment=runs.READ_ONLY_CACHE)
    trainer.wait_for("now")
    trainer.signal(number)
    error = trainer.wait_for_error(75)
    known = "step 20 is saved" if place in ("compile", "loader") else "before the first step"
    assert f"stopped by {number.name}; {known}: run the same command to go on" in error
    assert runs.checkpoint_steps(workdir) == [10, 20]
    assert "resuming after step 20 of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


@pytest.mark.processes
def test_a_signal_while_importing(tiny_data, tmp_path):
    """`python -m k2jax.train`, from the moment that Python runs our first lines."""
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY), "GLIBC_TUNABLES": ""}
    for wait_s in (0.3, 0.8, 1.5):
        process = subprocess.Popen(
            [sys.executable, "-m", "k2jax.train", *runs.arguments(tiny_data, tmp_path / "run", {})],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        time.sleep(wait_s)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=runs.WAIT_S)
        if process.returncode == -signal.SIGTERM:
            continue  # Python itself had not started
        assert process.returncode == 75, told
        # Where the machine is fast it has begun to train by then.
        line = told[1].splitlines()[-1]
        assert line.startswith("error: stopped by SIGTERM; ") and line.endswith(": run the same command to go on")
    assert process.returncode == 75


@pytest.mark.fault("A7")
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save(straight, start, tmp_path, number):
    """To the whole process group, as terminals and schedulers send it: data workers go on to the end."""
    workdir = tmp_path / "run"
    stopped = start(workdir, {"data.workers": 1}, patch=HEARS_SIGINT + SLOW_STEPS)
    stopped.wait_for("step 12 ")
    os.killpg(stopped.process.pid, number)
    stopped.wait(75)
    assert f"stopped by {number.name}; step " in stopped.errors.read_text()
    step = runs.checkpoint_steps(workdir)[-1]
    assert 12 <= step < 25 and "Traceback" not in stopped.told()
    assert f"resuming after step {step} of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


CELL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{cell}
try:
    run(sys.executable, "-c", {program!r}, *{arguments!r})
except KeyboardInterrupt:
    sys.exit(99)
"""


@pytest.mark.fault("A7")
@pytest.mark.processes
def test_a_notebooks_cell_that_is_interrupted(straight, tiny_data, tmp_path):
    """Jupyter signals the kernel's process group: the cell's user gets KeyboardInterrupt, and the trainer saves."""
    notebook = json.loads((runs.REPOSITORY / "experiments" / "colab.ipynb").read_text())
    [cell] = [text for c in notebook["cells"] if "def run(" in (text := "".join(c["source"]))]
    program = runs.PATCHED.format(patch=SLOW_STEPS)
    code = CELL.format(cell=cell, program=program, arguments=runs.arguments(tiny_data, tmp_path / "run", {}))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {runs.QUICKLY_COMPILED}"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(runs.REPOSITORY)}
    log = tmp_path / "log"
    with log.open("wb") as out:
        kernel = subprocess.Popen([sys.executable, "-uc", code], stdout=out, env=environment, start_new_session=True)
    deadline = time.monotonic() + runs.WAIT_S
    while "\nstep 12 " not in log.read_text():
        assert kernel.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    os.killpg(kernel.pid, signal.SIGINT)
    assert kernel.wait(runs.WAIT_S) == 99, log.read_text()
    while not (found := [step for step in runs.checkpoint_steps(tmp_path / "run") if step > 10]):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert 12 <= found[0] < 20


@pytest.mark.processes
def test_a_terminal_that_is_closed(tiny_data, tmp_path):
    """The kernel's own SIGHUP to who has it; every write to it fails from then on."""
    arguments = runs.arguments(tiny_data, tmp_path / "run", {})
    pid, master = pty.fork()
    if not pid:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {runs.QUICKLY_COMPILED}"
        os.environ["PYTHONPATH"] = str(runs.REPOSITORY)
        code = runs.PATCHED.format(patch=SLOW_STEPS)
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    told = b""
    while b"step 3 " not in told:
        told += os.read(master, 4096)
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert runs.checkpoint_steps(tmp_path / "run")[-1] >= 3


@pytest.mark.processes
def test_nohup_is_respected(straight, start, tmp_path):
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    trainer = start(tmp_path / "run", patch=ignored + SLOW_STEPS)
    trainer.wait_for("step 3 ")
    trainer.signal(signal.SIGHUP)
    trainer.wait(0)
    assert runs.ledger_rows(tmp_path / "run") == runs.ledger_rows(straight)


@pytest.mark.processes
@pytest.mark.parametrize("first", [signal.SIGINT, slowly(signal.SIGTERM)])
def test_ctrl_c_ends_a_save_that_hangs(start, tmp_path, first):
    """The first signal waits for it. The main thread is in it, deaf."""
    trainer = start(tmp_path / "run", patch=HEARS_SIGINT + SAVING_HANGS, environment=runs.READ_ONLY_CACHE)
    trainer.wait_for("now")
    trainer.signal(first)
    time.sleep(2.5)
    assert trainer.process.poll() is None
    trainer.signal(signal.SIGINT)
    assert "ended by a second Ctrl-C" in trainer.wait_for_error(130)
    assert runs.checkpoint_steps(tmp_path / "run") == []
    start(tmp_path / "run").wait(0)
    assert not runs.leftovers(tmp_path / "run")


@pytest.mark.fault("A2")
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, slowly(signal.SIGHUP)])
def test_a_signal_to_one_stops_both_at_one_step(start, tmp_path, number):
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1, patch=HEARS_SIGINT + SLOW_STEPS)
    pair[0].wait_for("step 4 ")
    pair[1].signal(number)
    errors = [trainer.wait_for_error(75) for trainer in pair]
    step = runs.checkpoint_steps(workdir)[-1]
    assert all(f"step {step} is saved" in error for error in errors)
    assert f"stopped by {number.name}" in errors[1] and "stopped by a signal to another process" in errors[0]
    runs.ledger(workdir).verify()


@pytest.mark.processes
@pytest.mark.parametrize("index", [slowly(0), 1])
@pytest.mark.parametrize("place", ["data", "compile", "validate"])
def test_a_signal_to_one_where_nothing_is_lost_ends_both(straight, start, tmp_path, place, index):
    """With 75 both: nobody failed."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=25 if place == "validate" else 20)
    patch = on_one(index, WAITS + PLACES[place])
    pair = runs.pair(start, workdir, devices=1, patch=patch)
    deadline = time.monotonic() + runs.WAIT_S
    while "now" not in pair[index].lines():
        assert time.monotonic() < deadline, pair[index].told()
        time.sleep(0.05)
    pair[index].signal(signal.SIGTERM)
    for trainer in pair:
        trainer.wait(75)
        assert "stopped by SIGTERM" in trainer.errors.read_text(), trainer.told()
    assert f"process {index} on " in pair[1 - index].errors.read_text()
