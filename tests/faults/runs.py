"""Runs for the fault tests: the trainer as a program that a test starts, watches and kills; or called in process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conftest import REPOSITORY

from k2jax.data import epochs
from k2jax.data.chunks import chunk_of_step
from k2jax.data.journal import read_journal
from k2jax.data.order import Order
from k2jax.errors import run_main
from k2jax.parallel import cluster
from k2jax.run.ledger import Ledger
from k2jax.train import main

# JAX writes cache entries in place: a program that is killed or short of disk must not leave half of one.
READ_ONLY_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000"}
# Half of the time to compile, and no slower steps. Without any optimization (conftest.py) what many starts read from
# the cache would run longer than is saved.
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # see conftest.py
)
WAIT_S = 300  # for a line or an end; the machine may be busy
# `patch` runs before the real main, in the program's own process.
PATCHED = (
    "import sys\n{patch}\nfrom k2jax import train\nfrom k2jax.errors import run_main\nrun_main(train.main)\n"
)


def arguments(data: Path, workdir: Path | str, overrides: dict[str, Any]) -> list[str]:
    keys = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [f"--config={data / 'tiny.py'}", f"--workdir={workdir}", *keys]


class Trainer:
    """`python -m k2jax.train` in a process group of its own. Output goes to files: no orphan holds us by a pipe."""

    def __init__(
        self,
        data: Path,
        workdir: Path,
        overrides: dict[str, Any] | None = None,
        *,
        devices: int = 2,
        environment: dict[str, str] | None = None,
        patch: str = "",
        url: str | None = None,  # of the run, in place of `workdir`, beside which the outputs lie
    ):
        number = len(list(workdir.parent.glob(f"{workdir.name}.out*")))
        self.output = workdir.parent / f"{workdir.name}.out{number}"
        self.errors = workdir.parent / f"{workdir.name}.err{number}"
        start = ["-c", PATCHED.format(patch=patch)] if patch else ["-m", "k2jax.train"]
        flags = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY_COMPILED}",
            "PYTHONPATH": str(REPOSITORY),
        }
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *start, *arguments(data, url or workdir, overrides or {})],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, **flags, **(environment or {})},
            )

    def lines(self) -> list[str]:
        """The whole lines printed up to now."""
        return self.output.read_text().splitlines(keepends=False)

    def told(self) -> str:
        """Both outputs, to show when a test fails."""
        return self.output.read_text() + self.errors.read_text()

    def error_lines(self) -> list[str]:
        """What stderr holds besides the C++ libraries' log lines (I0000 00:00:..., W..., E...)."""
        lines = self.errors.read_text().splitlines()
        return [line for line in lines if not (line[:1] in "IWE" and line[1:5].isdigit())]

    def wait_for(self, start: str) -> str:
        """The first line printed that begins with `start`."""
        deadline = time.monotonic() + WAIT_S
        while True:
            ended = self.process.poll() is not None
            for line in self.lines():
                if line.startswith(start):
                    return line
            assert not ended, f"ended with {self.process.returncode} before it said {start!r}:\n{self.told()}"
            assert time.monotonic() < deadline, f"said no {start!r} in {WAIT_S} s:\n{self.told()}"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """To the trainer alone, not to its workers."""
        self.process.send_signal(number)

    def wait(self, code: int, timeout_s: float = WAIT_S) -> list[str]:
        """Waits for the end, which must have this exit code; the lines printed."""
        try:
            found = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.told()}") from None
        assert found == code, f"ended with {found}, expected {code}:\n{self.told()}"
        return self.lines()

    def wait_for_error(self, code: int) -> str:
        """The one line of an expected end on stderr; anything besides, such as a traceback, fails."""
        self.wait(code)
        lines = self.error_lines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.told()
        return lines[0]

    def left_behind(self) -> bool:
        """Whether any process of the group is still alive."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@contextmanager
def trainers(data: Path) -> Iterator[Callable[..., Trainer]]:
    """`start(workdir, overrides, ...)`: trainers that do not outlive the block."""
    with ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> Trainer:
            trainer = Trainer(data, *args, **kwargs)
            stack.callback(trainer.end)
            return trainer

        yield start


def pair(
    start: Callable[..., Trainer],
    workdir: Path,
    overrides: dict[str, Any] | None = None,
    *,
    each: Sequence[dict[str, Any]] = ({}, {}),
    workdirs: tuple[Path, ...] | None = None,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Trainer]:
    """Processes of one run over loopback, one for each of `each`, which has what that one is told alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(each))}
    return [
        start(
            workdirs[index] if workdirs else workdir,
            {**(overrides or {}), **each[index]},
            environment={**(environment or {}), **common, "JAX_PROCESS_ID": str(index)},
            **kwargs,
        )
        for index in range(len(each))
    ]


