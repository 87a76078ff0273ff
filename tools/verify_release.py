#!/usr/bin/env python3
"""Checks a release of a training run, and says what it proves and what not. For strangers: it trusts nobody.

    python verify_release.py RELEASE [--digest SHA256] [--steps all|N] [--replay N] [--replay-chunks N] [--json]

It needs Python 3.11, numpy and pyarrow, and nothing of k2jax, of which it shares no line: it is written from
SPECIFICATION.md, whose sections it names (§). Take it from where you trust, never from the release. It reads, and
writes nothing. Everything in a release is hostile to it: names, numbers, sizes and nesting. From top to bottom:

    1 words     what a check says            5 record    epochs, journal, ledger, checkpoints, branches
    2 reading   files of somebody else       6 data      the rows that were read
    3 order     which row stands where       7 rest      exports, evaluations, gallery, metrics
    4 arrays    what a checkpoint holds      8 replay, and the command

Exit codes: 0 all that was checked holds, 65 something does not, 78 asked for what is not there.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# ---- 1 words ---------------------------------------------------------------------------------------------------------

OK, FAILED, UNCHECKED = "ok", "failed", "not checked"


class Wrong(Exception):
    """Something is not what the release says of it."""


class Unchecked(Exception):
    """It cannot be said: why."""


class Needs(Exception):
    """Another part of the release, which does not hold, would be needed."""


class Result(NamedTuple):
    """What came of one check."""

    name: str
    state: str
    compared: str  # what with what
    count: int  # how many
    found: str  # what does not hold, or why it was not checked; "" else


def shown(text: Any, most: int = 300) -> str:
    """On one line, without what a terminal would obey."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[: 4 * most])
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def must(holds: Any, what: str) -> None:
    """Raises Wrong unless it holds."""
    if not holds:
        raise Wrong(what)


def same(found: Any, expected: Any, what: str) -> None:
    """Raises Wrong, with both, unless they are equal and of one type."""
    if found != expected or type(found) is not type(expected):
        raise Wrong(f"{what} is {shown(found, 90)}, expected {shown(expected, 90)}")


# ---- 2 reading: sizes are limited before anything is read, and types looked at before they are used ------------------

SMALL, LARGE, LINE = 1 << 26, 1 << 28, 1 << 22  # bytes: of a JSON file, of files.json, of a line
STRANGE = "{} is a link, a device, a socket, or no folder that can be read: nothing is read"
HEX = re.compile(r"[0-9a-f]{64}")
OF_A_HUB = re.compile(r"\.gitattributes|\.cache/huggingface/.*")  # what a hub and its client add to a copy


def get(values: Any, key: str, kind: type, where: str) -> Any:
    """A value of an object of JSON."""
    found = values.get(key) if isinstance(values, dict) else None
    must(type(found) is kind, f"{where}: {key} is {shown(found, 60)}, expected {kind.__name__}")
    return found


def number(values: Any, key: str, where: str, low: int = 0, high: int = 1 << 48) -> int:
    """A whole number of [low, high)."""
    found = get(values, key, int, where)
    must(low <= found < high, f"{where}: {key} is {shown(found, 60)}, outside [{low}, {high})")
    return found


def sha(values: Any, key: str, where: str) -> str:
    """A SHA-256 in hex."""
    found = get(values, key, str, where)
    must(HEX.fullmatch(found), f"{where}: {key} is {shown(found, 60)}, expected 64 hex digits")
    return found


def parse(text: bytes, where: str) -> Any:
    """JSON without what two readers could read in two ways: keys that come twice, NaN, infinities."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        must(len(pairs) == len(dict(pairs)), f"{where}: a key comes twice")
        return dict(pairs)

    def none(name: str) -> None:
        raise Wrong(f"{where}: {name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=none)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{where} is no JSON: {error}") from None


def an_object(value: Any, where: str) -> dict:
    must(type(value) is dict, f"{where}: expected an object, found {shown(value, 60)}")
    return value


def canonical(value: Any) -> bytes:
    """§1: the one text of a value of JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


class Release:
    """The folder: its plain files by path, and what several checks need of them, each read once."""

    def __init__(self, root: Path, steps: int | None = None, seed: int = 0):
        self.root, self.steps, self.seed = root, steps, seed
        self.sizes: dict[str, int] = {}
        self.strange: list[str] = []  # what is neither file nor folder that can be read
        self._facts: dict[str, tuple[Any, Exception | None]] = {}
        folders = [""]
        while folders:
            here = folders.pop()
            try:
                with os.scandir(root / here) as entries:
                    folders += [path for entry in entries if (path := self._note(here, entry))]
            except OSError:
                self.strange.append(here)

    def _note(self, folder: str, entry: os.DirEntry) -> str | None:
        """Keeps a file; the path of a folder."""
        path, found = f"{folder}/{entry.name}" if folder else entry.name, entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            return path
        if stat.S_ISREG(found.st_mode):
            self.sizes[path] = found.st_size
        else:
            self.strange.append(path)
        return None

    def fact(self, name: str) -> Any:
        """What FACTS[name] reads; Needs where that, or what it needs in turn, does not hold."""
        if name not in self._facts:
            try:
                self._facts[name] = FACTS[name](self), None
            except (Needs, Unchecked) as error:
                self._facts[name] = None, error
            except Exception as error:  # whatever hostile content makes of it, it is this fact that does not hold
                self._facts[name] = None, Needs(name, says(error))
        value, problem = self._facts[name]
        if problem is not None:
            raise problem
        return value

    def open(self, path: str) -> io.BufferedReader:
        if self.strange:
            raise Needs("files", STRANGE.format(shown(self.strange[0])))
        must(path in self.sizes, f"{shown(path)} is not there")
        number = os.open(self.root / path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        return os.fdopen(number, "rb")

    def bytes(self, path: str, most: int = SMALL) -> bytes:
        must(self.sizes.get(path, 0) <= most, f"{path} has more than {most:,} bytes")
        with self.open(path) as file:
            return file.read(most)

    def json(self, path: str, most: int = SMALL) -> dict:
        return an_object(parse(self.bytes(path, most), path), path)

    def lines(self, path: str) -> Iterator[tuple[str, bytes]]:
        """(where, line) of a file of lines, each with its end."""
        with self.open(path) as file:
            at = 0
            while line := file.readline(LINE):
                at += 1
                must(line.endswith(b"\n"), f"{path}, line {at}: cut off, or longer than {LINE:,} bytes")
                yield f"{path}, line {at}", line

    def below(self, folder: str) -> list[str]:
        """The paths in a folder, without it."""
        return sorted(path[len(folder) + 1 :] for path in self.sizes if path.startswith(folder + "/"))

    @property
    def digest(self) -> str:
        """THE digest of the release, which its publisher prints elsewhere."""
        return hashlib.sha256(self.bytes("files.json", LARGE)).hexdigest()


def says(error: BaseException) -> str:
    """An exception in a line."""
    text = error.args[0] if isinstance(error, (Wrong, Unchecked)) else f"{type(error).__name__}: {error}"
    return shown(text or type(error).__name__)


def read_files(release: Release) -> dict[str, tuple[int, str]]:
    """§2: {path: (bytes, SHA-256)} of files.json; the folder has these files and no others."""
    must(not release.strange, STRANGE.format(shown("".join(release.strange[:1]))))
    values = release.json("files.json", LARGE)
    same(get(values, "format", int, "files.json"), 1, "files.json: format")
    listed = {}
    for path, entry in get(values, "files", dict, "files.json").items():
        parts = path.split("/")
        plain = path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts) and ":" not in parts[0]
        must(plain, f"files.json names {shown(path, 90)}, no plain relative path")
        listed[path] = number(entry, "bytes", path), sha(entry, "sha256", path)
    extra, missing = release.sizes.keys() - listed - {"files.json", "model.sig"}, listed.keys() - release.sizes.keys()
    extra = {path for path in extra if not OF_A_HUB.fullmatch(path)}
    must(not extra, f"{shown(min(extra, default=''))} is in the folder and not in files.json")
    must(not missing, f"{shown(min(missing, default=''))} is in files.json and not in the folder")
    return listed


def check_files(release: Release) -> int:
    """every file's size and SHA-256 with files.json; no other files, no links, no devices"""
    for path, (size, digest) in release.fact("files").items():
        same(release.sizes[path], size, f"{path}: its size")
        with release.open(path) as file:
            same(hashlib.file_digest(file, "sha256").hexdigest(), digest, f"{path}: its SHA-256")
    return len(release.fact("files"))


def check_signature(release: Release) -> int:
    """the manifest in model.sig (OpenSSF model signing) with files.json; not the signature, which needs its library"""
    if "model.sig" not in release.sizes:
        raise Unchecked("there is no model.sig: nobody has signed")
    envelope = get(release.json("model.sig", LARGE), "dsseEnvelope", dict, "model.sig")
    same(envelope.get("payloadType"), "application/vnd.in-toto+json", "model.sig: payloadType")
    payload = base64.b64decode(get(envelope, "payload", str, "model.sig"), validate=True)
    statement = parse(payload, "model.sig: its statement")
    resources = get(get(statement, "predicate", dict, "model.sig"), "resources", list, "model.sig")
    signed = {get(r, "name", str, "model.sig"): sha(r, "digest", "model.sig") for r in resources}
    expected = {path: digest for path, (_, digest) in release.fact("files").items()} | {"files.json": release.digest}
    for path in sorted(signed.keys() | expected.keys()):
        same(signed.get(path), expected.get(path), f"model.sig: the SHA-256 of {shown(path)}")
    of_all = hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources)).hexdigest()
    subjects = get(statement, "subject", list, "model.sig")
    same([s.get("digest") for s in subjects], [{"sha256": of_all}], "model.sig: its subject")
    return len(signed)


# ---- 3 order: §4, the rows of a run as a function of seed, manifest and journal --------------------------------------

ROUNDS, WORD, GOLDEN = 16, (1 << 64) - 1, 0x9E3779B97F4A7C15
MAX_CUTS, MAX_LEFT = 10_000_000, 50_000_000  # segments of a stage; rows left behind: what a run may have


def key_of(*parts: int | str) -> int:
    """§4.1: a 64-bit key."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def mix(key: int, counter: np.ndarray) -> np.ndarray:
    """§4.1: SplitMix64 at `counter`, all arithmetic modulo 2**64."""
    z = counter * np.uint64(GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """§4.2: where a keyed permutation of [0, n) sends each x."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    size, found = (np.uint64(a), np.uint64(b)), np.array(x, np.uint64)
    walking = np.arange(len(found))
    while walking.size:
        halves = [found[walking] // size[1], found[walking] % size[1]]
        for turn in range(ROUNDS):
            mine, other = turn % 2, 1 - turn % 2
            noise = mix(key, halves[other] * np.uint64(ROUNDS) + np.uint64(turn)) >> np.uint64(16)
            halves[mine] = (halves[mine] + noise) % size[mine]
        found[walking] = halves[0] * size[1] + halves[1]
        walking = walking[found[walking] >= n]
    return found.astype(np.int64)


def shares(total: int, weights: list[tuple[str, Fraction]]) -> list[int]:
    """§4.3: `total` in proportion to weights, by largest remainder; ties by name."""
    exact = [total * weight / sum(w for _, w in weights) for _, weight in weights]
    whole = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], weights[i][0]))
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole


