"""What lies below a preparation's stages, and what it was made of: so that a changed recipe redoes what it changes.

A unit is a stage, or the part of it that is one subset's. Of each that was begun there is noted:

    stages/made.json  {unit: {"reads":   {what: value} of keys of the recipe, sources, files
                              "follows": {unit whose output it reads: stamp},
                              "stamp":   drawn when it was begun: what follows it is of this attempt alone
                              "ranks":   [first, stop) of its stages that are its; null: all
                              "stages":  {name: number of tasks}, those that were begun
                              "outputs": files and folders, where {rank} stands for each rank
                              "stale":   it is being removed}}

    stages/redo.json  [stages that a person wanted again, and that have been removed for that]

What is stale is marked so, then its marks of completion go, then its outputs, then its row: killed in between, it is
removed to the end by the next command, and never trusted. It is one file, written whole. What a person wants again is
removed once until the preparation ends: the same command, killed and run again, goes on.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.errors import ConfigError
from k2jax.files import read_json, write_json
from k2jax.prepare.engine import slurm
from k2jax.text import shown

MARKS = ("completions/{rank}", "errors/{rank}.json", "said/{rank}.json")
SHOWN = 60  # characters of a value in a message
MOST_SHOWN = 3  # reasons in a line


class Unit(NamedTuple):
    """A stage, or one subset's part of it ("clean/web"), as a recipe asks for it; made.json has what was begun."""

    reads: dict[str, Any]
    follows: tuple[str, ...] = ()
    ranks: tuple[int, int] | None = None
    outputs: tuple[str, ...] = ()


def remedy(path: Path) -> str:
    """What to do about a damaged file below `stages`: what made it is done again."""
    below = path.parts[path.parts.index("stages") + 1 :] if "stages" in path.parts else ()
    stage = {"duplicates": "deduplicate"}.get(below[0], below[0]) if below else "STAGE"
    return f"prepare again with --redo={stage}"


