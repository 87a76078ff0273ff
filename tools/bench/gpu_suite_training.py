"""The training step of gpu_suite.py: the 1B model on one device, on a batch that stays there and on the loader's."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from loader import VOCAB_SIZE, write_store

from k2jax import config
from k2jax.data.loader import make_loader
from k2jax.data.manifest import build_manifest
from k2jax.data.order import Order, StagePlan
from k2jax.model import flops
from k2jax.parallel import sharding
from k2jax.training.optimizer import first_state
from k2jax.training.placement import make_state, place_batches, place_state
from k2jax.training.program import step_function

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "k2_1b.py"
UNTIMED, TIMED = 2, 6  # steps
# 65,536 tokens a step, in parts whose activations fit 80 GB beside 21 GB of parameters, moments and gradients.
ONE_DEVICE = ["stages.0.rows_per_step=32", "stages.0.microbatches=4", "stages.0.warmup_steps=0"]
TINY = ["stages.0.sequence_length=64", "stages.0.rows_per_step=4", "stages.0.microbatches=2", "model.num_layers=2"]
TINY += ["model.dim=64", "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=32", "model.ffn_dim=128"]


class Training:
    """Of the last `steps` asked for: its compiled step and its state stay, for `fed_by_the_loader`."""

    def __init__(self, smoke: bool):
        self.overrides = ONE_DEVICE + (TINY if smoke else [])
        self.state: Any = None

    def steps(self, implementation: str) -> dict[str, Any]:
        """Compiles with that attention; its row of the table."""
        self.state = None  # room for the next
        c = config.load(str(EXPERIMENT), [*self.overrides, f"model.attention.implementation={implementation}"])
        stage, self.config = c.stages[0], c
        self.mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
        rows = stage.rows_per_step
        plan = StagePlan("bench", 0, stage.sequence_length, rows, 100_000, 1, 0, 100_000 * rows, 1, 100_000)
        shardings = place_state(c, jax.eval_shape(lambda: first_state(c)), self.mesh)
        with jax.set_mesh(self.mesh):
            self.step = step_function(c, plan, shardings, self.mesh, eos_id=2, num_subsets=1)
            self.state = make_state(c, shardings)
        tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, stage.sequence_length + 1))
        batch = {"tokens": tokens.astype(np.int32), "subset": np.zeros(rows, np.int32)}
        batch["digest"] = np.zeros((rows, 8), np.uint32)
        started = time.perf_counter()
        self._run(iter([batch]))
        compiled_s = time.perf_counter() - started
        return self._row(*self._run(iter([batch] * (UNTIMED + TIMED)))) | {"first_step_s": round(compiled_s, 1)}

    def fed_by_the_loader(self) -> dict[str, Any]:
        """The row of the same step on batches that the loader reads meanwhile."""
        stage, last_step = self.config.stages[0], UNTIMED + TIMED
        with tempfile.TemporaryDirectory() as folder:
            store, _ = write_store(Path(folder) / "random", 1_000_000, 1 << 16)
            keys = ("name", "sequence_length", "rows_per_step")
            row = {key: stage[key] for key in keys} | {"steps_per_chunk": last_step, "chunks": 1, "mix": {"random": 1}}
            summaries = {"random": store.summary()}
            order = Order(build_manifest(stages=[row], stores=summaries, seed=0, label_shift="next"))
            options = {"label_shift": "next", "first_step": 1, "last_step": last_step}
            return self._row(*self._run(batch for _, batch in make_loader(order, {"random": store}, **options)))

    def _run(self, batches: Iterator[dict[str, np.ndarray]]) -> tuple[list[float], list[float]]:
        """(seconds of each step, of them waiting for its batch), a step's metrics read while the next runs."""
        placement = place_batches(self.config.stages[0], self.mesh)
        step_s, wait_s, before = [], [], None
        with jax.set_mesh(self.mesh):
            started = time.perf_counter()
            for batch in batches:
                waited = time.perf_counter() - started
                self.state, metrics = self.step(self.state, placement.globalize(batch))
                if before is not None:
                    assert np.isfinite(before["loss"]), "the loss is not finite"
                before = metrics
                now = time.perf_counter()
                step_s, wait_s, started = [*step_s, now - started], [*wait_s, waited], now
            jax.block_until_ready(self.state)
        step_s[-1] += time.perf_counter() - started
        return step_s, wait_s

    def _row(self, step_s: list[float], wait_s: list[float]) -> dict[str, Any]:
        stage = self.config.stages[0]
        seconds = sum(step_s[UNTIMED:]) / TIMED
        tokens_per_s = stage.rows_per_step * stage.sequence_length / seconds
        row = {"step_s": round(seconds, 4), "wait_s": round(statistics.median(wait_s[UNTIMED:]), 5)}
        row["tokens_per_s"] = round(tokens_per_s, 1)
        device = jax.devices()[0]
        peak = flops.peak_flops(device.device_kind)
        if peak:
            of_token = flops.flops_per_token(self.config.model, stage.sequence_length)
            row["mfu_causal"] = round(of_token.causal * tokens_per_s / peak, 4)
            row["mfu_noncausal"] = round(of_token.noncausal * tokens_per_s / peak, 4)
        memory = device.memory_stats()
        return row | ({"peak_gib": round(memory["peak_bytes_in_use"] / 2**30, 2)} if memory else {})
