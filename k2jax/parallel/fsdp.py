"""Fully sharded data parallelism, written out: weights are gathered where they are used, gradients reduced to where
they live.

Left to the partitioner, a weight's gradient is summed by an all-reduce of all of it and then cut: twice the bytes. What
is here runs on each device's own rows and positions, so that a gradient can be scattered as it is summed; gathers and
scatters go over one ring of devices after the other (an axis of a TPU's torus each), which compilers run
beside the products where they are asked to (xla_options.py).

Mesh axes: "replica", "fsdp" and "context" split what a step reads, "fsdp" and "context" the parameters as well. What
replicas have in common is no matter of this file where a step trains (replicas.py); its readers know no replicas.
"stage" splits rows outside the layers. "tensor" splits heads, ffn and vocabulary; it is written out, too, because a
partitioner gathers what it splits around collectives that are.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k2jax.parallel import products
from k2jax.parallel.row_sums import summed_by_place
from k2jax.parallel.sharding import platform

SPLIT, TENSOR = ("fsdp", "context"), "tensor"
Rings = tuple[int, ...]  # sizes that multiply to that of fsdp, major first; (): one ring


def reading() -> tuple[str, ...]:
    """The mesh axes that split rows and positions here: within a replica, or a pipeline's stage, its axis does not."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return tuple(axis for axis in ("copy", "replica", "fsdp", "stage", "context") if axis in free)


def tokens_spec() -> PartitionSpec:
    """Of (B, T)."""
    *batch, position = reading() or (None,)
    return PartitionSpec(tuple(batch), position)


def rows(feature: str | None = None) -> PartitionSpec:
    """Of B, T, and a dimension that may be split over "tensor"."""
    return PartitionSpec(*tokens_spec(), feature)


def weight(dim: int, ndim: int = 2) -> PartitionSpec:
    """Of an array whose dimension `dim`, its first or its last, is split over fsdp and context. Over tensor it is the
    second one after a first, and the first one before a last."""
    last = PartitionSpec(TENSOR, *[None] * (ndim - 2), SPLIT)
    return PartitionSpec(SPLIT, TENSOR) if dim == 0 else last


def on_each_device(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`function` of each device's own part; as it is on a mesh of one device, and without one."""
    axes = (*reading(), TENSOR)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )


