"""Tokens a second of training on this machine, as one JSON line: the trainer, its bare step, and PyTorch.

    python tools/bench/train_step.py [--dtype=fp32|bf16] [--rounds=5] [--steps=4] [--skip-torch] [--skip-trainer]

trainer: k2jax.train on a synthetic store, with metrics, ledger and TensorBoard on, timed by its own metrics' step_s.
bare: the step that it compiles, on one batch that stays on the device. torch: transformers' LlamaForCausalLM,
torch.optim.AdamW and clipping, eager, on the same work.

Each is a process of its own, and all are stopped but the one whose turn it is: a round gives each of them `--steps`
steps, so that what else this machine does falls on all alike. Medians over all rounds; time to first step is from the
start of the process.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from ml_collections import ConfigDict  # noqa: E402

from k2jax import config  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.parallel.host_memory import keep_freed_memory, use_huge_pages  # noqa: E402

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SEQUENCE, ROWS = 512, 8
UNTIMED = 2  # steps at the start of a turn: the first holds the pause, the second may have begun in it


def get_config() -> ConfigDict:
    """The 58M-parameter model of all figures in performance.md: 4,096 tokens a step. This file is its experiment."""
    c = config.base()
    c.name = "bench"
    c.model.vocab_size, c.model.dim, c.model.num_layers = 32000, 512, 8
    c.model.unroll = 8
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim, c.model.ffn_dim = 8, 8, 64, 1376
    stage = {"sequence_length": SEQUENCE, "rows_per_step": ROWS, "steps_per_chunk": 100_000, "chunks": 1}
    c.stages = (config.stage(mix={"synthetic": 1}, **stage),)
    return c


# ---- the contestants: each a process that says how long each of its steps took -------------------------------------


def bare_steps(dtype: str) -> Iterator[None]:
    """One training step of k2jax at each turn, on one batch on one device."""
    use_huge_pages()  # both as k2jax.train does
    keep_freed_memory()
    import jax
    import numpy as np

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the trainer does
    from k2jax.data.order import StagePlan
    from k2jax.parallel import sharding
    from k2jax.training.optimizer import first_state
    from k2jax.training.placement import make_state, place_batches, place_state
    from k2jax.training.program import compile_lowered, step_function

    c = get_config()
    c.precision.compute = DTYPES[dtype]
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    plan = StagePlan("bench", 0, SEQUENCE, ROWS, 100_000, 1, 0, 100_000 * ROWS, 1, 100_000)
    shapes = jax.eval_shape(lambda: first_state(c))
    shardings = place_state(c, shapes, mesh)
    rows = {
        "tokens": np.random.default_rng(0).integers(3, 32000, (ROWS, SEQUENCE + 1)).astype(np.int32),
        "subset": np.zeros(ROWS, np.int32),
        "digest": np.zeros((ROWS, 8), np.uint32),
    }
    with jax.set_mesh(mesh):
        batch = place_batches(c.stages[0], mesh).globalize(rows)
        step = step_function(c, plan, shardings, mesh, eos_id=2, num_subsets=1).lower(shapes, batch)
        step, state = compile_lowered(step, c), make_state(c, shardings)
        while True:
            state, metrics = step(state, batch)
            assert np.isfinite(metrics["loss"])
            yield


def torch_steps(dtype: str) -> Iterator[None]:
    """The same in PyTorch: loss and master weights in float32, bf16 by autocast."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = get_config()
    m, o = c.model, c.optimizer
    torch.manual_seed(0)
    shape = {"num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads}
    sizes = {"hidden_size": m.dim, "intermediate_size": m.ffn_dim, "num_hidden_layers": m.num_layers}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=m.vocab_size, use_cache=False, tie_word_embeddings=False, **shape, **sizes)
    )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.stages[0].lr_peak, betas=(o.b1, o.b2), eps=o.eps, fused=True)
    tokens = torch.randint(3, 32000, (ROWS, SEQUENCE + 1))
    while True:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        assert torch.isfinite(loss).item()
        yield


WORKERS: dict[str, Callable[[str], Iterator[None]]] = {"bare": bare_steps, "torch": torch_steps}


def work(name: str, dtype: str, folder: Path) -> None:
    """A worker's life: a line with the seconds of each step. Ends when it is killed."""
    if name == "trainer":
        run_trainer(dtype, folder)
    steps = WORKERS[name](dtype)
    while True:
        started = time.perf_counter()
        next(steps)
        print(time.perf_counter() - started, flush=True)


