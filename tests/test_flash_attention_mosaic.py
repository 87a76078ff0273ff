"""Flash attention for Hopper against plain jnp in float64, on a machine of Python; compiled for an H100 not here.

What only a GPU can tell (numerics on its matrix units, speed) is tools/bench/gpu_suite.py's.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mosaic_machine
import numpy as np
import pytest
from compilers import on_gpu_compiler, run_compiling
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention import flash_attention, merge
from k2jax.kernels.mosaic_block_sizes import TABLE, BlockSizes, Cut, block_sizes
from test_flash_attention import documents_of, draw, expected_of, heads_first, one_program
from test_flash_attention import found_of as found_of_kernels

from k2jax.errors import ConfigError
from k2jax.kernels import flash_attention_mosaic as mosaic
from k2jax.kernels import reference
from k2jax.model.attention import attend_causally

ONE = BlockSizes(*[Cut(64, 64, 2)] * 3, 64)  # one warpgroup that computes
MIXED = BlockSizes(Cut(128, 64, 2), Cut(128, 128, 2), Cut(64, 128, 2), 64)
KIND = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has kernels run on the machine of mosaic_machine.py; call it for another order than that of seed 0."""
    monkeypatch.setattr(plgpu, "kernel", mosaic_machine.kernel)
    monkeypatch.setattr(mosaic_machine, "seed", 0)
    return partial(monkeypatch.setattr, mosaic_machine, "seed")


def found_of(arrays: list[jax.Array], document_BT: jax.Array | None, sizes: BlockSizes) -> list[np.ndarray]:
    """Out and gradients on the machine."""
    return jax.device_get(found_of_kernels(arrays, document_BT, sizes, interpret=False))


forward, backward = one_program(mosaic.forward), one_program(mosaic.backward)


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "masked", "sizes"),
    [
        (200, 4, 2, 64, False, None),
        (300, 2, 1, 128, True, None),
        (129, 2, 2, 256, True, None),
        (200, 2, 1, 192, False, None),
        (1, 1, 1, 96, False, None),
        (200, 2, 1, 40, True, ONE),
        (260, 2, 1, 64, True, MIXED),
        (300, 4, 2, 64, True, TABLE[64].ahead()),
        (300, 2, 1, 128, False, TABLE[128].ahead()),
        (129, 2, 2, 256, True, TABLE[256].ahead()),
        (1, 1, 1, 64, False, TABLE[64].ahead()),
        (260, 2, 1, 64, True, MIXED.ahead()),
    ],
)
def test_values_and_gradients_are_the_references(machine, T, N, K, H, masked, sizes):
    """Grouped heads, one head, one position, odd lengths, heads of 64 to 256 and not of a multiple of 64.

    In float16: its rounding (11 bits) hides less than bfloat16's.
    """
    arrays, document_BT = draw(T, N, K, H, jnp.float16), documents_of(T) if masked else None
    found, expected = found_of(arrays, document_BT, sizes or block_sizes(H)), expected_of(arrays, document_BT)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float16
        np.testing.assert_allclose(np.float64(ours), theirs, atol=2**-10 * max(1.0, np.abs(theirs).max()))


def test_bfloat16_is_as_near_as_its_rounding(machine):
    arrays, document_BT = draw(200, 2, 1, 64, jnp.bfloat16), documents_of(200)
    for ours, theirs in zip(found_of(arrays, document_BT, TABLE[64]), expected_of(arrays, document_BT), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.float64(ours) - theirs).max() < 2**-7 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("sizes", "seeds"), [(TABLE[64], range(1, 7)), (TABLE[192], range(1, 4)), (TABLE[64].ahead(), range(1, 7))]
)
def test_the_bits_are_the_same_in_whatever_order_warpgroups_and_copies_come(machine, sizes: BlockSizes, seeds: range):
    """Four blocks past three slots; heads of two, so that dk and dv go on from one to the next."""
    arrays, document_BT = draw(512, 2, 1, sizes.head_dim, jnp.float16, B=1), documents_of(512, B=1, share=0.005)
    first = found_of(arrays, document_BT, sizes)
    for seed in seeds:
        machine(seed)
        for ours, same in zip(found_of(arrays, document_BT, sizes), first, strict=True):
            np.testing.assert_array_equal(ours, same)


