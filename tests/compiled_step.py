"""A training step of a small model, compiled for devices that are not here: for the programs of `run_compiling`."""

import jax
from ml_collections import ConfigDict

from k2jax import config
from k2jax.data.order import StagePlan
from k2jax.parallel import sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state
from k2jax.training.program import batch_shapes, step_function


def small(head_dim: int, sequence_length: int = 256) -> ConfigDict:
    """Two layers in bfloat16, four heads on two of keys and values; the mesh is the caller's to set."""
    c = config.base().unlock()
    sizes = {"vocab_size": 512, "dim": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 512}
    c.model.update(**sizes, head_dim=head_dim)
    c.stages = (config.stage(mix={"x": 1}, sequence_length=sequence_length, rows_per_step=8),)
    c.precision.compute = "bfloat16"
    return c


def compiled_step(c: ConfigDict, devices: list[jax.Device]) -> str:
    """The optimised HLO of a step of the first stage."""
    mesh = sharding.make_mesh(c.mesh, devices)
    plan = StagePlan("x", 0, c.stages[0].sequence_length, 8, 10, 1, 0, 80, 1, 10)
    shapes = jax.eval_shape(lambda: init_state(c.model, 0))
    placed = place_state(c, shapes, mesh)
    with jax.set_mesh(mesh):
        step = step_function(c, plan, placed, mesh, eos_id=2, num_subsets=1)
        state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
        return step.lower(state, batch_shapes(c, c.stages[0])).compile().as_text()
