"""index.html of the data card: one page, nothing loaded from anywhere, no scripts; documents are untrusted text."""

import html
from typing import Any

from k2jax.prepare.card.scores import histograms
from k2jax.prepare.card.svg import bars, columns, stacked
from k2jax.prepare.card.tables import (
    SECTIONS,
    Table,
    flow,
    histogram,
    parts_of_flow,
    stated,
    tables_of,
)
from k2jax.prepare.card.text import cut, for_html, lines_of, num_bytes, number, share, size_of

# Kept, removed by cleaning, exact and near copies, other; text 4.5:1 or more on both backgrounds.
STYLE = """
:root { color-scheme: light dark; --back: #fff; --front: #1d2330; --dim: #5b6475; --line: #dde1e8; --soft: #f5f6f9;
  --c0: #2f6fd0; --c1: #b9c0cc; --c2: #c9701c; --c3: #8a4fbf; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171d; --front: #e4e7ed; --dim: #a0a8b8; --line: #303643;
  --soft: #1c2029; --c0: #5b97ee; --c1: #566074; --c2: #e09246; --c3: #b98ae6; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 80px; max-width: 960px; background: var(--back); color: var(--front);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 8px 0 2px; } h2 { font-size: 19px; margin: 40px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--line); } h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 4px 0 10px; max-width: 760px; } .dim, figcaption { color: var(--dim); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; } .tile { background: var(--soft);
  border-radius: 8px; padding: 10px 16px; min-width: 120px; flex: 1 1 auto; }
.tile b { display: block; font-size: 21px; font-weight: 600; white-space: nowrap; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; margin: 4px 0 14px; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; } td { overflow-wrap: break-word; max-width: 560px; }
td:first-child, th { white-space: nowrap; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding: 4px 10px; }
figure { margin: 8px 0 14px; overflow-x: auto; }
svg.plot { display: block; width: 100%; min-width: 620px; height: auto; }
svg text { fill: var(--front); font-size: 13px; } svg .dim { fill: var(--dim); } svg .small { font-size: 11px; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } .axis { stroke: var(--dim); }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px 0 14px; }
.key.c0 { background: var(--c0); } .key.c1 { background: var(--c1); } .key.c2 { background: var(--c2); }
.key.c3 { background: var(--c3); }
details { margin: 6px 0; } summary { cursor: pointer; } code { font-size: 12.5px; overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: 6px; padding: 8px 12px; margin: 2px 0 12px; font-size: 12.5px;
  white-space: pre-wrap; overflow: hidden; overflow-wrap: anywhere; contain: paint; unicode-bidi: isolate; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; } .pair > div { min-width: 0; }
.bad { color: var(--bad); font-weight: 600; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } }
"""
COLOURS = (("c0", "kept"), ("c1", "cleaning"), ("c2", "exact copies"), ("c3", "near copies"))
LANGUAGES = 20  # shown


def page(card: dict[str, Any]) -> str:
    """The page; `card` is what card.make_card gave."""
    plots = {
        "flow": _flow_plot(card),
        "stores": bars(
            [(n, row["mix_tokens"], share(row["mix_share"], 1)) for n, row in card["stores"].items()]
        ),
        "lengths": _lengths_plot(card),
        "languages": _names_plot(card, "languages"),
        "scores": _scores_plot(card),
        "licences": _names_plot(card, "licences"),
        "duplicates": _copies_plot(card),
    }
    body = [_head(card)]
    for key, title, text in SECTIONS:
        tables = tables_of(key, card)
        samples = _samples(card) if key == "samples" else ""
        if tables or samples or plots.get(key):
            body.append(f'<section id="{key}"><h2>{title}</h2><p class="dim">{text}</p>')
            body += [plots.get(key, ""), *map(_table, tables), samples, "</section>"]
    return PAGE.format(style=STYLE, body="\n".join(body))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Data card</title>
