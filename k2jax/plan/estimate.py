"""What an experiment would need and do on devices that are not here: memory, time, and what a whole run takes."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data.order import StagePlan
from k2jax.errors import ConfigError
from k2jax.model.flops import flops_per_token
from k2jax.parallel import pipeline, sharding
from k2jax.plan import saving, topologies
from k2jax.plan.chips import GIB, Chip, chip_of
from k2jax.plan.hlo import Program
from k2jax.plan.links import Links
from k2jax.plan.timeline import Timeline
from k2jax.training.optimizer import first_state
from k2jax.training.placement import mesh_of, place_state, state_bytes
from k2jax.training.program import batch_shapes, compile_lowered, step_function

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def plan(
    config: ConfigDict,
    topology: str,
    only: str | None = None,
    say: Callable[[str], None] = print,
    storage: saving.Storage = saving.DEFAULT,
) -> dict[str, Any]:
    """Compiles the training step of every stage (or of the one named `only`) for `topology`.

    Returns the numbers of the longest stage, `days` and `chip_hours` of all stages together, under "stages" those of
    each, and under "saving" what checkpoints cost.

    Raises ConfigError for an unknown topology, and for a mesh or batch that does not divide.
    """
    chip = chip_of(topology)
    devices = topologies.devices(topology)
    config = with_stage(config, only) if only else config
    mesh = mesh_of(config, devices)
    stages = {}
    for i, stage in enumerate(config.stages):
        say(f"compiling the step of {stage.name} for {len(devices)} devices of {topology}")
        stages[stage.name] = plan_stage(config, i, mesh, chip)
    longest = max(stages.values(), key=lambda stage: stage["steps"] * (stage["step_seconds"] or math.inf))
    fits = all(stage["fits"] for stage in stages.values())
    days = sum(stage["days"] for stage in stages.values()) if fits else None
    return {
        "experiment": config.name,
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        **longest,
        "fits": fits,
        "hbm_bytes_per_chip": max(stage["hbm_bytes_per_chip"] for stage in stages.values()),
        "days": days,
        "chip_hours": days and days * 24 * longest["chips"],
        "compile_seconds": sum(stage["compile_seconds"] for stage in stages.values()),
        "stages": stages,
        "saving": saving.cost(config, mesh, chip, stages, storage),
    }


def with_stage(config: ConfigDict, name: str) -> ConfigDict:
    """A copy that has the one stage. ConfigError names the stages where there is none such."""
    known = [stage.name for stage in config.stages]
    if name not in known:
        raise ConfigError(f"--stage={name}: {config.name} has the stages {', '.join(known)}")
    copy = configuration.from_dict(configuration.to_dict(config)).unlock()
    copy.stages = (copy.stages[known.index(name)],)
    return copy


def plan_stage(config: ConfigDict, index: int, mesh: jax.sharding.Mesh, chip: Chip) -> dict[str, Any]:
    """Memory of a stage's step; and its time, where it fits."""
    stage = config.stages[index]
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = lower(config, index, mesh)
        try:
            compiled = compile_lowered(lowered, config)
        except jax.errors.JaxRuntimeError as error:
            needed = memory_refused(str(error))
            if needed is None:
                raise
            compiled = None
    steps = stage.steps_per_chunk * stage.chunks
    found = {
        "stage": stage.name,
        "steps": steps,
        "chips": mesh.devices.size // chip.devices_per_chip,
        "tokens_per_step": stage.rows_per_step * stage.sequence_length,
        "hbm_limit_bytes": chip.hbm_bytes * chip.devices_per_chip,
        "bubble_fraction": pipeline.bubble_fraction(config, mesh),
        "compile_seconds": time.perf_counter() - started,
    }
    if compiled is not None:
        m = compiled.memory_analysis()
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        needed = held + m.temp_size_in_bytes + m.generated_code_size_in_bytes
        found |= {"argument_bytes": m.argument_size_in_bytes, "temporary_bytes": m.temp_size_in_bytes}
        found["host_bytes_per_chip"] = m.host_temp_size_in_bytes * chip.devices_per_chip
    found["hbm_bytes_per_chip"] = needed * chip.devices_per_chip
    found["fits"] = needed <= chip.hbm_bytes
    times = dict.fromkeys(
        ("step_seconds", "mfu_causal", "mfu_noncausal", "tokens_per_second_per_chip", "days", "chip_hours")
    )
    if compiled is not None:
        timeline = Timeline(Program(compiled.as_text()), chip, Links(chip, list(mesh.devices.flat)))
        times = _times(config, stage, timeline, mesh.devices.size, found)
    found["remedies"] = [] if found["fits"] else remedies(config, stage, mesh, chip, needed)
    return found | times


