"""kernels/flash_attention_turned.py: against RoPE and plain jnp in float64, and in a layer; compiled for TPUs."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from jax.experimental.pallas import tpu as pltpu
from k2jax.kernels.flash_attention_tpu import BlockSizes
from k2jax.kernels.flash_attention_turned import takes, turned_attention
from test_flash_attention import documents_of, draw, values_and_gradients

from k2jax import config
from k2jax.kernels import reference
from k2jax.model import decoder
from k2jax.model.attention import attend_causally, attend_turned, turns_heads
from k2jax.parallel import sharding

SMALL = BlockSizes(256, 128, 256, 128, 1024)  # 300 positions are two blocks and a rest


def positions(T: int, H: int, rows: int | None) -> tuple[jax.Array, jax.Array]:
    """RoPE's table of a row, or of rows whose positions are their own, as documents that each begin at 0 have."""
    angle = np.random.default_rng(2).random((T, H // 2) if rows is None else (rows, T, H // 2)) * 6
    return jnp.cos(angle).astype(jnp.float32), jnp.sin(angle).astype(jnp.float32)


@partial(jax.jit, static_argnames=("sizes", "interpret"))
def found_of(arrays, rope, document_BT, sizes, interpret=True) -> tuple[jax.Array, ...]:
    def attend(q_BTNH, k_BTKH, v_BTKH):
        flat = (x.reshape(*x.shape[:2], -1) for x in (q_BTNH, k_BTKH, v_BTKH))
        options = {"head_dim": q_BTNH.shape[3], "sizes": sizes, "interpret": interpret}
        return turned_attention(*flat, rope, document_BT, **options).reshape(q_BTNH.shape)

    return values_and_gradients(attend, *arrays)


def expected_of(arrays, rope, document_BT) -> list[np.ndarray]:
    """In float64."""

    def attend(q, k, v, cos, sin):
        documents = None if document_BT is None else (document_BT, document_BT)
        return reference.attention(decoder.apply_rope(q, cos, sin), decoder.apply_rope(k, cos, sin), v, documents)[0]

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*arrays, *rope)]
        of = jax.jit(lambda q, k, v, dout, *rope: values_and_gradients(lambda *x: attend(*x, *rope), q, k, v, dout))
        return [np.asarray(x) for x in of(*wide)]


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "sizes", "masked", "own"),
    [
        (300, 4, 2, 128, SMALL, True, True),
        (256, 2, 2, 128, SMALL, False, False),
        (1, 1, 1, 128, SMALL, False, True),
        (600, 2, 1, 256, BlockSizes(256, 256, 128, 128, 1024), True, False),
    ],
)
def test_values_and_gradients_are_those_of_turned_heads(T, N, K, H, sizes, masked, own):
    """Grouped heads, odd lengths, two head dims; positions of all rows or of each; gradients before the turn."""
    arrays, rope = draw(T, N, K, H), positions(T, H, 2 if own else None)
    document_BT = documents_of(T) if masked else None
    found = found_of(arrays, rope, document_BT, sizes)
    for ours, theirs in zip(found, expected_of(arrays, rope, document_BT), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bfloat16_is_as_near_as_its_rounding():
    arrays, rope, document_BT = draw(300, 2, 1, 128, jnp.bfloat16), positions(300, 128, None), documents_of(300)
    found = found_of(arrays, rope, document_BT, SMALL)
    for ours, theirs in zip(found, expected_of(arrays, rope, document_BT), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() < 2**-7 * np.abs(theirs).max()


def test_no_race_in_the_kernels():
    """With the TPU's memories and transfers simulated: what a row's first step turns, its later ones read."""
    arrays, rope, document_BT = draw(300, 2, 1, 128), positions(300, 128, None), documents_of(300)
    found = found_of(arrays, rope, document_BT, SMALL, pltpu.InterpretParams(detect_races=True))
    for ours, theirs in zip(found, expected_of(arrays, rope, document_BT), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


# ---- in a layer ------------------------------------------------------------------------------------------------------


def model(**changes) -> config.ConfigDict:
    c = config.base().unlock()
    c.model.update(vocab_size=64, dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128, ffn_dim=64)
    c.model.update(changes)
    return c.model


ALL = {"qkv_bias": True, "qk_norm": True, "qk_norm_whole": True}


@pytest.mark.parametrize(("changes", "mesh"), [({}, {}), (ALL, {"fsdp": 2, "tensor": 2})], ids=["llama", "all"])
def test_a_layer_of_heads_side_by_side_is_the_layer(changes: dict, mesh: dict):
    """Output, and gradients of its input and of each weight, in the shape that the weight has."""
    m = model(**changes)
    params = {name: x[0] for name, x in decoder.init_params(m, 0).items() if name.startswith("layers.")}
    random = np.random.default_rng(3)
    params = {k.removeprefix("layers."): x + 0.1 * random.normal(size=x.shape).astype("f4") for k, x in params.items()}
    x_BTD = random.normal(size=(2, 256, 64)).astype("f4")
    rope, document_BT = positions(256, 128, None), documents_of(256)

    def apart(params, x_BTD):
        return decoder.Block(m, params)(x_BTD, rope, partial(attend_causally, document_BT=document_BT))

    def side_by_side(params, x_BTD):
        attend = partial(attend_turned, rope=rope, document_BT=document_BT, head_dim=128, interpret=True)
        return decoder.Block(m, params)(x_BTD, None, attend)

    def both(layer):
        loss = jax.jit(jax.value_and_grad(lambda *arrays: jnp.square(layer(*arrays)).mean(), (0, 1)))
        return jax.device_get(loss(params, x_BTD))

    expected = both(apart)
    devices = np.prod(list(mesh.values()), dtype=int)
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:devices])):
        found = both(side_by_side)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1))