<style>{style}</style></head><body>
{body}
</body></html>
"""


def _head(card: dict[str, Any]) -> str:
    total = card["total"]
    tiles = [
        (number(total["documents_in"]), f"documents read, {num_bytes(total['bytes_in'])}"),
        (number(total["documents_out"]), f"kept, {share(total['documents_out'], total['documents_in'])}"),
        (num_bytes(total["bytes_out"]), "of text kept"),
        (number(total["tokens"]), f"tokens in {len(card['stores'])} stores"),
        (number(total["bad"]), "problems in the input"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span class="dim">{text}</span></div>' for value, text in tiles
    )
    wrong = "".join(
        f'<p class="bad">Counts contradict each other: {for_html(x)}</p>' for x in card["inconsistencies"]
    )
    facts = f"k2jax {for_html(card['version'])}, tokenizer <code>{for_html(card['tokenizer']['sha256'][:16])}</code>"
    size = f"{number(card['tokenizer']['vocab_size'])} ids"
    return f'<h1>Data card</h1><p class="dim">{facts}, {size}</p>{wrong}<div class="tiles">{shown}</div>'


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"


def _keys(colours: tuple[tuple[str, str], ...]) -> str:
    return "".join(f'<span class="key {colour}"></span>{name}' for colour, name in colours)


def _flow_plot(card: dict[str, Any]) -> str:
    rows = []
    for name, row in flow(card).items():
        parts = parts_of_flow(row)
        drawn = [(colour, parts[what]) for colour, what in COLOURS]
        rows.append((name, drawn, f"{share(row['kept'], row['read'])} of {number(row['read'])}"))
    return _figure(stacked(rows), f"Of the documents read: {_keys(COLOURS)}")


def _stores_plot(card: dict[str, Any]) -> str:
    rows = [(name, row["mix_tokens"], share(row["mix_share"], 1)) for name, row in card["stores"].items()]
    return _figure(bars(rows), "Tokens in the mix") if rows else ""


def _lengths_plot(card: dict[str, Any]) -> str:
    labels, first, last = histogram(card)
    keys = _keys((("c1", "after cleaning"), ("c0", "kept")))
    return _figure(
        columns(labels, first, last), f"Documents by bytes of text, each bin to twice its label: {keys}"
    )


def _scores_plot(card: dict[str, Any]) -> str:
    plots = []
    for title, rows in histograms(card).items():
        labels, counts, _ = zip(*rows, strict=True)
        plots.append(_figure(columns(list(labels), [0] * len(counts), list(counts)), f"Documents by {for_html(title)}"))
    return "".join(plots)


def _copies_plot(card: dict[str, Any]) -> str:
    bins: dict[int, int] = {}
    for size, count in card["duplicates"]["cluster_sizes"].items():
        power = int(size).bit_length() - 1
        bins[power] = bins.get(power, 0) + count
    if not bins:
        return ""
    powers = range(min(bins), max(bins) + 1)
    labels = [f"{1 << power:,}" for power in powers]
    counts = [bins.get(power, 0) for power in powers]
    return _figure(
        columns(labels, [0] * len(counts), counts),
        "Clusters by their number of documents, each bin to twice its label",
    )


def _names_plot(card: dict[str, Any], key: str) -> str:
    total: dict[str, int] = {}
    for _, last in stated(card, key).values():
        for name, count in last.items():
            total[name] = total.get(name, 0) + count
    ranked = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    if (rest := sum(count for _, count in ranked[LANGUAGES:])) > 0:
        ranked = [*ranked[:LANGUAGES], ("all others", rest)]
    rows = [(name, count, number(count)) for name, count in ranked]
    return _figure(bars(rows), "Documents kept") if rows else ""


def _table(table: Table) -> str:
    def cell(tag: str, value: Any, i: int) -> str:
        heat = f' style="background: rgb(80 140 230 / {table.heat(value):.2f})"' if i and table.heated else ""
        kind = ' class="n"' if i in table.numeric else ""
        text = (
            f"<code>{for_html(value)}</code>"
            if tag == "td" and i in table.code
            else for_html(table.text(value))
        )
        return f"<{tag}{kind}{heat if tag == 'td' else ''}>{text}</{tag}>"

    head = "".join(cell("th", name, i) for i, name in enumerate(table.head))
    rows = "".join(
        "<tr>" + "".join(cell("td", value, i) for i, value in enumerate(row)) + "</tr>" for row in table.rows
    )
    title = f"<h3>{for_html(table.title)}</h3>" if table.title else ""
    whole = (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return (
        whole
        if not table.folded
        else f"<details><summary>{for_html(table.folded)}</summary>{whole}</details>"
    )


def _samples(card: dict[str, Any]) -> str:
    shown = []
    for one in card["samples"]["removed"]:
        title = f"{for_html(one['subset'])}, {for_html(one['step'])}: <b>{for_html(one['reason'])}</b>"
        shown.append(f"<div>{title}{_sample(one)}</div>")
    pairs = []
    for pair in card["samples"]["duplicates"]:
        sides = "".join(
            f"<div>{what}, {for_html(pair[key]['subset'])}{_sample(pair[key])}</div>"
            for key, what in (
                ("removed", f"removed as {for_html(pair['reason'])} copy"),
                ("stays", "for this one"),
            )
        )
        pairs.append(f'<div class="pair">{sides}</div>')
    kept = [f"<div>{for_html(one['subset'])}{_sample(one)}</div>" for one in card["samples"]["kept"]]
    folded = (("Removed", shown), ("Duplicates", pairs), ("Kept", kept))
    return "".join(
        f"<details><summary>{title}: {len(found)} samples</summary>{''.join(found)}</details>"
        for title, found in folded
        if found
    )


def _sample(one: dict[str, Any]) -> str:
    text = html.escape("\n".join(lines_of(cut(one))))
    return f'<br><span class="dim">{for_html(one["source"])}{size_of(one)}</span><pre dir="auto">{text}</pre>'
