"""A diagnosis (doctor.py) as text for a terminal, as JSON, and as part of a page. What is others' text is escaped."""

import html as page
import json
import math
from collections.abc import Mapping
from typing import Any

from k2jax.text import shown

Diagnosis = Mapping[str, Any]


def as_json(diagnosis: Diagnosis) -> str:
    """One line; what is not finite is null."""
    return json.dumps(_finite(diagnosis), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(diagnosis: Diagnosis) -> list[str]:
    """Lines for a terminal."""
    lines = []
    for title, rows in parts(diagnosis):
        lines += [title, *(f"  {row}" for row in rows)]
    return [shown(line) for line in lines]


def html(diagnosis: Diagnosis) -> str:
    """A section of a page: no script, no style of its own."""
    (title, verdict), *others = parts(diagnosis)
    found = [f"<h2>{_escaped(title)}</h2>", *(f"<p>{_escaped(line)}</p>" for line in verdict)]
    for title, rows in others:
        items = "".join(f"<li>{_escaped(row)}</li>" for row in rows)
        found += [f"<h3>{_escaped(title)}</h3>", f"<ul>{items}</ul>"]
    return '<section class="doctor">' + "".join(found) + "</section>"


def _escaped(line: str) -> str:
    return page.escape(shown(line))


def parts(d: Diagnosis) -> list[tuple[str, list[str]]]:
    """[(title, lines)], the verdict first."""
    first, *others = d["verdicts"]
    row, at = d["row"], d["at"]
    head = [f"loss {_number(row['loss'])}, gradient norm {_number(row['grad_norm'])}: {_decided(row)}"]
    if at != d["step"]:
        head.append(f"above a limit since step {at}, which is what was looked at")
    head += first["reasons"]
    head += [f"also {one['confidence']}: {one['cause']}: {'; '.join(one['reasons'])}" for one in others]
    return [
        (f"step {d['step']}: {first['cause']} ({first['confidence']})", head),
        ("which series left its range first", _crossings(d)),
        ("what changed in the 200 steps before", [f"step {c['step']}: {c['kind']}: {c['what']}" for c in d["changes"]]
         or ["nothing that is recorded"]),
        *((title, _part(d[key], tell)) for key, title, tell in PARTS if key in d),
    ]  # fmt: skip


def _decided(row: Mapping[str, Any]) -> str:
    done = "an update was made" if row["applied"] else "no update was made"
    return f"above a limit, {done}" if row["outlier"] else done


def _crossings(d: Diagnosis) -> list[str]:
    lines = [
        f"{one['series']}: at step {one['step']}, {one['lead']} before: {_number(one['value'])}, limit "
        f"{_number(one['limit'])}, median {_number(one['median'])} of {one['values']}"
        + (f"; up to step {one['last']}" if one["last"] < d["step"] else "")
        for one in d["crossings"]
    ]
    lines += [
        f"layer {one['layer']}: {one['series']} {_number(one['value'])}, {_number(one['before'])} at step {one['step']}"
        for one in d["layers"]
    ]
    known = [item for item in d["ranges"].items() if item[1]["values"]]
    return lines or [f"none of them: {', '.join(map(_range, known)) or 'too few steps before it for a range'}"]


def _range(item: tuple[str, Mapping[str, Any]]) -> str:
    name, one = item
    return f"{name} has median {_number(one['median'])} and limit {_number(one['limit'])}"


def _part(part: Any, tell: Any) -> list[str]:
    if isinstance(part, Mapping) and "not_possible" in part:
        return [f"not possible: {part['not_possible']}"]
    return tell(part)


def _replay(part: Mapping[str, Any]) -> list[str]:
    start = f"checkpoint {part['from']}" if part["from"] else "the seed"
    first = part["first_difference"]
    ledger = "equal to the ledger in every bit"
    if first:
        ledger = f"the first that differs from the ledger is step {first['step']}, {first['apart']:.1e} apart"
        if not first["batch"]:
            ledger += ", another batch was read"
        if not part["same_program"] and part["apart"] <= part["close"]:
            ledger += f"; on other devices or versions, at most {part['apart']:.1e} apart: rounding, or not: no telling"
    same = "have the same bits" if part["again"] else f"differ: losses {part['loss'][0]!r} and {part['loss'][1]!r}"
    return [f"{part['steps']} step(s) from {start}, twice: the two {same}", ledger]


def _checkpoint(part: Mapping[str, Any]) -> list[str]:
    if not part["step"]:
        return ["there is none before the step: from the seed"]
    apart = max((one["apart"] for one in part["params"]), default=None)
    known = f"norms of its parameters are {apart or 0:.1e} from what its step recorded"
    known = "what its step left is not recorded" if apart is None else known
    lines = [f"checkpoint {part['step']}: {known}"]
    moments = [one for one in part["moments"] if one["before"]]
    if moments:
        one = max(moments, key=lambda one: one["found"] / one["before"])
        lines.append(f"the optimizer's moments: since the checkpoint before, the norm of {one['group']} grew most: "
                     f"{_number(one['before'])} to {_number(one['found'])}")  # fmt: skip
    if through := part["through"]:
        step = through["first_difference"]
        equal = "the ledger's bits past it" if step is None else f"the ledger's bits before step {step}"
        lines.append(f"from checkpoint {through['from']}: {equal}")
    return lines


def _states(part: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for one in part:
        own, others = one["own"], one["others"]
        normal = ", ".join(map(_number, others["loss"]))
        norms = ", ".join(map(_number, others["grad_norm"]))
        said = "out of range" if own["unusual"] else "ordinary"
        lines.append(
            f"after step {one['state']}: its batch has loss {_number(own['loss'])} and gradient norm "
            f"{_number(own['grad_norm'])}: {said}; those of steps {', '.join(map(str, others['steps']))} have {normal} "
            f"and {norms}{': out of range, too' if others['unusual'] else ''}"
        )
    return lines


def _data(part: Mapping[str, Any]) -> list[str]:
    lines = [f"{part['rows_out_of_range']} of {part['of']} rows are out of their subset's range or repeat an n-gram"]
    for one in part["rows"]:
        repeat = one["repeat"]
        said = f"; {repeat['period']} token(s) {repeat['times']} times from {repeat['first']} on" if repeat else ""
        lines.append(
            f"row {one['row']} of {one['subset']}: loss {_number(one['loss'])}, median {_number(one['median'])}, limit "
            f"{_number(one['limit'])}{said}"
        )
        for document in one["documents"]:
            a, b = document["in_row"]
            lines.append(f"  tokens {a} to {b} are of {document['source']} (id {document['id']}): "
                         f"{json.dumps(document['text'], ensure_ascii=False)}")  # fmt: skip
    if swapped := part["swapped"]:
        rows = ", ".join(map(str, swapped["rows"][:8]))
        lines.append(
            f"with other rows in the place of {rows}: loss {_number(swapped['loss'])}, gradient norm "
            f"{_number(swapped['grad_norm'])}: {'ordinary' if swapped['ordinary'] else 'still out of range'}"
        )
    return lines


PARTS = (
    ("replay", "the step run again", _replay),
    ("checkpoint", "the checkpoint before it", _checkpoint),
    ("state", "its batch and others, from several states", _states),
    ("data", "the rows of its batch", _data),
)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.5g}"