class Stage:
    """§4.4: how the rows of one stage are laid out, by offset from its first position."""

    def __init__(self, manifest: dict, index: int, steps: int, carried: dict[str, tuple], salt: tuple[int, ...]):
        stage = manifest["stages"][index]
        self.name, self.length, self.rows_per_step = (stage[k] for k in ("name", "sequence_length", "rows_per_step"))
        self.chunk_steps, self.steps, self.subsets = stage["steps_per_chunk"], steps, stage["subsets"]
        self.sft, self.dpo = is_sft(stage), is_sft(stage) and stage["kind"] == "dpo"
        names = sorted(manifest["stores"])
        self.number = np.array([names.index(s["name"]) for s in self.subsets])
        self.keys = [key_of(manifest["seed"], "windows", index, s["name"]) for s in self.subsets]
        self.shuffle = key_of(manifest["seed"], "rows", index, *salt)
        none = (np.empty(0, np.int64), 0)
        self.streams = [carried.get(s["name"], none) for s in self.subsets]
        self.before = self._cuts(self._chunks(stage, steps))  # [segment, subset]: rows before it
        self.begins = self.before.sum(axis=1)

    def _chunks(self, stage: dict, steps: int) -> np.ndarray:
        """Rows of each subset (columns) in each chunk, a short one last."""
        chunks, short = divmod(steps, self.chunk_steps)
        must(chunks <= MAX_CUTS, f"stage {shown(self.name)}: {chunks:,} chunks")
        rows = [s["rows"] for s in self.subsets]
        if steps != stage["chunks"] * self.chunk_steps:
            weights = [(s["name"], s["windows"] * Fraction(str(s["repeats"]))) for s in self.subsets]
            rows = shares(steps * self.rows_per_step, weights)
        names, last = [s["name"] for s in self.subsets], [0] * len(rows)
        if short:
            last = shares(short * self.rows_per_step, list(zip(names, map(Fraction, rows), strict=True)))
        table = np.zeros((chunks, len(rows)), np.int64)
        if chunks:
            turn = np.empty(chunks, np.int64)  # whose turn it is: chunks ordered by i * GOLDEN modulo 2**64
            turn[np.argsort(np.arange(chunks, dtype=np.uint64) * np.uint64(GOLDEN))] = np.arange(chunks)
            dealt = 0
            for column, (all_rows, in_last) in enumerate(zip(rows, last, strict=True)):
                each, extra = divmod(all_rows - in_last, chunks)
                table[:, column] = each + ((turn - dealt) % chunks < extra)
                dealt += extra
        return np.concatenate([table, [last]]) if short else table

    def _cuts(self, chunks: np.ndarray) -> np.ndarray:
        """Where segments begin: at chunks, and where an epoch of a subset ends inside of one."""
        starts = np.concatenate([np.zeros((1, len(self.subsets)), np.int64), np.cumsum(chunks, axis=0)])
        totals = starts[-1].tolist()
        epochs = sum(total // s["windows"] for total, s in zip(totals, self.subsets, strict=True))
        must(len(chunks) + epochs <= MAX_CUTS, f"stage {shown(self.name)}: {epochs:,} epochs of its subsets")
        found = [starts]
        for column, ((left, following), s) in enumerate(zip(self.streams, self.subsets, strict=True)):
            edges = np.arange(s["windows"], following + totals[column], s["windows"])
            j = np.where(edges <= following, np.searchsorted(left, edges), len(left) + edges - following)
            j = np.unique(j[(j > 0) & (j < totals[column])])
            chunk = np.searchsorted(starts[:, column], j, side="right") - 1
            part, whole = j - starts[chunk, column], chunks[chunk, column]
            found.append(starts[chunk] + part[:, None] * chunks[chunk] // np.maximum(whole, 1)[:, None])
        table = np.concatenate(found)
        return table[np.unique(table.sum(axis=1), return_index=True)[1]]

    def places(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(column of the subset, k in its stream) at some offsets."""
        column, k = np.empty(len(offsets), np.int64), np.empty(len(offsets), np.int64)
        segment = np.searchsorted(self.begins, offsets, side="right") - 1
        for g in np.unique(segment):
            here, first = segment == g, int(self.begins[g])
            key = int(mix(self.shuffle, np.array([g], np.uint64))[0])
            place = permute(offsets[here] - first, int(self.begins[g + 1]) - first, key)
            ends = np.cumsum(self.before[g + 1] - self.before[g])
            c = np.searchsorted(ends, place, side="right")
            column[here], k[here] = c, self.before[g + 1, c] - (ends[c] - place)
        for c, (left, following) in enumerate(self.streams):
            mine = column == c
            j = k[mine]
            k[mine] = following + j - len(left)
            if len(left):
                k[mine] = np.where(j < len(left), left[np.minimum(j, len(left) - 1)], k[mine])
        return column, k

    def rows(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number of the subset, epoch, window) at some offsets."""
        column, k = self.places(offsets)
        epoch, window = np.empty_like(k), np.empty_like(k)
        for c, s in enumerate(self.subsets):
            here = column == c
            epoch[here] = k[here] // s["windows"]
            window[here] = permute(k[here] % s["windows"], s["windows"], self.keys[c])
        return self.number[column], epoch, window

    def left_over(self, unread: list[tuple[int, int]], reached: int) -> dict[str, tuple]:
        """§4.6: {subset: (rows k left behind, the next k)} where the stage stops after offset `reached`."""
        g = int(np.searchsorted(self.begins, reached))
        inside = [(a, min(b, int(self.begins[g]))) for a, b in unread if a < self.begins[g]]
        must(sum(b - a for a, b in inside) <= MAX_LEFT, f"more than {MAX_LEFT:,} rows are left behind")
        offsets = np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in inside)])
        column, k = self.places(offsets)
        found = {}
        for c, s in enumerate(self.subsets):
            (left, following), used = self.streams[c], int(self.before[g, c])
            behind = np.sort(np.concatenate([k[column == c], left[used:]]))
            found[s["name"]] = behind, following + max(0, used - len(left))
        return found


def minus(pieces: list[tuple[int, int]], a: int, b: int) -> list[tuple[int, int]]:
    """A sequence of intervals without what lies in [a, b)."""
    cut = [part for x, y in pieces for part in ((x, min(y, a)), (max(x, b), y))]
    return [(x, y) for x, y in cut if x < y]


class Part:
    """§4.5: the steps of a run under one manifest, after those of the part `before`, which ended after `after`."""

    def __init__(self, manifest: dict, decisions: list[tuple], before: "Part | None" = None, after: int = 0):
        self.manifest, self.before, self.after = manifest, before, after
        stages, at, done = manifest["stages"], 0, 0
        if before:
            stood, made = before.stage_of(after), after
            first, _ = before.steps_of(stood)
            names = [stage["name"] for stage in stages]
            must(stood.name in names, f"stage {shown(stood.name)}, where the run stands, is not in the next manifest")
            at, done = names.index(stood.name), before.done.get(stood.name, 0) + made - first + 1
        self.done = {stages[at]["name"]: done}
        carried, salt = before.left_over(after) if before else {}, (after,) if before else ()
        self.stages = []
        for i, stage in enumerate(stages):
            whole = stage["chunks"] * stage["steps_per_chunk"]
            steps = max(0, whole - done) if i == at else 0 if i < at else whole
            goes_on = {s["name"]: carried[key] for s in stage["subsets"] if (key := self._key(i, s)) in carried}
            self.stages.append(Stage(manifest, i, steps, goes_on, salt))
        sizes = [stage.steps * stage.rows_per_step for stage in self.stages]
        base = before.firsts[-1] if before else 0
        self.firsts = [base + sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.reading = [[(a, a + n)] if n else [] for a, n in zip(self.firsts, sizes, strict=False)]
        for how, a, b in decisions:
            self._decide(how, a, b)
        self.runs = []  # (first step, first position, positions, stage) in the order of reading
        step = after + 1
        self.bounds = []  # (first step, last step) of each stage
        for i, stage in enumerate(self.stages):
            begin = step
            for a, b in self.reading[i]:
                self.runs.append((step, a, b - a, i))
                step += (b - a) // stage.rows_per_step
            self.bounds.append((begin, step - 1))
        self.last = step - 1
        content = {"manifest": manifest_digest(manifest), "intervals": self.reading}
        self.digest = digest_of(content | ({"past": before.digest, "after_step": after} if before else {}))

    def _key(self, i: int, s: dict) -> tuple:
        """Under which a subset goes on where the manifest changes."""
        m = self.manifest
        store = m["stores"][s["name"]]["root_digest"]
        stage = m["stages"][i]
        key = m["seed"], i, s["name"], store, s["windows"], stage["sequence_length"], m["label_shift"]
        return (*key, stage["kind"], stage["too_long"]) if is_sft(stage) else key

    def _decide(self, how: str, a: int, b: int) -> None:
        where = f"journal: {how} of {a}:{b}"
        must(self.firsts[0] <= a < b <= self.firsts[-1], f"{where}: no such positions")
        i = bisect_right(self.firsts, a) - 1
        first, rows = self.firsts[i], self.stages[i].rows_per_step
        must(b <= self.firsts[i + 1] and not (a - first) % rows and not (b - first) % rows, f"{where}: no whole steps")
        rest = minus(self.reading[i], a, b)
        had, has = (sum(y - x for x, y in pieces) for pieces in (self.reading[i], rest))
        must(had - has == b - a, f"{where}: some are skipped already")
        joined: list[tuple[int, int]] = []
        for x, y in [*rest, (a, b)] if how == "defer" else rest:
            if joined and joined[-1][1] == x:
                joined[-1] = joined[-1][0], y
            else:
                joined.append((x, y))
        self.reading[i] = joined

    def of(self, step: int) -> "Part":
        """The part that has a step."""
        return self if not self.before or step > self.after else self.before.of(step)

    def stage_of(self, step: int) -> Stage:
        part = self.of(step)
        must(1 <= step <= part.last, f"step {step}: the run's steps are 1 to {part.last}")
        return part.stages[bisect_left([last for _, last in part.bounds], step)]

    def steps_of(self, stage: Stage) -> tuple[int, int]:
        return self.bounds[self.stages.index(stage)]

    def positions(self, step: int) -> np.ndarray:
        """§4.5: what a step reads."""
        part, rows = self.of(step), self.stage_of(step).rows_per_step
        first_step, a, _, _ = part.runs[bisect_right([run[0] for run in part.runs], step) - 1]
        first = a + (step - first_step) * rows
        return np.arange(first, first + rows)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number of the subset, epoch, window) of each row of a step."""
        part, positions = self.of(step), self.positions(step)
        i = bisect_right(part.firsts, int(positions[0])) - 1
        return part.stages[i].rows(positions - part.firsts[i])

    def left_over(self, step: int) -> dict[tuple, tuple]:
        """§4.6: of every subset of every stage that was begun, where it goes on after a step."""
        found = self.before.left_over(self.after) if self.before else {}
        for i, stage in enumerate(self.stages):
            first, stop = self.firsts[i], self.firsts[i + 1]
            done, still, skipped = [], [], [(first, stop)] if first < stop else []
            for begin, a, n, of in self.runs:
                if of == i:
                    middle = min(a + n, max(a, a + (step + 1 - begin) * stage.rows_per_step))
                    done += [(a, middle)] if a < middle else []
                    still += [(middle, a + n)] if middle < a + n else []
                    skipped = minus(skipped, a, a + n)
            reached = max((b - first for _, b in done + skipped), default=0)
            if reached:
                left = stage.left_over([(a - first, b - first) for a, b in still], reached)
                subsets = self.manifest["stages"][i]["subsets"]
                found |= {self._key(i, s): left[s["name"]] for s in subsets}
        return found

    def chunks(self) -> list[tuple[int, int]]:
        """§4.7: (first step, last step) of each chunk."""
        earlier = [last for _, last in self.before.chunks()] if self.before else []
        ends = [end for end in earlier if end < self.after] + ([self.after] if earlier else [])
        for stage, (first, last) in zip(self.stages, self.bounds, strict=True):
            ends += [min(end + stage.chunk_steps, last + 1) - 1 for end in range(first, last + 1, stage.chunk_steps)]
        return list(zip([1, *(end + 1 for end in ends)], ends, strict=False))

    def tokens(self, step: int) -> int:
        """§4.7: tokens that steps 1 to `step` read."""
        found = self.before.tokens(min(step, self.after)) if self.before else 0
        for stage, (first, last) in zip(self.stages, self.bounds, strict=True):
            found += max(0, min(step, last) - first + 1) * stage.rows_per_step * stage.length
        return found


def manifest_digest(manifest: dict) -> str:
    """§3.2: without the stores' paths."""
    stores = {n: {k: v for k, v in s.items() if k != "path"} for n, s in manifest["stores"].items()}
    return digest_of({**manifest, "stores": stores})


