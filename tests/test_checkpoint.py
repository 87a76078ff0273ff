"""Checkpoints as a run keeps them: what stays, what is thinned, and how arrays are cut for the disk."""

import asyncio
import errno
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from k2jax.errors import ConfigError, DamagedError, StorageError
from k2jax.parallel import sharding
from k2jax.run import disk_layout, reading, storage
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.saved import SavedStep, open_array, restore_params
from k2jax.run.state import TrainState, flat
from k2jax.training.optimizer import init_state
from k2jax.training.placement import make_state, place_state

# Futures of failed reads and writes that Orbax leaves unread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Saver:
    """Saves states that differ by step, and restores them."""

    def __init__(self, config):
        self.config, self.mesh = config, sharding.make_mesh(config.mesh)
        self.shapes = jax.eval_shape(lambda: init_state(config.model, config.seed))
        self.shardings = place_state(config, self.shapes, self.mesh)
        with jax.set_mesh(self.mesh):
            self._first = make_state(config, self.shardings)

    def state(self, step: int) -> TrainState:
        return jax.tree.map(lambda x: x + np.asarray(step, x.dtype), self._first)

    def save(self, workdir: Path, steps: list[int], keep: list[int], **policy) -> list[str]:
        said = []
        with jax.set_mesh(self.mesh), Checkpoints(workdir, keep, log=said.append, **policy) as checkpoints:
            for step in steps:
                checkpoints.save(self.state(step), step, data={"next_step": step + 1}, meta={})
                checkpoints.wait()
            checkpoints.close()
        return said

    def saved(self, workdir: Path, step: int) -> SavedStep:
        meta = storage.read_meta(workdir / "checkpoints" / str(step))
        return SavedStep(workdir, step, meta, self.config, self.config.stages[0], [])

    def open(self, workdir: Path, **options) -> Checkpoints:
        return Checkpoints(workdir, [1, 2, 3, 4, 5, 6], **options)

    def restore(self, workdir: Path, step: int) -> TrainState:
        with jax.set_mesh(self.mesh):
            return self.open(workdir).restore(step, self.shardings, self.shapes)

    def newest(self, workdir: Path, log=lambda _: None) -> int:
        with jax.set_mesh(self.mesh):
            return int(self.open(workdir, log=log).restore_newest(self.shardings, self.shapes).step)


