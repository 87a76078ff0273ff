"""Which process of how many this is: the environment's word, what JAX finds out of a cluster, and leftovers of one."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jax._src.clusters.cloud_tpu_cluster as tpu
import pytest
from faults import runs

from k2jax.errors import ConfigError
from k2jax.parallel import place

SLURM = {"SLURM_JOB_ID": "123", "SLURM_STEP_NODELIST": "node[01-04]", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
VARIABLES = (*place.SETTINGS, *SLURM, "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_one_process():
    assert place.find_place(1) is None
    alone = place.alone()
    assert (alone.count, alone.index, alone.address.split(":")[0]) == (1, 0, "127.0.0.1")


@pytest.mark.parametrize(
    "left",
    [
        {"SLURM_JOB_ID": "123"},
        {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4"},
        {"TPU_WORKER_ID": "0"},
        {"OMPI_MCA_btl": "tcp"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {"JAX_NUM_PROCESSES": "1", **SLURM, "SLURM_NTASKS": "4"},
    ],
)
def test_what_a_job_left_in_a_shell_is_no_cluster(left: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert place.find_place(1) is None


def test_a_step_of_slurm(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    found = place.find_place(1)
    assert (found.count, found.index) == (4, 2) and found.address.startswith("node01:") and "slurm" in found.found_by


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "one below it"),
        ({"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "HOST:PORT"),
        ({**SLURM, "SLURM_NTASKS": "many"}, "its place there cannot be told"),
    ],
)
def test_what_is_set_in_part_is_refused(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        place.find_place(1)


class Metadata(BaseHTTPRequestHandler):
    """As Google's metadata server answers on host 3 of a pod slice of 4."""

    ANSWERS = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:b:127.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3,a:b:10.0.0.4",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\nWORKER_ID: '3'",
    }

    def do_GET(self) -> None:
        answer = self.ANSWERS.get(self.path.rpartition("/")[2])
        self.send_response(200 if answer else 404)
        self.end_headers()
        self.wfile.write((answer or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    yield
    server.shutdown()


def test_a_host_of_a_tpu_pod_asks_the_metadata_server(metadata_server, monkeypatch: pytest.MonkeyPatch):
    """No variable of the environment says that there are others. A proxy, if there is one, is not asked."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    place.bypass_proxies("metadata.google.internal")
    found = place.find_place(1)
    assert found == place.Place("127.0.0.1:8482", 4, 3, None, "the cluster (gcetpu)", False)


def test_names_of_hosts_are_added_to_those_that_need_no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("no_grpc_proxy", "example.org")
    place.bypass_proxies("node01")
    place.bypass_proxies("node01")
    assert place.os.environ["no_proxy"] == place.os.environ["no_grpc_proxy"] == "example.org,127.0.0.1,localhost,node01"


# ---- real processes --------------------------------------------------------------------------------------------------


def test_proxies_are_not_asked_for_what_is_here(tiny_data, tmp_path):
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    proxies |= {"no_proxy": "", "NO_PROXY": "", "SLURM_JOB_ID": "7", "TPU_WORKER_ID": "0", "OMPI_MCA_btl": "tcp"}
    with runs.trainers(tiny_data) as start:
        start(tmp_path / "run", environment=proxies).wait_for("saved 10")


@pytest.mark.fault("E5")
@pytest.mark.processes
def test_others_that_do_not_come_are_one_line_after_a_while(tiny_data, tmp_path):
    with runs.trainers(tiny_data) as start:
        for index in ("0", "1"):
            told = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
            if index == "0":
                with runs.socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    told["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
            patch = "from k2jax.parallel import cluster; cluster.START_S = 3"
            waiting = start(tmp_path / f"run{index}", environment=told, patch=patch)
            code = waiting.process.wait(60)
            assert code == 70, waiting.told()
            assert f"process {index} of 2" in waiting.told() and "did not come together in 3 s" in waiting.told()


THREADS = """
import os
from k2jax.parallel import cluster
cluster.initialize()
import jax, jax.numpy as jnp
jnp.ones(8).sum().block_until_ready()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux tells them")
def test_virtual_devices_have_threads_to_wait_in():
    """With as many as devices a few collectives, begun in other orders on each, waited for one another for ever."""
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    told = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert int(told.stdout.split()[-1]) >= 64
