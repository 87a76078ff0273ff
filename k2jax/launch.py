"""What a run needs before and between its steps: data opened and identified, state placed, steps compiled and fed."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax import drift, pipeline, sharding
from k2jax.data.loader import make_loader
from k2jax.data.manifest import build_manifest, manifest_digest
from k2jax.data.order import Order, StagePlan
from k2jax.data.store import Store
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.flops import flops_per_token
from k2jax.model import Params, num_params, parameter_table
from k2jax.optimizer import TrainState, init_state
from k2jax.rundir import environment
from k2jax.step import Batch, Metrics, train_step


def open_data(config: ConfigDict) -> tuple[dict[str, Store], dict[str, Any]]:
    """(stores by subset, manifest). Raises ConfigError for a store or tokenizer that is not what it should be."""
    names = sorted({name for stage in config.stages for name in stage.mix})
    root = config.data.root if "://" in config.data.root else str(Path(config.data.root).absolute())
    stores = {name: Store.open(f"{root}/{name}", verify=config.data.verify) for name in names}
    stages = [configuration.to_dict(stage) for stage in config.stages]
    manifest = build_manifest(
        stages=stages,
        stores={name: store.summary() for name, store in stores.items()},
        seed=config.seed,
        label_shift=config.data.label_shift,
    )
    found = tokenizer_sha256(config.data.tokenizer)
    if found != manifest["tokenizer_sha256"]:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: its SHA-256 is {found[:12]}, the stores in {root} were "
            f"made with {manifest['tokenizer_sha256'][:12]}: name the tokenizer that made them"
        )
    if manifest["vocab_size"] > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: the stores in {root} hold token ids up to "
            f"{manifest['vocab_size'] - 1}: set it to {manifest['vocab_size']} or more"
        )
    return stores, manifest


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """`precision.compute` with "auto" resolved: float32 on CPU, bfloat16 elsewhere."""
    name = config.precision.compute
    return jnp.dtype(("float32" if sharding.platform() == "cpu" else "bfloat16") if name == "auto" else name)


def compile_lowered(lowered: Any, config: ConfigDict) -> Any:
    """With the options of the platform in use. ConfigError for one that its compiler does not know."""
    platform = sharding.platform()
    options = {"tpu": config.compiler.tpu, "gpu": config.compiler.gpu}.get(platform, ())
    try:
        return lowered.compile(compiler_options=dict(option.split("=", 1) for option in options))
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '([^']*)'", str(error))
        if not unknown:
            raise
        raise ConfigError(
            f"compiler.{platform}: the installed compiler knows no option {unknown.group(1)!r}: take it out of the "
            f"experiment, or install the compiler that it was chosen for"
        ) from error


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError, before anything is compiled, for a dimension or batch that the mesh does not divide."""
    for name, p in parameter_table(config.model).items():
        sharding.check_divisible(name, p.shape, p.axes, mesh)
    data_parallel = math.prod(mesh.shape[axis] for axis in sharding.DATA_AXES)
    for i, stage in enumerate(config.stages):
        rows = stage.rows_per_step // stage.microbatches
        if rows % data_parallel:
            raise ConfigError(
                f"stages.{i}: rows_per_step={stage.rows_per_step} in {stage.microbatches} microbatch(es) gives "
                f"{rows} rows, not divisible by mesh.replica x mesh.fsdp = {data_parallel} devices"
            )
        if mesh.shape["context"] > 1 and stage.sequence_length % (2 * mesh.shape["context"]):
            raise ConfigError(
                f"stages.{i}: sequence_length={stage.sequence_length} is not divisible by 2 x mesh.context = "
                f"{2 * mesh.shape['context']} chunks (two of a row to a device): change the mesh or the length"
            )
    rings = tuple(config.model.rings)
    if rings and math.prod(rings) != mesh.shape["fsdp"]:
        raise ConfigError(f"model.rings={rings} must multiply to mesh.fsdp={mesh.shape['fsdp']}, or be ()")
    pipeline.check(config, mesh)


