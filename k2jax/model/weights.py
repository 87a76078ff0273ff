"""A step's parameters as its microbatches take them where layers are not scanned: layers apart, matrices cast once.

A scan over layers stacks what they keep for the backward pass, takes it apart again there, and stacks the gradients. On
a GPU, whose products are library calls that write arrays of their own, each of these is a copy: of 1.35B parameters and
65,536 tokens, 0.5 of 1.6 TB that a step reads and writes (by its compiled program; tools/plan.py counts copies). Apart,
a microbatch's gradient is added within the product that makes it. TPUs fuse what a GPU copies, and compile longer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from k2jax.keys import ON_HOST
from k2jax.parallel.sharding import num_stages, platform

LAYERS = "layers."  # before the names of arrays that are stacked along L
Arrays = dict[str, Any]  # by the names of decoder.parameter_table: arrays; of layers apart, tuples of them; Weights


class Weight(NamedTuple):
    """A matrix, cast, and the float32 array that its gradient is of, whose own numbers are not read."""

    cast: jax.Array
    master: jax.Array


def layers_in_turn(m: ConfigDict) -> int:
    """`model.unroll` with 0 resolved: all layers on GPUs, one elsewhere, and where a layer keeps arrays by the host."""
    if m.unroll:
        return m.unroll
    return m.num_layers if platform() == "gpu" and ON_HOST not in m.remat else 1


def are_apart(m: ConfigDict) -> bool:
    """Whether the decoder takes one layer after the other instead of scanning over them."""
    return layers_in_turn(m) >= m.num_layers and num_stages() == 1


def apart(m: ConfigDict, arrays: Arrays) -> Arrays:
    """With a tuple of L arrays in the place of each stacked one, where layers are apart; else as they are."""
    if not are_apart(m):
        return arrays
    return {
        name: tuple(x[layer] for layer in range(m.num_layers)) if name.startswith(LAYERS) else x
        for name, x in arrays.items()
    }


def together(arrays: Arrays) -> Arrays:
    """The inverse of `apart`."""
    return {name: jnp.stack(x) if isinstance(x, tuple) else x for name, x in arrays.items()}


def is_matrix(name: str) -> bool:
    """Of an array; norms and biases are none: what is done with them is float32."""
    return "norm" not in name and not name.startswith(f"{LAYERS}b")


def cast_once(m: ConfigDict, arrays: Arrays, dtype: jnp.dtype) -> Arrays:
    """The matrices in `dtype`, as `with_masters` takes them, where layers are apart; else none: each use casts them."""
    names = [name for name in arrays if is_matrix(name)] if are_apart(m) else []
    return {name: jax.tree.map(lambda w: w.astype(dtype), arrays[name]) for name in names}


def with_masters(casts: Arrays, masters: Arrays) -> Arrays:
    """What the decoder takes: `masters`, the matrices among them as Weights."""
    return {name: jax.tree.map(Weight, casts[name], x) if name in casts else x for name, x in masters.items()}


def wide(x: jax.Array | Weight) -> jax.Array:
    """In float32. The compiler drops the cast there and the product's cast back, and the master."""
    return _wide(*x) if isinstance(x, Weight) else x


@jax.custom_vjp
def _wide(cast: jax.Array, master: jax.Array) -> jax.Array:
    return cast.astype(master.dtype)


_wide.defvjp(lambda cast, master: (_wide(cast, master), None), lambda _, gradient: (None, gradient))
