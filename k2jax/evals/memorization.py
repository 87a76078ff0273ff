"""`--tasks memorization`: how much of what it read a checkpoint recites, as LLM360 measured it (Analysis360).

The first 32 tokens of a row that the run read are the prompt; the score is the share of the next 32 that greedy
decoding gets right, position by position, and a row that it gets right in full is a full match. By chunk of the data,
so that checkpoints and chunks make a table; and for windows that no step reads, to set the rows beside.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from k2jax.data.chunks import checkpoint_steps, chunk_of_step
from k2jax.data.conversations import ConversationRows
from k2jax.data.loader import validation_starts
from k2jax.data.manifest import is_packed
from k2jax.data.order import Order, Rows, StagePlan
from k2jax.data.provenance import Run
from k2jax.errors import ConfigError
from k2jax.evals.identity import stores_digest
from k2jax.evals.progress import bar
from k2jax.evals.results import Outcome
from k2jax.evals.subject import Subject
from k2jax.run.saved import SavedStep

PROMPT, NEW = 32, 32
STEPS_A_CHUNK = 4  # that rows are taken from, where no steps are named


class Window(NamedTuple):
    """The beginning of a row, and where it is from."""

    step: int | None  # None: held out
    chunk: int | None
    row: int | None  # its number in the step
    subset: str
    start: int  # in the store
    tokens: np.ndarray  # the first PROMPT + NEW


class Memorization:
    """Of `rows` rows of each chunk up to the checkpoint's, or of each step named, and of as many held-out windows."""

    name, version, unsafe = "memorization", 1, False

    def __init__(self, steps: tuple[int, ...] | None = None, rows: int = 64):
        self.steps, self.rows = steps, rows

    def settings(self, saved: SavedStep) -> dict[str, Any]:
        return {
            "steps": list(self.steps) if self.steps else "chunks",
            "rows": self.rows,
            "tokens": [PROMPT, NEW],
            "data_sha256": stores_digest(saved),
            "order": saved.meta["data"].get("order"),
        }

    def evaluate(self, subject: Subject) -> Outcome:
        run, last = subject.run, subject.saved.step
        windows = [w for steps in self._steps(run.order, last) for w in read_windows(run, steps, self.rows)]
        if not windows:
            raise ConfigError(
                f"memorization: steps 1 to {last} read no row of {PROMPT + NEW} tokens or more: name steps of a longer "
                f"stage, or leave the task out"
            )
        windows += held_out_windows(run, subject.saved.stage.mix.keys(), self.rows)
        recited = recite(subject, windows)
        samples = [
            {
                **w._asdict(),
                "tokens": w.tokens.tolist(),
                "recited": new,
                "score": float(np.mean(w.tokens[PROMPT:] == new)),
            }
            for w, new in zip(windows, recited, strict=True)
        ]
        metrics = summaries(samples, last)
        held_out = metrics["held_out"]
        headline = f"score {metrics['read']['score']:.4f}" if metrics["read"] else "nothing read"
        headline += f" full {metrics['read']['full_match_rate']:.4f}" if metrics["read"] else ""
        headline += f" (held out: score {held_out['score']:.4f})" if held_out else ""
        return Outcome(headline, metrics, samples, {})

    def _steps(self, order: Order, last: int) -> list[list[int]]:
        """The steps to take rows from; `rows` from each of the lists."""
        if self.steps:
            return [[step] for step in self.steps]
        chunks, first = [], 1
        for end in checkpoint_steps(order):
            if first <= last:
                steps = np.linspace(first, min(end, last), STEPS_A_CHUNK).round().astype(int)
                chunks.append(sorted(set(steps.tolist())))
            first = end + 1
        return [steps for steps in chunks if order.stage_of_step(steps[0]).sequence_length >= PROMPT + NEW]