# ---- 4 arrays: §6, what a checkpoint holds ---------------------------------------------------------------------------

WEIGHT = 0x9E3779B1
MAX_NODE, MAX_CHUNK = 1 << 26, 1 << 28  # bytes, decoded
MAX_KEY, MAX_NODES, MAX_DEPTH = 1 << 10, 1 << 16, 8  # bytes of a name; nodes of an index, and levels


def weighted_sum(values: np.ndarray, first: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """§6.1: the part of an array's digest that comes from a block of it which begins at index `first`."""
    index = np.zeros((1,) * len(shape), np.uint32)
    for axis, (begin, size) in enumerate(zip(first, values.shape, strict=True)):
        stride = math.prod(shape[axis + 1 :])
        along = ((np.arange(size, dtype=np.uint64) + np.uint64(begin)) * np.uint64(stride & WORD)).astype(np.uint32)
        index = index + along.reshape((-1,) + (1,) * (len(shape) - axis - 1))
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint32)
    return int((bits * (index * np.uint32(WEIGHT) | np.uint32(1))).sum(dtype=np.uint32))


def combine(digests: dict[str, int]) -> str:
    """§6.2: a checkpoint's digest, of those of its arrays."""
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()


class Cursor:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        must(0 <= n <= len(self.data) - self.at, "a node of the checkpoint's index is cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            [byte] = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise Wrong("a number in the checkpoint's index is too long")

    def varints(self, n: int) -> list[int]:
        must(n <= len(self.data), "a count in the checkpoint's index is too large")
        return [self.varint() for _ in range(n)]

    def texts(self, n: int, middle: int = 0) -> tuple[list[bytes], list[list[int]]]:
        """`n` texts that share their beginnings, and `middle` columns of numbers that stand between."""
        kept, rest = [0, *self.varints(max(0, n - 1))], self.varints(n)
        columns = [self.varints(n) for _ in range(middle)]
        found: list[bytes] = []
        for same_as_before, more in zip(kept, rest, strict=False):
            must(same_as_before + more <= MAX_KEY, "a name in the checkpoint's index is too long")
            found.append((found[-1][:same_as_before] if found else b"") + self.take(more))
        return found, columns


def unpacked(data: bytes, most: int) -> bytes:
    """Zstandard, at most so many bytes."""
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        found = stream.read(most + 1)
    must(len(found) <= most, "what is compressed is larger than it may be")
    return found


class Arrays:
    """§6.3: the arrays of a part of a checkpoint: chunks of Zarr 2, by key in a B+tree of TensorStore's (OCDBT)."""

    def __init__(self, release: Release, folder: str):
        self.release, self.folder, self.nodes = release, folder, 0
        self.places: dict[str, bytes | tuple[str, int, int]] = {}  # values, or (file, offset, bytes)
        body = self._node(f"{folder}/manifest.ocdbt", 0, None, 0x0CDB3A2A)
        body.take(16)
        kind, _, _ = body.varints(3)
        must(kind == 0, f"{folder}: the index has several manifests, of which this cannot read")
        body.take(1)
        if body.varint():
            body.take(4)
        files = self._files(body, "")
        n = body.varint()
        must(n > 0, f"{folder}: the index is empty")
        body.varints(n)
        heights = body.take(n)
        ids, offsets, lengths = (body.varints(n) for _ in range(3))
        self._walk(files, ids[-1], offsets[-1], lengths[-1], b"", heights[-1])

    def _node(self, path: str, offset: int, length: int | None, magic: int) -> Cursor:
        length = self.release.sizes.get(path, 0) if length is None else length
        with self.release.open(path) as file:
            file.seek(offset)
            head = Cursor(file.read(min(length, MAX_NODE)))
        same(int.from_bytes(head.take(4), "big"), magic, f"{path}: its first bytes")
        same(int.from_bytes(head.take(8), "little"), len(head.data), f"{path}: the length of a node")
        version, packed = head.varints(2)
        must(version == 0 and packed in (0, 1), f"{path}: version {version}, compression {packed}")
        body = head.data[head.at : -4]
        return Cursor(unpacked(body, MAX_NODE) if packed else body)

    def _files(self, body: Cursor, base: str) -> list[tuple[str, str]]:
        """(path, what the paths below begin with) of each data file that a node names."""
        n = body.varint()
        paths, [bases] = body.texts(n, 1)
        return [(base + p.decode(), base + p[:k].decode()) for p, k in zip(paths, bases, strict=True)]

    def _walk(self, files: list, i: int, offset: int, length: int, prefix: bytes, height: int) -> None:
        self.nodes += 1
        must(height < MAX_DEPTH and self.nodes < MAX_NODES, f"{self.folder}: the index is too large")
        path, base = files[i]
        body = self._node(f"{self.folder}/{path}", offset, length, 0x0CDB20DE)
        same(body.take(1)[0], height, f"{self.folder}: the height of a node")
        own, n = self._files(body, base), body.varint()
        if height:
            keys, [common] = body.texts(n, 1)
            columns = [body.varints(n) for _ in range(3)]
            for key, shared, *place in zip(keys, common, *columns, strict=True):
                self._walk(own, *place, prefix + key[:shared], height - 1)
            return
        keys, _ = body.texts(n)
        lengths, kinds = body.varints(n), body.varints(n)
        ids, offsets = (body.varints(sum(kinds)) for _ in range(2))
        outside = iter(zip(ids, offsets, strict=True))
        for key, size, kind in zip(keys, lengths, kinds, strict=True):
            if kind:
                i, at = next(outside)
                self.places[(prefix + key).decode()] = f"{self.folder}/{own[i][0]}", at, size
            else:
                self.places[(prefix + key).decode()] = body.take(size)

    def value(self, key: str, most: int) -> bytes:
        must(key in self.places, f"{self.folder} has no {shown(key)}")
        place = self.places[key]
        if isinstance(place, bytes):
            return place
        path, offset, size = place
        must(size <= most, f"{self.folder}: {shown(key)} has {size:,} bytes")
        with self.release.open(path) as file:
            file.seek(offset)
            found = file.read(size)
        same(len(found), size, f"{path}: bytes of {shown(key)}")
        return found

    def blocks(self, name: str, shape: list[int], dtype: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index of the first element, values) of each chunk of an array, found to be of this shape and type."""
        about = parse(self.value(f"{name}/.zarray", SMALL), f"{self.folder}: {shown(name)}")
        kind = np.dtype(dtype).newbyteorder("<")
        for key, expected in {"shape": shape, "dtype": kind.str, "order": "C", "filters": None}.items():
            same(about.get(key), expected, f"{self.folder}: {key} of {shown(name)}")
        chunk, how = get(about, "chunks", list, name), about.get("compressor")
        must(len(chunk) == len(shape) and all(type(c) is int and c > 0 for c in chunk), f"{shown(name)}: its chunks")
        must(how is None or how.get("id") == "zstd", f"{shown(name)}: compressor {shown(how)}")
        size = math.prod(chunk) * kind.itemsize
        must(size <= MAX_CHUNK, f"{shown(name)}: a chunk of {size:,} bytes")
        counts = [-(-s // c) for s, c in zip(shape, chunk, strict=True)]
        must(math.prod(counts) <= len(self.places), f"{self.folder}: chunks of {shown(name)} are missing")
        for at in np.ndindex(*counts):
            data = self.value(f"{name}/{'.'.join(map(str, at)) or '0'}", MAX_CHUNK)
            data = unpacked(data, size) if how else data
            same(len(data), size, f"{self.folder}: bytes of a chunk of {shown(name)}")
            first = tuple(i * c for i, c in zip(at, chunk, strict=True))
            values = np.frombuffer(data, kind).reshape(chunk)
            yield first, values[tuple(slice(0, s - f) for s, f in zip(shape, first, strict=True))]


def is_moment(name: str) -> bool:
    return name.startswith(("mu/", "nu/", "clips/"))


def described(meta: dict, name: str) -> tuple[list[int], str]:
    """(shape, type) of an array, as the meta has them."""
    found = get(get(meta, "arrays", dict, "meta"), name, list, "meta: arrays")
    must(len(found) == 2 and found[1] in ("float32", "int32", "uint32"), f"meta: {shown(name)} is {shown(found)}")
    must(isinstance(found[0], list) and all(type(n) is int and 0 < n < 1 << 40 for n in found[0]), f"{shown(name)}")
    return found[0], found[1]


def check_arrays(release: Release) -> int:
    """digest of every array of every checkpoint, computed from its bits, with those that its meta records"""
    count = 0
    for folder, meta in release.fact("checkpoints").items():
        for part in ("params", "moments"):
            names = [name for name in meta["digests"] if is_moment(name) == (part == "moments")]
            if not release.below(f"{folder}/{part}") and part == "moments":
                continue  # left out; check_checkpoints says whether it may be
            arrays = Arrays(release, f"{folder}/{part}") if names else None
            for name in names:
                shape, dtype = described(meta, name)
                blocks = arrays.blocks(name, shape, dtype)
                found = sum(weighted_sum(values, first, tuple(shape)) for first, values in blocks) & 0xFFFFFFFF
                same(found, meta["digests"][name], f"{folder}: the digest of array {shown(name)}")
                count += 1
    return count


# ---- 5 record: what the run wrote down -------------------------------------------------------------------------------

EPOCH = {"number": int, "after_step": int, "run": str, "config": dict, "changes": dict, "time": str}
EPOCH_KEYS = {*EPOCH, "manifest", "origin", "previous", "format", "sha256"}
GENESIS, MAX_ENTRIES = "0" * 64, 10_000  # entries of a journal
FREE = """mesh log watchdog checkpoint eval allow_drift data.root data.tokenizer data.eos data.verify data.threads
    data.workers data.prefetch compiler stability.rollback stability.rerun_every stability.attention_every model.remat
    model.rings model.unroll model.attention model.pipeline loss.block stages.*.microbatches""".split()


def read_epochs(release: Release, run: str = "run") -> list[dict]:
    """§3.1: each whole, and following from the one before."""
    names, epochs, before = release.below(f"{run}/epochs"), [], None
    must(names, f"{run}/epochs is empty")
    for i, name in enumerate(names, 1):
        where = f"{run}/epochs/{name}"
        same(name, f"{i:04d}.json", f"{run}/epochs: file {i}")
        epoch = release.json(where)
        same(set(epoch), EPOCH_KEYS, f"{where}: its keys")
        for key, kind in EPOCH.items():
            get(epoch, key, kind, where)
        same([epoch["format"], epoch["number"]], [1, i], f"{where}: format and number")
        content = {key: value for key, value in epoch.items() if key not in ("format", "sha256")}
        same(epoch["sha256"], digest_of(content), f"{where}: its SHA-256")
        same(epoch["previous"], before and before["sha256"], f"{where}: the epoch before")
        number(epoch, "after_step", where, before["after_step"] if before else 0)
        if epoch["manifest"] is not None:
            check_manifest(epoch["manifest"], epoch["config"], where)
        epochs, before = [*epochs, epoch], epoch
    return epochs


def check_manifest(manifest: Any, config: dict, where: str) -> None:
    """§3.2: counts that fit each other, shares that follow from the repeats, stages and seed of the configuration."""
    where = f"{where}: manifest"
    same(get(manifest, "format", int, where), 1, f"{where}: format")
    number(manifest, "vocab_size", where, 1)
    number(manifest, "eos_id", where)
    same(number(manifest, "seed", where, 0, 1 << 64), get(config, "seed", int, where), f"{where}: seed")
    sha(manifest, "tokenizer_sha256", where)
    shift = get(manifest, "label_shift", str, where)
    must(shift in ("next", "inside"), f"{where}: label_shift {shown(shift)}")
    stores = get(manifest, "stores", dict, where)
    for name, store in stores.items():
        sha(store, "root_digest", f"{where}: {shown(name)}")
        tokens = number(store, "num_tokens", where)
        number(store, "num_train_tokens", where, 0, tokens + 1)
        number(store, "num_documents", where)
    stages, planned = get(manifest, "stages", list, where), get(config, "stages", list, where)
    same(len(stages), len(planned), f"{where}: the number of stages")
    for stage, plan in zip(stages, planned, strict=True):
        get(stage, "name", str, where)
        for key in ("name", "sequence_length", "rows_per_step", "steps_per_chunk", "chunks"):
            must(key in stage and key in plan, f"{where}: a stage has no {key}")
            same(stage[key], plan[key], f"{where}: {key} of a stage")
        length, rows, _, _ = (
            number(stage, key, where, 1) for key in ("sequence_length", "rows_per_step", "steps_per_chunk", "chunks")
        )
        subsets = get(stage, "subsets", list, where)
        mix = {get(s, "name", str, where): get(s, "repeats", float, where) for s in subsets}
        same(mix, {name: float(r) for name, r in plan["mix"].items()}, f"{where}: the mix of {shown(stage['name'])}")
        must(len(mix) == len(subsets) and all(0 < r < 1e9 for r in mix.values()), f"{where}: a subset comes twice")
        check_kind(stage, plan, where)
        for s in subsets:
            store = get(stores, s["name"], dict, where)
            train = get(store, "num_train_tokens", int, where)
            if is_sft(stage):
                check_packed(s, store, length, where)
            else:
                same(number(s, "windows", where, 1), (train - (shift == "next")) // length, f"{where}: windows")
        weights = [(s["name"], s["windows"] * Fraction(str(s["repeats"]))) for s in subsets]
        total = stage["chunks"] * stage["steps_per_chunk"] * rows
        must(total < 1 << 48, f"{where}: {total:,} rows")
        same([number(s, "rows", where) for s in subsets], shares(total, weights), f"{where}: rows of the subsets")


def is_sft(stage: dict) -> bool:
    return "kind" in stage and stage["kind"] in ("sft", "dpo")


def check_kind(stage: dict, plan: dict, where: str) -> None:
    """§3.2: of a stage and of the configuration's."""
    found = stage["kind"] if "kind" in stage else "pretrain"
    same(found, plan.get("kind", "pretrain"), f"{where}: kind of {shown(stage['name'])}")
    if is_sft(stage):
        same(get(stage, "too_long", str, where), plan.get("too_long"), f"{where}: too_long of {shown(stage['name'])}")
        same(number(stage, "packing", where), 1, f"{where}: packing of {shown(stage['name'])}")


def check_packed(s: dict, store: dict, length: int, where: str) -> None:
    """§3.2: a subset of an sft stage: so many rows can hold so many tokens, and each has a conversation."""
    rows, there, tokens = (number(s, key, where, 1) for key in ("windows", "conversations", "tokens"))
    left_out, _ = number(s, "left_out", where), number(s, "cut", where)
    must(rows <= there and tokens <= rows * length, f"{where}: windows of {shown(s['name'])}")
    must(there + left_out <= store["num_documents"], f"{where}: conversations of {shown(s['name'])}")
    must(tokens <= store["num_train_tokens"], f"{where}: tokens of {shown(s['name'])}")


def check_epochs(release: Release) -> int:
    """every epoch's digest and that of the one before; its manifest's counts and shares with its configuration"""
    return len(release.fact("epochs"))


def decisions_of(entry: dict) -> list[tuple[str, int, int]]:
    """(how, first position, stop) of what an entry of the journal changes in the order."""
    if entry["kind"] not in ("skip", "defer", "rollback"):
        return []
    pairs = entry.get("ranges") if entry["kind"] == "rollback" else [entry.get("positions")]
    good = isinstance(pairs, list) and all(isinstance(p, list) and [type(n) for n in p] == [int, int] for p in pairs)
    how = entry.get("how") if entry["kind"] == "rollback" else entry["kind"]
    must(good and how in ("skip", "defer"), f"journal: {shown(entry)}")
    return [(how, a, b) for a, b in pairs]


def order_of(epochs: list[dict], journal: list[dict]) -> Part:
    """§4.5: the order of a run, as epochs and journal have it."""
    groups: list[list[dict]] = []
    for epoch, following in zip(epochs, [*epochs[1:], None], strict=True):
        if epoch["manifest"] is None or (following and following["after_step"] <= epoch["after_step"]):
            continue
        if groups and manifest_digest(groups[-1][-1]["manifest"]) == manifest_digest(epoch["manifest"]):
            groups[-1].append(epoch)
        else:
            groups.append([epoch])
    order = None
    for group in groups:
        numbers = {epoch["number"] for epoch in group}
        decided = [one for entry in journal if entry.get("epoch") in numbers for one in decisions_of(entry)]
        order = Part(group[-1]["manifest"], decided, order, group[0]["after_step"] if order else 0)
    must(order, "the run has no data")
    return order


class Orders:
    """Orders as they were, by how many epochs and entries of the journal there were."""

    def __init__(self, epochs: list[dict], journal: list[dict]):
        self.epochs, self.journal = epochs, journal
        self.at = lru_cache(maxsize=64)(lambda epochs, entries: order_of(self.epochs[:epochs], self.journal[:entries]))

    @property
    def now(self) -> Part:
        return self.at(len(self.epochs), len(self.journal))


def read_lines(release: Release, path: str) -> list[dict]:
    lines = release.lines(path) if path in release.sizes else ()
    return [an_object(parse(line, where), where) for where, line in lines]


def read_journal(release: Release) -> Orders:
    """§5: the journal, and the orders that its decisions lead from and to."""
    epochs, entries = release.fact("epochs"), read_lines(release, "run/journal.jsonl")
    must(len(entries) <= MAX_ENTRIES, f"run/journal.jsonl has {len(entries):,} entries")
    orders = Orders(epochs, entries)
    for i, entry in enumerate(entries):
        where = f"journal, entry {i + 1}"
        get(entry, "kind", str, where)
        if decisions_of(entry) or "order_before" in entry:
            then = number(entry, "epoch", where, 1, len(epochs) + 1)
            for key, entries_then in (("order_before", i), ("order_after", i + 1)):
                same(entry.get(key), orders.at(then, entries_then).digest, f"{where}: {key}")
            decided_at = number(entry, "at_step", where)
            for _, a, _ in decisions_of(entry):
                must(a >= 0 and decided_at <= orders.at(then, i).last, f"{where}: at step {decided_at}")
    _ = orders.now
    return orders


def check_journal(release: Release) -> int:
    """data order before and after every decision of the journal, computed from seed and manifest, with its digests"""
    return len(release.fact("journal").journal)


ROW_KEYS = {"step": int, "batch": str, "loss": str, "grad_norm": str, "applied": bool, "outlier": bool}
SFT_KEYS = {"supervised_tokens": int, "padding_tokens": int}  # more, of steps of an sft or dpo stage
RECORD_KEYS = {"first_step", "last_step", "checkpoint", "order", "config", "steps", "num_rows", "previous", "record"}


class Ledger(NamedTuple):
    """Of a run or a branch: {step: row}, and the records."""

    rows: dict[int, dict]
    records: list[dict]

    def checkpoint(self, step: int) -> str | None:
        """The digest of the checkpoint that it records for a step."""
        return next((r["checkpoint"] for r in self.records if r["last_step"] == step), None)


def read_rows(release: Release, folder: str, first: int, last: int | None) -> dict[int, dict]:
    """§5.1: the rows of some steps, each once and in order."""
    found: dict[int, dict] = {}
    for name in release.below(f"{folder}/ledger"):
        if not re.fullmatch(r"chunk-\d{5,}\.jsonl", name):
            same(name, "records.jsonl", f"{folder}/ledger: a file")
            continue
        for where, line in release.lines(f"{folder}/ledger/{name}"):
            row = an_object(parse(line, where), where)
            keys = ROW_KEYS | SFT_KEYS if SFT_KEYS.keys() & row.keys() else ROW_KEYS
            same({key: type(value) for key, value in row.items()}, keys, f"{where}: its keys and types")
            must(HEX.fullmatch(row["batch"]), f"{where}: batch {shown(row['batch'])}")
            for key in ("loss", "grad_norm"):
                must(re.fullmatch("[0-9a-f]{8}", row[key]), f"{where}: {key} {shown(row[key])}")
            if first <= row["step"] <= (last or row["step"]):
                same(row["step"], first + len(found), f"{where}: step")
                found[row["step"]] = row
    return found


def read_ledger(release: Release, folder: str = "run", pieces: list | None = None) -> Ledger:
    """§5.2: the chain recomputed from genesis to the last record."""
    rows: dict[int, dict] = {}
    for piece, first, last in pieces or [(folder, 1, None)]:
        rows |= read_rows(release, piece, first, last)
    records, previous, made = read_lines(release, f"{folder}/ledger/records.jsonl"), GENESIS, 0
    must(records, f"{folder}/ledger/records.jsonl has no record")
    for i, record in enumerate(records, 1):
        where = f"{folder}: record {i}"
        same(set(record), RECORD_KEYS, f"{where}: its keys")
        last = number(record, "last_step", where, 0, 1 << 48)
        must(last > made or i == 1, f"{where}: step {last} comes after {made}")
        same([record["first_step"], record["num_rows"]], [made + 1, last - made], f"{where}: first step and rows")
        hashed = hashlib.sha256()
        for step in range(made + 1, last + 1):
            must(step in rows, f"{where}: there is no row of step {step}")
            hashed.update(canonical(rows[step]) + b"\n")
        same(record["steps"], hashed.hexdigest(), f"{where}, steps {made + 1} to {last}: the SHA-256 of their rows")
        same(record["previous"], previous, f"{where}: the record before")
        content = {key: value for key, value in record.items() if key != "record"}
        same(record["record"], digest_of(content), f"{where}: its own SHA-256")
        sha(record, "checkpoint", where)
        previous, made = record["record"], last
    return Ledger(rows, records)


def check_ledger(release: Release) -> int:
    """the chain of records from genesis to the last, each recomputed from the rows of its steps and the one before"""
    return len(release.fact("ledger").records)


def read_checkpoints(release: Release) -> dict[str, dict]:
    """§6.2: {folder: meta} of every checkpoint, of the run and of branches, each found whole."""
    found = {}
    for path in sorted(release.sizes):
        match = re.fullmatch(r"(run/(?:branches/\d+/)?checkpoints/(\d+))/meta/meta\.json", path)
        if not match:
            continue
        folder, meta = match[1], release.json(path)
        recorded = meta.pop("meta_sha256", None)
        same(recorded, digest_of(meta), f"{path}: its SHA-256")
        same([meta.get("format"), meta.get("layout")], [2, 1], f"{path}: format and layout")
        same(number(meta, "step", path), int(match[2]), f"{path}: step")
        digests, arrays = get(meta, "digests", dict, path), get(meta, "arrays", dict, path)
        same(digests.keys(), arrays.keys(), f"{path}: the arrays that have digests")
        for name in digests:
            number(digests, name, path, 0, 1 << 32)
        same(sha(meta, "digest", path), combine(digests), f"{path}: digest of the digests of its arrays")
        same(release.json(f"{folder}/data/metadata"), get(meta, "data", dict, path), f"{folder}: its data part")
        found[folder] = meta
    return found


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """§3.3: {"stages.0.name": ...}."""
    nested = isinstance(values, list) and values and isinstance(values[0], dict)
    if not nested and not isinstance(values, dict):
        return {prefix: values}
    pairs = ((str(i), v) for i, v in enumerate(values)) if nested else values.items()
    return {k: v for key, value in pairs for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}


def config_digest(config: dict) -> str:
    """§3.3: of what the run computes."""
    free = re.compile("|".join(key.replace(".", r"\.").replace("*", r"[^.]*") for key in FREE))
    fixed = {k: v for k, v in flat(config).items() if not any(free.fullmatch(k[:i]) for i in stops(k))}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def stops(key: str) -> list[int]:
    """Where the beginnings of a key end: of "a.b" 1 and 3."""
    return [match.start() for match in re.finditer(r"\.|$", key)]


def check_checkpoints(release: Release) -> int:
    """every checkpoint's meta: its digests; with the ledger's record, epoch, configuration, order, tokens, parent"""
    orders, metas = release.fact("journal"), release.fact("checkpoints")
    check_belonging(release, orders)
    for folder, meta in metas.items():
        branch = re.match(r"run/branches/\d+", folder)
        ledger = release.fact("branches")[branch[0]] if branch else release.fact("ledger")
        step, where = meta["step"], folder
        records = [r for r in ledger.records if r["last_step"] <= step]
        record = records[-1] if records and records[-1]["last_step"] == step else None
        must(record, f"{where}: the ledger has no record of step {step}")
        belongs = {"checkpoint": meta["digest"], "order": meta["data"].get("order")}
        belongs["config"] = meta.get("config_digest")
        for key, value in belongs.items():
            same(record[key], value, f"{where}: {key} in the ledger's record")
        before = records[-2] if len(records) > 1 else None
        parent = before and {"step": before["last_step"], "digest": before["checkpoint"]}
        same(meta.get("parent"), parent, f"{where}: its parent")
        epochs = release.fact("epochs")
        named = get(meta, "epoch", dict, where)
        epoch = epochs[number(named, "number", where, 1, len(epochs) + 1) - 1]
        same(named, {"number": epoch["number"], "digest": epoch["sha256"], "run": epoch["run"]}, f"{where}: its epoch")
        for key, config in (("its epoch's", epoch["config"]), ("its own", get(meta, "config", dict, where))):
            same(meta.get("config_digest"), config_digest(config), f"{where}: digest of {key} configuration")
        if epoch["manifest"] is None:
            continue
        same(meta.get("manifest_digest"), manifest_digest(epoch["manifest"]), f"{where}: manifest_digest")
        order = orders.at(epoch["number"], number(meta["data"], "journal", where, 0, len(orders.journal) + 1))
        same(meta["data"]["order"], order.digest, f"{where}: digest of the data order")
        same(meta["data"].get("next_step"), step + 1, f"{where}: next_step")
        same(meta.get("tokens_seen"), order.tokens(step), f"{where}: tokens_seen")
        tokenizer = hashlib.sha256(release.bytes("run/tokenizer.json", LARGE)).hexdigest()
        same(epoch["manifest"]["tokenizer_sha256"], tokenizer, f"{where}: SHA-256 of the tokenizer")
    return len(metas)


def check_belonging(release: Release, orders: Orders) -> None:
    """Orders and configurations of all records, also of checkpoints that are left out, are ones that the run had."""
    for record in release.fact("ledger").records:
        where, step = f"run: the record of step {record['last_step']}", record["last_step"]
        epoch = [e for e in release.fact("epochs") if e["after_step"] < max(step, 1)][-1]
        same(record["config"], config_digest(epoch["config"]), f"{where}: config")
        if epoch["manifest"] is not None:
            entries = range(len(orders.journal) + 1)
            had = any(record["order"] == orders.at(epoch["number"], n).digest for n in reversed(entries))
            must(had or not step, f"{where}: the run never had order {shown(record['order'], 70)}")


CSV = ["stage", "step", "tokens", "loss", "digest", "bytes", "optimizer_state"]


def check_release(release: Release) -> int:
    """release.json and checkpoints.csv with manifest, journal, ledger, folders: chunks, steps, tokens, checkpoints"""
    about, ledger, order = release.json("release.json"), release.fact("ledger"), release.fact("journal").now
    where, epochs = "release.json", release.fact("epochs")
    last = ledger.records[-1]["last_step"]
    chunks = [chunk for chunk in order.chunks() if chunk[0] <= last]
    branches = sorted(int(folder.rsplit("/", 1)[1]) for folder in release.fact("branches"))
    expected = {"format": 1, "run": epochs[-1]["run"], "name": epochs[-1]["config"].get("name"), "step": last}
    expected |= {"num_steps": order.last, "tokens": order.tokens(last), "chunks": len(chunks), "branches": branches}
    for key, value in expected.items():
        same(about.get(key), value, f"{where}: {key}")
    if about.get("data") == "digests":
        rows = [(row.get("step"), row.get("batch")) for row in read_lines(release, "data/digests.jsonl")]
        known = [(step, row["batch"]) for step, row in sorted(ledger.rows.items()) if step <= last]
        must(rows == known, "data/digests.jsonl has not the ledger's digests")
    else:
        same(about.get("data"), "tokens", f"{where}: data")
    listed = get(about, "checkpoints", list, where)
    same([one.get("step") for one in listed], [r["last_step"] for r in ledger.records], f"{where}: its checkpoints")
    metas, there = release.fact("checkpoints"), set()
    table = list(csv.reader(io.StringIO(release.bytes("checkpoints.csv").decode())))
    same(table[:1], [CSV], "checkpoints.csv: its first line")
    same(len(table) - 1, len(listed), "checkpoints.csv: its lines")
    for one, line in zip(listed, table[1:], strict=True):
        step = one["step"]
        where = f"release.json, step {step}"
        stage = order.stage_of(step).name if step else None
        for key, value in {"tokens": order.tokens(step), "stage": stage, "digest": ledger.checkpoint(step)}.items():
            same(one.get(key), value, f"{where}: {key}")
        path, moments = one.get("path"), one.get("optimizer_state")
        if path is not None:
            must(path == f"run/checkpoints/{step}" and path in metas, f"{where}: there is no checkpoint {shown(path)}")
            there.add(path)
        same(moments, bool(path and release.below(f"{path}/moments")), f"{where}: optimizer_state")
        row = dict(zip(CSV, line, strict=True))
        size = sum(release.sizes[f"{path}/{name}"] for name in release.below(path)) if path else None
        loss = struct.unpack(">f", bytes.fromhex(ledger.rows[step]["loss"]))[0] if step else None
        for key, value in {**one, "loss": loss, "bytes": size}.items():
            if key in row:
                check_cell(row[key], value, f"checkpoints.csv, step {step}: {key}")
    extra = {folder for folder in metas if folder.startswith("run/checkpoints/")} - there
    must(not extra, f"{shown(min(extra, default=''))} is not in release.json")
    return len(listed) + len(expected)


def check_cell(text: str, value: Any, what: str) -> None:
    """A cell of a table: numbers as they are, losses as the float32 that they are, nothing for none."""
    if isinstance(value, float):
        same(struct.pack(">f", float(text)), struct.pack(">f", value), what)
    else:
        same(text.lower(), "" if value is None else str(value).lower(), what)


def read_branches(release: Release) -> dict[str, Ledger]:
    """§5.3: {folder: ledger} of every roll-back of the journal, each chain recomputed."""
    entries = [e for e in release.fact("journal").journal if e["kind"] == "rollback"]
    folders = sorted({path.split("/")[2] for path in release.sizes if path.startswith("run/branches/")})
    same(folders, sorted(f"{number(e, 'branch', 'journal', 1):02d}" for e in entries), "run/branches: the folders")
    found, journal = {}, release.fact("journal").journal
    for entry in entries:
        folder = f"run/branches/{entry['branch']:02d}"
        same(release.json(f"{folder}/branch.json"), entry, f"{folder}/branch.json")
        known = read_lines(release, f"{folder}/journal.jsonl")
        same(known, journal[: journal.index(entry)], f"{folder}/journal.jsonl: its entries")
        pieces, last = [], None
        for later in entries:
            if later["branch"] >= entry["branch"] and (last is None or later["at_step"] < last):
                pieces.append((f"run/branches/{later['branch']:02d}", later["at_step"] + 1, last))
                last = later["at_step"]
        found[folder] = read_ledger(release, folder, [*pieces, ("run", 1, last)])
    return found


def check_branches(release: Release) -> int:
    """every roll-back of the journal with its branch: entry, journal as it was, chain of its ledger"""
    return len(release.fact("branches"))


# ---- 6 data: the rows that were read ---------------------------------------------------------------------------------

COLUMNS = ["step", "row", "position", "subset", "epoch", "window", "token_ids", "documents"]
MARKS = "marks"  # a column more, of rows of conversations
MAX_GROUP = 1 << 31  # bytes of a row group, decoded
KNOWN_DOCUMENTS = 1 << 20  # starts of documents that are kept, to be compared between rows


def batch_digest(tokens: np.ndarray) -> str:
    """§7.1: of a batch, uint32 (rows, length)."""
    lanes = np.zeros(8, np.uint32)
    for index, row in enumerate(tokens.astype("<u4")):
        lanes += np.frombuffer(hashlib.sha256(struct.pack("<Q", index) + row.tobytes()).digest(), "<u4")
    return lanes.astype("<u4").tobytes().hex()


class Chunk:
    """§7.2: a file of rows, `rows` a step and `length` ids a row, of which row groups are read as they are needed."""

    def __init__(self, release: Release, path: str, first: int, last: int, rows: int, length: int, sft: bool):
        self.path, self.first, self.rows, self.length = path, first, rows, length
        must(path in release.sizes, f"{path} is not there")
        limits = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}
        self.file = pq.ParquetFile(release.open(path), **limits)
        about = self.file.metadata
        same(self.file.schema_arrow.names, COLUMNS + [MARKS] * sft, f"{path}: its columns")
        same(about.num_rows, (last - first + 1) * rows, f"{path}: its rows")
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        for group in groups:
            columns = [group.column(i) for i in range(group.num_columns)]
            ids = next(c for c in columns if c.path_in_schema.startswith("token_ids"))
            same(ids.num_values, group.num_rows * length, f"{path}: token ids in a row group")
            size = sum(c.total_uncompressed_size for c in columns)
            must(size <= MAX_GROUP, f"{path}: a row group of {size:,} bytes")
        self.ends = np.cumsum([group.num_rows for group in groups])
        self.group = lru_cache(maxsize=2)(self.file.read_row_group)

    def step(self, step: int) -> pa.Table:
        a, pieces = (step - self.first) * self.rows, []
        b = a + self.rows
        for g in range(int(np.searchsorted(self.ends, a, side="right")), len(self.ends)):
            begin = int(self.ends[g - 1]) if g else 0
            if begin >= b:
                break
            table = self.group(g)
            pieces.append(table.slice(max(0, a - begin), b - max(a, begin)))
        return pa.concat_tables(pieces).combine_chunks()


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().to_numpy(zero_copy_only=False)


