"""Flash attention for GPUs against plain jnp in float64, in interpret mode; compiled for GPUs that are not here.

What only a GPU can tell (numerics on its matrix units, speed) is tools/bench/gpu_suite.py's.
"""

import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_gpu_compiler, run_compiling
from k2jax.kernels.flash_attention import merge
from k2jax.kernels.triton_block_sizes import BlockSizes, Cut
from test_flash_attention import documents_of, draw, expected_of, found_of, heads_first, one_program

from k2jax.errors import ConfigError
from k2jax.kernels import flash_attention_triton as triton
from k2jax.kernels import mosaic_block_sizes, reference, triton_block_sizes
from k2jax.model.attention import attend_causally

SMALL = BlockSizes(Cut(64, 32, 4, 1), Cut(32, 64, 4, 1), Cut(64, 64, 4, 1))  # 200 positions are four blocks and a rest
WIDE = BlockSizes(Cut(32, 128, 4, 1), Cut(128, 32, 4, 1), Cut(32, 128, 4, 1))  # a block sees parts of some others


forward, backward = one_program(triton.forward), one_program(triton.backward)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("T", "N", "K", "H", "sizes"),
    [(200, 4, 2, 64, SMALL), (1, 1, 1, 128, SMALL), (129, 2, 2, 256, WIDE), (200, 2, 1, 96, WIDE)],
)
def test_values_and_gradients_are_the_references(T, N, K, H, sizes, masked):
    """Grouped heads, one head, one position, odd lengths, heads of 64 to 256 and not of a power of two."""
    arrays, document_BT = draw(T, N, K, H), documents_of(T) if masked else None
    for ours, theirs in zip(found_of(arrays, document_BT, sizes), expected_of(arrays, document_BT), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_as_near_as_its_rounding():
    arrays, document_BT = draw(200, 2, 1, 64, jnp.bfloat16), documents_of(200)
    for ours, theirs in zip(found_of(arrays, document_BT, SMALL), expected_of(arrays, document_BT), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2**-7 * np.abs(theirs).max()


def part(arrays, rows: slice, keys: slice, documents=None, causal=False):
    """The forward kernel on some queries and some keys: (out_BNTH, lse_BN1T)."""
    q, k, v = heads_first(arrays)
    q = q * (triton.LOG2_E * q.shape[-1] ** -0.5)
    options = {"sizes": SMALL, "causal": causal, "out_dtype": jnp.float32, "interpret": True}
    return jax.device_get(forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], documents, **options))


def test_a_query_that_sees_no_key_has_no_output_and_no_weight():
    """Queries of documents 1 and 2 past keys of documents 0 and 1: in full, and put together with what they do see."""
    arrays = draw(256, 2, 1, 64)
    document = np.repeat([[0, 1, 2]] * 2, [100, 128, 28], axis=1).astype(np.int32)
    first, second = slice(0, 128), slice(128, 256)
    out, lse = part(arrays, second, first, (document[:, second], document[:, first]))
    assert (out[:, :, 100:] == 0).all() and (lse[..., 100:] == triton.MASKED).all() and (lse[..., :100] > -1e3).all()
    own = part(arrays, second, second, (document[:, second], document[:, second]), causal=True)
    together, lse = jax.device_get(jax.jit(merge)([(out, lse), own]))
    expected, expected_lse_BNT = jax.device_get(jax.jit(reference.attention)(*arrays[:3], (document, document)))
    np.testing.assert_allclose(together.transpose(0, 2, 1, 3), expected[:, second], atol=2e-5)
    np.testing.assert_allclose(lse[:, :, 0] / triton.LOG2_E, expected_lse_BNT[..., second], atol=2e-5)
    # Numbers 4 and 6 around the queries' 5: by their range alone the blocks could meet, and are computed.
    strangers = np.full((2, 128), 5, np.int32), np.tile(np.array([4, 6], np.int32), (2, 64))
    out, lse = part(arrays, second, first, strangers)
    assert not out.any() and (lse == triton.MASKED).all()
    dq, dk, dv = backward(
        *(x[:, :, s] for x, s in zip(heads_first(arrays), (second, first, first), strict=True)),
        strangers, lse, np.zeros_like(lse), np.ones_like(out),
        sizes=SMALL, causal=False, out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    assert not dq.any() and not dk.any() and not dv.any(), "no query sees any key"


def test_blocks_that_are_masked_whole_are_not_computed():
    """Not even multiplied by 0: not-a-number in their keys and values, or in their queries' gradients, stays there."""
    q, k, v, dout = draw(256, 1, 1, 64, B=1)
    document = jnp.asarray(np.repeat([[0, 1]], [128, 128], axis=1), jnp.int32)
    lost = slice(0, 128)
    bad = [q, k.at[:, lost].set(jnp.nan), v.at[:, lost].set(jnp.nan), dout.at[:, lost].set(0.0)]
    found = found_of(bad, document, SMALL)
    assert all(np.isfinite(x[:, 128:]).all() for x in found)
    future = found_of([q, bad[1].at[:, 192:].set(jnp.nan), *bad[2:]], document, SMALL)
    np.testing.assert_array_equal(future[0][:, 128:192], found[0][:, 128:192])
    # Keys and values of document 1 past queries of document 0, and the other way round in the gradient of the keys.
    bad = [q.at[:, 128:].set(jnp.nan), k, v, dout.at[:, 128:].set(jnp.nan)]
    assert all(np.isfinite(x[:, :128]).all() for x in found_of(bad, document, SMALL))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((48, 32, 4, 1), "queries=48 must be a power of two"),
        ((64, 8, 4, 1), "keys=8 must be a power of two, 16 or more"),
        ((64, 64, 3, 1), "warps=3"),
        ((64, 64, 4, 0), "stages=0"),
    ],
)
def test_cuts_that_cannot_be_are_refused(cut, message):
    with pytest.raises(ValueError, match=message):
        Cut(*cut)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 3090"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_table_has_sizes_that_divide_chunks_of_a_row(itemsize: int, kind: str, head_dim: int):
    """Ring attention's chunks are multiples of 128."""
    assert 128 % triton_block_sizes.block_sizes(kind, head_dim, itemsize).unit == 0


