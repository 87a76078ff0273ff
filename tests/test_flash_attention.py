"""kernels/: flash attention against plain jnp in float64, in interpret mode; compiled for TPUs that are not here."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from conftest import REPOSITORY
from jax.experimental.pallas import tpu as pltpu
from k2jax.kernels.flash_attention import flash_attention, merge
from k2jax.kernels.flash_attention_tpu import BlockSizes

from k2jax.errors import ConfigError
from k2jax.kernels import flash_attention_tpu as tpu
from k2jax.kernels import reference
from k2jax.model.attention import attend_causally
from k2jax.plan import bundles

SMALL = BlockSizes(256, 128, 256, 128, 512)  # 300 positions are two blocks and a rest; 600 are two parts


def draw(T: int, N: int, K: int, H: int, dtype: type = np.float32, B: int = 2) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def documents_of(T: int, B: int = 2, share: float = 0.02) -> jax.Array:
    return jnp.asarray(np.cumsum(np.random.default_rng(1).random((B, T)) < share, axis=1), jnp.int32)


def values_and_gradients(attend, q, k, v, dout) -> tuple[jax.Array, ...]:
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(dout)


# One program for each shape, which tests share.


@partial(jax.jit, static_argnames=("sizes", "interpret"))
def found_of(arrays: list[jax.Array], document_BT: jax.Array | None, sizes, interpret=True) -> tuple[jax.Array, ...]:
    """Out and gradients of the kernels that `sizes` are of, in interpret mode."""
    attend = partial(flash_attention, document_BT=document_BT, sizes=sizes, interpret=interpret)
    return values_and_gradients(attend, *arrays)


@jax.jit
def expected_of_wide(arrays: list[jax.Array], document_BT: jax.Array | None) -> tuple[jax.Array, ...]:
    documents = None if document_BT is None else (document_BT, document_BT)
    return values_and_gradients(lambda q, k, v: reference.attention(q, k, v, documents)[0], *arrays)


def expected_of(arrays: list[jax.Array], document_BT: jax.Array | None) -> list[np.ndarray]:
    """Out and gradients of the reference in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        return [np.asarray(x) for x in expected_of_wide(wide, document_BT)]


def one_program(function):
    """A kernel's `forward` or `backward`, all of what is around it compiled with it."""
    return jax.jit(function, static_argnames=("sizes", "causal", "out_dtype", "interpret"))


