"""Parts of a report as data: tables, texts and charts, which page.py and the page's own script show."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from k2jax.errors import RunError

T = TypeVar("T")


class Table(NamedTuple):
    """Cells are text or numbers; `wide` is for long text."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    wide: bool = False


class Chart(NamedTuple):
    """Drawn by assets/charts.js from `spec`, which is JSON."""

    title: str
    spec: dict[str, Any]
    note: str = ""
    size: str = ""  # "wide" takes the page's width, "small" is one of many


class Facts(NamedTuple):
    """Names and values beside each other; `big` as tiles."""

    pairs: Sequence[tuple[str, Any]]
    big: bool = False


class Shares(NamedTuple):
    """A bar of coloured parts with its table: (name, value, meaning)."""

    parts: Sequence[tuple[str, float, str]]
    unit: Callable[[float], str]


class Text(NamedTuple):
    """Paragraphs."""

    lines: Sequence[str]
    kind: str = ""  # "note", "warning"


class Details(NamedTuple):
    """Parts that are shown when asked for."""

    title: str
    parts: Sequence[Any]


class Html(NamedTuple):
    """Markup of ours, with what is others' escaped in it already."""

    markup: str


class Browser(NamedTuple):
    """A place that the page's script fills: "gallery", "samples"."""

    kind: str


class Section(NamedTuple):
    key: str
    title: str
    parts: Sequence[Any]


class Notes:
    """What of a run could not be read; a report of the rest is made all the same."""

    def __init__(self):
        self.lines: list[str] = []

    def trying(self, what: str, read: Callable[[], T], instead: T) -> T:
        """What `read` gives; where it fails for what is stored, `instead`, and a line."""
        try:
            return read()
        except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.add(f"{what}: {type(error).__name__}: {error}")
            return instead

    def add(self, line: str) -> None:
        if len(self.lines) < 50:
            self.lines.append(line[:500])