def test_a_block_ahead_changes_no_bit(machine):
    """The same sums in the same order, of the same numbers."""
    arrays, document_BT = draw(300, 2, 1, 64, jnp.float16), documents_of(300)
    both = (found_of(arrays, document_BT, sizes) for sizes in (TABLE[64], TABLE[64].ahead()))
    for ours, same in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, same)


def part(sizes, arrays, rows: slice, keys: slice, documents=None, causal=False):
    """The forward kernel on some queries and some keys: (out_BNTH, lse_BN1T)."""
    q, k, v = heads_first(arrays)
    q = (q.astype(np.float32) * (mosaic.LOG2_E * q.shape[-1] ** -0.5)).astype(q.dtype)
    options = {"sizes": sizes, "causal": causal, "out_dtype": jnp.float32, "interpret": False}
    return jax.device_get(forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], documents, **options))


@pytest.mark.parametrize("sizes", [ONE, TABLE[64].ahead()])
def test_a_query_that_sees_no_key_has_no_output_and_no_weight(machine, sizes: BlockSizes):
    """Queries of documents 1 and 2 past keys of documents 0 and 1, as in ring attention."""
    arrays = draw(256, 2, 1, 64, jnp.float16)
    document = np.repeat([[0, 1, 2]] * 2, [100, 128, 28], axis=1).astype(np.int32)
    first, second = slice(0, 128), slice(128, 256)
    out, lse = part(sizes, arrays, second, first, (document[:, second], document[:, first]))
    assert (out[:, :, 100:] == 0).all() and (lse[..., 100:] == mosaic.MASKED).all() and (lse[..., :100] > -1e3).all()
    own = part(sizes, arrays, second, second, (document[:, second], document[:, second]), causal=True)
    together, lse = jax.device_get(jax.jit(merge)([(out, lse), own]))
    wide = (np.float32(x) for x in arrays[:3])
    expected, expected_lse_BNT = jax.device_get(jax.jit(reference.attention)(*wide, (document, document)))
    np.testing.assert_allclose(together.transpose(0, 2, 1, 3), expected[:, second], atol=4e-3)
    np.testing.assert_allclose(lse[:, :, 0] / mosaic.LOG2_E, expected_lse_BNT[..., second], atol=4e-3)
    # Numbers 4 and 6 around the queries' 5: by their range alone the blocks could meet, and are computed.
    strangers = np.full((2, 128), 5, np.int32), np.tile(np.array([4, 6], np.int32), (2, 64))
    out, lse = part(sizes, arrays, second, first, strangers)
    assert not out.any() and (lse == mosaic.MASKED).all()
    d = backward(
        *(x[:, :, s] for x, s in zip(heads_first(arrays), (second, first, first), strict=True)),
        strangers, lse, np.zeros_like(lse), np.ones_like(out),
        sizes=sizes, causal=False, out_dtype=jnp.float32, interpret=False,
    )  # fmt: skip
    assert not any(x.any() for x in d), "no query sees any key"
    assert all(x.dtype == jnp.float32 for x in d)


