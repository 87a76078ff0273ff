"""Two processes over loopback are one run: they save, die, resume and stop together."""

import json
import signal

import pytest

from faults import runs


def test_two_processes_are_one_run(straight, start, tmp_path):
    """Both are killed; resumed by two processes, or by one, the run is the undisturbed one of one process, bit for bit.

    As many devices in all, that is. With two of them a sum has one order only, whoever adds up: Gloo or XLA. The newest
    checkpoint is damaged where only the second reads it: both go back to the one before, neither waits for the other.
    """
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, {"checkpoint.every_steps": 5}, devices=1)
    pair[0].wait_for("saved 10")
    for trainer in pair:
        trainer.signal(signal.SIGKILL)
    for trainer in pair:
        trainer.wait(-signal.SIGKILL)
    *_, before, newest = runs.checkpoint_steps(workdir)
    alone = runs.copy_run(workdir, tmp_path / "alone", last_step=10)
    files = (workdir / "checkpoints" / str(newest) / "state" / "ocdbt.process_1" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])

    assert "resuming after step 10 of 25" in start(alone).wait(0)
    told, told_by_second = (trainer.wait(0) for trainer in runs.pair(start, workdir, devices=1))
    assert any(line.startswith(f"refused: checkpoint {newest}: ") for line in told)
    assert {f"resuming after step {before} of 25", "saved 25"} <= set(told)
    [kept] = (workdir / "abandoned").iterdir()
    assert kept.name.startswith(f"{newest}-")
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


def test_drift_ends_both(straight, start, tmp_path):
    """Each refuses by itself: none is left waiting for the other."""
    pair = runs.pair(start, runs.copy_run(straight, tmp_path / "run"), {"seed": 3}, devices=1)
    for trainer in pair:
        assert "seed: 22238 -> 3" in trainer.wait_for_error(78)


def test_sigterm_to_one_stops_both(start, tmp_path):
    """Both save the same step and end with 75."""
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, devices=1)
    pair[0].wait_for("step 11 ")
    pair[1].signal(signal.SIGTERM)
    errors = [trainer.wait_for_error(75) for trainer in pair]
    step = runs.checkpoint_steps(workdir)[-1]
    assert 11 <= step < 25
    assert all(f"step {step} is saved" in error for error in errors)
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, step + 1))
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)


@pytest.mark.slow
def test_a_dead_process_ends_the_other(start, tmp_path):
    """SIGKILL to one: the other ends by itself, not with 0, and what was saved is good."""
    workdir = tmp_path / "run"
    patch = "from k2jax.parallel import distributed; distributed.HEARTBEAT_S = 10"
    pair = runs.pair(start, workdir, devices=1, patch=patch)
    pair[0].wait_for("saved 10")
    pair[1].signal(signal.SIGKILL)
    assert pair[0].process.wait(60) != 0
    assert "resuming after step" in str(start(workdir).wait(0))
