"""Stages on Ray, in one session of it: the same bytes as from one process, and what fails there reaches the user."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from test_build import BOOKS, NEAR, different_files
from test_engine import engine, fill, note, runs

import k2jax
from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import build, recipe
from k2jax.prepare.engine.engine import Stage, set_environment

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """A cluster of this machine. A rank is a process that takes Ray seconds to start: there are as few as will do."""
    ray = pytest.importorskip("ray")
    tests = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:  # Ray's processes have the environment of the one that starts them
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        for tries_left in (2, 1, 0):  # Ray gives a node 30 s to start; the machine may be busy
            try:
                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
                break
            except Exception as error:
                ray.shutdown()
                if not tries_left or "timed out during startup" not in str(error):
                    raise
        yield ray
        ray.shutdown()


def test_ray_changes_no_byte(tmp_path: Path):
    """Every stage, some of two ranks; exact and near copies over both."""
    for i, book in enumerate([*BOOKS, *(book.replace("Book", "Buch") for book in BOOKS[20 : 20 + NEAR]), BOOKS[1]]):
        (tmp_path / f"{i:02}.txt").write_text(book, encoding="utf-8")
    config = recipe.base()
    config.vocab_size, config.tokenizer_bytes, config.validation_fraction, config.dedup.bands = 330, 20_000, 0.2, 1
    config.subsets.books = recipe.subset(f"text:{tmp_path}/*.txt", tasks=2)
    recipe.validate(config.lock())
    data, _ = build.build(config, tmp_path / "local", workers=1)
    removed = data["subsets"]["books"]["duplicates"]["steps"]["duplicates"]["removed"]
    assert removed["exact"]["documents"] == 1 and removed["near"]["documents"] > 0
    build.build(config, tmp_path / "ray", executor="ray", workers=2)
    assert different_files(tmp_path / "local", tmp_path / "ray") == []


def test_a_failed_rank_is_an_error_though_ray_does_not_raise_it(tmp_path: Path):
    failing = tmp_path / "failing"
    failing.write_text("1")
    stage = Stage("note", 2, partial(note, folder=tmp_path, failing=str(failing)))
    with pytest.raises(ConfigError, match="document 7 of rank 1"):
        engine(tmp_path, "ray", 2).run(stage)
    failing.unlink()
    engine(tmp_path, "ray", 2).run(stage)
    assert runs(tmp_path)[0] == 1 and set(runs(tmp_path)) == {0, 1}


def test_a_full_disk_is_no_bug(tmp_path: Path):
    with pytest.raises((OSError, StorageError), match="No space left"):
        engine(tmp_path, "ray").run(Stage("fill", 1, partial(fill, folder=tmp_path)))


def tell(rank: int, *, folder: Path) -> None:
    """A task: writes what it has of the environment."""
    names = ("PYTHONPATH", "RAYON_NUM_THREADS", "AWS_SECRET_ACCESS_KEY", "https_proxy", "OTHER")
    (folder / "environment").write_text(json.dumps({name: os.environ.get(name) for name in names}))


def test_the_commands_environment_reaches_a_cluster_that_was_started_without_it(tmp_path: Path, monkeypatch: Any):
    for name in ("AWS_SECRET_ACCESS_KEY", "https_proxy", "OTHER"):
        monkeypatch.setenv(name, f"{name} of the command")
    for name in ("PYTHONPATH", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    set_environment("ray", 7)
    engine(tmp_path, "ray").run(Stage("tell", 1, partial(tell, folder=tmp_path)))
    found = json.loads((tmp_path / "environment").read_text())
    assert found.pop("OTHER") is None and found.pop("RAYON_NUM_THREADS") == "1"
    assert found.pop("PYTHONPATH").startswith(str(Path(k2jax.__file__).parent.parent))
    assert found == {name: f"{name} of the command" for name in found} and len(found) == 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "done").rglob("*") if path.is_file())
    assert b"of the command" not in written
