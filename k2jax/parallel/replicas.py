"""Data parallelism over the mesh axis `replica`: each replica adds up the gradient of its own rows by itself, over all
microbatches and layers, and the replicas' gradients are summed once a step.

Left in the loops, that sum would be sent once for every microbatch. Replicas are far from one another (other hosts,
other slices of TPUs), so that it is scattered to where the moments live as it is summed: half of an all-reduce's bytes.
Where the mesh has the axis `copy`, too (sharding.split_replicas), its devices are replicas whose moments are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from k2jax.parallel.sharding import COPY

REPLICA = "replica"
Specs = Mapping[str, PartitionSpec]


def axes_in_use() -> tuple[str, ...]:
    """Those of the mesh in use that have more than one device; () without one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in (COPY, REPLICA) if sizes.get(axis, 1) > 1)


def summed(
    function: Callable, params: Any, rows: Any, specs: Specs, moment_specs: Specs
) -> tuple[dict[str, jax.Array], Any]:
    """`function(params, rows...)` of each replica's (microbatches, rows, ...), its arrays summed over the replicas.

    Nothing within `function` knows of the axis `replica`. Results: arrays by name, of which each lies as `specs` says
    and, where `moment_specs` says so, is split over the replicas besides; and a tree of small ones, not summed, each
    (replicas, ...).
    """

    def own(params: Any, *rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[None], function(params, *rows))

    axes = axes_in_use()
    in_specs = PartitionSpec(), *[PartitionSpec(None, axes)] * len(rows)
    on_each = jax.shard_map(own, in_specs=in_specs, out_specs=PartitionSpec(axes), axis_names={*axes}, check_vma=False)
    large, small = on_each(params, *rows)
    return _sum_once(large, specs, moment_specs), small


def _sum_once(stacked: dict[str, jax.Array], specs: Specs, moment_specs: Specs) -> dict[str, jax.Array]:
    """The sum of (replicas, ...) arrays, each replica's on its own devices, where the rest lies as `specs` say.

    The sum lies as `specs` say, too, and split over the replicas where `moment_specs` say so.
    """

    def reduce(own: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: _reduce(array[0], dims[name], axes) for name, array in own.items()}

    axes = axes_in_use()
    dims = {name: _split_dim(moment_specs[name]) for name in stacked}
    into = {name: _split_over_replicas(specs[name], dims[name]) for name in stacked}
    start = {name: PartitionSpec(axes, *specs[name]) for name in stacked}
    return jax.shard_map(reduce, in_specs=(start,), out_specs=into, check_vma=False)(stacked)


def _reduce(array: jax.Array, dim: int | None, axes: tuple[str, ...]) -> jax.Array:
    if dim is None or REPLICA not in axes:
        return jax.lax.psum(array, axes)
    part = jax.lax.psum_scatter(array, REPLICA, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(part, COPY) if COPY in axes else part


def _axes(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _split_dim(spec: PartitionSpec) -> int | None:
    return next((dim for dim, part in enumerate(spec) if REPLICA in _axes(part)), None)


def _split_over_replicas(spec: PartitionSpec, dim: int | None) -> PartitionSpec:
    """What lies on one device is cut among the replicas: they come last, as in `sharding.optimizer_spec`."""
    return PartitionSpec(*[(*_axes(part), REPLICA) if i == dim else part for i, part in enumerate(spec)])
