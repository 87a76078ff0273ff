"""The same mathematics on every mesh, and a mesh that does not fit refused before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import config as configuration
from k2jax.data.order import StagePlan
from k2jax.errors import ConfigError
from k2jax.model.decoder import parameter_table
from k2jax.parallel import sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import check_mesh, make_state, mesh_of, place_batches, place_state
from k2jax.training.program import step_function

ROWS, LENGTH, STEPS = 16, 16, 10
AXES = ("replica", "fsdp", "context", "tensor")
MESHES = {
    "replica 8": (8, 1, 1, 1),
    "fsdp 8": (1, 8, 1, 1),
    "tensor 8": (1, 1, 1, 8),
    "fsdp 4 x tensor 2": (1, 4, 1, 2),
    "replica 2 x fsdp 4": (2, 4, 1, 1),
    "replica 2 x fsdp 2 x tensor 2": (2, 2, 1, 2),
    "context 8": (1, 1, 8, 1),
    "fsdp 2 x context 4": (1, 2, 4, 1),
    "replica 2 x fsdp 2 x context 2": (2, 2, 2, 1),
    "fsdp 2 x context 2 x tensor 2": (1, 2, 2, 2),
}
ACCUMULATED = [mesh for mesh, shape in MESHES.items() if sum(size > 1 for size in shape) > 2]  # all axes, three each


def small(microbatches: int = 1, rows: int = ROWS) -> tuple:
    c = configuration.base().copy_and_resolve_references()
    with c.unlocked():
        c.model.update(
            vocab_size=64, dim=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, ffn_dim=48
        )
        c.stages = (
            configuration.stage(
                sequence_length=LENGTH,
                rows_per_step=rows,
                microbatches=microbatches,
                steps_per_chunk=STEPS,
                chunks=1,
                lr_peak=1e-2,
                lr_final=1e-3,
                warmup_steps=2,
                mix={"a": 1, "b": 1},
            ),
        )
        c.model.mask_documents = True  # uneven numbers of targets, so that microbatches weigh unequally
        c.loss.block = 3  # the last of a row, or of a device's part of one, is filled up
    return c.lock(), StagePlan("stage1", 0, LENGTH, rows, STEPS, 1, 0, rows * STEPS, 1, STEPS)


def losses(*arguments, **others) -> list[float]:
    """Of the first ten steps."""
    return [float(metrics["loss"]) for metrics in ten_steps(*arguments, **others)]


def ten_steps(
    shape: tuple[int, ...],
    microbatches: int = 1,
    rings: tuple[int, ...] = (),
    rows: int = ROWS,
    products: str = "compute",
) -> list[dict]:
    """The metrics of the first ten steps, through the trainer's own placement and jit, on the first devices."""
    c, plan = small(microbatches, rows)
    with c.unlocked():
        c.model.rings, c.precision.products = rings, products
        c.mesh.update(dict(zip(AXES, shape, strict=True)))
    mesh = mesh_of(c, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
        shardings = place_state(c, shapes, mesh)
        state = make_state(c, shardings)
        step = step_function(c, plan, shardings, mesh, eos_id=2, num_subsets=2)
        placement = place_batches(c.stages[0], mesh)
        draw, found = np.random.default_rng(0), []
        for _ in range(STEPS):
            tokens = draw.integers(0, 64, (rows, LENGTH + 1), np.int32) ** 2 // 63
            batch = {"tokens": tokens, "subset": np.arange(rows, dtype=np.int32) % 2}
            batch["digest"] = draw.integers(0, 2**32, (rows, 8), np.uint32)
            state, metrics = step(state, placement.globalize(batch))
            found.append(jax.device_get(metrics))
        assert step._cache_size() == 1, "the second step compiled again"
        expected_digest = batch["digest"].sum(axis=0, dtype=np.uint32)
        np.testing.assert_array_equal(metrics["batch_digest"], expected_digest)
    return found


@pytest.fixture(scope="module")
def one_device() -> list[dict]:
    return ten_steps((1, 1, 1, 1))


def assert_same_series(found: dict, expected: dict) -> None:
    """Norms, ratios, logits of a step and all else that it tells, but for digests."""
    assert found.keys() == expected.keys() and found["layers"].keys() == expected["layers"].keys()
    for key, value in [*expected.items(), *expected["layers"].items()]:
        if key not in ("layers", "batch_digest"):
            other = found["layers"][key] if key in found["layers"] and np.ndim(value) else found[key]
            np.testing.assert_allclose(other, value, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("mesh", "microbatches"), [*((mesh, 1) for mesh in MESHES), *((mesh, 2) for mesh in ACCUMULATED)]
)
def test_first_ten_steps_are_the_same_on_every_mesh(mesh: str, microbatches: int, one_device: list[dict]):
    found = ten_steps(MESHES[mesh], microbatches)
    assert found[-1]["loss"] < found[0]["loss"] - 0.05, "nothing was learned: the comparison would show nothing"
    for metrics, expected in zip(found, one_device, strict=True):
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0, atol=1e-5)
    assert_same_series(found[0], one_device[0])


