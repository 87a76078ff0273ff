"""Checkpoints in a bucket: written by TensorStore in Orbax's format, because Orbax writes to disks.

    checkpoints/<step>/<part>/     what Orbax would have put there; each process writes its devices' arrays below a
                                   prefix of its own, process 0 then puts their indices together
    committed/<step>               created last, where it was not: a step that has it is complete, no other is listed
    saving/<step>                  while it is being saved: what a killed save has left is found by it

Steps are listed by `committed/`, of which there is one a step: below `checkpoints/` there may be a million objects.
"""

import json
import math
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from k2jax import bucket
from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, StorageError
from k2jax.parallel import cluster
from k2jax.run.lineage import Lineage, Policy
from k2jax.run.mirror import Mirror
from k2jax.run.reading import keep_writing, one_line

CHUNK_BYTES = 1 << 27  # of an array in the bucket, at most: read, checked and decoded as a whole
SMALL_BYTES = 1 << 23  # a device's part of a parameter up to this is one chunk, all layers in it
WRITERS = 8  # arrays that a process writes at a time
SAVE_LIMIT_S = 7200  # for all processes to have written theirs
META, INDEX = "meta/meta.json", "_METADATA"  # by which a step, and a part of one, are there
Parts = Mapping[str, Mapping[str, jax.Array]]


