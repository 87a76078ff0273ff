"""The rows of metrics/, read as a stream: thinned series, the steps that made no update, where stages begin."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.report.thin import Thinned

BUCKETS, COLUMNS = 1_600, 120  # at most, of lines and of heat maps
BLOCK = 1_024  # rows at a time
MOST_LAYERED, MOST_LAYERS, MOST_PROCESSES = 6_000, 512, 512
MOST_MARKED = 2_000  # steps that are told one by one
MAX_LINE, MAX_FILE = 1 << 24, 1 << 30
TAIL = 256  # bytes that tell whether a file is still the one that was read


class Rows:
    """Of a run's folder `metrics`, or `held_out`. `update` reads what is new; what was cut off is read anew."""

    def __init__(self, folder: Path | BucketPath, after_step: int = 0, buckets: int = BUCKETS):
        self.folder, self.after_step, self._buckets = folder, after_step, buckets
        self._reset()

    def _reset(self) -> None:
        self.series = Thinned(self._buckets)
        self.layers = Thinned(COLUMNS, MOST_LAYERED)  # named "series\0layer"
        self.processes = Thinned(COLUMNS, MOST_PROCESSES)  # own_s, named "process host"
        self.stages: list[tuple[int, str, float]] = []  # first step, name, tokens before it
        self.read: dict[str, dict[str, float]] = {}  # by stage and subset: targets
        self.no_update: list[int] = []
        self.outliers: list[int] = []
        self.num_no_update = self.num_outliers = self.num_rows = self.damaged = 0
        self.last: dict[str, Any] = {}
        self._tokens = 0.0
        self._read: dict[str, tuple[int, bytes]] = {}  # by file: bytes taken, digest of the last of them

    def update(self) -> "Rows":
        paths = sorted(self.folder.glob("chunk-*.jsonl"))
        if not self._goes_on(paths):
            self._reset()
        block: list[dict[str, Any]] = []
        for path in paths:
            for row in self._new(path):
                block.append(row)
                if len(block) == BLOCK:
                    self._take(block)
                    block = []
        self._take(block)
        return self

    def _goes_on(self, paths: list[Path | BucketPath]) -> bool:
        """Whether all that was read still stands there."""
        there = {path.name: path for path in paths}
        for name, (size, digest) in self._read.items():
            path = there.get(name)
            if path is None or isinstance(path, BucketPath) or _tail(path, size) != digest:
                return False
        return True

    def _new(self, path: Path | BucketPath) -> Iterator[dict[str, Any]]:
        """Its rows, but for a last line that is not whole yet."""
        if isinstance(path, BucketPath):
            lines = files.read_bytes(path, MAX_FILE).splitlines(keepends=True)
            yield from self._parsed(line for line in lines if line.endswith(b"\n"))
            self._read[path.name] = 0, b""
            return
        done, _ = self._read.get(path.name, (0, b""))
        with suppress(FileNotFoundError):  # a resume cuts it off meanwhile
            with path.open("rb") as file:
                file.seek(done)
                while (line := file.readline(MAX_LINE)).endswith(b"\n") or len(line) == MAX_LINE:
                    yield from self._parsed([line])
                    done += len(line)
            self._read[path.name] = done, _tail(path, done)

    def _parsed(self, lines: Any) -> Iterator[dict[str, Any]]:
        for line in lines:
            try:
                row = json.loads(line)
                good = type(row["step"]) is int and 0 < row["step"] < 1 << 53
            except (ValueError, TypeError, KeyError, RecursionError):
                good = False
            if not good:
                self.damaged += 1
            elif row["step"] > self.after_step:
                yield row

    def _take(self, block: list[dict[str, Any]]) -> None:
        if not block:
            return
        self.num_rows += len(block)
        self.last = block[-1]
        steps = [row["step"] for row in block]
        names = dict.fromkeys(name for row in block for name in row)
        columns = {}
        for name in names.keys() - {"step", "stage", "layers", "hosts"}:
            if (column := _numbers([row.get(name) for row in block])) is not None:
                columns[name] = column
        self.series.add(steps, {name: columns[name] for name in names if name in columns})
        for stage in {row["stage"] for row in block if isinstance(row.get("stage"), str)}:
            here = np.array([row.get("stage") == stage for row in block])
            of = self.read.setdefault(stage, {})
            for name in columns:
                if name.startswith("targets/"):
                    subset = name.removeprefix("targets/")
                    of[subset] = of.get(subset, 0.0) + float(np.nansum(columns[name][here]))
        for row in block:
            self._note(row)
        self._take_layers([row for row in block if isinstance(row.get("layers"), dict)])

    def _take_layers(self, block: list[dict[str, Any]]) -> None:
        columns = {}
        for name in dict.fromkeys(name for row in block for name in row["layers"]):
            lists = [row["layers"].get(name) for row in block]
            lists = [values[:MOST_LAYERS] if isinstance(values, list) else [] for values in lists]
            matrix = np.full((len(block), max(map(len, lists), default=0)), np.nan)
            for i, values in enumerate(lists):
                with suppress(ValueError, TypeError, OverflowError):  # a row of something else
                    matrix[i, : len(values)] = values
            columns |= {f"{name}\0{layer}": matrix[:, layer] for layer in range(matrix.shape[1])}
        self.layers.add([row["step"] for row in block], columns)

    def _note(self, row: dict[str, Any]) -> None:
        step, stage, tokens = row["step"], row.get("stage"), row.get("tokens_seen")
        if isinstance(stage, str) and (not self.stages or self.stages[-1][1] != stage):
            self.stages.append((step, stage, self._tokens))
        self._tokens = float(tokens) if _is_number(tokens) else self._tokens
        if row.get("applied") is False:
            self.num_no_update += 1
            if len(self.no_update) < MOST_MARKED:
                self.no_update.append(step)
        if row.get("outlier") is True:
            self.num_outliers += 1
            if len(self.outliers) < MOST_MARKED:
                self.outliers.append(step)
        if isinstance(hosts := row.get("hosts"), dict):
            fields = [hosts.get(field) for field in ("process", "host", "own_s")]
            if all(isinstance(values, list) for values in fields):
                own = {f"{p} {h}": v for p, h, v in zip(*fields, strict=False) if _is_number(v)}
                self.processes.add([step], {name: np.array([v], float) for name, v in own.items()})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _numbers(values: list[Any]) -> np.ndarray | None:
    """As floats, NaN for what is none; None where nothing is a number."""
    try:
        found = np.array(values, dtype=float)
    except (ValueError, TypeError, OverflowError):
        found = np.zeros(0)
    if found.shape != (len(values),):
        found = np.array([v if _is_number(v) or isinstance(v, bool) else np.nan for v in values], float)
    return None if np.isnan(found).all() else found


def _tail(path: Path, end: int) -> bytes:
    """A digest of the last bytes before `end`."""
    with path.open("rb") as file:
        file.seek(max(0, end - TAIL))
        return hashlib.sha256(file.read(min(end, TAIL))).digest()
