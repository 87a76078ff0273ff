"""Replicas are summed once a step: nothing goes from one to another in a loop, and no more than one gradient does at
all. Slices of TPUs: replicas lie across them, and what crosses is the same."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from conftest import REPOSITORY
from jax.sharding import AbstractMesh
from test_pipeline import mesh_of, placed_state, small, step_of
from test_sharding import losses

from k2jax import config as configuration
from k2jax.model.decoder import parameter_table
from k2jax.parallel import sharding
from k2jax.plan.hlo import Instruction, Program, replica_groups
from k2jax.training import placement
from k2jax.training.program import batch_shapes


def over_replicas(program: Program, mesh: jax.sharding.Mesh) -> list[tuple[int, Instruction]]:
    """(loops around it, collective) of all whose groups have devices of several replicas."""
    parts = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    replica = {int(device): number for number, devices in enumerate(parts) for device in devices.flat}
    found, todo = [], [(program.entry, 0)]
    while todo:
        name, loops = todo.pop()
        for i in program.computations[name]:
            if i.collective:
                groups = replica_groups(i.rest) or [list(replica)]
                if any(len({replica[device] for device in group}) > 1 for group in groups):
                    found.append((loops, i))
            called = re.findall(r"\b(?:body|condition|to_apply|calls|branch_computations)=\{?(%[^ })]+)", i.rest)
            inner = [name for names in called for name in re.findall(r"%([\w.\-]+)", names)]
            todo += [(name, loops + (i.opcode == "while")) for name in inner]
    return found


def operand_bytes(program: Program, i: Instruction) -> int:
    return sum(program.instructions[name].result_bytes for name in i.operands)


@pytest.mark.parametrize(
    ("sizes", "numbers"),
    [
        ({"replica": 2, "context": 2, "tensor": 2}, {"accumulation": 2}),
        ({"replica": 2, "stage": 2, "fsdp": 2}, {"accumulation": 2, "microbatches": 2, "repeats": 2}),
    ],
    ids=str,
)
def test_a_step_sends_one_gradient_between_replicas_and_no_loop_sends_any(sizes: dict, numbers: dict):
    c, mesh = small(**numbers), mesh_of(sizes)
    with jax.set_mesh(mesh):
        shapes, placed = placed_state(c, mesh)
        compiled = step_of(c, mesh, placed).lower(shapes, batch_shapes(c, c.stages[0])).compile()
    program = Program(compiled.as_text())
    found = over_replicas(program, mesh)
    assert {loops for loops, _ in found} == {0}, [i for loops, i in found if loops]
    table = parameter_table(c.model)
    own = {name: 4 * math.prod(placed.params[name].shard_shape(p.shape)) for name, p in table.items()}
    sent = dict.fromkeys(("reduce-scatter", "all-reduce", "all-gather"), 0)
    for _, i in found:
        sent[i.collective] += i.result_bytes if i.collective == "all-gather" else operand_bytes(program, i)
    few = 1024 + sum(own[name] for name, p in table.items() if p.std is None)  # norms, losses, a batch's digests
    matrices = sum(own[name] for name, p in table.items() if p.std is not None)
    assert matrices <= sent["reduce-scatter"] <= matrices + few
    assert sent["all-reduce"] <= few < matrices / 4
    assert matrices <= sent["all-gather"] <= matrices + 3 * few, "parameters come back once"


def test_replicas_that_divide_no_dimension_are_copies_of_those_that_do():
    """Six on dimensions that are powers of two: three copies of two. With the losses of one device."""
    found = losses((6, 1, 1, 1), microbatches=2, rows=12)
    np.testing.assert_allclose(found, losses((1, 1, 1, 1), rows=12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"replica": 6}, {"copy": 3, "replica": 2}),
        ({"replica": 3, "fsdp": 2}, {"replica": 3, "fsdp": 2}),
        ({"replica": 2, "stage": 2, "tensor": 2}, {"replica": 2, "stage": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_the_memory_that_is_said_is_what_a_device_holds(sizes: dict, axes: dict):
    c = small()
    with c.unlocked():
        c.mesh.update({"fsdp": 1, **sizes})
        c.stages[0].rows_per_step = 48
    mesh = placement.mesh_of(c, jax.devices()[: math.prod(sizes.values())])
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == axes
    shapes, placed = placed_state(c, mesh)
    state = jax.tree.map(lambda x, place: jax.device_put(np.zeros(x.shape, x.dtype), place), shapes, placed)
    assert placement.state_bytes(c, mesh) == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


def test_k2s_own_mesh_splits_moments_by_five_of_its_fifteen_replicas():
    """65,286,184,960 parameters over 32 devices and moments over 160; the embedding and the head divide by no 5."""
    c = configuration.load(REPOSITORY / "experiments" / "k2_65b.py", [])
    axes, found = (sharding.COPY, *sharding.MESH_AXES), {}
    for parts in (15, 5, 3, 1):
        mesh = AbstractMesh((15 // parts, parts, 1, 4, 1, 8), axes)
        found[parts] = round(placement.state_bytes(c, mesh) / 2**30, 1)
    assert found == {15: 22.8, 5: 10.7, 3: 22.8, 1: 22.8}
    whole = AbstractMesh((15, 1, 4, 1, 8), sharding.MESH_AXES)
    assert placement.split_moments(c, whole) == AbstractMesh((3, 5, 1, 4, 1, 8), axes)


# ---- slices of TPUs --------------------------------------------------------------------------------------------------

MESHES_OF_SLICES = """
import json
from k2jax.plan import topologies
topologies.use_tpu_compiler()
from k2jax.errors import ConfigError
from k2jax.parallel import sharding
for slices, sizes in CASES:
    devices = topologies.devices(f"v5e:2x2*{slices}")[:-1 if slices == 5 else None]
    try:
        mesh = sharding.make_mesh({"fsdp": -1, **sizes}, devices)
        print(json.dumps([[device.slice_index for device in part.flat] for part in mesh.devices.reshape(slices, -1)]))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


@on_tpu_compiler
def test_replicas_lie_across_slices_and_then_stages(tmp_path: Path):
    cases = [
        (2, {"replica": 2}),
        (2, {"replica": 4}),  # two of them in a slice
        (4, {"replica": 2, "stage": 4}),  # two stages in a slice
        (2, {"stage": 2}),
        (2, {"replica": 1}),
        (4, {"replica": 2}),
        (3, {"replica": 2, "stage": 2}),
        (5, {}),  # the last device left out
    ]
    code = MESHES_OF_SLICES.replace("CASES", repr(cases))
    *meshes, one, two, three, uneven = map(json.loads, run_compiling(code, tmp_path).splitlines())
    assert meshes[0] == meshes[1] == [[0] * 4, [1] * 4]
    assert meshes[2] == [[number] * 4 for number in range(4)]
    assert meshes[3] == [[0] * 4, [1] * 4]
    assert one.startswith("mesh.replica=1 on 2 slices") and "to a multiple of 2" in one and "\n" not in one
    assert two.startswith("mesh.replica=2 on 4 slices") and "mesh.stage=1 to one of 2" in two
    assert three.startswith("mesh.replica=2 on 3 slices")
    assert uneven.startswith("19 devices on 5 slices, 3 on one and 4 on another")


