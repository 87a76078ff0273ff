"""Drawing a token from a model's scores: greedy, or by temperature, top-k and top-p; on the device.

No sorting, and one random number a row: thresholds and the token itself are found bit by bit, at one sum over the row
for each bit. (XLA's CPU backend takes 6 ms to sort 32,000 scores, and 0.8 ms to draw as many random numbers.)

Axes as in model/decoder.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.errors import ConfigError


class Sampling(NamedTuple):
    """How a token is drawn: temperature, then top-k, then top-p of what top-k leaves."""

    temperature: float = 0.0  # 0: greedy, whatever the other two are
    top_k: int = 0  # only the k likeliest, and what ties with the last of them; 0: all
    top_p: float = 1.0  # only the likeliest that together have this probability, and ties; 1: all


GREEDY = Sampling()


def check_sampling(sampling: Sampling) -> None:
    """ConfigError for values that mean nothing."""
    for name, ok, allowed in (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (all) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1 (all)"),
    ):
        if not ok:
            raise ConfigError(f"{name}={getattr(sampling, name)}: must be {allowed}")


def draw(scores_BV: jax.Array, uniform_B: jax.Array, sampling: Sampling) -> jax.Array:
    """A token of each row: the likeliest at temperature 0, else the one that `uniform_B`, in [0, 1), falls on."""

    def sample(sampling: Sampling) -> jax.Array:
        p_BV = jnp.exp((scores_BV - scores_BV.max(axis=1, keepdims=True)) / sampling.temperature)
        p_BV = jax.lax.cond(sampling.top_k > 0, _keep_top_k, lambda p_BV, _: p_BV, p_BV, sampling.top_k)
        p_BV = jax.lax.cond(sampling.top_p < 1, _keep_top_p, lambda p_BV, _: p_BV, p_BV, sampling.top_p)
        place_B, index_V = uniform_B * p_BV.sum(axis=1), jnp.arange(p_BV.shape[1])

        def starts_by_then(token_B: jax.Array) -> jax.Array:
            return jnp.where(index_V[None, :] < token_B[:, None], p_BV, 0).sum(axis=1) <= place_B

        return _largest(starts_by_then, p_BV.shape[0], p_BV.shape[1].bit_length())

    def greedy(_: Sampling) -> jax.Array:
        return jnp.argmax(scores_BV, axis=1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, sample, greedy, sampling)


def _keep_top_k(p_BV: jax.Array, k: jax.Array) -> jax.Array:
    return _keep_likeliest(p_BV, lambda kept_BV: (kept_BV > 0).sum(axis=1) >= k)


def _keep_top_p(p_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    wanted_B = top_p * p_BV.sum(axis=1)
    return _keep_likeliest(p_BV, lambda kept_BV: kept_BV.sum(axis=1) >= wanted_B)


def _keep_likeliest(p_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Zero for all but the fewest largest numbers that are `enough`, and what ties with the last of them."""
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)  # in the order of the numbers, as none is negative

    def kept(least_B: jax.Array) -> jax.Array:
        return jnp.where(bits_BV >= least_B[:, None], p_BV, 0)

    # No number exceeds 1.0, whose bits are below 2^30.
    return kept(_largest(lambda least_B: enough(kept(least_B)), p_BV.shape[0], 30))


def _largest(holds: Callable[[jax.Array], jax.Array], B: int, num_bits: int) -> jax.Array:
    """In each row the largest int32 below 2^num_bits for which `holds`: true from 0 up to some number, then false."""

    def one(i: jax.Array, found_B: jax.Array) -> jax.Array:
        higher_B = found_B | (1 << (num_bits - 1 - i))
        return jnp.where(holds(higher_B), higher_B, found_B)

    return jax.lax.fori_loop(0, num_bits, one, jnp.zeros(B, jnp.int32))
