"""Tries meshes, microbatches and remat policies for a topology, and ranks what fits by the estimated step time."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.errors import ConfigError
from k2jax.plan import topologies
from k2jax.plan.chips import chip_of
from k2jax.plan.estimate import plan_stage, with_stage
from k2jax.training.placement import mesh_of


def search(
    config: ConfigDict,
    topology: str,
    only: str | None,
    bounds: Mapping[str, Sequence | None],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every combination of `bounds` that divides, compiled; first what fits, fastest first, then the rest by memory.

    `bounds`: "fsdp", "tensor", "context", "pipeline" (its stages), "pipeline_microbatches", "microbatches", "remat" to
    values; None keeps the experiment's, for fsdp all that the other axes leave, for pipeline_microbatches the next
    multiple of the stages. The stage is the first, or that named `only`. ConfigError where nothing divides.
    """
    chip, devices = chip_of(topology), topologies.devices(topology)
    config = with_stage(config, only or config.stages[0].name)
    stage, refused, tried = config.stages[0], "", []
    pipelines = (bounds["pipeline"] or [1], bounds["pipeline_microbatches"] or [0])
    options = (
        bounds["tensor"] or [1],
        bounds["context"] or [1],
        sorted({(stages, parts if stages > 1 else 0) for stages, parts in itertools.product(*pipelines)}),
        bounds["fsdp"] or [0],
        bounds["microbatches"] or [stage.microbatches],
        bounds["remat"] or [config.model.remat],
    )
    for tensor, context, (stages, parts), fsdp, microbatches, remat in itertools.product(*options):
        fsdp = fsdp or len(devices) // (tensor * context * stages)
        replica = len(devices) // max(math.prod((tensor, context, stages, fsdp)), 1)
        case = configuration.from_dict(configuration.to_dict(config)).unlock()
        sizes = {"replica": replica, "stage": stages, "fsdp": fsdp, "context": context, "tensor": tensor}
        case.mesh = {**config.mesh, **sizes}
        case.model.remat, case.stages[0].microbatches = remat, microbatches
        case.model.pipeline.microbatches = parts or -(-config.model.pipeline.microbatches // stages) * stages
        if math.prod(case.model.rings) != fsdp:
            case.model.rings = ()
        try:
            configuration.validate(case)
            mesh = mesh_of(case, devices)
        except ConfigError as error:
            refused = str(error)
            continue
        say(f"trying mesh {dict(case.mesh)}, microbatches {microbatches}, remat {remat}")
        found = {"mesh": dict(mesh.shape), "microbatches": microbatches, "remat": remat}
        found["pipeline_microbatches"] = case.model.pipeline.microbatches  # where the mesh has stages
        tried.append(found | plan_stage(case, 0, mesh, chip))
    if not tried:
        raise ConfigError(f"--search: nothing within the bounds divides; the last was refused: {refused}")
    return sorted(tried, key=lambda c: (not c["fits"], c["step_seconds"] if c["fits"] else c["hbm_bytes_per_chip"]))
