"""One HTML file from sections and data: nothing in it is fetched, and nothing of others' text is markup or code.

Text goes through `escaped`; data are JSON in a script element of no script's type, with "<", ">", "&" and the line ends
that JavaScript knows and JSON does not as escapes. The Content-Security-Policy lets two scripts run, by their SHA-256:
the page's own, and plotly.js, which is packed and which that one unpacks.
"""

import base64
import gzip
import hashlib
import html
import itertools
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from k2jax.errors import ConfigError
from k2jax.report.parts import Browser, Chart, Details, Facts, Html, Section, Shares, Table, Text
from k2jax.text import shown

SCRIPTS = ("charts.js", "browse.js", "page.js")
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
MOST_SHADES = 12  # of a bar of shares


@cache
def plotly() -> tuple[str, str]:
    """(plotly.js packed, as base64; its hash for the policy). ConfigError where it is not installed."""
    try:
        text = resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(f"the report needs plotly, not there: {error}: pip install 'k2jax[report]'") from error
    return base64.b64encode(gzip.compress(text, 9, mtime=0)).decode(), digest(text)


def digest(script: bytes) -> str:
    """As a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()


def escaped(value: Any) -> str:
    """Of text, in an element or in a quoted attribute."""
    return html.escape(shown(value))


def as_json(value: Any) -> str:
    """JSON that can stand in a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(UNSAFE)


def asset(name: str) -> str:
    return resources.files("k2jax.report").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def page(title: str, said: str, sections: Sequence[Section], data: dict[str, Any], warnings: Sequence[str]) -> str:
    """The file's text.

    Args:
        said: a line below the title.
        data: for the scripts; charts are added.
        warnings: what could not be read.
    """
    packed, plotly_digest = plotly()
    script = "\n".join(map(asset, SCRIPTS))
    charts: list[dict[str, Any]] = []
    body = "".join(_section(section, charts) for section in sections)
    notes = "".join(f"<li>{escaped(line)}</li>" for line in warnings)
    warned = f'<details class="warning" open><summary>Not everything could be read</summary><ul>{notes}</ul></details>'
    links = "".join(f'<a href="#{s.key}">{escaped(s.title)}</a>' for s in sections)
    own = digest(script.encode())
    policy = (
        f"default-src 'none'; script-src '{own}' '{plotly_digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'"
    )
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">\n',
            f"<title>{escaped(title)}</title>\n<style>{asset('page.css')}</style></head>\n<body>\n",
            f'<header><div class="bar"><h1>{escaped(title)}</h1><nav>{links}</nav>',
            f"{asset('controls.html')}</div></header>\n",
            f'<main><p class="said">{escaped(said)}</p>{warned if notes else ""}{body}</main>\n',
            '<noscript><p class="warning">Charts, gallery and samples need JavaScript.</p></noscript>\n',
            f'<script type="application/json" id="page-data">{as_json({**data, "charts": charts})}</script>\n',
            f'<script type="application/octet-stream" id="page-plotly">{packed}</script>\n',
            f"<script>{script}</script>\n</body></html>\n",
        ]
    )


def _section(section: Section, charts: list[dict[str, Any]]) -> str:
    parts = ""
    for small, group in itertools.groupby(section.parts, lambda part: isinstance(part, Chart) and part.size == "small"):
        inside = "".join(_part(part, charts) for part in group)
        parts += f'<div class="multiples">{inside}</div>' if small else inside
    return f'<section id="{section.key}"><h2>{escaped(section.title)}</h2><div class="parts">{parts}</div></section>\n'


def _part(part: Any, charts: list[dict[str, Any]]) -> str:
    if isinstance(part, Chart):
        charts.append({**part.spec, "title": part.title})
        note = f"<p>{escaped(part.note)}</p>" if part.note else ""
        head = f"<figcaption><h3>{escaped(part.title)}</h3>{note}</figcaption>"
        plot = f'<div class="plot" data-chart="{len(charts) - 1}"></div>'
        return f'<figure class="chart {part.size}">{head}{plot}</figure>'
    if isinstance(part, Text):
        return "".join(f'<p class="text {part.kind}">{escaped(line)}</p>' for line in part.lines)
    if isinstance(part, Facts):
        pairs = "".join(f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in part.pairs)
        return f'<dl class="{"tiles" if part.big else "facts"}">{pairs}</dl>'
    if isinstance(part, Details):
        inside = "".join(_part(inner, charts) for inner in part.parts)
        return f'<details class="more"><summary>{escaped(part.title)}</summary>{inside}</details>'
    if isinstance(part, Browser):
        return f'<div class="browser" data-browser="{part.kind}"></div>'
    if isinstance(part, Html):
        return f'<div class="text">{part.markup}</div>'
    return _table(part) if isinstance(part, Table) else _shares(part)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in table.head)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    note = f"<p>{escaped(table.note)}</p>" if table.note else ""
    kind = "table wide" if table.wide else "table"
    inside = f"<table><thead><tr>{head}</tr></thead>{rows}</table>"
    return f'<div class="{kind}">{note}<div class="scroll">{inside}</div></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        value = {True: "yes", False: "no", None: "-"}[value]
    text = f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else value
    number = str(text)[:1].isdigit() or str(text)[:1] in "+-" and str(text)[1:2].isdigit()
    return f'<td class="number">{escaped(text)}</td>' if number else f"<td>{escaped(text)}</td>"


def _shares(shares: Shares) -> str:
    total = sum(value for _, value, _ in shares.parts) or 1.0
    bar, rows = [], []
    for i, (name, value, meaning) in enumerate(shares.parts):
        shade, share = f"shade{i % MOST_SHADES}", value / total
        title = f"{name}: {shares.unit(value)}, {share:.1%}"
        bar.append(f'<span class="{shade}" style="flex-grow:{share:.6f}" title="{escaped(title)}"></span>')
        cells = "".join(map(_cell, (shares.unit(value), f"{share:.1%}", meaning)))
        rows.append(f'<tr><td><i class="{shade}"></i> {escaped(name)}</td>{cells}</tr>')
    table = f'<div class="scroll"><table>{"".join(rows)}</table></div>'
    return f'<div class="shares"><div class="stack" role="img" aria-label="shares">{"".join(bar)}</div>{table}</div>'
