"""A spike, met unattended: the run goes back by itself, keeps what it leaves, and goes on without the data there."""

import argparse
import json
import sys

import jax.numpy as jnp
import pytest

from faults import runs
from k2jax import replay
from k2jax.data.journal import read_journal
from k2jax.data.loader import make_loader
from k2jax.data.provenance import open_run
from k2jax.errors import ConfigError
from k2jax.parallel import cluster
from k2jax.run import branches
from k2jax.run.ledger import bits_float
from k2jax.training import program, step

pytestmark = pytest.mark.processes  # half a minute each

QUICK = {  # a window that is full after eight steps, and two steps without an update are a spike
    "stability.window": 8,
    "stability.max_skips": 2,
    "stability.rollback.before": 1,
    "stability.rollback.after": 2,
    "stability.rollback.watch": 1,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_between": 1,
}
PLAIN = QUICK | {"stability.rollback.replay": 0}  # without the doctor's trials, which take most of the time
PATCH = """
import jax.numpy as jnp
from k2jax.training import step
real = step.mean_gradients
def mean_gradients(params, batch, **kwargs):
    grads, sums = real(params, batch, **kwargs)
    bad = jnp.isin(batch.digest[..., 0], jnp.array({digests}, jnp.uint32)).any()
    return grads, sums._replace(loss=jnp.where(bad, sums.loss * 10, sums.loss))
step.mean_gradients = mean_gradients
"""


def spiky(run, *steps):
    """A patch by which every step that reads what these steps read in `run` has ten times the loss."""
    opened, digests = open_run(run), []
    for number in steps:
        batches = make_loader(
            opened.order, opened.stores, label_shift="next", first_step=number, last_step=number, threads=0
        )
        [(_, batch)] = batches
        digests.append(int(batch["digest"][0, 0]))
    return PATCH.format(digests=digests)


@pytest.fixture(scope="module")
def gone_around(straight, tiny_data, tmp_path_factory):
    """A run whose steps 14 and 15 have bad data, from one command; and what it said."""
    workdir = tmp_path_factory.mktemp("spike") / "run"
    with runs.trainers(tiny_data) as start:
        return workdir, start(workdir, QUICK, patch=spiky(straight, 14, 15)).wait(0)


@pytest.mark.fault("B9", "D6")
def test_a_spike_in_the_data_is_gone_around(gone_around, straight):
    """Seen at 15, back to 12: what steps 13 to 16 read goes to the stage's end, where it is met again and skipped."""
    workdir, lines = gone_around
    first, second = branches.rollbacks(read_journal(workdir / "journal.jsonl"))
    assert (first["crossing"], first["seen_at"], first["at_step"], first["how"]) == (14, 15, 12, "defer")
    assert first["ranges"] == [[12 * 8, 16 * 8]]
    assert (second["crossing"], second["at_step"], second["how"], second["attempt"]) == (18, 16, "skip", 1)
    order = runs.order_of(workdir)
    assert order.num_steps == 21 and order.stages[0].num_steps == 16
    rows = runs.ledger_rows(workdir)
    assert [row["step"] for row in rows] == list(range(1, 22)) and all(row["applied"] for row in rows)
    told = [line for line in lines if line.startswith("spike: ")]
    assert len(told) == 2 and "back to step 12" in told[0] and "branches/01" in told[0]
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)
    diagnosis = json.loads((workdir / "spikes" / "14-15.json").read_text())
    assert diagnosis["verdict"]["cause"] == "data" and diagnosis["replay"], "steps were run again, and the batch tried"
    assert rows[:12] == runs.ledger_rows(straight)[:12]


def test_what_was_left_is_a_branch(gone_around, straight):
    workdir, _ = gone_around
    branch = workdir / "branches" / "01"
    rows = [json.loads(line) for line in (branch / "ledger" / "chunk-00002.jsonl").read_text().splitlines()]
    assert [(row["step"], row["applied"], row["outlier"]) for row in rows[-4:]] == [
        (13, True, False), (14, False, True), (15, False, True), (16, True, False),
    ]  # fmt: skip
    assert [row["batch"] for row in rows] == [row["batch"] for row in runs.ledger_rows(straight)[10:16]]
    assert bits_float(rows[-2]["loss"]) > 5 * bits_float(rows[-4]["loss"])


