"""A folder of tasks is looked at before the harness reads it: no file of it expands without end, or includes itself.

A YAML file of some hundred bytes can name a list of lists of lists, each ten times; the harness would build all of it.
What is no YAML, or no task, is the harness's to pass over.
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from k2jax.errors import ConfigError
from k2jax.text import printable

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_BYTES = 2 << 20  # of a file with aliases; the largest of the harness's own has 62 KB
MOST_EXPANDED = 8 << 20  # values and their characters, each alias counted as what it stands for
MOST_TASKS = 100_000  # of a group with those inside, however often; mmlu has 57
MOST_DEEP = 20  # files that include one another, and groups; the harness's own have at most 4
IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by the harness


class _Plain(Loader):
    """Reads YAML without what its tags name: a task's `!function` is code."""


_Plain.add_multi_constructor("", lambda loader, tag, node: None)


def check(folder: Path) -> None:
    """Raises ConfigError that names a file not to be read: one of the folder, or one that such a file includes."""
    depths: dict[Path, int] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        if not IGNORED & set(path.parts):
            _follow(path.resolve(), [], depths)


def check_group(index: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError for a group of the harness's index that is inside itself, or whose groups multiply."""
    counts: dict[str, int] = {}

    def count(group: Any, chain: list[str]) -> int:
        entry = index.get(group) if isinstance(group, str) else None
        members = (entry.cfg or {}).get("task") if entry else None
        if not isinstance(members, list):
            return 1
        if group in chain:
            raise ConfigError(f"--tasks: group {printable(group)} is inside itself, by way of {printable(chain[-1])}")
        if len(chain) > MOST_DEEP:
            raise ConfigError(f"--tasks: group {printable(chain[0])} has groups more than {MOST_DEEP} deep")
        if group not in counts:
            children = [one.get("task", one.get("group")) if isinstance(one, dict) else one for one in members]
            counts[group] = sum(count(child, [*chain, group]) for child in children)
        if counts[group] > MOST_TASKS:
            raise ConfigError(f"--tasks: group {printable(group)} stands for more than {MOST_TASKS:,} tasks")
        return counts[group]

    count(name, [])


def _follow(path: Path, chain: list[Path], depths: dict[Path, int]) -> int:
    """Checks a file that `chain` leads to, and what it includes; returns how many files then stand in one another."""
    if path in chain:
        raise ConfigError(f"--task-dir: {_name(path)} includes itself, by way of {_name(chain[-1])}: take that out")
    if path not in depths and len(chain) < MOST_DEEP:
        depths[path] = 1 + max((_follow(one, [*chain, path], depths) for one in _check_file(path)), default=0)
    if path not in depths or len(chain) + depths[path] > MOST_DEEP:
        raise ConfigError(
            f"--task-dir: {_name((*chain, path)[0])} includes a file that includes another, and so on, more than "
            f"{MOST_DEEP} files deep: write them as fewer"
        )
    return depths[path]


def _check_file(path: Path) -> list[Path]:
    """Checks one file; returns those that it includes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"--task-dir: {_name(path)} is no file, but a pipe, device or folder: take it out")
        data = path.read_bytes()
    except OSError:
        return []  # as the harness, which does not know the task then
    plain = data.replace(b"\0", b"")  # of UTF-16
    try:
        if b"&" in plain and b"*" in plain:
            _check_aliases(path, data)
        found = _Plain(data).get_single_data() if b"include" in plain else None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return []
    named = found.get("include") if isinstance(found, dict) else None
    names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    return [(path.parent / name).resolve() for name in names if "\0" not in name]


def _check_aliases(path: Path, data: bytes) -> None:
    if len(data) > MOST_BYTES:
        raise ConfigError(
            f"--task-dir: {_name(path)} has {len(data):,} bytes, and a file with aliases at most {MOST_BYTES:,}: write "
            "what they stand for, or take it out of the folder"
        )
    sizes: dict[str | None, int] = {}  # of what each anchor names; 0 while it is being read
    inside: list[tuple[str | None, int]] = [(None, 0)]  # lists and maps, each in the one before
    for event in yaml.parse(data, Loader=Loader):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            sizes[anchor] = 0
            inside.append((anchor, 1))
            continue
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(anchor, 1)
            if not size:
                raise ConfigError(f"--task-dir: {_name(path)}: *{anchor[:50]} stands within what it names")
        elif isinstance(event, yaml.ScalarEvent):
            size = sizes[anchor] = 1 + len(event.value)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = inside.pop()
            sizes[anchor] = size
        inside[-1] = (inside[-1][0], inside[-1][1] + size)
        if inside[-1][1] > MOST_EXPANDED:
            raise ConfigError(
                f"--task-dir: {_name(path)}: its aliases stand for more than {MOST_EXPANDED:,} values and characters: "
                "take it out of the folder"
            )


def _name(path: Path) -> str:
    return printable(str(path))
