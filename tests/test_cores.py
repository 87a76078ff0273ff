"""The number of cores is what this process may use, by affinity and by every cgroup that it is in."""

import os
import subprocess
import sys

import pytest

from k2jax.prepare.engine import cores

FOUR = frozenset(range(4))
CASES = {  # /proc/self/cgroup, files below /sys/fs/cgroup, cores of four
    "none": ("", {}, 4),
    "v2, at the top as in a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
    "v2, less than one": ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
    "v2, no limit": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 4),
    "v2, more than there are": ("0::/a\n", {"a/cpu.max": "900000 100000\n"}, 4),
    "v2, in the one around it": ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
    "v2, the host's path": ("0::/docker/x\n", {"cpu.max": "200000 100000\n"}, 2),
    "v1": (
        "3:cpuset:/\n2:cpu,cpuacct:/a\n0::/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 2,
    ),
    "v1, no limit": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    "both, as systemd's hybrid": (
        "4:cpu:/a\n0::/b\n",
        {"unified/b/cgroup.procs": "", "cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "50000"}, 2,
    ),
    "a name with a colon": ("1:name=systemd:/a:b\n0::/a:b\n", {"a:b/cpu.max": "200000 100000"}, 2),
    "nonsense": ("0::/\n", {"cpu.max": "many\n"}, 4),
    "a period of none": ("0::/\n", {"cpu.max": "100000 0\n"}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cores_of_a_cgroup(name, tmp_path, monkeypatch):
    groups, files, expected = CASES[name]
    for place, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{key}": files[key] for key in files}}.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: FOUR)
    assert cores.cores() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_cores_of_this_machine_are_those_that_the_process_may_run_on():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from k2jax.prepare.engine.cores import cores\n"
    ran = subprocess.run([sys.executable, "-c", code + "print(cores())"], capture_output=True, text=True, check=True)
    assert ran.stdout == "1\n" and 1 <= cores.cores() <= len(os.sched_getaffinity(0))


def test_cores_where_there_are_no_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.cores() == 1
