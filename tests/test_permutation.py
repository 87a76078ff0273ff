"""Keyed permutations: true bijections, the same for ints and arrays, and not to be told from random ones."""

import math

import numpy as np
import pytest
from conftest import Later
from hypothesis import given
from hypothesis import strategies as st

from k2jax.data.permutation import derive_key, permute, unpermute

stats = Later("scipy.stats")
keys = st.integers(0, 2**64 - 1)
KEYS = [derive_key(22238, name) for name in ("a", "b", "c")]


def p_value(table: np.ndarray, expected: np.ndarray | float, free: int) -> float:
    return float(stats.chi2.sf(((table - expected) ** 2 / expected).sum(), free))


def joint_p(x: np.ndarray, y: np.ndarray, n: int, bins: int = 24) -> float:
    """Chi-square p of x and y, both spread over [0, n), being independent."""
    cells = (x * bins // n) * bins + y * bins // n
    table = np.bincount(cells, minlength=bins * bins).reshape(bins, bins)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / len(x)
    return p_value(table, expected, (bins - 1) ** 2)


@given(n=st.integers(1, 400), key=keys)
def test_is_a_bijection_with_an_inverse(n, key):
    image = permute(np.arange(n), n, key)
    assert sorted(image) == list(range(n))
    assert (unpermute(image, n, key) == np.arange(n)).all()


@pytest.mark.parametrize("n", range(1, 60))
def test_is_a_bijection_for_every_small_n(n):
    assert sorted(permute(i, n, KEYS[0]) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**48), key=keys, data=st.data())
def test_large_n_round_trips_within_range(n, key, data):
    index = data.draw(st.integers(0, n - 1))
    image = permute(index, n, key)
    assert 0 <= image < n and unpermute(image, n, key) == index


@given(st.lists(st.tuples(st.integers(1, 2**48), keys, st.integers(0, 2**48)), min_size=1, max_size=30))
def test_arrays_give_what_ints_give(cases):
    n = np.array([n for n, _, _ in cases])
    key = np.array([key for _, key, _ in cases], np.uint64)
    index = np.array([i % n for n, _, i in cases])
    for function in (permute, unpermute):
        scalar = [function(int(i), int(m), int(k)) for i, m, k in zip(index, n, key, strict=True)]
        vector = function(index, n, key)
        assert vector.dtype == np.int64 and vector.tolist() == scalar


def test_square_sizes_and_their_neighbours_agree_too():
    sizes = [m for root in (1, 2, 3, 1000, 2**16, 2**24 - 1) for m in (root**2, root**2 + 1)]
    for n in sizes + [2**48]:
        index = np.unique(np.linspace(0, n - 1, 20).astype(np.int64))
        assert permute(index, n, KEYS[1]).tolist() == [permute(int(i), n, KEYS[1]) for i in index]


def test_scalars_broadcast_and_shapes_are_kept():
    index = np.arange(12).reshape(3, 4)
    image = permute(index, np.array([[12], [13], [14]]), KEYS[0])
    assert image.shape == (3, 4)
    assert image[2, 1] == permute(5 + 4, 14, KEYS[0])
    assert permute(np.zeros(0, np.int64), 5, KEYS[0]).shape == (0,)


def test_keys_are_told_apart_by_every_part():
    made = {derive_key(*parts) for parts in [(1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1, "a", 0), ("1a",)]}
    assert len(made) == 6 and all(0 <= key < 2**64 for key in made)


def shuffle_p_values(image: np.ndarray) -> dict[str, float]:
    n = len(image)
    index = np.arange(n)
    shift = (image - index) % n * 64 // n
    return {
        "place": joint_p(index, image, n),
        "next": joint_p(image[:-1], image[1:], n),
        "next but one": joint_p(image[:-2], image[2:], n),
        "displacement": p_value(np.bincount(shift, minlength=64), n / 64, 63),
        # Steps between neighbours, whose density for a random order is triangular: uniform modulo n.
        "step": p_value(np.bincount(np.diff(image) % n * 64 // n, minlength=64), (n - 1) / 64, 63),
    }


@pytest.mark.parametrize("n", [5_000, 40_000, 65_536, 100_003])
@pytest.mark.parametrize("key", KEYS)
def test_shuffles_pass_chi_square_of_places_neighbours_and_displacement(n, key):
    found = shuffle_p_values(permute(np.arange(n), n, key))
    assert all(1e-4 < p < 1 - 1e-4 for p in found.values()), found


def test_the_same_tests_reject_a_linear_congruential_shuffle():
    n = 65_537
    found = shuffle_p_values(np.arange(n) * 40_503 % n)
    assert found["next"] < 1e-9 and found["step"] < 1e-9, found


@pytest.mark.parametrize("other", [KEYS[0] + 1, KEYS[0] ^ (1 << 63), KEYS[1]])
def test_different_keys_give_independent_shuffles(other):
    n = 50_000
    first, second = permute(np.arange(n), n, KEYS[0]), permute(np.arange(n), n, other)
    assert 1e-4 < joint_p(first, second, n)
    assert stats.poisson.sf(int((first == second).sum()), 1) > 1e-4  # as often equal as chance has it


@pytest.mark.parametrize("n", [2, 3, 5, 7, 10, 13, 31])
def test_small_permutations_put_every_index_everywhere_equally_often_over_keys(n):
    num_keys = 30_000
    many = np.array([derive_key("small", i) for i in range(num_keys)], np.uint64)
    image = permute(np.arange(n), n, many[:, None])
    table = np.stack([np.bincount(image[:, i], minlength=n) for i in range(n)])
    assert p_value(table, num_keys / n, (n - 1) ** 2) > 1e-4
    assert (
        p_value(
            np.bincount((image == np.arange(n)).sum(1), minlength=n + 1)[[0]],
            num_keys * _no_fixed_point(n),
            1,
        )
        > 1e-4
    )


def _no_fixed_point(n: int) -> float:
    """The share of permutations of n that leave nothing in place."""
    return sum((-1) ** i / math.factorial(i) for i in range(n + 1))
