"""A Hopper in Python: runs programs of Pallas Mosaic GPU on a CPU, as they were traced, in an order drawn by chance.

Each warpgroup is a Python generator that gives up its turn wherever another could come in between. What a GPU does in
the background happens at any time allowed: a copy to shared memory makes its target unreadable at once (not-a-number)
and fills it later, a product reads shared memory when it is issued or only when it is awaited. So what is read too
early, freed too early or awaited by nobody shows up as not-a-number, as an error or as a deadlock.

JAX's own interpreter of these programs has neither products of registers nor `run_state` (0.10.2). What is not here:
layouts of registers, swizzles, fences between shared memory's two ways in, and how numbers are rounded within a wgmma.
"""

import random
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.core import BarrierType, UnswizzleRef, UntilingTransform
from jax._src.state import indexing, types
from jax.experimental.pallas.mosaic_gpu import kernel as plgpu_kernel

STEPS_LIMIT = 1_000_000

seed = 0  # of the chance that orders steps; read when a kernel runs, so that a program traced once runs in any order


def kernel(*arguments: Any, **options: Any) -> Callable:
    """What `plgpu.kernel` gives back, but that it runs on this machine."""

    def call(*arrays: jax.Array) -> Any:
        [equation] = _kernels(jax.make_jaxpr(plgpu_kernel(*arguments, **options))(*arrays).jaxpr)
        found = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in equation.params["out_avals"]]
        return jax.pure_callback(partial(_launch, equation.params), found, *arrays)

    return call


def _kernels(jaxpr: Any) -> list:
    calls = [x for x in jaxpr.eqns if x.primitive.name == "custom_vmap_call"]
    return [x for x in jaxpr.eqns if x.primitive.name == "mpmd_map"] + [
        x for call in calls for x in _kernels(call.params["call"].jaxpr)
    ]


def _read(env: dict, x: Any) -> Any:
    return np.asarray(x.val, x.aval.dtype) if hasattr(x, "val") else env[x]


# ---- arithmetic: by primitive, of values and parameters --------------------------------------------------------------


def _broadcast(x: Any, shape: tuple, broadcast_dimensions: tuple, **_: Any) -> np.ndarray:
    sizes = dict(zip(broadcast_dimensions, np.shape(x), strict=True))
    return np.broadcast_to(np.reshape(x, [sizes.get(i, 1) for i in range(len(shape))]), shape)


def _iota(shape: tuple, dimension: int, dtype: Any, **_: Any) -> np.ndarray:
    return _broadcast(np.arange(shape[dimension], dtype=dtype), shape, (dimension,))


def _divide(x: Any, y: Any, **_: Any) -> Any:
    return np.floor_divide(x, y) if np.issubdtype(np.result_type(x), np.integer) else np.divide(x, y)


COMPUTED: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": np.remainder,  # of none below 0
    "max": np.maximum, "min": np.minimum, "exp2": np.exp2, "log": np.log,
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "convert_element_type": lambda x, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]),
    "reduce_max": lambda x, axes, **_: np.max(x, axis=axes), "reduce_sum": lambda x, axes, **_: np.sum(x, axis=axes),
    "broadcast_in_dim": _broadcast, "iota": _iota, "layout_cast": lambda x, **_: x,
}  # fmt: skip


def _compute(equation: Any, values: list) -> list:
    function = COMPUTED[equation.primitive.name]
    found = function(*values) if isinstance(function, np.ufunc) else function(*values, **equation.params)
    [aval] = [x.aval for x in equation.outvars]
    assert np.shape(found) == aval.shape and np.result_type(found) == aval.dtype, equation
    return [found]


# ---- memory ----------------------------------------------------------------------------------------------------------


