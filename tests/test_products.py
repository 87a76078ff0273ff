"""Products with inputs in 8 bits: as near to numpy's as their formats allow, on one device and on many, over a resume,
and read back out of what the compilers of GPUs and TPUs make of a step."""

import ast
import shutil
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_gpu_compiler, on_tpu_compiler, run_compiling
from hypothesis import given, settings
from test_sharding import MESHES, losses, small

from k2jax.config import to_dict
from k2jax.errors import ConfigError
from k2jax.hf.export import export
from k2jax.parallel import fsdp, products
from k2jax.parallel.products import E4M3, E5M2, INT8
from k2jax.run.drift import differences, not_allowed
from k2jax.run.ledger import StepLog
from k2jax.run.saved import open_step
from k2jax.train import train
from k2jax.training.optimizer import init_state
from k2jax.training.step import loss_sums

KINDS = ("float8", "int8")
LARGEST = {None: 1.0, INT8: 127.0, E4M3: 448.0, E5M2: 57344.0}  # number of a type, as it is used


# ---- numbers ---------------------------------------------------------------------------------------------------------


def three(kind: str, x_BTI: np.ndarray, w_IO: np.ndarray, dy_BTO: np.ndarray) -> tuple[np.ndarray, ...]:
    """(y, dx, dw) as a layer has them."""
    y, back = jax.vjp(lambda x, w: fsdp.matmul(x, w, 0, x.dtype, (), kind), jnp.asarray(x_BTI), jnp.asarray(w_IO))
    return tuple(np.asarray(array, np.float64) for array in (y, *back(jnp.asarray(dy_BTO))))


def rounding(a: np.ndarray, kind: jnp.dtype | None, contracted: int) -> np.ndarray:
    """The most by which rounding to `kind` moves each number of `a` (a matrix), by what the format is."""
    if kind is None:  # float32, whose smallest numbers the processor takes for 0
        return np.full(a.shape, np.finfo(np.float32).tiny)
    if kind == INT8:  # half a step, of which the largest of a row has 127
        return np.maximum(np.abs(a).max(axis=contracted, keepdims=True), products.TINY) / 254 + 0 * a
    f = jnp.finfo(kind)
    largest = max(np.abs(a).max(), products.TINY)
    # Half a unit in the last place; below the smallest normal number half of the smallest there is, of a scale by which
    # the largest is at least half of the format's largest.
    return np.abs(a) * float(f.eps) / 2 + float(f.smallest_subnormal) / float(f.max) * largest


def assert_within(found: np.ndarray, a: np.ndarray, b: np.ndarray, types: tuple) -> None:
    """`found` is a @ b (float64), inputs rounded to `types` and added up in float32."""
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    da, db = rounding(a, types[0], 1), rounding(b, types[1], 0)
    least = np.finfo(np.float32).tiny * np.prod([LARGEST[kind] for kind in types]) * a.shape[1]  # below, scales are 0
    bound = (np.abs(a) + da) @ (np.abs(b) + db) * (1 + 1e-5) - size + least
    assert (np.abs(found.reshape(exact.shape) - exact) <= bound).all()


def drawn(draw: np.random.Generator, shape: tuple[int, ...], size: float, how: str) -> np.ndarray:
    array = size * draw.standard_normal(shape)
    if how == "zeros":
        array[:] = 0
    elif how == "a row of zeros":
        array[0] = 0
    elif how == "an outlier":
        array.flat[draw.integers(array.size)] *= 1e4
    elif how == "all sizes":
        array *= 10.0 ** draw.integers(-7, 1, shape)
    return array.astype(np.float32)


HOW = st.sampled_from(["plain", "zeros", "a row of zeros", "an outlier", "all sizes"])