def test_parameters_are_split_as_the_table_says():
    c, _ = small()
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
    state = make_state(c, place_state(c, shapes, mesh))
    wq = state.params["layers.wq_LDNH"]
    assert wq.addressable_shards[0].data.shape == (2, 32 // 2, 8 // 2, 4)


@pytest.mark.parametrize("shape", list(MESHES.values()))
def test_moments_are_split_over_every_data_axis(shape: tuple[int, ...]):
    """Also where the parameters are copied: with replica 8 each device holds an eighth of every matrix's moments."""
    c, _ = small()
    mesh = sharding.make_mesh(dict(zip(AXES, shape, strict=True)))
    shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
    shardings = place_state(c, shapes, mesh)
    for name, p in parameter_table(c.model).items():
        if p.std is not None:
            part = shardings.mu[name].shard_shape(p.shape)
            assert np.prod(part) * 8 == np.prod(p.shape), f"{name}: {part} of {p.shape}"


def test_activations_are_pinned_on_cpu_too():
    """A constraint that did nothing on CPU could hide a wrong table from every test here."""
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.shard(x, "q_BTNH"))(jnp.zeros((8, 4, 8, 4)))
    assert x.addressable_shards[0].data.shape == (2, 4, 4, 4)


def test_one_mesh_axis_may_take_what_is_left():
    assert dict(sharding.make_mesh({"replica": 2, "fsdp": -1, "tensor": 2}).shape) == {
        "replica": 2,
        "stage": 1,
        "fsdp": 2,
        "context": 1,
        "tensor": 2,
    }


def test_a_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(ConfigError, match="needs 16 devices, this run has 8"):
        sharding.make_mesh({"replica": 2, "fsdp": 4, "tensor": 2})
    with pytest.raises(ConfigError, match="needs a multiple of 3 devices, this run has 8"):
        sharding.make_mesh({"replica": 3, "fsdp": -1, "tensor": 1})


@pytest.mark.fault("C3")
def test_a_mesh_that_does_not_divide_is_refused_naming_parameter_dimension_and_axis():
    c, _ = small()
    with c.unlocked():
        c.model.ffn_dim = 50
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 8})
    with pytest.raises(ConfigError, match="layers.w_gate_LDF: its dimension 'ffn' of 50 .* mesh.tensor=8"):
        check_mesh(c, mesh)


def test_a_batch_that_the_data_axes_do_not_divide_is_refused():
    c, _ = small(microbatches=4)
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 4, "tensor": 1})
    with pytest.raises(ConfigError, match="rows_per_step=16 in 4 microbatch.* gives 4 rows"):
        check_mesh(c, mesh)


def test_a_mesh_axis_is_never_used_twice():
    with pytest.raises(AssertionError, match="used twice"):
        sharding.spec(("heads", "ffn"))
