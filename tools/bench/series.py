"""What the series of a step cost (norms and update ratios by layer group and layer, log Z, largest logit), as a line.

    python tools/bench/series.py [--steps=30] [--topology=v5e:4x4 --config=experiments/k2_1b.py]

The same step with and without them: without, nobody asks for their values, and the compiler leaves out what makes them.
By default on this CPU, step by step in turns, one line with medians; with a topology by the TPU's compiler, whose
cycles are added up as in tools/plan.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import train_step as bench  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.parallel.host_memory import keep_freed_memory, use_huge_pages  # noqa: E402

# What a trainer needs: the ledger's numbers, and what tells whether an update was made.
KEPT = ("loss", "finite", "outlier", "applied", "skips_in_a_row", "lr", "targets", "subset_loss", "subset_targets")
KEPT += ("batch_digest", "grad_norm", "clipped")


@contextmanager
def without_series() -> Iterator[None]:
    """Steps that are compiled here return KEPT alone."""
    from k2jax.training import program

    whole = program.train_step

    def trimmed(*arguments: Any, **others: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = whole(*arguments, **others)
        return state, {key: metrics[key] for key in KEPT}

    program.train_step = trimmed
    try:
        yield
    finally:
        program.train_step = whole


def on_cpu(steps: int) -> dict[str, Any]:
    """Seconds of a step of the model of train_step.py, medians, the two in turns."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the trainer does
    from k2jax.data.order import StagePlan
    from k2jax.parallel import sharding
    from k2jax.training.optimizer import first_state
    from k2jax.training.placement import make_state, place_batches, place_state
    from k2jax.training.program import batch_shapes, step_function

    c, length, rows = bench.get_config(), bench.SEQUENCE, bench.ROWS
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    plan = StagePlan("bench", 0, length, rows, 100_000, 1, 0, 100_000 * rows, 1, 100_000)
    shapes = jax.eval_shape(lambda: first_state(c))
    shardings = place_state(c, shapes, mesh)
    tokens = np.random.default_rng(0).integers(3, c.model.vocab_size, (rows, length + 1)).astype(np.int32)
    columns = {"tokens": tokens, "subset": np.zeros(rows, np.int32), "digest": np.zeros((rows, 8), np.uint32)}
    took: dict[str, list[float]] = {"with": [], "without": []}
    with jax.set_mesh(mesh):

        def compiled() -> Any:
            return step_function(c, plan, shardings, mesh, 2, 1).lower(shapes, batch_shapes(c, c.stages[0])).compile()

        run = {"with": compiled()}
        with without_series():
            run["without"] = compiled()
        state, batch = make_state(c, shardings), place_batches(c.stages[0], mesh).globalize(columns)
        for number in range(2 * (steps + 2)):
            name = ("with", "without", "without", "with")[number % 4]
            started = time.perf_counter()
            state, metrics = run[name](state, batch)
            jax.block_until_ready(metrics)
            took[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[2:]) for name, values in took.items()}
    return {"what": "series, CPU", "seconds": medians, "ratio": medians["with"] / medians["without"], "steps": steps}


def by_compiler(config: str, topology: str) -> dict[str, Any]:
    """Seconds of a step of the experiment's first stage, by the compiler's cycles, and the memory of a chip."""
    from k2jax.plan import estimate, topologies

    topologies.use_tpu_compiler()
    c = configuration.load(config)

    def planned() -> dict[str, Any]:
        return estimate.plan(c, topology, c.stages[0].name, lambda line: None)

    found = {"with": planned()}
    with without_series():
        found["without"] = planned()
    parts = "step_seconds", "matrix_seconds", "elementwise_seconds", "exposed_collective_seconds", "hbm_bytes_per_chip"
    told = {name: {part: stage[part] for part in parts} for name, stage in found.items()}
    ratio = told["with"]["step_seconds"] / told["without"]["step_seconds"]
    return {"what": "series, TPU's compiler", "experiment": c.name, "topology": topology, **told, "ratio": ratio}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed, of each")
    parser.add_argument("--topology", help="of a TPU, for its compiler; else it is timed on this CPU")
    paths.add(parser, "--config", default=str(REPO / "experiments/k2_1b.py"), metavar="FILE", help="its experiment")
    args = parser.parse_args()
    use_huge_pages()  # as k2jax.train does; here, since it begins this program anew
    keep_freed_memory()
    found = by_compiler(args.config, args.topology) if args.topology else on_cpu(args.steps)
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **found}))


if __name__ == "__main__":
    run_main(main)
