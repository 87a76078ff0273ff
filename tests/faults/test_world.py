"""A machine that lacks and withholds: no git, no flock, ASCII, no umask, full disks under logs, files that stay.

One run under all of it at once, and what is left of each alone.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults import runs
from k2jax.data.epochs import read_epochs
from k2jax.run.checkpoint import Checkpoints

# Before the program: as the shells, containers and file systems that it meets would have it.
WORLD = """
import errno, fcntl, os, shutil, signal
os.umask(0)
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
from tensorboardX.record_writer import RecordWriter
written, write = [], RecordWriter.write
def full(self, data):
    written.append(data)
    if len(written) > 30: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(self, data)
RecordWriter.write = full
rmtree = shutil.rmtree
def busy(path, ignore_errors=False, **options):
    if os.path.basename(os.path.dirname(path)) != "trash": return rmtree(path, ignore_errors, **options)
    open(os.path.join(path, ".nfs0000000001"), "a").close()
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
shutil.rmtree = busy
"""
ASCII = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def world_writable(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert len(paths) > 20
    return [str(path.relative_to(folder)) for path in paths if path.stat().st_mode & 0o002]


@pytest.mark.fault("S13")
@pytest.mark.processes
def test_a_run_in_a_hostile_world(straight, start, tmp_path):
    """It is the undisturbed one, bit for bit, and says what it lacked."""
    overrides = {
        "log.tensorboard": True, "checkpoint.every_steps": 4, "checkpoint.keep_between": 1, "data.workers": 1,
        "eval.prompts": "('\\xe4\\x1b[2J',)", "eval.new_tokens": 4,
    }  # fmt: skip
    environment = {**runs.READ_ONLY_CACHE, **ASCII, "PATH": str(tmp_path / "nothing")}
    (tmp_path / "parent").mkdir()
    workdir = tmp_path / "parent" / "run"
    trainer = start(workdir, overrides, patch=WORLD, environment=environment)
    told = trainer.wait(0)
    for said in ("no lock for all hosts", "tensorboard is not written any more", "old checkpoints stay for now"):
        assert sum(said in line for line in told) == 1, (said, trainer.told())
    assert any(line.startswith("sample: \\xe4\\u001b[2J|") for line in told)
    assert "Traceback" not in trainer.told() and "error:" not in trainer.told()
    assert runs.ledger_rows(workdir) == runs.ledger_rows(straight)
    assert not world_writable(workdir.parent)
    assert json.loads((workdir / "environment.json").read_text())["launches"][0]["commit"] is None
    [lock] = workdir.glob("lock.*")
    assert json.loads(lock.read_text())["free"]


@pytest.mark.processes
def test_a_closed_log_pipe_ends_no_run(straight, start, tmp_path):
    """`| head -1`; and a log on a full disk."""
    arguments = runs.arguments(tiny_data_of(straight), tmp_path / "run", {})
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "k2jax.train", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {runs.QUICKLY_COMPILED}"},
        cwd=runs.REPOSITORY,
    )
    os.close(write)
    os.read(read, 1)
    os.close(read)
    told = process.communicate(timeout=runs.WAIT_S)[1]
    assert process.returncode == 0, told
    assert told.count("the standard output is gone (Broken pipe)") == 1
    assert runs.ledger_rows(tmp_path / "run") == runs.ledger_rows(straight)


def tiny_data_of(workdir: Path) -> Path:
    return Path(read_epochs(workdir)[0].config["data"]["root"])


def test_what_nfs_leaves_in_the_trash_is_said_once(straight, tmp_path, monkeypatch):
    """A folder that cannot be emptied: of a real file system, one whose files may not be removed."""
    workdir = runs.copy_run(straight, tmp_path / "run")
    said: list[str] = []
    held = workdir / "checkpoints" / "trash" / "15"
    held.mkdir(parents=True)
    (held / ".nfs000001").touch()
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if str(path).endswith(".nfs000001"):
            raise OSError(16, "Device or resource busy")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    checkpoints = Checkpoints(workdir, [10, 20, 25], log=said.append)
    for _ in range(2):
        checkpoints.keep([])
        checkpoints.close()
    [line] = said
    assert "old checkpoints stay for now" in line and "Device or resource busy" in line
    monkeypatch.undo()
    checkpoints.keep([])
    checkpoints.close()
    assert not list(held.parent.iterdir())


@pytest.mark.processes
def test_a_full_disk_under_all_logs(straight, start, tmp_path):
    """The real writer of TensorBoard's files at a limit on their size that the rest does not meet: the run goes on."""
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    overrides = {"log.tensorboard": True, "log.every_steps": 100}
    patch = f"{limit}\nfrom k2jax.training import sinks; sinks.FLUSH_S = 0.0"
    patch += "\nfrom k2jax.run import reading; reading.WRITE_WAITS_S = (6.0,)"  # in which tensorboardX imports torch
    patch += "\nwrite = sinks.TensorBoard.write\ndef often(self, *a):\n    for _ in range(20): write(self, *a)"
    patch += "\nsinks.TensorBoard.write = often"
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    trainer = start(workdir, overrides, patch=patch, environment=runs.READ_ONLY_CACHE)
    error = trainer.wait_for_error(74)  # of the checkpoint, which is larger, too
    assert "checkpoint 25 could not be saved" in error
    assert any("tensorboard is not written any more" in line and "too large" in line for line in trainer.lines())