class Ended(NamedTuple):
    code: int
    lines: list[str]  # of stdout
    error: str  # stderr


class Command:
    """`main()` in this process with its exit code; without `jax.distributed`, which a process can join only once."""

    def __init__(self, capsys: Any, monkeypatch: Any):
        self.capsys, self.monkeypatch = capsys, monkeypatch
        monkeypatch.setattr(cluster, "initialize", lambda: None)
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # run_main's own goes with the test

    def __call__(self, *argv: str) -> Ended:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["k2jax.train", *argv])
        try:
            run_main(main)
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = self.capsys.readouterr()
        return Ended(code, out.splitlines(), err)

    def train(self, data: Path, workdir: Path, overrides: dict[str, Any] | None = None) -> Ended:
        return self(*arguments(data, workdir, overrides or {}))

    def refuse(self, code: int, *argv: str) -> str:
        """The one line of an expected refusal."""
        ended = self(*argv)
        assert ended.code == code, ended
        assert ended.error.startswith("error: ") and ended.error.count("\n") == 1, ended.error
        return ended.error


# ---- what a run left ---------------------------------------------------------------------------------------


def ledger(workdir: Path) -> Ledger:
    order = order_of(workdir)
    return Ledger(workdir / "ledger", lambda step: chunk_of_step(order, step))


def order_of(workdir: Path) -> Order:
    return epochs.order_of(epochs.read_epochs(workdir), read_journal(workdir / "journal.jsonl"))


def ledger_rows(workdir: Path) -> list[dict[str, Any]]:
    """Losses and norms as hexadecimal bits: equal rows are equal bits."""
    return list(ledger(workdir).steps.rows())


def metric_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics/ less what a clock or the machine decides."""
    measured = ("_s", "_bytes", "per_s", "per_device", "mfu_causal", "mfu_noncausal", "hosts")
    rows = whole_metric_rows(workdir)
    return [{key: value for key, value in row.items() if not key.endswith(measured)} for row in rows]


def whole_metric_rows(workdir: Path) -> list[dict[str, Any]]:
    files = sorted((workdir / "metrics").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def checkpoint_steps(workdir: Path) -> list[int]:
    """Steps on disk that Orbax has committed: the rename to the plain number is its last act."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def leftovers(workdir: Path) -> list[str]:
    """Half-written or half-deleted things in a run directory."""
    found = [str(path.relative_to(workdir)) for path in workdir.rglob("*") if re.search("tmp|new-", path.name)]
    trash = workdir / "checkpoints" / "trash"
    return found + ([f"trash/{path.name}" for path in trash.iterdir()] if trash.exists() else [])


def meta(workdir: Path, step: int) -> dict[str, Any]:
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "meta.json").read_text())


def copy_run(workdir: Path, to: Path, last_step: int | None = None) -> Path:
    """A copy of a run that stands still, as if it had ended at the checkpoint of `last_step`."""
    shutil.copytree(workdir, to)
    for step in checkpoint_steps(to):
        if last_step is not None and step > last_step:
            shutil.rmtree(to / "checkpoints" / str(step))
    return to


def journal(workdir: Path) -> list[dict[str, Any]]:
    return read_journal(workdir / "journal.jsonl")


def check_killed_pair(data: Path, folder: Path, when: str, last: int) -> None:
    """Two processes, killed when they say so and started again, are the run of one that was not, up to step `last`."""
    with trainers(data) as start:
        start(folder / "straight").wait(0)
        killed = pair(start, folder / "run", devices=1)
        killed[0].wait_for(when)
        for trainer in killed:
            trainer.signal(signal.SIGKILL)
        for trainer in killed:
            trainer.wait(-signal.SIGKILL)
        told, _ = (trainer.wait(0) for trainer in pair(start, folder / "run", devices=1))
        assert any(line.startswith("resuming after step") for line in told)
    assert ledger_rows(folder / "run") == ledger_rows(folder / "straight")
    assert meta(folder / "run", last)["digests"] == meta(folder / "straight", last)["digests"]
