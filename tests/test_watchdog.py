"""A process that is at one thing for too long says where it stands, and ends; time in which it was stopped is none."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

PROGRAM = """
import sys, time
from k2jax.errors import run_main
from k2jax.parallel import watchdog
watchdog.TICK_S = 0.05
def stuck_here():
    {stuck}
def main():
    with watchdog.Watchdog({{"start": 0, "step": 1.0, "save": 0}}) as dog:
        for _ in range(8):
            dog.at("step"); time.sleep(0.25)
        dog.at("save"); time.sleep(1.5)
        print("all was well", flush=True)
        dog.at("step")
        stuck_here()
    time.sleep(1.5)
    print("over", flush=True)
run_main(main)
"""


def run(stuck, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(stuck=stuck)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **options,
    )  # fmt: skip


@pytest.mark.fault("E2", "E3")
def test_what_is_stuck_is_named_with_its_stack():
    """Not before its limit, which each thing has anew; not where there is none.

    Seen red without the limit; without a time of its own for each thing.
    """
    out, errors = (process := run("time.sleep(1000)")).communicate(timeout=60)
    assert process.returncode == 70 and out == "all was well\n", errors
    assert "in stuck_here" in errors
    assert errors.splitlines()[-1].startswith("error: process 0 was at 'step' for more than 1 s (watchdog.step; above:")


@pytest.mark.fault("E3")
def test_time_in_which_the_process_was_stopped_does_not_count():
    """Seen red without the most that a tick counts."""
    process = run("[time.sleep(0.05) for _ in range(8)]")  # so that it goes on for a while after the stop
    assert process.stdout.readline() == "all was well\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "over\n", errors