class Data:
    """What was found of the released rows, in one pass: the first thing wrong, by check."""

    def __init__(self) -> None:
        self.steps = self.digests = self.parts = 0
        self.of_all = 0  # steps that are released
        self.wrong: dict[str, str] = {}
        self.starts: dict[tuple, tuple] = {}
        self.once: dict[tuple, str] = {}  # conversations of an epoch, and where they were seen
        self.bare: set[str] = set()  # subsets in which a document begins without the end of another before it
        self.inside: dict[str, str] = {}  # subsets in which a document goes on after an end


def read_data(release: Release) -> Data:
    """§7: the released rows of all steps, or of those drawn, each looked at once."""
    order, ledger, data = release.fact("journal").now, release.fact("ledger"), Data()
    listed = release.json("data/chunks.json")
    chunks = {get(c, "first_step", int, "chunks.json"): c for c in get(listed, "chunks", list, "data/chunks.json")}
    last = ledger.records[-1]["last_step"]
    numbered = {first: (i, end) for i, (first, end) in enumerate(order.chunks())}
    wanted = range(1, last + 1)
    if release.steps is not None and release.steps < last:
        wanted = sorted(random.Random(f"{release.digest} {release.seed}").sample(wanted, release.steps))
    check_chunk_list(listed, chunks, order, last, release)
    chunk = None
    for step in wanted:
        part, stage = order.of(step), order.stage_of(step)
        first = max(begin for begin in chunks if begin <= step)
        if chunk is None or chunk.first != first:
            i, end = numbered[first]
            length = stage.length + (part.manifest["label_shift"] == "next")
            path = f"data/chunk_{i:05d}.parquet"
            chunk = Chunk(release, path, first, end, stage.rows_per_step, length, stage.sft)
        look_at(data, step, chunk.step(step), part, length, ledger.rows[step]["batch"])
    data.of_all = last
    for name, where in data.inside.items():
        if name not in data.bare:
            data.wrong.setdefault("documents", f"{where}: a document goes on after its end")
    return data


