"""tools/bench/gpu_suite.py, tiny and on the CPU: that it runs to its end, and that it says so where something fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax.errors import RunError

BENCH = REPOSITORY / "tools" / "bench"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_suite

    return gpu_suite


def test_every_section_runs_and_its_figures_are_in_the_table_and_the_json(tmp_path: Path):
    out = tmp_path / "suite.json"
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "--smoke", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["device"] == "cpu" and list(result["sections"]) == [
        "numerics", "attention", "train", "checkpoint", "loader",
    ]  # fmt: skip
    rows = {name: [r for r in section["rows"] if "jax" not in r] for name, section in result["sections"].items()}
    assert [row["ok"] for row in rows["numerics"]] == [True, True] and all(row["repeats"] for row in rows["numerics"])
    assert {row["attention"] for row in rows["attention"]} == {"flash", "jnp"}
    assert [row.get("batches") for row in rows["train"]] == [None, "loader"]
    assert all(row["tokens_per_s"] > 0 for row in rows["train"])
    assert rows["checkpoint"][0]["stall_s"] > 0 and rows["loader"][0]["loader_tokens_per_s"] > 0
    for word in ("tokens_per_s", "both_tflop_s", str(rows["loader"][0]["loader_tokens_per_s"])):
        assert word in done.stdout


def test_a_section_that_fails_is_named_and_the_others_run(suite, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setitem(suite.BENCH, "loader", ([], ["--no-such-option"]))
    monkeypatch.setitem(suite.BENCH, "checkpoint", ([], ["--help"]))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--smoke", "--sections", "loader", "checkpoint"])
    with pytest.raises(RunError, match="^failed: loader; the others are good"):
        suite.main()
    sections = json.loads((tmp_path / "gpu_suite.json").read_text())["sections"]
    assert "unrecognized arguments: --no-such-option" in sections["loader"]["error"]
    assert sections["checkpoint"]["error"] is None and "checkpoint: done" in capsys.readouterr().out


def test_a_section_that_takes_too_long_is_ended(suite, monkeypatch):
    monkeypatch.setitem(suite.LIMITS_S, "loader", 0.05)
    assert suite.run_section("loader", smoke=True)["error"] == "took more than 0.05 s"


def test_wrong_numbers_fail_the_numerics(suite, monkeypatch, capsys):
    """Here because no error is small enough; a section that raises at once fails in the same way."""
    monkeypatch.setitem(suite.ERROR_LIMITS, "bfloat16", 0.0)
    with pytest.raises(SystemExit) as ended:
        suite.work("numerics", smoke=True)
    assert ended.value.code
    _, wrong, right = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (wrong["dtype"], wrong["ok"]) == ("bfloat16", False) and right["ok"]


def test_what_raises_is_a_row_that_failed(suite):
    def no_memory():
        raise MemoryError("out of it")

    assert suite.tried({"a": 1}, no_memory) == {"a": 1, "ok": False, "error": "MemoryError: out of it"}
