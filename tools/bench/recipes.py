"""Optimizers and schedules side by side: one small model, the same tokens, a sweep of learning rates for each.

    python tools/bench/recipes.py --data=data/smoke [--steps=400] [--recipes adamw muon] [--seeds 0 1]

A JSON line for each run: recipe, peak rate, seed, held-out loss by tokens and by CPU-seconds of the steps, all threads
together (other work on the machine counts little in them; compiling is left out). Rates go by factors of two, on until
the best is not the last that was tried; there the other seeds of the parameters run, too, since what two seeds differ
by is what a difference is worth. The model and the rows are small: which recipe is first here need not be first at K2's
size, and what an optimizer costs is a larger share of a step with few tokens.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

LENGTH, HELD_OUT, LOOKS = 128, 64, 8  # tokens a row; windows that no step reads; times that their loss is taken
MODEL = {"dim": 96, "num_layers": 3, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "ffn_dim": 256}


class Recipe(NamedTuple):
    """Keys of the configuration and of its stage, and the peak rates that are tried first."""

    keys: dict[str, Any]
    rates: tuple[float, ...]


COSINE = {"stages.0.schedule": "cosine"}
RECIPES = {
    "adamw": Recipe(COSINE, (4e-3, 8e-3)),
    "muon": Recipe({**COSINE, "optimizer.name": "muon"}, (4e-3, 8e-3)),
    "lion": Recipe(
        {**COSINE, "optimizer.name": "lion", "optimizer.b1": 0.95, "optimizer.b2": 0.98}, (5e-4, 1e-3)
    ),
    "adafactor": Recipe({**COSINE, "optimizer.name": "adafactor"}, (4e-3, 8e-3)),
    "adamw, wsd": Recipe({"stages.0.schedule": "wsd", "stages.0.decay_share": 0.2}, (4e-3, 8e-3)),
    "adamw, linear": Recipe({"stages.0.schedule": "linear"}, (4e-3, 8e-3)),
    "adamw, average": Recipe({**COSINE, "optimizer.ema_decay": 0.98}, (4e-3, 8e-3)),
}


def experiment(recipe: Recipe, rows: int) -> Any:
    """That of the smoke run, smaller, and the recipe's keys."""
    sizes = {f"model.{key}": value for key, value in MODEL.items()}
    keys = {**sizes, "stages.0.rows_per_step": rows, "stability.skip": False, **recipe.keys}
    return configuration.load(REPO / "experiments" / "smoke.py", [f"{key}={value}" for key, value in keys.items()])


def windows(path: Path, rows: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """((steps, 1, rows, T+1), (HELD_OUT, T+1)) of a store's tokens, in an order of their own."""
    from k2jax.data.store import Store

    store = Store.open(path)
    there = store.num_train_tokens // LENGTH - 1
    if there < steps * rows + HELD_OUT:
        sys.exit(f"{path} has {there:,} windows, --steps={steps} --rows={rows} need {steps * rows + HELD_OUT:,}")
    starts = LENGTH * np.random.default_rng(0).permutation(there)[: steps * rows + HELD_OUT]
    chosen = store.read(starts, LENGTH + 1).astype(np.int32)
    return chosen[HELD_OUT:].reshape(steps, 1, rows, -1), chosen[:HELD_OUT]


class Lane:
    """A recipe, compiled once: its peak rate and its parameters come in with each run."""

    def __init__(self, recipe: Recipe, steps: int, rows: int):
        import jax
        import jax.numpy as jnp

        from k2jax.training.losses import row_losses
        from k2jax.training.optimizer import first_state
        from k2jax.training.step import Batch, train_step

        c = experiment(recipe, rows)
        row, rest = dict(c.stages[0]), {"eos_id": 2, "num_subsets": 1, "compute_dtype": jnp.float32}
        self.batch = lambda tokens: Batch(tokens, np.zeros((1, rows), np.int32), np.zeros((1, rows, 8), np.uint32))
        parts = {"model": c.model, "optimizer": c.optimizer}
        self.start: Callable[[int], Any] = jax.jit(lambda seed: first_state(SimpleNamespace(**parts, seed=seed)))

        def step(state: Any, batch: Batch, rate: Any) -> Any:
            stage = SimpleNamespace(**{**row, "lr_peak": rate, "lr_final": 0.1 * rate, "warmup_steps": steps // 20})
            return train_step(state, batch, config=c, stage=stage, first_step=1, num_steps=steps, **rest)

        self.step = jax.jit(step, donate_argnums=0)
        of_rows = partial(row_losses, config=c, stage=c.stages[0], eos_id=2, compute_dtype=jnp.float32)
        self.held_out = jax.jit(lambda params, tokens: of_rows(params, tokens)[1].nats.sum() / (HELD_OUT * LENGTH))

    def run(self, rate: float, seed: int, train: np.ndarray, held_out: np.ndarray) -> list[dict[str, float]]:
        """[{"step", "cpu_s", "loss"}, ...], LOOKS of them; the loss of the average, where there is one."""
        import jax

        state, used, found = self.start(seed), 0.0, []
        for number, tokens in enumerate(train, start=1):
            batch, before = self.batch(tokens), time.process_time()
            state, metrics = self.step(state, batch, np.float32(rate))
            jax.block_until_ready(metrics)
            used += time.process_time() - before if number > 1 else 0.0  # the first compiles
            if number % (len(train) // LOOKS) == 0:
                loss = float(self.held_out(state.ema or state.params, held_out))
                found.append({"step": number, "cpu_s": round(used, 1), "loss": round(loss, 4)})
        return found


def sweep(
    lane: Lane, rates: tuple[float, ...], seeds: list[int], train: np.ndarray, held_out: np.ndarray
) -> Iterator[tuple[float, int, list[dict[str, float]]]]:
    """(rate, seed, curve) of each run: the first seed over the rates, the others at the best of them."""
    waiting, last = list(rates), {}
    while waiting:
        rate = waiting.pop(0)
        curve = lane.run(rate, seeds[0], train, held_out)
        last[rate] = curve[-1]["loss"] if np.isfinite(curve[-1]["loss"]) else np.inf
        yield rate, seeds[0], curve
        best = min(last, key=last.__getitem__)
        if not waiting and best in (min(last), max(last)):
            waiting.append(best * 2 if best == max(last) else best / 2)
    for seed in seeds[1:]:
        yield best, seed, lane.run(best, seed, train, held_out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--data", required=True, metavar="DIR", help="what prepare_data.py made for experiments/smoke.py")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each run (default: 400)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help=f"of {LENGTH} tokens, a step (default: 8)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="the first sweeps (default: 0 1)")
    args = parser.parse_args()
    if args.steps % LOOKS:
        parser.error(f"--steps={args.steps}: must be a multiple of {LOOKS}")
    train, held_out = windows(args.data / "docstrings", args.rows, args.steps)
    here = {"device": platform.machine(), "cpus": os.cpu_count(), "jax": version("jax")}
    same = {"bench": "recipes", "date": str(date.today()), **here, "tokens_per_step": args.rows * LENGTH}
    for name in args.recipes:
        lane = Lane(RECIPES[name], args.steps, args.rows)
        for rate, seed, curve in sweep(lane, RECIPES[name].rates, args.seeds, train, held_out):
            print(json.dumps({**same, "recipe": name, "rate": rate, "seed": seed, "held_out": curve}), flush=True)


if __name__ == "__main__":
    run_main(main)
