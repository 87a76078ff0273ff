"""What is not released: each case is one clear line, and nothing is written."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from release_runs import copy_of, rolled_back

from k2jax.data.launches import read_launches, write_launches
from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.release.build import Options, plan, release

SMALL = Options("last", False, "none", "digests")


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    return copy_of(tiny_run, tmp_path / "run")


def refused(workdir: Path, kind: type[RunError], says: str, **more: object) -> str:
    """The one line; and nothing is there but the run."""
    before = {path.name for path in workdir.parent.iterdir()}
    with pytest.raises(kind) as error:
        release(workdir, workdir.parent / "out", more.pop("options", SMALL), **more)
    line = str(error.value)
    assert "\n" not in line and re.search(says, line), line
    assert {path.name for path in workdir.parent.iterdir()} == before
    return line


def link(run: Path) -> None:
    folder = run / "checkpoints" / "25" / "params"
    shutil.move(folder, run.parent / "elsewhere")
    folder.symlink_to(run.parent / "elsewhere")


def link_out(run: Path) -> None:
    (run / "validation.json").unlink()
    (run / "validation.json").symlink_to("/etc/passwd")


def pipe(run: Path) -> None:
    (run / "evals" / "25").mkdir(parents=True)
    os.mkfifo(run / "evals" / "25" / "x.json")


def pipe_for_a_journal(run: Path) -> None:
    os.mkfifo(run / "journal.jsonl")


def strange_name(run: Path) -> None:
    (run / "evals").mkdir(exist_ok=True)
    (run / "evals" / "a\nb").write_text("x")


def backslash(run: Path) -> None:
    (run / "spikes").mkdir(exist_ok=True)
    (run / "spikes" / "..\\x").write_text("x")


def no_metrics(run: Path) -> None:
    (run / "metrics" / "chunk-00002.jsonl").unlink()


def no_rows(run: Path) -> None:
    (run / "ledger" / "chunk-00002.jsonl").unlink()


def edited_loss(run: Path) -> None:
    path = run / "ledger" / "chunk-00001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["loss"] = "3f800000"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "20")
    shutil.copytree(run / "checkpoints" / "25", run / "checkpoints" / "20")


def torn_meta(run: Path) -> None:
    path = run / "checkpoints" / "25" / "meta" / "meta.json"
    path.write_bytes(path.read_bytes()[:100])


def nothing_saved(run: Path) -> None:
    (run / "ledger" / "records.jsonl").unlink()


def no_epochs(run: Path) -> None:
    shutil.rmtree(run / "epochs")


def no_last(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "25")


def late_prediction(run: Path) -> None:
    (run / "prediction.json").write_text('{"loss": {"final": 1.0}}')


def torn_evaluation(run: Path) -> None:
    (run / "evals" / "25").mkdir(parents=True)
    (run / "evals" / "25" / "gsm8k-0123456789ab.json").write_text('{"task": "gsm8k", ')


def no_launch(run: Path) -> None:
    (run / "environment.json").unlink()


def secret(run: Path) -> None:
    launches = read_launches(run)
    launches[0]["stores"] = {"x": "https://me:hunter2@host/x"}
    write_launches(run, launches)


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (link, ConfigError, r"params is a link: .*put the file itself there"),
        (link_out, ConfigError, r"validation\.json is a link"),
        (pipe, ConfigError, r"x\.json is a device, pipe or socket"),
        (pipe_for_a_journal, ConfigError, r"journal\.jsonl is a device, pipe or socket"),
        (strange_name, ConfigError, r"a name with control characters"),
        (backslash, ConfigError, r"a name with control characters, backslashes"),
        (no_metrics, ConfigError, r"metrics/ lacks chunk-00002\.jsonl"),
        (no_rows, StorageError, r"of steps 11 to 20 there are 0 rows, missing"),
        (edited_loss, StorageError, r"the record of step 10 does not hold: steps"),
        (other_checkpoint, StorageError, r"checkpoint 20 of .* is not the one that the ledger records"),
        (torn_meta, StorageError, r"checkpoint 25: meta/meta\.json is no JSON"),
        (nothing_saved, ConfigError, r"nothing was saved yet"),
        (no_epochs, ConfigError, r"no run, there is no epochs/0001\.json in it"),
        (no_last, ConfigError, r"--checkpoints=last: none of those is on the storage: .* of steps 10, 20"),
        (late_prediction, ConfigError, r"its digest is not in the journal"),
        (torn_evaluation, StorageError, r"gsm8k-0123456789ab\.json is damaged"),
        (no_launch, ConfigError, r"no environment\.json says on what it ran"),
        (secret, ConfigError, r"environment\.json holds credentials in a URL"),
    ],
)
def test_a_run_that_is_not_whole(run, spoil, kind, says):
    spoil(run)
    assert "hunter2" not in refused(run, kind, says)


@pytest.mark.parametrize("part", ["params", "moments"])
def test_a_damaged_array_is_found_before_it_is_handed_over(run, part):
    """A bit in the data, which Orbax restores in silence or TensorStore refuses."""
    largest = max((run / "checkpoints" / "25" / part).rglob("d/*"), key=lambda path: path.stat().st_size)
    good, times = largest.read_bytes(), largest.stat()
    data = bytearray(good)
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    os.utime(largest, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StorageError, match=r"checkpoint 25: array \S+ (cannot be read|is damaged)") as error:
        release(run, run.parent / "out", SMALL._replace(optimizer_state=True))
    assert "\n" not in str(error.value) and not (run.parent / "out").exists()
    if part == "moments":
        release(run, run.parent / "without", SMALL)
    largest.write_bytes(good)  # from a copy, with its old time
    os.utime(largest, ns=(times.st_atime_ns, times.st_mtime_ns))
    release(run, run.parent / "out", SMALL._replace(optimizer_state=True))


def test_a_branch_half_there(tiny_run, tmp_path):
    workdir = rolled_back(tiny_run, tmp_path / "run")
    (workdir / "branches" / "01" / "branch.json").unlink()
    refused(workdir, ConfigError, r"its journal names branch 1, and .*01 is not there or not complete")
    shutil.rmtree(workdir / "branches")
    refused(workdir, ConfigError, r"its journal names branch 1")


def test_a_run_at_work(run):
    with (run / "lock").open("r+") as held:
        held.write("host a, pid 7")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(run, ConfigError, r"is at work \(host a, pid 7")
    release(run, run.parent / "out", SMALL)


def test_a_run_that_changes_meanwhile(run, monkeypatch):
    def tell(*_):
        (run / "evals").mkdir(exist_ok=True)
        (run / "evals" / "new.json").write_text("{}")

    monkeypatch.setattr("k2jax.release.build._tell", tell)
    with pytest.raises(StorageError, match=r"has changed while it was released \(run/evals/new\.json\)"):
        release(run, run.parent / "out", SMALL)
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SMALL._replace(checkpoints="every:0"), r"--checkpoints=every:0: expected last, all, every:N or none"),
        (SMALL._replace(checkpoints="../x"), r"--checkpoints=\.\./x: expected"),
        (SMALL._replace(exports="10"), r"--exports=10: expected"),
    ],
)
def test_options_that_mean_nothing(run, options, says):
    refused(run, ConfigError, says, options=options)


def test_places_that_are_taken(run, tiny_run):
    for out, says in [
        (run / "release", "lies in --workdir"),
        (run, "there and not empty|lies in"),
        (run.parent, "holds --workdir"),
        (run / "tokenizer.json", "lies in --workdir"),
    ]:
        with pytest.raises(ConfigError, match=says):
            release(run, out, SMALL)
    out = run.parent / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is there and not empty"):
        release(run, out, SMALL)
    (run.parent / "linked").symlink_to(run.parent / "nowhere")
    with pytest.raises(ConfigError, match="is there and not empty"):
        release(run, run.parent / "linked", SMALL)
    (run.parent / "new.partial").mkdir()
    (run.parent / "new.partial" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="holds files that are no release of ours"):
        release(run, run.parent / "new", SMALL)
    assert (run.parent / "new.partial" / "mine").read_text() == "x"


def test_another_release_is_not_mixed_in(run, monkeypatch):
    monkeypatch.setattr("k2jax.release.build._tell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        release(run, run.parent / "out", SMALL)
    with pytest.raises(ConfigError, match=r'is the beginning of another release: its data is "digests", this one\'s'):
        release(run, run.parent / "out", SMALL._replace(data="tokens"))


def test_one_process_at_a_time(run):
    (run.parent / "out.partial").mkdir()
    with (run.parent / "out.partial" / "lock").open("w") as held:
        held.write("host b, pid 8")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(run, ConfigError, r"another process \(host b, pid 8\) is making it")


@pytest.mark.parametrize("text", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_is_none(run, text):
    (run.parent / "key").write_bytes(text)
    assert "AAAA" not in refused(run, ConfigError, "--sign-key=.*: no key to sign with", sign_key=run.parent / "key")


def test_a_key_that_is_not_there(run):
    refused(run, ConfigError, "no key to sign with .No such file", sign_key=run.parent / "nokey")


def test_sizes_come_first_and_write_nothing(run):
    command = [sys.executable, "tools/release.py", "--workdir", str(run), "--out", str(run.parent / "out")]
    before = sorted(path.name for path in run.parent.iterdir())
    said = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "--dry-run", "--json"], cwd=REPOSITORY, **said)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert sorted(path.name for path in run.parent.iterdir()) == before
    planned = plan(run, Options())
    assert said["bytes"] == planned.sizes and said["all"] == sum(planned.sizes.values())
    release(run, run.parent / "out", Options())
    checkpoints = [p for p in (run.parent / "out" / "run" / "checkpoints").rglob("*") if p.is_file()]
    found = sum(path.stat().st_size for path in checkpoints if path.name != "thinned.json")
    assert found == planned.sizes["checkpoints"]