def run_trainer(dtype: str, folder: Path) -> None:
    """What `python -m k2jax.train` does, on a store of random tokens; its times are in the metrics that it writes."""
    use_huge_pages()
    keep_freed_memory()
    from k2jax.parallel import cluster
    from k2jax.train import train
    from k2jax.training.launch import Launch, process_age_s

    launch = Launch(process_age_s())
    c = get_config()
    c.precision.compute, c.data.root = DTYPES[dtype], str(folder)
    c.data.tokenizer = str(folder / "tokenizer.json")
    cluster.initialize()
    train(c.lock(), folder / "run", launch=launch)


class Contestant:
    """A process that trains, stopped but for its turns."""

    def __init__(self, command: list[str], times: Callable[[], list[float]], log: Path):
        self.times, self.log = times, log
        started = time.perf_counter()
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=REPO)
        self._wait(1)
        self.first_step_s = time.perf_counter() - started
        self.pause()
        self.measured: list[float] = []

    def _wait(self, number: int) -> None:
        while len(self.times()) < number:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.process.args} ended:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def turn(self, steps: int) -> None:
        before = len(self.times())
        self.process.send_signal(signal.SIGCONT)
        self._wait(before + UNTIMED + steps)
        self.pause()
        self.measured += self.times()[before + UNTIMED : before + UNTIMED + steps]


def start(name: str, dtype: str, folder: Path) -> Contestant:
    log = folder / f"{name}.log"

    def printed_times() -> list[float]:
        lines = log.read_text().splitlines() if log.exists() else []
        return [float(line) for line in lines if line.replace(".", "").isdigit()]

    def recorded_times() -> list[float]:
        rows = [line for path in (folder / "run/metrics").glob("*.jsonl") for line in path.open()]
        return [json.loads(row)["step_s"] or 0.0 for row in rows if row.endswith("\n")]

    command = [sys.executable, __file__, f"--dtype={dtype}", f"--worker={name}", f"--folder={folder}"]
    return Contestant(command, recorded_times if name == "trainer" else printed_times, log)


def write_store(folder: Path) -> None:
    """Two million random tokens in documents of some hundred, and a tokenizer that nobody will use."""
    import numpy as np
    from tokenizers import Tokenizer, models

    from k2jax.data.store_writer import StoreWriter
    from k2jax.data.tokenizer import tokenizer_sha256

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    sha256, draw = tokenizer_sha256(folder / "tokenizer.json"), np.random.default_rng(0)
    store = folder / "synthetic"
    with StoreWriter(store, tokenizer_sha256=sha256, vocab_size=32000, eos_id=2) as writer:
        for i in range(4000):
            writer.add(draw.integers(3, 32000, draw.integers(1, 1000)), id=str(i), source="random")
        writer.finish()


# ---- the comparison ------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    skipped = {"torch": args.skip_torch, "trainer": args.skip_trainer}
    load = os.getloadavg()[0]
    write_store(folder)
    contestants: dict[str, Contestant] = {}
    try:
        for name in ("bare", "torch", "trainer"):
            if skipped.get(name):
                continue
            contestants[name] = start(name, args.dtype, folder)
        for _ in range(args.rounds):
            for contestant in contestants.values():
                contestant.turn(args.steps)
    finally:
        for contestant in contestants.values():
            contestant.process.kill()
            contestant.process.wait()
    medians = {name: statistics.median(c.measured) for name, c in contestants.items()}
    result: dict[str, Any] = {"dtype": args.dtype, "load_before": round(load, 2), "cores": os.cpu_count()}
    result |= {f"{name}_tokens_per_s": round(SEQUENCE * ROWS / s, 1) for name, s in medians.items()}
    for above, below in (("trainer", "bare"), ("bare", "torch")):
        if above in medians and below in medians:
            result[f"{above}_over_{below}"] = round(medians[below] / medians[above], 3)
    firsts = {name: c.first_step_s for name, c in contestants.items()}
    if "trainer" in firsts:  # its rows come a step late
        launches = json.loads((folder / "run/environment.json").read_text())["launches"]
        firsts["trainer"] = launches[-1]["first_step"]["seconds"]
    result |= {f"{name}_time_to_first_step_s": round(seconds, 1) for name, seconds in firsts.items()}
    result |= {f"{name}_step_s": [round(s, 3) for s in c.measured] for name, c in contestants.items()}
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of activations and products")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contestant in a round")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--skip-trainer", action="store_true")
    parser.add_argument("--worker", choices=("bare", "torch", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.dtype, args.folder)
    with tempfile.TemporaryDirectory(prefix="k2jax-bench-") as folder:
        print(json.dumps(compare(args, Path(folder))))


if __name__ == "__main__":
    run_main(main)
