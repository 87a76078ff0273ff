"""The table of XLA's options: every row is one that the compiler of that kind takes, and trainers are given."""

import json
from pathlib import Path

from compilers import on_tpu_compiler, run_compiling

from k2jax.parallel import xla_options
from k2jax.plan.chips import CHIPS

COMPILE = """
import json
import jax, jax.numpy as jnp
from k2jax.plan import topologies
topologies.use_tpu_compiler()
from k2jax import config
from k2jax.errors import ConfigError
from k2jax.parallel import sharding, xla_options
from k2jax.training.program import compile_lowered
c = config.base()
for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    c.mesh.fsdp = len(topologies.devices(topology))
    mesh = sharding.make_mesh(c.mesh, topologies.devices(topology))
    rows = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16, sharding=rows)
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: x @ x.T).lower(x)
        compile_lowered(lowered, c)
        kind = sharding.device_kind()
        kept, xla_options.BY_KIND[kind] = xla_options.BY_KIND[kind], {"xla_tpu_no_such_option": "1"}
        try:
            compile_lowered(lowered, c)
        except ConfigError as error:
            print(json.dumps([kind, sorted(kept), str(error)]))
"""


def test_kinds_are_those_that_a_plan_knows():
    kinds = {chip.kind for chip in CHIPS.values()} | {"cpu"}
    assert xla_options.BY_KIND.keys() <= kinds
    assert xla_options.of_kind("TPU v5p") == xla_options.of_kind("TPU v5") != {}
    assert xla_options.of_kind("a kind of tomorrow") == {}


@on_tpu_compiler
def test_the_tpus_compiler_takes_every_row_and_is_given_it(tmp_path: Path):
    found = [json.loads(line) for line in run_compiling(COMPILE, tmp_path).splitlines()]
    assert [(kind, names) for kind, names, _ in found] == [
        (kind, sorted(xla_options.BY_KIND[kind])) for kind in xla_options.BY_KIND if kind != "cpu"
    ]
    assert all("no option 'xla_tpu_no_such_option'" in error for _, _, error in found)