def test_readers_take_a_branch(gone_around, straight, monkeypatch, capsys):
    """A replay of it begins at the run's own checkpoint, reads what the branch read, and decides as it did: here on
    eight devices, where the run had two."""
    workdir, _ = gone_around
    monkeypatch.setattr(step, "mean_gradients", step.mean_gradients)
    exec(spiky(straight, 14, 15), {})
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    monkeypatch.setattr(sys, "argv", ["replay", f"--workdir={workdir}", "--branch=1", "--step=13", "--steps=4"])
    replay.main()
    told = capsys.readouterr().out
    assert "from checkpoint 12" in told and "steps 13 to 16: the same batches, on other devices" in told, told
    pieces = branches.line(workdir / "branches" / "01")
    assert [(p.folder.name, p.first, p.last) for p in pieces] == [("01", 13, None), ("run", 1, 12)]


def test_a_branch_that_is_not_there_is_one_line(gone_around, straight, tmp_path, capsys, monkeypatch):
    workdir, _ = gone_around
    damaged = runs.copy_run(workdir, tmp_path / "run")
    (damaged / "branches" / "02" / "branch.json").unlink()
    wrong = {
        (workdir, "3"): "has no such branch: it has 1, 2",
        (straight, "1"): "has no such branch: it was never rolled back",
        (damaged, "2"): "is not there or not complete",
    }
    for (run, number), said in wrong.items():
        parser = argparse.ArgumentParser()
        branches.add_options(parser)
        with pytest.raises(ConfigError, match=said):
            branches.chosen(parser.parse_args([f"--workdir={run}", f"--branch={number}"]))
    assert branches.chosen(parser.parse_args([f"--workdir={workdir}", "--branch=2"])) == workdir / "branches" / "02"


# The n-th of these calls, in the order in which a roll-back makes them, ends the process.
KILLED = """
import os, signal
from k2jax import files
from k2jax.data import journal
from k2jax.errors import ConfigError
from k2jax.parallel import cluster
from k2jax.run import branches
from k2jax.training import recovery
calls = []
def counted(owner, name):
    real = getattr(owner, name)
    def call(*arguments, **options):
        calls.append(name)
        mine = len(calls) == {number}
        if mine and not {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **options)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(owner, name, call)
rolls_back = recovery.roll_back
def roll_back(*arguments):
    for owner, name in ((recovery, "append_entry"), (branches, "_copy"), (branches, "_last_step")):
        counted(owner, name)
    counted(files, "move")
    counted(files, "whole_folder")
    return rolls_back(*arguments)
recovery.roll_back = roll_back
"""


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_in_a_roll_back_leaves_the_old_or_the_new(
    number, after, gone_around, straight, tiny_data, start, tmp_path
):
    """At each of its acts, before and after it: the next start completes it, and ends with the ledger of the run that
    was not killed. Seen red with the branch's mark written before the checkpoints were moved."""
    workdir, (whole, _) = tmp_path / "run", gone_around
    patch = spiky(straight, 14, 15)
    start(workdir, PLAIN, patch=patch + KILLED.format(number=number, after=after)).wait(-9)
    start(workdir, PLAIN, patch=patch).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(whole)
    assert [e["ranges"] for e in branches.rollbacks(read_journal(workdir / "journal.jsonl"))] == [
        e["ranges"] for e in branches.rollbacks(read_journal(whole / "journal.jsonl"))
    ]
    for name in ("01", "02"):
        for place in ("branches/" + name + "/checkpoints", "branches/" + name + "/ledger"):
            assert {p.name for p in (workdir / place).iterdir()} == {p.name for p in (whole / place).iterdir()}
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)


