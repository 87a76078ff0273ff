"""What tools/launch.py wrote, run with two real processes: over ssh, and in Slurm.

Neither a server of ssh nor Slurm is here: bin/ holds stand-ins for their commands, which start the processes on this
machine as the real ones would on others. Slurm's sets SLURM_* of a step, by which JAX itself finds the others.
"""

import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import REPOSITORY

from faults import runs

pytestmark = pytest.mark.processes
BIN = Path(__file__).parent / "bin"
KEYS = {"stages.0.steps_per_chunk": 100, "log.every_steps": 10, "eval.windows": 1}  # long enough to be interrupted
LAST = 200
WAIT_S = 300  # for a line or an end; each launch compiles again, and the machine may be busy
ONE_STAGE = """
import runpy

def get_config():
    c = runpy.run_path({path!r})["get_config"]()
    c.stages = c.stages[:1]  # half as much to compile
    return c
"""


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Longer than that of one run: each test here starts two processes up to six times."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Launched:
    """A script of a launch, in a process group of its own; its output is in `log`."""

    def __init__(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]):
        self.log = log
        with (folder / "launch.out").open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **environment, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, line: str, times: int = 1) -> None:
        deadline = time.monotonic() + WAIT_S
        while len(re.findall(f"^{line}", self.told(), re.M)) < times:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.told()}"
            assert time.monotonic() < deadline, f"said no {line!r}:\n{self.told()}"
            time.sleep(0.01)

    def wait(self, code: int) -> str:
        assert self.process.wait(WAIT_S) == code, self.told()
        return self.told()


def trainers_of(workdir: Path) -> list[int]:
    """The processes that train into this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # gone
            continue
        if b"k2jax.train" in words and f"--workdir={workdir}".encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture
def launch(tiny_data, tmp_path) -> Iterator[Callable[..., Launched]]:
    """`launch(kind, *arguments)`: writes its files into tmp_path/out, and starts them."""

    def start(kind: str, *arguments: str) -> Launched:
        out, home = tmp_path / "out", tmp_path / "home"
        home.mkdir(exist_ok=True)
        experiment = tmp_path / "tiny.py"
        experiment.write_text(ONE_STAGE.format(path=str(tiny_data / "tiny.py")))
        python = tmp_path / "a python"  # that compiles quickly
        flags = f'XLA_FLAGS="$XLA_FLAGS {runs.QUICKLY_COMPILED}"'
        python.write_text(f'#!/bin/sh\n{flags} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        write = [
            sys.executable, REPOSITORY / "tools" / "launch.py", f"--config={experiment}",
            "--topology=cpu:2x1", f"--on={kind}", f"--workdir={tmp_path / 'run'}", f"--out={out}", f"--port={port}",
            f"--python={python}", f"--code={REPOSITORY}", "--delay=0",
            f"--cache={os.environ['JAX_COMPILATION_CACHE_DIR']}",
            *(f"--config.{key}={value}" for key, value in KEYS.items()), *arguments,
        ]  # fmt: skip
        subprocess.run(write, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        if kind == "ssh":
            (tmp_path / "hosts").write_text("# two\n127.0.0.1\n\nlocalhost # the same machine\n")
            command, log = ["bash", str(out / "launch.sh"), str(tmp_path / "hosts")], out / "launch.out"
        else:
            command, log = ["sbatch", "job.sbatch"], out / "tiny-4711.log"
        environment = {"HOME": str(home), "STAND_IN_STATE": str(tmp_path / "slurm")}
        started = Launched(command, out, log, environment)
        stack.callback(started.process.wait)
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in trainers_of(tmp_path / "run")])
        stack.callback(started.process.kill)
        return started

    with ExitStack() as stack:
        yield start


def check_whole(workdir: Path) -> None:
    assert runs.checkpoint_steps(workdir)[-1] == LAST
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, LAST + 1))
    runs.ledger(workdir).verify()
    launches = json.loads((workdir / "environment.json").read_text())["launches"]
    assert {entry["devices"]["processes"] for entry in launches} == {2}


def test_ssh_restarts_after_75_and_ends_with_the_worst_code(launch, tmp_path):
    """SIGTERM to one process: both save, and the script starts both again. A store that is gone then: 78 ends it."""
    workdir = tmp_path / "run"
    started = launch("ssh")
    started.wait_for("step 40 ")
    os.kill(trainers_of(workdir)[1], signal.SIGTERM)
    told = started.wait(0)
    assert "launch: exit codes 75 75: again\n" in told and told.endswith("launch: exit codes 0 0: done\n")
    assert len(re.findall(r"^ok    all-reduce", told, re.M)) == 2, "preflight before each"
    [step] = re.findall(r"^resuming after step (\d+) of 200", told, re.M)
    assert 40 <= int(step) < LAST
    check_whole(workdir)
    assert not trainers_of(workdir) and (tmp_path / "out" / "logs" / "127.0.0.1").read_text()

    told = launch("ssh", "--config.seed=3").wait(78)
    assert told.count("seed: 22238 -> 3") == 2 and "launch: exit codes 78 78: stop\n" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_script_of_ssh_stops_all(launch, tmp_path, number):
    """SIGTERM is passed on; where it is killed, the connections end, and what ran over them saves by itself."""
    workdir = tmp_path / "run"
    started = launch("ssh")
    started.wait_for("step 40 ")
    started.process.send_signal(number)
    if number == signal.SIGTERM:
        assert "launch: exit codes 75 75: again\n" in started.wait(75)
    else:
        started.wait(-signal.SIGKILL)
    deadline = time.monotonic() + 60
    while trainers_of(workdir):
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.1)
    [step] = runs.checkpoint_steps(workdir)
    assert 40 <= step < LAST


def test_slurm_queues_again_after_75(launch, tmp_path):
    """SIGTERM to one task; then, as before the time limit, to the job's script. It is trained to the end."""
    workdir = tmp_path / "run"
    started = launch("slurm")
    started.wait_for("step 40 ")
    os.kill(trainers_of(workdir)[0], signal.SIGTERM)
    started.wait_for("launch: exit code 75: again")
    started.wait_for("step 120 ")
    os.kill(int((tmp_path / "slurm" / "batch").read_text()), signal.SIGTERM)
    told = started.wait(0)
    assert told.count("launch: exit code 75: again\n") == 2 and told.endswith("launch: exit code 0: done\n")
    assert re.findall(r"^launch: job 4711 on localhost,node2, restart (\d) of", told, re.M) == ["0", "1", "2"]
    check_whole(workdir)
    assert not trainers_of(workdir)


def test_slurm_restarts_no_more_often_than_it_may(launch, tmp_path):
    started = launch("slurm", "--max-restarts=0")
    started.wait_for("step 20 ")
    os.kill(trainers_of(tmp_path / "run")[0], signal.SIGTERM)
    assert started.wait(75).endswith("launch: restarted 0 times, no more\n")
