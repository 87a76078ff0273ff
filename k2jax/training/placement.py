"""Where things lie: what a mesh must divide, the places of state and batches on it, and the mesh of a run's readers."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.model.decoder import Parameter, Params, parameter_table
from k2jax.parallel import pipeline, sharding, xla_options
from k2jax.parallel.sharding import AnyMesh
from k2jax.run.state import TrainState
from k2jax.training.optimizer import first_state, kept_moments
from k2jax.training.step import Batch


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError, before anything is compiled, for a dimension or batch that the mesh does not divide."""
    for name, p in parameter_table(config.model).items():
        sharding.check_divisible(name, p.shape, p.axes, mesh)
    data_parallel = sharding.row_parts(mesh)
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


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh to train on: the experiment's, with as little state on a device as its replicas allow.

    Raises ConfigError where it does not fit the devices, or the experiment does not fit it.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    return split_moments(config, mesh)


def split_moments(config: ConfigDict, mesh: AnyMesh) -> AnyMesh:
    """The mesh, of whose replicas as many split the moments as can (see sharding.split_replicas)."""
    replicas = mesh.shape["replica"]
    parts = [number for number in range(replicas, 0, -1) if replicas % number == 0]
    return min((sharding.split_replicas(mesh, number) for number in parts), key=partial(state_bytes, config))


def mesh_for(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """For readers of a run: the experiment's mesh where it fits the devices, else with as much fsdp as divides them.

    Readers neither pipeline nor split rows: those devices count to fsdp, too; what fsdp cannot take are replicas. All
    devices are used, since processes of which some have none cannot compute together. `devices`: all by default.
    """
    devices = jax.devices() if devices is None else list(devices)
    table = parameter_table(config.model)

    def fitting(sizes: Mapping[str, int]) -> Mesh | None:
        try:
            mesh = sharding.make_mesh(sizes, devices)
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
    sizes = (size for size in range(len(devices), 0, -1) if len(devices) % size == 0)
    others = (fitting({"replica": len(devices) // size, "fsdp": size}) for size in sizes)
    return fitting(own) or next(mesh for mesh in others if mesh)


def place_state(config: ConfigDict, shapes: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state: moments over all data axes, whatever the parameters do."""
    table = parameter_table(config.model)
    params = {name: sharding.named(mesh, p.axes) for name, p in table.items()}
    mu, nu = (moment_places(of, mesh) for of in kept_moments(config))
    scalar = NamedSharding(mesh, PartitionSpec())
    clips, ema = dict.fromkeys(shapes.clips, scalar), {name: params[name] for name in shapes.ema}
    return TrainState(scalar, scalar, scalar, params, mu, nu, clips, ema)


def moment_places(table: dict[str, Parameter], mesh: Mesh) -> dict[str, NamedSharding]:
    """Of moments that have these shapes and axes; gradients are summed to where a parameter's would be."""
    return {name: NamedSharding(mesh, sharding.optimizer_spec(p.shape, p.axes, mesh)) for name, p in table.items()}


def make_state(config: ConfigDict, shardings: TrainState) -> TrainState:
    return begin_state(config, shardings)()


def begin_state(config: ConfigDict, shardings: TrainState) -> Callable[[], TrainState]:
    """Begins to make the first state, and returns what waits for it: the step can be compiled in the meantime.

    On CPU a thread makes it, where a call returns when its arrays are there. Its program is optimised as a step's is
    there: the same bits as by all passes, and a third of the time to compile it.
    """
    on_cpu = sharding.platform() == "cpu"
    program = jax.jit(lambda: first_state(config), out_shardings=shardings).lower()
    program = program.compile(compiler_options=xla_options.of_this_cpu() if on_cpu else None)
    if not on_cpu:
        state = program()  # in the order of all programs, and not waited for
        return lambda: state
    thread = ThreadPoolExecutor(1, "k2jax-state")
    made = thread.submit(program)
    thread.shutdown(wait=False)  # it ends with its work
    return made.result


def move_params(config: ConfigDict, params: Params, mesh: Mesh) -> Params:
    """The parameters placed on another mesh of the same devices; on the mesh that they are on, as they are."""
    places = {name: sharding.named(mesh, p.axes) for name, p in parameter_table(config.model).items()}
    return jax.device_put(params, places)


def state_bytes(config: ConfigDict, mesh: Mesh) -> int:
    """Of float32 parameters and moments on a device, as they are cut there."""
    shapes = jax.eval_shape(lambda: first_state(config))
    return sum(
        array.dtype.itemsize * math.prod(place.shard_shape(array.shape))
        for array, place in zip(*map(jax.tree.leaves, (shapes, place_state(config, shapes, mesh))), strict=True)
    )


class Placement(NamedTuple):
    """How a stage's batches lie on the mesh."""

    mesh: Mesh
    microbatches: int
    rows: int  # of a microbatch
    local_rows: np.ndarray  # int64: which rows of a step this process reads, microbatch by microbatch
    local_in_micro: np.ndarray  # the same within one microbatch

    def globalize(self, rows: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a step to the global batch (A, R, ...)."""
        of_kind = {key: self._global(rows[key]) for key in ("marks", "pairs") if key in rows}
        return Batch(*(self._global(rows[key]) for key in ("tokens", "subset", "digest")), **of_kind)

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
    """Of tokens, subsets and digests (A, R, ...)."""
    return NamedSharding(mesh, PartitionSpec(None, sharding.data_axes(mesh)))


def place_batches(stage: ConfigDict, mesh: Mesh) -> Placement:
    rows = stage.rows_per_step // stage.microbatches
    slices = batch_sharding(mesh).addressable_devices_indices_map((stage.microbatches, rows)).values()
    mine = np.unique(np.concatenate([np.arange(*index[1].indices(rows)) for index in slices]))
    local = np.concatenate([micro * rows + mine for micro in range(stage.microbatches)])
    return Placement(mesh, stage.microbatches, rows, local, mine)
