"""What kernels in Pallas Mosaic GPU for Hopper are made of: rings of blocks between warpgroups, products by wgmma.

One warpgroup loads: it brings blocks from HBM by TMA. The others compute, ROWS rows of a product each.

Axes: capital letters are the caller's.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_tpu import MASKED
from k2jax.kernels.mosaic_block_sizes import ROWS

TILES = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # of 16-bit numbers in shared memory, as wgmma has
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # a number for each row, or each column, of a MATRIX
LOADING, COMPUTING = 24, 240  # registers of a thread: 24 + 2 * 240 = 504 are what Hopper has for three warpgroups


def take_registers(loading: bool, warpgroups: int) -> None:
    """At the start of a warpgroup's work. Where only one computes there are enough for both."""
    if warpgroups > 1:
        plgpu.set_max_registers(LOADING if loading else COMPUTING, action="decrease" if loading else "increase")


class Held(NamedTuple):
    """Blocks that stay: for each computing warpgroup its rows of each array, and a barrier that says they are there."""

    blocks: tuple
    full: Any


class Ring(NamedTuple):
    """Blocks that go past: in each slot one of each array, and barriers: it is full, every reader is done with it."""

    blocks: tuple
    full: Any
    free: Any


def held_type(warpgroups: int, arrays: int, head_dim: int, dtype: jnp.dtype) -> Held:
    blocks = [plgpu.SMEM((warpgroups, ROWS, head_dim), dtype, transforms=TILES)] * arrays
    return Held(tuple(blocks), plgpu.Barrier(num_arrivals=arrays, num_barriers=warpgroups))


def ring_type(stages: int, readers: int, matrix: tuple[int, int], dtype: jnp.dtype, *vectors: jnp.dtype) -> Ring:
    """Of blocks of a matrix and of vectors that have a number for each of its rows."""
    blocks = [plgpu.SMEM((stages, *matrix), dtype, transforms=TILES)]
    blocks += [plgpu.SMEM((stages, matrix[0]), vector) for vector in vectors]
    full = plgpu.Barrier(num_arrivals=len(blocks), num_barriers=stages)
    return Ring(tuple(blocks), full, plgpu.Barrier(num_arrivals=readers, num_barriers=stages))


def hold(held: Held, w: int, *sources: Any) -> None:
    for source, block in zip(sources, held.blocks, strict=True):
        plgpu.copy_gmem_to_smem(source, block.at[w], held.full.at[w])


def send(ring: Ring, step: jax.Array, *sources: Any) -> None:
    stages = ring.blocks[0].shape[0]
    slot = lax.rem(step, stages)
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
    for source, block in zip(sources, ring.blocks, strict=True):
        plgpu.copy_gmem_to_smem(source, block.at[slot], ring.full.at[slot])


def receive(ring: Ring, step: jax.Array) -> jax.Array:
    """The slot of that step, once it is full."""
    slot = lax.rem(step, ring.blocks[0].shape[0])
    plgpu.barrier_wait(ring.full.at[slot])
    return slot


def program(
    kernel: Callable, name: str, grid: dict[str, int], warpgroups: int, out: list, scratch: dict, interpret: bool
) -> Callable[..., list[jax.Array]]:
    """Runs `kernel` at each place of the grid, the last axis fastest, by `warpgroups` that compute and one that loads.

    NotImplementedError for `interpret`.
    """
    if interpret:
        raise NotImplementedError("JAX cannot interpret these kernels (products of registers); their tests can")
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=f"flash_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def swap_turns(turn: Any, warpgroups: int) -> None:
    """`turn`: a barrier of the computing warpgroups, to each of whose turns both come."""
    if warpgroups > 1:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)


# ---- mathematics of a block ------------------------------------------------------------------------------------------


def turned(x: Any) -> Any:
    return plgpu.transpose_ref(x, (1, 0))