class Array:
    """In HBM, in shared memory or in registers (an accumulator)."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.products = 0  # on their way into it


def _unknown(shape: tuple, dtype: Any) -> np.ndarray:
    return np.full(shape, np.nan if jnp.issubdtype(dtype, jnp.floating) else -(2**30), dtype)


class Barrier:
    def __init__(self, arrivals: int, label: str):
        self.arrivals, self.label = arrivals, label
        self.pending, self.phases, self.seen = arrivals, 0, {}

    def arrive(self) -> None:
        self.pending -= 1
        if not self.pending:
            self.pending, self.phases = self.arrivals, self.phases + 1

    def open_to(self, warpgroup: int) -> bool:
        """By parity, as the hardware has it: who is a whole phase late would wait for ever."""
        ahead = self.phases - self.seen.get(warpgroup, 0)
        assert ahead <= 1, f"{self.label}: warpgroup {warpgroup} is {ahead} phases late"
        return ahead == 1


def _view(array: Array, transforms: Any) -> np.ndarray:
    """A numpy view, through slices and transpositions; tiles and swizzles are as if they were not."""
    found = array.values
    for transform in transforms:
        if isinstance(transform, indexing.NDIndexer):
            found = found[tuple(_index(x, size) for x, size in zip(transform.indices, found.shape, strict=True))]
        elif isinstance(transform, types.TransposeTransform):
            found = found.transpose(transform.permutation)
        else:
            assert isinstance(transform, (UnswizzleRef, UntilingTransform)), transform
    return found


def _index(x: Any, size: int) -> Any:
    first = int(x.start if isinstance(x, indexing.Slice) else x)
    last = first + x.size if isinstance(x, indexing.Slice) else first + 1
    assert 0 <= first and last <= size, f"positions {first} to {last} of {size}"
    return slice(first, last) if isinstance(x, indexing.Slice) else first


# ---- programs --------------------------------------------------------------------------------------------------------


def _launch(params: dict, *inputs: np.ndarray) -> list[np.ndarray]:
    """All programs of a kernel, one after the other; each number of the results must be written exactly once."""
    [mesh], [jaxpr], chance = params["meshes"], params["jaxprs"], random.Random(seed)
    hbm = [Array(np.asarray(x)) for x in inputs]
    outs = [Array(_unknown(x.shape, x.dtype)) for x in params["out_avals"]]
    written = {id(out): np.zeros(out.values.shape, int) for out in outs}
    [scope] = jaxpr.eqns
    env = dict(zip(jaxpr.invars, [*hbm, *outs], strict=True))
    for at in product(*(range(n) for n in mesh.grid)):
        program = Program(dict(zip(mesh.grid_names, at, strict=True)), mesh, written, chance)
        shared = program.allocate(scope)
        program.finish(scope.params["jaxpr"], [*(_read(env, x) for x in scope.invars), *shared])
    for counts in written.values():
        assert (counts == 1).all(), "a result is written never or twice"
    return [out.values for out in outs]


class Program:
    """One block of the grid: its warpgroups, its shared memory, and what goes on in the background."""

    def __init__(self, place: dict, mesh: Any, written: dict, chance: random.Random):
        self.place, self.mesh, self.written, self.chance = place, mesh, written, chance
        self.copies: list[Callable[[], None]] = []
        self.products: list[list[Callable[[], None]]] = [[] for _ in range(mesh.num_threads)]

    def allocate(self, scope: Any) -> list:
        found = []
        for x, transforms in zip(scope.params["jaxpr"].invars, scope.params["ref_transforms"], strict=True):
            if isinstance(x.aval.dtype, BarrierType):
                number = x.aval.shape[0] if x.aval.shape else 1  # newer versions of JAX have single ones
                found.append([Barrier(x.aval.dtype.num_arrivals, f"{x.aval}[{i}]") for i in range(number)])
            else:
                logical = types.TransformedRef(x.aval, transforms).type if transforms else x.aval
                found.append(Array(_unknown(logical.shape, logical.dtype)))
        return found

    def finish(self, jaxpr: Any, arguments: list) -> None:
        """Runs all warpgroups to their ends, one step of one of them, or one copy, at a time."""
        running = {w: self.block(jaxpr, arguments, w) for w in range(self.mesh.num_threads)}
        waits: dict[int, Barrier | None] = dict.fromkeys(running)
        for _ in range(STEPS_LIMIT):
            ready = [w for w, barrier in waits.items() if barrier is None or barrier.open_to(w)]
            if not ready and not self.copies:
                break
            if self.copies and (not ready or self.chance.random() < 0.3):
                self.copies.pop(self.chance.randrange(len(self.copies)))()
                continue
            w = self.chance.choice(ready)
            if waits[w] is not None:
                waits[w].seen[w] = waits[w].seen.get(w, 0) + 1
            try:
                waits[w] = next(running[w])
            except StopIteration:
                assert not self.products[w], "a product is never awaited"
                del waits[w]
        assert not waits, f"{self.mesh.kernel_name}: deadlock at {self.place}: {[x.label for x in waits.values()]}"

    def block(self, jaxpr: Any, arguments: list, w: int) -> Generator[Barrier | None, None, list]:
        """Runs a jaxpr as warpgroup w; yields a barrier to wait for, or None where others may come in between."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))
        for equation in jaxpr.eqns:
            values, rule = [_read(env, x) for x in equation.invars], self.rule(equation.primitive.name)
            found = _compute(equation, values) if rule is None else (yield from rule(equation, values, w))
            env |= zip(equation.outvars, found or [], strict=True)
        return [_read(env, x) for x in jaxpr.outvars]

    def rule(self, name: str) -> Callable | None:
        return getattr(self, f"_{name.removesuffix('_p')}", None)  # JAX 0.10 has set_max_registers_p and the like

    # Control: each is the primitive of that name.

    def _axis_index(self, equation: Any, values: list, w: int) -> Iterator:
        name = equation.params["axis_name"]
        yield from ()
        return [np.int32(w if name == self.mesh.thread_name else self.place[name])]

    def _cond(self, equation: Any, values: list, w: int) -> Iterator:
        return (yield from self.block(equation.params["branches"][int(values[0])].jaxpr, values[1:], w))

    def _while(self, equation: Any, values: list, w: int) -> Iterator:
        params, n, m = equation.params, equation.params["cond_nconsts"], equation.params["body_nconsts"]
        carry = values[n + m :]
        while (yield from self.block(params["cond_jaxpr"].jaxpr, [*values[:n], *carry], w))[0]:
            carry = yield from self.block(params["body_jaxpr"].jaxpr, [*values[n : n + m], *carry], w)
        return carry

    def _scan(self, equation: Any, values: list, w: int) -> Iterator:
        body, num_constants = equation.params["jaxpr"].jaxpr, len(values) - len(equation.outvars)
        constants, carry = values[:num_constants], values[num_constants:]
        shapes = [[x.aval.shape for x in part] for part in (body.outvars, equation.outvars)]
        assert shapes[0] == shapes[1], "a loop over arrays"
        for _ in range(equation.params["length"]):
            carry = yield from self.block(body, [*constants, *carry], w)
        return carry

    def _jit(self, equation: Any, values: list, w: int) -> Iterator:
        return (yield from self.block(equation.params["jaxpr"].jaxpr, values, w))

    def _run_scoped(self, equation: Any, values: list, w: int) -> Iterator:
        jaxpr = equation.params["jaxpr"]
        sums = [Array(np.zeros(x.aval.shape, x.aval.dtype)) for x in jaxpr.invars]  # accumulators begin with zeros
        return (yield from self.block(jaxpr, [*values, *sums], w))

    def _run_state(self, equation: Any, values: list, w: int) -> Iterator:
        closed_over = (Array, list)  # memory and barriers
        cells = [x if isinstance(x, closed_over) else Array(np.array(x)) for x in values]
        yield from self.block(equation.params["jaxpr"], cells, w)
        self.await_products(w, 0)
        return [x if isinstance(x, closed_over) else cell.values for x, cell in zip(values, cells, strict=True)]

    def _set_max_registers(self, equation: Any, values: list, w: int) -> Iterator:
        yield from ()

    # Memory, barriers, products.

    def _get(self, equation: Any, values: list, w: int) -> Iterator:
        yield None
        return [_view(values[0], equation.params["tree"].unflatten(values[1:])).copy()]

    _load = _get

    def _swap(self, equation: Any, values: list, w: int) -> Iterator:
        array, new, *indices = values
        transforms = equation.params["tree"].unflatten(indices)
        yield None
        view = _view(array, transforms)
        old = view.copy()
        view[...] = np.asarray(new)
        if id(array) in self.written:  # a result; else a cell of `run_state`
            count = _view(Array(self.written[id(array)]), transforms)
            count += 1
        return [old]

    def _copy_gmem_to_smem(self, equation: Any, values: list, w: int) -> Iterator:
        (source, target, barriers), rest, params = values[:3], values[3:], equation.params
        trees = [params[f"{name}_transforms_treedef"] for name in ("src", "dst", "barrier")]
        indices = []
        for tree in trees:
            indices.append(tree.unflatten(rest[: tree.num_leaves]))
            rest = rest[tree.num_leaves :]
        barrier, view = _barrier(barriers, indices[2]), _view(target, indices[1])
        view[...] = _unknown(view.shape, view.dtype)

        def arrive() -> None:
            view[...] = _view(source, indices[0])
            barrier.arrive()

        self.copies.append(arrive)
        yield None

    def _barrier_wait(self, equation: Any, values: list, w: int) -> Iterator:
        yield _barrier(values[0], equation.params["transforms_treedef"].unflatten(values[1:]))

    def _barrier_arrive(self, equation: Any, values: list, w: int) -> Iterator:
        _barrier(values[0], equation.params["transforms_treedef"].unflatten(values[1:])).arrive()
        yield None

    def _wgmma_ref(self, equation: Any, values: list, w: int) -> Iterator:
        (sums, a, b), rest, transforms = values[:3], values[3:], []
        for name in ("acc", "a", "b"):
            tree = equation.params[f"{name}_transforms_tree"]
            leaves = 0 if tree is None else tree.num_leaves
            transforms.append(() if tree is None else tree.unflatten(rest[:leaves]))
            rest = rest[leaves:]

        def multiply() -> None:
            left, right = (
                np.asarray(_view(x, t) if isinstance(x, Array) else x, np.float32)
                for x, t in zip((a, b), transforms[1:], strict=True)
            )
            view = _view(sums, transforms[0])
            view += np.einsum("ik,kj->ij", left, right)  # not by a BLAS, whose threads would wait for each other
            sums.products -= 1

        sums.products += 1
        self.products[w].append(multiply)
        if self.chance.random() < 0.5:
            self.await_products(w, 0)
        yield None

    def await_products(self, w: int, most: int) -> None:
        while len(self.products[w]) > most:
            self.products[w].pop(0)()

    def _wgmma_accumulator_deref(self, equation: Any, values: list, w: int) -> Iterator:
        yield None
        self.await_products(w, equation.params["wait_n"])
        assert not values[0].products, "sums are read before their products are done"
        return [values[0].values.copy()]


def _barrier(barriers: list[Barrier], transforms: tuple) -> Barrier:
    for transform in transforms:
        [at] = transform.indices
        return barriers[int(at)]
    [barrier] = barriers
    return barrier
