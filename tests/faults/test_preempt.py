"""SIGTERM: the step ends, the state is saved, the exit code says restart me."""

import shutil
import signal

import pytest

from faults import runs

# JAX looks for the signal once a second, and the tiny runs would be over by then.
SLOW_STEPS = """
import time
from k2jax.training import metrics
push = metrics.Recorder.push
metrics.Recorder.push = lambda *arguments: (time.sleep(0.4), push(*arguments))[1]
"""
SLOW_COMPILING = """
import time
from k2jax.training import program
step_function = program.step_function
program.step_function = lambda *arguments: (time.sleep(5), step_function(*arguments))[1]
"""


@pytest.mark.fault("A1", "A2")
def test_sigterm_saves_and_the_run_goes_on_with_the_same_bits(straight, start, tmp_path):
    """Also when the signal comes twice, the second time in the middle of the save.

    Seen red without the question whether to stop.
    """
    workdir = tmp_path / "run"
    stopped = start(workdir, patch=SLOW_STEPS)
    stopped.wait_for("step 12 ")
    stopped.signal(signal.SIGTERM)
    stopped.wait_for("saving 1")
    stopped.signal(signal.SIGTERM)
    error = stopped.wait_for_error(75)
    step = runs.checkpoint_steps(workdir)[-1]
    told = stopped.lines()
    assert 12 <= step < 25 and f"saved {step}" in told
    assert f"step {step} is saved" in error and "run the same command" in error
    assert not any(line.startswith(f"step {step + 1} ") for line in told)
    assert not stopped.left_behind()

    told = start(workdir).wait(0)
    assert f"resuming after step {step} of 25" in told
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.metric_rows(workdir) == runs.metric_rows(straight)
    assert runs.meta(workdir, 25)["digests"] == runs.meta(straight, 25)["digests"]
    runs.ledger(workdir).verify()


@pytest.mark.fault("A3")
def test_sigterm_before_the_first_step(straight, start, tmp_path):
    """Nothing new to save: 75 without a checkpoint, and an older one stays as it is."""
    fresh = start(tmp_path / "fresh", patch=SLOW_COMPILING)
    resumed = start(runs.copy_run(straight, tmp_path / "resumed", last_step=10), patch=SLOW_COMPILING)
    for trainer in (fresh, resumed):
        trainer.wait_for("compiling the step of stage1")
        trainer.signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in fresh.wait_for_error(75)
    assert runs.checkpoint_steps(tmp_path / "fresh") == []
    assert "step 10 is saved" in resumed.wait_for_error(75)
    assert runs.checkpoint_steps(tmp_path / "resumed") == [10]
    assert "saving" not in fresh.told() + resumed.told()
    assert runs.meta(tmp_path / "resumed", 10) == runs.meta(straight, 10)


def test_a_finished_run_stays_as_it_is(straight, tiny_data, command, tmp_path):
    """Started once more it validates again and ends with 0: a restart script may do so."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 25 of 25" in ended.lines, ended
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert runs.checkpoint_steps(workdir) == [10, 20, 25]
