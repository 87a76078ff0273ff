"""TensorBoard and Weights & Biases: logs that may fail or hang, which is said once and never the run's concern.

Each writes in a thread of its own, behind a queue that is never waited for. All rows are in `metrics/` in any case.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from k2jax import files
from k2jax.data.epochs import read_epochs
from k2jax.errors import RunError
from k2jax.run.reading import one_line

ROOM = 1000  # rows that may wait
FLUSH_S = 10.0
CLOSE_S = 60.0  # for what waits at the end of a run


class Log(Protocol):
    """Where rows go; whatever it raises ends it, and nothing else."""

    def write(self, step: int, row: dict[str, Any], time_s: float) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Sink:
    """Takes rows for a log, which its thread opens and writes."""

    def __init__(self, name: str, open_log: Callable[[], Log], say: Callable[[str], None]):
        self.name, self._open, self._say, self._failed = name, open_log, say, False
        self._rows: queue.Queue[tuple[int, dict[str, Any], float] | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._work, name=f"k2jax-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, row: dict[str, Any]) -> None:
        """Returns at once."""
        if not self._failed:
            try:
                self._rows.put_nowait((step, row, time.time()))
            except queue.Full:
                self._give_up(f"hangs, {ROOM} rows wait for it")

    def close(self) -> None:
        """Waits for what was put, up to CLOSE_S."""
        if self._failed:
            return
        try:
            self._rows.put(None, timeout=CLOSE_S)
        except queue.Full:
            pass
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"hangs, it was waited for {CLOSE_S:.0f} s")

    def _work(self) -> None:
        try:
            log = self._open()
            while True:
                try:
                    row = self._rows.get(timeout=FLUSH_S)
                except queue.Empty:
                    log.flush()
                    continue
                if row is None or self._failed:
                    return log.close()
                log.write(*row)
        except Exception as error:  # of anybody's code and storage
            self._give_up(str(error) if isinstance(error, RunError) else one_line(error))

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"{self.name} is not written any more in this launch: {why}; metrics/ has all rows")


class TensorBoard:
    """Event files by tensorboardX, less its own thread, at whose death its queue fills and blocks.

    TensorBoard drops what it has from `first_step` on: those steps are run again.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        files.make_folder(folder)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=first_step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def write(self, step: int, row: dict[str, Any], time_s: float) -> None:
        """The numbers of a row."""
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self._writer.write_event(self._event(wall_time=time_s, step=step, summary=self._scalar(key, value)))
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """What TensorBoard can see from then on."""
        self._flushed = time.monotonic()
        self._writer.flush()

    def close(self) -> None:
        """The end of the launch."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same at each launch."""

    def __init__(self, project: str, workdir: Path):
        import wandb

        self._run = wandb.init(
            project=project, name=workdir.name, dir=workdir, resume="allow", id=read_epochs(workdir)[-1].run[:16]
        )

    def write(self, step: int, row: dict[str, Any], time_s: float) -> None:
        """All of a row."""
        self._run.log(row, step=step)

    def flush(self) -> None:
        """It does that by itself."""

    def close(self) -> None:
        """The end of the launch."""
        self._run.finish()


def open_sinks(config: ConfigDict, workdir: Path, first_step: int, say: Callable[[str], None]) -> list[Sink]:
    """Where rows go besides `metrics/`."""
    sinks = []
    if config.log.tensorboard:
        sinks.append(Sink("tensorboard", lambda: TensorBoard(workdir / "tensorboard", first_step), say))
    if config.log.wandb_project:
        sinks.append(Sink("wandb", lambda: WandB(config.log.wandb_project, workdir), say))
    return sinks
