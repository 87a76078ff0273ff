"""Goodput of real runs: killed, stopped and resumed, also as one looks on."""

import json
import signal
import subprocess
import sys
import time

from conftest import REPOSITORY

from faults import runs
from k2jax.run import goodput

OFTEN = """
from k2jax.run import goodput
from k2jax.training import clock
goodput.BEAT_S, clock.TICK_S = 0.2, 0.1
from k2jax import train
real = train.Recorder.push
def push(*args):  # steps that take longer than the beat
    import time; time.sleep(0.1)
    real(*args)
train.Recorder.push = push
"""


def test_killed_and_stopped(start, tmp_path, monkeypatch):
    """Killed after step 14, and stopped by SIGTERM after step 12 of its resume from 10: red without the marks."""
    workdir = tmp_path / "run"
    began = time.time()
    trainer = start(workdir, patch=OFTEN)
    trainer.wait_for("step 14 ")
    looked_at = goodput.read_goodput(workdir)
    assert looked_at.ended is None and looked_at.seconds["step"] > 0.9 and looked_at.seconds["down"] == 0
    trainer.signal(signal.SIGKILL)
    trainer.wait(-signal.SIGKILL)

    trainer = start(workdir, patch=OFTEN)  # or it may be at its end by the time that it is told to stop
    trainer.wait_for("step 12 ")
    trainer.signal(signal.SIGTERM)
    told = trainer.wait(75)
    found = goodput.read_goodput(workdir)
    wall_s = time.time() - began
    records, _ = goodput.read_records(workdir / "goodput.jsonl")
    assert [(r["ended"], r["marks"][0][0]) for r in records] == [(None, 0), ("Preempted", 10)]
    assert (found.launches, found.damaged, found.ended, found.last_step) == (2, 0, "Preempted", records[1]["step"])
    assert found.wall_s < wall_s + 0.1 and found.overlap_s == 0  # processes' ages are known to 10 ms
    assert found.wall_s > records[1]["began"] - records[0]["began"] + records[1]["seconds"] - 0.1
    # Of 0.1 s and more each: those up to the checkpoint and of the resume, and those between, which were lost.
    assert found.seconds["step"] > 0.1 * 10 and found.seconds["run again"] > 0.1 * 2
    assert found.seconds["step"] + found.seconds["run again"] < sum(r["causes"]["step"] + r["open"][1] for r in records)
    assert min(found.seconds[cause] for cause in ("start", "compile", "restore", "unknown")) > 0
    with monkeypatch.context() as patch:  # it had another beat: of a longer gap it knows more
        patch.setattr(goodput, "BEAT_S", 0.2)
        assert goodput.describe(goodput.read_goodput(workdir)) in told
    assert not runs.leftovers(workdir)

    command = [sys.executable, "-m", "k2jax.goodput", f"--workdir={workdir}"]
    for arguments in ([], ["--json"]):
        out = subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        if arguments:
            assert goodput.Goodput(**json.loads(out)) == found
        else:
            assert "ended: Preempted" in out and out.count("\n") == len(goodput.CAUSES) + 2


def test_of_a_whole_run(tiny_run):
    found = goodput.read_goodput(tiny_run)
    assert (found.ended, found.launches, found.last_step) == ("done", 1, 25)
    assert found.seconds["evaluate"] > 0 and found.seconds["run again"] == found.seconds["down"] == 0
