"""SIGKILL: nothing that a run has computed changes, and nothing half-written is taken for a checkpoint."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults import runs
from faults.test_preempt import SLOW_STEPS
from faults.test_storage import reader  # noqa: F401
from k2jax.errors import StorageError


@pytest.mark.fault("A4", "F2")
def test_kill_and_resume_give_the_same_bits(tiny_data, straight, start, tmp_path):
    """Ledger, chain and metrics of a killed and resumed run are those of an undisturbed one, byte for byte.

    Seen red without the cut of the metrics at a resume.
    """
    workdir, overrides = tmp_path / "run", {"data.workers": 1}
    killed = start(workdir, overrides, environment=runs.READ_ONLY_CACHE)
    killed.wait_for("saved 10")
    killed.signal(signal.SIGKILL)
    killed.wait(-signal.SIGKILL)
    assert [10] == runs.checkpoint_steps(workdir)[:1]

    told = start(workdir, overrides).wait(0)
    newest = max(
        step for step in (10, 20, 25) if any(line == f"resuming after step {step} of 25" for line in told)
    )
    assert f"saved {newest}" not in told
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, 26))
    assert runs.metric_rows(workdir) == runs.metric_rows(straight)
    assert runs.ledger(workdir).records() == runs.ledger(straight).records()
    for run in (workdir, straight):
        runs.ledger(run).verify()
        assert not runs.leftovers(run)

    all_end_soon(killed)


def all_end_soon(trainer):
    """Worker processes end with their trainer."""
    deadline = time.monotonic() + 15
    while trainer.left_behind():
        assert time.monotonic() < deadline, "a worker outlived its trainer"
        time.sleep(0.05)


@pytest.mark.fault("A4")
@pytest.mark.processes
def test_kills_at_random_moments(straight, start, reader, tmp_path):  # noqa: F811
    """Every restart goes on from the newest complete checkpoint, and what the run computes never changes.

    Moments: compiling, in the middle of saves and of the steps behind them (fixed seed; timing adds chance of its own).
    """
    workdir, draw = tmp_path / "run", random.Random(7)
    overrides = {"checkpoint.every_steps": 2}
    moments = [f"saving {2 * draw.randint(1, 3)}", "compiling", "saving 10"]
    expected = 0
    for moment in [*moments, None]:
        trainer = start(workdir, overrides, environment=runs.READ_ONLY_CACHE)
        begun = f"resuming after step {expected} of 25" if expected else "starting at step 1"
        trainer.wait_for(begun)
        if moment is None:
            trainer.wait(0)
            break
        trainer.wait_for(moment)
        time.sleep(draw.uniform(0, 0.15))
        trainer.signal(signal.SIGKILL)
        trainer.wait(-signal.SIGKILL)
        expected = max(runs.checkpoint_steps(workdir), default=0)
        reader.restore_all(workdir)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.meta(workdir, 25)["digests"] == runs.meta(straight, 25)["digests"]
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)


@pytest.mark.fault("F1")
@pytest.mark.processes
def test_a_killed_data_worker_ends_the_run(straight, start, tmp_path):
    """70 with its name, what was saved stays, and the same command reads on where it was."""
    workdir, workers = tmp_path / "run", {"data.workers": 2, "data.prefetch": 2, "checkpoint.every_steps": 2}
    trainer = start(workdir, workers, patch=SLOW_STEPS)
    trainer.wait_for("saved 2")
    pid = trainer.process.pid
    children = [int(pid) for path in Path(f"/proc/{pid}/task").glob("*/children") for pid in path.read_text().split()]
    spawned = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(spawned) == 2
    os.kill(spawned[0], signal.SIGKILL)
    trainer.wait(70)
    error = trainer.error_lines()[0]  # what follows is Python's own, of memory that the worker shared
    assert error.startswith("error: the loader failed before step ") and "exit code -9" in error
    step = runs.checkpoint_steps(workdir)[-1]
    assert 2 <= step < 20
    all_end_soon(trainer)
    assert f"resuming after step {step} of 25" in start(workdir, workers).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


DIES_SAVING = """
import os, signal
from k2jax.run import storage
real = storage._LateJson._save_fn
async def save(self, item, directory):
    if "/12." in str(directory):
        os.kill(os.getpid(), signal.SIGKILL)
    await real(self, item, directory)
storage._LateJson._save_fn = save
"""


@pytest.mark.fault("A4")
@pytest.mark.processes
def test_kill_in_the_middle_of_a_save(straight, start, tmp_path):
    """The half-written step is no checkpoint. The run goes on before it, and removes it even if it saves it no more."""
    workdir, every = tmp_path / "run", {"checkpoint.every_steps": 12}
    start(workdir, every, patch=DIES_SAVING, environment=runs.READ_ONLY_CACHE).wait(-signal.SIGKILL)
    assert any("/12." in name and "tmp" in name for name in runs.leftovers(workdir))
    assert "resuming after step 10 of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.ledger(workdir).records() == runs.ledger(straight).records()
    assert not runs.leftovers(workdir)


@pytest.mark.fault("S15")
def test_a_changed_ledger_is_found(straight, tmp_path):
    """`verify` names the record over a changed row, a removed row, and a changed record.

    Seen red without the recomputation of the chain.
    """
    bits = runs.ledger_rows(straight)[13]["loss"]
    changes = {
        "a loss": ("chunk-00002.jsonl", bits, f"{int(bits, 16) ^ 1:08x}", "record of step 20"),
        "a missing row": ("chunk-00003.jsonl", '{"step": 23', '{"step": 99', r"4 rows, missing \[23\]"),
        "a record": ("records.jsonl", '"num_rows":5', '"num_rows":6', "record of step 25"),
    }
    for name, (file, old, new, named) in changes.items():
        workdir = runs.copy_run(straight, tmp_path / name)
        path = workdir / "ledger" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(StorageError, match=named):
            runs.ledger(workdir).verify()


def test_half_written_last_lines_are_dropped(straight, command, tiny_data, tmp_path):
    """A full disk or a power cut leaves half a line: the resumed run drops it and computes it again."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    for file in ("ledger/chunk-00003.jsonl", "metrics/chunk-00003.jsonl", "ledger/records.jsonl"):
        path = workdir / file
        path.write_bytes(path.read_bytes()[:-20])
    with (workdir / "ledger" / "records.jsonl").open("rb") as file:
        assert len(file.read().splitlines()) == 3
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0, ended
    runs.ledger(workdir).verify()
    records = (workdir / "ledger" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["last_step"] for line in records] == [10, 20, 25]
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, 26))
