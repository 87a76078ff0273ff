"""A run that is reported: its folder, what it says of itself, and its rows."""

import bisect
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.bucket import BucketPath
from k2jax.config import from_dict
from k2jax.data.epochs import Epoch, order_of, read_epochs
from k2jax.data.journal import Entry, read_journal
from k2jax.data.launches import read_launches
from k2jax.errors import RunError
from k2jax.model.flops import FlopsPerToken, flops_per_token
from k2jax.report.parts import Notes
from k2jax.report.rows import Rows
from k2jax.report.thin import short
from k2jax.run import branches, goodput
from k2jax.run.goodput import Goodput


class Subject:
    """Raises ConfigError where the folder holds no run."""

    def __init__(self, workdir: Path | BucketPath):
        self.workdir = workdir
        self.rows, self.held_out = Rows(workdir / "metrics"), Rows(workdir / "held_out")
        self.branches: dict[int, Rows] = {}  # by number, what came after the step gone back to
        self.update()

    def update(self) -> None:
        """Looks again."""
        self.notes = Notes()
        self._flops: dict[tuple[str, int], FlopsPerToken | None] = {}
        self._knots: list[list[float]] | None = None
        self.epochs: list[Epoch] = read_epochs(self.workdir)
        read = self.notes.trying
        self.journal: list[Entry] = read("journal", lambda: read_journal(self.workdir / "journal.jsonl"), [])
        self.launches = read("environment", lambda: read_launches(self.workdir), [])
        self.order = read("data order", lambda: order_of(self.epochs, self.journal), None)
        self.goodput = self._goodput()
        self.rows.update()
        self.held_out.update()
        for entry in branches.rollbacks(self.journal):
            self._branch(entry)
        if damaged := self.rows.damaged + self.held_out.damaged:
            self.notes.add(f"{damaged} damaged line(s) of metrics/ and held_out/ are left out")
        if self.rows.series.left_out:
            self.notes.add(f"metrics/ has more than {self.rows.series.most_series} series: the others are left out")

    def _goodput(self) -> Goodput | None:
        """Where the time went; None where that was not recorded."""
        if not (self.workdir / goodput.NAME).exists():
            return None
        return self.notes.trying("goodput", lambda: goodput.read_goodput(self.workdir), None)

    def _branch(self, entry: Entry) -> None:
        folder = branches.branch_folder(self.workdir, entry["branch"]) / "metrics"
        if not folder.is_dir():
            self.notes.add(f"branch {entry['branch']}: {folder} is not there: start the run again, which completes it")
            return
        if entry["branch"] not in self.branches:
            self.branches[entry["branch"]] = Rows(folder, entry["at_step"], 400)
        self.branches[entry["branch"]].update()

    @property
    def settings(self) -> dict[str, Any]:
        """As it is now."""
        return self.epochs[-1].config

    @property
    def name(self) -> str:
        return str(self.settings.get("name") or self.workdir.name)

    @property
    def last_step(self) -> int:
        return self.rows.series.last

    @property
    def num_steps(self) -> int | None:
        """That it will have."""
        return self.order.num_steps if self.order else None

    def flops(self, step: int) -> FlopsPerToken | None:
        """Of a token, of the step's stage and the configuration that made it."""
        stage, number = self.stage_at(step), sum(epoch.after_step < max(step, 1) for epoch in self.epochs)
        if (stage, number) not in self._flops:
            try:
                config = from_dict(self.epochs[max(number, 1) - 1].config)
                [length] = [row.sequence_length for row in config.stages if row.name == stage]
                self._flops[stage, number] = flops_per_token(config.model, length)
            except (RunError, ValueError, KeyError, AttributeError, TypeError):
                self._flops[stage, number] = None
        return self._flops[stage, number]

    def axes(self) -> dict[str, list]:
        """Knots between which tokens, FLOPs (causal) and hours of steps grow evenly: {"step", "tokens", ...}."""
        series = self.rows.series
        if not series.buckets:
            return {"step": [], "tokens": [], "flops": [], "hours": []}
        stages = [max(first - 1, 0) for first, _, _ in self.rows.stages]
        ends = series.last_steps
        steps = np.unique(np.concatenate([[series.base - 1], ends, stages]).astype(np.int64))
        tokens = np.array([self.tokens_at(int(step)) for step in steps])
        each = [self.flops(int(step) + 1) for step in steps[:-1]]
        gained = [gain * (f.causal if f else np.nan) for gain, f in zip(np.diff(tokens), each, strict=True)]
        flops = np.cumsum([0.0, *gained])
        took = _filled(series.mean("step_s")) if "step_s" in series.names else np.zeros(series.buckets)
        per_step = took[np.clip((steps[1:] - series.base) // series.width, 0, len(took) - 1)]
        hours = np.cumsum([0.0, *(np.diff(steps) * per_step / 3600)])
        known = bool(took.any())
        return {
            "step": steps.tolist(),
            "tokens": tokens.tolist() if tokens.any() else [],
            "flops": short(flops, 6) if np.isfinite(flops).all() else [],
            "hours": short(hours, 6) if known else [],
        }

    def tokens_at(self, step: int) -> float:
        """In the rows of the steps up to it, as they say themselves; between two buckets evenly within a stage."""
        series = self.rows.series
        if "tokens_seen" not in series.names or not self.rows.stages:
            return 0.0
        if self._knots is None:
            pairs = {first - 1: before for first, _, before in self.rows.stages}
            high = series.high("tokens_seen")
            pairs |= {int(s): float(t) for s, t in zip(series.last_steps, high, strict=True) if np.isfinite(t)}
            self._knots = [list(column) for column in zip(*sorted(pairs.items()), strict=True)]
        return float(np.interp(step, *self._knots))

    def stage_at(self, step: int) -> str:
        firsts = [first for first, _, _ in self.rows.stages]
        at = bisect.bisect_right(firsts, step) - 1
        return self.rows.stages[at][1] if at >= 0 else ""


def _filled(values: np.ndarray) -> np.ndarray:
    """The median where there is none."""
    known = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, np.median(known) if len(known) else 0.0)
