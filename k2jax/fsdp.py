"""Fully sharded data parallelism, written out: weights are gathered where they are used, gradients reduced to where
they live.

Left to the partitioner, a weight's gradient is summed by an all-reduce of all of it and then cut: twice the bytes. What
is here runs on each device's own rows and positions, so that a gradient can be scattered as it is summed; gathers and
scatters go over one ring of devices after the other (an axis of a TPU's torus each), which compilers run
beside the products where they are asked to (`compiler.tpu` in the experiment files).

Mesh axes: "replica", "fsdp" and "context" split what a step reads, "fsdp" and "context" the parameters as well.
"stage" splits rows outside the layers, "tensor" is left to the partitioner.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from k2jax.sharding import platform

SPLIT = ("fsdp", "context")
Rings = tuple[int, ...]  # sizes that multiply to that of fsdp, major first; (): one ring


def reading() -> tuple[str, ...]:
    """The mesh axes that split rows and positions here: within a pipeline's stage, its axis does not."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    return tuple(axis for axis in ("replica", "fsdp", "stage", "context") if axis in free)


def rows() -> PartitionSpec:
    """Of B, T, ..."""
    *batch, position = reading() or (None,)
    return PartitionSpec(tuple(batch), position)


def weight(dim: int) -> PartitionSpec:
    """Of an array whose dimension `dim` is split over fsdp and context."""
    return PartitionSpec(*[None] * dim, SPLIT)


def over_data(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`function` of each device's own part; as it is where a mesh splits no data."""
    axes = reading()
    if not axes or math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes) == 1:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )


def gather(part: jax.Array, dim: int, dtype: jnp.dtype, rings: Rings) -> jax.Array:
    """The whole of a weight, in `dtype`, within `over_data`."""
    whole = part.astype(dtype)
    for axis, groups in _hops(rings):
        whole = jax.lax.all_gather(whole, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return whole


def scatter(gradient: jax.Array, dim: int, rings: Rings, axes: tuple[str, ...]) -> jax.Array:
    """The sum over `axes` of a weight's gradient, to each device the part that is its own. Within `over_data`."""
    for axis, groups in reversed(_hops(rings)):
        gradient = jax.lax.psum_scatter(
            gradient, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups
        )
    return total(gradient, tuple(axis for axis in axes if axis not in SPLIT))


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices, within `over_data`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    return jax.lax.psum(x, axes) if axes else x


def _hops(rings: Rings) -> list[tuple[str, list[list[int]] | None]]:
    """(mesh axis, its groups of devices) in the order of a gather: neighbours first, so that parts come in order.

    A gather's last hop carries most of the bytes: nearly all of them over the first, major ring.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    hops: list[tuple[str, list[list[int]] | None]] = [("context", None)] if sizes.get("context", 1) > 1 else []
    fsdp = sizes.get("fsdp", 1)
    if len(rings) < 2:
        return hops + ([("fsdp", None)] if fsdp > 1 else [])
    stride = 1
    for size in reversed(rings):
        firsts = [i for i in range(fsdp) if i // stride % size == 0]
        hops.append(("fsdp", [[first + stride * i for i in range(size)] for first in firsts]))
        stride *= size
    return hops


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x_BTI: jax.Array, w_IO: jax.Array, split: int, out_dtype: jnp.dtype, rings: Rings = ()) -> jax.Array:
    """x[B, T, in...] . w[in..., out...], `w` (float32) cast to the type of `x`, a result in `out_dtype`.

    `split` is the dimension of `w` that is split over fsdp: its first, which is contracted, or its last, which is all
    of the result. The gradient of `w` is float32: differentiated by JAX, a bfloat16 product has a bfloat16 weight
    gradient, and the devices would add up rounded numbers; K2 accumulated and reduced in float32.
    """

    def product(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
        whole = gather(w_IO, split, x_BTI.dtype, rings)
        inputs = range(2, x_BTI.ndim), range(x_BTI.ndim - 2)
        y_BTO = _apart(_dot(_flat(x_BTI), whole, inputs, out_dtype))
        return y_BTO.reshape(*x_BTI.shape[:2], *y_BTO.shape[2:])

    return over_data(product, (rows(), weight(split)), rows())(x_BTI, w_IO)


def _matmul_forward(
    x_BTI: jax.Array, w_IO: jax.Array, split: int, out_dtype: jnp.dtype, rings: Rings
) -> tuple[jax.Array, tuple]:
    return matmul(x_BTI, w_IO, split, out_dtype, rings), (x_BTI, w_IO)


def _matmul_backward(
    split: int, out_dtype: jnp.dtype, rings: Rings, saved: tuple, dy_BTO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    axes, specs = reading(), (rows(), weight(split))

    def gradients(x_BTI: jax.Array, w_IO: jax.Array, dy_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
        dy_BTO = _flat(dy_BTO.astype(x_BTI.dtype))
        whole, first_output = gather(w_IO, split, x_BTI.dtype, rings), x_BTI.ndim - 2
        outputs = range(2, dy_BTO.ndim), range(first_output, w_IO.ndim)
        dx_BTI = _apart(_dot(dy_BTO, whole, outputs, x_BTI.dtype)).reshape(x_BTI.shape)
        dw_IO = _dot(_flat(x_BTI), dy_BTO, ((0, 1), (0, 1)), w_IO.dtype)
        return dx_BTI, scatter(dw_IO, split, rings, axes)

    return over_data(gradients, (*specs, rows()), specs)(*saved, dy_BTO)


def _dot(x: jax.Array, y: jax.Array, contract: tuple, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=dtype)


def _apart(y: jax.Array) -> jax.Array:
    """Not fused with what follows, on TPU: there, activation functions and their gradients cost a product that they are
    fused into more cycles than they take on their own (18.7M against 12.6M and 2.7M)."""
    return jax.lax.optimization_barrier(y) if platform() == "tpu" else y


def _flat(x_BTI: jax.Array) -> jax.Array:
    """(1, B T, ...) on CPU, where XLA takes a slow path for bfloat16 weight gradients that add up over two dimensions
    (12 times slower on jax 0.11); as it is elsewhere, where a reshape may cost a copy."""
    return x_BTI.reshape(1, -1, *x_BTI.shape[2:]) if platform() == "cpu" else x_BTI


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rings: Rings = ()) -> jax.Array:
    """Rows of the embedding, (B, T, D) in `dtype`; its gradient is float32."""
    pick = over_data(lambda e, t: gather(e, 1, dtype, rings)[t], (weight(1), rows()), rows())
    return pick(embed_VD, tokens_BT)


def _lookup_forward(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rings: Rings) -> tuple:
    return lookup(embed_VD, tokens_BT, dtype, rings), (embed_VD, tokens_BT)


def _lookup_backward(dtype: jnp.dtype, rings: Rings, saved: tuple, dx_BTD: jax.Array) -> tuple:
    embed_VD, tokens_BT = saved
    V, axes = embed_VD.shape[0], reading()

    def gradient(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        zeros_VD = jnp.zeros((V, dx_BTD.shape[-1]), embed_VD.dtype)
        return scatter(zeros_VD.at[tokens_BT].add(dx_BTD.astype(embed_VD.dtype)), 1, rings, axes)

    return over_data(gradient, (rows(), rows()), weight(1))(tokens_BT, dx_BTD), None


lookup.defvjp(_lookup_forward, _lookup_backward)
