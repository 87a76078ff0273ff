"""Fixtures of the fault suite."""

import faulthandler
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import runs
from faults.runs import Command, Trainer, trainers

LIMIT_S = 600  # of one test, in process or not; a hung collective can be ended only from outside Python


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def start(tiny_data: Path) -> Iterator[Callable[..., Trainer]]:
    with trainers(tiny_data) as start:
        yield start


@pytest.fixture(scope="session")
def straight(tiny_data: Path, made_once: Callable) -> Path:
    """The workdir of an undisturbed run on two devices. Read it, or copy it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        with trainers(tiny_data) as start:
            start(folder / "run").wait(0)

    return made_once("straight", make) / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def stopped(straight, tmp_path_factory):
    """A run that ended after its first chunk."""
    return runs.copy_run(straight, tmp_path_factory.mktemp("stopped") / "run", last_step=10)
