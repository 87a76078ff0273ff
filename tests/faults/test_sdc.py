"""Silent corruption: a device that computes or holds something else than its like is seen and named (D8, D9, D10)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from faults import runs
from k2jax.errors import NumericsError
from k2jax.run import checkpoint, devices, goodput
from k2jax.stability import sdc
from k2jax.training import recompute

SHORT = {"stages.0.chunks": 1, "stages.1.steps_per_chunk": 1, "stability.rerun_every": 4}


def test_odd_ones():
    assert sdc.odd_ones({}) == sdc.odd_ones({1: 7}) == sdc.odd_ones({1: 7, 2: 7}) == []
    assert sdc.odd_ones({1: 7, 2: 8, 3: 7}) == [2]
    assert sdc.odd_ones({1: 7, 2: 8}) == [1, 2]
    assert sdc.odd_ones({1: 7, 2: 7, 3: 9, 4: 8}) == [3, 4]
    assert [sdc.verdict(runs) for runs in ((1, 1, 1), (1, 2, 1), (1, 2, 3))] == ["same", "transient", "persistent"]


def with_a_flipped_bit(x, device, bit=0):
    """The array, in whose copy on one device a low bit of one number is another."""
    parts = [shard.data for shard in x.addressable_shards]
    at = [shard.device.id for shard in x.addressable_shards].index(device)
    bits = np.array(parts[at]).view(np.uint32)
    bits.reshape(-1)[-1] ^= np.uint32(1 << bit)
    parts[at] = jax.device_put(bits.view(x.dtype), parts[at].device)
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("replica", "fsdp"))


@pytest.mark.fault("D10")
@pytest.mark.parametrize(
    "spec, odd",
    [
        ((), [6]),  # of eight copies
        ((None, "fsdp"), [6]),  # of four
        (("replica",), [6, 7]),  # of two, of which neither is known to be right
    ],
)
def test_a_copy_that_differs_is_named(mesh, spec, odd):
    """Red with `check_copies` made to return."""
    good = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec(*spec)))
    all_split = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("replica", "fsdp")))
    devices.check_copies({"split": all_split, "good": good}, "step 3")
    bad = with_a_flipped_bit(good, 6)
    with pytest.raises(NumericsError, match="other bits of bad than") as error:
        devices.check_copies({"split": all_split, "good": good, "bad": bad}, "step 3")
    begin = str(error.value).partition(" other bits")[0]
    assert [int(word) for word in re.findall(r"device (\d)", begin)] == odd
    assert ("than one another" in str(error.value)) == (len(odd) == 2)
    # Nothing that has no copy is read.
    devices.check_copies({"split": with_a_flipped_bit(all_split, 6)}, "step 3")


@pytest.fixture
def flip(monkeypatch):
    """`flip({2: 0, 5: 3}, device)`: these bits of the 2nd and 5th computation of a step, there or all over."""

    def flip(bits, device=None):
        real, count = recompute.compile_probe, [0]

        def compile_probe(*args):
            probe = real(*args)

            def run(state, batch):
                values = probe.run(state, batch)
                count[0] += 1
                for i in range(8) if device is None else [device]:
                    if count[0] in bits:
                        values = with_a_flipped_bit(values, i, bits[count[0]])
                return values

            return probe._replace(run=run)

        monkeypatch.setattr(recompute, "compile_probe", compile_probe)

    return flip


@pytest.mark.fault("D8", "D10")
def test_a_bad_copy_is_not_saved_and_a_transient_error_is_counted(tiny_data, command, flip, monkeypatch, tmp_path):
    """65 at the save of step 10, before which nothing is wrong; the run goes on from step 5. In the second computation
    of step 8 a bit flips: the run goes on, and its steps are those of the run that computed nothing twice.
    """
    real, name, workdir = checkpoint.Checkpoints.save, "final_norm_D", tmp_path / "run"

    def save(self, state, step, **described):
        bad = {name: with_a_flipped_bit(state.params[name], 5)} if step == 10 else {}
        real(self, state._replace(params=state.params | bad), step, **described)

    off = SHORT | {"checkpoint.every_steps": 5, "stability.rerun_every": 0}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save)
        error = command.refuse(65, *runs.arguments(tiny_data, workdir, off))
    assert "step 10: device 5 (process 0 on " in error and "params/final_norm_D" in error
    assert runs.checkpoint_steps(workdir) == [5]
    rows = runs.ledger_rows(workdir)

    flip({2: 0})
    ended = command.train(tiny_data, workdir, SHORT)
    assert ended.code == 0 and "resuming after step 5 of 11" in ended.lines, ended
    [told] = [line for line in ended.lines if "transient error;" in line]
    assert told.startswith("step 8, computed 3 times from the same state and batch, gave other bits once of loss: ")
    assert runs.ledger_rows(workdir)[:10] == rows
    found = {row["step"]: row["transient_errors"] for row in runs.metric_rows(workdir)}
    assert {step: number for step, number in found.items() if number is not None} == {8: 1}
    assert goodput.read_goodput(workdir).seconds["check"] > 0


@pytest.mark.fault("D9")
@pytest.mark.parametrize(
    "bits, device, told",
    [
        ({2: 0, 3: 1}, None, "step 4, computed 3 times from the same state and batch, gave other bits each time of"),
        ({1: 0}, 3, "step 4: device 3 (process 0 on "),
    ],
)
def test_a_persistent_error_ends_the_run(tiny_data, command, flip, tmp_path, bits, device, told):
    flip(bits, device)
    assert told in command.refuse(65, *runs.arguments(tiny_data, tmp_path / "run", SHORT))
    assert runs.checkpoint_steps(tmp_path / "run") == []


@pytest.mark.fault("D9")
@pytest.mark.parametrize("part", [0, 1])
def test_a_device_that_always_computes_wrongly_is_named(tiny_data, command, monkeypatch, tmp_path, part):
    """The same wrong bits in every computation: only the self-test sees it. Red with `check_devices` made to return."""
    real = devices.own_answer

    def own_answer(zero):
        here = jax.lax.axis_index(("replica", "stage", "fsdp", "context", "tensor"))
        return real(zero).at[part].add(jnp.where(here == 6, 1, 0).astype(jnp.uint32))

    monkeypatch.setattr(devices, "own_answer", own_answer)
    devices._test_program.cache_clear()
    error = command.refuse(65, *runs.arguments(tiny_data, tmp_path / "run", SHORT))
    devices._test_program.cache_clear()
    assert "step 4: the self-test of device 6 (process 0 on " in error and "after step 0 is in doubt" in error
    assert runs.checkpoint_steps(tmp_path / "run") == []


def test_the_self_test_has_a_known_answer(mesh):
    devices.check_devices(mesh, "now")


BAD_COPY = """
import jax, numpy as np
from k2jax.parallel import cluster
from k2jax.run import checkpoint
real = checkpoint.Checkpoints.save
def save(self, state, step, **described):
    x = state.params["final_norm_D"]
    if cluster.index() == 1 and step == 10:
        first, second = (shard.data for shard in x.addressable_shards)
        bits = np.array(second).view(np.uint32) ^ np.uint32(1)
        second = jax.device_put(bits.view(np.float32), second.device)
        x = jax.make_array_from_single_device_arrays(x.shape, x.sharding, [first, second])
    real(self, state._replace(params={**state.params, "final_norm_D": x}), step, **described)
