"""A model that computes in bfloat16 is evaluated from a copy in it: the same numbers, half the room."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from experiments import k2_65b
from k2jax.data.provenance import open_run
from k2jax.errors import StorageError
from k2jax.evals.scoring import Row, Scorer
from k2jax.evals.subject import Subject
from k2jax.model.decoder import num_params, parameter_table
from k2jax.model.generation import Generator
from k2jax.parallel import sharding
from k2jax.run import saved as readers
from k2jax.run.saved import open_step, restore_copy, restore_params
from k2jax.training.placement import mesh_for
from k2jax.training.validation import validate

GIB = 1 << 30


def mesh(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1, **sizes})


def test_the_copy_gives_every_bit_that_the_parameters_give(tiny_run: Path):
    saved, where = open_step(tiny_run), mesh(fsdp=4, tensor=2)
    whole, copy = restore_params(saved, where), restore_copy(saved, where, jnp.bfloat16)
    kept = {name for name, x in copy.items() if x.dtype == jnp.float32}
    assert kept == {name for name in copy if "norm" in name} and len(kept) == 3
    assert all(copy[name].sharding == whole[name].sharding for name in whole)
    m, base, eos_id = saved.config.model, saved.stage.rope_base, saved.meta["eos_id"]
    rows = [Row((5, 6, 7, n), [(1, 9), (3, 11)]) for n in range(3, 9)]

    def numbers(params: dict[str, jax.Array]) -> list[Any]:
        scorer = Scorer(m, base, params, where, jnp.bfloat16, eos_id=eos_id, batch_tokens=512)
        scores = [x for s in scorer(rows, lambda _: None) for x in (s.logprobs.tolist(), s.is_greedy.tolist())]
        generator = Generator(m, base, params, where, jnp.bfloat16, eos_id=eos_id)
        stores = open_run(tiny_run).stores
        held_out = validate(saved.config, saved.stage, params, where, stores, jnp.bfloat16, eos_id, max_windows=2)
        return [*scores, generator.generate([[5, 6], [7]], 8, stop_at_eos=False), held_out]

    with jax.set_mesh(where):
        assert numbers(whole) == numbers(copy)


def test_a_host_has_one_part_of_one_array_at_a_time(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    """The largest array that goes from the host to a device is a device's part; no array is read whole."""
    saved, where, put = open_step(tiny_run), mesh(fsdp=8), []
    device_put = jax.device_put

    def noted(x: Any, *rest: Any, **more: Any) -> Any:
        if isinstance(x, np.ndarray):
            put.append(x.nbytes)
        return device_put(x, *rest, **more)

    monkeypatch.setattr(readers.storage.jax, "device_put", noted)
    restore_copy(saved, where, jnp.bfloat16)
    table = parameter_table(saved.config.model)
    parts = {name: part_bytes(p, where, 4) for name, p in table.items()}
    assert max(put) == max(parts.values()) == max(4 * int(np.prod(p.shape)) for p in table.values()) // 8
    assert len(put) == 8 * len(table) and sum(put) == 8 * sum(parts.values())


def part_bytes(p: Any, where: Any, itemsize: int) -> int:
    return itemsize * int(np.prod(sharding.named(where, p.axes).shard_shape(p.shape)))


def test_k2_65b_fits_eight_devices_of_80_gb_and_no_host_has_it_whole():
    """By the shardings: 8 devices of one host, or 16 of two."""
    config = k2_65b.get_config()
    table = parameter_table(config.model)
    assert num_params(config.model) == 65_286_184_960
    for devices in (8, 16):
        where = AbstractMesh(tuple(devices if a == "fsdp" else 1 for a in sharding.MESH_AXES), sharding.MESH_AXES)
        copy = sum(part_bytes(p, where, 4 if p.std is None else 2) for p in table.values())
        largest = max(part_bytes(p, where, 4) for p in table.values())  # of float32: on a device, and on its host
        assert copy + largest < 75e9 and copy < 17 * GIB * 8 / devices
        assert largest < 7 * GIB * 8 / devices < 4 * num_params(config.model) / 30


def test_a_damaged_array_is_named(tiny_run: Path):
    saved = open_step(tiny_run)
    saved.meta["digests"]["params/head_DV"] ^= 1
    with pytest.raises(StorageError, match="damaged array.*head_DV"):
        restore_copy(saved, mesh(fsdp=8), jnp.bfloat16)


def test_a_subject_takes_the_copy_where_it_computes_in_bfloat16(tiny_run: Path):
    saved = open_step(tiny_run)
    for kind in ("float32", "bfloat16"):
        with saved.config.unlocked():
            saved.config.precision.compute = kind
        subject = Subject(saved, mesh_for(saved.config), batch_tokens=64, seed=0)
        assert str(subject.params["head_DV"].dtype) == kind == subject.about()["compute"]
        assert str(subject.params["final_norm_D"].dtype) == "float32"