def mesh_for(config: ConfigDict) -> Mesh:
    """For readers of a run: the experiment's mesh where it fits the devices here, else all of them on fsdp.

    Or as many of them as divide the parameters: one always does. Readers neither pipeline nor split rows: those devices
    count to fsdp, too.
    """
    devices = jax.devices()
    table = parameter_table(config.model)

    def fitting(sizes: Mapping[str, int], count: int) -> Mesh | None:
        try:
            mesh = sharding.make_mesh(sizes, devices[:count])
            for name, p in table.items():
                sharding.check_divisible(name, p.shape, p.axes, mesh)
        except ConfigError:
            return None
        return mesh

    own = dict(config.mesh)
    if -1 not in (own["stage"], own["context"], own["fsdp"]):
        own["fsdp"] *= own["stage"] * own["context"]
    else:
        own["fsdp"] = -1
    own["stage"] = own["context"] = 1
    everywhere = {"fsdp": -1}
    fewer = (fitting(everywhere, count) for count in range(len(devices), 0, -1))
    return fitting(own, len(devices)) or next(mesh for mesh in fewer if mesh)


def move_params(config: ConfigDict, params: Params, mesh: Mesh) -> Params:
    """The parameters placed on another mesh of the same devices; on the mesh that they are on, as they are."""
    places = {name: sharding.named(mesh, p.axes) for name, p in parameter_table(config.model).items()}
    return jax.device_put(params, places)


def check_processes_agree(config: ConfigDict, order: Order) -> None:
    """Raises ConfigError on every process, naming those whose configuration or data order is not process 0's."""
    mine = hashlib.sha256((drift.config_digest(config) + order.digest()).encode()).digest()
    all_processes = multihost_utils.process_allgather(np.frombuffer(mine, np.uint32)).reshape(
        jax.process_count(), -1
    )
    odd = [i for i, fingerprint in enumerate(all_processes) if (fingerprint != all_processes[0]).any()]
    if odd:
        raise ConfigError(
            f"process(es) {odd} have another configuration or data order than process 0: start all of them with the "
            f"same command, code and data"
        )


def describe_run(config: ConfigDict, order: Order, mesh: Mesh) -> str:
    """The derived numbers: parameters, tokens, FLOPs, memory of the state."""
    tokens = sum((p.last_step - p.first_step + 1) * p.rows_per_step * p.sequence_length for p in order.stages)
    params = num_params(config.model)
    lines = [
        f"{config.name}: {params:,} parameters, {order.num_steps:,} steps, {tokens:,} tokens; "
        f"compute in {compute_dtype(config)} on {mesh.devices.size} {mesh.devices.flat[0].device_kind}, "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"state: {state_bytes(config, mesh) / 2**30:.2f} GiB a device (fp32 parameters and moments)",
    ]
    for plan in order.stages:
        flops = flops_per_token(config.model, plan.sequence_length)
        lines.append(
            f"{plan.name}: steps {plan.first_step:,} to {plan.last_step:,}, {plan.rows_per_step} rows of "
            f"{plan.sequence_length} tokens a step, {flops.causal / 1e9:.4g} GFLOP a token causal, "
            f"{flops.noncausal / 1e9:.4g} non-causal"
        )
    return "\n".join(lines)


def state_bytes(config: ConfigDict, mesh: Mesh) -> float:
    """Of float32 parameters and moments on a device."""
    shards = math.prod(mesh.shape[axis] for axis in ("stage", "fsdp", "context", "tensor"))
    return 4 * num_params(config.model) * (1 / shards + 2 / (shards * mesh.shape["replica"]))


