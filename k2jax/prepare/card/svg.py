"""The plots of the data card: inline SVG, coloured by classes of the page's style sheet, readable without scripts."""

from k2jax.prepare.card.text import for_html, number

# Pixels: of the drawing, of labels left and values right of bars, of a row.
WIDTH, LABEL, VALUE, ROW = 860, 190, 180, 26
BAR = WIDTH - LABEL - VALUE
LABEL_CHARACTERS = 27
HEIGHT, AXIS = 190, 40  # of columns, and of what is written below them

Part = tuple[str, float]  # class of colour, value


def bars(rows: list[tuple[str, float, str]]) -> str:
    """Horizontal bars: (label, value, the value as it is written)."""
    most = max((value for _, value, _ in rows), default=0) or 1
    return stacked([(label, [("c0", value)], shown) for label, value, shown in rows], most)


def stacked(rows: list[tuple[str, list[Part], str]], most: float = 0) -> str:
    """Horizontal bars of parts: (label, parts, what is written right of it); `most` is a full bar, 0: each its sum."""
    drawn = []
    for i, (label, parts, shown) in enumerate(rows):
        top, x = i * ROW, float(LABEL)
        drawn.append(f'<text x="{LABEL - 10}" y="{top + 17}" class="end">{_label(label)}</text>')
        full = most or sum(value for _, value in parts) or 1
        for colour, value in parts:
            width = BAR * value / full
            if value:
                title = f"<title>{number(value)}</title>"
                drawn.append(
                    f'<rect class="{colour}" x="{x:.1f}" y="{top + 4}" width="{max(width - 1, 0.6):.1f}" '
                    f'height="{ROW - 8}" rx="2">{title}</rect>'
                )
            x += width
        drawn.append(
            f'<text x="{min(x, LABEL + BAR) + 8:.1f}" y="{top + 17}" class="dim">{for_html(shown)}</text>'
        )
    return _svg(drawn, len(rows) * ROW)


def columns(labels: list[str], behind: list[int], before: list[int]) -> str:
    """Two histograms over the same bins, one before the other, which is at least as high."""
    most = max([*behind, *before, 1])
    step = min(60.0, (WIDTH - 60) / max(1, len(labels)))
    drawn = [
        f'<line class="axis" x1="0" x2="{step * len(labels):.1f}" y1="{HEIGHT + 0.5}" y2="{HEIGHT + 0.5}"/>'
    ]
    for i, (label, back, front) in enumerate(zip(labels, behind, before, strict=True)):
        x = i * step
        for colour, value in (("c1", back), ("c0", front)):
            height = (HEIGHT - 20) * value / most
            title = f"<title>{for_html(label)}: {number(value)}</title>"
            drawn.append(
                f'<rect class="{colour}" x="{x + 2:.1f}" y="{HEIGHT - height:.1f}" width="{step - 4:.1f}" '
                f'height="{height:.1f}" rx="2">{title}</rect>'
            )
        middle = x + step / 2
        drawn.append(f'<text class="mid dim" x="{middle:.1f}" y="{HEIGHT + 16}">{_label(label)}</text>')
        top = HEIGHT - (HEIGHT - 20) * max(back, front) / most - 5
        drawn.append(
            f'<text class="mid small" x="{middle:.1f}" y="{top:.1f}">{_short(max(back, front))}</text>'
        )
    return _svg(drawn, HEIGHT + AXIS - 16)


def _short(value: int) -> str:
    size, units = float(value), ["", "k", "M", "G", "T"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g}{units[0]}" if value else ""


def _label(text: str) -> str:
    """Cut, with the whole of it as a tip."""
    cut = text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
    return f"{for_html(cut)}<title>{for_html(text)}</title>"


def _svg(drawn: list[str], height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="plot">{"".join(drawn)}</svg>'
