"""Whether what a source names is whole and training data alone: seen while it is listed, file by file, told in the end.

Hugging Face's shards tell in their names how many they are, its `state.json` names the files beside it, and its folders
may hold a test split beside the training data.
"""

import json
import re
from typing import Any

from fsspec.core import strip_protocol
from fsspec.utils import glob_translate

from k2jax.errors import ConfigError
from k2jax.prepare.sources.stored import patiently
from k2jax.prepare.tally import shown_name

# What stands behind the numbers, up to the first dot, may be another for each shard: older ones have a check sum there.
SHARD = re.compile(r"(.*?)(\d{5,6})-of-(\d{5,6})([^.]*)(.*)", re.DOTALL)
SPLIT = re.compile(r"(train|test|validation|valid|dev)-")
SHOWN = 5  # names in a message

Group = tuple[str, str, str, str]  # the folder, what stands before the numbers, how many there are, what ends the names


class Whole:
    """Of one source: names below its fixed part are given as they are found, `check` raises ConfigError.

    `no_data`, `out` and `linked` are names that are no data, links out of the folder, links to folders.
    """

    def __init__(self, source: str, *, folder: bool):
        self.no_data: list[str] = []
        self.out: list[str] = []
        self.linked: list[str] = []
        self._source, self._folder = source, folder
        self._kind, _, self._where = source.partition(":")
        self._shards: dict[Group, bytearray] = {}  # a bit for each that is there: there may be millions
        self._missing: list[str] = []
        self._splits: dict[str, tuple[str, str]] = {}  # {"train": (what would match it, what ends its names)}
        self._several: tuple[str, list[str]] | None = None  # a DatasetDict's folder, and its splits

    def add(self, name: str) -> None:
        """Data that is there."""
        folder, slash, last = name.rpartition("/")
        found = SHARD.fullmatch(last) if "-of-" in last else None
        if found is None:
            return
        before, number, of, _, ends = found.groups()
        if self._folder and self._kind in ("parquet", "jsonl") and SPLIT.fullmatch(before):
            known = self._splits.setdefault(before[:-1], (folder + slash, ends))
            if known[0] != folder + slash:
                self._splits[before[:-1]] = ("**/", known[1])
        if int(of) < 2:
            return
        group = folder + slash, before, of, ends
        if group not in self._shards:
            self._shards[group] = bytearray(int(of) // 8 + 1)
        if (n := int(number)) <= int(of):
            self._shards[group][n // 8] |= 1 << n % 8

    def beside(self, fs: Any, path: str, name: str) -> None:
        """What stands in a folder and is no data; two of them tell what should be there."""
        folder, slash, last = name.rpartition("/")
        if self._kind != "arrow" or last not in ("state.json", "dataset_dict.json"):
            return
        told = _read(fs, path)
        splits = [one for one in told.get("splits") or [] if isinstance(one, str)]
        if last == "dataset_dict.json" and len(splits) > 1:
            self._several = self._several or (folder + slash, splits)
        for one in told.get("_data_files") or [] if last == "state.json" else []:
            file = one.get("filename") if isinstance(one, dict) else None
            at = f"{path.removesuffix(last)}{file}"
            if isinstance(file, str) and not patiently(lambda at=at: fs.lexists(at)):
                self._missing.append(folder + slash + file)

    def check(self) -> None:
        """Raises ConfigError for the first that is wrong."""
        if self.no_data:
            self._fail(
                f"{_some(self.no_data)} by name no {self._kind} data: take that out, or give a pattern that matches "
                f"the data alone"
            )
        if self.linked:
            self._fail(
                f"{_some(self.linked)} a link to a folder, which is not followed: give its target as a source of its "
                "own, and take the link out or give a pattern that does not go into it"
            )
        if self.out:
            self._fail(f"{_some(self.out)} a link out of its folder: copy the data there, or set follow_links=True")
        at = self._where.rstrip("/") + "/"
        if self._several:
            folder, splits = self._several
            self._fail(
                f"it has the splits {_list(splits)}: give the one to train on, "
                f"{self._kind}:{at}{shown_name(folder + _first(splits))}, or for all of them "
                f"{self._kind}:{at}{shown_name(folder)}*/*.arrow"
            )
        if len(self._splits) > 1:
            split = _first(sorted(self._splits))
            folder, ends = self._splits[split]
            self._fail(
                f"it has the splits {_list(sorted(self._splits))}: give the one to train on, "
                f"{self._kind}:{at}{shown_name(folder)}{split}-*{ends}, or for all of them "
                f"{self._kind}:{at}**/*{ends}"
            )
        if missing := sorted({*self._missing, *self._missing_shards()}):
            self._fail(
                f"{len(missing)} file{'s' * (len(missing) > 1)} of it missing, by the names of the others: "
                f"{_list(missing)}: fetch what is missing, or choose on purpose, by a pattern that it does not match, "
                "such as train-0000[0-3]-of-*"
            )

    def nothing(self) -> None:
        """Raises ConfigError: no file matches."""
        local = self._where.partition("://")[0] in ("file", "local") or "://" not in self._where
        searched = f"; searched: {shown_name(strip_protocol(self._where))}" if local else ""
        self._fail(f"no file matches; check the path and its wildcards{searched}")

    def _fail(self, what: str) -> None:
        raise ConfigError(f"source {self._source!r}: {what}")

    def _missing_shards(self) -> list[str]:
        """A set that is whole only with those of other folders, and has each once, is dealt out over folders.

        What the pattern does not match was left out on purpose.
        """
        pattern = "*" if self._folder else self._where.rpartition("/")[2]
        wanted = re.compile(glob_translate(pattern)).match
        missing: list[str] = []
        over: dict[tuple[str, ...], tuple[int, int]] = {}
        for (_, *rest), bits in self._shards.items():
            number, union = over.get(tuple(rest), (0, 0))
            there = int.from_bytes(bits, "little")
            over[tuple(rest)] = number + there.bit_count(), union | there
        for (folder, before, of, ends), bits in self._shards.items():
            number, union = over[before, of, ends]
            there = int.from_bytes(bits, "little")
            if _is_whole(there, int(of)) or number == int(of) and _is_whole(union, int(of)):
                continue
            first = 1 if there >> int(of) & 1 else 0  # some count from 1
            lost = (n for n in range(first, first + int(of)) if not bits[n // 8] >> n % 8 & 1)
            names = (f"{before}{n:0{len(of)}}-of-{of}{ends}" for n in lost)
            missing += [folder + name for name in names if wanted(name)]
        return missing


def _is_whole(bits: int, of: int) -> bool:
    """All of them, counted from 0 or from 1."""
    return bits in ((1 << of) - 1, (1 << of + 1) - 2)


def _read(fs: Any, path: str) -> dict[str, Any]:
    """A description; {} where it is none, as another tool's of the same name."""
    try:
        found = json.loads(patiently(lambda: fs.cat_file(path)))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first(splits: list[str]) -> str:
    return "train" if "train" in splits else splits[0]


def _list(names: list[str]) -> str:
    return ", ".join(shown_name(name) for name in names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _some(names: list[str]) -> str:
    """For a message: the first names, and what they are to be said of."""
    first = _list(sorted(names))
    return f"{first} is" if len(names) == 1 else f"{len(names)} files ({first}) are each"