def test_each_generation_has_blocks_of_its_own():
    kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB", "NVIDIA L4")
    found = [triton_block_sizes.block_sizes(kind, 128, 2) for kind in kinds]
    expected = [triton_block_sizes.TABLE[generation, False] for generation in ("hopper", "hopper", "a100", "other")]
    assert found == expected and len(set(expected)) == 3


# ---- where it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch):
    """Makes attention believe that it is on a device of that kind, with kernels that give back their own names."""

    def ours(*arrays, sizes=None) -> str:
        return "mosaic" if isinstance(sizes, mosaic_block_sizes.BlockSizes) else "flash"

    def pretend(kind: str) -> None:
        monkeypatch.setattr("k2jax.parallel.sharding.device_kind", lambda: kind)
        monkeypatch.setattr("k2jax.kernels.flash_attention.flash_attention", ours)
        monkeypatch.setattr("jax.nn.dot_product_attention", lambda *arrays, is_causal, implementation: implementation)

    return pretend


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "masked", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 128, False, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 128, False, "cudnn"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 256, False, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 256, False, "flash"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 128, True, "mosaic"),
        ("NVIDIA H200", jnp.float16, 256, True, "mosaic"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 128, True, "flash"),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 128, True, "flash"),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 128, False, "flash"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 100, False, "mosaic"),
        ("TPU v5p", jnp.bfloat16, 128, False, "flash"),
    ],
)
def test_auto_is_the_fastest_that_can(on_device, kind, dtype, head_dim, masked, chosen):
    q, k, v, _ = draw(16, 2, 2, head_dim, dtype)
    on_device(kind)
    assert attend_causally(q, k, v, documents_of(16) if masked else None, "auto") == chosen


def test_auto_is_flash_on_hopper_where_devices_share_rows(on_device, monkeypatch):
    """Ring attention by mosaic was not measured."""
    q, k, v, _ = draw(16, 2, 2, 64, jnp.bfloat16)
    on_device("NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("k2jax.parallel.context.size", lambda: 2)
    monkeypatch.setattr("k2jax.model.attention._ring", lambda implementation, q: implementation)
    monkeypatch.setattr("k2jax.model.attention._on_each_device", lambda ring, *arrays: ring)
    assert attend_causally(q, k, v, documents_of(16), "auto") == "flash"


def test_auto_is_jnp_on_gpus_before_ampere(on_device):
    """Colab's T4, which has no kernel of ours and none of cuDNN's: JAX calls it by its name, without NVIDIA's."""
    q, k, v, _ = draw(16, 2, 2, 64, jnp.float32)
    on_device("Tesla T4")
    assert isinstance(attend_causally(q, k, v, None, "auto"), jax.Array)


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "masked", "message"),
    [
        ("cpu", jnp.bfloat16, 128, False, "runs on NVIDIA GPUs, this is cpu"),
        ("AMD Instinct MI300X", jnp.bfloat16, 128, False, "runs on NVIDIA GPUs, this is AMD"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 128, True, "masks no documents .*take 'auto'"),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 128, False, "this is float32 .*take 'flash'"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 256, False, "multiple of 8, here 128 at most"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 264, False, "multiple of 8, here 256 at most"),
    ],
)
def test_cudnn_is_refused_where_it_cannot(on_device, kind, dtype, head_dim, masked, message):
    q, k, v, _ = draw(16, 2, 2, head_dim, dtype)
    on_device(kind)
    with pytest.raises(ConfigError, match=f"implementation='cudnn' .*{message}"):
        attend_causally(q, k, v, documents_of(16) if masked else None, "cudnn")


