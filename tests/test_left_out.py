"""A file that cannot be read is left out whole, whichever task finds it, and no longer than the recipe allows."""

import errno
import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from test_build import different_files  # noqa: E402

from k2jax.errors import ConfigError, UnreadableError  # noqa: E402
from k2jax.prepare import build, plan, recipe  # noqa: E402
from k2jax.prepare.engine.engine import Engine, Stage  # noqa: E402
from k2jax.prepare.made import Made  # noqa: E402
from k2jax.prepare.sources import stored, unreadable  # noqa: E402

SEED = 14  # by which the large file is first
WORDS = "bana kelo trimo suting lyba nake molo tring keno basu lory mote".split()


def rows(name: str, number: int) -> str:
    """Of about 100 bytes each, no two alike."""
    texts = (f"{name} {i} " + " ".join(WORDS[(i * k) % 12] for k in range(1, 17)) for i in range(number))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def config_of(folder: Path, part_bytes: int, **options) -> recipe.ConfigDict:
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes, c.validation_fraction, c.part_bytes = 330, 20_000, 0.2, part_bytes
    c.dedup.near, c.seed = False, SEED
    c.subsets.web = recipe.subset(f"jsonl:{folder}/*.jsonl", **options)
    recipe.validate(c.lock())
    return c


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, int]:
    """Small files and a large one, which is read in two parts; the same without it; part_bytes."""
    all_of_them, without = tmp_path / "all", tmp_path / "without"
    for folder in (all_of_them, without):
        folder.mkdir()
        for i in range(6):
            (folder / f"{i}.jsonl").write_text(rows(f"small {i}", 4))
    (all_of_them / "large.jsonl").write_text(rows("large", 30))
    return all_of_them, without, (all_of_them / "large.jsonl").stat().st_size // 2 + 1