def place_state(config: ConfigDict, shapes: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state: moments over all data axes, whatever the parameters do."""
    table = parameter_table(config.model)
    params = {name: sharding.named(mesh, p.axes) for name, p in table.items()}
    moments = {
        name: NamedSharding(mesh, sharding.optimizer_spec(p.shape, p.axes, mesh)) for name, p in table.items()
    }
    scalar = NamedSharding(mesh, PartitionSpec())
    return TrainState(scalar, scalar, scalar, params, moments, dict(moments))


def make_state(config: ConfigDict, shardings: TrainState) -> TrainState:
    return jax.jit(lambda: init_state(config.model, config.seed), out_shardings=shardings)()


class Placement(NamedTuple):
    """How a stage's batches lie on the mesh."""

    mesh: Mesh
    microbatches: int
    rows: int  # of a microbatch
    local_rows: np.ndarray  # int64: which rows of a step this process reads, microbatch by microbatch
    local_in_micro: np.ndarray  # the same within one microbatch

    def globalize(self, rows: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a step to the global batch (A, R, ...)."""
        return Batch(*(self._global(rows[key]) for key in ("tokens", "subset", "digest")))

    def _global(self, local: np.ndarray) -> jax.Array:
        tail = local.shape[1:]
        local = local.reshape(self.microbatches, -1, *tail)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last = index[1].indices(self.rows)[:2]
            at = np.searchsorted(self.local_in_micro, first)
            return local[:, at : at + last - first]

        return jax.make_array_from_callback(
            (self.microbatches, self.rows, *tail), batch_sharding(self.mesh), part
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXES))


def place_batches(stage: ConfigDict, mesh: Mesh) -> Placement:
    rows = stage.rows_per_step // stage.microbatches
    slices = batch_sharding(mesh).addressable_devices_indices_map((stage.microbatches, rows)).values()
    mine = np.unique(np.concatenate([np.arange(*index[1].indices(rows)) for index in slices]))
    local = np.concatenate([micro * rows + mine for micro in range(stage.microbatches)])
    return Placement(mesh, stage.microbatches, rows, local, mine)


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def step_function(
    config: ConfigDict, plan: StagePlan, shardings: TrainState, mesh: Mesh, eos_id: int, num_subsets: int
) -> Any:
    """The jitted training step of a stage: the one call site of jit, shardings and donation."""
    stage = config.stages[plan.index]
    step = partial(
        train_step,
        config=config,
        stage=stage,
        first_step=plan.first_step,
        eos_id=eos_id,
        num_subsets=num_subsets,
        compute_dtype=compute_dtype(config),
        moment_shardings=shardings.mu,
    )
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def batch_shapes(config: ConfigDict, stage: ConfigDict) -> Batch:
    """Shapes and types of a global batch."""
    leading = (stage.microbatches, stage.rows_per_step // stage.microbatches)
    width = stage.sequence_length + (config.data.label_shift == "next")
    return Batch(
        jax.ShapeDtypeStruct((*leading, width), jnp.int32),
        jax.ShapeDtypeStruct(leading, jnp.int32),
        jax.ShapeDtypeStruct((*leading, 8), jnp.uint32),
    )


def compile_step(
    config: ConfigDict,
    plan: StagePlan,
    mesh: Mesh,
    shapes: TrainState,
    shardings: TrainState,
    manifest: dict[str, Any],
    say: Callable[[str], None],
) -> StepFunction:
    """Compiled once for the stage: an executable takes these shapes only, so nothing can recompile later."""
    started = time.perf_counter()
    say(f"compiling the step of {plan.name}")
    batch = batch_shapes(config, config.stages[plan.index])
    jitted = step_function(config, plan, shardings, mesh, manifest["eos_id"], len(manifest["stores"]))
    compiled = compile_lowered(jitted.lower(shapes, batch), config)
    say(f"compiled in {time.perf_counter() - started:.1f} s")
    return compiled


class Work(NamedTuple):
    """One step to do: its compiled function and its batch, and how long the batch was waited for."""

    step: int
    plan: StagePlan
    run_step: StepFunction
    batch: Batch
    data_wait_s: float


def work(
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
) -> Iterator[Work]:
    """The steps from `first_step` to the end of the run; compiles where a stage begins. Close it to end the loader."""
    for plan in order.stages:
        if first_step > plan.last_step:
            continue
        placement = place_batches(config.stages[plan.index], mesh)
        run_step = compile_step(config, plan, mesh, shapes, shardings, manifest, say)
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


def checkpoint_meta(config: ConfigDict, manifest: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """What every checkpoint of this launch says of where it came from."""
    here = environment(dict(mesh.shape))
    return {
        "config": configuration.to_dict(config),
        "config_digest": drift.config_digest(config),
        "manifest_digest": manifest_digest(manifest),
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "eos_id": manifest["eos_id"],
        "versions": here["versions"],
        "commit": here["commit"],
        "devices": here["devices"],
    }