@pytest.fixture(scope="module")
def saver(tiny_config) -> Saver:
    return Saver(tiny_config(**{"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "RETRY_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(reading, "WRITE_WAITS_S", (0.01, 0.01))


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def equal(a: TrainState, b: TrainState) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(x, y) and x.sharding == y.sharding, a, b)
    return all(jax.tree.leaves(same))


# ---- what stays ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinned(saver: Saver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six chunks the moments of every third."""
    workdir = tmp_path_factory.mktemp("thinned")
    saver.save(workdir, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], moments_every=3)
    return workdir


def test_moments_stay_of_every_nth_chunk_and_of_the_newest_two(saver, thinned):
    assert steps_of(thinned) == [1, 2, 3, 4, 5, 6]
    full = [step for step in steps_of(thinned) if (thinned / "checkpoints" / str(step) / "moments").exists()]
    assert full == [3, 5, 6]
    for step in full:
        assert equal(saver.restore(thinned, step), saver.state(step))
    assert list((thinned / "checkpoints" / "trash").iterdir()) == []


def test_a_thinned_checkpoint_is_whole_to_its_readers(saver, thinned):
    """Its weights verify and its digest is the one that the ledger recorded; what is gone is said."""
    saved = saver.saved(thinned, 4)
    assert len(saved.meta["digests"]) == len(flat(saver.state(4))) and saved.digest
    params = restore_params(saved, saver.mesh)
    for name, value in saver.state(4).params.items():
        np.testing.assert_array_equal(params[name], value)
    with pytest.raises(StorageError, match="mu/head_DV.*its moments were taken away"):
        open_array(saved, "mu/head_DV")


def test_no_training_goes_on_from_a_thinned_one(saver, thinned, tmp_path):
    """Neither with zero moments nor in silence: it goes on from one that is whole, or not at all."""
    with pytest.raises(ConfigError, match="checkpoint 4: its moments were taken away"):
        saver.restore(thinned, 4)
    workdir = shutil.copytree(thinned, tmp_path / "run")
    for step in (5, 6):
        (workdir / "checkpoints" / str(step) / "meta" / "meta.json").write_text("{}")
    said = []
    assert saver.newest(workdir, said.append) == 3
    assert any(line.startswith("refused: checkpoint 4: its moments were taken away") for line in said)
    assert steps_of(workdir) == [1, 2, 3]
    assert sorted(path.name.split("-")[0] for path in (workdir / "abandoned").iterdir()) == ["4", "5", "6"]

    shutil.rmtree(workdir / "checkpoints" / "3")
    with pytest.raises(ConfigError, match="none of 2 checkpoint"):
        saver.newest(workdir)
    assert steps_of(workdir) == [1, 2]


def test_lost_moments_are_damage_unless_they_were_taken_away(saver, thinned, tmp_path):
    workdir = shutil.copytree(thinned, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6" / "moments")
    with pytest.raises(DamagedError, match="checkpoint 6"):
        saver.restore(workdir, 6)


def test_kept_is_kept_whatever_the_order_says_later(saver, tmp_path):
    """`allow_drift` of steps_per_chunk makes other steps the ends of chunks."""
    saver.save(tmp_path, [2, 3, 4], [2, 4], keep_between=0)
    assert steps_of(tmp_path) == [2, 4]
    saver.save(tmp_path, [5, 6, 7, 8], [3, 6, 9], keep_between=1)
    assert steps_of(tmp_path) == [2, 4, 6, 7, 8]
    assert [saver.saved(tmp_path, step).meta["kept"] for step in (4, 6, 7)] == [True, True, False]
    saver.save(tmp_path, [9], [3, 6, 7, 9], keep_between=0)  # what has become an end stays, too
    assert steps_of(tmp_path) == [2, 4, 6, 7, 9]


def test_what_cannot_be_deleted_stops_nothing(saver, tmp_path, monkeypatch):
    """As a file that another host has open, on NFS: it is said, and all else is deleted."""
    delete = shutil.rmtree

    def busy(path, *args, **kwargs):
        if "busy" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        delete(path, *args, **kwargs)

    for name in ("1-busy", "2-old", "3-busy", "4-old"):
        (tmp_path / "checkpoints" / "trash" / name).mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", busy)
    said = saver.save(tmp_path, [5], [5])
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "trash").iterdir()) == ["1-busy", "3-busy"]
    assert "saved 5" in said and any("Device or resource busy" in line for line in said)


# ---- a storage that fails, and bugs ----------------------------------------------------------------------------------


