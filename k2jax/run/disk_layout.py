"""Where an array lies for the disk: the part that each device writes and reads of it, all parts distinct.

    held    w_up_LDF[L, D_fsdp, F], (80, 8192, 22016) on fsdp 512: a device has 80 layers of 16 rows
    stored  w_up_LDF[L_fsdp', D_fsdp, F] on fsdp 32, fsdp' 16: 5 layers of 256 rows

Readers go layer by layer, and a storage wants megabytes at a time: where a device's part of a layer is small, the minor
factor of a sharded axis moves to the layers, by an all-to-all within groups of neighbouring devices. Copies are cut
among the devices that have them: each byte is written once, and read once and sent to who needs it, by whoever is near.
It is written out, since XLA's partitioner may go by way of whole arrays.
"""

import math
from functools import cache, partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYER_BYTES = 1 << 23  # of a device's part of a layer: enough as it is


class DiskLayout(NamedTuple):
    """Two shardings of an array on one mesh, whose axes are those of the training's, some of them cut in two."""

    mesh: Mesh
    held: PartitionSpec  # in training
    stored: PartitionSpec  # for the disk
    moved: tuple[str, int] | None  # (axis, dimension): that axis, minor on the dimension, goes to the layers
    copies: tuple[tuple[str, int], ...]  # (axis, dimension) of copies that are cut

    @property
    def sharding(self) -> NamedSharding:
        """For the disk."""
        return NamedSharding(self.mesh, self.stored)


def disk_layout(
    shape: tuple[int, ...], itemsize: int, sharding: NamedSharding, *, by_layer: bool
) -> DiskLayout:
    """That of an array of `sharding`; its first dimension is the layers, where `by_layer`."""
    sizes = dict(sharding.mesh.shape)
    held = [_axes(part) for part in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))]
    free = [axis for axis, size in sizes.items() if size > 1 and axis not in sum(held, [])]
    local = list(sharding.shard_shape(shape))
    stored, moved, copies = [list(axes) for axes in held], None, []

    def cut(axis: str, factor: int) -> str:
        """The minor factor of an axis, as an axis of its own."""
        if factor == sizes[axis]:
            return axis
        minor = f"{axis}'"
        while minor in sizes:
            minor += "'"
        order = list(sizes.items())
        at = [name for name, _ in order].index(axis)
        order[at : at + 1] = [(axis, sizes[axis] // factor), (minor, factor)]
        sizes.clear()
        sizes.update(order)
        for axes in (*held, *stored):
            if axis in axes:
                axes.insert(axes.index(axis) + 1, minor)
        return minor

    if by_layer and math.prod(local[1:]) * itemsize < LAYER_BYTES:
        last = {
            dim: next((a for a in reversed(held[dim]) if sizes[a] > 1), None) for dim in range(1, len(shape))
        }
        factors = {dim: math.gcd(local[0], sizes[axis]) for dim, axis in last.items() if axis}
        if factors and max(factors.values()) > 1:
            dim = max(factors, key=factors.get)
            axis = cut(last[dim], factors[dim])
            stored[dim].remove(axis)
            stored[0].append(axis)
            moved = axis, dim
            local[0] //= factors[dim]
            local[dim] *= factors[dim]
    for axis in free:
        for dim, size in enumerate(local):
            factor = math.gcd(size, sizes[axis])
            if factor > 1:
                taken = cut(axis, factor)
                stored[dim].append(taken)
                copies.append((taken, dim))
                local[dim] //= factor
                if taken == axis:
                    break
    mesh = Mesh(sharding.mesh.devices.reshape(*sizes.values()), tuple(sizes))
    specs = (PartitionSpec(*[tuple(axes) or None for axes in each]) for each in (held, stored))
    return DiskLayout(mesh, *specs, moved, tuple(copies))


def _axes(part: str | tuple[str, ...] | None) -> list[str]:
    return [part] if isinstance(part, str) else list(part or ())


def to_disk(x: jax.Array, layout: DiskLayout) -> jax.Array:
    """The array, held, as it is stored. All processes call it."""
    return _run(x, layout, _store)


def from_disk(x: jax.Array, layout: DiskLayout, sharding: NamedSharding) -> jax.Array:
    """The inverse of `to_disk`. All processes call it."""
    return jax.make_array_from_single_device_arrays(
        x.shape, sharding, [shard.data for shard in _run(x, layout, _hold).addressable_shards]
    )


def _run(x: jax.Array, layout: DiskLayout, how: object) -> jax.Array:
    if layout.held == layout.stored:
        return x
    with jax.set_mesh(layout.mesh):
        return how(layout)(x)


@cache
def _store(layout: DiskLayout) -> object:
    def cut(part: jax.Array) -> jax.Array:
        if layout.moved:
            axis, dim = layout.moved
            part = jax.lax.all_to_all(part, axis, split_axis=0, concat_axis=dim, tiled=True)
        for axis, dim in layout.copies:
            size = part.shape[dim] // layout.mesh.shape[axis]
            part = jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index(axis) * size, size, dim)
        return part

    return _mapped(cut, layout.held, layout.stored)


@cache
def _hold(layout: DiskLayout) -> object:
    def join(part: jax.Array) -> jax.Array:
        for axis, dim in reversed(layout.copies):
            part = jax.lax.all_gather(part, axis, axis=dim, tiled=True)
        if layout.moved:
            axis, dim = layout.moved
            part = jax.lax.all_to_all(part, axis, split_axis=dim, concat_axis=0, tiled=True)
        return part

    return _mapped(join, layout.stored, layout.held)


def _mapped(f: object, given: PartitionSpec, wanted: PartitionSpec) -> object:
    # Unchecked: what stays of copies is the same on all that have it.
    return jax.jit(partial(jax.shard_map, check_vma=False)(f, in_specs=given, out_specs=wanted))
