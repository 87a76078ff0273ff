"""FSDP written out: the same losses by any rings, gradients scattered as they are summed, and nothing summed whole."""

import re

import jax
import numpy as np
import pytest
from test_sharding import MESHES, losses, small

from k2jax.errors import ConfigError
from k2jax.model.decoder import parameter_table
from k2jax.parallel import fsdp, sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import check_mesh, place_state
from k2jax.training.program import batch_shapes, step_function


@pytest.fixture(scope="module")
def one_device_losses() -> list[float]:
    return losses((1, 1, 1, 1))


@pytest.mark.parametrize("rings", [(2, 4), (4, 2), (2, 2, 2)])
def test_rings_change_nothing(rings: tuple[int, ...], one_device_losses: list[float]):
    np.testing.assert_allclose(losses(MESHES["fsdp 8"], rings=rings), one_device_losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rings", [(), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_gather_is_in_order_and_a_scatter_its_transpose(rings: tuple[int, ...], dim: int):
    mesh = sharding.make_mesh({"fsdp": 8})
    w = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)

    def both(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = fsdp.gather(part, dim, part.dtype, rings)
        return whole, fsdp.scatter(whole, dim, rings, fsdp.SPLIT)

    with jax.set_mesh(mesh):
        specs = (fsdp.weight(dim),), (jax.sharding.PartitionSpec(), fsdp.weight(dim))
        whole, summed = jax.jit(fsdp.on_each_device(both, *specs))(w)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_array_equal(summed, 8 * w)


@pytest.mark.parametrize(("mesh", "rings"), [({"fsdp": 8}, ()), ({"replica": 2, "fsdp": 4}, (2, 2))])
def test_no_weight_is_summed_whole(mesh: dict[str, int], rings: tuple[int, ...]):
    """The partitioner, left alone, sums whole gradients over all devices and then cuts them."""
    c, plan = small()
    with c.unlocked():
        c.model.rings = rings
    devices = sharding.make_mesh(mesh)
    with jax.set_mesh(devices):
        shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
        step = step_function(c, plan, place_state(c, shapes, devices), devices, eos_id=2, num_subsets=2)
        text = step.lower(shapes, batch_shapes(c, c.stages[0])).compile().as_text()
    found = re.findall(r"= (\(?[^=]*?) (all-reduce|reduce-scatter)\(", text)
    matrices = [p for p in parameter_table(c.model).values() if p.std is not None]
    smallest = min(np.prod(p.shape) for p in matrices) // c.model.num_layers
    sizes = {"all-reduce": [], "reduce-scatter": []}
    for shapes_text, kind in found:
        for shape in re.findall(r"f32\[([\d,]*)\]", shapes_text):
            sizes[kind].append(np.prod([int(n) for n in shape.split(",") if n]))
    assert len(sizes["reduce-scatter"]) >= 9, "seven matrices of a layer, embedding and head"
    assert max(sizes["all-reduce"]) < smallest, f"an all-reduce of {max(sizes['all-reduce'])} numbers"


def test_rings_that_do_not_multiply_to_fsdp_are_refused():
    c, _ = small()
    with c.unlocked():
        c.model.rings = (2, 2)
    with pytest.raises(ConfigError, match=r"model.rings=\(2, 2\) must multiply to mesh.fsdp=8"):
        check_mesh(c, sharding.make_mesh({"fsdp": 8}))