@pytest.mark.parametrize(
    ("kind", "head_dim", "message"),
    [("Tesla V100-SXM2-16GB", 64, "since Ampere, this is Tesla"), ("NVIDIA H100 80GB HBM3", 264, "256 at most")],
)
def test_flash_is_refused_where_it_cannot(on_device, kind: str, head_dim: int, message: str):
    q, k, v, _ = draw(16, 2, 2, head_dim, jnp.bfloat16)
    on_device(kind)
    with pytest.raises(ConfigError, match=f"implementation='flash' .*{message}"):
        attend_causally(q, k, v, None, "flash")


COMPILE = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax, jax.numpy as jnp
from compiled_step import compiled_step, small
from k2jax.parallel import sharding
from k2jax.model.attention import attend_causally
def kernels(text):
    return [text.count('custom_call_target="' + name) for name in ("__gpu$xla.gpu.triton", "__cudnn$fmha")]
def smallest():
    text = (topologies.Path(topologies.__file__).parent / "a100.txtpb").read_text()
    text = text.replace("optin: 166912", "optin: 101376").replace("per_core: 167936", "per_core: 102400")
    text = text.replace("A100-SXM4-80GB", "GeForce RTX 3090")
    from jax.experimental.topologies import get_topology_desc
    return get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=text).devices
c = small(head_dim=64)
for gpu in (*topologies.GPUS, "smallest"):
    mesh = sharding.make_mesh(c.mesh, smallest() if gpu == "smallest" else topologies.devices(gpu + ":1"))
    place = jax.sharding.NamedSharding(mesh, jax.P())
    cases = [("flash", jnp.bfloat16, 2048, 128, True), ("flash", jnp.bfloat16, 500, 64, False)]
    cases += [("flash", jnp.bfloat16, 500, 256, True), ("flash", jnp.float32, 128, 64, False)]
    cases += [("cudnn", jnp.bfloat16, 2048, 128, False), ("auto", jnp.bfloat16, 500, 64, False)]
    for implementation, dtype, T, H, documents in cases:
        q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype, sharding=place) for heads in (2, 1))
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place) if documents else None
        loss = lambda q, k, ids: attend_causally(q, k, k, ids, implementation).astype(jnp.float32).sum()
        with jax.set_mesh(mesh):
            print(gpu, implementation, *kernels(jax.jit(jax.grad(loss, (0, 1))).lower(q, k, ids).compile().as_text()))
c.mesh.fsdp, c.mesh.tensor = 4, 2
for c.model.attention.implementation in ("flash", "auto"):
    text = compiled_step(c, topologies.devices("h100:8"))
    print("step", c.model.attention.implementation, *kernels(text))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(what COMPILE printed, the folder where XLA left its PTX)."""
    folder = tmp_path_factory.mktemp("compiled")
    return run_compiling(COMPILE, folder, {"XLA_FLAGS": f"--xla_dump_to={folder}"}).splitlines(), folder


@on_gpu_compiler
def test_it_compiles_for_gpus_that_are_not_here_and_within_a_sharded_step(compiled: tuple[list[str], Path]):
    """Three kernels of ours, one forward and two backward, or two of cuDNN's; in a step, as many for each layer.

    The smallest GPU is an A100 with the name and the shared memory of an RTX 3090.
    """
    of_one = ["flash 3 0"] * 4 + ["cudnn 0 2", "auto 0 2"]
    expected = [f"{gpu} {line}" for gpu in ("h100", "a100", "smallest") for line in of_one]
    assert compiled[0] == [*expected, "step flash 6 0", "step auto 0 4"]


@on_gpu_compiler
def test_kernels_of_the_table_spill_next_to_no_register_and_hoppers_use_wgmma(compiled: tuple[list[str], Path]):
    """By the word of ptxas, for each kernel that was compiled; those of float32 are for tests, not for speed."""
    import nvidia  # a namespace: the plugin's CUDA

    [ptxas] = [path for root in nvidia.__path__ for path in Path(root).glob("cu*/bin/ptxas")]
    kernels = [p for p in compiled[1].glob("*.ptx") if ".entry flash_attention" in p.read_text()]
    assert len(kernels) == 3 * 4 * 3 + 3
    for path in kernels:
        text = path.read_text()
        [target] = re.findall(r"^\.target (\w+)", text, re.M)
        command = [ptxas, "--verbose", f"--gpu-name={target}", path, "--output-file=/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        in_bfloat16 = "bf16" in text
        assert not in_bfloat16 or int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 32, f"{path.name}: {said}"
        assert ("wgmma.mma_async" in text) == (target == "sm_90a" and in_bfloat16), path.name
