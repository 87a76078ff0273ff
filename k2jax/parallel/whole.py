"""Stacks of matrices that lie in parts over devices, whole for a while: each device then has some of the matrices.

    held     w_up_LDF[L, D_fsdp, F_tensor]: of each matrix a part
    whole    w_up_LDF[L_(fsdp, tensor), D, F]: some matrices, by an all-to-all over each axis, and back by another

Written out, since XLA's partitioner goes by way of much more: for 80 matrices of K2-65B's width on 512 devices it had
50 GiB of temporaries on each, and added up whole stacks in every product.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def on_whole(
    function: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array], spec: PartitionSpec
) -> list[jax.Array]:
    """`function` of (matrices, I, O), which keeps that shape and takes each matrix by itself, of stacks (L, I, O).

    All have the same shape and lie as `spec` says; they are one stack to the devices, filled up with zeros to a
    multiple of their number: many small stacks would leave devices idle.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Of a dimension the minor axis first: what is joined lies side by side.
    axes = [(axis, dim) for dim in (1, 2) for axis in reversed(_axes(spec, dim)) if not mesh.empty]
    devices = math.prod(mesh.shape[axis] for axis, _ in axes)

    def run(*parts: jax.Array) -> list[jax.Array]:
        x = jnp.concatenate(parts)
        count = len(x)
        x = jnp.pad(x, ((0, -count % devices), (0, 0), (0, 0)))
        for axis, dim in axes:
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dim, tiled=True)
        x = function(x)
        for axis, dim in reversed(axes):
            x = jax.lax.all_to_all(x, axis, split_axis=dim, concat_axis=0, tiled=True)
        return jnp.split(x[:count], len(parts))

    if mesh.empty:
        return run(*stacks)
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(*stacks)


def _axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    part = spec[dim] if dim < len(spec) else None
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
