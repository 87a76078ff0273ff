"""Metrics: one row a step in `metrics/`, and to TensorBoard and Weights & Biases; read one step late.

`Recorder.push` takes a step's metrics while the device still computes them, and reads those of the step before: the
device never waits for the host. `flush` reads the last ones too, where the loop must know (before a save, at the end).
"""

import math
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from k2jax import files
from k2jax.data.loader import batch_digest
from k2jax.data.order import Order, StagePlan
from k2jax.model.flops import flops_per_token, peak_flops
from k2jax.parallel import cluster
from k2jax.run.ledger import Ledger, StepLog, belonging
from k2jax.stability.detect import Row
from k2jax.training.guard import Guard
from k2jax.training.hosts import Hosts, columns, slow
from k2jax.training.remedies import COUNTS
from k2jax.training.sinks import open_sinks


class Recorder:
    """Turns the device's metrics of each step into a row of metrics, a row of the ledger and a line for people."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        order: Order,
        subsets: list[str],
        steps: StepLog,
        ledger: Ledger,
        guard: Guard,
        print_line: Callable[[str], None],
        tokens_seen: int,
        first_step: int,
    ):
        self.config, self.order, self.subsets, self.steps, self.ledger = config, order, subsets, steps, ledger
        self.guard = guard
        self.print_line, self.tokens_seen, self.first_step = print_line, tokens_seen, first_step
        self.is_main = cluster.is_main()
        self.sinks = open_sinks(config, workdir, first_step, print_line) if self.is_main else []
        self.planned = planned_step_seconds(workdir, print_line)
        self.last_row: dict[str, Any] = {}
        self.hosts = Hosts(config.log.every_steps)
        self.clipped_steps = clipped_before(steps, first_step) if self.is_main else 0  # None: not known
        self.first_done: float | None = None  # when this launch's first step was, by time.perf_counter()
        self._pending: tuple[int, StagePlan, dict[str, jax.Array], float, float] | None = None
        self._last: tuple[StagePlan, float] | None = None  # stage and time of the last row

    def push(self, step: int, plan: StagePlan, metrics: dict[str, jax.Array], data_wait_s: float) -> None:
        """Keeps this step's metrics and records those of the step before."""
        previous, self._pending = self._pending, (step, plan, metrics, data_wait_s, time.perf_counter())
        if previous is not None:
            self._record(*previous)

    def flush(self) -> None:
        """Records what is pending, waiting for the device."""
        if self._pending is not None:
            previous, self._pending = self._pending, None
            self._record(*previous)

    def sync(self) -> None:
        """The rows up to now are on the disk then."""
        self.steps.sync()
        self.ledger.steps.sync()

    def saved(self, meta: dict[str, Any] | None) -> None:
        """Closes the ledger's steps with a checkpoint that has become complete; None: none has."""
        if meta is not None and self.is_main:
            self.ledger.append_record(meta["step"], belonging(meta))

    def _record(
        self, step: int, plan: StagePlan, metrics: dict[str, jax.Array], data_wait_s: float, pushed: float
    ) -> None:
        layers = metrics["layers"]  # which only few rows have
        asked = time.monotonic()
        values = jax.device_get({key: value for key, value in metrics.items() if key != "layers"})
        # On CPU a step is done when its call returns (cluster.initialize), and that waits for other processes, too.
        on_cpu, waited_s = jax.default_backend() == "cpu", time.monotonic() - asked
        now = pushed if on_cpu else time.perf_counter()
        self.first_done = self.first_done or now
        step_s = now - self._last[1] if self._last and self._last[0] is plan else None  # no compiling in it
        self._last = plan, now
        self.tokens_seen += plan.rows_per_step * plan.sequence_length
        row = {
            "step": step,
            "stage": plan.name,
            **self._losses(values),
            **_norms(values),
            "lr": float(values["lr"]),
            "applied": bool(values["applied"]),
            "outlier": bool(values["outlier"]),
            **self._clipped(bool(values["clipped"])),
            "loss_limit": float(values["loss_limit"]),
            "grad_norm_limit": float(values["grad_norm_limit"]),
            **{key: int(values[key]) for key in COUNTS if key in values},
            "tokens_seen": self.tokens_seen,
            **_of_conversations(values),
            **({"num_pairs": int(values["targets"])} if "learned" in values else {}),
            "transient_errors": values.get("transient_errors"),  # of a step that was computed again
            **self._speed(plan, step_s, int(values.get("padding", 0))),
            "planned_step_s": self.planned.get(plan.name),
            "data_wait_s": data_wait_s,
            **_memory(),
        }
        own_s = data_wait_s if on_cpu or step_s is None else step_s - waited_s
        hosts = self.hosts.note(step, step_s, data_wait_s, own_s, row)
        self.last_row = row
        self.guard.add(Row(step, row["loss"], row["grad_norm"], row["applied"], row["outlier"]))
        if self.is_main:
            self.ledger.append_step(
                step,
                batch_digest(values["batch_digest"][None]),
                float(values["loss"]),
                float(values["grad_norm"]),
                bool(values["applied"]),
                bool(values["outlier"]),
                **_of_conversations(values),
            )
            of_all = {"hosts": columns(hosts)} if hosts else {}
            self.steps.append(_jsonable(row) | self._layers(row, layers) | of_all)
        for sink in self.sinks:
            sink.put(step, _jsonable(row))
        self._tell(step, row)
        for line in slow(hosts):
            self.print_line(line)

    def _clipped(self, clipped: bool) -> dict[str, Any]:
        if self.clipped_steps is not None:
            self.clipped_steps += clipped
        return {"clipped": clipped, "clipped_steps": self.clipped_steps}

    def _layers(self, row: dict[str, Any], layers: dict[str, jax.Array]) -> dict[str, Any]:
        """{"layers": {series: a number of each layer}} every so many steps, and of each that was not as others."""
        every, odd = self.config.log.layers_every, row["outlier"] or not row["applied"]
        if not (odd or every and row["step"] % every == 0 or "attention_logit" in layers):
            return {}
        return {"layers": {series: _short(value_L) for series, value_L in jax.device_get(layers).items()}}

    def _losses(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        row = {"loss": float(values["loss"])}
        for i, name in enumerate(self.subsets):
            targets = int(values["subset_targets"][i])
            row[f"loss/{name}"] = float(values["subset_loss"][i]) if targets else None
            row[f"targets/{name}"] = targets
        return row

    def _speed(self, plan: StagePlan, step_s: float | None, padding: int) -> dict[str, float | None]:
        tokens_per_s = (plan.rows_per_step * plan.sequence_length - padding) / step_s if step_s else None
        flops = flops_per_token(self.config.model, plan.sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind)
        share = tokens_per_s / (peak * jax.device_count()) if tokens_per_s and peak else None
        return {
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": tokens_per_s / jax.device_count() if tokens_per_s else None,
            "mfu_causal": flops.causal * share if share else None,
            "mfu_noncausal": flops.noncausal * share if share else None,
        }

    def _tell(self, step: int, row: dict[str, Any]) -> None:
        if row.get("masked_rows"):
            self.print_line(f"step {step}: {row['masked_rows']} row(s) masked, of repeated n-grams (data.mask_repeats)")
        if not row["applied"] or row["outlier"]:
            why = "above its limit" if row["outlier"] else "not finite"
            done = "an update was made" if row["applied"] else "no update was made"
            self.print_line(
                f"step {step}: loss {row['loss']} or gradient norm {row['grad_norm']} is {why}: {done}"
            )
        elif step % self.config.log.every_steps == 0 or step == 1:
            speed = f"  {row['tokens_per_s']:.0f} tokens/s" if row["tokens_per_s"] else ""
            mfu = (
                f"  MFU {row['mfu_causal']:.1%} causal, {row['mfu_noncausal']:.1%} non-causal"
                if row["mfu_causal"]
                else ""
            )
            planned = ""
            if row["planned_step_s"] and row["step_s"]:
                planned = f"  {row['step_s']:.3f} s a step, planned {row['planned_step_s']:.3f}"
            if "num_pairs" in row:
                planned += f"  {row['num_pairs']} pairs, {row['pairs/right']:.0%} right"
            elif "supervised_tokens" in row:
                planned += f"  {row['supervised_tokens']} tokens learned"
            if row["device_memory_peak_bytes"]:
                planned += f"  {row['device_memory_peak_bytes'] / 2**30:.1f} GiB at most"
            self.print_line(
                f"step {step}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}"
                f"{speed}{planned}{mfu}"
            )

    def end(self, meta: dict[str, Any] | None) -> None:
        """After the last step, and the last save, as `saved`."""
        self.saved(meta)
        self.close()

    def close(self) -> None:
        self.steps.close()
        self.ledger.steps.close()
        for sink in self.sinks:
            sink.close()


def clipped_before(steps: StepLog, step: int) -> int | None:
    """How many steps of the run before this one were clipped; None where its rows do not say so."""
    row = next(steps.rows(step - 1, step - 1), {}) if step > 1 else {"clipped_steps": 0}
    return row.get("clipped_steps")


def planned_step_seconds(workdir: Path, say: Callable[[str], None]) -> dict[str, float]:
    """{stage: seconds} as `tools/plan.py --workdir` kept them in plan.json; {} if there is none for these devices."""
    if not (workdir / "plan.json").exists():
        return {}
    plan = files.read_json(workdir / "plan.json")
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if plan["device_kind"] != kind or plan["devices"] != count:
        say(
            f"plan.json is for {plan['devices']} {plan['device_kind']}, this run has {count} {kind}: its times are not "
            f"compared"
        )
        return {}
    memory = max(stage["hbm_bytes_per_chip"] for stage in plan["stages"].values()) / 2**30
    fits = "" if plan["fits"] else ", which does not fit"
    say(f"planned for {plan['topology']}: {memory:.1f} GiB a chip{fits}")
    return {name: stage["step_seconds"] for name, stage in plan["stages"].items() if stage["step_seconds"]}


def _of_conversations(values: dict[str, np.ndarray]) -> dict[str, int]:
    """Of a step of an sft or dpo stage: how many tokens were learned, and how many of its positions held none."""
    if "padding" not in values:
        return {}
    learned = values["learned"] if "learned" in values else values["targets"]
    return {"supervised_tokens": int(learned), "padding_tokens": int(values["padding"])}


def _norms(values: dict[str, np.ndarray]) -> dict[str, float]:
    """And the rest of what is a number of the whole step, or of a layer group of it."""
    wanted = re.compile(r"(grad|param|update)_norm|update_ratio|log_z|logit|attention_logit|pairs")
    return {key: float(value) for key, value in values.items() if wanted.fullmatch(key.partition("/")[0])}


def _short(values: np.ndarray) -> list[float | None]:
    """Four significant digits."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _memory() -> dict[str, int | None]:
    stats = jax.local_devices()[0].memory_stats() or {}  # None on CPU
    return {
        "device_memory_bytes": stats.get("bytes_in_use"),
        "device_memory_peak_bytes": stats.get("peak_bytes_in_use"),
        "host_memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; the ledger keeps the exact bits."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
