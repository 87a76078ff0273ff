"""The compiled step of each stage, and the steps of a run as they are fed to it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax.data.conversations import most_pairs
from k2jax.data.loader import make_loader
from k2jax.data.order import Order, StagePlan
from k2jax.data.store import Store
from k2jax.errors import ConfigError
from k2jax.keys import PACKED_KINDS
from k2jax.model.decoder import compute_dtype, parameter_table
from k2jax.parallel import compile_cache, sharding, xla_options
from k2jax.run.state import TrainState
from k2jax.run.tuning import Tuning
from k2jax.training.launch import Launch
from k2jax.training.placement import batch_sharding, moment_places, place_batches
from k2jax.training.step import Batch, Metrics, train_step

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def stage_step(
    config: ConfigDict, plan: StagePlan, shardings: TrainState, eos_id: int, num_subsets: int
) -> StepFunction:
    """The training step of a stage, not yet jitted."""
    return partial(
        train_step,
        config=config,
        stage=config.stages[plan.index],
        first_step=plan.first_step - plan.done,
        num_steps=plan.num_steps,
        eos_id=eos_id,
        num_subsets=num_subsets,
        compute_dtype=compute_dtype(config),
        moment_shardings=moment_places(parameter_table(config.model), shardings.step.mesh),
    )


def step_shardings(
    shardings: TrainState, mesh: Mesh, stage: ConfigDict
) -> tuple[tuple[TrainState, Batch], NamedSharding]:
    """(of what a step of a stage is given, of the numbers that it gives back)."""
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    marked, paired = (rows if stage.kind in kinds else None for kinds in (PACKED_KINDS, ("dpo",)))
    return (shardings, Batch(rows, rows, rows, everywhere, marked, paired, paired)), everywhere


def step_function(
    config: ConfigDict, plan: StagePlan, shardings: TrainState, mesh: Mesh, eos_id: int, num_subsets: int
) -> Any:
    """The jitted training step of a stage: the one call site of jit, shardings and donation."""
    given, everywhere = step_shardings(shardings, mesh, config.stages[plan.index])
    return jax.jit(
        stage_step(config, plan, shardings, eos_id, num_subsets),
        in_shardings=given,
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def batch_shapes(config: ConfigDict, stage: ConfigDict) -> Batch:
    """Shapes and types of a global batch."""
    leading = (stage.microbatches, stage.rows_per_step // stage.microbatches)
    width = stage.sequence_length + (config.data.label_shift == "next")
    pairs = (*leading, most_pairs(stage.sequence_length))
    return Batch(
        jax.ShapeDtypeStruct((*leading, width), jnp.int32),
        jax.ShapeDtypeStruct(leading, jnp.int32),
        jax.ShapeDtypeStruct((*leading, 8), jnp.uint32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jax.ShapeDtypeStruct((*leading, width), jnp.int32) if stage.kind in PACKED_KINDS else None,
        jax.ShapeDtypeStruct(pairs, jnp.int32) if stage.kind == "dpo" else None,
        jax.ShapeDtypeStruct((*pairs, 2), jnp.float32) if stage.kind == "dpo" else None,
    )


def compile_lowered(lowered: Any, config: ConfigDict, tuning: Tuning | None = None) -> Any:
    """With the options of the devices in use, and with what was tuned, which is kept.

    ConfigError for an option that its compiler does not know.
    """
    platform, compiler = sharding.platform(), config.compiler
    by_kind = xla_options.of_this_cpu() if platform == "cpu" else xla_options.of_kind(sharding.device_kind())
    pairs = dict(by_kind if compiler.defaults else {})
    chosen = dict(option.split("=", 1) for option in {"tpu": compiler.tpu, "gpu": compiler.gpu}.get(platform, ()))
    pairs |= chosen
    if platform == "gpu":  # whose compiler takes no text for a bool or a number
        ordered = {"xla_gpu_exclude_nondeterministic_ops": True} if compiler.deterministic else {}
        pairs = {name: _value(text) for name, text in pairs.items()} | ordered
    try:
        compiled = lowered.compile(compiler_options=pairs | (tuning.options if tuning else {}))
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '([^']*)'", str(error))
        if not unknown:
            raise
        name = unknown.group(1)
        whose = f"compiler.{platform}" if name in chosen else "compiler.defaults=True"
        remedy = "take it out of the experiment" if name in chosen else "set compiler.defaults=False"
        raise ConfigError(
            f"{whose}: the installed compiler knows no option {name!r}: {remedy}, or install the compiler that it was "
            f"chosen for"
        ) from error
    if tuning:
        tuning.keep()
    return compiled


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def compile_step(
    config: ConfigDict,
    plan: StagePlan,
    mesh: Mesh,
    shapes: TrainState,
    shardings: TrainState,
    manifest: dict[str, Any],
    say: Callable[[str], None],
    launch: Launch,
    tuning: Tuning | None = None,
) -> StepFunction:
    """Compiled once for the stage: an executable takes these shapes only, so nothing can recompile later."""
    started = time.perf_counter()
    launch.compiles()
    say(f"compiling the step of {plan.name}")
    batch = batch_shapes(config, config.stages[plan.index])
    jitted = step_function(config, plan, shardings, mesh, manifest["eos_id"], len(manifest["stores"]))
    lowered = jitted.lower(shapes, batch)
    before = compile_cache.counts()
    compiled = compile_lowered(lowered, config, tuning)
    warm = compile_cache.counts().since(before).found > 0
    launch.compiled(warm)
    say(f"{'out of the cache' if warm else 'compiled'} in {time.perf_counter() - started:.1f} s")
    return compiled


class Work(NamedTuple):
    """One step to do: its compiled function and its batch, and how long the batch was waited for."""

    step: int
    plan: StagePlan
    run_step: StepFunction
    batch: Batch
    data_wait_s: float


def feed_steps(
    config: ConfigDict,
    order: Order,
    stores: dict[str, Store],
    manifest: dict[str, Any],
    mesh: Mesh,
    shapes: TrainState,
    shardings: TrainState,
    *,
    first_step: int,
    say: Callable[[str], None],
    launch: Launch,
    tuning: Tuning | None = None,
) -> Iterator[Work]:
    """The steps from `first_step` to the end of the run; compiles where a stage begins. Close it to end the loader."""
    for plan in order.stages:
        if max(first_step, plan.first_step) > plan.last_step:
            continue  # behind, or skipped as a whole
        placement = place_batches(config.stages[plan.index], mesh)
        run_step = compile_step(config, plan, mesh, shapes, shardings, manifest, say, launch, tuning)
        batches = make_loader(
            order,
            stores,
            label_shift=config.data.label_shift,
            first_step=max(first_step, plan.first_step),
            last_step=plan.last_step,
            local_rows=placement.local_rows,
            threads=config.data.threads,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
        with closing(batches):
            for _ in range(max(first_step, plan.first_step), plan.last_step + 1):
                started = time.perf_counter()
                step, rows = next(batches)
                data_wait_s = time.perf_counter() - started
                yield Work(step, plan, run_step, placement.globalize(rows), data_wait_s)