@pytest.mark.fault("D7")
def test_a_run_that_is_cut_short_decides_as_the_other(gone_around, straight, tiny_data, start, tmp_path):
    """Killed where the window is full and before the spike: limits come from the ledger, so the same steps are
    outliers, the same place is gone around. Seen red with a guard that begins without rows."""
    workdir, (whole, _) = tmp_path / "run", gone_around
    patch = spiky(straight, 14, 15)
    trainer = start(workdir, PLAIN, patch=patch)
    trainer.wait_for("saved 12")
    trainer.signal(9)
    trainer.wait(-9)
    start(workdir, PLAIN, patch=patch).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(whole)
    limits = [(row["step"], row["loss_limit"]) for row in runs.metric_rows(workdir)]
    assert limits == [(row["step"], row["loss_limit"]) for row in runs.metric_rows(whole)]


def test_processes_go_back_together(gone_around, straight, tiny_data, start, tmp_path):
    """Two processes with a device each, which try the spike out together, too: both restart in place, from one
    decision; the order is that of one process."""
    workdir, (whole, _) = tmp_path / "run", gone_around
    for trainer in runs.pair(start, workdir, QUICK, patch=spiky(straight, 14, 15), devices=1):
        trainer.wait(0)
    found, expected = ([(r["step"], r["batch"], r["applied"]) for r in runs.ledger_rows(w)] for w in (workdir, whole))
    assert found == expected
    assert len(branches.rollbacks(read_journal(workdir / "journal.jsonl"))) == 2
    assert sorted(p.name for p in (workdir / "branches").iterdir()) == ["01", "02"]


def test_a_spike_that_cannot_be_explained_is_gone_around_all_the_same(gone_around, straight, start, tmp_path):
    """Neither the look at the records nor the trials are possible. Seen red with their errors left to end the run."""
    workdir, (whole, _) = tmp_path / "run", gone_around
    patch = "from k2jax import spikes\nfrom k2jax.errors import StorageError\n"
    patch += "def diagnose(*a, **k): raise StorageError('the records are gone')\nspikes.diagnose = diagnose\n"
    told = start(workdir, QUICK, patch=spiky(straight, 14, 15) + patch).wait(0)
    assert told.count("the spike cannot be explained: the records are gone") == 4
    assert runs.ledger_rows(workdir) == runs.ledger_rows(whole)


def test_the_checkpoint_before_stays(straight, tiny_data, start, tmp_path):
    """Bad data at 14 and 19: what was saved at 12 is still there at 19, though no checkpoint in between is kept.
    Seen red without pins."""
    workdir = tmp_path / "run"
    start(workdir, {**PLAIN, "checkpoint.keep_between": 0}, patch=spiky(straight, 14, 19)).wait(0)
    first, *_ = branches.rollbacks(read_journal(workdir / "journal.jsonl"))
    assert (first["crossing"], first["seen_at"], first["at_step"]) == (14, 19, 12)
    assert runs.checkpoint_steps(workdir / "branches" / "01") == [16]


def test_what_does_not_help_ends_with_65(straight, tiny_data, command, monkeypatch, tmp_path):
    """A state that spikes whatever it reads: wider each time, then it stops, and says what to do."""
    workdir, real = tmp_path / "run", step.mean_gradients

    def mean_gradients(params, batch, **options):
        grads, sums = real(params, batch, **options)
        return grads, sums._replace(loss=sums.loss * jnp.where(always[0] >= 14, 10.0, 1.0))

    def train_step(state, *arguments, real=step.train_step, **options):
        always[:] = [state.step + 1]
        return real(state, *arguments, **options)

    always = []
    monkeypatch.setattr(step, "mean_gradients", mean_gradients)
    monkeypatch.setattr(program, "train_step", train_step)
    rules = {**PLAIN, "stability.rollback.watch": 10, "stability.rollback.most": 2, "checkpoint.every_steps": 2}
    error = command.refuse(65, *runs.arguments(tiny_data, workdir, {**rules, "checkpoint.keep_between": 20}))
    assert "2 roll-back(s) did not help" in error and "k2jax.doctor" in error
    first, second = branches.rollbacks(read_journal(workdir / "journal.jsonl"))
    assert (first["attempt"], first["at_step"], first["ranges"]) == (1, 12, [[12 * 8, 16 * 8]])
    assert (second["attempt"], second["at_step"]) == (2, 10)
    assert sum(b - a for a, b in second["ranges"]) > 4 * 8, "twice as wide"
