"""The pipeline computes what the model computes without one, in the turns that it says, and moves what it must."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from ml_collections import ConfigDict
from test_sharding import assert_same_series

from k2jax import config as configuration
from k2jax.data.order import StagePlan
from k2jax.errors import ConfigError
from k2jax.parallel import pipeline, sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.state import TrainState
from k2jax.training.optimizer import init_state
from k2jax.training.placement import check_mesh, make_state, place_batches, place_state
from k2jax.training.program import batch_shapes, step_function
from k2jax.training.step import Batch

ROWS, LENGTH, STEPS, FFN = 16, 16, 10, 44  # no other dimension is 44
CASES = {  # mesh, model.pipeline, what else
    "2 stages": ({"stage": 2}, (2, 1), {}),
    "4 stages, more microbatches": ({"stage": 4, "fsdp": 2}, (8, 1), {"remat": "full"}),
    "4 stages twice": ({"stage": 4, "tensor": 2}, (4, 2), {"remat": "dots"}),
    "2 stages 4 times": ({"stage": 2, "replica": 2, "fsdp": 2}, (2, 4), {"accumulation": 2}),
    "rows shared": ({"stage": 2, "context": 2, "tensor": 2}, (2, 2), {"remat": "q+up"}),
}


def small(
    microbatches: int = 4, repeats: int = 1, *, layers: int = 8, remat: str = "none", accumulation: int = 1
) -> ConfigDict:
    c = configuration.base().copy_and_resolve_references()
    with c.unlocked():
        c.model.update(
            vocab_size=64, dim=32, num_layers=layers, num_heads=8, num_kv_heads=8, head_dim=4, ffn_dim=FFN, remat=remat
        )
        c.model.pipeline.update(microbatches=microbatches, repeats=repeats)
        c.model.mask_documents = True
        c.stages = (
            configuration.stage(
                sequence_length=LENGTH,
                rows_per_step=ROWS,
                microbatches=accumulation,
                steps_per_chunk=STEPS,
                chunks=1,
                lr_peak=1e-2,
                lr_final=1e-3,
                warmup_steps=2,
                mix={"a": 1},
            ),
        )
    return c.lock()


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def placed_state(c: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[TrainState, TrainState]:
    shapes = jax.eval_shape(partial(init_state, c.model, c.seed))
    return shapes, place_state(c, shapes, mesh)


def step_of(c: ConfigDict, mesh: jax.sharding.Mesh, shardings: TrainState):
    plan = StagePlan("stage1", 0, LENGTH, ROWS, STEPS, 1, 0, ROWS * STEPS, 1, STEPS)
    return step_function(c, plan, shardings, mesh, eos_id=2, num_subsets=1)


def run(c: ConfigDict, sizes: dict[str, int]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What the first ten steps tell; the first one's gradients, as Adam's first moment has them: times a number."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        check_mesh(c, mesh)
        _, shardings = placed_state(c, mesh)
        state, step = make_state(c, shardings), step_of(c, mesh, shardings)
        placement = place_batches(c.stages[0], mesh)
        draw, found, first = np.random.default_rng(0), [], {}
        for _ in range(STEPS):
            rows = {"tokens": draw.integers(0, 64, (ROWS, LENGTH + 1), np.int32) ** 2 // 63}
            rows |= {"subset": np.zeros(ROWS, np.int32), "digest": np.zeros((ROWS, 8), np.uint32)}
            state, metrics = step(state, placement.globalize(rows))
            found.append(jax.device_get(metrics))
            first = first or jax.device_get(state.mu)
    return found, first


@pytest.fixture(scope="module")
def without_pipeline() -> tuple[list[dict], dict[str, np.ndarray]]:
    return run(small(), {"fsdp": 1})


@pytest.mark.parametrize("case", CASES)
def test_losses_and_every_gradient_are_those_without_a_pipeline(case: str, without_pipeline):
    sizes, (microbatches, repeats), other = CASES[case]
    steps, gradients = run(small(microbatches, repeats, **other), sizes)
    expected_steps, expected = without_pipeline
    losses, expected_losses = ([float(metrics["loss"]) for metrics in of] for of in (steps, expected_steps))
    assert losses[-1] < losses[0] - 0.05, "nothing was learned: the comparison would show nothing"
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    assert_same_series(steps[0], expected_steps[0])
    for name, value in expected.items():
        scale = np.abs(value).max()
        assert scale > 0
        np.testing.assert_allclose(gradients[name] / scale, value / scale, rtol=0, atol=1e-5, err_msg=name)


# ---- the schedule ----------------------------------------------------------------------------------------------------


def affine(x_BTD: jax.Array, arrays: dict, rope: jax.Array, document_BT: jax.Array) -> jax.Array:
    """A layer whose order counts, as does which row meets which document ids."""
    return x_BTD * arrays["a"] + arrays["b"] * rope + document_BT[..., None] * 0.5


@pytest.mark.parametrize(
    ("sizes", "microbatches", "repeats"),
    [({"stage": 4}, 4, 2), ({"stage": 2, "fsdp": 2}, 6, 4), ({"stage": 4, "replica": 2}, 8, 4), ({"stage": 8}, 8, 2)],
)
def test_every_row_passes_every_layer_in_its_order(sizes: dict, microbatches: int, repeats: int):
    """In R M + S - 1 turns. Each row with its own document ids."""
    layers, rows = 2 * sizes["stage"] * repeats, microbatches * 4
    m = small(microbatches, repeats).model
    draw = np.random.default_rng(0)
    x, ids = draw.normal(size=(rows, 3, 5)), draw.integers(0, 9, (rows, 3))
    arrays = {"a": draw.uniform(0.9, 1.1, layers), "b": draw.normal(size=layers)}
    with jax.set_mesh(mesh_of(sizes)), jax.enable_x64(True):
        program = jax.jit(partial(pipeline.run_layers, affine, jax.checkpoint, m=m))
        arguments = [jnp.asarray(x), jax.tree.map(jnp.asarray, arrays), jnp.float64(2.0), jnp.asarray(ids)]
        found = program(*arguments)
        turns = re.findall(r" length=(\d+)", str(jax.make_jaxpr(program)(*arguments)))
    for a, b in zip(arrays["a"], arrays["b"], strict=True):
        x = affine(x, {"a": a, "b": b}, 2.0, ids)
    np.testing.assert_allclose(found, x, rtol=1e-12)
    assert turns.count(str(repeats * microbatches + sizes["stage"] - 1)) == 1 and len(turns) == 2
    assert str(pipeline.num_turns(sizes["stage"], repeats, microbatches)) in turns


def test_the_bubble_is_the_share_of_turns_without_an_item():
    for stages, p, expected in ((4, (8, 1), 3 / 11), (4, (8, 2), 3 / 19), (1, (8, 1), 0)):
        sizes = {"stage": stages}
        assert pipeline.bubble_fraction(small(*p), mesh_of(sizes)) == pytest.approx(expected)


def test_stages_pass_activations_on_and_gather_no_parameters():
    """With stages alone on the mesh, so that whatever is sent is sent between stages."""
    for repeats in (1, 2):
        c, mesh = small(4, repeats), mesh_of({"stage": 4})
        with jax.set_mesh(mesh):
            shapes, shardings = placed_state(c, mesh)
            batch = batch_shapes(c, c.stages[0])
            text = step_of(c, mesh, shardings).lower(shapes, Batch(*batch)).compile().as_text()
        assert "{{0,1},{1,2},{2,3},{3,0}}" in text and "{{1,0},{2,1},{3,2},{0,3}}" in text, "there and back"
        gathered = re.findall(r" = \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", text)
        assert not [shape for shape in gathered if str(FFN) in shape or "8,4" in shape], gathered
        assert (" all-to-all(" in text) == (repeats > 1), "layers change their place for rounds alone"
        logits = re.findall(r" = f32\[([\d,]*),64\]\S* dot\(", text)
        assert logits and all(np.prod([int(n) for n in s.split(",")]) <= ROWS * LENGTH / 4 for s in logits), logits


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_turn_keeps_a_copy_of_its_layers_parameters(remat: str):
    """11 turns of 2 layers: what the backward pass finds of them all has the size of activations."""
    c, mesh = small(4, 2, layers=16, remat=remat), mesh_of({"stage": 4})
    with jax.set_mesh(mesh):
        shapes, shardings = placed_state(c, mesh)
        text = str(step_of(c, mesh, shardings).trace(shapes, batch_shapes(c, c.stages[0])).jaxpr)
    kept = set(re.findall(r"f32\[11,2,([\d,]+)\]", text))
    assert kept and not kept & {"32,44", "44,32", "32,32", "32,8,4", "8,4,32"}, kept


# ---- checkpoints and refusals ----------------------------------------------------------------------------------------


def test_a_checkpoint_knows_no_stages(tmp_path: Path):
    """Saved without a pipeline, restored and saved on four stages, and back: the same arrays in the same order."""
    c = small(4, 2)
    state = kept = None
    for i, sizes in enumerate(({"fsdp": 2}, {"stage": 4, "fsdp": 2}, {"tensor": 2})):
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh):
            shapes, shardings = placed_state(c, mesh)
            if state is None:
                state = make_state(c, shardings)
                state = state._replace(mu=jax.device_put(state.params, shardings.mu))
                kept = jax.device_get(state)
            else:
                state = Checkpoints(tmp_path / str(i - 1)).restore(1, shardings, shapes)
            checkpoints = Checkpoints(tmp_path / str(i), [1])
            checkpoints.save(state, 1, data={"next_step": 2, "order": "x"}, meta={})
            checkpoints.wait()
            if "stage" in sizes:
                assert state.params["layers.wq_LDNH"].addressable_shards[0].data.shape == (2, 16, 8, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), kept)


@pytest.mark.parametrize(
    ("sizes", "numbers", "message"),
    [
        ({"stage": 4}, {"repeats": 4}, "model.num_layers=8: .* mesh.stage x model.pipeline.repeats = 4 x 4"),
        ({"stage": 2}, {"repeats": 3, "layers": 12}, "model.pipeline.repeats=3 must divide mesh.stage=2"),
        ({"stage": 4}, {"microbatches": 6}, "model.pipeline.microbatches=6 must be a multiple of mesh.stage=4"),
        ({"stage": 2, "fsdp": 4}, {"accumulation": 2}, "stages.0: .* gives 8, no multiple of .* = 16"),
        ({"stage": 2}, {"remat": "q+up@host"}, "model.remat='q.up@host': no .* by the host where mesh.stage=2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(sizes: dict, numbers: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_mesh(small(**numbers), mesh_of(sizes))


# ---- the TPU compiler ------------------------------------------------------------------------------------------------

COMPILE = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax
from k2jax import config
from k2jax.parallel import sharding
from k2jax.training.placement import check_mesh, make_state, place_batches, place_state
from k2jax.training.program import batch_shapes, step_function
from k2jax.data.order import StagePlan
from k2jax.training.optimizer import init_state
c = config.base().unlock()
c.model.update(vocab_size=512, dim=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=512)
c.model.update(mask_documents=True, remat="full")
c.model.pipeline.update(microbatches=4, repeats=2)
c.stages = (config.stage(mix={"x": 1}, sequence_length=256, rows_per_step=64),)
c.mesh.update(stage=2, fsdp=2, tensor=2)
c.precision.compute = "bfloat16"
mesh = sharding.make_mesh(c.mesh, topologies.tpu_devices("v5p:2x2x2"))
check_mesh(c, mesh)
plan = StagePlan("x", 0, 256, 64, 10, 1, 0, 640, 1, 10)
shapes = jax.eval_shape(lambda: init_state(c.model, 0))
placed = place_state(c, shapes, mesh)
with jax.set_mesh(mesh):
    step = step_function(c, plan, placed, mesh, eos_id=2, num_subsets=1)
    batch = batch_shapes(c, c.stages[0])
    print(step.lower(shapes, batch).compile().as_text())
"""


@on_tpu_compiler
def test_it_compiles_for_tpus_with_flash_attention(tmp_path: Path):
    """Flash attention's shard_map stands in the pipeline's; the rows of a microbatch stay split over fsdp."""
    text = run_compiling(COMPILE, tmp_path)
    kernels = text.count('custom_call_target="tpu_custom_call"')
    assert kernels == 3, "forward, forward again and backward, one each in the loops over layers"
    sent = re.findall(r"\((bf16\[\d+,256,256\])[^=]* collective-permute-start\(.*?source_target_pairs=(\S*),", text)
    assert sorted(sent) == [
        ("bf16[8,256,256]", "{{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}"),
        ("bf16[8,256,256]", "{{4,0},{0,4},{5,1},{1,5},{6,2},{2,6},{7,3},{3,7}}"),
    ]
    assert "bf16[16,256,256]{2,1,0:T(8,128)(2,1)} all-gather" not in text
