"""Preflight of one process; faults/test_preflight.py has those of two that differ."""

import json
import re
import sys
from pathlib import Path

import pytest

from k2jax import preflight
from k2jax.config import settled
from k2jax.errors import run_main
from k2jax.launch import checks, measure
from k2jax.launch.checks import Options, run_checks
from k2jax.launch.survey import Answer, Check, odd
from k2jax.parallel import cluster
from k2jax.run import drift

CHECKS = ["versions", "devices", "clocks", "storage", "disk", "all-reduce", "memory", "loader"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.fixture
def run(tiny_data, tmp_path, monkeypatch, capsys):
    """`run(*arguments)`: (exit code, stdout, stderr) for the tiny experiment."""

    def command(*arguments: str) -> tuple[int, str, str]:
        quick = ["--disk-mb=1", "--loader-seconds=0.1", "--clock-limit=1"]
        given = [f"--config={tiny_data / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", *quick, *arguments]
        monkeypatch.setattr(sys, "argv", ["k2jax.preflight", *given])
        code = 0
        try:
            run_main(preflight.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return command


def test_all_is_well(run, tiny_config, tmp_path):
    digest = drift.config_digest(settled(tiny_config(), "cpu"))  # as launched
    code, out, error = run("--topology=cpu:1x8", f"--config-digest={digest}", "--step-seconds=10")
    assert (code, error) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["ok", name] for name in CHECKS]
    assert "8 cpu, 8 on each of 1 process(es)" in out and "exact over 8 device(s)" in out and "26 are needed" in out
    assert list((tmp_path / "run").iterdir()) == []


def test_json_says_the_same(run):
    code, out, _ = run("--json", "--config.data.root=/nowhere")
    told = json.loads(out)
    assert code == 78 and not told["ok"] and [check["name"] for check in told["checks"]] == CHECKS
    assert [check["name"] for check in told["checks"] if not check["ok"]] == ["loader"]
    assert told["checks"][1]["values"] == {"kind": "cpu", "devices": 8, "processes": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--topology=cpu:1x4"], 78, "devices: .*has 8 device.s., cpu:1x4 in 1 process.es. has 4"),
        (["--topology=h100:8"], 78, "devices: .*has cpu, h100:8 is NVIDIA H100"),
        (["--config.mesh.fsdp=3"], 78, "devices: .*does not multiply to the 8 device"),
        (["--config-digest=" + "0" * 64], 78, "versions: .*has configuration .{12}, launched was 000000000000"),
        (["--lock-digest=" + "0" * 64], 78, "versions: .*has requirements.lock .{12}, launched was"),
        (["--code-digest=" + "0" * 64], 78, "versions: .*has code .{12}, launched was"),
        (["--step-seconds=1e-9"], 78, "loader: .*tokens/s, a step of 1e-09 s needs"),
        (["--config.data.root=/nowhere"], 78, "loader: .*/nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_with_host_and_check(run, arguments, code, message):
    found, out, error = run(*arguments)
    [line] = error.splitlines()
    assert found == code and line.startswith("error: preflight: ") and "(process 0): " in line
    assert re.search(message, line), line
    assert len([line for line in out.splitlines() if line.startswith("WRONG")]) == 1


def test_storage_that_fails_is_74(run, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(measure.os, "statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 4096}))
    found, out, error = run()
    assert found == 74 and "two checkpoints take" in error


def test_a_wrong_sum_and_a_wrong_device_are_seen(tiny_config, tmp_path, monkeypatch):
    """What preflight computes on the devices is compared with what numpy has."""
    right = measure.reduce_over_devices()
    assert right["sum_is_right"] and right["wrong_devices"] == []
    make = measure.jax.make_array_from_callback

    def damaged(shape: tuple[int, ...], sharding: object, part: object) -> object:
        def flipped(index: tuple[slice, ...]) -> object:
            rows = part(index).copy()
            if index[0].start == 3:
                rows[0, 5] ^= 1
            return rows

        return make(shape, sharding, flipped)

    monkeypatch.setattr(measure.jax, "make_array_from_callback", damaged)
    wrong = measure.reduce_over_devices()
    assert not wrong["sum_is_right"] and wrong["wrong_devices"] == [3]
    check = Check("all-reduce")
    checks.all_reduce(check, tiny_config(), Options(Path(tmp_path)))
    assert not check.ok and "wrong integers from device(s) [3]" in check.lines()[0] or "sum" in check.lines()[0]


def test_a_collective_that_hangs_is_a_line(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "reduce_over_devices", lambda: checks.time.sleep(30))
    check = Check("all-reduce")
    checks.all_reduce(check, tiny_config(), Options(Path(tmp_path), collective_limit_s=0.1))
    assert "did not end in 0.1 s" in check.lines()[0]


def test_memory_that_does_not_suffice(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "host_memory", lambda: 1000)
    [check] = [c for c in run_checks(tiny_config(), quick(tmp_path), lambda _: None) if not c.ok]
    assert check.name == "memory" and "a save copies" in check.lines()[0]


def quick(workdir: Path) -> Options:
    return Options(workdir, disk_bytes=1000, loader_s=0.01)


def test_of_many_the_odd_ones_are_named():
    answers = [Answer(f"h{i}", {"v": 1 if i in (0, 5) else 2}, 0, "") for i in range(8)]
    usual, others = odd(answers, lambda value: value["v"])
    assert usual == 2 and [answer.who for answer in others] == ["h0", "h5"]
    usual, others = odd(answers[:1] + answers[1:2], lambda value: value["v"])
    assert usual == 1 and [answer.who for answer in others] == ["h1"], "of two, process 0 is right"
    check = Check("x")
    check.blame([Answer(f"h{i}", None, 0, "") for i in range(10)], "is wrong")
    assert check.lines() == ["h0, h1, h2, h3, h4, h5, h6, h7 and 2 more: is wrong"]