def test_who_takes_heads_side_by_side():
    assert not turns_heads(model(), 256, jnp.float32), "no TPU"
    assert takes(128, 512, SMALL) and takes(256, 512, SMALL)
    assert not takes(64, 512, SMALL) and not takes(128, 513, SMALL)


COMPILE = """
import sys
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax, jax.numpy as jnp
from compiled_step import compiled_step, small
from k2jax.kernels.flash_attention_tpu import block_sizes
from k2jax.kernels.flash_attention_turned import turned_attention
for generation, (smallest, _, _) in topologies.GENERATIONS.items():
    place = jax.sharding.SingleDeviceSharding(topologies.tpu_devices(smallest)[0])
    largest = block_sizes(generation, 16384, 2 * 128).resident // 2
    for dtype, T, H, documents in ((jnp.bfloat16, largest, 128, True), (jnp.float32, 500, 256, False)):
        q, k = (jax.ShapeDtypeStruct((1, T, heads * H), dtype, sharding=place) for heads in (2, 1))
        angle = jax.ShapeDtypeStruct((T, H // 2), jnp.float32, sharding=place)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=place) if documents else None
        sizes = block_sizes(generation, T, H * dtype.dtype.itemsize)
        def loss(q, k, ids, angle):
            out = turned_attention(q, k, k, (angle, angle), ids, head_dim=H, sizes=sizes)
            return out.astype(jnp.float32).sum()
        jax.jit(jax.grad(loss, (0, 1))).lower(q, k, ids, angle).compile()
    print(generation)
c = small(head_dim=128)
c.mesh.fsdp, c.mesh.tensor = 2, 2
text = compiled_step(c, topologies.tpu_devices("v5p:2x2x1"))
for direction in ("forward", "backward"):
    print(direction, text.count(f"flash_attention_{direction}_turned") > 0)
print("other kernels:", text.count('custom_call_target="tpu_custom_call"') - 2)
"""


@on_tpu_compiler
def test_it_compiles_for_every_tpu_and_is_what_a_sharded_step_takes(tmp_path: Path):
    *generations, forward, backward, others = run_compiling(COMPILE, tmp_path).splitlines()
    assert generations == ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert (forward, backward, others) == ("forward True", "backward True", "other kernels: 0")


@on_tpu_compiler
def test_its_cycles_are_counted_and_turning_costs_few():
    """On v5p, at K2's length: every part of the program is known, and what it adds is less than XLA's passes take."""
    from k2jax.plan.kernels import blocks_of_table, flash_costs

    blocks = blocks_of_table("v5p", 2048, 128)
    plain, turned = flash_costs("v5p", 2048, 128, blocks), flash_costs("v5p", 2048, 128, blocks, turned=True)
    for direction in ("forward", "backward"):
        assert 1 < turned[f"{direction}_turned"][0] / plain[direction][0] < 1.25, direction
