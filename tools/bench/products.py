"""What products with inputs in 8 bits (precision.products) do to the loss of a small run, as a line.

    python tools/bench/products.py --data=data/smoke [--steps=200] [--lanes float32 float8]

The model of experiments/smoke.py on its docstrings, the same rows in every lane, which differ in nothing but their
products; then the loss of the same windows that none has read. Two lanes say what a difference is worth: bfloat16's own
rounding, and another seed of the parameters. Two are no option of the configuration: int8 for the weight gradient, too,
and float8 without it. Faster tokens are not faster learning: of time, this says nothing (a CPU has no such products).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

LENGTH = 128  # of the first stage
LANES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float8": {"precision.products": "float8"},
    "int8": {"precision.products": "int8"},
    "float32, another seed": {"seed": 1},
    "int8, and for weight gradients": {"precision.products": "int8"},
    "bfloat16": {"precision.compute": "bfloat16"},
    "float8, but for weight gradients": {"precision.products": "float8"},
}
LAST, HELD_OUT = 20, 64  # steps whose mean loss is told; windows that no step reads


def windows(path: Path, rows: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """((steps, rows, T+1), (HELD_OUT, T+1)) of a store's tokens, in an order of their own."""
    from k2jax.data.store import Store

    store = Store.open(path)
    starts = LENGTH * np.random.default_rng(0).permutation(store.num_train_tokens // LENGTH - 1)
    chosen = store.read(starts[: steps * rows + HELD_OUT], LENGTH + 1).astype(np.int32)
    return chosen[HELD_OUT:].reshape(steps, rows, -1), chosen[:HELD_OUT]


def run_lane(lane: str, data: Path, steps: int, rows: int) -> dict[str, Any]:
    """{"train": mean loss of the LAST steps, "held_out": loss, "losses": of every tenth step}."""
    import jax

    from k2jax.data.order import StagePlan
    from k2jax.model.decoder import compute_dtype
    from k2jax.parallel import products, sharding
    from k2jax.training.losses import row_losses
    from k2jax.training.optimizer import first_state
    from k2jax.training.placement import make_state, place_batches, place_state
    from k2jax.training.program import step_function

    if lane == "float8, but for weight gradients":
        del products.TYPES["float8"]["dw"]
    if lane == "int8, and for weight gradients":
        products.TYPES["int8"]["dw"] = products.INT8, products.INT8
    keys = {"stages.0.rows_per_step": rows, "stability.skip": False, **LANES[lane]}
    c = configuration.load(REPO / "experiments" / "smoke.py", [f"{key}={value}" for key, value in keys.items()])
    train, held_out = windows(data / "docstrings", rows, steps)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    plan = StagePlan("bench", 0, LENGTH, rows, steps, 1, 0, steps * rows, 1, steps)
    rest = {"subset": np.zeros(rows, np.int32), "digest": np.zeros((rows, 8), np.uint32)}
    with jax.set_mesh(mesh):
        shardings = place_state(c, jax.eval_shape(lambda: first_state(c)), mesh)
        step = step_function(c, plan, shardings, mesh, eos_id=2, num_subsets=1)
        state, place, losses = make_state(c, shardings), place_batches(c.stages[0], mesh), []
        for tokens in train:
            state, metrics = step(state, place.globalize({"tokens": tokens, **rest}))
            losses.append(float(metrics["loss"]))
        of_rows = partial(row_losses, config=c, stage=c.stages[0], eos_id=2, compute_dtype=compute_dtype(c))
        nats = jax.jit(of_rows)(state.params, held_out)[1].nats
    return {
        "train": round(float(np.mean(losses[-LAST:])), 4),
        "held_out": round(float(nats.sum()) / (HELD_OUT * LENGTH), 4),
        "losses": [round(loss, 4) for loss in losses[9::10]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--data", required=True, metavar="DIR", help="what prepare_data.py made for experiments/smoke.py")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each lane (default: 200)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=list(LANES), help="default: all, one by one")
    parser.add_argument("--here", action="store_true", help="of one lane, in this process")
    args = parser.parse_args()
    if args.here:
        print("LANE " + json.dumps(run_lane(args.lanes[0], args.data, args.steps, args.rows)))
        return
    lanes = {}
    for lane in args.lanes:
        sizes = [f"--data={args.data}", f"--steps={args.steps}", f"--rows={args.rows}"]
        command = [sys.executable, __file__, *sizes, "--here", "--lanes", lane]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{lane}: {done.stderr[-2000:]}")
        lanes[lane] = json.loads(done.stdout.partition("LANE ")[2])
        print(lane, lanes[lane]["train"], lanes[lane]["held_out"], file=sys.stderr, flush=True)
    here = {"device": platform.machine(), "cpus": os.cpu_count(), "jax": version("jax"), "jaxlib": version("jaxlib")}
    sizes = {"steps": args.steps, "tokens_per_step": args.rows * LENGTH}
    print(json.dumps({"bench": "products", "date": str(date.today()), **here, **sizes, "lanes": lanes}))


if __name__ == "__main__":
    run_main(main)
