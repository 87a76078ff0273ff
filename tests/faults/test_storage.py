"""Damaged checkpoints and full disks: named, gone around, never taken for good, never a start from scratch."""

import json
import random
import shutil
import signal
from pathlib import Path

import jax
import pytest

from faults import runs
from k2jax.errors import ConfigError, DamagedError, StorageError
from k2jax.parallel import sharding
from k2jax.replay import replay
from k2jax.run import reading
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.saved import open_step, restore_params
from k2jax.run.state import flat
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state

# Futures of failed reads that Orbax leaves unread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Between the tries of what runs in this process."""
    monkeypatch.setattr(reading, "RETRY_WAITS_S", (0.01, 0.01))


class Reader:
    """`Checkpoints` of a workdir with what `restore` needs, on all eight devices."""

    def __init__(self, config):
        self.mesh = sharding.make_mesh(config.mesh)
        self.shapes = jax.eval_shape(lambda: init_state(config.model, config.seed))
        self.shardings = place_state(config, self.shapes, self.mesh)

    def restore(self, workdir, step):
        with jax.set_mesh(self.mesh):
            return Checkpoints(workdir, [10, 20, 25]).restore(step, self.shardings, self.shapes)

    def restore_all(self, workdir):
        """Verifies every step that is listed, and changes nothing."""
        with jax.set_mesh(self.mesh):
            checkpoints = Checkpoints(workdir)
            found = {step: checkpoints.restore(step, self.shardings, self.shapes) for step in checkpoints.steps()}
        assert all(int(state.step) == step for step, state in found.items())

    def restore_newest(self, workdir):
        said = []
        with jax.set_mesh(self.mesh):
            state = Checkpoints(workdir, [10, 20, 25], log=said.append).restore_newest(
                self.shardings, self.shapes
            )
        return int(state.step), said


@pytest.fixture(scope="module")
def reader(tiny_config):
    return Reader(tiny_config())


def array_files(step: Path) -> list[Path]:
    """The files that hold the arrays' bytes."""
    return [path for path in sorted(step.glob("*/**/d/*")) if path.stat().st_size > 10_000]


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.fault("B3", "S15")
def test_every_flipped_bit_is_found(straight, reader, tmp_path):
    """One bit, in each array file over 10 KB, at both ends and at random places: no flip gives other numbers.

    Nearly all are refused by name; the rest lie in what OCDBT has left at the end of its files and reads no more, where
    the state comes back bit for bit. Orbax restores most of them as wrong numbers without a word.
    Seen red without the comparison of digests.
    """
    workdir, draw = runs.copy_run(straight, tmp_path / "run"), random.Random(3)
    good = as_bytes(reader.restore(workdir, 25))
    files = array_files(workdir / "checkpoints" / "25")
    assert sum(path.stat().st_size for path in files) > 500_000
    flips = refused = by_digest = 0
    for path in files:
        content, size = path.read_bytes(), path.stat().st_size
        for byte in [0, size - 1, *(draw.randrange(size) for _ in range(10))]:
            flip(path, byte, draw.randrange(8))
            flips += 1
            try:
                assert as_bytes(reader.restore(workdir, 25)) == good, (
                    f"{path.name}: byte {byte} went unnoticed"
                )
            except StorageError as error:
                assert str(error).startswith("checkpoint 25: ")
                refused += 1
                by_digest += "damaged array(s)" in str(error)
            path.write_bytes(content)
    assert refused > 0.7 * flips and by_digest > 0.5 * flips, (flips, refused, by_digest)


def as_bytes(state):
    return {name: jax.device_get(array).tobytes() for name, array in flat(state).items()}


