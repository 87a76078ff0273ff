"""Rows that devices share: ring attention is one device's attention, and nothing of a row is ever put together."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from k2jax.kernels.flash_attention_tpu import BlockSizes
from test_sharding import small

from k2jax.errors import ConfigError
from k2jax.kernels import flash_attention, reference, ring_attention, triton_block_sizes
from k2jax.model import attention
from k2jax.model.attention import _on_each_device, attend_causally
from k2jax.model.decoder import parameter_table
from k2jax.parallel import context, sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import check_mesh, place_state
from k2jax.training.program import batch_shapes, step_function

MESHES = [
    {"context": 2},
    {"context": 4},
    {"context": 8},
    {"fsdp": 2, "context": 4},
    {"replica": 2, "context": 2, "tensor": 2},
]


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh({"fsdp": 1, **sizes}, jax.devices()[: int(np.prod(list(sizes.values())))])


def draw(T: int, N: int, K: int, H: int, B: int = 2) -> tuple[list[jax.Array], jax.Array]:
    """(q, k, v, dout), and documents of some 20 positions."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)]
    return arrays, jnp.asarray(np.cumsum(random.random((B, T)) < 0.05, axis=1), jnp.int32)


def values_and_gradients(attend, arrays: list[jax.Array], document_BT: jax.Array | None) -> list[jax.Array]:
    *qkv, dout = arrays
    out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, document_BT), *qkv)
    return [out, *backward(dout)]


@jax.jit  # once for all tests with the same shapes
def on_one_device(arrays: list[jax.Array], document_BT: jax.Array | None) -> list[jax.Array]:
    return values_and_gradients(attend_causally, arrays, document_BT)


def around_the_ring(attend, sizes: dict[str, int], arrays: list[jax.Array], document_BT: jax.Array | None):
    """The same of whole rows through `attend` on a mesh whose devices share them, positions put back in order."""

    def run(arrays: list[jax.Array], document_BT: jax.Array | None) -> list[jax.Array]:
        placed = jax.tree.map(lambda x: context.in_order(x, 1), (arrays, document_BT))
        return values_and_gradients(attend, *placed)

    with jax.set_mesh(mesh_of(sizes)):
        at = np.argsort(context.in_order(jnp.arange(arrays[0].shape[1]), 0))
        return [np.asarray(x)[:, at] for x in jax.jit(run)(arrays, document_BT)]


@pytest.mark.parametrize("masked", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_one_device(sizes: dict[str, int], masked: bool):
    """With heads that share keys and values, and documents that lie across devices."""
    arrays, document_BT = draw(T=64, N=4, K=2, H=8)
    document_BT = document_BT if masked else None
    expected = on_one_device(arrays, document_BT)
    for ours, theirs in zip(around_the_ring(attend_causally, sizes, arrays, document_BT), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_bfloat16_is_as_near_as_its_rounding():
    """What goes round is added up in float32."""
    arrays, document_BT = draw(T=64, N=4, K=2, H=8)
    expected = on_one_device(arrays, document_BT)
    arrays = [x.astype(jnp.bfloat16) for x in arrays]
    found = around_the_ring(attend_causally, {"context": 4}, arrays, document_BT)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(ours.astype(np.float32) - theirs).max() < 2**-6 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "sizes",
    [BlockSizes(128, 128, 128, 128, 128), triton_block_sizes.BlockSizes(*[triton_block_sizes.Cut(64, 32, 4, 1)] * 3)],
    ids=["tpu", "gpu"],
)
def test_the_flash_kernels_are_parts_of_the_ring(sizes: flash_attention.BlockSizes):
    """In interpret mode; chunks of 128 positions, on TPU a device's two in two resident parts."""
    arrays, document_BT = draw(T=512, N=2, K=1, H=8, B=1)
    options = flash_attention.Options(sizes, interpret=True)
    forward = partial(flash_attention.forward_by_parts, options=options)
    backward = partial(flash_attention.backward_by_parts, options=options)
    ring = partial(ring_attention.ring_attention, parts=ring_attention.Parts(forward, backward))

    def attend(*arrays: jax.Array) -> jax.Array:
        return _on_each_device(ring, *arrays, jnp.arange(2))

    found = around_the_ring(attend, {"context": 2}, arrays, document_BT)
    expected = on_one_device(arrays, document_BT)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 4])