def product(x: Any, y: Any, issued: Callable[[], None] = lambda: None) -> jax.Array:
    """x y in float32, both in shared memory. `issued` runs while the matrix units work."""

    def run(sums_ref: Any) -> jax.Array:
        plgpu.wgmma(sums_ref, x, y)
        issued()
        return sums_ref[...]

    return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def added(sums: jax.Array, x: jax.Array, y: Any) -> jax.Array:
    """sums + x y, x in registers, y in shared memory."""
    return all_added((sums, x, y))[0]


def all_added(*terms: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, ...]:
    """The same of several at once, which are awaited together."""

    def run(refs: tuple) -> None:
        for ref, (_, x, y) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, x, y)

    return pl.run_state(run)(tuple(plgpu.ACC.init(sums) for sums, _, _ in terms))


def weights_and_product(x: tuple[Any, Any], y: tuple[Any, Any], weigh: Callable) -> tuple[jax.Array, jax.Array]:
    """(weigh(x0 x1), y0 y1): weights are computed while the matrix units do the second product."""

    def run(score_ref: Any, sums_ref: Any) -> tuple[jax.Array, jax.Array]:
        plgpu.wgmma(score_ref, *x)
        plgpu.wgmma(sums_ref, *y)
        weight = weigh(plgpu.wgmma_accumulator_load(score_ref, wait_n=1))
        return weight, sums_ref[...]

    shapes = [(a.shape[0], b.shape[1]) for a, b in (x, y)]
    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def beside_product(
    xs: list[tuple], y: tuple[jax.Array, Any], sums: jax.Array, take: Callable, like: tuple, swap_turns: Callable
) -> tuple[jax.Array, tuple]:
    """(sums + y0 y1, take(...)), the second while the matrix units do the first, after the products of all `xs`.

    Args:
        take: is given a function for each of `xs`, which waits for that product and returns it; gives arrays of the
            shapes, types and layouts of `like`. None may go into registers that y0 had (LLVM puts what a loop carries
            there): what becomes y0 of the next turn is made of them when this has returned.
        swap_turns: called when all products are on their way, and when `take` is done. It has to wait for a barrier:
            without a loop between them, ptxas puts the wait for the last product before all that `take` does.
    """

    def run(refs: tuple) -> None:
        product_refs, (sums_ref, *found_refs) = refs[: len(xs)], refs[len(xs) :]
        for ref, x in zip(product_refs, xs, strict=True):
            plgpu.wgmma(ref, *x)
        plgpu.wgmma(sums_ref, *y)
        swap_turns()
        awaited = zip(product_refs, range(len(xs), 0, -1), strict=True)
        found = take(*[partial(plgpu.wgmma_accumulator_load, ref, wait_n=n) for ref, n in awaited])
        for ref, value in zip(found_refs, found, strict=True):
            ref[...] = value
        swap_turns()

    products = [plgpu.ACC.init(zeros(a.shape[0], b.shape[1])) for a, b in xs]
    sums, *found = pl.run_state(run)((*products, plgpu.ACC.init(sums), *like))[len(xs) :]
    return sums, tuple(found)


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def zeros(*shape: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def of_rows(ref: Any, at: tuple) -> jax.Array:
    return _loaded(ref, at, BY_ROW)


def of_columns(ref: Any, slot: jax.Array) -> jax.Array:
    return _loaded(ref, (slot,), BY_COLUMN)


def _loaded(ref: Any, at: tuple, layout: Any) -> jax.Array:
    # jax 0.10 takes the index as an argument of its own, later ones as part of the reference.
    place = (ref, at) if "idx" in inspect.signature(plgpu.load).parameters else (ref.at[at],)
    return plgpu.load(*place, layout=layout, optimized=False)


def masked(score: jax.Array, own: tuple | None, first: tuple | None, query_axis: int) -> jax.Array:
    """As in flash_attention_triton.py."""
    if own is not None:
        same = along(own[0], score.shape, 0) == along(own[1], score.shape, 1)
        score = jnp.where(same, score, MASKED)
    if first is not None:
        at = [x + plgpu.broadcasted_iota(jnp.int32, score.shape, a, layout=MATRIX) for a, x in enumerate(first)]
        score = jnp.where(at[1 - query_axis] <= at[query_axis], score, MASKED)
    return score