@pytest.mark.parametrize("sizes", [ONE, MIXED.ahead()])
def test_blocks_that_are_masked_whole_are_not_computed(machine, sizes: BlockSizes):
    """Not even multiplied by 0: not-a-number in their keys and values, or in their queries' gradients, stays there."""
    q, k, v, dout = draw(256, 1, 1, 64, jnp.float16, B=1)
    document = jnp.asarray(np.repeat([[0, 1]], [128, 128], axis=1), jnp.int32)
    lost = slice(0, 128)
    bad = q, k.at[:, lost].set(jnp.nan), v.at[:, lost].set(jnp.nan), dout.at[:, lost].set(0.0)
    found = found_of(bad, document, sizes)
    assert all(np.isfinite(x[:, 128:]).all() for x in found)
    future = found_of((q, bad[1].at[:, 192:].set(jnp.nan), *bad[2:]), document, sizes)
    np.testing.assert_array_equal(future[0][:, 128:192], found[0][:, 128:192])
    # Keys and values of document 1 past queries of document 0, and the other way round in the gradient of the keys.
    bad = q.at[:, 128:].set(jnp.nan), k, v, dout.at[:, 128:].set(jnp.nan)
    assert all(np.isfinite(x[:, :128]).all() for x in found_of(bad, document, sizes))


# ---- the machine -----------------------------------------------------------------------------------------------------


def doubled(x: jax.Array, waits: bool, arrivals: int = 1) -> np.ndarray:
    """2 x by a kernel of two warpgroups, the first of which copies."""

    def kernel(x_ref, out_ref, x_smem, full):
        w = jax.lax.axis_index("warpgroup")
        pl.when(w == 0)(lambda: plgpu.copy_gmem_to_smem(x_ref, x_smem, full))

        @pl.when(w == 1)
        def _compute():
            if waits:
                plgpu.barrier_wait(full)
            out_ref[...] = x_smem[...] * 2.0

    scratch = [plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_arrivals=arrivals)]
    options = {"out_type": x, "scratch_types": scratch, "num_threads": 2, "thread_name": "warpgroup"}
    return np.asarray(plgpu.kernel(kernel, **options)(x)[0])


def test_the_machine_shows_what_is_read_too_early_and_what_waits_for_ever(machine):
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(doubled(x, waits=True), 2 * x)
    assert np.isnan(doubled(x, waits=False)).any()
    with pytest.raises(jax.errors.JaxRuntimeError, match="deadlock"):
        doubled(x, waits=True, arrivals=2)


