"""data.md of the data card: what the page says, without its plots."""

from typing import Any

from k2jax.prepare.card.tables import SECTIONS, Table, histogram, tables_of
from k2jax.prepare.card.text import code_block, cut, for_markdown, num_bytes, number, size_of


def markdown(card: dict[str, Any]) -> str:
    """The text; `card` is what card.make_card gave."""
    total = card["total"]
    lines = [
        "# Data card",
        "",
        f"k2jax {for_markdown(card['version'])}. {number(total['documents_in'])} documents of "
        f"{num_bytes(total['bytes_in'])} were read, {number(total['documents_out'])} of "
        f"{num_bytes(total['bytes_out'])} kept: {number(total['tokens'])} tokens in {len(card['stores'])} stores. "
        f"{number(total['bad'])} problems in the input.",
        "",
    ]
    lines += [
        f"**Counts contradict each other: {for_markdown(found)}**\n" for found in card["inconsistencies"]
    ]
    for key, title, text in SECTIONS:
        tables = tables_of(key, card)
        if key == "lengths":
            labels, first, last = histogram(card)
            rows = [list(row) for row in zip(labels, first, last, strict=True)]
            tables = [Table(["bytes, from", "after cleaning", "kept"], rows, numeric=(1, 2))] if rows else []
        samples = _samples(card["samples"]) if key == "samples" else []
        if tables or samples:
            lines += [f"## {title}", "", *([text, ""] if text else []), *samples]
            for table in tables:
                lines += _table(table)
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(table: Table) -> list[str]:
    ruler = "|".join("--:" if i in table.numeric else "---" for i in range(len(table.head)))
    rows = [" | ".join(for_markdown(table.text(value)) for value in row) for row in table.rows]
    title = table.title or table.folded
    head = " | ".join(map(for_markdown, table.head))
    return [*([f"### {for_markdown(title)}", ""] if title else []), f"| {head} |", f"|{ruler}|",
            *(f"| {row} |" for row in rows), ""]  # fmt: skip


def _samples(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for one in samples["removed"]:
        lines += _sample(f"{one['subset']}, {one['step']}, {one['reason']}", one)
    for pair in samples["duplicates"]:
        lines += _sample(f"{pair['removed']['subset']}, removed as {pair['reason']} copy", pair["removed"])
        lines += _sample(f"{pair['stays']['subset']}, which stayed for it", pair["stays"])
    for one in samples["kept"]:
        lines += _sample(f"{one['subset']}, kept", one)
    return lines


def _sample(what: str, one: dict[str, Any]) -> list[str]:
    title = f"{for_markdown(what)} ({for_markdown(one['source'])}{size_of(one)})"
    return [title, "", *code_block(cut(one)), ""]