def test_every_device_does_the_same_work_and_none_that_is_masked(devices: int):
    """Pairs of a query and a key, counted by each device as it computes them."""
    T, pairs = 16 * devices, dict.fromkeys(range(devices), 0)

    def forward(q, k, v, documents, *, causal):
        def count(device: np.ndarray) -> None:
            pairs[int(device)] += q.shape[2] * k.shape[2] // (2 if causal else 1)

        jax.debug.callback(count, jax.lax.axis_index("context"))
        return reference.forward(q, k, v, documents, causal=causal)

    ring = partial(ring_attention.ring_attention, parts=ring_attention.Parts(forward, reference.backward))
    arrays, _ = draw(T, 1, 1, 8, B=1)
    with jax.set_mesh(mesh_of({"context": devices})):
        jax.jit(partial(_on_each_device, ring))(*arrays[:3], None, jnp.arange(devices)).block_until_ready()
        jax.effects_barrier()
    assert set(pairs.values()) == {T * T // 2 // devices}


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [64, 2048], ids=["more tokens than words", "fewer"])
def test_the_step_gathers_no_hidden_states(vocab_size: int):
    """Only parameters are gathered: nothing that has a dimension of a row, of a batch or of a block of the loss."""
    c, plan = small()
    with c.unlocked():
        c.stages[0].sequence_length, c.stages[0].rows_per_step, c.loss.block = 112, 12, 9
        c.model.vocab_size, c.model.mask_documents, c.model.remat = vocab_size, False, "full"
    mesh = sharding.make_mesh({"fsdp": 2, "context": 4})
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
        step = step_function(c, plan, place_state(c, shapes, mesh), mesh, eos_id=2, num_subsets=2)
        text = step.lower(shapes, batch_shapes(c, c.stages[0])).compile().as_text()
    of_parameters = {size for p in parameter_table(c.model).values() for size in p.shape} | {1}
    of_parameters |= {c.model.dim // part for part in (2, 4, 8)}  # gathered over one mesh axis after the other
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-to-all)(?:-start)?\(", text)
    assert found, "the parameters are gathered"
    for shape, kind in found:
        assert {int(size) for size in shape.split(",")} <= of_parameters, f"{kind} of ({shape})"
    assert "collective-permute" in text


def test_a_length_that_cannot_be_cut_is_refused():
    c, _ = small()
    mesh = sharding.make_mesh({"fsdp": 2, "context": 4})
    check_mesh(c, mesh)
    with c.unlocked():
        c.stages[0].sequence_length = 20
    with pytest.raises(ConfigError, match="stages.0: sequence_length=20 is not divisible by 2 x mesh.context = 8"):
        check_mesh(c, mesh)


def test_a_length_that_the_kernels_cannot_cut_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention.sharding, "kernel_platform", lambda: "tpu")
    arrays, _ = draw(T=64, N=1, K=1, H=8)
    with jax.set_mesh(mesh_of({"context": 2})), pytest.raises(ConfigError, match="mesh.context=2 are chunks of 16"):
        jax.eval_shape(partial(attend_causally, implementation="auto"), *arrays[:3])


# ---- compiled for TPUs that are not here ----------------------------------------------------------------------------

TINY = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax
from k2jax import config
from k2jax.parallel import sharding
from k2jax.training.placement import check_mesh, place_state
from k2jax.training.program import batch_shapes, compile_lowered, step_function
from k2jax.plan import estimate

for context, masked in ((4, True), (2, False)):
    c = config.base().unlock()
    c.model.update(vocab_size=512, dim=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128, ffn_dim=512)
    c.model.mask_documents, c.model.remat = masked, "full"
    c.mesh.context = context
    c.stages = (config.stage(mix={"x": 1}, sequence_length=1024, rows_per_step=4),)
    mesh = sharding.make_mesh(c.mesh, topologies.devices("v5p:2x2x1"))
    check_mesh(c, mesh)
    with jax.set_mesh(mesh):
        text = compile_lowered(estimate.lower(c, 0, mesh), c).as_text()
    print(text.count('custom_call_target="tpu_custom_call"'))
    open(f"{context}.hlo", "w").write(text)
"""


@on_tpu_compiler
def test_the_tpu_sends_what_comes_next_while_it_computes(tmp_path: Path):
    """With the kernels; between a transfer's start and its end stands a turn's arithmetic, forward and backward."""
    kernels = run_compiling(TINY, tmp_path).split()
    assert kernels == ["15", "9"], "5 or 3 kernels, in the forward pass, again, and backward"
    text = (tmp_path / "4.hlo").read_text()
    loops = [body for body in text.split("\n\n") if "collective-permute-start" in body and " conditional(" in body]
    turns = [re.findall(r" (collective-permute-start|collective-permute-done|conditional)\(", body) for body in loops]
    overlapped = [turn for turn in turns if turn.index("conditional") < turn.index("collective-permute-done")]
    found = [turn for turn in overlapped if turn.index("collective-permute-start") < turn.index("conditional")]
    assert len(found) >= 3, turns