# ---- sizes and where it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "message"),
    [((96, 64, 2), "queries=96"), ((64, 256, 2), "keys=256 must be 64 or 128"), ((64, 64, 1), "stages=1")],
)
def test_cuts_that_cannot_be_are_refused(cut, message):
    with pytest.raises(ValueError, match=message):
        Cut(*cut)


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        (64, {"head_dim": 96}, "head_dim=96 must be a multiple of 64, 256 at most"),
        (256, {"head_dim": 320}, "head_dim=320"),
        (256, {"dkv": Cut(64, 128, 2)}, "dkv: blocks of 128 keys: 64"),
        (256, {"dkv": Cut(64, 64, 2, ahead=True)}, "dkv: ahead awaits two products, one is there"),
        (64, {"forward": Cut(64, 128, 2, ahead=True)}, "forward: ahead takes two warpgroups: 128 queries, not 64"),
        (128, {"forward": Cut(128, 128, 4)}, "forward takes 299.* bytes of shared memory"),
    ],
)
def test_block_sizes_that_cannot_be_are_refused(sizes: int, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(TABLE[sizes], **change)


def test_the_table_has_sizes_for_every_head_that_divide_chunks_of_a_row():
    """Ring attention's chunks are multiples of 128."""
    for head_dim in range(8, 257, 8):
        sizes = block_sizes(head_dim)
        assert head_dim <= sizes.head_dim < head_dim + 64 and 128 % sizes.unit == 0
    with pytest.raises(ValueError, match="heads of 256 at most, not 264"):
        block_sizes(264)


def test_what_these_kernels_cannot_do_is_an_error():
    q, k, v, _ = draw(64, 1, 1, 64)
    with pytest.raises(ValueError, match="of bfloat16 or float16, not 64 of float32: take"):
        flash_attention(q, k, v, sizes=TABLE[64])
    q, k, v, _ = draw(64, 1, 1, 128, jnp.bfloat16)
    with pytest.raises(ValueError, match="heads up to 64 wide .* not 128 of bfloat16"):
        flash_attention(q, k, v, sizes=TABLE[64])
    with pytest.raises(NotImplementedError, match="JAX cannot interpret"):
        flash_attention(q, k, v, sizes=TABLE[128], interpret=True)


def test_it_is_taken_where_it_is_named_and_by_auto_for_documents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("k2jax.parallel.sharding.device_kind", lambda: KIND)
    monkeypatch.setattr("k2jax.kernels.flash_attention.flash_attention", lambda *arrays, sizes=None: sizes)
    q, k, v, _ = draw(16, 2, 2, 100, jnp.bfloat16)
    assert attend_causally(q, k, v, documents_of(16), "mosaic") == TABLE[128]
    assert attend_causally(q, k, v, documents_of(16), "auto") == TABLE[128]


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "message"),
    [
        ("cpu", jnp.bfloat16, 128, "runs on Hopper GPUs .H100, .*, this is cpu: take 'auto'"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 128, "this is NVIDIA A100"),
        ("NVIDIA B200", jnp.bfloat16, 128, "this is NVIDIA B200"),
        ("TPU v5p", jnp.bfloat16, 128, "this is TPU v5p"),
        (KIND, jnp.float32, 128, "computes in 16 bits, this is float32 .precision.compute.: take 'flash'"),
        (KIND, jnp.bfloat16, 264, "takes a model.head_dim of 256 at most: take 'jnp'"),
    ],
)
def test_it_is_refused_where_it_cannot(monkeypatch: pytest.MonkeyPatch, kind, dtype, head_dim, message):
    monkeypatch.setattr("k2jax.parallel.sharding.device_kind", lambda: kind)
    q, k, v, _ = draw(16, 2, 2, head_dim, dtype)
    with pytest.raises(ConfigError, match=f"implementation='mosaic' .*{message}"):
        attend_causally(q, k, v, None, "mosaic")


# ---- compiled for an H100 --------------------------------------------------------------------------------------------

COMPILE = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import re
import jax, jax.numpy as jnp
from compiled_step import compiled_step, small
from k2jax import config
from k2jax.parallel import sharding
from k2jax.model.attention import attend_causally
from k2jax.kernels.flash_attention import flash_attention
from k2jax.kernels.mosaic_block_sizes import block_sizes
def kernels(text):
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    return ' '.join(sorted({re.search('flash_attention_([a-z]+)/', line)[1] for line in calls}))
c = config.base().unlock()
mesh = sharding.make_mesh(c.mesh, topologies.devices("h100:1"))
place = jax.sharding.NamedSharding(mesh, jax.P())
for dtype, T, H, documents in CASES:
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype, sharding=place) for heads in (4, 2))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place) if documents else None
    loss = lambda q, k, ids: attend_causally(q, k, k, ids, "mosaic").astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        print(H, kernels(jax.jit(jax.grad(loss, (0, 1))).lower(q, k, ids).compile().as_text()))
for T, H, documents in AHEAD:
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), "bfloat16", sharding=place) for heads in (4, 2))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place) if documents else None
    sizes = block_sizes(H).ahead()
    loss = lambda q, k, ids: flash_attention(q, k, k, ids, sizes=sizes).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        print("ahead", H, kernels(jax.jit(jax.grad(loss, (0, 1))).lower(q, k, ids).compile().as_text()))
c = small(head_dim=64, sequence_length=512)
c.model.attention.implementation = "mosaic"
for c.mesh.fsdp, c.mesh.tensor, c.mesh.context in ((4, 2, 1), (4, 1, 2)):
    print("step", c.mesh.context, kernels(compiled_step(c, topologies.devices("h100:8"))))