def check_chunk_list(listed: dict, chunks: dict[int, dict], order: Part, last: int, release: Release) -> None:
    """chunks.json with the run's chunks."""
    manifest = order.manifest
    expected = {"format": 1, "data": manifest_digest(manifest), "order": order.digest}
    expected |= {"num_chunks": len(order.chunks()), "num_steps": order.last}
    expected |= {key: manifest[key] for key in ("tokenizer_sha256", "vocab_size", "eos_id", "label_shift")}
    expected["subsets"] = {name: store["root_digest"] for name, store in manifest["stores"].items()}
    sizes = ("name", "sequence_length", "rows_per_step")
    expected["stages"] = [{key: stage[key] for key in sizes} for stage in manifest["stages"]]
    for key, value in expected.items():
        same(listed.get(key), value, f"data/chunks.json: {key}")
    for i, (first, end) in enumerate(order.chunks()):
        must(first in chunks or first > last, f"data/chunks.json: there is no chunk of steps {first} to {end}")
        if first not in chunks:
            continue
        stage, path = order.stage_of(first), f"data/chunk_{i:05d}.parquet"
        rows = (end - first + 1) * stage.rows_per_step
        ids = rows * (stage.length + (order.of(first).manifest["label_shift"] == "next"))
        size, digest = release.fact("files")[path]
        about = {"file": path[5:], "bytes": size, "sha256": digest, "stage": stage.name, "first_step": first}
        about |= {"last_step": end, "rows": rows, "token_ids": ids, "steps_in_ledger": min(end, last) - first + 1}
        for key, value in about.items():
            same(chunks[first].get(key), value, f"data/chunks.json, chunk {i}: {key}")


