"""Silent data corruption: which of several answers to one question is the odd one, as pure functions.

Whoever computes or holds the same must have the same bits. Two that differ say that something is wrong, three say more.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K")


def odd_ones(answers: Mapping[K, Hashable]) -> list[K]:
    """Whoever has not the answer that most have; all of them where no answer is had by most; [] where all agree."""
    counts = Counter(answers.values()).most_common(2)
    if len(counts) < 2:
        return []
    (most, number), (_, next_number) = counts
    return [who for who, answer in answers.items() if number == next_number or answer != most]


def verdict(runs: Sequence[Hashable]) -> str:
    """Of the same computation, made three times: "same", "transient" (one is another), "persistent" (all differ)."""
    return {1: "same", 2: "transient", 3: "persistent"}[len(set(runs))]
