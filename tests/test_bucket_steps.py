"""Checkpoints in a bucket: Orbax's format, complete at one moment, never half of one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import NamedSharding, PartitionSpec

from k2jax import bucket
from k2jax.bucket import BucketPath, at
from k2jax.errors import ConfigError, StorageError
from k2jax.run import reading
from k2jax.run.bucket_steps import BucketSteps, chunk_shape, committed_steps
from k2jax.run.mirror import Mirror

TEXTS = {"data/metadata": lambda: "{}", "meta/meta.json": lambda: json.dumps({"step": 10})}


@pytest.fixture
def workdir(server) -> BucketPath:
    yield at(f"{server.bucket()}/run #1")
    server.heal()


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    return {
        "params/layers.w_LD": place(jnp.arange(32.0).reshape(4, 8), None, "fsdp"),
        "params/b_D": place(jnp.zeros((8,)), "fsdp"),
        "step": place(jnp.int32(3)),
    }


def save(steps: BucketSteps, step: int, arrays: dict[str, jax.Array]) -> None:
    steps.save(step, {"state": arrays}, TEXTS)
    steps.wait_until_finished()


def read(folder: BucketPath, name: str) -> np.ndarray:
    place = {"driver": "ocdbt", "base": bucket.spec(folder, folder=True), "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=bucket.context()).result().read().result()


def test_saved_and_read(workdir, arrays, tmp_path):
    steps = BucketSteps(workdir)
    assert steps.all_steps() == []
    for step in (10, 9):
        save(steps, step, arrays)
    assert steps.all_steps() == [9, 10] and not steps.is_saving_in_progress()
    state = workdir / "checkpoints" / "10" / "state"
    for name, x in arrays.items():
        np.testing.assert_array_equal(read(state, name), np.asarray(x))
    for key in state.keys():  # what Orbax itself makes of a copy
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((state / key).read_bytes())
    places = {name: ocp.ArrayRestoreArgs(sharding=x.sharding) for name, x in arrays.items()}
    wanted = ocp.args.PyTreeRestore(item=arrays, restore_args=places)
    found = ocp.PyTreeCheckpointHandler().restore(epath.Path(tmp_path), args=wanted)
    assert all((found[name] == x).all() for name, x in arrays.items())


def test_what_a_killed_save_left_does_not_stand_between(workdir, arrays):
    (workdir / "saving" / "10").put(b"")
    (workdir / "checkpoints" / "10" / "state" / "manifest.ocdbt").put(b"half")
    steps = BucketSteps(workdir)
    assert steps.all_steps() == []
    save(steps, 10, arrays)
    np.testing.assert_array_equal(read(workdir / "checkpoints" / "10" / "state", "step"), 3)
    assert (workdir / "saving").keys() == []


def test_what_killed_saves_and_deletes_left_is_deleted(workdir, arrays):
    steps = BucketSteps(workdir)
    save(steps, 10, arrays)
    (workdir / "saving" / "10").put(b"")  # a kill between the last two writes
    (workdir / "saving" / "11").put(b"")
    (workdir / "checkpoints" / "11" / "state" / "x").put(b"half")
    steps.delete_unfinished()
    assert steps.all_steps() == [10] and (workdir / "saving").keys() == []
    assert {key.split("/")[0] for key in (workdir / "checkpoints").keys()} == {"10"}
    steps.delete(10)
    assert workdir.keys() == []


def test_a_save_under_way_is_not_taken_for_one_that_was_killed(workdir, arrays):
    steps = BucketSteps(workdir)

    def tidy() -> str:
        steps.delete_unfinished()
        return "{}"

    (workdir / "saving" / "9").put(b"")
    steps.save(10, {"state": arrays}, {**TEXTS, "data/metadata": tidy})
    steps.wait_until_finished()
    assert (workdir / "saving").keys() == []
    np.testing.assert_array_equal(read(workdir / "checkpoints" / "10" / "state", "step"), 3)


def test_an_abandoned_step_is_complete_nowhere(workdir, arrays):
    steps = BucketSteps(workdir)
    save(steps, 10, arrays)
    target = workdir / "abandoned" / "10"
    steps.abandon(10, target, "a bit has flipped")
    assert steps.all_steps() == [] and not (workdir / "checkpoints" / "10" / "meta").exists()
    assert json.loads((target / "meta.json").read_text()) == {"step": 10}
    assert json.loads((target / "why.json").read_text())["why"] == "a bit has flipped"
    assert (workdir / "checkpoints" / "10" / "state").exists(), "its arrays are kept"
    save(steps, 10, arrays)
    assert steps.all_steps() == [10]


def test_a_run_that_was_copied_from_a_disk_has_its_steps(workdir, arrays):
    save(BucketSteps(workdir), 9, arrays)
    save(BucketSteps(workdir), 10, arrays)
    (workdir / "committed").delete_tree()
    (workdir / "checkpoints" / "11" / "state" / "x").put(b"of a save that was killed")
    assert committed_steps(workdir) == [9, 10]
    trainer = BucketSteps(workdir, Mirror(workdir, lambda: None))
    assert trainer.all_steps() == [9, 10] and (workdir / "committed").keys() == ["10", "9"]
    save(trainer, 11, arrays)
    assert committed_steps(workdir) == [9, 10, 11]


def test_compiled_programs_are_kept_in_a_bucket(server, workdir, monkeypatch):
    """By JAX's own cache, without the packages that it would need."""
    with compilation_cache(f"{workdir}/compiled"):
        assert jax.jit(lambda x: x * 2 + 1)(jnp.arange(3)).tolist() == [1, 3, 5]
        [program] = [key for key in (workdir / "compiled").keys() if "lambda" in key and key.endswith("-cache")]
        jax.clear_caches()
        (workdir / "compiled" / program).write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            jax.jit(lambda x: x * 2 + 1)(jnp.arange(3))


