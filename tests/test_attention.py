"""Attention equals its definition, computed in float64 numpy, at lengths that cut blocks evenly, unevenly or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.model.attention import LEAST_QUERIES, MAX_BLOCKS, attend_causally

LENGTHS = [1, 7, LEAST_QUERIES * 2 - 1, LEAST_QUERIES * 3 + 5, LEAST_QUERIES * (MAX_BLOCKS + 1) + 3]


def definition(
    q_BTNH: np.ndarray, k_BTKH: np.ndarray, v_BTKH: np.ndarray, document_BT: np.ndarray | None
) -> np.ndarray:
    """Softmax attention, a query and a head at a time."""
    B, T, N, H = q_BTNH.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.arange(t + 1)
        if document_BT is not None:
            seen = seen[document_BT[b, seen] == document_BT[b, t]]
        kv = n // (N // k_BTKH.shape[2])
        score = k_BTKH[b, seen, kv].astype(np.float64) @ q_BTNH[b, t, n].astype(np.float64) / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ v_BTKH[b, seen, kv]
    return out


def draw(T: int, heads: int = 2, kv_heads: int = 1) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(T), 4)
    q, k, v = (jax.random.normal(key, (2, T, n, 4)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False))
    return q, k, v, jnp.cumsum(jax.random.bernoulli(keys[3], 0.05, (2, T)), axis=1)


@pytest.mark.parametrize("masked", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("T", LENGTHS)
def test_values(T: int, masked: bool):
    q, k, v, document = draw(T)
    document = document if masked else None
    found = jax.jit(attend_causally)(q, k, v, document)
    expected = definition(*map(np.asarray, (q, k, v)), np.asarray(document) if masked else None)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["row", "documents"])
def test_gradients_are_those_of_the_plain_formula(masked: bool):
    """The backward pass is written by hand; JAX differentiates the formula in one block."""
    T = LEAST_QUERIES * 3 + 5
    q, k, v, document = draw(T, heads=4, kv_heads=2)
    dout = jax.random.normal(jax.random.key(0), q.shape)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        seen = jnp.tril(jnp.ones((T, T), bool))[None]
        seen = seen & (document[:, :, None] == document[:, None, :]) if masked else seen
        score = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
        weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weight, v)

    def pulled_back(f, *args: jax.Array) -> tuple[jax.Array, ...]:
        return jax.jit(lambda *a: jax.vjp(f, *a)[1](dout))(*args)

    found = pulled_back(lambda q, k, v: attend_causally(q, k, v, document if masked else None), q, k, v)
    for one, other in zip(found, pulled_back(plain, q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_bfloat16_is_as_good_as_its_inputs():
    """Softmax and sums are float32: what is lost is the rounding of inputs, weights and output (8 bits)."""
    q, k, v, _ = draw(LEAST_QUERIES * 3)
    exact = jax.jit(attend_causally)(q, k, v)
    found = jax.jit(attend_causally)(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert found.dtype == jnp.bfloat16
    assert float(jnp.abs(found.astype(jnp.float32) - exact).max()) < 0.03
