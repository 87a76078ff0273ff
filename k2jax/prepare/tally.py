"""What happened to documents, counted: by task in JSON files, added up for the data card.

    {"steps": {step: {"documents": n, "bytes": n, "removed": {reason: {"documents": n, "bytes": n}}}},
     "kept": {"documents": n, "bytes": n},
     "bad": {reason: n}, "problems": ["FILE:LINE: what is wrong with it", ...],
     "languages": {code: n}, "licences": {name: n}, "lengths": {power of two: n},
     "copies": {n: documents that stay for n},
     "personal": {kind: n}, "encodings": {name: files}, "scores": {step: {bin of SCORE_BINS a unit: n}}}

A step's `documents` and `bytes` (of UTF-8 text) are what went in. `bad` is input that gave no document, `problems` its
first cases. Names from outside are cleaned before they get here: a path may hold a line feed.
"""

import math
from collections import Counter, defaultdict
from typing import Any

from k2jax.text import without_secrets

PROBLEMS = 20  # kept by task
SCORE_BINS = 20  # of a score, from one whole number to the next
MOST_SCORE = 100  # and least: what lies beyond is counted there
NAME_CHARACTERS = 2000  # kept of a name or URL; object stores allow names of 1,024 bytes

HINTS = {  # by a reason why nothing of a subset was read
    "not UTF-8": 'text of another encoding needs encoding="detect", or its name',
    "bad JSON": "jsonl: is one JSON object a line",
    "JSON that is no object": "jsonl: is one JSON object a line",
    "text is no string": "text_key, or the fields of text, must name strings",
}


def clean_name(name: str) -> str:
    """A name from outside in one line that no terminal obeys: control characters as \\xNN, at most 300 characters."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:300])
    return shown.encode("utf-8", "backslashreplace").decode()


def shown_name(name: str) -> str:
    """A name or URL from outside, in characters that print, up to NAME_CHARACTERS of them, without credentials."""
    name = without_secrets(name)[:NAME_CHARACTERS]
    if name.isprintable():
        return name
    return "".join(clean_name(name[i : i + 300]) for i in range(0, len(name), 300))


class Tally:
    """The counts of one task."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.passed_on = {"documents": 0, "bytes": 0}
        self.bad: Counter[str] = Counter()
        self.problems: list[str] = []
        self.languages: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.lengths: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.personal: Counter[str] = Counter()
        self.encodings: Counter[str] = Counter()
        self.scores: dict[str, Counter[str]] = defaultdict(Counter)

    def saw(self, step: str, num_bytes: int) -> None:
        """A document went into a step."""
        counts = self.steps.setdefault(step, {"documents": 0, "bytes": 0, "removed": defaultdict(Counter)})
        counts["documents"] += 1
        counts["bytes"] += num_bytes

    def removed(self, step: str, reason: str, num_bytes: int) -> int:
        """A step removed a document; returns how many it had removed for that reason before."""
        counts = self.steps[step]["removed"][reason]
        counts["documents"] += 1
        counts["bytes"] += num_bytes
        return counts["documents"] - 1

    def replaced(self, counts: dict[str, int]) -> None:
        """A step put placeholders in a document: so many for each kind of personal data."""
        self.personal.update(counts)

    def scored(self, step: str, score: float) -> None:
        """A step gave a document a score."""
        self.scores[step][str(math.floor(max(-MOST_SCORE, min(MOST_SCORE, score)) * SCORE_BINS))] += 1

    def problem(self, reason: str, where: str, what: str = "") -> None:
        """Input that gave no document: `where` is FILE or FILE:LINE."""
        self.bad[reason] += 1
        if len(self.problems) < PROBLEMS:
            self.problems.append(clean_name(f"{where}: {reason}" + (f" ({what})" if what else "")))

    def kept(self, num_bytes: int, language: str = "", licence: str = "") -> None:
        """A document that the task passes on."""
        self.passed_on["documents"] += 1
        self.passed_on["bytes"] += num_bytes
        self.lengths[str(max(1, num_bytes).bit_length() - 1)] += 1
        if language:
            self.languages[language] += 1
        if licence:
            self.licences[licence] += 1

    def to_json(self) -> dict[str, Any]:
        """As in the module's text; `combine` adds such up."""
        return {
            "steps": {
                step: {**counts, "removed": {reason: dict(n) for reason, n in sorted(counts["removed"].items())}}
                for step, counts in self.steps.items()
            },
            "kept": dict(self.passed_on),
            "bad": dict(sorted(self.bad.items())),
            "problems": self.problems,
            "languages": dict(sorted(self.languages.items())),
            "licences": dict(sorted(self.licences.items())),
            "lengths": dict(sorted(self.lengths.items(), key=lambda item: int(item[0]))),
            "copies": dict(sorted(self.copies.items(), key=lambda item: int(item[0]))),
            "personal": dict(sorted(self.personal.items())),
            "encodings": dict(sorted(self.encodings.items())),
            "scores": {step: dict(sorted(n.items(), key=lambda item: int(item[0]))) for step, n in self.scores.items()},
        }


def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what `to_json` gave: numbers are added, lists of problems joined up to PROBLEMS."""
    total: dict[str, Any] = {}
    for part in parts:
        _add(total, part)
    total.setdefault("problems", [])
    return total


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            value = total[key] + value if key in total else value
            total[key] = value[:PROBLEMS] if isinstance(value, list) else value  # of 100,000 tasks no longer lists


def left_out(*tallies: dict[str, Any]) -> dict[str, int]:
    """Documents by the reason why they are not in the stores."""
    found: dict[str, int] = {}
    for counts in tallies:
        for step in counts.get("steps", {}).values():
            for reason, n in step["removed"].items():
                found[reason] = found.get(reason, 0) + n["documents"]
        for reason, n in counts.get("bad", {}).items():
            found[reason] = found.get(reason, 0) + n
    return dict(sorted(found.items()))


def why_none(*tallies: dict[str, Any]) -> str:
    """Why nothing of a subset stays: reasons, the first problem with its file and line, and what may help."""
    reasons = left_out(*tallies)
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "nothing there"
    problems = [problem for counts in tallies for problem in counts.get("problems", [])]
    hints = dict.fromkeys(hint for reason, hint in HINTS.items() if reason in reasons)
    return "; ".join([why, *(f"the first: {problem}" for problem in problems[:1]), *hints])
