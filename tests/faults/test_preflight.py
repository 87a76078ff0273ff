"""Preflight of two real processes of which one is not like the other: each is told, and named, by both."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.processes
# Of sitecustomize.py, which Python runs before anything else.
OTHER_VERSION = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.9.9" if name == "optax" else version(name)
"""
CLOCK_AHEAD = "import time\nnow = time.time\ntime.time = lambda: now() + 30\n"
# Another's integers on their way: what this process contributes is not what it should be.
WRONG_DEVICE = """
import jax
make = jax.make_array_from_callback
jax.make_array_from_callback = lambda shape, sharding, part: make(shape, sharding, lambda i: part(i) + 1)
"""


@pytest.fixture
def pair(tiny_data, tmp_path) -> Iterator[Callable[..., list[tuple[int, str, str]]]]:
    """`pair(arguments of each, sitecustomize of the second, its devices)`: (exit code, stdout, stderr) of both."""

    def run(
        *arguments: str,
        each: tuple[list[str], list[str]] = ([], []),
        custom: str = "",
        devices: tuple[int, int] = (1, 1),
        workdirs: tuple[str, str] = ("run", "run"),
    ) -> list[tuple[int, str, str]]:
        (tmp_path / "custom").mkdir()
        (tmp_path / "custom" / "sitecustomize.py").write_text(custom)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for i in (0, 1):
            python_path = f"{tmp_path / 'custom'}:{REPOSITORY}" if i else str(REPOSITORY)
            environment = {
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices[i]}",
                "PYTHONPATH": python_path,
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "k2jax.preflight", f"--config={tiny_data / 'tiny.py'}",
                 f"--workdir={tmp_path / workdirs[i]}", "--disk-mb=1", "--loader-seconds=0.1", "--wait=3",
                 *arguments, *each[i]],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        ended = []
        for process in started:
            out, error = process.communicate(timeout=100)
            lines = [line for line in error.splitlines() if not re.match(r"[IWE]\d{4} |\[Gloo\]", line)]
            ended.append((process.returncode, out, "\n".join(lines)))
        return ended

    with ExitStack() as stack:
        yield run


def wrong(ended: list[tuple[int, str, str]], code: int, check: str) -> str:
    """Both end with the code and the same line; of the report, which process 0 prints, that check alone is wrong."""
    (first, out, error), (second, silent, other_error) = ended
    assert (first, second) == (code, code), ended
    assert error == other_error and error.startswith(f"error: preflight: {check}: "), ended
    assert re.findall(r"^WRONG (\S+)", out, re.M) == [check] and not re.search("^(ok|WRONG)", silent, re.M), ended
    return error


HOST = re.escape(socket.gethostname())


def test_two_that_are_alike(pair, tmp_path):
    ended = pair("--topology=cpu:2x1", "--step-seconds=5")
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert re.findall(r"^(ok|WRONG)", ended[0][1], re.M) == ["ok"] * 8 and [error for _, _, error in ended] == ["", ""]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.fault("E4")
def test_another_version(pair):
    error = wrong(pair(custom=OTHER_VERSION), 78, "versions")
    assert re.search(rf": {HOST} \(process 1\): has optax 0\.9\.9, others have \d", error)


def test_another_configuration(pair):
    """A key that steers when something is saved differs, which no digest of what is computed shows."""
    error = wrong(pair(each=([], ["--config.checkpoint.every_steps=3"])), 78, "versions")
    assert re.search(rf": {HOST} \(process 1\): has all keys of the configuration \w+, others have", error)


def test_a_workdir_that_is_not_shared(pair):
    error = wrong(pair(workdirs=("run", "other")), 78, "storage")
    what = r"does not see what process 0 wrote in --workdir=\S+/other in 3 s: it is not one folder"
    assert re.search(rf": {HOST} \(process 1\): {what}", error)


def test_a_wrong_number_of_devices(pair):
    error = wrong(pair("--topology=cpu:2x2", devices=(2, 1)), 78, "devices")
    assert re.search(rf": {HOST} \(process 1\): has 1 device\(s\), cpu:2x2 in 2 process\(es\) has 2", error)


def test_a_clock_that_is_ahead(pair):
    error = wrong(pair(custom=CLOCK_AHEAD), 78, "clocks")
    assert re.search(rf": {HOST} \(process 1\): its clock is (29|30)\.\d s ahead of the others'", error)


def test_a_device_that_sends_other_numbers(pair):
    error = wrong(pair(custom=WRONG_DEVICE), 70, "all-reduce")
    assert "its sum over all devices is wrong" in error


def test_a_host_that_cannot_open_the_data(pair):
    (first, out, error), (second, *_) = pair(each=([], ["--config.data.root=/nowhere"]))
    assert (first, second) == (78, 78) and re.findall(r"^WRONG (\S+)", out, re.M) == ["versions", "loader"]
    assert re.search(rf"; loader: {HOST} \(process 1\): data.root=/nowhere: no store lies there", error)
