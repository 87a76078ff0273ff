"""Rows that several devices share (mesh axis `context`): which positions of a row each of them holds.

A position sees those before it, so that equal runs of positions are unequal work. A row is therefore cut into 2C
chunks, and device c of C holds chunks c and 2C-1-c, an early one and a late one (Llama 3, arXiv:2407.21783, section
3.3.2; what is computed with them: kernels/ring_attention.py). Inputs, targets and rope's angles are put in that order
once a step, while they are small; hidden states are computed in it, and a loss is a sum over positions in any order.
"""

import jax
import jax.numpy as jnp


def size() -> int:
    """Devices that share a row, on the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def chunks(devices: int) -> list[int]:
    """The chunks of a row in the order in which they lie: two for each device."""
    return [chunk for device in range(devices) for chunk in (device, 2 * devices - 1 - device)]


def in_order(x: jax.Array, dim: int) -> jax.Array:
    """`x` with the positions along `dim`, which are a whole row's, as the mesh in use has them."""
    devices = size()
    if devices == 1:
        return x
    cut = x.reshape(*x.shape[:dim], 2 * devices, -1, *x.shape[dim + 1 :])
    return jnp.take(cut, jnp.array(chunks(devices)), axis=dim).reshape(x.shape)