class Disk:
    """Of which a range of a file can be read no more when a stage begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.path, self.begin, self.end, self.stage, self.fails, self.stages = "", 0, 1 << 40, "", False, []
        run, read = Engine.run, stored.Stored.readinto

        def began(engine: Engine, stage: Stage) -> None:
            self.stages.append(stage.name)
            self.fails = self.fails or stage.name == self.stage
            run(engine, stage)

        def readinto(file: stored.Stored, buffer: object) -> int:
            if self.fails and file.path == self.path and self.begin <= file.tell() < self.end:
                raise file._error(OSError(errno.EIO, "Input/output error"))
            return read(file, buffer)

        monkeypatch.setattr(Engine, "run", began)
        monkeypatch.setattr(stored.Stored, "readinto", readinto)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("tasks", [1, 8])
@pytest.mark.parametrize("half", [0, 1])
def test_of_a_file_in_parts_nothing_is_left_whichever_part_cannot_be_read(tmp_path, folders, disk, half, tasks):
    """Seen red without the second run of tasks that had read its other part, and with a note for each part."""
    all_of_them, without, middle = folders
    disk.path, disk.stage = f"{all_of_them}/large.jsonl", "clean"
    disk.begin, disk.end = [(0, middle // 2), (middle * 3 // 2, 1 << 40)][half]
    c = config_of(all_of_them, middle, tasks=tasks, max_unreadable=1)
    found, _ = build.build(c, tmp_path / "a", workers=1, keep_stages=True)
    shares = [json.loads(one.read_bytes())["files"] for one in (tmp_path / "a/stages/files/shares/web").iterdir()]
    parts = [[file[0] for file in share].count("large.jsonl") for share in shares]
    assert sum(parts) == 2 and (tasks == 1) == (max(parts) == 2), "its parts are of as many tasks"
    assert disk.stages.count("clean") == 1 + (half == 1 and tasks > 1)
    expected, _ = build.build(config_of(without, middle, tasks=tasks), tmp_path / "b", workers=1)
    assert different_files(tmp_path / "a/web", tmp_path / "b/web") == []
    assert found["stores"] == expected["stores"] and list(found["unreadable"]["web"]) == ["large.jsonl"]
    assert found["subsets"]["web"]["clean"]["bad"] == {"file that cannot be read": 1}


def test_a_command_that_is_killed_before_tasks_read_again_goes_on_with_them(tmp_path, folders, disk, monkeypatch):
    all_of_them, without, middle = folders
    disk.path, disk.stage, disk.begin = f"{all_of_them}/large.jsonl", "clean", middle * 3 // 2
    c, expected = (config_of(one, middle, tasks=8, max_unreadable=1) for one in (all_of_them, without))
    with monkeypatch.context() as patch:
        patch.setattr(build.clean, "_outdated", None)  # raises TypeError
        with pytest.raises(TypeError):
            build.build(c, tmp_path / "a", workers=1)
    build.build(c, tmp_path / "a", workers=1)
    build.build(expected, tmp_path / "b", workers=1)
    assert different_files(tmp_path / "a/web", tmp_path / "b/web") == []


@pytest.mark.parametrize("begin", [0, 1])
def test_a_limit_is_where_it_is_without_the_file(tmp_path, folders, disk, begin):
    """Its first part may have been measured, in another wave; seen red with the size of that."""
    all_of_them, without, middle = folders
    disk.path, disk.stage, disk.begin = f"{all_of_them}/large.jsonl", "limits-0", middle * begin * 3 // 2
    options = {"tasks": 2, "max_unreadable": 1, "max_bytes": 1800}
    found, _ = build.build(config_of(all_of_them, middle, **options), tmp_path / "a", workers=1)
    expected, _ = build.build(config_of(without, middle, **options), tmp_path / "b", workers=1)
    assert different_files(tmp_path / "a/web", tmp_path / "b/web") == []
    assert found["stores"] == expected["stores"] and list(found["unreadable"]["web"]) == ["large.jsonl"]


def test_parts_are_one_file_of_those_that_may_be_left_out(tmp_path):
    chosen = config_of(tmp_path, 99, max_unreadable=1).subsets.web
    parts = [unreadable.File("a.jsonl", "/a.jsonl", 9, begin, begin + 9, whole=18) for begin in (0, 9)]
    error = UnreadableError("a.jsonl cannot be read")
    error.path = "/a.jsonl"
    for part in parts:
        unreadable.note(tmp_path, "web", chosen, [part], error)
    assert list(unreadable.noted(tmp_path, "web")) == ["a.jsonl"] and unreadable.names(tmp_path, "web") == {"a.jsonl"}


@pytest.mark.parametrize("max_bytes", [0, 1800])
def test_where_fewer_may_be_left_out_than_were_they_are_read(tmp_path, folders, disk, monkeypatch, capsys, max_bytes):
    """The storage is well again by then."""
    all_of_them, _, middle = folders
    options = {"tasks": 2, "max_bytes": max_bytes}
    disk.path, disk.stage = f"{all_of_them}/large.jsonl", "limits-0" if max_bytes else "clean"
    with monkeypatch.context() as patch:
        patch.setattr(build.tokenise, "train_tokenizer", None)
        with pytest.raises(TypeError):
            build.build(config_of(all_of_them, middle, max_unreadable=1, **options), tmp_path / "a", workers=1)
    unit = "files/web" if max_bytes else "clean/web"
    one, none = (config_of(all_of_them, middle, max_unreadable=most, **options) for most in (1, 0))
    assert unreadable.names(tmp_path / "a", "web") == {"large.jsonl"} and not plan.read_again(one, tmp_path / "a")
    [(name, why)] = plan.read_again(none, tmp_path / "a").items()
    assert name == unit and why == "files that are left out were 1, max_unreadable is 0"
    assert "stages/unreadable/web" in Made(tmp_path / "a").rows[unit]["outputs"], "removed with it"
    disk.path = ""
    capsys.readouterr()
    found, _ = build.build(none, tmp_path / "a", workers=1)
    assert f"for web ({why})" in capsys.readouterr().err and "unreadable" not in found
    build.build(none, tmp_path / "b", workers=1)
    assert different_files(tmp_path / "a/web", tmp_path / "b/web") == []


def test_a_finished_folder_that_lacks_files_is_none_of_a_recipe_that_allows_fewer(tmp_path, folders, disk):
    all_of_them, _, middle = folders
    disk.path, disk.stage = f"{all_of_them}/large.jsonl", "clean"
    one, two, none = (config_of(all_of_them, middle, tasks=2, max_unreadable=most) for most in (1, 2, 0))
    build.build(one, tmp_path / "a", workers=1)
    build.build(two, tmp_path / "a", workers=1)  # of which no stage is needed
    with pytest.raises(ConfigError, match="subsets.web: files that are left out were 1, max_unreadable is 0"):
        build.build(none, tmp_path / "a", workers=1)
    assert json.loads((tmp_path / "a/data.json").read_bytes())["config"]["subsets"]["web"]["max_unreadable"] == 2