def look_at(data: Data, step: int, table: pa.Table, part: Part, length: int, recorded: str) -> None:
    """One step's rows: where they stand, their batch's digest, their documents."""
    data.steps += 1
    names = np.array(sorted(part.manifest["stores"]), object)
    number, epoch, window = part.rows(step)
    columns = {"step": np.full(len(window), step), "row": np.arange(len(window)), "position": part.positions(step)}
    columns |= {"subset": names[number], "epoch": epoch, "window": window}
    for name, expected in columns.items():
        found = column(table, name)
        if not np.array_equal(found, expected):
            row = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
            told = f"step {step}, row {row}: {name} is {shown(found[row])}, the order has {shown(expected[row])}"
            data.wrong.setdefault("order", told)
            break
    tokens = numbers(table, "token_ids", length, part.manifest["vocab_size"])
    sft = part.stage_of(step).sft
    marks = numbers(table, MARKS, length, 2 * length + 2) if sft else None
    if tokens is None or (sft and marks is None):
        data.wrong.setdefault("batches", f"step {step}: its rows are not of {length} ids of the vocabulary")
        return
    if (found := batch_digest(np.concatenate([tokens, marks], axis=1) if sft else tokens)) != recorded:
        told = f"step {step}: the released rows have digest {found[:12]}, the ledger says {recorded[:12]}"
        data.wrong.setdefault("batches", told)
    data.digests += 1
    try:
        if sft:
            look_at_conversations(data, step, table, tokens, marks, part)
        else:
            look_at_documents(data, step, table, tokens, part)
    except Wrong as error:
        data.wrong.setdefault("documents", str(error))


def numbers(table: pa.Table, name: str, length: int, below: int) -> np.ndarray | None:
    """A column of lists as uint32 (rows, length); None where they are not so long, or a number is not below `below`."""
    lists = table[name].combine_chunks()
    fits = lists.null_count == 0 and np.array_equal(np.diff(lists.offsets.to_numpy()), np.full(len(table), length))
    found = lists.flatten().to_numpy(zero_copy_only=False)
    if not fits or found.dtype.kind != "u" or found.max(initial=0) >= below:
        return None
    return found.reshape(-1, length).astype(np.uint32)


def look_at_conversations(
    data: Data, step: int, table: pa.Table, tokens: np.ndarray, marks: np.ndarray, part: Part
) -> None:
    """§7.4: a row's conversations follow each other, are whole, as its marks number them, and one of them is learned;
    none stands twice in an epoch of the steps looked at, and behind them are zeros. Of a dpo stage each is a pair: its
    marks number two, both with something that is learned."""
    subsets, epochs, length = column(table, "subset"), column(table, "epoch").tolist(), part.stage_of(step).length
    for row, parts in enumerate(table["documents"].to_pylist()):
        at, where = 0, f"step {step}, row {row}"
        expected, learned = np.zeros(tokens.shape[1], np.uint32), marks[row] & 1 == 1
        for i, one in enumerate(parts or []):
            start, stop = one["start"], one["stop"]
            must(start == at < stop <= length and one["start_in_document"] == 0, f"{where}: conversation {i}")
            expected[start:stop], at = i + 1, stop
            if part.stage_of(step).dpo:
                half = start + int((marks[row, start:stop] >> 1 == 2 * i + 1).sum())
                expected[start:half], expected[half:stop] = 2 * i + 1, 2 * i + 2
                both = learned[start + 1 : half].any() and learned[half + 1 : stop].any()
                must(both, f"{where}: half of pair {i} is not there, or nothing in it is learned")
            key = (id(part), part.stage_of(step).name, subsets[row], epochs[row], one["id"], one["source"])
            before = data.once.setdefault(key, where) if len(data.once) < KNOWN_DOCUMENTS else data.once.get(key, where)
            must(before == where, f"{where}: conversation {i} stands in {before}, too, in the same epoch")
        must(np.array_equal(marks[row] >> 1, expected), f"{where}: its marks do not number its conversations")
        must(not tokens[row, at:].any() and not marks[row, at:].any(), f"{where}: padding is not zero")
        of_one = expected[1:] == expected[:-1]
        must((learned[1:] & of_one).any(), f"{where}: nothing in it is learned")
        data.parts += len(parts or [])


def look_at_documents(data: Data, step: int, table: pa.Table, tokens: np.ndarray, part: Part) -> None:
    """§7.3: a row's parts of documents follow each other and fill it, and say the same of a document as other rows."""
    eos, stride = part.manifest["eos_id"], part.stage_of(step).length
    subsets, windows = column(table, "subset"), column(table, "window").tolist()
    for row, parts in enumerate(table["documents"].to_pylist()):
        at, name, where = 0, subsets[row], f"step {step}, row {row}"
        for i, one in enumerate(parts or []):
            start, stop, skipped = one["start"], one["stop"], one["start_in_document"]
            must(start == at < stop and skipped >= 0 and (i == 0 or skipped == 0), f"{where}: document part {i}")
            begin = (part.manifest["stores"][name]["root_digest"], windows[row] * stride + start - skipped)
            if len(data.starts) < KNOWN_DOCUMENTS or begin in data.starts:
                same((one["id"], one["source"]), data.starts.setdefault(begin, (one["id"], one["source"])), where)
            if i and tokens[row, start - 1] != eos:
                data.bare.add(name)
            if (tokens[row, start : stop - 1] == eos).any():
                data.inside.setdefault(name, where)
            at = stop
        same(at, tokens.shape[1], f"{where}: where its documents end")
        data.parts += len(parts or [])


def of_data(release: Release, name: str, count: str) -> int:
    """What one check found in the pass over the rows."""
    if release.json("release.json").get("data") == "digests":
        raise Unchecked("no rows are released, only the digests that the ledger has")
    data = release.fact("rows")
    must(name not in data.wrong, data.wrong.get(name, ""))
    return getattr(data, count)


def check_rows(release: Release) -> int:
    """the files of released rows with chunks.json and the run's chunks"""
    return of_data(release, "rows", "steps")


def check_order(release: Release) -> int:
    """subset, epoch, window and position of every row of these steps, computed anew, with the released rows"""
    return of_data(release, "order", "steps")


def check_batches(release: Release) -> int:
    """digests of these steps' batches, computed from the released token ids, with the ledger's"""
    return of_data(release, "batches", "digests")


def check_documents(release: Release) -> int:
    """the documents of these rows: parts that fill each row, ends in their places, the same in every row"""
    return of_data(release, "documents", "parts")


# ---- 7 rest: what was made of checkpoints ----------------------------------------------------------------------------

