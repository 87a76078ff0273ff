"""A fork goes on from a checkpoint of another run, has its past, and leaves it as it is."""

import shutil

import pytest

from faults import runs
from k2jax.data.epochs import read_epochs
from k2jax.data.provenance import open_run, which_docs
from k2jax.errors import ConfigError
from k2jax.run import fork as forks
from k2jax.run.fork import parse_fork


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_fork_has_its_parents_past_and_a_name_of_its_own(tiny_data, straight, command, tmp_path):
    parent, workdir = runs.copy_run(straight, tmp_path / "parent"), tmp_path / "fork"
    before = contents(parent)
    changed = {"stages.1.lr_peak": 1e-3, "stages.1.lr_final": 1e-4}
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, changed), f"--fork={parent}@20")
    assert "stages.1.lr_peak: 0.002 -> 0.001" in error
    allowed = {**changed, "allow_drift": "('stages.1.lr_peak', 'stages.1.lr_final')"}
    ended = command(*runs.arguments(tiny_data, workdir, allowed), f"--fork={parent}@20")
    assert ended.code == 0 and "resuming after step 20 of 25" in ended.lines, ended
    assert contents(parent) == before

    [first] = read_epochs(parent)
    known, own = read_epochs(workdir)
    assert known == first and own.run != first.run and own.previous == first.digest and own.after_step == 20
    digest = runs.meta(parent, 20)["digest"]
    assert own.origin == {"kind": "fork", "run": first.run, "step": 20, "checkpoint": digest}
    assert set(own.changes) == set(changed)
    assert runs.checkpoint_steps(workdir) == [20, 25]
    assert runs.meta(workdir, 25)["epoch"] == own.name and runs.meta(workdir, 25)["parent"]["digest"] == digest
    rows, expected = runs.ledger_rows(workdir), runs.ledger_rows(straight)
    assert rows[:20] == expected[:20] and [r["batch"] for r in rows] == [r["batch"] for r in expected]
    assert rows[21:] != expected[21:]
    runs.ledger(workdir).verify()
    assert which_docs(open_run(workdir), 3) == which_docs(open_run(parent), 3)

    # Later launches need neither the parent nor its name; from its checkpoint on the same leave as before.
    shutil.rmtree(workdir / "checkpoints" / "25")
    shutil.rmtree(parent)
    ended = command(*runs.arguments(tiny_data, workdir, allowed), f"--fork={parent}@20")  # as a restart script says it
    assert ended.code == 0 and "resuming after step 20 of 25" in ended.lines, ended
    assert runs.ledger_rows(workdir) == rows and len(read_epochs(workdir)) == 2


def test_a_fork_without_a_change_is_the_same_run_under_another_name(tiny_data, straight, command, tmp_path):
    workdir = tmp_path / "fork"
    argv = (*runs.arguments(tiny_data, workdir, {}), f"--fork={straight}@20")
    for _ in range(2):  # the second time there is nothing to do
        ended = command(*argv)
        assert ended.code == 0, ended
    rows, expected = runs.ledger_rows(workdir), runs.ledger_rows(straight)
    assert rows[:20] == expected[:20] and [r["batch"] for r in rows] == [r["batch"] for r in expected]
    assert [epoch.after_step for epoch in read_epochs(workdir)] == [0, 20]


def test_a_kill_in_the_middle_of_a_fork_is_made_good(straight, tmp_path, monkeypatch):
    workdir = tmp_path / "fork"
    workdir.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(forks, "_copy_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forks.fork(straight, 10, workdir)
    assert runs.checkpoint_steps(workdir) == [10] and not (workdir / "epochs").exists()
    name = forks.read_fork(workdir)["run"]
    forks.fork(straight, 10, workdir)
    assert forks.read_fork(workdir)["run"] != name and len(runs.ledger_rows(workdir)) == 25
    with pytest.raises(ConfigError, match="is a fork of run .* at step 10, not of .* at 20"):
        forks.fork(straight, 20, workdir)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "a"}', '{"run": 1, "origin": {"run": "a", "step": 1}}'])
def test_a_damaged_fork_json_is_one_line(straight, tmp_path, text):
    workdir = runs.copy_run(straight, tmp_path / "run")
    (workdir / "fork.json").write_text(text)
    with pytest.raises(ConfigError, match="fork.json is damaged"):
        forks.fork(straight, 20, workdir)


def test_a_fork_into_what_is_not_its_own_is_refused(straight, stopped, tmp_path):
    own, other = runs.copy_run(stopped, tmp_path / "own"), tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for workdir, why in ((own, "holds a run of its own"), (other, "holds something else already")):
        before = contents(workdir)
        with pytest.raises(ConfigError, match=why):
            forks.fork(straight, 10, workdir)
        assert contents(workdir) == before
    with pytest.raises(ConfigError, match="no checkpoint of step 11"):
        forks.fork(straight, 11, tmp_path / "third")
    for text in ("runs/k2", "runs/k2@", "@10", "runs/k2@ten"):
        with pytest.raises(ConfigError, match="expected a run directory and a step"):
            parse_fork(text)