forward, backward = one_program(tpu.forward), one_program(tpu.backward)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "sizes"),
    [
        (300, 4, 2, 64, SMALL),
        (1, 1, 1, 128, SMALL),
        (256, 2, 1, 128, BlockSizes(256, 256, 128, 128, 256)),
        (385, 2, 2, 256, BlockSizes(128, 128, 256, 256, 512)),
        (600, 2, 1, 64, SMALL),
    ],
)
def test_values_and_gradients_are_the_references(T, N, K, H, sizes, masked):
    """Grouped heads, one head, one position, odd lengths, heads of 64 to 256, rows longer than what is resident."""
    arrays, document_BT = draw(T, N, K, H), documents_of(T) if masked else None
    for ours, theirs in zip(found_of(arrays, document_BT, sizes), expected_of(arrays, document_BT), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_as_near_as_its_rounding():
    arrays, document_BT = draw(300, 2, 1, 64, jnp.bfloat16), documents_of(300)
    for ours, theirs in zip(found_of(arrays, document_BT, SMALL), expected_of(arrays, document_BT), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2**-7 * np.abs(theirs).max()


def test_no_race_in_the_kernels():
    """With the TPU's memories and transfers simulated, and every read and write of them checked."""
    arrays, document_BT = draw(300, 2, 1, 64), documents_of(300)
    found = found_of(arrays, document_BT, SMALL, pltpu.InterpretParams(detect_races=True))
    for ours, theirs in zip(found, expected_of(arrays, document_BT), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def heads_first(arrays) -> list[np.ndarray]:
    """q, k and v as the kernels have them. Of numpy: cutting these compiles nothing."""
    return [np.asarray(x).transpose(0, 2, 1, 3) for x in arrays[:3]]


def part(arrays, rows: slice, keys: slice, documents=None, causal=False):
    """The forward kernel on some queries and some keys: (out_BTNH, natural lse_BNT)."""
    q, k, v = heads_first(arrays)
    q = q * (tpu.LOG2_E * q.shape[-1] ** -0.5)
    options = {"sizes": SMALL, "causal": causal, "out_dtype": jnp.float32, "interpret": True}
    return jax.device_get(forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], documents, **options))


@pytest.mark.fault("D12")
def test_a_query_that_sees_no_key_has_no_output_and_no_weight():
    """Queries of documents 1 and 2 past keys of documents 0 and 1: in full, and put together with what they do see."""
    arrays = draw(512, 2, 1, 64)
    document = np.repeat([[0, 1, 2]] * 2, [200, 256, 56], axis=1).astype(np.int32)
    first, second = slice(0, 256), slice(256, 512)
    out, lse = part(arrays, second, first, (document[:, second], document[:, first]))
    assert (out[:, :, 200:] == 0).all() and (lse[..., 200:] == tpu.MASKED).all() and (lse[..., :200] > -1e3).all()
    own = part(arrays, second, second, (document[:, second], document[:, second]), causal=True)
    together, _ = jax.device_get(jax.jit(merge)([(out, lse), own]))
    expected, _ = jax.device_get(jax.jit(reference.attention)(*arrays[:3], (document, document)))
    np.testing.assert_allclose(together.transpose(0, 2, 1, 3), expected[:, second], atol=2e-5)
    # Numbers 4 and 6 around the queries' 5: by their range alone the blocks could meet, and are computed.
    strangers = np.full((2, 256), 5, np.int32), np.tile(np.array([4, 6], np.int32), (2, 128))
    out, lse = part(arrays, second, first, strangers)
    assert not out.any() and (lse == tpu.MASKED).all()
    dq, dk, dv = backward(
        *(x[:, :, s] for x, s in zip(heads_first(arrays), (second, first, first), strict=True)),
        strangers, lse, np.zeros_like(lse), np.ones_like(out),
        sizes=SMALL, causal=False, out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    assert not dq.any() and not dk.any() and not dv.any(), "no query sees any key"


def test_blocks_that_are_masked_whole_are_not_computed():
    """Not even multiplied by 0: not-a-number in their keys and values, or in their queries' gradients, stays there."""
    q, k, v, dout = draw(1024, 1, 1, 64, B=1)
    document = jnp.asarray(np.repeat([[0, 1]], [512, 512], axis=1), jnp.int32)
    sizes = BlockSizes(256, 128, 256, 128, 1024)
    k, v, dout = k.at[:, :512].set(jnp.nan), v.at[:, :512].set(jnp.nan), dout.at[:, :512].set(0.0)
    found = found_of([q, k, v, dout], document, sizes)
    assert all(np.isfinite(x[:, 512:]).all() for x in found)
    future = found_of([q, k.at[:, 768:].set(jnp.nan), v, dout], document, sizes)
    np.testing.assert_array_equal(future[0][:, 512:768], found[0][:, 512:768])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((512, 100), "multiple of 128"),
        ((512, 384), "multiple"),
        ((512, 256, 384, 128, 1536), "divide"),
        ((512, 256, 512, 256, 1000), "resident"),
    ],
)
def test_block_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        BlockSizes(*sizes)


