"""Runs in buckets: trained, killed and resumed on real servers, and read from there by every reader."""

import json
import signal
import subprocess
import sys

import buckets
import pytest
from conftest import REPOSITORY

from faults import runs
from k2jax import bucket
from k2jax.bucket import at
from k2jax.run.bucket_steps import committed_steps


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request):
    with buckets.serving(request.param) as server:
        bucket.forget()
        yield server
    bucket.forget()


def test_kill_and_resume(server, tiny_data, straight, start, tmp_path):
    """Ledger, chain and digests are those of an undisturbed run on a disk, whatever the server does meanwhile."""
    url = f"{server.bucket()}/runs/tiny #1"
    killed = start(tmp_path / "a", url=url, environment=runs.READ_ONLY_CACHE)
    killed.wait_for("saved 10")
    killed.signal(signal.SIGKILL)
    killed.wait(-signal.SIGKILL)
    server.fail(503, every=40)
    told = start(tmp_path / "b", url=url).wait(0)
    server.heal()
    print(told)
    assert committed_steps(at(url)) == [10, 20, 25]