@pytest.mark.fault("B8")
@pytest.mark.processes
def test_two_trainers_without_flock(straight, start, tmp_path):
    """The second is refused while the first trains, and may once it was killed."""
    first = start(tmp_path / "run", patch=WORLD + SLOW, environment=runs.READ_ONLY_CACHE)
    first.wait_for("step 1 ")
    assert "in use by another run (host" in start(tmp_path / "run", patch=WORLD).wait_for_error(78)
    first.signal(signal.SIGKILL)
    first.wait(-signal.SIGKILL)
    told = start(tmp_path / "run", patch=WORLD).wait(0)
    assert any("which is gone" in line for line in told)


@pytest.mark.fault("S13")
def test_a_workdir_is_not_for_others_to_read(straight):
    """Seen red without the mode that the folder is made with."""
    assert straight.stat().st_mode & 0o777 == 0o750 and not world_writable(straight)


SLOW = """
import time
from k2jax.training import metrics
push = metrics.Recorder.push
metrics.Recorder.push = lambda *arguments: (time.sleep(3), push(*arguments))[1]
"""


@pytest.mark.fault("S13")
@pytest.mark.processes
def test_no_command_leaves_files_for_all_to_write(tiny_data, straight, tmp_path):
    """umask 0: a preparation with worker processes, an export of chunks by two, one to Hugging Face's format."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"document {number} of a few words " * 40)
    (tmp_path / "recipe.py").write_text(
        "from k2jax.prepare import recipe\ndef get_config():\n    c = recipe.base()\n"
        f"    c.subsets.a = recipe.subset('text:{text}', tasks=2)\n    c.vocab_size = 300\n    return c\n"
    )
    out = tmp_path / "made"
    commands = [
        ["tools/prepare_data.py", f"--config={tmp_path / 'recipe.py'}", f"--out={out / 'data'}", "--workers=2",
         "--keep_stages"],
        ["tools/export_chunks.py", f"--workdir={straight}", f"--out={out / 'chunks'}", "--workers=2"],
        ["tools/convert_to_hf.py", f"--workdir={straight}", f"--out={out / 'hf'}"],
        ["tools/convert_from_hf.py", f"--hf={out / 'hf'}", f"--out={out / 'imported'}"],
        ["-m", "k2jax.evaluate", f"--workdir={out / 'run'}", "--windows=2"],
    ]  # fmt: skip
    runs.copy_run(straight, out / "run")
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=runs.REPOSITORY, umask=0, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
    assert not world_writable(out)