@pytest.mark.parametrize("kind", [*KINDS, "compute"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    # Each is compiled.
    sizes=st.sampled_from([(1, 1, 1, 1), (2, 3, 33, 5), (1, 17, 8, 1), (5, 1, 2, 33), (3, 8, 17, 8)]),
    powers=st.tuples(*[st.sampled_from([-31, -12, -3, 0, 3, 12])] * 3),
    how=st.tuples(HOW, HOW, HOW),
)
def test_each_product_is_as_near_as_its_format_allows(kind, seed, sizes, powers, how):
    draw = np.random.default_rng(seed)
    B, T, I, O = sizes
    shapes = (B, T, I), (I, O), (B, T, O)
    x, w, dy = (drawn(draw, *of) for of in zip(shapes, 10.0 ** np.array(powers), how, strict=True))
    y, dx, dw = three(kind, x, w, dy)
    x, w, dy = x.reshape(-1, I).astype(np.float64), w.astype(np.float64), dy.reshape(-1, O).astype(np.float64)
    types = products.TYPES[kind]
    for name, found, *factors in (("y", y, x, w), ("dx", dx, dy, w.T), ("dw", dw, x.T, dy)):
        assert_within(found, *factors, types.get(name, (None, None)))


def test_what_is_rounded_is_what_was_asked_for():
    """Else nothing above would fail: more bits are always nearer."""
    x = np.linspace(-1, 1, 4001, dtype=np.float32)[:, None, None]  # each a row by itself, but for float8's scale
    one, many = np.ones((1, 1), np.float32), np.linspace(-1, 1, 4001, dtype=np.float32)[None, None]
    assert len(np.unique(three("float8", x, one, x)[0])) < 256
    assert len(np.unique(three("int8", many, np.eye(4001, dtype=np.float32), many)[0])) == 255
    assert len(np.unique(three("compute", x, one, x)[0])) == 4001


def test_float8_gradients_are_those_of_a_straight_through_estimator():
    """Of powers of two, which e5m2 holds, so that only x and w are rounded, and by one scale in all three products."""
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal((2, 5, 24)).astype(np.float32), draw.standard_normal((24, 7)).astype(np.float32)
    dy = (2.0 ** draw.integers(-8, 8, (2, 5, 7)) * draw.choice([-1, 1], (2, 5, 7))).astype(np.float32)

    def through(a: jax.Array) -> jax.Array:
        number, scale = products._float8(a, E4M3)
        return a + jax.lax.stop_gradient(number.astype(jnp.float32) * scale - a)

    y, back = jax.vjp(lambda x, w: through(x) @ through(w), jnp.asarray(x), jnp.asarray(w))
    for found, expected in zip(three("float8", x, w, dy), (y, *back(jnp.asarray(dy))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_int8_gives_whole_numbers_exactly():
    """Of which 127 is in each row, so that scales are 1; dx is rounded, and dw is not at all."""
    draw = np.random.default_rng(0)

    def whole(*shape: int) -> np.ndarray:
        array = draw.integers(-127, 128, shape).astype(np.float32)
        array[..., 0] = array[..., 0, :] = 127
        return array

    x, w, dy = whole(1, 6, 40), whole(40, 9), whole(1, 6, 9)
    dy += draw.random(dy.shape).astype(np.float32) * 0.4  # rounds away in dx, and must not in dw
    y, dx, dw = three("int8", x, w, dy)
    np.testing.assert_array_equal(y, x.astype(np.float64) @ w)
    largest = dy.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(dx, np.round(dy / largest * 127) @ w.T.astype(np.float64) * (largest / 127), rtol=1e-6)
    np.testing.assert_allclose(dw, x[0].T @ dy[0].astype(np.float64), rtol=1e-5, atol=0.1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([E4M3, E5M2]), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_float8_rounds_a_part_as_the_whole(seed: int, kind: jnp.dtype, dtype: str):
    """Scales are powers of two: all numbers but the smallest are rounded alike, whichever others are with them."""
    draw = np.random.default_rng(seed)
    whole = jnp.asarray(draw.standard_normal(64) * 2.0 ** draw.integers(-4, 5, 64), dtype)

    def back(part: jax.Array) -> np.ndarray:
        number, scale = products._float8(part, kind)
        assert number.dtype == kind and np.log2(float(scale)) % 1 == 0
        return np.asarray(number, np.float64) * float(scale)

    parts = np.concatenate([back(part) for part in jnp.split(whole, 8)])
    exact, least = np.asarray(whole, np.float64), np.abs(np.asarray(whole, np.float64)).max() * 2.0**-13
    large = np.abs(exact) > least
    np.testing.assert_array_equal(parts[large], back(whole)[large])
    assert np.abs(parts - exact).max() > 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "w", "dy"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind: str, place: str, wrong: float):
    draw = np.random.default_rng(0)
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in
              {"x": (2, 3, 8), "w": (8, 5), "dy": (2, 3, 5)}.items()}  # fmt: skip
    arrays[place].flat[4] = wrong
    exact = three("compute", *arrays.values())
    for found, expected in zip(three(kind, *arrays.values()), exact, strict=True):
        assert not np.isfinite(found[~np.isfinite(expected)]).any()


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_device(kind: str) -> list[float]:
    return losses((1, 1, 1, 1), products=kind)


def test_steps_learn_nearly_as_before(kind: str, one_device: list[float]):
    before = losses((1, 1, 1, 1))
    assert one_device[-1] < one_device[0] - 0.05
    np.testing.assert_allclose(one_device, before, rtol=0, atol=0.03)
    assert one_device != before


@pytest.mark.parametrize("mesh", ["replica 2 x fsdp 2 x tensor 2", "fsdp 2 x context 2 x tensor 2", "tensor 8"])
def test_steps_are_the_same_on_meshes(kind: str, mesh: str, one_device: list[float]):
    """int8 computes the same, but for the order of sums in float32, after which a few numbers round otherwise; float8's
    devices have scales of their own, and yet what they round comes out the same."""
    found = losses(MESHES[mesh], products=kind)
    np.testing.assert_allclose(found[0], one_device[0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(found, one_device, rtol=0, atol=2e-4)


def gradients(kind: str, remat: str) -> dict[str, jax.Array]:
    c, _ = small()
    with c.unlocked():
        c.precision.products, c.model.remat = kind, remat
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 64, (4, 17), np.int32))
    given = dict(config=c, stage=c.stages[0], eos_id=2, num_subsets=2, compute_dtype=jnp.float32)
    loss = partial(loss_sums, tokens=tokens, subset=jnp.zeros(4, jnp.int32), **given)
    return jax.jit(jax.grad(lambda params: loss(params)[0]))(init_state(c.model, 0).params)


def test_remat_keeps_what_it_names(kind: str):
    """Nothing of a product is kept or computed otherwise than without rematerialisation."""
    expected = gradients(kind, "none")
    for remat in ("full", "dots", "q+k+v+gate"):
        for name, array in gradients(kind, remat).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{remat} {name}")


def test_a_run_resumes_bit_for_bit_and_is_exported_as_it_is(kind: str, tiny_config, tmp_path: Path):
    """There is no state of scales: ten steps and, from their checkpoint, the rest are the bits of all of them. The
    export's certificate compares full products with transformers' of the same weights."""
    config = tiny_config(**{"stages.0.chunks": 1, "precision.products": kind})

    def run(workdir: Path) -> list[tuple[float, float]]:
        train(config, workdir)
        return [(row["loss"], row["grad_norm"]) for row in StepLog(workdir / "metrics", None).rows()]

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "15")
    assert run(tmp_path / "again") == whole
    saved, again = (open_step(tmp_path / name, 15) for name in ("whole", "again"))
    assert saved.meta["digests"] == again.meta["digests"]
    logits = export(saved, tmp_path / "hf", "float32", 10**9, lambda _: None).parity["logits"]
    assert logits["largest_difference"] <= logits["tolerance"]


def test_an_unknown_kind_is_refused_and_a_changed_one_is_drift(tiny_config):
    with pytest.raises(ConfigError, match="precision.products='fp8': must be one of .'compute', 'float8', 'int8'"):
        tiny_config(**{"precision.products": "fp8"})
    was, now = (to_dict(tiny_config(**{"precision.products": kind})) for kind in ("compute", "float8"))
    found = differences(was, now)
    assert found == {"precision.products": ("compute", "float8")}
    assert not_allowed(found, ("stages",)) == ["precision.products"] and not not_allowed(found, ("precision",))


# ---- compilers -------------------------------------------------------------------------------------------------------

COMPILE = """
import re, sys
from collections import Counter
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax
from k2jax import config
from k2jax.data.order import StagePlan
from k2jax.parallel import sharding
from k2jax.plan.hlo import Program
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state
from k2jax.training.program import batch_shapes, step_function
c = config.base().unlock()
c.model.update(vocab_size=512, dim=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=64, ffn_dim=512)
c.model.attention.implementation = IMPLEMENTATION
c.stages = (config.stage(mix={"x": 1}, sequence_length=256, rows_per_step=8),)
c.precision.compute = "bfloat16"
plan = StagePlan("x", 0, 256, 8, 10, 1, 0, 80, 1, 10)
mesh = sharding.make_mesh(c.mesh, topologies.devices(TOPOLOGY))
for c.precision.products, options in CASES:
    shapes = jax.eval_shape(lambda: init_state(c.model, 0))
    placed = place_state(c, shapes, mesh)
    with jax.set_mesh(mesh):
        step = step_function(c, plan, placed, mesh, eos_id=2, num_subsets=1)
        state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
        text = step.lower(state, batch_shapes(c, c.stages[0])).compile(compiler_options=options).as_text()
    program, found = Program(text), Counter()
    for i in program.instructions.values():
        if i.opcode in ("dot", "convolution") or "__cublas" in i.rest:
            how = re.findall(r'custom_call_target="([^"]*)"', i.rest) or ["by the compiler"]
            found[" ".join([*(program.shapes[name].split("[")[0] for name in i.operands[:2]), *how])] += 1
    print(dict(found))
"""


def compiled(folder: Path, topology: str, cases: list[tuple[str, dict]], implementation: str) -> list[dict[str, int]]:
    """How many products a step for a topology has by the types of their inputs and who computes them, of each case."""
    code = f"TOPOLOGY, CASES, IMPLEMENTATION = {topology!r}, {cases!r}, {implementation!r}\n" + COMPILE
    return [ast.literal_eval(line) for line in run_compiling(code, folder).splitlines() if line.startswith("{")]


# Of one layer in the loops over them, forward and backward, less those that XLA makes one product of.
FLOAT8 = {"f8e4m3fn f8e4m3fn", "f8e5m2 f8e4m3fn", "f8e4m3fn f8e5m2"}
PLAIN = 3 + 2  # products that stay as they are: the head's; on a GPU, the sums of the embedding's gradient


def plain(found: dict[str, int]) -> int:
    return sum(number for kinds, number in found.items() if kinds.split()[0] in ("bf16", "f32"))



def layers(found: dict[str, int], how: str, kinds: set[str]) -> int:
    """The number of products of these kinds, each of which there is."""
    numbers = [found.get(f"{kind} {how}", 0) for kind in kinds]
    assert all(numbers), found
    return sum(numbers)


@on_gpu_compiler
def test_products_on_a_gpu(tmp_path: Path):
    """With Triton, and by cuBLASLt, whose float8 products XLA knows by their pattern: on a GPU, the faster is taken."""
    cases = [(kind, options) for kind in KINDS for options in ({}, {"xla_gpu_enable_triton_gemm": False})]
    *float8, int8, int8_cublas = compiled(tmp_path, "h100:1", cases, "cudnn")
    triton, cublas = "by the compiler", "__cublas$lt$matmul"
    for found, how in zip(float8, (triton, cublas + "$f8"), strict=True):
        assert plain(found) == PLAIN, found
        assert layers(found, how, FLOAT8) == sum(found.values()) - PLAIN >= 15, found
    for found, how in ((int8, triton), (int8_cublas, cublas)):
        assert layers(found, how, {"s8 s8"}) == sum(found.values()) - plain(found) >= 10, found


@on_tpu_compiler
@pytest.mark.parametrize(("topology", "kind"), [("v6e:2x2", "int8"), ("tpu7x:2x2x1", "float8")])
def test_products_on_tpus(topology: str, kind: str, tmp_path: Path):
    (found,) = compiled(tmp_path, topology, [(kind, {})], "jnp")
    kinds = FLOAT8 if kind == "float8" else {"s8 s8"}
    assert layers(found, "by the compiler", kinds) >= (21 if kind == "float8" else 14), found
