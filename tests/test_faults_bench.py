"""tools/bench/faults.py, few cases of each kind: that it runs to its end, and that it sees what is wrong."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax.errors import ConfigError

BENCH = REPOSITORY / "tools" / "bench" / "faults.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; `faults` is the name of a package of tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    spec = importlib.util.spec_from_file_location("bench_faults", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_flip_is_named_or_harmless_or_wrong(bench, tmp_path: Path):
    """Another answer, a bug's error, and an error of several lines are wrong, whatever else was refused."""
    path, named = tmp_path / "x.json", ConfigError("x.json is damaged")
    for found, outcome in [
        (["1", "2"], "same answers"), (["1", named], "named"), ([named, "3"], "wrong"), (["3", "2"], "wrong"),
        (["1", KeyError("x")], "wrong"), ([named, ConfigError("two\nlines")], "wrong"),
    ]:  # fmt: skip
        assert bench.judge(found, ["1", "2"], path, 8)[0] == outcome, found
    path.write_bytes(b"\x00\x00")
    bench.flip(path, 11)
    assert path.read_bytes() == b"\x00\x08"


def test_the_table_counts_by_fault_and_file(bench):
    rows = [("kill", "", "same bits"), ("kill", "", "wrong"), ("flip", "meta", "named"), ("flip", "meta", "named")]
    table = bench.markdown([dict(zip(("fault", "in", "outcome"), row, strict=True)) for row in rows])
    assert table.splitlines()[2:] == [
        "| SIGKILL at a random moment | 2 | same bits 1, wrong 1 |", "| a bit flipped: meta | 2 | named 2 |",
    ]  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("sections", ["kill,flip", pytest.param("disk,two", marks=pytest.mark.slow)])
def test_each_section_runs(bench, tmp_path: Path, sections: str):
    command = [sys.executable, str(BENCH), f"--only={sections}", "--seed=3"]
    command += ["--kills=1", "--flips=1", "--disks=1", "--twos=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows, done.stderr)
    if "flip" in sections:
        assert [row["fault"] for row in rows] == ["kill", *["flip"] * len(bench.KINDS)]
        assert {row["in"] for row in rows} == {"", *bench.KINDS}
    else:
        assert [row["fault"] for row in rows] == ["disk", "two"]