TYPES = {"F32": ("<u4", "float32"), "BF16": ("<u2", "bfloat16"), "F16": ("<u2", "float16")}
# §8.2: {tensor: (our array, how many of its dimensions, after the layers, are summed over)}; of a model that has an
# array of OTHERS, that one.
TENSORS = {
    "model.embed_tokens.weight": ("embed_VD", 0),
    "model.norm.weight": ("final_norm_D", 0),
    "lm_head.weight": ("head_DV", 1),
    "input_layernorm.weight": ("layers.attention_norm_LD", 0),
    "post_attention_layernorm.weight": ("layers.mlp_norm_LD", 0),
    "self_attn.q_norm.weight": ("layers.q_norm_LH", 0),
    "self_attn.k_norm.weight": ("layers.k_norm_LH", 0),
    "self_attn.q_proj.weight": ("layers.wq_LDNH", 1),
    "self_attn.k_proj.weight": ("layers.wk_LDKH", 1),
    "self_attn.v_proj.weight": ("layers.wv_LDKH", 1),
    "self_attn.o_proj.weight": ("layers.wo_LNHD", 2),
    "mlp.gate_proj.weight": ("layers.w_gate_LDF", 1),
    "mlp.up_proj.weight": ("layers.w_up_LDF", 1),
    "mlp.down_proj.weight": ("layers.w_down_LFD", 1),
    "self_attn.q_proj.bias": ("layers.bq_LNH", 0),
    "self_attn.k_proj.bias": ("layers.bk_LKH", 0),
    "self_attn.v_proj.bias": ("layers.bv_LKH", 0),
    "post_feedforward_layernorm.weight": ("layers.mlp_out_norm_LD", 0),
}
OTHERS = {
    "post_attention_layernorm.weight": ("layers.attention_out_norm_LD", 0),
    "self_attn.q_norm.weight": ("layers.q_norm_LNH", 0),
    "self_attn.k_norm.weight": ("layers.k_norm_LKH", 0),
}
SUMMED = {**dict(TENSORS.values()), **dict(OTHERS.values())}


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def tensors_of(release: Release, folder: str) -> dict[str, Tensor]:
    """§8.1: the tensors of an export, from the headers of its files, which they fill."""
    found = {}
    for name in release.below(folder):
        if not name.endswith(".safetensors"):
            continue
        path = f"{folder}/{name}"
        with release.open(path) as file:
            length = int.from_bytes(file.read(8), "little")
            must(length <= min(SMALL, release.sizes[path] - 8), f"{path}: a header of {length:,} bytes")
            header, at = parse(file.read(length), path), 0
        header.pop("__metadata__", None)
        for tensor, place in header.items():
            dtype, shape, offsets = (get(place, k, t, path) for k, t in
                                     (("dtype", str), ("shape", list), ("data_offsets", list)))  # fmt: skip
            must(dtype in TYPES and tensor not in found, f"{path}: {shown(tensor)} is of type {shown(dtype)}, or twice")
            must(all(type(n) is int and n > 0 for n in shape), f"{path}: the shape of {shown(tensor)}")
            end = at + math.prod(shape) * np.dtype(TYPES[dtype][0]).itemsize
            same(offsets, [at, end], f"{path}: the place of {shown(tensor)}")
            found[tensor] = Tensor(path, dtype, shape, 8 + length + at, 8 + length + end)
            at = end
        same(8 + length + at, release.sizes[path], f"{path}: the end of its tensors")
    return found


def read_exports(release: Release) -> dict[str, dict]:
    """{folder: certificate}, each of a checkpoint of the ledger, and of the release's list."""
    listed, found = get(release.json("release.json"), "exports", list, "release.json"), {}
    folders = sorted({"/".join(path.split("/")[:2]) for path in release.sizes if path.startswith("exports/")})
    same(sorted(get(one, "path", str, "release.json: exports") for one in listed), folders, "release.json: exports")
    for one in listed:
        folder, step = one["path"], number(one, "step", "release.json: exports")
        tokens = release.fact("journal").now.tokens(step)
        same([one.get("revision"), folder], [f"step{step}-tokens{tokens}", f"exports/{one['revision']}"], "exports")
        parity = release.json(f"{folder}/parity.json")
        recorded = parity.pop("certificate_sha256", None)
        same(recorded, digest_of(parity), f"{folder}/parity.json: its SHA-256")
        of, where = get(parity, "checkpoint", dict, folder), f"{folder}/parity.json: its checkpoint"
        same(number(of, "step", where), step, f"{where}'s step")
        same(of.get("digest"), release.fact("ledger").checkpoint(step), f"{where}'s digest")
        found[folder] = parity
    return found


def check_exports(release: Release) -> int:
    """each export's certificate with the ledger's checkpoint; its files and tensors with the certificate"""
    for folder, parity in release.fact("exports").items():
        files, tensors = get(parity, "files", dict, folder), get(parity, "tensors", dict, folder)
        found = tensors_of(release, folder)
        here = set(release.below(folder)) - {"parity.json", "README.md"}
        weights = {tensor.path[len(folder) + 1 :] for tensor in found.values()}
        same(sorted(here), sorted(files.keys() | weights), f"{folder}: its files")
        for name in files:
            same(release.fact("files")[f"{folder}/{name}"][1], files[name], f"{folder}/{name}: its SHA-256")
        same(sorted(found), sorted(tensors), f"{folder}: its tensors")
        for name, tensor in found.items():
            record, where = get(tensors, name, dict, folder), f"{folder}: tensor {shown(name)}"
            about = {"file": tensor.path[len(folder) + 1 :], "dtype": tensor.dtype, "shape": tensor.shape}
            same({key: record.get(key) for key in about}, about, where)
            same(record.get("sha256"), sha_of_tensor(release, tensor), f"{where}: its SHA-256")
    return len(release.fact("exports"))


def sha_of_tensor(release: Release, tensor: Tensor) -> str:
    hashed, left = hashlib.sha256(), tensor.end - tensor.begin
    with release.open(tensor.path) as file:
        file.seek(tensor.begin)
        while left and (block := file.read(min(left, 1 << 24))):
            hashed.update(block)
            left -= len(block)
    return hashed.hexdigest()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """§8.2: bits of float32 values as another type: to the nearest, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == "F32":
        return bits
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def check_weights(release: Release) -> int:
    """every tensor of every export, in every bit, with the arrays of its checkpoint, rounded"""
    count, without = 0, []
    for folder, parity in release.fact("exports").items():
        checkpoint = f"run/checkpoints/{parity['checkpoint']['step']}"
        meta = release.fact("checkpoints").get(checkpoint)
        if meta is None:
            without.append(folder)
            continue
        arrays, found = Arrays(release, f"{checkpoint}/params"), tensors_of(release, folder)
        by_array: dict[str, dict[int | None, Tensor]] = {}
        expected = {name.removeprefix("params/") for name in meta["arrays"] if name.startswith("params/")}
        names = TENSORS | {theirs: one for theirs, one in OTHERS.items() if one[0] in expected}
        for name, tensor in found.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
            ours, _ = names.get(match[2] if match else name, (None, 0))
            must(ours and bool(match) == ours.startswith("layers."), f"{folder}: no tensor is named {shown(name)}")
            by_array.setdefault(ours, {})[int(match[1]) if match else None] = tensor
        same(sorted(by_array), sorted(expected), f"{folder}: the arrays that it has")
        for ours, tensors in by_array.items():
            compare_array(release, folder, arrays, meta, ours, tensors)
        count += len(found)
    if without:
        raise Unchecked(f"{len(without)} export(s), such as {without[0]}, are of checkpoints that are not released")
    return count


def compare_array(release: Release, folder: str, arrays: Arrays, meta: dict, ours: str, tensors: dict) -> None:
    shape, dtype = described(meta, f"params/{ours}")
    stacked, summed = ours.startswith("layers."), SUMMED[ours]
    same(sorted(tensors), list(range(shape[0])) if stacked else [None], f"{folder}: the layers of {ours}")
    inner = shape[1:] if stacked else shape
    for first, values in arrays.blocks(f"params/{ours}", shape, dtype):
        layers = range(first[0], first[0] + len(values)) if stacked else [None]
        place = first[1:] if stacked else first
        for i, layer in enumerate(layers):
            tensor, block = tensors[layer], values[i] if stacked else values
            # Theirs is (out..., in...), ours (in..., out...): the same numbers with the two groups changed round.
            theirs = [*inner[summed:], *inner[:summed]]
            flat = [math.prod(inner)] if ours != "embed_VD" else theirs
            flat_shape = [math.prod(inner[summed:]), math.prod(inner[:summed])] if summed else flat
            same(tensor.shape, flat_shape, f"{folder}: the shape of {ours}")
            stored = np.memmap(release.root / tensor.path, TYPES[tensor.dtype][0], "r", tensor.begin, tuple(theirs))
            back = np.moveaxis(stored, range(-summed, 0), range(summed)) if summed else stored
            part = back[tuple(slice(f, f + n) for f, n in zip(place, block.shape, strict=True))]
            equal = np.array_equal(part, rounded(np.ascontiguousarray(block), tensor.dtype))
            of = f"{ours}, layer {layer}" if stacked else ours
            must(equal, f"{folder}: {of} is not what the checkpoint holds")


def check_evaluations(release: Release) -> int:
    """every evaluation's name with its content, its checkpoint with the ledger's, its samples with their digest"""
    names = [name for name in release.below("run/evals") if name != "lock"]
    results = [name for name in names if name.endswith(".json")]
    samples = set()
    for name in results:
        where = f"run/evals/{name}"
        match, result = re.fullmatch(r"(\d+)/([A-Za-z0-9_-]+)\.json", name), release.json(where)
        must(match, f"{where}: its name")
        same(get(result, "format", int, where), 1, f"{where}: format")
        identity = {key: result.get(key) for key in ("task", "version", "settings", "seed", "checkpoint")}
        task = re.sub(r"[^A-Za-z0-9_-]", "_", get(result, "task", str, where))
        same(match[2], f"{task}-{digest_of(identity)[:12]}", f"{where}: its name")
        same(number(result, "step", where), int(match[1]), f"{where}: step")
        known = sha(result, "checkpoint", where) in recorded(release, result["step"])
        must(known, f"{where}: {result['checkpoint'][:12]} is no checkpoint of step {result['step']}")
        of = get(result, "samples", dict, where)
        same(of.get("file"), f"{match[2]}.samples.jsonl", f"{where}: its samples")
        path = f"run/evals/{match[1]}/{match[2]}.samples.jsonl"
        same(release.fact("files").get(path, (0, None))[1], of.get("sha256"), f"{path}: its SHA-256")
        same(sum(1 for _ in release.lines(path)), number(of, "count", where), f"{path}: its lines")
        samples.add(path)
    extra = {f"run/evals/{name}" for name in names if name not in results} - samples
    must(not extra, f"{shown(min(extra, default=''))} belongs to no evaluation")
    return len(results)


def check_gallery(release: Release) -> int:
    """every text of the gallery: its checkpoint's digest with the ledger's"""
    count = 0
    for name in release.below("run/gallery"):
        if name == "lock":
            continue
        where = f"run/gallery/{name}"
        match, values = re.fullmatch(r"(\d+)\.json", name), release.json(where, LARGE)
        must(match, f"{where}: its name")
        same([values.get("format"), values.get("step")], [1, int(match[1])], f"{where}: format and step")
        for checkpoint, entries in get(values, "checkpoints", dict, where).items():
            must(checkpoint in recorded(release, int(match[1])), f"{where}: {shown(checkpoint)} is no checkpoint of it")
            must(type(entries) is list, f"{where}: its texts")
            count += len(entries)
    return count


def recorded(release: Release, step: int) -> set[str]:
    """The digests of the checkpoints of a step: the run's, and those that roll-backs left in branches."""
    ledgers = [release.fact("ledger"), *release.fact("branches").values()]
    return {r["checkpoint"] for ledger in ledgers for r in ledger.records if r["last_step"] == step}