def damages(step: Path) -> dict[str, callable]:
    """{name: what to do to the newest checkpoint}"""
    largest = max(array_files(step), key=lambda path: path.stat().st_size)
    meta, data = step / "meta" / "meta.json", step / "data" / "metadata"
    index = step / "params" / "manifest.ocdbt"
    return {
        "truncated array file": lambda: largest.write_bytes(
            largest.read_bytes()[: largest.stat().st_size // 2]
        ),
        "empty array file": lambda: largest.write_bytes(b""),
        "deleted array file": largest.unlink,
        "deleted weights": lambda: shutil.rmtree(step / "params"),
        "deleted moments": lambda: shutil.rmtree(step / "moments"),
        "deleted meta": lambda: shutil.rmtree(step / "meta"),
        "half-deleted step": lambda: [shutil.rmtree(step / part) for part in ("params", "data")],
        "nothing left": lambda: [shutil.rmtree(step), step.mkdir()],
        "damaged index": lambda: flip(index, index.stat().st_size // 2, 3),
        "cut meta": lambda: meta.write_text(meta.read_text()[:-30]),
        "meta no JSON": lambda: meta.write_text("x" + meta.read_text()),
        "meta of other type": lambda: meta.write_text("[]"),
        "meta without digests": lambda: edit_json(meta, lambda m: m.pop("digests")),
        "meta lacks a digest": lambda: edit_json(meta, lambda m: m["digests"].pop("params/head_DV")),
        "meta lacks arrays": lambda: edit_json(meta, lambda m: m.pop("arrays")),
        "a digit of meta": lambda: meta.write_text(meta.read_text().replace('"step": 25', '"step": 35')),
        "a digit of a shape": lambda: meta.write_text(meta.read_text().replace("512", "513", 1)),
        "cut data": lambda: data.write_text(data.read_text()[:-5]),
        "data lacks order": lambda: edit_json(data, lambda d: d.pop("order")),
        "a digit of the order": lambda: edit_json(data, other_order),
    }


def other_order(data: dict) -> None:
    data["order"] = ("1" if data["order"][0] == "0" else "0") + data["order"][1:]


def edit_json(path: Path, change: callable) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.fault("B2", "B4")
def test_damage_is_named_and_gone_around(straight, reader, tmp_path):
    """Whatever is done to the newest step: it is named, moved to abandoned/, and the step before it is used.

    Seen red without the fall-back; without the SHA-256 of the meta.
    """
    names = list(damages(straight / "checkpoints" / "25"))
    for name in names:
        workdir = runs.copy_run(straight, tmp_path / name)
        damages(workdir / "checkpoints" / "25")[name]()
        step, said = reader.restore_newest(workdir)
        assert step == 20, (name, said)
        again, refused, moved = said
        assert again.startswith("checkpoint 25: ") and "trying again" in again, (name, said)
        assert refused.startswith("refused: checkpoint 25: ") and "\n" not in refused, (name, said)
        assert "moved checkpoint 25" in moved, (name, said)
        assert runs.checkpoint_steps(workdir) == [10, 20], name
        [kept] = (workdir / "abandoned").iterdir()
        assert kept.name.startswith("25-"), name


@pytest.mark.fault("B2", "B7")
def test_training_goes_on_before_the_damage(straight, tiny_data, command, tmp_path):
    """The two newest steps are bad: the run resumes before them, saves both again, and ends as it would have."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    path = array_files(workdir / "checkpoints" / "25")[0]
    flip(path, path.stat().st_size // 2, 5)
    shutil.rmtree(workdir / "checkpoints" / "20" / "moments")
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0, ended
    assert [line.split(":")[1] for line in ended.lines if line.startswith("refused")] == [
        " checkpoint 25",
        " checkpoint 20",
    ]
    assert {"resuming after step 10 of 25", "15 step(s) after the checkpoint are run again"} <= set(
        ended.lines
    )
    assert {"saved 20", "saved 25"} <= set(ended.lines)
    assert sorted(path.name.split("-")[0] for path in (workdir / "abandoned").iterdir()) == ["20", "25"]
    rows, expected = runs.ledger_rows(workdir), runs.ledger_rows(straight)
    assert [row["batch"] for row in rows] == [row["batch"] for row in expected]
    assert rows[:10] == expected[:10]  # what follows was computed on eight devices, not two
    runs.ledger(workdir).verify()


@pytest.mark.fault("B5")
def test_no_good_checkpoint_stops_the_run(straight, tiny_data, command, tmp_path):
    """74 with all of them named; nothing is trained, nothing is moved or deleted.

    Seen red without the end where none is good.
    """
    workdir = runs.copy_run(straight, tmp_path / "run")
    for step in (10, 20, 25):
        (workdir / "checkpoints" / str(step) / "meta" / "meta.json").write_text("{")
    error = command.refuse(74, *runs.arguments(tiny_data, workdir, {}))
    assert all(f"checkpoint {step}: " in error for step in (10, 20, 25))
    assert runs.checkpoint_steps(workdir) == [10, 20, 25]
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


@pytest.mark.fault("B7")
@pytest.mark.parametrize("part", ["params", "moments", "params/d", "meta/meta.json"])
def test_a_half_deleted_older_step_is_whole_to_nobody(straight, reader, tiny_data, command, tmp_path, part):
    """As `rm -r` leaves it that was stopped. Resumed, read, replayed or forked from it is named; the newest is used."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    gone = workdir / "checkpoints" / "10" / part
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)
    assert reader.restore_newest(workdir) == (25, [])
    with pytest.raises(DamagedError, match="checkpoint 10: "):
        reader.restore(workdir, 10)
    if part != "moments":
        with pytest.raises((ConfigError, StorageError), match="checkpoint.* 10"):
            restore_params(open_step(workdir, 10), reader.mesh)
    if part == "params":
        with pytest.raises(StorageError, match="checkpoint 10: "):
            replay(workdir, 11, 1, say=lambda line: None)
        arguments = runs.arguments(tiny_data, tmp_path / "fork", {})
        assert "checkpoint 10: " in command.refuse(74, *arguments, f"--fork={workdir}@10")


# Deletes one file of what it should delete, and dies.
DIES_DELETING = """
import os, pathlib, shutil, signal
def rmtree(path, *args, **kwargs):
    next(p for p in pathlib.Path(path).rglob("*") if p.is_file()).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = rmtree
"""


@pytest.mark.fault("A6", "B7")
@pytest.mark.processes
def test_kill_while_an_old_step_is_deleted(straight, start, reader, tmp_path):
    """No step that is listed is half deleted, and the next start cleans up."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    overrides = {"checkpoint.every_steps": 1, "checkpoint.keep_between": 1}
    start(workdir, overrides, patch=DIES_DELETING, environment=runs.READ_ONLY_CACHE).wait(-signal.SIGKILL)
    assert any(name.startswith("trash") for name in runs.leftovers(workdir))
    steps = runs.checkpoint_steps(workdir)
    assert steps[-1] > 20
    for step in steps:
        assert int(reader.restore(workdir, step).step) == step
    start(workdir, overrides).wait(0)
    assert not runs.leftovers(workdir)
    assert runs.checkpoint_steps(workdir) == [10, 20, 24, 25]


# Dies between the mark of what is to be thinned and the thinning.
DIES_THINNING = """
import os, signal
from k2jax.run import lineage
move = lineage._move
def dies(path, target):
    if path.name == "moments":
        os.kill(os.getpid(), signal.SIGKILL)
    move(path, target)
lineage._move = dies
"""


@pytest.mark.fault("A6")
@pytest.mark.processes
@pytest.mark.parametrize("patch", [DIES_THINNING, DIES_DELETING], ids=["before", "within"])
def test_kill_while_moments_are_taken_away(straight, start, reader, tmp_path, patch):
    """The weights are whole, the newest can be resumed from, and the next start ends what was begun."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    overrides = {"checkpoint.moments_every": 5}
    start(workdir, overrides, patch=patch, environment=runs.READ_ONLY_CACHE).wait(-signal.SIGKILL)
    assert runs.checkpoint_steps(workdir) == [10, 20, 25]
    assert (workdir / "checkpoints" / "10" / "thinned.json").exists()
    with pytest.raises(ConfigError, match="its moments were taken away"):
        reader.restore(workdir, 10)
    for step in (20, 25):
        assert int(reader.restore(workdir, step).step) == step
    assert "resuming after step 25 of 25" in start(workdir, overrides).wait(0)
    assert not (workdir / "checkpoints" / "10" / "moments").exists() and not runs.leftovers(workdir)
    saved = open_step(workdir, 10)
    restored, expected = (restore_params(open_step(run, 10), reader.mesh) for run in (workdir, straight))
    assert all((restored[name] == expected[name]).all() for name in expected)
    assert saved.digest in [record["checkpoint"] for record in runs.ledger(workdir).records()]


# Files are small until step 24 has been made, four tries and more after the save of 21 began.
FULL_FOR_A_WHILE = """
import resource, time
from k2jax import train
from k2jax.run import reading
reading.WRITE_WAITS_S = (0.05,) * 1000
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
say, tries = train.say, []
def told(line):
    say(line)
    tries.append(line) if "trying again" in line else None
    if line == "saving 21":
        limit(30_000)
    if line.startswith("step 23") or line.startswith("step 24"):
        while len(tries) < 2:
            time.sleep(0.05)
    if line.startswith("step 24"):
        limit(resource.RLIM_INFINITY)
train.say = told
"""


@pytest.mark.fault("B10")
@pytest.mark.processes
def test_a_save_is_tried_again_while_training_goes_on(straight, start, tmp_path):
    """The state is with the host: three steps later it is what it was."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    told = start(workdir, {"checkpoint.every_steps": 21}, patch=FULL_FOR_A_WHILE).wait(0)
    again = [i for i, line in enumerate(told) if "cannot be written: " in line and "trying again" in line]
    step_24, saved = (next(i for i, line in enumerate(told) if line.startswith(s)) for s in ("step 24", "saved 21"))
    assert len(again) >= 2 and again[0] < step_24 < saved
    assert runs.checkpoint_steps(workdir) == [10, 20, 21, 25]
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    shutil.rmtree(workdir / "checkpoints" / "25")
    assert "resuming after step 21 of 25" in start(workdir).wait(0)  # verified by its digests
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)


# Less than the tokenizer; less than a chunk's metrics; less than the arrays, more than all else.
LIMITS = (4_000, 30_000, 60_000)
LIMITED = """
import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
from k2jax.run import reading; reading.WRITE_WAITS_S = (0.1, 0.1)
"""


@pytest.mark.fault("B1")
def test_full_disk(straight, start, tmp_path):
    """A limit on file sizes stands for it: 74, one line, earlier checkpoints good, no litter after the restart.

    Seen red without the errors of saves.
    """
    workdirs = [tmp_path / name for name in ("start", "row", "save")]
    for workdir in workdirs[1:]:
        runs.copy_run(straight, workdir, last_step=20)
    rows = workdirs[1] / "metrics" / "chunk-00003.jsonl"
    rows.write_text((json.dumps({"step": 20, "filler": "x" * 979}) + "\n") * 28)  # as if the chunk were long
    full = [
        start(workdir, patch=LIMITED.format(limit), environment=runs.READ_ONLY_CACHE)
        for workdir, limit in zip(workdirs, LIMITS, strict=True)
    ]
    for trainer, named in zip(
        full, ("tokenizer.json", f"{rows}: cannot be", "checkpoint 25 could not"), strict=True
    ):
        error = trainer.wait_for_error(74)
        assert named in error and "File too large" in error
    assert runs.checkpoint_steps(workdirs[2]) == [10, 20]

    told = start(workdirs[2]).wait(0)
    assert "resuming after step 20 of 25" in told
    assert not runs.leftovers(workdirs[2])
    assert runs.ledger_rows(workdirs[2]) == runs.ledger_rows(straight)
    assert runs.ledger(workdirs[2]).records() == runs.ledger(straight).records()