class Made:
    """The notes of a folder, which need not be there. `redo` are stages that a person wants again, `again` are
    units that are to be made again for another reason (plan.read_again)."""

    def __init__(self, out: Path, redo: Iterable[str] = (), again: dict[str, str] | None = None):
        self._again = again or {}
        self.out, self._path, self._redoing = out, out / "stages" / "made.json", out / "stages" / "redo.json"
        self.rows: dict[str, dict[str, Any]] = read_json(self._path) if self._path.exists() else {}
        self._began = frozenset(read_json(self._redoing) if self._redoing.exists() else ())
        self._redo = frozenset(redo) - self._began

    def stale(self, wanted: dict[str, Unit]) -> dict[str, list[str]]:
        """Of what was begun and is not what is wanted: why. `wanted` has each unit behind those that it follows."""
        found = {name: ["no longer asked for"] for name in self.rows if name not in wanted}
        for name, unit in wanted.items():
            if name in self.rows and (why := self._why(name, unit, found)):
                found[name] = why
        return found

    def _why(self, name: str, unit: Unit, found: dict[str, list[str]]) -> list[str]:
        row = self.rows[name]
        why = [*["it was being removed"] * row["stale"], *changes(row["reads"], unit.reads).values()]
        why += [f"--redo={stage}" for stage in (name, name.partition("/")[0]) if stage in self._redo][:1]
        why += [self._again[name]] if name in self._again else []
        if unit.ranks and row["ranks"] != list(unit.ranks):
            why.append("its tasks have other numbers")
        stamps = {name: self.rows[name]["stamp"] for name in unit.follows if name in self.rows and name not in found}
        others = [name for name in {*unit.follows, *row["follows"]} if stamps.get(name) != row["follows"].get(name)]
        return why + [f"follows {name}" for name in sorted({name.partition("/")[0] for name in others})]

    def remove(self, names: list[str]) -> None:
        """Removes all that these units made."""
        for name in names:
            self.rows[name]["stale"] = True
        self._write()
        if self._redo:
            write_json(self._redoing, sorted(self._began | self._redo))
        for name in names:
            row = self.rows[name]
            ranks = None if row["ranks"] is None else range(*row["ranks"])
            for stage in row["stages"]:
                self.remove_marks(stage, ranks)
            self.remove_outputs(path for output in row["outputs"] for path in _paths(output, ranks))
        for name in names:
            del self.rows[name]
        self._write()

    def end_redo(self) -> None:
        """Once all is there: who wants a stage again then wants it anew."""
        self._redoing.unlink(missing_ok=True)

    def begin(self, units: dict[str, Unit], stage: str = "", tasks: int = 0) -> None:
        """Notes that these units are being made, and by which stage: before that writes anything."""
        before = json.dumps(self.rows)
        for name, unit in units.items():
            follows = {other: self.rows[other]["stamp"] for other in unit.follows}
            new = {"follows": follows, "stamp": secrets.token_hex(8), "stages": {}, "stale": False}
            row = self.rows.setdefault(name, unit._asdict() | new | {"ranks": unit.ranks and list(unit.ranks)})
            row["stages"] |= {stage: tasks} if stage else {}
        if json.dumps(self.rows) != before:
            self._write()

    def done(self, names: list[str]) -> tuple[int, int]:
        """(complete tasks of what is begun of these units, all of those)."""
        marks: dict[str, set[str]] = {}
        complete, num_tasks = 0, 0
        for row in (self.rows[name] for name in names):
            for stage, tasks in row["stages"].items():
                if stage not in marks:
                    folder = self._inside(f"stages/done/{stage}/completions")
                    marks[stage] = set(os.listdir(folder)) if folder.is_dir() else set()
                ranks = range(*(row["ranks"] or [tasks]))
                complete += sum(_name(rank) in marks[stage] for rank in ranks)
                num_tasks += len(ranks)
        return complete, num_tasks

    def _write(self) -> None:
        write_json(self._path, self.rows)

    def remove_marks(self, stage: str, ranks: Iterable[int] | None = None) -> None:
        """The marks of completion of these ranks, None: of all, and what else the engine has noted of them."""
        folder = self._inside(f"stages/done/{stage}")
        slurm.cancel(folder)  # what still runs would write beside the new ones
        if ranks is None:
            _remove(folder)
            return
        for mark in MARKS:
            for path in _paths(mark, ranks):
                _remove(folder / path)

    def remove_outputs(self, paths: Iterable[str]) -> None:
        """Files and folders, below the preparation's, that need not be there; a name may end with `*`."""
        for path in paths:
            self._inside(path)
            for found in sorted(self.out.glob(path)) if "*" in path else [self.out / path]:
                _remove(found)

    def _inside(self, path: str) -> Path:
        """A folder may be from elsewhere: what its notes name is removed nowhere else."""
        if Path(path).is_absolute() or ".." in Path(path).parts or not Path(path).parts:
            raise ConfigError(f"{self._path}: names {shown(path)}, which is not in {self.out}: remove the folder")
        return self.out / path


def _name(rank: int) -> str:
    return f"{rank:05d}"


def _paths(pattern: str, ranks: Iterable[int] | None) -> list[str]:
    return [pattern.replace("{rank}", _name(rank)) for rank in ranks] if "{rank}" in pattern else [pattern]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """{key: "KEY was true, is false"} of each that differs."""
    return {
        key: f"{key} was {_value(was, key)}, is {_value(now, key)}"
        for key in sorted(was | now)
        if (key in was) != (key in now) or was[key] != now[key]
    }


def _value(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "none"
    value = values[key]
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return shown(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def lines(stale: dict[str, list[str]], wanted: dict[str, Unit]) -> list[str]:
    """What is done again and why: a line a stage."""
    by_stage: dict[str, list[str]] = {name.partition("/")[0]: [] for name in [*wanted, *stale]}
    for name in stale:
        by_stage[name.partition("/")[0]].append(name)
    return [f"stage {stage}: {_told(names, stale, wanted)}" for stage, names in by_stage.items() if names]


def _told(names: list[str], stale: dict[str, list[str]], wanted: dict[str, Unit]) -> str:
    again, gone = [name for name in names if name in wanted], [name for name in names if name not in wanted]
    reasons = list(dict.fromkeys(reason for name in again for reason in stale[name]))
    more = f"; {len(reasons) - MOST_SHOWN} more" if len(reasons) > MOST_SHOWN else ""
    of = _subsets(again)
    parts = [f"again{of and f' for {of}'} ({'; '.join(reasons[:MOST_SHOWN])}{more})"] if again else []
    return ", ".join(parts + ([f"removed{' of ' + _subsets(gone) if _subsets(gone) else ''}"] if gone else []))


def _subsets(names: list[str]) -> str:
    return ", ".join(name.partition("/")[2] for name in names if "/" in name)
