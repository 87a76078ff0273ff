"""Asking all hosts of a run: every process gets the answers of all, and comes to the same verdict.

A check that fails names the hosts: those that differ from most others, or that say themselves what is wrong.
"""

import json
import socket
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from k2jax import errors
from k2jax.errors import ConfigError, RunError
from k2jax.parallel import cluster


@dataclass
class Check:
    """One line of the report."""

    name: str
    says: str = ""
    wrong: dict[str, tuple[int, str]] = field(default_factory=dict)  # {host: (exit code, what is wrong)}
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.wrong

    def blame(self, answers: list["Answer"], what: str, code: int = ConfigError.exit_code) -> None:
        for answer in answers:
            self.wrong.setdefault(answer.who, (code, what))

    def lines(self) -> list[str]:
        """Of the hosts that are wrong, those with one reason together."""
        reasons: dict[str, list[str]] = {}
        for who, (_, what) in self.wrong.items():
            reasons.setdefault(what, []).append(who)
        shown = {
            what: ", ".join(who[:8]) + (f" and {len(who) - 8} more" if len(who) > 8 else "")
            for what, who in reasons.items()
        }
        return [f"{who}: {what}" for what, who in shown.items()]


class Answer(NamedTuple):
    """Of one process."""

    who: str
    value: Any
    code: int
    reason: str


def ask(check: Check, f: Callable[[], Any]) -> list[Answer]:
    """What `f` gives on every process; those on which it raised are blamed, and not among the answers."""

    def here() -> dict[str, Any]:
        who = f"{socket.gethostname()} (process {cluster.index()})"
        try:
            return {"who": who, "value": f(), "code": 0, "reason": ""}
        except Exception as error:
            ours = errors.of_system(error)
            if type(ours) is RunError:
                traceback.print_exc()  # a bug: its trace stays with who met it
            return {"who": who, "value": None, "code": ours.exit_code, "reason": str(ours).splitlines()[0]}

    answers = [Answer(**answer) for answer in cluster.gather(f"looks at {check.name}", here)]
    for answer in answers:
        if answer.code:
            check.blame([answer], answer.reason, answer.code)
    return [answer for answer in answers if not answer.code]


def odd(answers: list[Answer], key: Callable[[Any], Any]) -> tuple[Any, list[Answer]]:
    """(what most have, those that have another): of equally many, what process 0 has."""
    keys = [json.dumps(key(answer.value), sort_keys=True) for answer in answers]
    counts = Counter(keys)
    usual = max(keys, key=lambda key: counts[key])  # the first of equals
    return json.loads(usual), [answer for k, answer in zip(keys, answers, strict=True) if k != usual]
