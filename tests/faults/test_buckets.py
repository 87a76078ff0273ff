"""Runs in buckets: trained, killed and resumed on real servers, and read from there by every reader."""

import faulthandler
import json
import os
import random
import re
import runpy
import signal
import sys
import time

import pytest
from conftest import REPOSITORY, serve

from faults import runs
from faults.test_ladder import PLAIN, QUICK, spiky
from k2jax import evaluate, generate, replay
from k2jax.bucket import at
from k2jax.errors import run_main
from k2jax.parallel import cluster
from k2jax.plan.predict import predict
from k2jax.run.bucket_steps import committed_steps
from k2jax.run.costs import costs
from k2jax.run.ledger import Ledger
from k2jax.run.prediction import outcome, write_prediction
from k2jax.run.saved import open_step
from k2jax.upload import local_copy

SHORT_LEASE = "from k2jax import lease; lease.LEASE_S, lease.RENEW_S = 3.0, 0.3"


by_kind = ["s3", pytest.param("gs", marks=pytest.mark.slow)]
server = pytest.fixture(scope="module", params=by_kind, name="server")(serve)


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(program, *arguments)`: what it prints; its exit code is 0."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "true")  # a tool sets it: the old value comes back

    monkeypatch.setattr(cluster, "initialize", lambda: None)  # JAX is at work here already

    def run(program: object, *arguments: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(program), *arguments])
        code = 0
        try:
            if isinstance(program, str):
                monkeypatch.syspath_prepend((REPOSITORY / program).parent)
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            else:
                run_main(program.main)
        except SystemExit as end:
            code = end.code or 0
        out, error = capsys.readouterr()
        assert code == 0, (code, out, error)
        return out

    return run


def same_as(straight, url: str) -> None:
    """The run at a URL is that one on a disk: rows, chain, digests, and nothing half-written is left."""
    with local_copy(at(url)) as copy:
        assert runs.ledger_rows(copy) == runs.ledger_rows(straight)
        assert runs.metric_rows(copy) == runs.metric_rows(straight)
        runs.ledger(copy).verify()
        assert runs.meta(copy, 25)["digests"] == runs.meta(straight, 25)["digests"]
        assert (copy / "validation.json").exists()
    left = {key.split("/")[0] for key in at(url).keys()}
    assert left.isdisjoint({"lock", "saving", "abandoned"}), left


@pytest.mark.processes
def test_kill_and_resume(server, straight, start, tiny_config, tmp_path):
    """Ledger, metrics and digests are those of an undisturbed run on a disk, whatever the server does meanwhile."""
    url, overrides = f"{server.bucket()}/runs/tiny #1", {"log.tensorboard": True}
    write_prediction(at(url), predict(tiny_config(), law="besiroglu2024"))
    killed = start(tmp_path / "run", overrides, url=url, environment=runs.READ_ONLY_CACHE)
    killed.wait_for("saved 10")
    killed.signal(signal.SIGKILL)
    killed.wait(-signal.SIGKILL)
    assert committed_steps(at(url)) == [10] and (at(url) / "lock").exists()
    server.fail(503, every=40)
    told = start(tmp_path / "run", overrides, url=url).wait(0)
    assert server.counted()["failed"] > 1
    server.heal()
    assert "resuming after step 10 of 25" in told
    assert committed_steps(at(url)) == [10, 20, 25]
    assert len((at(url) / "tensorboard").keys()) == 2  # a launch has one
    assert (outcome(at(url))["steps"], costs(at(url))[0].value) == (25, 25)
    same_as(straight, url)


@pytest.mark.processes
def test_every_reader_takes_the_url(server, tiny_data, command, run, tmp_path):
    """What they say of a run in a bucket is what they say of the same run on a disk."""
    url, out, here = f"{server.bucket()}/runs/tiny #1", f"{server.bucket()}/out", tmp_path / "run"
    for place in (url, here):
        ended = command.train(tiny_data, place)
        assert ended.code == 0, ended
    where_they_are = [f"--workdir={here}", f"--workdir={url}"]

    def same(program: object, *arguments: str) -> str:
        here, there = (run(program, place, *arguments) for place in where_they_are)
        assert there == here, program
        return there

    rows = same("tools/which_docs.py", "--step=7", "--json").splitlines()
    document = json.loads(rows[0])["documents"][0]["id"]
    assert "step" in same("tools/which_steps.py", f"--doc={document}")
    same(generate, "--prompt=the", "--max-new-tokens=4", "--json", "--step=20")
    defer = ("--defer=24:25", "--steps", "--at-step=20", "--why=a test")
    replayed = json.loads(run(replay, where_they_are[1], "--step=12", "--json").splitlines()[-1])
    assert replayed["step"] == 12 and replayed["batch"] and replayed["bits"]
    run("tools/journal.py", where_they_are[1], *defer)
    assert "a test" in run("tools/journal.py", where_they_are[1], "--list")
    (at(url) / "journal.jsonl").unlink()

    found = json.loads(run(evaluate, where_they_are[1], "--tasks=validation", "--steps=all", "--json"))
    assert found["new"] == 3 and [r["step"] for r in found["results"]] == [10, 20, 25]
    again = json.loads(run(evaluate, where_they_are[1], "--tasks=validation", "--steps=all", "--json"))
    assert again["new"] == 0 and again["results"] == found["results"]

    chunks = [tmp_path / "chunks", f"{out}/chunks"]
    for place, to in zip(where_they_are, chunks, strict=True):
        run("tools/export_chunks.py", place, f"--out={to}")
    assert "left as it is" in run("tools/export_chunks.py", where_they_are[1], f"--out={chunks[1]}")
    with local_copy(at(chunks[1])) as copy:
        for name in ("chunks.json", "chunk_00001.parquet", "README.md"):
            assert (copy / name).read_bytes() == (chunks[0] / name).read_bytes()

    run("tools/convert_to_hf.py", where_they_are[1], f"--out={out}/hf", "--step=25", "--shard-size=100KB")
    run("tools/convert_to_hf.py", where_they_are[0], f"--out={tmp_path / 'hf'}", "--step=25", "--shard-size=100KB")
    with local_copy(at(f"{out}/hf")) as copy:
        names = {path.name for path in copy.iterdir()}
        assert names == {path.name for path in (tmp_path / "hf").iterdir()} and "parity.json" in names
        for name in (name for name in names if name.endswith(".safetensors")):
            assert (copy / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    run("tools/convert_to_hf.py", where_they_are[1], f"--out={out}/hf", "--verify")


@pytest.mark.processes
def test_a_second_trainer_waits_its_turn(server, start, tmp_path):
    """While one trains another is refused; of one that is stopped it takes over, and that one writes nothing more."""
    url, slow = f"{server.bucket()}/run", {"checkpoint.every_steps": 1, "data.workers": 0}
    first = start(tmp_path / "first", slow, url=url, patch=SHORT_LEASE)
    first.wait_for("starting at step 1")
    refused = start(tmp_path / "second", slow, url=url, patch=SHORT_LEASE).wait_for_error(78)
    assert re.search(rf"--workdir={url} is in use by another run \(host .*, pid {first.process.pid}, since", refused)
    first.wait_for("saved 2")
    first.signal(signal.SIGSTOP)
    second = start(tmp_path / "third", slow, url=url, patch=SHORT_LEASE)
    second.wait_for("resuming after step")
    first.signal(signal.SIGCONT)
    first.wait(78)
    assert "has been taken over by host" in first.told()
    second.wait(0)


@pytest.mark.processes
def test_two_processes(server, straight, start, tmp_path):
    """Each writes its own shards; one is killed, both end, and the same command goes on."""
    url = f"{server.bucket()}/run"
    pair = runs.pair(start, tmp_path / "run", url=url, devices=1)
    pair[0].wait_for("saved 10")
    pair[1].signal(signal.SIGKILL)
    pair[0].wait(70)
    told = runs.pair(start, tmp_path / "run", url=url, devices=1)[0].wait(0)
    assert any(line.startswith("resuming after step ") for line in told)
    parts = {key.split("/")[3] for key in at(url).keys() if key.startswith("checkpoints/25/params/ocdbt.process_")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    same_as(straight, url)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_four_processes_killed_twelve_times(server, straight, start, tmp_path):
    """4 processes of 2 devices, any one of them killed while it compiles or saves: what the run computes never changes.

    The moments are of a fixed seed; timing adds chance of its own. KILLS in the environment is another number of them.
    """
    faulthandler.dump_traceback_later(3600, exit=True)  # in place of the fixture's
    url, draw, kills = f"{server.bucket()}/run", random.Random(12), int(os.environ.get("KILLS", "12"))
    overrides = {"checkpoint.every_steps": 2}
    reference = start(tmp_path / "here", overrides, devices=8)
    reference.wait(0)
    server.fail(503, every=97)
    for kill in range(kills):
        four = runs.pair(start, tmp_path / "run", overrides, url=url, each=[{}] * 4, devices=2, patch=SHORT_LEASE)
        next_save = max(committed_steps(at(url)), default=0) + 2
        step = min(next_save, 24)
        moment = draw.choice(["compiling", f"saving {step}", f"saved {step}", f"saved {step}"])
        four[0].wait_for(moment)
        time.sleep(draw.uniform(0, 1))
        victim = draw.randrange(4)
        four[victim].signal(signal.SIGKILL)
        for trainer in four:
            trainer.process.wait(runs.WAIT_S)
        print(f"kill {kill + 1}: process {victim} at {moment!r}; steps {committed_steps(at(url))}", flush=True)
    four = runs.pair(start, tmp_path / "run", overrides, url=url, each=[{}] * 4, devices=2, patch=SHORT_LEASE)
    four[0].wait(0)
    server.heal()
    same_as(tmp_path / "here", url)


@pytest.mark.processes
def test_a_roll_back(server, straight, start, run, tmp_path):
    """A run in a bucket goes around bad data by itself; what it left can be read."""
    url = f"{server.bucket()}/runs/spiky"
    start(tmp_path / "run", QUICK, url=url, patch=spiky(straight, 14, 15)).wait(0)
    with local_copy(at(url)) as copy:
        assert [(row["step"], row["applied"]) for row in runs.ledger_rows(copy)] == [(n, True) for n in range(1, 22)]
        runs.ledger(copy).verify()
        left = list(Ledger(copy / "branches" / "01" / "ledger", None).steps.rows(13))
        assert [(row["step"], row["outlier"]) for row in left] == [(13, False), (14, True), (15, True), (16, False)]
        assert sorted(path.name for path in (copy / "spikes").iterdir()) == ["14-15.json", "18-19.json"]
        diagnosis = json.loads((copy / "spikes" / "14-15.json").read_text())
        assert diagnosis["verdict"]["cause"] == "data" and diagnosis["replay"], "tried, not only read"
    told = run(replay, f"--workdir={url}", "--branch=1", "--step=13")
    assert "from checkpoint 12" in told and "step 13: the same batches, on other devices" in told


FETCHES_NO_ARRAYS = """
from k2jax.run.mirror import Mirror
real = Mirror.fetch
def fetch(self):
    real(self)
    found = [path.name for path in self.local.glob("branches/01/*")]
    assert "ledger" in found and "checkpoints" not in found, found
Mirror.fetch = fetch
"""


@pytest.mark.processes
def test_a_branch_has_its_checkpoints(server, straight, start, run, tmp_path):
    """Bad data at 14 and 19: of what was saved at 16 the branch has every byte, and the run another one."""
    url, disk = f"{server.bucket()}/runs/spiky", tmp_path / "disk"
    for workdir, place in ((tmp_path / "run", url), (disk, None)):
        start(workdir, PLAIN, url=place, patch=spiky(straight, 14, 19)).wait(0)
    left = at(url) / "branches" / "01" / "checkpoints"
    assert committed_steps(left.parent) == [16] == runs.checkpoint_steps(disk / "branches" / "01")
    assert open_step(left.parent, 16).meta["digests"] == open_step(disk / "branches" / "01", 16).meta["digests"]
    arguments = ("--branch=1", "--step=16", "--prompt=the", "--max-new-tokens=4", "--json")
    assert run(generate, f"--workdir={url}", *arguments) == run(generate, f"--workdir={disk}", *arguments)
    with local_copy(at(url)) as copy:
        assert runs.ledger_rows(copy) == runs.ledger_rows(disk)
    start(tmp_path / "run", PLAIN, url=url, patch=FETCHES_NO_ARRAYS).wait(0)  # and finds nothing left to do
    assert committed_steps(left.parent) == [16]


KILLED = """
import os, signal
from k2jax.bucket import BucketPath
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(self, target, last):
    for key in self.keys()[::2]:
        (target / key).put((self / key).read_bytes())
    die()
def whole(self, target, last, real=BucketPath.copy_tree):
    real(self, target, last)
    die()
BucketPath.copy_tree = {copied}
"""


@pytest.mark.processes
@pytest.mark.parametrize("copied", ["half", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_kill_while_a_branchs_checkpoints_are_copied(server, straight, start, run, tmp_path, copied):
    """With half of its objects there, and with all of them and the old ones, too: the next start completes it."""
    url, patch = f"{server.bucket()}/runs/spiky", spiky(straight, 14, 19)
    start(tmp_path / "run", PLAIN, url=url, patch=patch + KILLED.format(copied=copied)).wait(-signal.SIGKILL)
    branch = at(url) / "branches" / "01"
    assert not (branch / "branch.json").exists() and 16 in committed_steps(at(url))
    start(tmp_path / "run", PLAIN, url=url, patch=patch).wait(0)
    assert (branch / "branch.json").exists() and committed_steps(branch) == [16]
    run(generate, f"--workdir={url}", "--branch=1", "--step=16", "--prompt=the", "--max-new-tokens=4")
