"""What is expected of an experiment before it runs: the loss by a scaling law, time, energy and money by a plan."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.plan.scaling import FRACTIONS, PUBLISHED, Size, check_ladder, extrapolate, read_rung, size_of
from k2jax.run.energy import stated_watts


def predict(
    config: ConfigDict,
    *,
    ladder: Sequence[Path] = (),
    law: str | None = None,
    plan: dict[str, Any] | None = None,
    watts: float | None = None,
    price: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """As prediction.json has it, less what says when it was made.

    Args:
        ladder: workdirs of finished smaller runs.
        law: in its place a name in PUBLISHED.
        plan: of tools/plan.py for this experiment; without one, no time is predicted.
        watts, price: of one chip: its power, and US dollars an hour.

    Raises ConfigError where the ladder is none for this experiment, or the plan is another's or does not fit.
    """
    size = size_of(config)
    steps = sum(stage.steps_per_chunk * stage.chunks for stage in config.stages)
    say(f"{size.params:,} parameters, {size.tokens:,} tokens, {size.flops:.4g} FLOP")
    loss = None
    if ladder:
        loss = by_ladder(config, size, steps, ladder)
    elif law:
        loss = by_published(size, steps, law, config.model.vocab_size)
    return {
        "config": configuration.to_dict(config),
        "experiment": config.name,
        "params": size.params,
        "tokens": size.tokens,
        "model_flops_causal": size.flops,
        "loss": loss,
        **by_plan(config, plan, watts, price),
    }


def by_ladder(config: ConfigDict, size: Size, steps: int, ladder: Sequence[Path]) -> dict[str, Any]:
    """The final loss by the law through the ladder; the curve by its runs' shapes, the median at each share."""
    rungs = [read_rung(workdir) for workdir in ladder]
    path = Path(config.data.tokenizer)
    tokenizer = tokenizer_sha256(path) if path.is_file() else None
    check_ladder(rungs, size, tokenizer)
    final, band, law = extrapolate(rungs, size.flops)
    shape = np.median([rung.shape for rung in rungs], axis=0)
    least, most = min(rung.size.flops for rung in rungs), max(rung.size.flops for rung in rungs)
    compared = "" if tokenizer else "; the experiment's tokenizer is not here, and was not compared"
    method = (
        f"L(C) = {law.floor:.4f} + {law.scale:.4f} (C / {law.unit:.4g} FLOP)^-{law.exponent:.4f}, C the model's causal "
        f"FLOPs, fitted to {len(rungs)} runs of {least:.3g} to {most:.3g} FLOP; this {size.flops / most:.3g} times as "
        f"much; band: without any one of them, and their largest distance from it{compared}"
    )
    return {
        "method": method,
        "ladder": [{"params": r.size.params, "tokens": r.size.tokens, "loss": r.loss} for r in rungs],
        "curve": _curve(steps, final * shape),
        "final": final,
        "band": list(band),
    }


def by_published(size: Size, steps: int, name: str, vocab_size: int) -> dict[str, Any]:
    """A published law at the tokens so far; nowhere above ln(vocabulary), what a model that knows nothing has: there
    the run is out of the law's range, and the method says so."""
    if name not in PUBLISHED:
        raise ConfigError(f"--law={name}: expected one of {', '.join(PUBLISHED)}")
    law = PUBLISHED[name]
    said, guess = [law.loss(size.params, fraction * size.tokens) for fraction in FRACTIONS], math.log(vocab_size)
    curve = [min(loss, guess) for loss in said]
    beyond = f"; capped at ln({vocab_size}): this run is far smaller than those of the law" if said[-1] > guess else ""
    method = (
        f"L = {law.floor} + {law.A} / N^{law.a} + {law.B} / D^{law.b}: {law.source}; of its authors' data and "
        f"tokenizer, in nats a token, and of runs that end at D: one in mid-schedule lies above it{beyond}"
    )
    return {"method": method, "curve": _curve(steps, curve), "final": curve[-1], "band": None}


def _curve(steps: int, losses: Sequence[float]) -> list[list[float]]:
    """[[step, loss]] at FRACTIONS of the steps."""
    return [[max(1, round(fraction * steps)), float(loss)] for fraction, loss in zip(FRACTIONS, losses, strict=True)]


def by_plan(
    config: ConfigDict, plan: dict[str, Any] | None, watts: float | None, price: float | None
) -> dict[str, Any]:
    """Time, energy and money of steps alone: no restarts, no waiting for data or storage."""
    unknown = dict.fromkeys(("step_time_s", "wall_s", "chip_hours", "energy_kwh", "cost_usd", "plan"))
    if plan is None:
        return unknown
    if plan.get("experiment") != config.name:
        raise ConfigError(f"the plan is of {plan.get('experiment')}, not of {config.name}: plan this experiment")
    if not plan.get("fits") or not plan.get("days"):
        raise ConfigError(f"the plan says that {config.name} does not fit {plan.get('topology')}: plan it on another")
    power = watts or stated_watts(plan["device_kind"])
    hours = plan["chip_hours"]
    return {
        "step_time_s": {name: stage["step_seconds"] for name, stage in plan["stages"].items()},
        "wall_s": plan["days"] * 86400,
        "chip_hours": hours,
        "energy_kwh": power and hours * power / 1e3,
        "cost_usd": price and hours * price,
        "plan": {key: plan[key] for key in ("topology", "device_kind", "devices", "mfu_causal", "mfu_noncausal")},
        "assumed": {"watts_a_chip": power, "usd_a_chip_hour": price, "useful_share_of_time": 1.0},
    }