def check_metrics(release: Release) -> int:
    """loss, gradient norm and decision of every row of the metrics with the ledger's, in every bit"""
    ledger, found = release.fact("ledger"), 0
    for name in release.below("run/metrics"):
        for where, line in release.lines(f"run/metrics/{name}"):
            row, found = parse(line, where), found + 1
            step = number(row, "step", where)
            same(step, found, f"{where}: step")
            recorded = ledger.rows.get(step)
            must(recorded, f"{where}: the ledger has no step {step}")
            for key in ("loss", "grad_norm"):
                exact = struct.unpack(">f", bytes.fromhex(recorded[key]))[0]
                same(row.get(key), exact if math.isfinite(exact) else None, f"{where}: {key}")
            for key in ("applied", "outlier"):
                same(row.get(key), recorded[key], f"{where}: {key}")
    same(found, len(ledger.rows), "run/metrics: its rows")
    return found


def check_launches(release: Release) -> int:
    """the launches in environment.json with their own digest; a prediction with the journal that checkpoints knew"""
    values = release.json("run/environment.json")
    launches = get(values, "launches", list, "run/environment.json")
    same(values.get("sha256"), digest_of(launches), "run/environment.json: its SHA-256")
    if "run/prediction.json" in release.sizes:
        found, journal = digest_of(release.json("run/prediction.json")), release.fact("journal").journal
        places = [i for i, e in enumerate(journal) if e["kind"] == "predict" and e.get("digest") == found]
        must(places, "run/prediction.json: its digest is not in the journal")
        for folder, meta in release.fact("checkpoints").items():
            knew = number(meta["data"], "journal", folder)
            must(knew > places[0], f"run/prediction.json: it was made after {folder}, which does not know it")
    return len(launches)


# ---- 8 replay, and the command ---------------------------------------------------------------------------------------

CLOSE = 1e-3  # relative: on other devices sums are added in another order, and that explains no more


def drawn(text: str, n: int, of: int) -> list[int]:
    """§9: numbers of [0, of) that nobody can choose who makes the release."""
    found: list[int] = []
    for i in range(100 * n):
        number = hashlib.sha256(f"{text} {i}".encode()).digest()[:8]
        one = int.from_bytes(number, "big") % of
        found += [one] if one not in found and len(found) < min(n, of) else []
    return sorted(found)


def challenges(release: Release, steps: int, chunks: int) -> list[tuple[int, int]]:
    """§9: (first step, how many): single steps, and whole stretches between two checkpoints that are released."""
    ledger, metas, text = release.fact("ledger"), release.fact("checkpoints"), f"{release.digest} {release.seed}"
    last = ledger.records[-1]["last_step"]
    found = [(step + 1, 1) for step in drawn(f"{text} steps", steps, last)]
    whole = []
    for record in ledger.records:
        before, after = (f"run/checkpoints/{step}" for step in (record["first_step"] - 1, record["last_step"]))
        begins = record["first_step"] == 1 and before not in metas or release.below(f"{before}/moments")
        whole += [(record["first_step"], record["num_rows"])] if begins and after in metas else []
    must(whole or not chunks, "no two checkpoints with optimizer state are released that follow each other")
    return found + [whole[i] for i in drawn(f"{text} chunks", chunks, len(whole) or 1)]


def check_replay(release: Release, steps: int, chunks: int, say: Callable[[str], None]) -> int:
    """steps drawn after the release's digest, run again by k2jax: batch, loss, gradient norm, arrays of checkpoints"""
    if not steps and not chunks:
        raise Unchecked("not asked for: --replay=N for steps, --replay-chunks=N for checkpoints, with k2jax installed")
    count = 0
    for first, number in challenges(release, steps, chunks):
        say(f"running again: {number} step(s) from {first}")
        # -P: a release that one stands in brings no modules.
        command = [sys.executable, "-P", "-m", "k2jax.replay", f"--workdir={release.root / 'run'}", f"--step={first}"]
        child = subprocess.run([*command, f"--steps={number}", "--json"], capture_output=True, text=True, check=False)
        told = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if "No module named" in told:
            raise Unchecked("k2jax is not installed here")
        must(child.returncode == 0, f"steps from {first}: {told}")
        lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
        found = [parse(line.encode(), "what k2jax.replay says") for line in lines]
        same([one.get("step") for one in found], [*range(first, first + number)], "the steps that were run again")
        for one in found:
            near = one.get("bits") is True or get(one, "apart", float, "replay") < CLOSE
            must(one.get("batch") is True and near, f"step {one['step']}: {shown(one)}")
        must(number == 1 or found[-1].get("arrays") is not None, f"steps from {first}: no arrays were compared")
        count += number
    return count


def check_digest(release: Release, published: str | None) -> int:
    """the digest of files.json, which names every other file's, with the one that was published"""
    if published is None:
        raise Unchecked(f"none was given: compare {release.digest} with what its publisher says elsewhere (--digest)")
    same(release.digest, published.lower(), "the release's digest")
    return 1


FACTS = {
    "files": read_files, "epochs": read_epochs, "journal": read_journal, "ledger": read_ledger,
    "branches": read_branches, "checkpoints": read_checkpoints, "rows": read_data, "exports": read_exports,
}  # fmt: skip
CHECKS: dict[str, Callable[[Release], int]] = {
    "files": check_files, "signature": check_signature, "epochs": check_epochs, "journal": check_journal,
    "ledger": check_ledger, "branches": check_branches, "checkpoints": check_checkpoints, "arrays": check_arrays,
    "release": check_release, "metrics": check_metrics, "rows": check_rows, "order": check_order,
    "batches": check_batches, "documents": check_documents, "exports": check_exports, "weights": check_weights,
    "evaluations": check_evaluations, "gallery": check_gallery, "launches": check_launches,
}  # fmt: skip
NEVER = (
    "that weights are those that were saved, beyond 32-bit sums of each array, which find damage and can be forged: a "
    "published digest shows it, and --replay of a step that begins from them",
    "that losses and gradient norms are what training gave: whoever computes the whole chain anew is found by a "
    "published digest or by --replay alone",
    "that a checkpoint came of the steps before it: --replay-chunks shows it for those that it runs to",
    "evaluation scores, gallery texts, samples and logits of certificates: run them again; that they name the right "
    "checkpoint and were not changed since is what is checked",
    "held-out losses, metrics other than loss and gradient norm, goodput, launches, costs, prediction, spikes, cards: "
    "the digest of the release covers them, the ledger does not",
    "who the documents are: their tokens are in the ledger, their names and sources are the publisher's word",
    "that conversations share rows as the packing has it, which follows from lengths in the stores: that each is whole "
    "and once in an epoch is checked",
    "rows of branches: their digests are in the branches' ledgers, the rows are not released",
    "who made the release: the signature needs the library model-signing and the maker's key",
)


def verify(
    release: Release, published: str | None = None, steps: int = 0, chunks: int = 0, say: Callable = print
) -> list[Result]:
    """All checks, in order; the last runs so many steps and chunks again."""
    checks = {**CHECKS, "digest": lambda r: check_digest(r, published)}
    checks["replay"] = lambda r: check_replay(r, steps, chunks, say)
    words = {"digest": check_digest, "replay": check_replay}
    results = []
    for name, check in checks.items():
        compared = (words.get(name, check).__doc__ or "").strip()
        try:
            count = check(release)
            result = Result(name, OK if count else UNCHECKED, compared, count, "" if count else "there is none")
        except Unchecked as error:
            result = Result(name, UNCHECKED, compared, 0, says(error))
        except Needs as error:
            needed, problem = error.args
            own = needed == name
            found = problem if own else f"{needed} would be needed, and does not hold"
            result = Result(name, FAILED if own else UNCHECKED, compared, 0, found)
        except Exception as error:  # hostile content: whatever it makes of a check, the check has failed
            result = Result(name, FAILED, compared, 0, says(error))
        results.append(result)
        say(f"{result.state:<12} {name:<12} {result.count or '':>9} {result.found or result.compared}")
    return results


def not_proven(release: Release, results: list[Result]) -> list[str]:
    """What a reader must not take from this, however well all of it holds."""
    found, states = [f"{r.name}: {r.found}" for r in results if r.state != OK], {r.name: r.state for r in results}
    if states["ledger"] == OK:
        ledger = release.fact("ledger")
        if loose := max(ledger.rows, default=0) - ledger.records[-1]["last_step"]:
            found.append(f"{loose:,} rows of the ledger after its last record: no record closes over them")
    data = release.fact("rows") if states["batches"] == OK else None
    if data and data.steps < data.of_all:
        share = (1 - data.steps / data.of_all) * 100
        found.append(f"rows of {data.of_all - data.steps:,} of {data.of_all:,} steps: one changed step is missed with "
                     f"{share:.1f}%; --steps=all looks at all")  # fmt: skip
    return [*found, *NEVER]


def limit_memory(gib: float) -> None:
    """So that what a hostile file unpacks to ends this program with a line, and not the machine."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), hard))
    except (ImportError, ValueError, OSError):
        pass  # not on this system


def steps_option(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks a release of a training run, trusting nobody.")
    parser.add_argument("release", type=Path, metavar="RELEASE", help="its folder")
    parser.add_argument("--digest", metavar="SHA256", help="of the release, as its publisher printed it elsewhere")
    parser.add_argument("--steps", type=steps_option, default="all", metavar="N",
                        help="rebuild the batches of N steps drawn at random (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, beside the release's digest")
    parser.add_argument("--replay", type=int, default=0, metavar="N", help="run N drawn steps again; needs k2jax")
    parser.add_argument("--replay-chunks", type=int, default=0, metavar="N",
                        help="run all between two drawn checkpoints again, N times, and compare arrays")  # fmt: skip
    parser.add_argument("--memory", type=float, default=16, metavar="GIB", help="to use at most (default: 16)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as of `| head`
    if not (args.release / "files.json").is_file() or not (args.release / "release.json").is_file():
        print(f"error: {shown(args.release)} is no release: there is no files.json or no release.json", file=sys.stderr)
        raise SystemExit(78)
    if not (args.replay or args.replay_chunks):
        limit_memory(args.memory)  # which a child would inherit
    say: Callable[..., None] = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    release = Release(args.release, args.steps, args.seed)
    results = verify(release, args.digest, args.replay, args.replay_chunks, say)
    failed, unproven = [r for r in results if r.state == FAILED], not_proven(release, results)
    if args.json:
        values = {"format": 1, "holds": not failed, "checks": [r._asdict() for r in results], "not_proven": unproven}
        print(json.dumps(values, indent=1))
    else:
        print("\nNot proven:", *unproven, sep="\n  - ")
        done = sum(r.state == OK for r in results)
        print(f"\n{'FAILED: ' + ', '.join(r.name for r in failed) if failed else 'All that was checked holds'}: {done} "
              f"checks hold, {len(failed)} do not, {len(results) - done - len(failed)} could not be made.")  # fmt: skip
    raise SystemExit(65 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk under the output; what is in the release never gets here
        raise SystemExit(f"error: {shown(error)}") from None