def read_windows(run: Run, steps: list[int], rows: int) -> list[Window]:
    """About `rows` rows, evenly spaced, of some steps of one stage. ConfigError when its rows are too short."""
    run, plan = run.of_step(steps[0]), run.order.stage_of_step(steps[0])
    if plan.sequence_length < PROMPT + NEW:
        raise ConfigError(
            f"memorization: rows of step {steps[0]} have {plan.sequence_length} tokens, {PROMPT + NEW} are needed: "
            f"name steps of another stage"
        )
    each = min(-(-rows // len(steps)), plan.rows_per_step)
    numbers = np.arange(each) * plan.rows_per_step // each
    windows = []
    for step in steps:
        chunk, found = chunk_of_step(run.order, step), run.order.rows(run.order.positions(step)[numbers])
        for number, name, start in _beginnings(run, plan, numbers, found):
            [tokens] = run.stores[name].read([start], PROMPT + NEW)
            windows.append(Window(step, chunk, number, name, start, tokens))
    return windows


def _beginnings(run: Run, plan: StagePlan, numbers: np.ndarray, found: Rows) -> Iterator[tuple[int, str, int]]:
    """(number, subset, first token in the store) of rows; of conversations that of a row's first, the longest in it.

    Rows whose conversations are all too short are left out.
    """
    if not is_packed(run.manifest["stages"][plan.index]):
        for number, subset, window in zip(numbers.tolist(), found.subset, found.window, strict=True):
            yield number, run.subset_names[subset], int(window) * plan.sequence_length
        return
    for name, here, placed in ConversationRows(run.manifest, plan.index, run.stores).placed(found):
        for at in np.flatnonzero((placed.start == 0) & (placed.length >= PROMPT + NEW)):
            yield int(numbers[here[placed.row[at]]]), name, int(placed.begin[at])


def held_out_windows(run: Run, subsets: list[str], rows: int) -> list[Window]:
    """About `rows` windows that no step reads, of all the subsets."""
    windows = []
    for name in subsets:
        store, each = run.stores[name], -(-rows // len(subsets))
        starts = validation_starts(store, PROMPT + NEW, "inside", each)
        for start, tokens in zip(starts.tolist(), store.read(starts, PROMPT + NEW), strict=True):
            windows.append(Window(None, None, None, name, start, tokens))
    return windows


def recite(subject: Subject, windows: list[Window]) -> list[list[int]]:
    """What greedy decoding makes of each window's prompt: NEW tokens, the end of a document among them."""
    most = max(1, subject.batch_tokens // (PROMPT + NEW))
    size = -(-len(windows) // -(-len(windows) // most))  # of about equal batches, all of one shape
    recited: list[list[int]] = []
    with bar("memorization", len(windows), "row") as done:
        for first in range(0, len(windows), size):
            some = windows[first : first + size]
            prompts = [w.tokens[:PROMPT].tolist() for w in some]
            filled = prompts + [prompts[-1]] * (size - len(prompts))
            new = subject.generator.generate(filled, NEW, stop_at_eos=False)
            recited += new[: len(some)]
            done.update(len(some))
    return recited


def summaries(samples: list[dict[str, Any]], last_step: int) -> dict[str, Any]:
    """Of all rows read up to the checkpoint's step, of later ones, of held-out windows, and by chunk."""
    held_out = [s for s in samples if s["step"] is None]
    rows = [s for s in samples if s["step"] is not None]
    chunks = sorted({s["chunk"] for s in rows})
    return {
        "read": summary([s for s in rows if s["step"] <= last_step]),
        "later": summary([s for s in rows if s["step"] > last_step]),
        "held_out": summary(held_out),
        "chunks": {chunk: summary([s for s in rows if s["chunk"] == chunk]) for chunk in chunks},
    }


def summary(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not samples:
        return None
    scores = np.array([s["score"] for s in samples])
    return {
        "score": float(scores.mean()),
        "score_stderr": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        "full_match_rate": float((scores == 1.0).mean()),
        "rows": len(samples),
    }
