"""Keyed permutations of [0, n): shuffles of any size that need no memory and can be entered at any point.

A Feistel network over Z_a x Z_b, where a * b is just above n: each round adds a hash of one half to the
other, which can always be undone. The few results that fall outside [0, n) are permuted again until they
fall inside ("cycle walking"), which keeps the whole a bijection.

Python ints and numpy arrays run through the same lines: uint64 arrays wrap where the mask cuts a Python int.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

# For small n the halves are tiny, and only more rounds help. Measured at n = 5 over 500,000 keys or more: the
# places that a value takes are off uniform by 1.4% (rms) after 8 rounds, 0.4% after 12, noise after 16.
ROUNDS = 16
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the step of SplitMix64 (Steele, Lea, Flood 2014)

Ints = TypeVar("Ints", int, np.ndarray)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for a path of names and numbers, e.g. `derive_key(seed, "rows", stage)`."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def splitmix(key: Ints, counter: Ints) -> Ints:
    """Output number `counter` of the SplitMix64 generator seeded with `key` (64 bits; arrays are uint64)."""
    z = (key + counter * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def permute(index: Ints, n: int | np.ndarray, key: int | np.ndarray) -> Ints:
    """Where the permutation of [0, n) named by `key` sends `index`.

    Args:
        index: a Python int, or an integer array of any shape; each in [0, n).
        n: 1 to 2**48, one for all or elementwise with an array of indices.
        key: 64 bits, one for all or elementwise with an array of indices.

    Returns an int for an int, an int64 array for an array; the same values either way.
    """
    return _walk(_encrypt, index, n, key)


def unpermute(index: Ints, n: int | np.ndarray, key: int | np.ndarray) -> Ints:
    """The inverse of `permute`: which index it sends to `index`."""
    return _walk(_decrypt, index, n, key)


def _walk(step: Callable, index: Ints, n: int | np.ndarray, key: int | np.ndarray) -> Ints:
    if isinstance(index, int):
        a = math.isqrt(n - 1) + 1
        b = -(-n // a)
        index = step(index, a, b, key)
        while index >= n:
            index = step(index, a, b, key)
        return index
    arrays = np.broadcast_arrays(index, n, np.asarray(key, np.uint64))
    x, n, key = (array.astype(np.uint64).ravel() for array in arrays)
    a = np.ceil(np.sqrt(n)).astype(np.uint64)  # exact: n < 2**52, and a float64 root is correctly rounded
    b = (n + a - 1) // a
    x = step(x, a, b, key)
    outside = np.flatnonzero(x >= n)
    while outside.size:
        x[outside] = step(x[outside], a[outside], b[outside], key[outside])
        outside = outside[x[outside] >= n[outside]]
    return x.astype(np.int64).reshape(arrays[0].shape)


def _round_hash(key: Ints, half: Ints, round_index: int) -> Ints:
    # 48 bits: room to add a half (<= 2**24) without wrapping, and no bias to speak of modulo one.
    return splitmix(key, half * ROUNDS + round_index) >> 16


def _encrypt(x: Ints, a: Ints, b: Ints, key: Ints) -> Ints:
    left, right = x // b, x % b
    for i in range(0, ROUNDS, 2):
        left = (left + _round_hash(key, right, i)) % a
        right = (right + _round_hash(key, left, i + 1)) % b
    return left * b + right


def _decrypt(x: Ints, a: Ints, b: Ints, key: Ints) -> Ints:
    left, right = x // b, x % b
    for i in range(ROUNDS - 2, -1, -2):
        # b - hash % b rather than -hash: uint64 cannot go below zero.
        right = (right + (b - _round_hash(key, left, i + 1) % b)) % b
        left = (left + (a - _round_hash(key, right, i) % a)) % a
    return left * b + right
