"""What a run has cost so far: tokens, FLOPs, device-hours, energy, money; each number with its formula.

Useful is what steps that count took; the rest of the time that the devices were held for is lost, by its cause. Time
between two launches costs nothing here: whoever kept the devices meanwhile adds it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import config as configuration
from k2jax.bucket import BucketPath
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.launches import read_launches
from k2jax.data.order import Order
from k2jax.errors import ConfigError
from k2jax.model.decoder import num_params
from k2jax.model.flops import flops_per_token, peak_flops
from k2jax.run import goodput
from k2jax.run.energy import stated_watts

NOT_HELD = ("down",)  # of goodput's causes, without devices


class Cost(NamedTuple):
    """One number."""

    name: str
    value: float | None  # None: not known, and the formula says why
    unit: str
    formula: str  # as it was computed here, with its numbers
    estimate: bool = False


def costs(
    workdir: Path | BucketPath, *, watts: float | None = None, price: float | None = None
) -> list[Cost]:
    """Of the steps that the run has made, as far as its records go.

    Args:
        watts: of one device, cooling and hosts included or not as you say; default: a stated one (energy.py).
        price: US dollars a device-hour.

    Raises ConfigError where the folder holds no run, or none that has kept time.
    """
    found = goodput.read_goodput(workdir)
    held, joules, known = _held(workdir)
    kinds = sorted({launch["devices"]["kind"] for launch in read_launches(workdir) if "devices" in launch})
    useful = found.seconds["step"] / max(sum(v for k, v in found.seconds.items() if k not in NOT_HELD), 1e-9)
    lost = {k: v for k, v in found.seconds.items() if v > 0 and k not in (*NOT_HELD, "step")}
    time_held = sum(lost.values()) + found.seconds["step"]
    rows = [*_arithmetic(workdir, found.last_step)]
    rows.append(
        Cost(
            "device-hours",
            held,
            "h",
            f"sum over launches of devices x time ({', '.join(kinds) or 'unknown'})",
            not known,
        )
    )
    rows.append(
        Cost(
            "useful", held * useful, "h", f"device-hours x {useful:.4f}, the share of steps that count", True
        )
    )
    for cause, seconds in sorted(lost.items(), key=lambda item: -item[1]):
        share = seconds / time_held
        rows.append(
            Cost(
                f"lost: {cause}",
                held * share,
                "h",
                f"device-hours x {share:.4f}: {goodput.CAUSES[cause]}",
                True,
            )
        )
    rows.append(_utilization(rows, kinds, held))
    rows.append(_energy(held, joules, kinds, watts))
    money = None if price is None else held * price
    why = "no price was given (--price)" if price is None else f"{held:.6g} device-hours x {price:g} $"
    return [*rows, Cost("money", money, "$", why, True)]


def _arithmetic(workdir: Path | BucketPath, last_step: int) -> Iterator[Cost]:
    """Tokens and the model's FLOPs of steps 1 to `last_step`, each made once."""
    epochs = read_epochs(workdir)
    trained = [epoch for epoch in epochs if epoch.manifest is not None]
    if not trained:
        raise ConfigError(
            f"--workdir={workdir}: holds imported weights and no training: there is nothing to add up"
        )
    model = configuration.from_dict(trained[-1].config).model
    tokens = causal = noncausal = 0.0
    parts = []
    for length, count in sorted(
        tokens_by_length(order_of(epochs, read_journal(workdir / "journal.jsonl")), last_step).items()
    ):
        flops = flops_per_token(model, length)
        tokens, causal, noncausal = (
            tokens + count,
            causal + count * flops.causal,
            noncausal + count * flops.noncausal,
        )
        parts.append(
            f"{count:,} tokens at length {length}: {flops.causal:.6g} and {flops.noncausal:.6g} a token"
        )
    yield Cost(
        "steps", last_step, "", "of the run's line: those made again or left behind count once, or not"
    )
    yield Cost("tokens", tokens, "", "sum over steps of rows x sequence length")
    how = "6 a matrix parameter and token, and attention's products"
    yield Cost(
        "model FLOPs, causal attention", causal, "FLOP", f"{how}, half of them masked; {'; '.join(parts)}"
    )
    yield Cost("model FLOPs, attention in full", noncausal, "FLOP", how)
    number = num_params(model)
    yield Cost(
        "6ND",
        6.0 * number * tokens,
        "FLOP",
        f"6 x {number:,} parameters x {tokens:,.0f} tokens, as often quoted",
        True,
    )


def tokens_by_length(order: Order | None, last_step: int) -> dict[int, int]:
    """{sequence length: tokens} of steps 1 to `last_step`, those of earlier epochs included."""
    found: dict[int, int] = {}
    while order is not None:
        for plan in order.stages:
            steps = min(plan.last_step, last_step) - max(plan.first_step, order.after_step + 1) + 1
            if steps > 0:
                length = plan.sequence_length
                found[length] = found.get(length, 0) + steps * plan.rows_per_step * length
        order, last_step = order.past, min(last_step, order.after_step)
    return found


def _held(workdir: Path | BucketPath) -> tuple[float, float | None, bool]:
    """Device-hours, joules where every launch counted them, and whether every launch's number of devices is known."""
    records, _ = goodput.read_records(workdir / goodput.NAME)
    launched = [launch["devices"]["count"] for launch in read_launches(workdir) if "devices" in launch]
    held, joules, known = 0.0, 0.0, True
    for record in records:
        devices = record.get("devices")
        known &= devices is not None
        held += record["seconds"] / 3600 * (devices or (launched[-1] if launched else 1))
        used = record.get("joules")
        joules = None if joules is None or used is None else joules + used * record.get("processes", 1)
    return held, joules, known


def _utilization(rows: list[Cost], kinds: list[str], held: float) -> Cost:
    """Of all the time that devices were held for: what a bill shows."""
    flops = next(row.value for row in rows if row.name.startswith("model FLOPs, causal"))
    peak = peak_flops(kinds[0]) if len(kinds) == 1 else None
    if peak is None or not held:
        return Cost(
            "utilization over all",
            None,
            "",
            f"the peak of {', '.join(kinds) or 'these devices'} is not known",
        )
    share = flops / (held * 3600 * peak)
    return Cost(
        "utilization over all", share, "", f"{flops:.6g} FLOP / ({held:.6g} h x 3600 x {peak:g} FLOP/s)"
    )


def _energy(held: float, joules: float | None, kinds: list[str], watts: float | None) -> Cost:
    if joules is not None and watts is None:
        return Cost(
            "energy", joules / 3.6e6, "kWh", "the GPUs' own counters (NVML), of process 0's host x processes"
        )
    given = watts or (stated_watts(kinds[0]) if len(kinds) == 1 else None)
    if given is None:
        what = f"nobody has stated the power of {', '.join(kinds) or 'these devices'}: give it (--watts)"
        return Cost("energy", None, "kWh", what, True)
    said = "as given" if watts else "the most that its maker states"
    return Cost(
        "energy", held * given / 1e3, "kWh", f"{held:.6g} device-hours x {given:g} W a device, {said}", True
    )


def as_json(rows: list[Cost]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]
