"""What models and scorers said of documents, as histograms over all that they saw, before any was left out for it."""

from typing import Any

from k2jax.prepare.card.text import share
from k2jax.prepare.tally import MOST_SCORE, SCORE_BINS

MOST_BINS = 20


def histograms(card: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """By subset and score: [a bin's least score, documents in it, share of all that have as much or more]."""
    return {
        f"{name}: {key}": _rows({int(bin): n for bin, n in counts.items()})
        for name, subset in card["subsets"].items()
        for key, counts in sorted(subset["scores"].items())
        if counts
    }


def _rows(counts: dict[int, int]) -> list[list[Any]]:
    """In at most MOST_BINS bins, each as wide as some of the tally's, and none wider than it needs to be."""
    width = next(width for width in _widths() if max(counts) // width - min(counts) // width < MOST_BINS)
    bins: dict[int, int] = {}
    for bin, n in counts.items():
        bins[bin // width] = bins.get(bin // width, 0) + n
    rows, total, above = [], sum(counts.values()), sum(counts.values())
    for bin in range(min(bins), max(bins) + 1):
        n = bins[bin] if bin in bins else 0
        rows.append([f"{bin * width / SCORE_BINS:g}", n, share(above, total)])
        above -= n
    return rows


def _widths() -> list[int]:
    return [size * 10**power for power in range(len(str(MOST_SCORE * SCORE_BINS))) for size in (1, 2, 5)]
