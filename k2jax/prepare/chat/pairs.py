"""Rows of preference pairs to two conversations: `chosen` and `rejected`, with what is asked in both or in `prompt`.

Of what Hugging Face's sets have, two forms are read:

    chosen, rejected           lists of turns, the whole conversation in each; what both begin with is what is asked
    prompt, chosen, rejected   texts, or lists of turns, and the answers alone in the latter two

A row of the first form may have a `prompt`, too, which must then be among what is asked.
"""

from typing import Any

from ml_collections import ConfigDict

from k2jax.data.records import Bad
from k2jax.prepare.chat.rows import Turns, conversation, names_in, read_turns, side, system_turn

HALVES = ("chosen", "rejected")
SAME = "chosen and rejected are the same"
REPEATED = 40  # characters of a question with which no two answers begin by chance; "Hello" is one of many
Asked = list[dict[str, Any]]


def pair_of(record: dict[str, Any], subset: ConfigDict, special: list[str]) -> tuple[Turns, Turns] | Bad:
    """The two conversations of a row, or what is wrong with it; arguments as `rows.turns_of` has them.

    Learned are, in each, the answers behind what is asked: which the first of them must follow at once, in both.
    """
    if missing := [name for name in HALVES if record.get(name) is None]:
        return Bad("no pair", f"expected chosen and rejected, found {names_in(record)}; {missing[0]} is missing")
    found = _read(record, subset)
    if isinstance(found, Bad):
        return found
    asked, *answers = found
    whole = _whole(record, asked, answers)
    if isinstance(whole, Bad):
        return whole
    before = read_turns(system_turn(record), subset)
    if isinstance(before, Bad):
        return before
    first, rejected = (before + one if whole else before + asked + one for one in answers)
    num_asked = num_shared(first, rejected) if whole else len(before + asked)
    if first == rejected:
        return Bad(SAME, f"{len(first)} turns")
    if bad := _not_answered(first, rejected, num_asked, len(before)):
        return bad
    both = [conversation(record, turns, num_asked, subset, special) for turns in (first, rejected)]
    for name, one in zip(HALVES, both, strict=True):
        if isinstance(one, Bad):
            return one._replace(what=f"{name}: {one.what}")
    return both[0], both[1]


def num_shared(one: Asked, other: Asked) -> int:
    """How many turns both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _read(record: dict[str, Any], subset: ConfigDict) -> list[Asked] | Bad:
    """The turns of prompt (none where there is none), chosen and rejected."""
    found = []
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = record.get(name)
        raw = [] if name == "prompt" and value in (None, "") else side(value, role)
        if raw is None:
            return Bad("no list of turns", f"{name} is {type(value).__name__}, expected a text or a list of turns")
        turns = read_turns(raw, subset)
        if isinstance(turns, Bad):
            return turns._replace(what=f"{name}: {turns.what}")
        found.append(turns)
    if isinstance(record["chosen"], str) != isinstance(record["rejected"], str):
        return Bad("a pair of two forms", "one of chosen and rejected is a text, the other a list of turns")
    if not (found[1] and found[2]):
        return Bad("no answer to learn", f"{HALVES[bool(found[1])]} has no turn")
    return found


def _whole(record: dict[str, Any], asked: Asked, answers: list[Asked]) -> bool | Bad:
    """Whether both hold what is asked, too."""
    if not asked:
        return not isinstance(record["chosen"], str) or Bad(
            "no prompt", "chosen and rejected are texts: expected a prompt beside them, or lists of turns"
        )
    first, rejected = answers
    shared = first[: num_shared(first, rejected)]
    if isinstance(record["prompt"], list) and shared[: len(asked)] == asked:
        return True
    if first[0]["role"] == rejected[0]["role"] == "assistant":
        question = asked[-1]["content"].strip()
        if len(question) >= REPEATED and all(one[0]["content"].lstrip().startswith(question) for one in answers):
            return Bad("answers that begin with their prompt", "chosen and rejected hold it, too: take it out of them")
        return False
    text = asked[0]["content"].strip()
    if isinstance(record["prompt"], str) and any(text in turn["content"] for turn in shared):
        return True
    return Bad("a prompt that is not in its conversations", "chosen and rejected do not both hold it: take one out")


def _not_answered(first: Asked, rejected: Asked, num_asked: int, num_before: int) -> Bad | None:
    """What is wrong where not both go on with an answer behind what is asked."""
    if num_asked <= num_before:
        return Bad("no prompt", "chosen and rejected differ from their first turn on: nothing is asked in both")
    for name, turns in zip(HALVES, (first, rejected), strict=True):
        if len(turns) == num_asked:
            return Bad("no answer to learn", f"{name} ends with turn {num_asked}, which the other half has, too")
        if (role := turns[num_asked]["role"]) != "assistant":
            return Bad("halves that ask for different things", f"{name}: turn {num_asked + 1}, of role {role}")
    return None
