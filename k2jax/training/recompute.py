"""Every so many steps a step is computed again before it is made, and its bits compared: silent corruption of sums that
no other check can see. Costs two or three forward and backward passes each time, and a second program to compile.

The program is the step without what comes after its gradients, so it takes less memory than the step does.
"""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax.data.order import StagePlan
from k2jax.errors import NumericsError
from k2jax.run import devices
from k2jax.run.state import TrainState
from k2jax.stability import sdc
from k2jax.training.clock import Clock
from k2jax.training.program import batch_shapes, compile_lowered, stage_step, step_shardings
from k2jax.training.step import Batch

COMPARED = r"loss|grad_norm(/\w+)?"  # of the metrics of a step


class Probe(NamedTuple):
    """Of a stage."""

    names: list[str]
    run: Callable[[TrainState, Batch], jax.Array]  # float32 (names,), on every device


def compile_probe(
    config: ConfigDict, plan: StagePlan, mesh: Mesh, shapes: TrainState, shardings: TrainState, manifest: dict
) -> Probe:
    """Loss and gradient norms of a step, whose state stays what it is: what else the step computes is left out."""
    step = stage_step(config, plan, shardings, manifest["eos_id"], len(manifest["stores"]))
    batch = batch_shapes(config, config.stages[plan.index])
    metrics = jax.eval_shape(step, shapes, batch)[1]
    names = [name for name, x in metrics.items() if re.fullmatch(COMPARED, name) and not x.shape]

    def numbers(state: TrainState, batch: Batch) -> jax.Array:
        found = step(state, batch)[1]
        return jnp.stack([found[name] for name in names])

    given, everywhere = step_shardings(shardings, mesh, config.stages[plan.index])
    lowered = jax.jit(numbers, in_shardings=given, out_shardings=everywhere).lower(shapes, batch)
    return Probe(names, compile_lowered(lowered, config))


class Recompute:
    """`check` before each step; nothing where `stability.rerun_every` is 0, or the step is none of those."""

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        shapes: TrainState,
        shardings: TrainState,
        manifest: dict[str, Any],
        clock: Clock,
        say: Callable[[str], None],
    ):
        self._config, self._mesh, self._clock, self._say = config, mesh, clock, say
        self._of_run = mesh, shapes, shardings, manifest
        self._probes: dict[str, Probe] = {}  # by stage

    def check(self, step: int, plan: StagePlan, state: TrainState, batch: Batch) -> dict[str, int]:
        """{"transient_errors": 0 or 1} of a step that was computed again, {} of others.

        Raises NumericsError on every process, naming the device where one can be told.
        """
        every = self._config.stability.rerun_every
        if not every or step % every:
            return {}
        started = time.perf_counter()
        transient = self._check(step, plan, state, batch)
        self._clock.beside("check", time.perf_counter() - started)
        return {"transient_errors": int(transient)}

    def _check(self, step: int, plan: StagePlan, state: TrainState, batch: Batch) -> bool:
        """Whether a transient error was found."""
        tested = step - self._config.stability.rerun_every
        doubt = (
            f"; what was made after step {tested} is in doubt: the same command goes on from the newest checkpoint, "
            f"--fork from an older one"
        )
        devices.check_devices(self._mesh, f"step {step}", doubt)
        probe = self._probe(plan)
        runs = [self._run(step, probe, state, batch, doubt) for _ in range(2)]
        if runs[0] == runs[1]:
            return False
        runs.append(self._run(step, probe, state, batch, doubt))
        differing = [name for name, *bits in zip(probe.names, *runs, strict=True) if len(set(bits)) > 1]
        what = f"step {step}, computed {len(runs)} times from the same state and batch, gave {{}} of {differing[0]}"
        what += f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        if sdc.verdict(runs) == "persistent":
            raise NumericsError(
                f"{what.format('other bits each time')}: hardware that computes wrongly, though each device passes the "
                f"self-test, or a program that adds up in no fixed order (on GPUs with compiler.deterministic=False): "
                f"try other hosts{doubt}"
            )
        self._say(f"{what.format('other bits once')}: a transient error; the step is made, and the run goes on")
        return True

    def _probe(self, plan: StagePlan) -> Probe:
        if plan.name not in self._probes:
            started = time.perf_counter()
            self._probes[plan.name] = compile_probe(self._config, plan, *self._of_run)
            self._say(f"the rerun of {plan.name}'s steps was compiled in {time.perf_counter() - started:.1f} s")
        return self._probes[plan.name]

    def _run(self, step: int, probe: Probe, state: TrainState, batch: Batch, doubt: str) -> tuple[int, ...]:
        """The bits of its numbers, which every device has alike, or NumericsError names the one that has not."""
        answers = devices.of_each("computes a step again", probe.run(state, batch))
        odd = sdc.odd_ones({device: answer.values for device, answer in answers.items()})
        if odd:
            raise NumericsError(
                f"step {step}: {devices.named(odd, answers)} ended a sum over all devices with other bits than the "
                f"rest: take it out of use{doubt}"
            )
        return next(iter(answers.values())).values
