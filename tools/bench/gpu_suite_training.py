"""The training step of gpu_suite.py: the 1B model on one device, on a batch that stays there and on the loader's, what
memory it takes, and where its time goes."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gpu_suite_cases import SECTIONS, Row, tried
from gpu_suite_profile import by_kind, op_names, read_trace
from loader import VOCAB_SIZE, write_store
from ml_collections import ConfigDict

from k2jax import config
from k2jax.data.loader import make_loader
from k2jax.data.manifest import build_manifest
from k2jax.data.order import Order, StagePlan
from k2jax.model import flops
from k2jax.parallel import sharding
from k2jax.training.optimizer import first_state
from k2jax.training.placement import make_state, place_batches, place_state
from k2jax.training.program import batch_shapes, compile_lowered, step_function

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "k2_1b.py"
UNTIMED, TIMED, TRACED = 2, 6, 3  # steps
GIB = 2**30
# 65,536 tokens a step, in parts whose activations fit 80 GB beside 21 GB of parameters, moments and gradients.
ONE_DEVICE = ["stages.0.rows_per_step=32", "stages.0.microbatches=4", "stages.0.warmup_steps=0"]
TINY = ["stages.0.sequence_length=64", "stages.0.rows_per_step=4", "stages.0.microbatches=2", "model.num_layers=2"]
TINY += ["model.dim=64", "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=32", "model.ffn_dim=128"]


def get_config(smoke: bool, *overrides: str) -> ConfigDict:
    """Of the model and the stage that all contestants train."""
    return config.load(str(EXPERIMENT), [*ONE_DEVICE, *(TINY if smoke else []), *overrides])


def speed_row(c: ConfigDict, step_s: list[float], device_kind: str) -> Row:
    """Of steps of its first stage, the untimed ones among them."""
    stage, seconds = c.stages[0], sum(step_s[UNTIMED:]) / len(step_s[UNTIMED:])
    tokens_per_s = stage.rows_per_step * stage.sequence_length / seconds
    row = {"step_s": round(seconds, 4), "tokens_per_s": round(tokens_per_s, 1)}
    peak = flops.peak_flops(device_kind)
    if peak:
        of_token = flops.flops_per_token(c.model, stage.sequence_length)
        row["mfu_causal"] = round(of_token.causal * tokens_per_s / peak, 4)
        row["mfu_noncausal"] = round(of_token.noncausal * tokens_per_s / peak, 4)
    return row


class Training:
    """The step of a case, compiled, and its state."""

    def __init__(self, case: Row, smoke: bool):
        keys = {"model.attention.implementation": case["attention"], "compiler.deterministic": case["deterministic"]}
        self.config = c = get_config(smoke, *(f"{key}={value}" for key, value in keys.items()))
        stage = c.stages[0]
        self.mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
        rows = stage.rows_per_step
        plan = StagePlan("bench", 0, stage.sequence_length, rows, 100_000, 1, 0, 100_000 * rows, 1, 100_000)
        shapes = jax.eval_shape(lambda: first_state(c))
        shardings = place_state(c, shapes, self.mesh)
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            step = step_function(c, plan, shardings, self.mesh, eos_id=2, num_subsets=1)
            self.step = compile_lowered(step.lower(shapes, batch_shapes(c, stage)), c)
            self.compile_s = time.perf_counter() - started
            self.state = make_state(c, shardings)
        tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, stage.sequence_length + 1))
        self.batch = {"tokens": tokens.astype(np.int32), "subset": np.zeros(rows, np.int32)}
        self.batch["digest"] = np.zeros((rows, 8), np.uint32)

    def on_one_batch(self) -> Row:
        before = _peak_bytes()
        step_s, _ = self.run(iter([self.batch] * (UNTIMED + TIMED)))
        row = speed_row(self.config, step_s, jax.devices()[0].device_kind) | {"compile_s": round(self.compile_s, 1)}
        return row | self.memory(before)

    def memory(self, peak_before: int) -> Row:
        """By part, as the compiler has planned it, and the device's own peak: that is the process's, so that none is
        told of a step that needs no more than one before it."""
        plan, held = self.step.memory_analysis(), _gib_of(self.state.params)
        planned = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        planned += plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
        row = {"parameters_gib": held, "moments_gib": _gib_of((self.state.mu, self.state.nu))}
        row |= {"gradients_gib": held, "temporaries_gib": round(plan.temp_size_in_bytes / GIB, 2)}  # gradients, too
        row["planned_gib"] = round(planned / GIB, 2)
        peak = _peak_bytes()
        return row | ({"peak_gib": round(peak / GIB, 2)} if peak > peak_before else {})

    def on_the_loaders(self) -> Row:
        """On batches that the loader reads meanwhile, and how long the step waits for them."""
        stage, last_step = self.config.stages[0], UNTIMED + TIMED
        with tempfile.TemporaryDirectory() as folder:
            store, _ = write_store(Path(folder) / "random", 1_000_000, 1 << 16)
            keys = ("name", "sequence_length", "rows_per_step")
            row = {key: stage[key] for key in keys} | {"steps_per_chunk": last_step, "chunks": 1, "mix": {"random": 1}}
            summaries = {"random": store.summary()}
            order = Order(build_manifest(stages=[row], stores=summaries, seed=0, label_shift="next"))
            options = {"label_shift": "next", "first_step": 1, "last_step": last_step}
            step_s, wait_s = self.run(batch for _, batch in make_loader(order, {"random": store}, **options))
        row = speed_row(self.config, step_s, jax.devices()[0].device_kind)
        return row | {"wait_s": round(statistics.median(wait_s[UNTIMED:]), 5)}

    def run(self, batches: Iterator[dict[str, np.ndarray]]) -> tuple[list[float], list[float]]:
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


def _gib_of(arrays: Any) -> float:
    return round(sum(x.nbytes for x in jax.tree.leaves(arrays)) / GIB, 2)


def _peak_bytes() -> int:
    """0 where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


# ---- sections --------------------------------------------------------------------------------------------------------


def train(smoke: bool) -> Iterator[Row]:
    training, built = None, None
    for case in SECTIONS["train"].cases(smoke):

        def measure(case: Row = case) -> Row:
            nonlocal training, built
            wanted = case["attention"], case["deterministic"]
            if built != wanted:
                training = built = None  # room for the next
                training, built = Training(case, smoke), wanted
            return training.on_the_loaders() if case["batches"] == "loader" else training.on_one_batch()

        yield tried(case, measure)


def profile(smoke: bool) -> Iterator[Row]:
    """Time on the device of the step of the first case of the section `train`, by kind of kernel."""
    try:
        training = Training(SECTIONS["train"].cases(smoke)[0], smoke)
        training.run(iter([training.batch] * UNTIMED))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                step_s, _ = training.run(iter([training.batch] * TRACED))
            [trace] = Path(folder).rglob("*.xplane.pb")
            kernels = read_trace(trace)
    except Exception as error:
        yield {"kind": "all", "ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        return
    rows = by_kind(kernels, op_names(training.step.as_text()), TRACED)
    yield rows[0] | {"step_ms": round(sum(step_s) / TRACED * 1e3, 1), "ok": bool(kernels)}
    yield from rows[1:]
