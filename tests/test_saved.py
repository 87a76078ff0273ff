"""Readers see a checkpoint as it was saved: its stage, its parameters on any mesh, its damage."""

from pathlib import Path

import jax
import numpy as np
import pytest

from k2jax.errors import ConfigError, StorageError
from k2jax.model.decoder import parameter_table
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.digest import array_digest, numpy_digest
from k2jax.run.directory import RunDirectory
from k2jax.run.saved import open_array, open_step, restore_params, saved_steps


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    return tiny_run


def test_steps_and_their_stages(run: Path):
    assert saved_steps(run) == [10, 20, 25]
    assert open_step(run).step == 25
    assert [open_step(run, step).stage.name for step in (10, 20, 25)] == ["stage1", "stage1", "stage2"]
    assert open_step(run, 25).stage.rope_base == 500_000.0


def test_a_missing_step_lists_those_there_are(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no checkpoint of step 11: it has steps 10, 20, 25"):
        open_step(run, 11)
    with pytest.raises(ConfigError, match="no run"):
        open_step(tmp_path)


def test_parameters_are_the_same_on_any_mesh_and_as_slices(run: Path):
    saved = open_step(run)
    meshes = [
        sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]),
        sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2}),
    ]
    one, other = (restore_params(saved, mesh) for mesh in meshes)
    assert one.keys() == parameter_table(saved.config.model).keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])
        assert other[name].sharding.mesh.size == 8
    wq = open_array(saved, "params/layers.wq_LDNH")
    np.testing.assert_array_equal(wq[1].read().result(), one["layers.wq_LDNH"][1])
    assert wq.chunk_layout.read_chunk.shape[0] == 1, "a layer can be read without the others"


def test_a_path_with_two_dots_is_the_place_that_the_system_takes_it_for(run: Path, tmp_path: Path, monkeypatch):
    """TensorStore refuses such a path, which read as a damaged checkpoint. Seen red."""
    (tmp_path / "link").symlink_to(run / "checkpoints")
    monkeypatch.chdir(run / "checkpoints")
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 8, "tensor": 1})
    for workdir in ("..", tmp_path / "link" / ".."):
        saved = open_step(workdir)
        assert restore_params(saved, mesh).keys() == parameter_table(saved.config.model).keys()
        assert open_array(saved, "params/head_DV").shape
        assert RunDirectory(workdir).place == run.resolve() == Checkpoints(workdir).directory.parent


def test_pieces_of_the_digest_add_up():
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    pieces = [numpy_digest(x[i], i * 21) for i in range(5)]
    assert sum(pieces) % 2**32 == numpy_digest(x) == int(jax.jit(array_digest)(x))


def test_a_flipped_bit_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = open_step(run)
    saved.meta["digests"]["params/head_DV"] ^= 1
    with pytest.raises(StorageError, match="damaged array.*head_DV"):
        restore_params(saved, sharding.make_mesh({"replica": 1, "fsdp": 8, "tensor": 1}))