def test_a_storage_that_fails_for_a_while_moves_nothing(saver, thinned, tmp_path):
    """No file can be opened (EMFILE) until the first try has failed."""
    workdir = shutil.copytree(thinned, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with jax.set_mesh(saver.mesh):
        said = []

        def log(line: str) -> None:
            said.append(line)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        checkpoints = saver.open(workdir, log=log)
        checkpoints.lineage.close()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # those that are open stay so
            state = checkpoints.restore(6, saver.shardings, saver.shapes)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert equal(state, saver.state(6))
    assert len(said) == 1 and "Too many open files" in said[0] and "trying again" in said[0]
    assert not (workdir / "abandoned").exists()


@pytest.mark.fault("B1")
def test_what_was_being_saved_is_there_when_the_disk_has_room_again(saver, tmp_path, monkeypatch):
    """Though the step that followed has given the state's memory away. A limit on file sizes stands for the disk."""
    said, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def log(line: str) -> None:
        said.append(line)
        if sum("trying again" in line for line in said) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(reading, "WRITE_WAITS_S", (0.05,) * 100)
    with jax.set_mesh(saver.mesh), saver.open(tmp_path, log=log) as checkpoints:
        state = saver.state(1)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            checkpoints.save(state, 1, data={"next_step": 2}, meta={})
            for x in jax.tree.leaves(state):
                x.delete()  # as the next step does, to which the state is given
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.close()
    assert all("File too large" in line for line in said[:3]) and said[-1] == "saved 1"
    assert equal(saver.restore(tmp_path, 1), saver.state(1))


@pytest.mark.fault("B10")
def test_training_goes_on_beside_a_slow_save_and_waits_with_the_next(saver, tmp_path, monkeypatch):
    """Seen red where `save` did not wait for the save before, and where it waited for its own."""
    room, real, said = threading.Event(), storage._LateJson._save_fn, []

    async def save(self, item, directory):
        await asyncio.to_thread(room.wait, 60)
        await real(self, item, directory)

    monkeypatch.setattr(storage._LateJson, "_save_fn", save)
    with jax.set_mesh(saver.mesh), saver.open(tmp_path, log=said.append) as checkpoints:
        checkpoints.save(saver.state(1), 1, data={"next_step": 2}, meta={})
        assert checkpoints.poll() is None and said == [] and not room.is_set()
        threading.Timer(0.3, room.set).start()
        checkpoints.save(saver.state(2), 2, data={"next_step": 3}, meta={})
        assert room.is_set() and said == ["saved 1"]
        checkpoints.wait()
        checkpoints.close()
    assert equal(saver.restore(tmp_path, 1), saver.state(1)) and equal(saver.restore(tmp_path, 2), saver.state(2))


@pytest.mark.fault("B11")
def test_a_step_that_is_there_is_not_saved_again(saver, thinned, tmp_path):
    """Nor one before it. Seen red without the comparison with the newest."""
    workdir = shutil.copytree(thinned, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with jax.set_mesh(saver.mesh), saver.open(workdir, moments_every=3) as checkpoints:
        for step in (6, 4):
            with pytest.raises(StorageError, match=f"checkpoint {step}: .* already holds step 6; move later steps to"):
                checkpoints.save(saver.state(9), step, data={"next_step": step + 1}, meta={})
        checkpoints.close()
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_bug_moves_no_checkpoint(saver, thinned, tmp_path, monkeypatch):
    workdir = shutil.copytree(thinned, tmp_path / "run")
    monkeypatch.setattr(storage, "read_arrays", lambda *_: None + 1)
    with pytest.raises(TypeError):
        saver.newest(workdir)
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6] and not (workdir / "abandoned").exists()


def test_a_storage_that_is_gone_as_a_whole_is_no_damage(saver, thinned, tmp_path, monkeypatch):
    """As where a mount went away between the listing and the reading."""
    workdir, opened = shutil.copytree(thinned, tmp_path / "run"), storage.open_array

    def unmount(*args):
        (workdir / "checkpoints").rename(tmp_path / "away")
        monkeypatch.setattr(storage, "open_array", opened)
        return opened(*args)

    monkeypatch.setattr(storage, "open_array", unmount)
    with pytest.raises(StorageError, match="nothing was moved") as error:
        saver.newest(workdir)
    assert not isinstance(error.value, DamagedError) and not (workdir / "abandoned").exists()


def test_an_error_nobody_knows_moves_no_checkpoint(saver, thinned, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("of some library")

    workdir = shutil.copytree(thinned, tmp_path / "run")
    monkeypatch.setattr(storage, "read_arrays", fail)
    with pytest.raises(StorageError, match="of some library; tried 3 times; nothing was moved") as error:
        saver.newest(workdir)
    assert not isinstance(error.value, DamagedError)
    assert steps_of(workdir) == [1, 2, 3, 4, 5, 6] and not (workdir / "abandoned").exists()


# ---- how arrays are cut ----------------------------------------------------------------------------------------------


MESHES = {
    "fsdp": ((1, 8, 1), P(None, "f", None)),
    "replicas": ((2, 4, 1), P(None, "f")),
    "tensor": ((2, 2, 2), P(None, "f", "t")),
    "stages": ((2, 2, 2), P("r", "f")),
    "nothing cut": ((2, 4, 1), P()),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("shape", [(4, 32, 8), (6, 12, 14), (7, 16, 4)])
def test_each_byte_is_written_by_one_device(name, shape):
    """As far as anything divides; and it comes back as it was."""
    sizes, spec = MESHES[name]
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("r", "f", "t"))
    value = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    if any(
        size % math.prod(mesh.shape[a] for a in [axis])
        for size, axis in zip(shape, spec, strict=False)
        if axis
    ):
        pytest.skip("the mesh does not divide it")
    held = jax.device_put(value, NamedSharding(mesh, spec))
    layout = disk_layout.disk_layout(shape, 4, held.sharding, by_layer=True)
    stored = disk_layout.to_disk(held, layout)
    assert stored.sharding.is_equivalent_to(layout.sharding, len(shape))
    for shard in stored.addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
    parts = {str(shard.index) for shard in stored.addressable_shards}
    assert len(parts) == 8 or math.prod(shape) % 8, layout
    back = disk_layout.from_disk(stored, layout, held.sharding)
    assert back.sharding == held.sharding
    for shard in back.addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])


