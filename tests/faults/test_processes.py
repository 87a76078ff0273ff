"""Two processes over loopback are one run: they save, die, resume and stop together."""

import json
import signal

import pytest
from faults import runs

@pytest.fixture(scope="module")
def killed(tiny_data, tmp_path_factory):
    """The workdir of a run of two processes, one device each, both killed after their first checkpoint."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    with runs.trainers(tiny_data) as start:
        pair = runs.pair(start, workdir, devices=1)
        pair[0].wait_for("saved 10")
        for trainer in pair:
            trainer.signal(signal.SIGKILL)
        for trainer in pair:
            trainer.wait(-signal.SIGKILL)
    return workdir


@pytest.fixture(scope="module")
def resumed(killed, tiny_data, tmp_path_factory):
    """The killed run resumed by two processes to its end, and what the second of them printed."""
    workdir = runs.copy_run(killed, tmp_path_factory.mktemp("resumed") / "run")
    with runs.trainers(tiny_data) as start:
        pair = runs.pair(start, workdir, devices=1)
        told = pair[0].wait(0)
        pair[1].wait(0)
    assert any(line.startswith("resuming after step") for line in told)
    return workdir, pair[1].lines()


def test_two_processes_compute_what_one_does(straight, resumed):
    """Killed and resumed, they give the bits of one process with as many devices: batches, losses, state.

    With two devices a sum over them has one order only, whoever adds it up: Gloo or XLA.
    """
    workdir, _ = resumed
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.ledger(workdir).records() == runs.ledger(straight).records()
    assert runs.meta(workdir, 25)["digests"] == runs.meta(straight, 25)["digests"]
    runs.ledger(workdir).verify()
    assert not runs.leftovers(workdir)


def test_only_the_first_process_writes_and_speaks(resumed):
    workdir, told_by_second = resumed
    assert [line for line in told_by_second if not line.startswith("[Gloo]")] == []
    assert [row["step"] for row in runs.metric_rows(workdir)] == list(range(1, 26))
    launches = json.loads((workdir / "environment.json").read_text())["launches"]
    assert [launch["devices"]["processes"] for launch in launches] == [2, 2]


def test_one_process_goes_on(straight, killed, start, tmp_path):
    """What two processes saved, one restores, and the bits are still the same."""
    workdir = runs.copy_run(killed, tmp_path / "run", last_step=10)
    assert "resuming after step 10 of 25" in start(workdir).wait(0)
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.meta(workdir, 25)["digests"] == runs.meta(straight, 25)["digests"]


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


def test_damage_that_one_process_meets(resumed, start, tmp_path):
    """Only the second reads the damaged file: both go back to the step before, neither waits for the other."""
    workdir = runs.copy_run(resumed[0], tmp_path / "run")
    files = (workdir / "checkpoints" / "25" / "state" / "ocdbt.process_1" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    pair = runs.pair(start, workdir, devices=1)
    told = pair[0].wait(0)
    pair[1].wait(0)
    assert any(line.startswith("refused: checkpoint 25: ") for line in told)
    assert {"resuming after step 20 of 25", "saved 25"} <= set(told)
    [kept] = (workdir / "abandoned").iterdir()
    assert kept.name.startswith("25-")


@pytest.mark.slow
def test_a_dead_process_ends_the_other(start, tmp_path):
    """SIGKILL to one: the other ends by itself, not with 0, and what was saved is good."""
    workdir = tmp_path / "run"
    patch = "from k2jax import distributed; distributed.HEARTBEAT_S = 10"
    pair = runs.pair(start, workdir, devices=1, patch=patch)
    pair[0].wait_for("saved 10")
    pair[1].signal(signal.SIGKILL)
    assert pair[0].process.wait(60) != 0
    assert "resuming after step" in str(start(workdir).wait(0))
