"""Matrices are whole where a function takes them, each once, and come back to where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from k2jax.parallel import sharding
from k2jax.parallel.whole import on_whole

SPECS = [P(), P(None, "fsdp"), P("stage", ("fsdp", "context"), "tensor"), P(None, "tensor", ("context", "fsdp"))]


def products(x_LIO: jax.Array) -> jax.Array:
    """Of each matrix, all of it counts, and in which order."""
    assert x_LIO.shape[1:] == (8, 16)
    return x_LIO @ jnp.swapaxes(x_LIO, 1, 2) @ jnp.cumsum(x_LIO, axis=2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("layers", [2, 6])
def test_a_function_of_whole_matrices(spec, layers):
    """Also where they are fewer than devices, or do not divide by them."""
    draw = np.random.default_rng(0)
    stacks = [draw.normal(size=(layers, 8, 16)).astype(np.float32) for _ in range(3)]
    expected = [x @ x.swapaxes(1, 2) @ np.cumsum(x, axis=2) for x in (y.astype(np.float64) for y in stacks)]
    # Sums of signs that cancel: what float32 loses of them is of the size of their terms, and differs by CPU.
    close = {"rtol": 1e-4, "atol": 1e-5 * max(np.abs(x).max() for x in expected)}
    for found, wanted in zip(on_whole(products, stacks, P()), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **close)
    mesh = sharding.make_mesh({"stage": 2 if "stage" in spec else 1, "fsdp": -1, "tensor": 2, "context": 2})
    place = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, place) for x in stacks]
        found = jax.jit(lambda *x: on_whole(products, x, spec))(*placed)
        same = jax.jit(lambda *x: on_whole(lambda x: x, x, spec))(*placed)
    for x, y, z, wanted in zip(stacks, same, found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(z, wanted, **close)
        assert z.sharding.is_equivalent_to(place, 3)
