"""The loss of a run that has not begun: by a power law in compute, fitted to a ladder of smaller runs, or by a
published law of parameters and tokens.

A ladder's runs differ in size and in nothing else: same tokenizer, same mix, same shares of its stages, and about the
same number of tokens a parameter, so that one law in compute, L(C) = E + K / C^g, holds for all of them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from k2jax import config as configuration
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.errors import ConfigError
from k2jax.model.decoder import num_params
from k2jax.model.flops import flops_per_token
from k2jax.run.ledger import Ledger, bits_float
from k2jax.run.prediction import final_steps

FRACTIONS = tuple(i / 50 for i in range(1, 51))  # of a run's steps, at which its curve is compared with others
FEWEST, MOST_RATIO = 4, 2.0


class Published(NamedTuple):
    """L(N, D) = E + A / N^a + B / D^b in nats a token: N parameters, D tokens."""

    floor: float
    A: float
    a: float
    B: float
    b: float
    source: str

    def loss(self, params: float, tokens: float) -> float:
        return self.floor + self.A / params**self.a + self.B / tokens**self.b


PUBLISHED = {
    "hoffmann2022": Published(1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al. 2022, arXiv 2203.15556, approach 3"),
    "besiroglu2024": Published(1.8172, 482.01, 0.3478, 2085.43, 0.3658, "Besiroglu et al. 2024, arXiv 2404.10102"),
}


class Size(NamedTuple):
    """What a run is as a point of a law."""

    params: int
    tokens: int
    flops: float  # of the model, causal attention
    shares: tuple[float, ...]  # of the tokens, by stage
    mixes: tuple[tuple[str, ...], ...]  # names of the subsets, by stage


class Rung(NamedTuple):
    """A finished run of a ladder."""

    name: str
    size: Size
    loss: float  # of its last steps
    shape: tuple[float, ...]  # loss at FRACTIONS, over `loss`
    tokenizer: str  # digest


class Fit(NamedTuple):
    floor: float
    scale: float  # K of C measured in `unit` FLOPs
    exponent: float
    unit: float

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * (flops / self.unit) ** -self.exponent


def size_of(config: Any) -> Size:
    """Of an experiment."""
    tokens = [s.steps_per_chunk * s.chunks * s.rows_per_step * s.sequence_length for s in config.stages]
    a_token = [flops_per_token(config.model, s.sequence_length).causal for s in config.stages]
    flops = sum(n * each for n, each in zip(tokens, a_token, strict=True))
    shares, mixes = tuple(n / sum(tokens) for n in tokens), tuple(tuple(sorted(s.mix)) for s in config.stages)
    return Size(num_params(config.model), sum(tokens), flops, shares, mixes)


def read_rung(workdir: Path) -> Rung:
    """ConfigError where the run is not finished, or has too few steps to be a point of a law."""
    epochs = read_epochs(workdir)
    if len(epochs) != 1 or epochs[0].manifest is None:
        raise ConfigError(f"--ladder: {workdir} changed its configuration or data on the way: no point of one law")
    order = order_of(epochs, read_journal(workdir / "journal.jsonl"))
    rows = [row for row in Ledger(workdir / "ledger", None).steps.rows() if row["applied"]]
    last = rows[-1]["step"] if rows else 0
    if last < order.num_steps or len(rows) < len(FRACTIONS):
        raise ConfigError(
            f"--ladder: {workdir} has {last} of {order.num_steps} steps: expected a finished run of at least "
            f"{len(FRACTIONS)}"
        )
    losses = np.array([bits_float(row["loss"]) for row in rows])
    size = size_of(configuration.from_dict(epochs[0].config))
    final = smoothed(losses, 1.0)
    shape = tuple(smoothed(losses, fraction) / final for fraction in FRACTIONS)
    return Rung(str(workdir), size, final, shape, epochs[0].manifest["tokenizer_sha256"])


def smoothed(losses: np.ndarray, fraction: float) -> float:
    """Mean over as many steps up to `fraction` of them as a final loss is the mean of."""
    end = max(1, round(fraction * len(losses)))
    return float(losses[max(0, end - final_steps(len(losses))) : end].mean())


def check_ladder(rungs: Sequence[Rung], target: Size, tokenizer: str | None) -> None:
    """ConfigError where the runs are no ladder to the target: one law would not hold for all."""
    if len({rung.size.flops for rung in rungs}) < FEWEST:
        raise ConfigError(f"--ladder: {len(rungs)} run(s), expected at least {FEWEST} of different compute")
    for rung in rungs:
        per_param = (rung.size.tokens / rung.size.params) / (target.tokens / target.params)
        wrong = None
        if not 1 / MOST_RATIO <= per_param <= MOST_RATIO:
            wrong = f"{per_param:.3g} times as many tokens a parameter; expected within a factor of {MOST_RATIO:g}"
        elif tokenizer and rung.tokenizer != tokenizer:
            wrong = f"tokenizer {rung.tokenizer[:12]}, not {tokenizer[:12]}: losses a token cannot be compared"
        elif rung.size.mixes != target.mixes:
            wrong = f"stages of subsets {rung.size.mixes}, not {target.mixes}"
        elif max(abs(a - b) for a, b in zip(rung.size.shares, target.shares, strict=True)) > 0.02:
            wrong = f"shares of its stages {_percent(rung.size.shares)}, not {_percent(target.shares)}"
        elif rung.size.flops >= target.flops:
            wrong = "no less compute than what is to be predicted"
        if wrong:
            raise ConfigError(f"--ladder: {rung.name} is no smaller copy of this experiment: it has {wrong}")


def _percent(shares: tuple[float, ...]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def fit(flops: Sequence[float], losses: Sequence[float]) -> Fit:
    """The law through points, least squares of log loss, from several beginnings."""
    C, L = np.asarray(flops, np.float64), np.asarray(losses, np.float64)
    unit = float(np.exp(np.log(C).mean()))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(np.exp(p[0]) + np.exp(p[1]) * (C / unit) ** -np.exp(p[2])) - np.log(L)

    best = None
    for floor in (0.1, 0.5, 0.9):
        for exponent in (0.03, 0.1, 0.3):
            start = [math.log(L.min() * floor), math.log(max(L.mean() - L.min() * floor, 1e-3)), math.log(exponent)]
            found = least_squares(residuals, start, bounds=([-20, -20, -6], [math.log(L.min()), 10, 1]))
            best = found if best is None or found.cost < best.cost else best
    floor, scale, exponent = np.exp(best.x)
    return Fit(float(floor), float(scale), float(exponent), unit)


def extrapolate(rungs: Sequence[Rung], flops: float) -> tuple[float, tuple[float, float], Fit]:
    """(loss, band, law) at a compute: the band holds what the law would say without any one of the rungs, and as much
    more as it is off at the worst of them."""
    C, L = [rung.size.flops for rung in rungs], [rung.loss for rung in rungs]
    law = fit(C, L)
    off = max(abs(law.loss(c) / loss - 1) for c, loss in zip(C, L, strict=True))
    without = [fit(C[:i] + C[i + 1 :], L[:i] + L[i + 1 :]).loss(flops) for i in range(len(C))]
    found = [*without, law.loss(flops)]
    return law.loss(flops), (min(found) * (1 - off), max(found) * (1 + off)), law