def _times(
    config: ConfigDict, stage: ConfigDict, timeline: Timeline, devices: int, found: dict[str, Any]
) -> dict[str, Any]:
    parts, peak = timeline.step(), timeline.chip.peak_flops
    flops, tokens = flops_per_token(config.model, stage.sequence_length), found["tokens_per_step"]
    days = parts.total * found["steps"] / 86400
    return {
        "step_seconds": parts.total,
        "matrix_seconds": parts.matrix,
        "elementwise_seconds": parts.elementwise,
        "attention_seconds": parts.attention,
        "exposed_collective_seconds": parts.collectives.exposed,
        "hidden_collective_seconds": parts.collectives.hidden,
        "collective_bytes": parts.collectives.size,
        "exposed_network_seconds": parts.slices.exposed,
        "hidden_network_seconds": parts.slices.hidden,
        "network_bytes_per_chip": parts.slices.size * timeline.chip.devices_per_chip,
        "network_bytes_per_s": timeline.chip.network_bytes_per_s * timeline.chip.devices_per_chip,
        "exposed_host_copy_seconds": parts.host.exposed,
        "hidden_host_copy_seconds": parts.host.hidden,
        "host_copy_bytes": parts.host.size,
        "copied_bytes": parts.copied,
        "step_flops_causal": flops.causal * tokens,
        "step_flops_noncausal": flops.noncausal * tokens,
        "mfu_causal": flops.causal * tokens / (parts.total * devices * peak),
        "mfu_noncausal": flops.noncausal * tokens / (parts.total * devices * peak),
        "tokens_per_second_per_chip": tokens / parts.total / found["chips"],
        "tokens_per_day": tokens / parts.total * 86400,
        "days": days,
        "chip_hours": days * 24 * found["chips"],
        "exposed_by": dict(timeline.waited_for.most_common(8)),
        "kernels_by_arithmetic": sorted(timeline.guessed_kernels),
    }


def lower(config: ConfigDict, index: int, mesh: jax.sharding.Mesh) -> Any:
    """The training step of a stage as the trainer compiles it, for shapes alone. Under `jax.set_mesh(mesh)`."""
    stage = config.stages[index]
    shapes = jax.eval_shape(lambda: first_state(config))
    shardings = place_state(config, shapes, mesh)
    steps = stage.steps_per_chunk * stage.chunks
    row = StagePlan(
        stage.name, index, stage.sequence_length, stage.rows_per_step, stage.steps_per_chunk, stage.chunks,
        0, steps * stage.rows_per_step, 1, steps,
    )  # fmt: skip
    subsets = {name for s in config.stages for name in s.mix}
    step = step_function(config, row, shardings, mesh, eos_id=2, num_subsets=len(subsets))
    return step.lower(shapes, batch_shapes(config, stage))


def memory_refused(error: str) -> int | None:
    """Bytes a device that a refused program would need; None where the error is another."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", error) or re.search(
        r"total memory required .*?\(([\d.]+)([KMGT]?)\) exceeds", error
    )
    return int(float(found.group(1)) * UNITS[found.group(2)]) if found else None


def remedies(config: ConfigDict, stage: ConfigDict, mesh: jax.sharding.Mesh, chip: Chip, needed: int) -> list[str]:
    """What would make it fit, by arithmetic: state is by device, the rest goes with the rows that a device holds."""
    state = state_bytes(config, mesh)
    if state > chip.hbm_bytes:
        more = math.ceil(state / chip.hbm_bytes)
        return [
            f"parameters and moments alone take {state / GIB:.1f} GiB a device: shard them over {more} times as many"
        ]
    rows = stage.rows_per_step // stage.microbatches // sharding.row_parts(mesh)
    cut = math.ceil((needed - state) / (chip.hbm_bytes - state))
    found = []
    if config.model.remat != "full":
        found.append("--config.model.remat=full keeps layer inputs only")
    parts = next((k for k in range(cut, rows + 1) if rows % k == 0), None)
    if parts:
        number = [row.name for row in config.stages].index(stage.name)
        microbatches = f"--config.stages.{number}.microbatches={stage.microbatches * parts}"
        found.append(f"{microbatches} holds {rows // parts} of {rows} rows at once")
    found.append(f"{cut} times as many devices, or rows split over context {mesh.shape['context'] * cut}")
    return found
