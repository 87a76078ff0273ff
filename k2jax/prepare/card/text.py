"""Numbers, names and untrusted text as the data card shows them, in HTML and in Markdown."""

import html
from typing import Any

from k2jax.prepare.tally import clean_name
from k2jax.text import MARKUP

SHOWN_CHARACTERS = 300  # of a line: where tally.clean_name cuts


def shown(text: object) -> str:
    """In one line, invisible and control characters, also those that turn the direction of text, as escapes."""
    return clean_name(str(text)) + ("…" if len(str(text)) > SHOWN_CHARACTERS else "")


def lines_of(text: str) -> list[str]:
    """The same line by line and uncut, for samples; a tab is a space."""
    size = SHOWN_CHARACTERS
    lines = (line.replace("\t", " ") for line in text.split("\n"))
    return ["".join(clean_name(line[i : i + size]) for i in range(0, len(line), size)) for line in lines]


def for_html(text: object) -> str:
    """One line of untrusted text in HTML, as content or attribute."""
    return html.escape(shown(text))


def for_markdown(text: object) -> str:
    """One line of untrusted text in Markdown: no character of it is markup, no address becomes a link."""
    return MARKUP.sub(r"\\\1", shown(text))


def code_block(text: str) -> list[str]:
    """Lines of untrusted text as a block of code in Markdown: indented, so that nothing in it can end it."""
    return [f"    {line}" for line in lines_of(text)]


def cut(sample: dict[str, Any]) -> str:
    """A sample's text, with a mark where more of it is known to follow."""
    return sample["text"] + ("…" if sample["characters"] > len(sample["text"]) else "")


def size_of(sample: dict[str, Any]) -> str:
    """ ", 1,234 characters"; nothing for a removed document, of which only the beginning was kept."""
    return "" if "reason" in sample else f", {number(sample['characters'])} characters"


def number(value: float) -> str:
    """1,234,567 or 12.5"""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def num_bytes(value: int) -> str:
    """1.23 MB: powers of 1000, three digits."""
    size, units = float(value), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{value:,} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def power_of_two(exponent: int) -> str:
    """512 B, 1 KiB, 2 KiB ...: the least length of a bin."""
    power, units = exponent, ["B", "KiB", "MiB", "GiB"]
    while power >= 10 and len(units) > 1:
        power, units = power - 10, units[1:]
    return f"{1 << power} {units[0]}"


def share(part: float, whole: float) -> str:
    """12.3%, or a dash of nothing."""
    if 0 < part < 0.0005 * whole:
        return "<0.1%"
    return f"{100 * part / whole:.1f}%" if whole else "-"