def test_large_layers_stay_where_they_are(monkeypatch):
    mesh = Mesh(np.array(jax.devices()), ("f",))
    place = NamedSharding(mesh, P(None, "f"))
    assert disk_layout.disk_layout((4, 16, 8), 4, place, by_layer=True).moved == ("f'", 1)
    assert disk_layout.disk_layout((4, 16, 8), 4, place, by_layer=False).moved is None
    monkeypatch.setattr(disk_layout, "LAYER_BYTES", 4 * 2 * 8)
    assert disk_layout.disk_layout((4, 16, 8), 4, place, by_layer=True).moved is None


def test_chunks_are_large_and_layers_can_be_read(saver, tmp_path):
    """Every part of a weight is written once; a layer of the weights is whole chunks."""
    saver.save(tmp_path, [1], [1])
    folder, meta = tmp_path / "checkpoints" / "1", saver.saved(tmp_path, 1).meta
    for name, x in flat(saver.state(1)).items():
        if not x.shape:
            continue
        array = storage.open_array(folder, meta, name)
        chunk = array.chunk_layout.read_chunk.shape
        if name.startswith("params/layers."):
            assert chunk[0] == 1, name
        chunks = math.prod(math.ceil(size / part) for size, part in zip(x.shape, chunk, strict=True))
        keys = ts.KvStore.open(array.kvstore.spec()).result().list().result()
        assert len([key for key in keys if not key.endswith(b".zarray")]) == chunks
        assert chunks <= 8, name


OF_K2 = """
import jax
from k2jax import config as configuration
from k2jax.parallel import sharding
from k2jax.run import storage
from k2jax.run.state import flat
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state

config = configuration.base()
mesh = sharding.make_mesh({"fsdp": 512})
shapes = jax.eval_shape(lambda: init_state(config.model, 0))
layouts = storage.layouts(flat(shapes), flat(place_state(config, shapes, mesh)))
for name in ("params/layers.w_up_LDF", "params/layers.w_down_LFD", "params/layers.wo_LNHD", "mu/layers.w_up_LDF"):
    place, shape = layouts[name].sharding, flat(shapes)[name].shape
    print(name, place.shard_shape(shape), len({str(i) for i in place.devices_indices_map(shape).values()}))
"""


@pytest.mark.processes  # a Python of its own
def test_k2_on_512_devices_is_cut_by_whole_layers():
    """65B: what had been chunks of (1, 16, 22016), 1.4 MB, is 22 MB; the moments' are the device's 113 MB."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=512"}
    ran = subprocess.run([sys.executable, "-c", OF_K2], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "params/layers.w_up_LDF (5, 256, 22016) 512",
        "params/layers.w_down_LFD (5, 22016, 256) 512",
        "params/layers.wo_LNHD (5, 64, 128, 256) 512",
        "mu/layers.w_up_LDF (80, 16, 22016) 512",
    ]
