"""What gpu_suite.py asks: the cases of each section, as the columns that their rows begin with. Needs no JAX.

A case that has no row at the end (a section did not begin, ran into its limit, or died) is told by these.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

Row = dict[str, Any]
OURS = ("mosaic", "mosaic_ahead", "flash")  # the second is the first with Cut.ahead, which no default takes yet
# (rows, length, heads, kv heads, documents or not), of 16,384 tokens: attention times them, numerics checks some.
SHAPES = [(8, 2048, 16, 16, False), (4, 4096, 16, 16, False), (2, 8192, 16, 16, False), (2, 8192, 32, 8, False)]
SHAPES += [(8, 2048, 16, 16, True), (2, 8192, 16, 16, True), (2, 8192, 32, 8, True)]


class Section(NamedTuple):
    """One process."""

    limit_s: int  # it may take, where so much is left
    cases: Callable[[bool], list[Row]]  # of the smoke run or not


def _shape(rows: int, length: int, heads: int, kv_heads: int, documents: bool) -> Row:
    return {"rows": rows, "length": length, "heads": heads, "kv_heads": kv_heads, "documents": documents}


def contestants(case: Row) -> tuple[str, ...]:
    """Who can compute it at all: JAX's cuDNN masks documents as packed rows only, and wrongly with grouped heads."""
    if case["dtype"] == "float32":
        return ("flash",)
    if not case["documents"]:
        return ("cudnn", *OURS)
    return ("cudnn_packed", *OURS) if case["heads"] == case["kv_heads"] else OURS


def _numerics(smoke: bool) -> list[Row]:
    shapes = [(SHAPES[0], 128, "bfloat16"), (SHAPES[4], 128, "bfloat16"), (SHAPES[6], 128, "bfloat16")]
    shapes += [((2, 1000, 2, 1, True), 64, "bfloat16"), ((2, 1000, 2, 1, False), 64, "bfloat16")]
    shapes += [((2, 1024, 2, 2, False), 256, "bfloat16"), ((2, 500, 2, 1, True), 128, "float32")]
    if smoke:
        shapes = [((2, 50, 2, 1, False), 64, "bfloat16"), ((2, 50, 2, 1, True), 64, "float32")]
    cases = [_shape(*shape) | {"head_dim": H, "dtype": dtype} for shape, H, dtype in shapes]
    return [{"attention": name} | case for case in cases for name in (("flash",) if smoke else contestants(case))]


def _attention(smoke: bool) -> list[Row]:
    cases = [_shape(*shape) | {"head_dim": 128, "dtype": "bfloat16"} for shape in SHAPES]
    if smoke:
        cases = [_shape(1, 64, 2, 1, documents) | {"head_dim": 64, "dtype": "bfloat16"} for documents in (False, True)]
    names = {id(case): ("flash", "jnp") if smoke else contestants(case) for case in cases}
    found = [{"attention": name} | case for case in cases for name in names[id(case)]]
    return found if smoke else [*found, {"attention": "jnp"} | cases[0]]


def _blocks(smoke: bool) -> list[Row]:
    sides, deep = ((32,), (1,)) if smoke else ((64, 128), (2, 3))
    flash = {"queries": sides, "keys": sides, "warps": (4, 8), "stages": deep}
    mosaic = {"queries": (64, 128), "keys": (64, 128), "stages": (2, 3), "ahead": (False, True)}
    found = []
    for name, cuts in {"flash": flash, **({} if smoke else {"mosaic": mosaic})}.items():
        for kernel, *cut in product(("forward", "dkv", "dq"), *cuts.values()):
            found.append({"attention": name, "kernel": kernel} | dict(zip(cuts, cut, strict=True)))
    return found


def _train(smoke: bool) -> list[Row]:
    """Deterministic is the default: the last but one is what that costs."""
    best = {"attention": "jnp" if smoke else "cudnn", "batches": "one", "deterministic": True}
    others = [best | {"attention": "mosaic"}, best | {"deterministic": False}, best | {"attention": "flash"}]
    return [best, best | {"batches": "loader"}, *([] if smoke else others)]


# What matters most comes first: the last ones are those that a slow machine does not come to.
SECTIONS = {
    "train": Section(210, _train),
    "peer": Section(110, lambda smoke: [{"peer": "torch"}]),
    "bits": Section(120, lambda smoke: [{"launch": "second"}, {"launch": "killed and resumed"}]),
    "profile": Section(70, lambda smoke: [{"kind": "all"}]),
    "attention": Section(110, _attention),
    "numerics": Section(90, _numerics),
    "checkpoint": Section(65, lambda smoke: [{"benchmark": "checkpoint"}]),
    "loader": Section(40, lambda smoke: [{"benchmark": "loader"}]),
    "blocks": Section(300, _blocks),
}


def without_a_row(section: str, smoke: bool, rows: list[Row]) -> list[Row]:
    """Its cases that none of the rows is of."""
    return [case for case in SECTIONS[section].cases(smoke) if not any(case.items() <= row.items() for row in rows)]


def tried(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what was measured, or with why it was not: whatever XLA, cuDNN or memory says."""
    try:
        return row | measure()
    except NotImplementedError as error:
        return row | {"skipped": str(error)}
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
