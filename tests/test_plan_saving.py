"""What a plan says of checkpoints: as many bytes and chunks as a real one has, and how often the trainer saves."""

import ast
import json
import math
import re
from pathlib import Path

import jax
import pytest
import tensorstore as ts
from compilers import on_tpu_compiler, run_compiling
from conftest import REPOSITORY

from k2jax import config as configuration
from k2jax.data.chunks import checkpoint_steps
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.parallel import sharding
from k2jax.plan import saving
from k2jax.plan.chips import CHIPS
from k2jax.run.state import flat
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state

STEPS = {"stage1": {"step_seconds": 2.0}, "stage2": {"step_seconds": 3.0}}


def cost(config, **options) -> dict:
    mesh = sharding.make_mesh(config.mesh)
    return saving.cost(config, mesh, CHIPS["v5p"], STEPS, saving.Storage(**options))


def test_as_many_bytes_and_chunks_as_a_real_checkpoint(tiny_run: Path, tiny_config):
    keys = []
    for part in ("params", "moments"):
        base = {"driver": "file", "path": f"{tiny_run / 'checkpoints' / '25' / part}/"}
        keys += ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    chunks = [key for key in keys if not key.endswith(b"/.zarray")]
    meta = json.loads((tiny_run / "checkpoints" / "25" / "meta" / "meta.json").read_text())
    found = cost(tiny_config())
    assert found["chunks"] == len(chunks) > 100
    assert len(keys) - len(chunks) == len(meta["arrays"])
    size = sum(4 * math.prod(shape) for shape, _ in meta["arrays"].values())
    assert found["state_bytes"] == found["host_write_bytes"] == found["host_read_bytes"] == size


@pytest.mark.parametrize("sizes", [{}, {"mesh.replica": 2}, {"mesh.replica": 2, "mesh.tensor": 2}, {"mesh.replica": 8}])
def test_copies_are_written_once_and_by_all_who_have_them(tiny_config, sizes):
    config = tiny_config(**sizes)
    mesh = sharding.make_mesh(config.mesh)
    shapes = jax.eval_shape(lambda: init_state(config.model, config.seed))
    places = flat(place_state(config, shapes, mesh))
    for name, x in flat(shapes).items():
        of = saving.pieces(name, x, places[name])
        assert sum(of.written.values()) == x.size * x.dtype.itemsize == sum(of.read.values())
        if x.size > 32:
            assert len(of.written) == 8, f"{name}: some devices write nothing"


def test_training_waits_for_the_copy_and_for_a_save_that_is_still_being_written(tiny_config):
    """20 steps of 2 s with a save every 10, 5 of 3 s with one: the second waits where writing takes longer."""
    config = tiny_config()
    fast = cost(config, host_bytes_per_s=1e9)
    size = fast["state_bytes"]
    assert fast["stall_seconds"] == pytest.approx(size / 8 / CHIPS["v5p"].host_bytes_per_s, rel=0.01)
    assert fast["stages"]["stage1"]["saves"] == 2 and fast["stages"]["stage1"]["interval_seconds"] == 20
    assert fast["stages"]["stage1"]["share"] == pytest.approx(fast["stall_seconds"] / 20, rel=1e-3)
    slow = cost(config, host_bytes_per_s=size / 50)
    assert slow["write_seconds"] == slow["restore_seconds"] == 50
    assert slow["stages"]["stage1"]["share"] == pytest.approx(30 / (40 + 30), rel=1e-3)
    assert cost(config, bytes_per_s=size / 100)["write_seconds"] == 100
    printed = dict(saving.rows(slow))
    assert printed["stage1"] == "2 saves, one every 0.3 min: 42.86% of the time"
    assert f"{slow['chunks']:,} chunks" in printed["on disk"] and "writing 50.0 s" in printed["storage"]


@pytest.mark.parametrize("every", [0, 1, 4, 10, 7])
def test_the_trainer_saves_at_these_steps(tiny_run: Path, tiny_config, every: int):
    order = order_of(read_epochs(tiny_run), read_journal(tiny_run / "journal.jsonl"))
    expected = {*checkpoint_steps(order), *(step for step in range(1, 26) if every and step % every == 0)}
    found = saving.save_steps(1, 10, 2, every) + saving.save_steps(21, 5, 1, every)
    assert found == sorted(expected)
    stages = cost(tiny_config(**{"checkpoint.every_steps": every}))["stages"]
    assert sum(stage["saves"] for stage in stages.values()) == len(expected)


def test_a_stage_without_a_time_has_no_share(tiny_config):
    config = tiny_config()
    mesh = sharding.make_mesh(config.mesh)
    stages = {name: {"step_seconds": None} for name in STEPS}
    found = saving.cost(config, mesh, CHIPS["v5e"], stages, saving.DEFAULT)
    assert found["stages"]["stage1"] == {"saves": 2, "interval_seconds": None, "share": None}
    assert "stage1" not in dict(saving.rows(found))


@pytest.mark.parametrize("name", ["k2_65b_v5p", "k2_65b_v6e", "k2_65b_128k", "k2_7b"])
def test_k2_saves_about_every_quarter_of_an_hour(name: str):
    """By the step times that the experiments state."""
    path = REPOSITORY / "experiments" / f"{name}.py"
    config = configuration.load(str(path))
    step_s = float(re.search(r"([\d.]+) s a step", ast.get_docstring(ast.parse(path.read_text())))[1])
    every = min(config.checkpoint.every_steps or 10**9, config.stages[0].steps_per_chunk)
    assert 12 <= every * step_s / 60 <= 20
    assert config.checkpoint.keep_between <= 3


PLAN = """
import json
from k2jax.plan import topologies
topologies.use_tpu_compiler()
from k2jax import config as configuration
from k2jax.parallel import sharding
from k2jax.plan import saving
from k2jax.plan.chips import chip_of
found = {}
for name, topology in (("k2_65b_v5p", "v5p:8x8x8"), ("k2_65b_128k", "v5p:8x8x8")):
    config = configuration.load(f"experiments/{name}.py")
    mesh = sharding.make_mesh(config.mesh, topologies.devices(topology))
    steps = {stage.name: {"step_seconds": 10.5} for stage in config.stages}
    found[name] = saving.cost(config, mesh, chip_of(topology), steps, saving.DEFAULT)
print(json.dumps(found))
"""


@on_tpu_compiler
def test_k2_65b_on_a_pod():
    """12 bytes a parameter, a host's 4 chips hold 1/128 of it; with 4 replicas, too, each byte is read once."""
    found = json.loads(run_compiling(PLAN, REPOSITORY))
    pod, copies = found["k2_65b_v5p"], found["k2_65b_128k"]
    assert pod["hosts"] == 128 and pod["state_bytes"] == pytest.approx(12 * 65_286_184_960, rel=1e-6)
    for part in ("host_write_bytes", "host_read_bytes"):
        assert pod[part] == pytest.approx(pod["state_bytes"] / 128, rel=0.01)
    assert pod["write_seconds"] == pytest.approx(pod["state_bytes"] / 25e9)
    assert copies["host_write_bytes"] == pytest.approx(pod["host_write_bytes"], rel=0.01)
    assert copies["read_bytes"] == pytest.approx(pod["state_bytes"], rel=0.01)
    assert pod["chunks"] < 50_000, "too small: a storage wants megabytes at a time"
    assert pod["stages"]["stage1"]["share"] < 0.001