checkpoint.Checkpoints.save = save
"""
BAD_DEVICE = """
import jax, jax.numpy as jnp
from k2jax.run import devices
real = devices.own_answer
def own_answer(zero):
    here = jax.lax.axis_index(("replica", "stage", "fsdp", "context", "tensor"))
    return real(zero) + jnp.where(here == 3, 1, 0).astype(jnp.uint32)
devices.own_answer = own_answer
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    "patch, told",
    [
        (BAD_COPY, r"step 10: device \d+ \(process 1 on \S+\) holds other bits of params/final_norm_D than device 0 "),
        (BAD_DEVICE, r"step 12: the self-test of device \d+ \(process 1 on \S+\) gave"),
    ],
)
def test_two_processes_end_together(start, tmp_path, patch, told):
    """What one alone holds or computes wrongly: both say which, and end with 65."""
    workdir = tmp_path / "run"
    pair = runs.pair(start, workdir, {"stability.rerun_every": 12}, patch=patch)
    errors = [trainer.wait_for_error(65) for trainer in pair]
    assert all(re.search(told, error) for error in errors), errors
    assert runs.checkpoint_steps(workdir) == ([] if patch == BAD_COPY else [10])
    records, _ = goodput.read_records(workdir / "goodput.jsonl")
    assert [(r["processes"], r["ended"]) for r in records] == [(2, "NumericsError")]