class BucketSteps:
    """The checkpoints of the run at a URL, as its trainer changes them; what Orbax's CheckpointManager is to a disk.

    Args:
        workdir: the run.
        mirror: of its small files: put before a step is complete; and asked whether this run may still write.
        log: is told of what fails and is tried again.
    """

    def __init__(self, workdir: BucketPath, mirror: Mirror | None = None, log: Callable[[str], None] = print):
        self.workdir, self.directory, self._log = workdir, workdir / "checkpoints", log
        self._mirror, self._saves, self._in_progress = mirror, 0, ""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # ---- listing -------------------------------------------------------------------------------------------------

    def all_steps(self) -> list[int]:
        """Oldest first. The trainer marks those of a run that was copied here from a disk."""
        steps = committed_steps(self.workdir)
        if self._mirror and cluster.is_main() and not (self.workdir / "committed").keys():
            for step in steps:
                (self.workdir / "committed" / str(step)).create(_signed(step))
        return steps

    # ---- saving --------------------------------------------------------------------------------------------------

    def save(self, step: int, parts: Parts, texts: Mapping[str, Callable[[], str]]) -> None:
        """Starts saving; every process calls it.

        Args:
            step: of which there is no checkpoint.
            parts: {folder: {name: array}}; what the arrays lie in must not change until the save has ended.
            texts: {file: function that gives its content}; called in the background, written in this order.
        """
        assert self._thread is None, "one at a time"
        self._in_progress = str(step)  # before its mark is there
        self._saves += 1
        self._thread = threading.Thread(target=self._try, args=(step, parts, texts), name="save", daemon=True)
        self._thread.start()

    def is_saving_in_progress(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def reload(self) -> None:
        """Each listing is new."""

    def check_for_errors(self) -> None:
        """`wait_until_finished` raises them."""

    def close(self) -> None:
        """Nothing is held."""

    def wait_until_finished(self) -> None:
        """Raises what made the save fail, the same on every process."""
        if self._thread is not None:
            self._thread.join()
        self._thread, self._in_progress = None, ""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _try(self, step: int, parts: Parts, texts: Mapping[str, Callable[[], str]]) -> None:
        try:
            self._save(step, parts, texts)
        except BaseException as error:
            self._error = error

    def _save(self, step: int, parts: Parts, texts: Mapping[str, Callable[[], str]]) -> None:
        folder, mark, name = (
            self.directory / str(step),
            self.workdir / "saving" / str(step),
            f"save {self._saves}",
        )

        committed, contents = self.workdir / "committed" / str(step), dict[str, bytes]()

        def begin() -> None:
            self._check()
            if committed.exists():
                raise _saved_by_another(step, folder)
            mark.put(_signed(step))
            folder.delete_tree()  # what an earlier attempt has left: its arrays must not stand between ours

        def write() -> None:
            for part, arrays in parts.items():
                write_arrays(folder / part, arrays, cluster.index(), bucket.context())

        def write_patiently() -> None:
            keep_writing(f"arrays of checkpoint {step}", write, self._log)
            contents.update({file: content().encode() for file, content in texts.items()})

        def end() -> None:
            for part, arrays in parts.items():
                merge_arrays(folder / part, arrays, cluster.count(), bucket.context())
            if self._mirror:  # all rows up to the step, before anything says that there is one
                self._mirror.put()
            self._check()
            for file, content in contents.items():
                (folder / file).put(content)
            self._check()
            if not committed.create(_signed(step)):
                raise _saved_by_another(step, folder)
            mark.unlink()

        def patiently(what: str, act: Callable[[], None]) -> Callable[[], None]:
            return lambda: keep_writing(f"{what} of checkpoint {step}", act, self._log)

        cluster.decide(f"begins checkpoint {step}", patiently("the folder", begin), SAVE_LIMIT_S, f"{name} begins")
        cluster.together(f"writes checkpoint {step}", write_patiently, SAVE_LIMIT_S, f"{name} writes")
        cluster.decide(f"completes checkpoint {step}", patiently("the index", end), SAVE_LIMIT_S, f"{name} ends")

    def _check(self) -> None:
        if self._mirror:
            self._mirror.check()

    # ---- taking away ---------------------------------------------------------------------------------------------

    def delete(self, step: int) -> None:
        """In an order that no kill makes half a checkpoint of it."""
        self._check()
        (self.workdir / "saving" / str(step)).put(_signed(step))
        (self.workdir / "committed" / str(step)).unlink()
        self.delete_unfinished()

    def move(self, step: int, target: BucketPath) -> None:
        """Takes a step out of the listing to the folder `target`, which is complete once its meta is there."""
        self._check()
        folder = self.directory / str(step)
        keep_writing(f"a copy of checkpoint {step}", lambda: folder.copy_tree(target, META), self._log)
        self.delete(step)

    def abandon(self, step: int, target: BucketPath, why: str) -> None:
        """Takes a bad step out of the listing. Without renaming: its arrays lie where they are, until the run saves
        that step again; its meta goes to the folder `target`, so that no copy of it looks complete."""
        self._check()
        meta = self.directory / str(step) / META
        with suppress(FileNotFoundError):
            (target / "meta.json").put(meta.read_bytes())
        (target / "why.json").put(json.dumps({"step": step, "why": why}).encode())
        (self.workdir / "committed" / str(step)).unlink()
        meta.unlink()

    def delete_unfinished(self) -> None:
        """Deletes what killed saves, and killed deletes, have left; another thread may be saving meanwhile."""
        for mark in (self.workdir / "saving").iterdir():
            if mark.name == self._in_progress:
                continue
            if not (self.workdir / "committed" / mark.name).exists():
                self._check()
                (self.directory / mark.name / META).unlink()
                (self.directory / mark.name).delete_tree()
            mark.unlink()


class BucketLineage(Lineage):
    """Which of them stay: the same policy, without renaming."""

    def __init__(self, steps: BucketSteps, journal: Path | BucketPath, policy: Policy, log: Callable[[str], None]):
        super().__init__(steps.directory, journal, policy, log)
        self._steps = steps

    def _is_there(self, step: int) -> bool:
        return (self._steps.workdir / "committed" / str(step)).is_file()

    def _has_moments(self, folder: BucketPath) -> bool:
        return (folder / "moments" / INDEX).is_file()

    def put_away(self, step: int, target: BucketPath, why: str) -> None:
        self._steps.abandon(step, target, why)

    def _discard(self, path: BucketPath, name: str) -> None:
        """A step, or the moments of one, whose index goes last: by it the next start finds what a kill left."""
        if path.parent == self.directory:
            self._steps.delete(int(path.name))
        else:
            path.delete_tree(last=INDEX)

    def _empty_trash(self, _: list[int]) -> None:
        self._steps.delete_unfinished()


def committed_steps(workdir: BucketPath) -> list[int]:
    """Those that are complete, oldest first; of a run copied from a disk, which marks none, those with a meta."""
    found = (workdir / "committed").keys()
    if not found:
        keys = (workdir / "checkpoints").keys()
        found = [key.removesuffix(f"/{META}") for key in keys if key.endswith(f"/{META}")]
    return sorted(int(name) for name in found if name.isdigit())


def _saved_by_another(step: int, folder: BucketPath) -> ConfigError:
    return ConfigError(f"checkpoint {step}: another run has saved it to {folder} meanwhile: one run a workdir")


def _signed(step: int) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # By the token a writer whose answer was lost knows its own.
    return json.dumps({"step": step, "time": now, "host": socket.gethostname(), "token": uuid.uuid4().hex}).encode()


# ---- Orbax's format --------------------------------------------------------------------------------------------------


def write_arrays(
    folder: BucketPath, arrays: Mapping[str, jax.Array], process: int, context: ts.Context
) -> None:
    """Writes what this process's devices hold, of several copies the first; raises StorageError."""
    base = bucket.spec(folder / f"ocdbt.process_{process}", folder=True)

    def write(item: tuple[str, jax.Array]) -> None:
        name, x = item
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        if shards:
            array = ts.open(_array_spec(name, x, base), context=context, create=True, open=True).result()
            writes = [array[shard.index].write(np.asarray(shard.data)) for shard in shards]
            [write.result() for write in writes]

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, arrays.items()))
    except (ValueError, OSError) as error:
        raise StorageError(f"cannot write {folder}: {one_line(error)}") from error


