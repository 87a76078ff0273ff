"""The digest of an array: the same on every layout, different after any change of a bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from k2jax.parallel import sharding
from k2jax.run.digest import array_digest, combine

digest = jax.jit(array_digest)
BASE = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)


def reference(x: np.ndarray) -> int:
    """The same sum in numpy, element by element in row-major order."""
    bits = x.reshape(-1).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint64)
    weight = (np.arange(bits.size, dtype=np.uint64) * 0x9E3779B1) & 0xFFFFFFFF | 1
    return int((bits * weight & 0xFFFFFFFF).sum() & 0xFFFFFFFF)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32])
def test_equals_the_sum_in_numpy(dtype):
    x = jnp.asarray(BASE * 100).astype(dtype)
    assert int(digest(x)) == reference(np.asarray(x))


@pytest.mark.fault("C1")
def test_is_the_same_on_every_layout():
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    specs = [(), ("fsdp",), (None, "tensor"), ("replica", "tensor"), (("replica", "fsdp"), "tensor")]
    placed = [jax.device_put(BASE, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]
    assert {int(digest(x)) for x in placed} == {reference(BASE)}


@pytest.mark.fault("B3")
@settings(deadline=None, max_examples=200)
@given(st.integers(0, BASE.size - 1), st.integers(0, 31))
def test_finds_every_flipped_bit(element: int, bit: int):
    changed = BASE.copy()
    changed.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
    assert int(digest(changed)) != int(digest(BASE))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 15), st.integers(0, 15))
def test_finds_swapped_rows(i: int, j: int):
    swapped = BASE.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert (int(digest(swapped)) == int(digest(BASE))) == (i == j)


def test_the_checkpoint_digest_covers_names_and_values():
    assert combine({"a": 1, "b": 2}) == combine({"b": 2, "a": 1})
    assert len({combine(d) for d in ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "c": 2})}) == 3
