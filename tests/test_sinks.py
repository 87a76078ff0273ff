"""TensorBoard's and W&B's part of a run: on a full disk, hung, broken or missing, and never in the way of the steps."""

import resource
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import begin_run

from k2jax.training import sinks
from k2jax.training.sinks import Sink, TensorBoard, open_sinks

ROW = {"loss": 1.5, "stage": "one", "lr": 1e-3, "mfu": None, "applied": True}


def events(folder: Path) -> list:
    """What a reader of the files sees, by tensorboardX's own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            [size] = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return found


def test_rows_are_what_tensorboard_reads(tmp_path: Path):
    said: list[str] = []
    sink = Sink("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 3), said.append)
    for step in range(3, 60):
        sink.put(step, {**ROW, "loss": float(step)})
    sink.close()
    found = events(tmp_path / "tensorboard")
    assert [e.step for e in found if e.session_log.status] == [3], "what was there from step 3 on is dropped"
    losses = {e.step: v.simple_value for e in found for v in e.summary.value if v.tag == "loss"}
    assert losses == {step: float(step) for step in range(3, 60)} and not said
    assert {v.tag for e in found for v in e.summary.value} == {"loss", "lr", "applied"}


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch):
    """The real writer, under a limit on file sizes: one thread of it used to die and its queue to block the run."""
    monkeypatch.setattr(sinks, "FLUSH_S", 0.0)
    said: list[str] = []
    sink = Sink("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 1), said.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[0][1]))
    try:
        for step in range(1, sinks.ROOM):
            sink.put(step, ROW)
        sink._thread.join(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    sink.put(9999, ROW)
    sink.close()
    [line] = said
    assert line.startswith("tensorboard is not written any more in this launch: OSError:") and "too large" in line


def test_a_log_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(sinks, "ROOM", 20)
    monkeypatch.setattr(sinks, "CLOSE_S", 0.2)
    hang, said = threading.Event(), []

    class Hangs:
        def write(self, *_: object) -> None:
            hang.wait(60)

    for rows in (100, 2):
        said.clear()
        sink = Sink("wandb", Hangs, said.append)
        for step in range(rows):
            sink.put(step, ROW)
        sink.close()
        [line] = said
        assert ("20 rows wait for it" if rows == 100 else "it was waited for 0 s") in line
    hang.set()


WANDB = """
import pathlib, time
def init(**options):
    pathlib.Path({out!r}).write_text(repr(sorted(options)))
    {fails}
    return Run()
class Run:
    def log(self, row, step):
        with open({out!r}, "a") as file: print(step, row["loss"], file=file)
    def finish(self):
        with open({out!r}, "a") as file: print("finished", file=file)
"""


@pytest.mark.parametrize("fails", ["", "raise RuntimeError('no network: https://u:p@h')"])
def test_weights_and_biases(tmp_path: Path, tiny_config, monkeypatch, fails: str):
    """A package of that name stands for it: it is not among our dependencies."""
    (tmp_path / "wandb.py").write_text(WANDB.format(out=str(tmp_path / "told"), fails=fails))
    begin_run(tmp_path, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    said: list[str] = []
    config = tiny_config(**{"log.wandb_project": "x"})
    [sink] = open_sinks(config, tmp_path, 1, said.append)
    sink.put(1, ROW)
    sink.put(2, ROW)
    sink.close()
    told = (tmp_path / "told").read_text()
    assert told.startswith("['dir', 'id', 'name', 'project', 'resume']")
    assert told.endswith("]1 1.5\n2 1.5\nfinished\n") == (not fails)
    assert len(said) == bool(fails) and all("no network" in line for line in said)
    sys.modules.pop("wandb", None)


def test_a_row_that_no_log_waits_for_costs_microseconds():
    """Not measured but counted: `put` waits for nothing, so a hundred of them end while the log is still opening."""
    opened = threading.Event()

    def open_log() -> TensorBoard:
        opened.wait(60)
        raise RuntimeError("never")

    said: list[str] = []
    sink = Sink("tensorboard", open_log, said.append)
    for step in range(100):
        sink.put(step, ROW)
    assert not said and sink._rows.qsize() == 100
    opened.set()
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "never" in said[0]