@pytest.mark.parametrize("length", [1, 100, 512, 2048, 5000, 8192, 131072])
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("row_bytes", [128, 512, 1024])
def test_the_table_has_sizes_for_every_length(row_bytes: int, generation: str, length: int):
    sizes = tpu.block_sizes(generation, length, row_bytes)
    assert sizes.forward <= max(128, -(-length // 128) * 128) and sizes.resident <= 32768


# ---- where it runs ---------------------------------------------------------------------------------------------------


def test_flash_without_a_tpu_is_refused_and_auto_is_jnp():
    q, k, v, _ = draw(16, 2, 2, 8)
    with pytest.raises(ConfigError, match="attention.implementation='flash' runs on TPUs and NVIDIA GPUs since Ampere"):
        attend_causally(q, k, v, None, "flash")
    np.testing.assert_array_equal(attend_causally(q, k, v, None, "auto"), attend_causally(q, k, v))


def test_another_distribution_may_be_called_kernels(tmp_path: Path):
    """Hugging Face's is; ours is found all the same, and theirs too, from the root of the repository."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    code = "import k2jax.kernels.reference, kernels; print(kernels.WHOSE, k2jax.kernels.reference.__file__)"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.stdout.split() == ["theirs", str(REPOSITORY / "kernels" / "reference.py")], done.stderr


COMPILE = """
import sys
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax, jax.numpy as jnp
from compiled_step import compiled_step, small
from k2jax.kernels.flash_attention import flash_attention
from k2jax.kernels.flash_attention_tpu import block_sizes
for generation, (smallest, _, _) in topologies.GENERATIONS.items():
    device = topologies.tpu_devices(smallest)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    largest = block_sizes(generation, 16384, 2 * 128).resident
    cases = (jnp.bfloat16, largest, 128, True), (jnp.float32, 500, 256, False)
    for dtype, T, H, documents in cases:
        q = jax.ShapeDtypeStruct((1, T, 2, H), dtype, sharding=place)
        k = jax.ShapeDtypeStruct((1, T, 1, H), dtype, sharding=place)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place) if documents else None
        sizes = block_sizes(generation, T, H * dtype.dtype.itemsize)
        loss = lambda q, k, ids: flash_attention(q, k, k, ids, sizes=sizes).astype(jnp.float32).sum()
        jax.jit(jax.grad(loss, (0, 1))).lower(q, k, ids).compile()
    print(generation)
c = small(head_dim=64)
c.mesh.fsdp, c.mesh.tensor = 2, 2
text = compiled_step(c, topologies.tpu_devices("v5p:2x2x1"))
print("kernels in the step:", text.count('custom_call_target="tpu_custom_call"'))
"""


@on_tpu_compiler
def test_it_compiles_for_every_tpu_and_within_a_sharded_step(tmp_path: Path):
    *generations, last = run_compiling(COMPILE, tmp_path).splitlines()
    assert generations == ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert last == "kernels in the step: 2", "forward and backward, one each in the loops over layers"


# ---- cycles ----------------------------------------------------------------------------------------------------------


def test_cycles_are_counted_by_part():
    """10 bundles, a loop of 4 among them that runs 6 times, whose products may take longer than its bundles."""
    parts = (bundles.Part(0, 10, False), bundles.Part(3, 7, True))
    rows = (0,) * 3 + (16,) * 4 + (0,) * 3
    program = bundles.Program("p", parts, ((0,),) * 10, {}, rows, 0)
    assert bundles.cycles(program, [1, 6], rows_per_cycle=16) == 6 + 6 * 4
    assert bundles.cycles(program, [1, 6], rows_per_cycle=4) == 6 + 6 * 16
    with pytest.raises(ValueError, match="2 parts .if of 10, loop of 4., 1 were expected"):
        bundles.cycles(program, [1], 4)


@on_tpu_compiler
def test_the_compilers_bundles_are_counted(tmp_path: Path):
    """On v5p, at K2's length: no less than the arithmetic takes, and less than nine tenths of splash attention."""
    sys.path.insert(0, str(REPOSITORY / "tools" / "bench"))
    try:
        import tpu_kernel_cost
    finally:
        sys.path.pop(0)
    sizes = tpu.block_sizes("v5p", 2048, 256)
    blocks = [sizes.forward, sizes.forward_strip, sizes.backward, sizes.backward_strip]
    case = {"generation": "v5p", "length": 2048}
    ours = tpu_kernel_cost.cost(case | {"kernel": "flash", "blocks": blocks})
    theirs = tpu_kernel_cost.cost(case | {"kernel": "splash", "blocks": [1024, 1024, 512]})  # its best forward
    for direction, line in ours.items():
        assert 0.5 < line["matrix_unit_share"] < 1, direction
        assert line["cycles"] < 0.9 * theirs[direction]["cycles"], direction
