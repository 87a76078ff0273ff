"""Makes the report of a run: reads it, puts the sections in order, writes the page."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.report import compare, mix, outcomes, page, record, training
from k2jax.report.parts import Chart, Details, Section
from k2jax.report.subject import Subject

NAME = "report.html"


class Report:
    """The report of a run, which may go on meanwhile; `others` are set beside it."""

    def __init__(self, workdir: Path | BucketPath, others: Sequence[Path | BucketPath] = ()):
        page.plotly()  # if it is missing, that is said before anything is read
        self.subject, self.others = Subject(workdir), [Subject(other) for other in others]

    def html(self, reload_s: float | None = None, *, said: str = "") -> str:
        """The whole file; one with `reload_s` reads itself anew so often. `said` of itself, else folder and time."""
        subject, subjects = self.subject, [self.subject, *self.others]
        predicted = record.read_prediction(subject)
        found = outcomes.Evaluations(subject)
        gallery, gallery_data = outcomes.gallery(subject)
        samples, sample_data = outcomes.samples(subject, found)
        made: list[tuple[str, Callable[[], Section | None]]] = [
            ("what the run is", lambda: record.overview(subject)),
            ("other runs", lambda: compare.comparison(subjects) if self.others else None),
            ("loss", lambda: training.loss(subject, predicted)),
            ("stability", lambda: training.stability(subject)),
            ("learning rate and norms", lambda: training.learning(subject)),
            ("speed and time", lambda: training.speed(subject)),
            ("data", lambda: mix.data(subject)),
            ("evaluations", lambda: outcomes.evaluations(subject, found)),
            ("gallery", lambda: gallery),
            ("samples", lambda: samples),
            ("prediction", lambda: record.prediction(subject, predicted)),
            ("costs", lambda: record.costs(subject)),
            ("the record", lambda: record.record(subject)),
        ]
        # What is stored may be of another version, or another's: the rest is shown.
        sections = [subject.notes.trying(f"section on {what}", make, None) for what, make in made]
        sections = [section for section in sections if section]
        data = {
            "runs": _runs(subjects, sections),
            "marks": training.marks(subject),
            "gallery": gallery_data,
            "samples": sample_data,
            "reload_s": reload_s,
        }
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        said = said or f"Made {now} from {subject.workdir}, at step {subject.last_step:,}."
        warnings = [line for one in subjects for line in one.notes.lines]
        return page.page(f"{subject.name}: report of a run", said, sections, data, warnings)

    def write(self, out: Path | BucketPath, reload_s: float | None = None) -> int:
        """Whole or not at all; returns its bytes."""
        text = self.html(reload_s).encode("utf-8", "backslashreplace")
        files.write_bytes(out, text)
        return len(text)

    def watch(self, out: Path | BucketPath, every_s: float, say: Callable[[str], None]) -> None:
        """Writes it anew every so often, until the run has its last step."""
        while True:
            last, step = self.subject.num_steps, self.subject.last_step
            ended = bool(last and step >= last and (self.subject.workdir / "validation.json").exists())
            say(f"{out}: step {step:,}, {self.write(out, None if ended else every_s):,} bytes")
            if ended:
                return
            time.sleep(every_s)
            for one in (self.subject, *self.others):
                one.update()


def _charts(parts: Sequence[Any]) -> list[Chart]:
    found = [part for part in parts if isinstance(part, Chart)]
    return found + [chart for part in parts if isinstance(part, Details) for chart in _charts(part.parts)]


def _runs(subjects: list[Subject], sections: Sequence[Section]) -> dict[str, Any]:
    """{run: its axes and those of its series that a chart names}; series as pairs, as their names are others' text."""
    wanted: dict[str, dict[str, None]] = {}
    for section in sections:
        for chart in _charts(section.parts):
            for trace in chart.spec.get("traces", ()):
                if name := trace.get("series") or trace.get("of"):
                    wanted.setdefault(str(trace["run"]), {})[name] = None
    main = subjects[0]
    rows = {str(i): subject.rows for i, subject in enumerate(subjects)}
    rows |= {f"branch {number}": rows for number, rows in main.branches.items()}
    runs = {}
    for key, of in rows.items():
        series = of.series
        names = [name for name in wanted.get(key, ()) if name in series.names]
        runs[key] = {
            "base": series.base or 0,
            "width": series.width,
            "buckets": series.buckets,
            "last": series.last,
            "axes": subjects[int(key)].axes() if key.isdigit() else None,
            "series": [[name, series.as_json(name)] for name in names],
        }
    return runs
