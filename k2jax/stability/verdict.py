"""From the evidence on a step to what it was: a pure function of a diagnosis (doctor.py), cause by cause.

PaLM's spikes came of neither the data nor the state alone: so each batch is read from several states, and each state
with several batches.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from k2jax.stability.crossing import limit_of

CERTAIN, LIKELY, POSSIBLE = "certain", "likely", "possible"
JUDGED = ("loss", "grad_norm")  # whose limits make a step an outlier
CONFIDENCE = (CERTAIN, LIKELY, POSSIBLE)
ALTERED = 1e-3  # of a norm, relative: beyond what another order of sums does
MOMENTS = 1e3  # times a moment's norm a checkpoint before
SOON = 20  # steps after a launch or a new stage in which that may be why
RATE = r"optimizer\b.*|stages\.\d+\.(lr_|warmup).*"
NUMBERS = r"loss|grad_norm|param_norm|update_ratio|logit|attention|log_z"  # series of what is computed
GROWING = r"logit|attention|log_z|param_norm"
OF_UPDATES = r"update_ratio|param_norm"  # which an update moves before any loss does
JUMP = 1.5  # of the learning rate, times

Evidence = Mapping[str, Any]


class Verdict(NamedTuple):
    """One cause."""

    cause: str
    confidence: str
    reasons: list[str]


def is_unusual(value: float, others: Sequence[float], limit: float, deviations: float, floor: float) -> bool:
    """Whether a number of a batch is out of the range of other batches' from the same state.

    `limit`: that of the run's own steps before; above it where the others are below it is unusual, too.
    """
    if not math.isfinite(value):
        return True
    known = [other for other in others if math.isfinite(other)]
    if not known:
        return value > limit
    median, own_limit = limit_of(known, deviations, floor)
    return value > own_limit or (value > limit >= median)


def verdicts(evidence: Evidence) -> list[Verdict]:
    """All causes that the evidence speaks for, the strongest first; never none."""
    found = [one for rule in RULES if (one := rule(evidence))]
    if not found:
        found = [_nothing(evidence) or _not_the_data(evidence) or _not_known(evidence)]
    return sorted(found, key=lambda one: CONFIDENCE.index(one.confidence))


def unusual(evidence: Evidence) -> bool:
    """Whether the step itself was out of its range."""
    row = evidence["row"]
    above = [one for one in evidence["crossings"] if one["series"] in JUDGED and one["last"] == evidence["step"]]
    return not row["finite"] or row["outlier"] or not row["applied"] or bool(above)


# ---- the evidence as the rules ask for it ----------------------------------------------------------------------------


def _part(evidence: Evidence, name: str) -> Any:
    """None where it was not looked at, or could not be."""
    part = evidence.get(name)
    return None if isinstance(part, dict) and "not_possible" in part else part


def _first_crossing(evidence: Evidence) -> int:
    numbers = [one for one in evidence["crossings"] if re.match(NUMBERS, one["series"])]
    return min((one["step"] for one in numbers), default=evidence["at"])


def _changes(evidence: Evidence, *kinds: str) -> list[dict[str, Any]]:
    """Those that came no later than the first series that left its range."""
    first = _first_crossing(evidence)
    return [one for one in evidence["changes"] if one["kind"] in kinds and one["step"] <= first]


def _own(evidence: Evidence) -> tuple[bool, bool, list[bool]] | None:
    """Whether the batch is unusual from its own state, whether others are, and whether it is from each earlier one."""
    states = _part(evidence, "state")
    if not states:
        return None
    own, *earlier = states
    return own["own"]["unusual"], own["others"]["unusual"], [state["own"]["unusual"] for state in earlier]


def _at(change: Mapping[str, Any]) -> str:
    return f"step {change['step']}: {change['kind']}: {change['what']}"


# ---- one rule a cause ------------------------------------------------------------------------------------------------


def _hardware(evidence: Evidence) -> Verdict | None:
    replay = _part(evidence, "replay")
    if not replay:
        return None
    cause, first = "hardware or nondeterminism", replay["first_difference"]
    if not replay["again"]:
        return Verdict(cause, CERTAIN, ["two replays from the same checkpoint have different bits"])
    if first is None:
        return None
    told = f"step {first['step']} of the replay is {first['apart']:.1e} from the ledger"
    if not first["batch"]:
        why = f"step {first['step']} read another batch: stores, journal or ledger are not what they were"
        return Verdict(cause, POSSIBLE, [why])
    if replay["same_program"]:
        why = f"{told}, and two replays are equal: the run's own step went wrong, or the ledger was changed"
        return Verdict(cause, LIKELY, [why, *_first_norm(replay)])
    if first["apart"] > replay["close"]:
        why = f"{told}: more than {replay['close']:.0e}, which other devices or versions explain"
        return Verdict(cause, POSSIBLE, [why])
    return None


def _first_norm(replay: Mapping[str, Any]) -> list[str]:
    one = replay["first_norm"]
    return [f"{one['norm']} of step {one['step']} is {one['apart']:.1e} from the recorded one"] if one else []


def _altered(evidence: Evidence) -> Verdict | None:
    """The state that a checkpoint gave back is not the one that its step left."""
    found = _part(evidence, "checkpoint")
    if not found:
        return None
    step, reasons, confidence = found["step"], [], LIKELY
    for one in found["params"]:
        if one["apart"] > ALTERED:
            reasons.append(
                f"the parameters of checkpoint {step} are not those that step {step} left: norm of {one['group']} "
                f"{one['found']:.6g}, recorded {one['recorded']:.6g}"
            )
            confidence = CERTAIN
    through = found["through"]
    if through and through["first_difference"] is not None and through["first_difference"] > step:
        reasons.append(
            f"from checkpoint {through['from']} every step has the ledger's bits up to step {step}, and step "
            f"{through['first_difference']} is {through['apart']:.1e} apart: between them the state was changed"
        )
        confidence = CERTAIN if through["apart"] > ALTERED else confidence
    for one in found["moments"]:
        if not one["found"] <= MOMENTS * max(one["before"], 1e-30):
            reasons.append(
                f"the optimizer's {one['group']} has norm {one['found']:.3g} in checkpoint {step}, {one['before']:.3g} "
                f"in that before it"
            )
    return Verdict("state", confidence, reasons) if reasons else None


def _not_finite(evidence: Evidence) -> Verdict | None:
    if evidence["row"]["finite"]:
        return None
    reasons = [f"loss or gradient norm of step {evidence['at']} is not finite"]
    own, confidence = _part(evidence, "state"), LIKELY
    if own:
        again = not own[0]["own"]["finite"]
        confidence = CERTAIN if again else POSSIBLE
        reasons.append("it is so when the step is run again" if again else "it is finite when the step is run again")
        if again:
            every = not own[0]["others"]["finite"]
            reasons.append(f"{'other batches, too, are' if every else 'other batches are'} "
                           f"{'not ' if every else ''}finite from this state")  # fmt: skip
    reasons += _rows(evidence)
    return Verdict("numerics (not finite)", confidence, reasons)


def _data(evidence: Evidence) -> Verdict | None:
    own, data = _own(evidence), _part(evidence, "data")
    if not own or not data or not own[0] or own[1]:
        return None
    earlier, swapped = own[2], data["swapped"]
    cured = bool(swapped and swapped["ordinary"])
    always = bool(earlier) and all(earlier)
    repeated = any(row["repeat"] for row in data["rows"])
    reasons = ["the batch is out of range from the state before the step, and other batches are not"]
    if always:
        reasons.append("so it is from every earlier state that was tried")
    elif earlier:
        reasons.append("from an earlier state it is not")
    if cured:
        reasons.append(f"with other rows in the place of row(s) {_numbers(swapped['rows'])} it is ordinary")
    reasons += _rows(evidence)
    if cured and (always or (repeated and not earlier)):
        return Verdict("data", CERTAIN, reasons)
    if always or (cured and (repeated or not earlier)):
        return Verdict("data", LIKELY, reasons)
    return Verdict("data", POSSIBLE, reasons) if cured else None


def _rows(evidence: Evidence) -> list[str]:
    data = _part(evidence, "data")
    lines = []
    for row in (data or {"rows": []})["rows"][:4]:
        repeat = row["repeat"]
        what = f", {repeat['times']} times {repeat['period']} token(s)" if repeat else ""
        names = ", ".join(document["source"] for document in row["documents"][:3])
        lines.append(f"row {row['row']} of {row['subset']}: loss {row['loss']:.3f}, its subset's median "
                     f"{row['median']:.3f}{what}: {names}")  # fmt: skip
    return lines


def _optimizer(evidence: Evidence) -> Verdict | None:
    rates = [one for one in _changes(evidence, "learning rate") if one["ratio"] >= JUMP]
    keys = [one for one in _changes(evidence, "configuration") if any(re.fullmatch(RATE, key) for key in one["keys"])]
    updates = [one for one in evidence["crossings"] if one["series"].startswith("update_ratio")]
    numbers = [one for one in evidence["crossings"] if re.match(NUMBERS, one["series"])]
    others = [one["step"] for one in numbers if not re.match(OF_UPDATES, one["series"])]
    first = bool(updates) and updates[0]["step"] < min(others, default=evidence["at"])
    if not (rates or keys or first) or not unusual(evidence):
        return None
    reasons = [_at(one) for one in (*rates, *keys)]
    if updates:
        reasons.append(f"{updates[0]['series']} left its range at step {updates[0]['step']}")
    return _from_the_state(evidence, "optimizer or learning rate", reasons)


def _configuration(evidence: Evidence) -> Verdict | None:
    changed = [one for one in _changes(evidence, "configuration") if one["keys"]]
    soon = [one for one in _changes(evidence, "launch", "stage") if evidence["at"] - one["step"] <= SOON]
    soon = [one for one in soon if one["kind"] == "stage" or {"versions", "devices", "flags"} & set(one["keys"])]
    if not (changed or soon) or not unusual(evidence):
        return None
    reasons = [_at(one) for one in (*changed, *soon)]
    found = _from_the_state(evidence, "configuration change", reasons)
    return found if changed or found is None else found._replace(confidence=POSSIBLE)


def _from_the_state(evidence: Evidence, cause: str, reasons: list[str]) -> Verdict | None:
    """A change that came before: likely where it has left a state that no batch is ordinary in."""
    own = _own(evidence)
    if own is None:
        return Verdict(cause, POSSIBLE, reasons)
    if own[1]:
        return Verdict(cause, LIKELY, [*reasons, "from the state before the step other batches are out of range, too"])
    if own[0] and not any(own[2]):
        return Verdict(cause, POSSIBLE, reasons)
    return None


def _state(evidence: Evidence) -> Verdict | None:
    own = _own(evidence)
    if not own or not unusual(evidence):
        return None
    grown = [one for one in evidence["crossings"] if re.match(GROWING, one["series"])]
    reasons = [f"{one['series']} left its range {one['lead']} step(s) before" for one in grown[:2]]
    if own[1]:
        reasons.insert(0, "from the state before the step other batches are out of range, too")
        if own[2] and not any(own[2]):
            reasons.append("from an earlier state the same batch is ordinary")
        return Verdict("state", LIKELY if grown or own[2] else POSSIBLE, reasons)
    if own[0] and own[2] and not all(own[2]):
        reasons.insert(0, "the batch is out of range from the state before the step only: from an earlier state it is "
                          "ordinary, and so are other batches from this one")  # fmt: skip
        return Verdict("state", LIKELY, reasons)
    return None


RULES: tuple[Callable[[Evidence], Verdict | None], ...] = (
    _hardware, _altered, _not_finite, _data, _optimizer, _configuration, _state,
)  # fmt: skip


def _nothing(evidence: Evidence) -> Verdict | None:
    if unusual(evidence):
        return None
    replay = _part(evidence, "replay")
    reasons = [f"loss and gradient norm of step {evidence['at']} are finite and in their ranges"]
    if replay:
        reasons.append("two replays are equal" + ("" if replay["first_difference"] else ", and equal to the ledger"))
    return Verdict("nothing unusual", CERTAIN if replay else LIKELY, reasons)


def _not_the_data(evidence: Evidence) -> Verdict | None:
    own = _own(evidence)
    if not own or own[0]:
        return None
    return Verdict("not the data", LIKELY, ["run again, the batch is in the range of others from its state"])


def _not_known(evidence: Evidence) -> Verdict:
    tried = _own(evidence) is not None
    why = "the batch alone is out of range, which no rows explain" if tried else "nothing was run again"
    return Verdict("not known", POSSIBLE, [f"{why}; nothing else that is recorded explains it"])


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
