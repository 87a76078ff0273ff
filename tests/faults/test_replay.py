"""Any step of a run is run again with the same bits; what is not what the ledger says is named."""

import json
import os
import subprocess
import sys

import pytest

from faults import runs
from k2jax import rerun
from k2jax.data.epochs import decide, read_epochs
from k2jax.data.journal import append_entry
from k2jax.errors import ConfigError, NumericsError
from k2jax.parallel import cluster
from k2jax.replay import replay, verdict


def program(workdir, *arguments, devices=2):
    """`python -m k2jax.replay` as the trainer of these runs was started."""
    flags = f"--xla_force_host_platform_device_count={devices} {runs.QUICKLY_COMPILED}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(runs.REPOSITORY)}
    command = [sys.executable, "-m", "k2jax.replay", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=runs.WAIT_S)


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_a_step_has_the_same_bits_again(straight):
    before = contents(straight)
    done = program(straight, "--step=13", "--steps=2")
    assert done.returncode == 0, done.stderr
    assert "from checkpoint 10" in done.stdout
    assert done.stdout.splitlines()[-1] == "steps 13 to 14: equal to the ledger, in every bit"
    assert contents(straight) == before


def test_from_the_seed_and_what_was_changed_is_named(straight, tmp_path):
    """One bit of one loss in the ledger: found, in the step where it is."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    path = workdir / "ledger" / "chunk-00001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["loss"] = f"{int(rows[1]['loss'], 16) ^ 1:08x}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = program(workdir, "--step=1", "--steps=3")
    assert done.returncode == 65 and "from the seed" in done.stdout
    assert "step 1: loss" in done.stdout and done.stdout.count("the same bits") == 2
    assert "the first that differs is step 2" in done.stderr and "of the same kind and number" in done.stderr


def test_other_devices_agree_to_rounding_and_another_batch_does_not(straight, tmp_path):
    """Eight devices here, two there; the last stage, from its checkpoint."""
    said = []
    found = replay(straight, 21, 2, say=said.append)
    assert all(step.batch and step.apart < 1e-4 for step in found), found
    assert any(not step.bits and step.differing for step in found)
    found = [step._replace(bits=False) for step in found]  # one may have the same by chance
    assert "on other devices; at most" in verdict(straight, found)
    for other in ({"batch": False}, {"apart": 0.01}):
        with pytest.raises(NumericsError, match="the first that differs is step 22"):
            verdict(straight, [found[0]._replace(bits=True), found[1]._replace(**other)])


def test_other_processes_are_other_devices(tiny_run, monkeypatch):
    """What two processes have added up is no forgery where one adds it up in another order."""
    assert rerun.same_devices(tiny_run, 5)
    monkeypatch.setattr(cluster, "count", lambda: 2)
    assert not rerun.same_devices(tiny_run, 5)


def test_a_later_decision_changes_no_earlier_step(straight, tmp_path):
    """The journal, and with it the learning rate's length, as they were when the step was made."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    entry = decide(read_epochs(workdir), [], kind="skip", ranges=[(21 * 8, 22 * 8)], at_step=21, by="me", why="a test")
    append_entry(workdir / "journal.jsonl", entry)
    assert replay(workdir, 21, 1, say=lambda line: None) == replay(straight, 21, 1, say=lambda line: None)


def test_steps_that_were_not_made_are_refused(straight):
    for first, count in ((26, 1), (25, 2), (0, 1), (5, 0)):
        with pytest.raises(ConfigError, match=f"--step={first} --steps={count}: the ledger of .* has no step"):
            replay(straight, first, count)