"""
CASES = [("bfloat16", 2048, 64, True), ("bfloat16", 2048, 128, True), ("bfloat16", 500, 128, False)]
CASES += [("float16", 129, 96, True), ("bfloat16", 500, 192, True), ("bfloat16", 2048, 256, True)]
SPILLED = {64: 0, 128: 32, 192: 64, 256: 200}  # bytes a thread, at most: the widest heads do spill
AHEAD = [(2048, 64, True), (2048, 128, True), (500, 128, False)]  # bfloat16, Cut.ahead
SPILLED_AHEAD = {64: 64, 128: 32}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(what COMPILE printed, the folder where Mosaic GPU left its PTX and what ptxas said)."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
    code = COMPILE.replace("CASES", repr(CASES)).replace("AHEAD", repr(AHEAD))
    return run_compiling(code, folder, environment).splitlines(), folder


@on_gpu_compiler
def test_it_compiles_for_an_h100_and_within_a_sharded_step(compiled: tuple[list[str], Path]):
    """Three kernels, one forward and two backward; also where two devices share rows, in a ring."""
    kernels = "dkv dq forward"
    of_cases = [*(f"{H} {kernels}" for _, _, H, _ in CASES), *(f"ahead {H} {kernels}" for _, H, _ in AHEAD)]
    assert compiled[0] == [*of_cases, f"step 1 {kernels}", f"step 2 {kernels}"]


@on_gpu_compiler
def test_kernels_of_the_table_use_wgmma_and_spill_next_to_no_register(compiled: tuple[list[str], Path]):
    """By the word of ptxas, for each kernel of each case, in their order."""
    said = sorted(compiled[1].glob("*.ptxas"), key=lambda path: int(path.stem.split("_")[-1]))
    most = [SPILLED[-(-H // 64) * 64] for _, _, H, _ in CASES] + [SPILLED_AHEAD[H] for _, H, _ in AHEAD]
    most = [number for number in most for _ in range(3)]
    assert len(said) > len(most)
    for path, spilled in zip(said, most, strict=False):
        text, ptx = path.read_text(), path.with_suffix(".ptx").read_text()
        assert int(re.search(r"(\d+) bytes spill stores", text)[1]) <= spilled, f"{path.name}: {text}"
        assert "serialized" not in text, "the compiler found no way to keep products in flight"
        assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx and re.search(r"\.target sm_90a", ptx)
        assert not touched_in_flight(ptx), path.name


def touched_in_flight(ptx: str) -> list[str]:
    """Instructions between a product's issue and its wait that touch its sums, which PTX leaves undefined.

    LLVM knows nothing of the wait: what keeps other instructions behind it is Mosaic's doing, and this looks.
    """
    groups, issued, found = [], set(), []
    for line in ptx.splitlines():
        line = line.split("//")[0]
        if "wgmma.mma_async" in line:
            sums = line.split("wgmma.mma_async")[1].split("{")[1].split("}")[0]
            issued |= set(re.findall(r"%\w+", sums))
        elif "wgmma.commit_group" in line:
            groups, issued = [*groups, issued], set()
        elif wait := re.search(r"wgmma\.wait_group\S*\s+(\d+)", line):
            groups = groups[max(0, len(groups) - int(wait[1])) :]
        elif issued.union(*groups).intersection(re.findall(r"%\w+", line)):
            found.append(line.strip())
    return found


def test_what_touches_sums_in_flight_is_found():
    def ptx(between: str, wait: int, after: str) -> str:
        lines = "wgmma.mma_async.x {%r1,%r2}, %rd1, %rd2;", "wgmma.commit_group.x;", between
        return "\n".join([*lines, f"wgmma.wait_group.x \t{wait};", after])

    early, late = "add %r9, %r1, 1;", "add %r9, %r2, 1;"
    assert touched_in_flight(ptx("add %r9, %r3, 1;", 0, late)) == []
    assert touched_in_flight(ptx(early, 0, late)) == [early]
    assert touched_in_flight(ptx("", 1, late)) == [late]