@contextmanager
def compilation_cache(url: str) -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    try:
        jax_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", url)
        yield
    finally:
        jax_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)


def test_who_has_lost_the_lease_completes_nothing(workdir, arrays):
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise ConfigError("taken over by another")

    mirror = Mirror(workdir, check)
    (mirror.local / "row").write_text("1")
    steps = BucketSteps(workdir, mirror)
    with pytest.raises(ConfigError, match="taken over"):
        save(steps, 10, arrays)
    assert steps.all_steps() == [] and len(asked) == 3
    assert (workdir / "row").exists(), "what a checkpoint closes over is there before it"


def test_of_two_who_save_one_completes(workdir, arrays):
    save(BucketSteps(workdir), 10, arrays)
    kept = workdir.keys()
    with pytest.raises(
        ConfigError, match="checkpoint 10: another run has saved it to .*checkpoints/10 meanwhile"
    ):
        save(BucketSteps(workdir), 10, arrays)
    assert workdir.keys() == kept

    def overtake() -> str:
        save(BucketSteps(workdir), 11, arrays)
        return ""

    slow = BucketSteps(workdir)
    slow.save(11, {"state": arrays}, {**TEXTS, "last": overtake})
    with pytest.raises(ConfigError, match="checkpoint 11: another run has saved it"):
        slow.wait_until_finished()


def test_a_server_that_fails_for_a_while_or_for_good(server, workdir, arrays, monkeypatch):
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 6, "initial_delay": "5ms", "max_delay": "20ms"})
    monkeypatch.setattr(reading, "WRITE_WAITS_S", (0.01,))
    bucket.forget()
    said: list[str] = []
    steps = BucketSteps(workdir, log=said.append)
    server.fail(503, every=4)
    save(steps, 10, arrays)
    assert server.counted()["failed"] > 2 and committed_steps(workdir) == [10]
    server.fail(503, match="/state/")
    with pytest.raises(StorageError, match="503|retry") as error:
        save(steps, 11, arrays)
    assert "\n" not in str(error.value)
    assert said and "arrays of checkpoint 11: cannot be written" in said[-1] and "trying again" in said[-1]
    server.heal()
    assert committed_steps(workdir) == [10]
    save(steps, 11, arrays)
    bucket.forget()


@pytest.mark.parametrize(
    ("shape", "by_layer", "chunk"),
    [
        ((), False, []),
        ((80, 16, 100), True, [80, 16, 100]),
        ((80, 4096, 4096), True, [1, 4096, 4096]),
        ((80, 4096, 4096), False, [2, 4096, 4096]),
        ((7, 5000, 5000), False, [1, 5000, 5000]),
        ((1, 1 << 20, 100), False, [1, 1 << 18, 100]),
    ],
)
def test_chunks_divide_a_part(shape, by_layer, chunk):
    assert chunk_shape(shape, 4, by_layer) == chunk
