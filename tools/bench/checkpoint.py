"""How long a checkpoint holds training up: an asynchronous save beside a synchronous one, in one run.

    python tools/bench/checkpoint.py [--rounds 5] [--dim 512] [--layers 8] [--product 1500] [--folder DIR]

Prints one JSON line; medians over the rounds. `stall_s` is the time for which the training loop is held by an
asynchronous save (the call itself: waiting for the arrays' copies); `sync_s` is the time until the same state is
committed. `digest_s` is what the digests of all arrays cost on the device, alone. On a CPU the writer then shares the
cores with the training steps: `step_during_save_ratio` says how much slower those are.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from k2jax import config as configuration
from k2jax import paths
from k2jax.errors import run_main
from k2jax.parallel import sharding
from k2jax.run import digest
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.state import flat
from k2jax.training.optimizer import first_state
from k2jax.training.placement import make_state, place_state


def timed(function: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--product", type=int, default=1500, help="rows of the matrices that a step multiplies")
    paths.add(parser, "--folder", help="where to write; a temporary folder unless told")
    args = parser.parse_args()
    c = configuration.base()
    with c.unlocked():
        c.model.update(vocab_size=32000, dim=args.dim, num_layers=args.layers, num_heads=8, num_kv_heads=8)
        c.model.update(head_dim=args.dim // 8, ffn_dim=args.dim * 43 // 16)
    mesh = sharding.make_mesh(c.mesh)
    shapes = jax.eval_shape(lambda: first_state(c))
    shardings = place_state(c, shapes, mesh)
    touch = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=shardings)
    product, x = jax.jit(lambda x: x @ x @ x), jnp.ones((args.product, args.product))

    def compute() -> None:
        product(x).block_until_ready()

    with tempfile.TemporaryDirectory(dir=args.folder) as folder, jax.set_mesh(mesh):
        state = jax.block_until_ready(make_state(c, shardings))
        num_bytes = sum(array.nbytes for array in flat(state).values())
        checkpoints = Checkpoints(Path(folder), [], keep_between=1, log=lambda line: None)
        digests = jax.jit(digest.tree_digests)
        jax.block_until_ready(digests(flat(state)))
        compute()
        rounds: dict[str, list[float]] = {"stall": [], "sync": [], "digest": [], "alone": [], "during": []}
        for i in range(args.rounds + 1):
            state = jax.block_until_ready(touch(state))
            rounds["digest"].append(timed(lambda state=state: jax.block_until_ready(digests(flat(state)))))
            save = dict(data={"next_step": 2 * i + 1}, meta={})
            rounds["stall"].append(timed(lambda state=state, i=i, save=save: checkpoints.save(state, 2 * i, **save)))
            state = touch(state)  # as the next training step does: the buffers being saved are given away
            rounds["during"].append(statistics.median(timed(compute) for _ in range(5)))
            checkpoints.wait()
            rounds["alone"].append(statistics.median(timed(compute) for _ in range(5)))
            jax.block_until_ready(state)
            started = time.perf_counter()
            checkpoints.save(state, 2 * i + 1, **save)
            checkpoints.wait()
            rounds["sync"].append(time.perf_counter() - started)
        checkpoints.close()
    median = {key: statistics.median(values[1:]) for key, values in rounds.items()}  # the first round warms up
    print(
        json.dumps(
            {
                "benchmark": "checkpoint",
                "state_bytes": num_bytes,
                "stall_s": round(median["stall"], 4),
                "sync_s": round(median["sync"], 4),
                "stall_ratio": round(median["stall"] / median["sync"], 4),
                "digest_s": round(median["digest"], 4),
                "step_during_save_ratio": round(median["during"] / median["alone"], 3),
                "sync_bytes_per_s": round(num_bytes / median["sync"]),
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