def gather(part: jax.Array, dim: int, dtype: jnp.dtype, rings: Rings) -> jax.Array:
    """A weight as wide as it is, in `dtype`, within `on_each_device`."""
    whole = part.astype(dtype)
    for axis, groups in _hops(rings):
        whole = jax.lax.all_gather(whole, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return whole


def scatter(gradient: jax.Array, dim: int, rings: Rings, axes: tuple[str, ...]) -> jax.Array:
    """The sum over `axes` of a weight's gradient, to each device the part that is its own."""
    for axis, groups in reversed(_hops(rings)):
        gradient = jax.lax.psum_scatter(
            gradient, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups
        )
    return total(gradient, tuple(axis for axis in axes if axis not in SPLIT))


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over devices, within `on_each_device`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    return jax.lax.psum(x, axes) if axes else x


def largest(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The maximum over devices, within `on_each_device`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    return jax.lax.pmax(x, axes) if axes else x


def own_part(index: jax.Array, size: int) -> tuple[jax.Array, jax.Array | bool]:
    """(place, whether it is one) of each index in this device's `size` numbers of an axis that is split over tensor."""
    if jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1) == 1:
        return index, True
    place = index - size * jax.lax.axis_index(TENSOR)
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


def _hops(rings: Rings) -> list[tuple[str, list[list[int]] | None]]:
    """(mesh axis, its groups of devices) in the order of a gather: neighbours first, so that parts come in order.

    A gather's last hop carries most of the bytes: nearly all of them over the first, major ring. Rings are the training
    mesh's: on a reader's mesh of another size there is one.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    hops: list[tuple[str, list[list[int]] | None]] = [("context", None)] if sizes.get("context", 1) > 1 else []
    fsdp = sizes.get("fsdp", 1)
    if len(rings) < 2 or math.prod(rings) != fsdp:
        return hops + ([("fsdp", None)] if fsdp > 1 else [])
    stride = 1
    for size in reversed(rings):
        firsts = [i for i in range(fsdp) if i // stride % size == 0]
        hops.append(("fsdp", [[first + stride * i for i in range(size)] for first in firsts]))
        stride *= size
    return hops


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def matmuls(
    x_BTI: jax.Array,
    weights: tuple[jax.Array, ...],
    split: int,
    out_dtype: jnp.dtype,
    rings: Rings = (),
    kind: str = "compute",
) -> tuple[jax.Array, ...]:
    """x[B, T, in...] . w[in..., out...] of each weight (float32), cast to the type of `x`; results in `out_dtype`.

    `kind` is `precision.products`: these products' and their gradients' inputs as they are, or in 8 bits (products.py).

    `split` is the dimension of a weight that is split over fsdp: its first, which is contracted, or its last, which is
    all of the result. The gradient of `w` is float32: differentiated by JAX, a bfloat16 product has a bfloat16 weight
    gradient, and the devices would add up rounded numbers; K2 accumulated and reduced in float32.

    Weights that take the same `x` are given together: of what they add to its gradient, devices that split their
    results sum the sum, once (as Megatron-LM, arXiv:1909.08053, whose one operator stands before q, k and v).
    """

    def product(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
        whole = gather(w_IO, split, x_BTI.dtype, rings)
        inputs = range(2, x_BTI.ndim), range(x_BTI.ndim - 2)
        y_BTO = _dot(_flat(x_BTI), whole, inputs, out_dtype, kind, "y", split != 0)
        y_BTO = y_BTO if split == 0 else total(apart(y_BTO), (TENSOR,))
        return y_BTO.reshape(*x_BTI.shape[:2], *y_BTO.shape[2:])

    def products_of(x_BTI: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(product(x_BTI, w_IO) for w_IO in weights)

    x, ws, ys = _specs(split, weights)
    return on_each_device(products_of, (x, ws), ys)(x_BTI, weights)


def matmul(
    x_BTI: jax.Array, w_IO: jax.Array, split: int, out_dtype: jnp.dtype, rings: Rings = (), kind: str = "compute"
) -> jax.Array:
    """`matmuls` of one weight, apart from what follows."""
    y_BTO = matmuls(x_BTI, (w_IO,), split, out_dtype, rings, kind)[0]
    return apart(y_BTO) if split == 0 else y_BTO


def _specs(split: int, weights: tuple[jax.Array, ...]) -> tuple[PartitionSpec, tuple, tuple]:
    """Of x, weights, ys: into a product goes what tensor splits not, and out of it what it splits; or the reverse."""
    x, y = (rows(), rows(TENSOR)) if split == 0 else (rows(TENSOR), rows())
    return x, tuple(weight(split, w_IO.ndim) for w_IO in weights), (y,) * len(weights)


def _matmuls_forward(
    x_BTI: jax.Array, weights: tuple[jax.Array, ...], split: int, out_dtype: jnp.dtype, rings: Rings, kind: str
) -> tuple[tuple[jax.Array, ...], tuple]:
    return matmuls(x_BTI, weights, split, out_dtype, rings, kind), (x_BTI, weights)


def _matmuls_backward(
    split: int, out_dtype: jnp.dtype, rings: Rings, kind: str, saved: tuple, dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    axes, (x, ws, ys) = reading(), _specs(split, saved[1])

    def of_one(x_BTI: jax.Array, w_IO: jax.Array, dy_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
        dy_BTO = _flat(dy_BTO.astype(x_BTI.dtype))
        whole, first_output = gather(w_IO, split, x_BTI.dtype, rings), x_BTI.ndim - 2
        outputs = range(2, dy_BTO.ndim), range(first_output, w_IO.ndim)
        dx_BTI = _dot(dy_BTO, whole, outputs, x_BTI.dtype, kind, "dx", split == 0).reshape(x_BTI.shape)
        if platform() == "cpu" and x_BTI.dtype == jnp.float32:  # given more dimensions, XLA transposes x in memory
            x_XI, dy_XO = (x.reshape(-1, math.prod(x.shape[2:])) for x in (x_BTI, dy_BTO))
            dw_IO = _dot(x_XI, dy_XO, ((0,), (0,)), w_IO.dtype, kind, "dw")
            dw_IO = dw_IO.reshape(*x_BTI.shape[2:], *dy_BTO.shape[2:])
        elif _left_is_larger(x_BTI, dy_BTO, kind):
            dw_OI = _dot(dy_BTO, x_BTI, ((0, 1), (0, 1)), w_IO.dtype, kind, "dw")
            return dx_BTI, scatter(dw_OI, 1 - split, rings, axes).T
        else:
            dw_IO = _dot(_flat(x_BTI), dy_BTO, ((0, 1), (0, 1)), w_IO.dtype, kind, "dw")
        return dx_BTI, scatter(dw_IO, split, rings, axes)

    def gradients(x_BTI: jax.Array, weights: tuple, dys: tuple) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        dxs, dws = zip(*(of_one(x_BTI, w_IO, dy) for w_IO, dy in zip(weights, dys, strict=True)), strict=True)
        dx_BTI = apart(reduce(jnp.add, reversed(dxs)))  # in the order of JAX's own backward pass
        return total(dx_BTI, (TENSOR,)) if split == 0 else dx_BTI, dws

    return on_each_device(gradients, (x, ws, ys), (x, ws))(*saved, dys)


def _dot(
    x: jax.Array, y: jax.Array, contract: tuple, dtype: jnp.dtype, kind: str, product: str, over_tensor: bool = False
) -> jax.Array:
    """`over_tensor`: devices of that axis have a part each of what is contracted."""
    if types := products.TYPES[kind].get(product):
        shared = partial(largest, axes=(TENSOR,) if over_tensor else ())
        return products.dot(x, y, contract, dtype, types, shared)
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=dtype)


def apart(y: jax.Array) -> jax.Array:
    """A product, not fused with what follows, on TPU: there, activation functions and their gradients cost a product
    that they are fused into more cycles than they take on their own (18.7M against 12.6M and 2.7M). Sums cost none."""
    return jax.lax.optimization_barrier(y) if platform() == "tpu" else y


def _left_is_larger(x_BTI: jax.Array, dy_BTO: jax.Array, kind: str) -> bool:
    """Of a weight gradient, on TPU, where XLA transposes the left side in memory: the two are better taken in turn."""
    plain = x_BTI.ndim == dy_BTO.ndim == 3 and "dw" not in products.TYPES[kind]
    return platform() == "tpu" and plain and x_BTI.shape[2] > dy_BTO.shape[2]


def _flat(x_BTI: jax.Array) -> jax.Array:
    """(1, B T, ...) on CPU, where XLA takes a slow path for bfloat16 weight gradients that add up over two dimensions
    (12 times slower on jax 0.11); as it is elsewhere, where a reshape may cost a copy."""
    return x_BTI.reshape(1, -1, *x_BTI.shape[2:]) if platform() == "cpu" else x_BTI


matmuls.defvjp(_matmuls_forward, _matmuls_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rings: Rings = ()) -> jax.Array:
    """Rows of the embedding, (B, T, D) in `dtype`; its gradient is float32."""

    def pick(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        whole_VD = gather(embed_VD, 1, dtype, rings)
        place_BT, own_BT = own_part(tokens_BT, whole_VD.shape[0])
        x_BTD = whole_VD[place_BT]
        return x_BTD if own_BT is True else total(jnp.where(own_BT[..., None], x_BTD, 0), (TENSOR,))

    return on_each_device(pick, (weight(1), tokens_spec()), rows())(embed_VD, tokens_BT)


def _lookup_forward(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rings: Rings) -> tuple:
    return lookup(embed_VD, tokens_BT, dtype, rings), (embed_VD, tokens_BT)


def _lookup_backward(dtype: jnp.dtype, rings: Rings, saved: tuple, dx_BTD: jax.Array) -> tuple:
    embed_VD, tokens_BT = saved
    axes = reading()

    def gradient(embed_VD: jax.Array, tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        place_BT, own_BT = own_part(tokens_BT, embed_VD.shape[0])
        dx_BTD = dx_BTD if own_BT is True else jnp.where(own_BT[..., None], dx_BTD, 0)
        rows = dx_BTD.reshape(-1, dx_BTD.shape[-1]), place_BT.reshape(-1)
        return scatter(summed_by_place(*rows, embed_VD.shape[0], embed_VD.dtype), 1, rings, axes)

    specs = weight(1), tokens_spec(), rows()
    return on_each_device(gradient, specs, weight(1))(embed_VD, tokens_BT, dx_BTD), None


lookup.defvjp(_lookup_forward, _lookup_backward)