def merge_arrays(
    folder: BucketPath, arrays: Mapping[str, jax.Array], processes: int, context: ts.Context
) -> None:
    """Puts together the indices of what all processes have written below theirs; raises StorageError."""
    try:
        whole, transaction = _index(folder, context), ts.Transaction(atomic=True)
        parts = [_index(folder / f"ocdbt.process_{process}", context) for process in range(processes)]
        copies = [part.experimental_copy_range_to(whole.with_transaction(transaction)) for part in parts]
        [copy.result() for copy in copies]
        transaction.commit_async().result()
    except (ValueError, OSError) as error:
        raise StorageError(f"cannot write {folder}: {one_line(error)}") from error
    (folder / INDEX).put(json.dumps(orbax_metadata(arrays)).encode())


def orbax_metadata(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """By which Orbax knows what a folder holds."""
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {**value, "write_shape": list(x.sharding.shard_shape(x.shape))},
        }
        for name, x in arrays.items()
    }
    formats = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **formats, "custom_metadata": None}


def chunk_shape(shape: tuple[int, ...], itemsize: int, by_layer: bool) -> list[int]:
    """Of a device's part: all of it, or a layer where it is large, or what divides it and is no larger than a chunk."""
    chunk = list(shape)
    if by_layer and math.prod(shape) * itemsize > SMALL_BYTES:
        chunk[0] = 1
    for dim, size in enumerate(chunk):
        most = CHUNK_BYTES * size // (math.prod(chunk) * itemsize)  # of this dimension
        if most < size:
            chunk[dim] = next(part for part in range(max(most, 1), 0, -1) if size % part == 0)
    return chunk


def _array_spec(name: str, x: jax.Array, base: dict[str, Any]) -> dict[str, Any]:
    by_layer = name.startswith(("params/layers.", "ema/layers."))
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "dtype": str(x.dtype),
        "metadata": {
            "shape": list(x.shape),
            "chunks": chunk_shape(x.sharding.shard_shape(x.shape), x.dtype.itemsize, by_layer),
            "compressor": {"id": "zstd", "level": 1},
        },
        # By default a chunk of nothing but zeros is not stored, and looks like one that was lost.
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def _index(folder: BucketPath, context: ts.Context) -> ts.KvStore:
    return ts.KvStore.open(
        {"driver": "ocdbt", "base": bucket.spec(folder, folder=True)}, context=context
    ).result()
