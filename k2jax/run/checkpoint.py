"""The checkpoints of one run as its trainer has them: saved in the background, verified, newest good one restored.

What one is on the storage: storage.py; which ones stay: lineage.py.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy

from k2jax import paths
from k2jax.bucket import BucketPath, at
from k2jax.errors import ConfigError, DamagedError, StorageError
from k2jax.model.decoder import LAYOUT_VERSION
from k2jax.parallel import cluster
from k2jax.run import digest, storage
from k2jax.run.bucket_steps import BucketLineage, BucketSteps
from k2jax.run.devices import check_copies
from k2jax.run.disk_layout import from_disk
from k2jax.run.lineage import Lineage, Policy
from k2jax.run.mirror import Mirror
from k2jax.run.reading import BUGS, one_line, patiently
from k2jax.run.state import TrainState, flat, unflat

SAVE_LIMIT_S = 7200  # for all processes to have written theirs, tries that fail included


class ThinnedError(ConfigError):
    """A checkpoint whose weights are good and whose moments were taken away: nothing to train on from."""


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        workdir: the run's folder, or the URL where it is in a bucket.
        keep_steps: ends of chunks, whose checkpoints are kept for ever; None: nothing is changed on disk.
        keep_between: of the others, how many are kept besides the newest.
        log: is told what happens, a line at a time, also from other threads.
        moments_every: the moments of every so many chunks' checkpoints are kept, and those of the newest two.
        mirror: of the run's small files, where it is in a bucket and training.
    """

    def __init__(
        self,
        workdir: epath.PathLike | BucketPath,
        keep_steps: Iterable[int] | None = None,
        keep_between: int = 2,
        log: Callable[[str], None] = print,
        *,
        moments_every: int = 1,
        mirror: Mirror | None = None,
    ):
        workdir, read_only = epath.Path(paths.absolute(at(workdir))), keep_steps is None  # Orbax takes no other
        self.directory, self.log = workdir / "checkpoints", log
        policy = Policy(None if read_only else frozenset(keep_steps), keep_between, moments_every)
        self.in_bucket = isinstance(workdir, BucketPath)
        self._warn = log if cluster.is_main() else _to_stderr
        if self.in_bucket:
            self.manager = BucketSteps(workdir, mirror, self._warn)
            journal = mirror.local / "journal.jsonl" if mirror else workdir / "journal.jsonl"
            self.lineage = BucketLineage(self.manager, journal, policy, log)
        else:
            self.manager = _orbax(self.directory, read_only, self._warn)
            self.lineage = Lineage(self.directory, workdir / "journal.jsonl", policy, log)
        self._steps = self.steps()
        self.lineage.tidy([])  # what a kill has left in the trash; nothing else before one is found good
        self._saving: int | None = None
        self.last_meta: dict | None = None  # of the newest checkpoint that is known to be good
        self.last_data: dict | None = None  # of the checkpoint that was restored

    def keep(self, steps: Iterable[int]) -> None:
        """Steps to keep for ever, besides those that were given at first; once one is found good, and before a save."""
        policy = self.lineage.policy
        self.lineage.policy = policy._replace(keep_steps=policy.keep_steps | set(steps))
        self.lineage.tidy(self._steps)  # what a kill has left half done

    def pin(self, steps: Iterable[int]) -> None:
        """These stay as they are, and no others beyond the policy: what a roll-back went back to, or may."""
        self.lineage.policy = self.lineage.policy._replace(pinned=frozenset(steps))

    def known_steps(self) -> list[int]:
        """Newest first, as this process knows them, without asking the storage."""
        return self._steps

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """A run that stops for another reason completes the save under way: it may be of the last good state."""
        if error is not None:
            with suppress(StorageError):
                self.wait()

    # ---- save --------------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, step: int, *, data: dict, meta: dict) -> None:
        """Starts saving; returns when the arrays are copied and training may go on. Waits for an earlier save.

        A write that fails is tried again in the background, for some minutes. Raises StorageError when this or an
        earlier save fails for good, and NumericsError where devices have different copies of an array.
        """
        self.wait()
        if self._steps and step <= max(self._steps):
            raise StorageError(
                f"checkpoint {step}: {self.directory} already holds step {max(self._steps)}; move later steps to "
                f"{self.lineage.abandoned}"
            )
        arrays = flat(state)
        check_copies(arrays, f"step {step}")
        parent = {key: self.last_meta[key] for key in ("step", "digest")} if self.last_meta else None
        described = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
        digests: Future[dict[str, jax.Array]] = Future()

        def finish_meta() -> dict[str, Any]:
            values = {name: int(value) for name, value in digests.result().items()}
            self._saved_meta = {
                "format": storage.FORMAT,
                "layout": LAYOUT_VERSION,
                "step": step,
                "parent": parent,
                "data": data,
                **self.lineage.policy.describe(step),
                **meta,
                "arrays": described,
                "digests": values,
                "digest": digest.combine(values),
            }
            return self._saved_meta

        try:
            on_host = storage.copy_to_host(arrays)
            if self.in_bucket:
                self.manager.save(step, storage.parts(on_host), storage.texts(data, finish_meta))
            else:
                self.manager.save(step, args=storage.save_args(on_host, data, finish_meta), force=True)
        except (*BUGS, ConfigError):
            raise
        except Exception as error:
            raise _cannot_save(step, self.directory, error) from error
        finally:
            # Under way only now, after Orbax has its copies: on a CPU they would share the cores.
            replicated = NamedSharding(jax.tree.leaves(arrays)[0].sharding.mesh, PartitionSpec())
            try:
                digests.set_result(jax.jit(digest.tree_digests, out_shardings=replicated)(arrays))
            except BaseException as error:  # also Ctrl-C: whoever waits for them must end
                digests.set_exception(error)
                raise
        self._saving = step

    def poll(self) -> dict | None:
        """The meta of a save that has become complete since the last call, else None. Never waits for one."""
        return self.wait() if self._saving is not None and not self.manager.is_saving_in_progress() else None

    def wait(self) -> dict | None:
        """Waits for the running save; its meta, or None without one. Raises StorageError when it failed."""
        if self._saving is None:
            return None
        step, self._saving = self._saving, None
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except (*BUGS, ConfigError):
            raise
        except Exception as error:
            raise _cannot_save(step, self.directory, error) from error
        self.last_meta = self._saved_meta
        self._steps = [step, *self._steps]
        self.log(f"saved {step}")
        self.lineage.tidy(self._steps)
        return self.last_meta

    # ---- restore -----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps on disk as process 0 lists them, newest first; complete by Orbax's account, not yet verified."""

        def listed() -> list[int]:
            self.manager.reload()
            return sorted(self.manager.all_steps(), reverse=True)

        return cluster.decide("lists checkpoints", listed)

    def restore(self, step: int, shardings: TrainState, shapes: TrainState) -> TrainState:
        """State of one step on the mesh of `shardings`, every array checked against its digest.

        Raises the same on every process: ConfigError when the arrays are not those of this model, or its moments were
        taken away; DamagedError when it is certainly damaged; StorageError when the storage does not give it, which
        says nothing of it.
        """
        thinned = cluster.decide(
            "looks at a checkpoint", lambda: storage.is_thinned(self.lineage.folder(step))
        )
        if thinned:
            raise ThinnedError(
                f"checkpoint {step}: its moments were taken away (checkpoint.moments_every), training cannot go on "
                f"from it; its weights are whole: evaluate or export them, or resume from another step"
            )
        # Damage in what one process reads is met by that one alone; the others would wait for it for ever.
        meta, arrays, data = cluster.together(
            f"reads checkpoint {step}",
            lambda: patiently(f"checkpoint {step}", lambda: self._read(step, shardings, shapes), self._warn),
        )
        places = storage.layouts(arrays, flat(shardings))
        arrays = {name: from_disk(x, places[name], flat(shardings)[name]) for name, x in arrays.items()}
        found = jax.block_until_ready(jax.jit(digest.tree_digests)(arrays))
        cluster.together(f"verifies checkpoint {step}", lambda: _verify(step, meta, found))
        self.last_meta, self.last_data = meta, data
        return unflat({**_begun(shardings, shapes, arrays), **arrays})

    def _read(
        self, step: int, shardings: TrainState, shapes: TrainState
    ) -> tuple[dict, dict[str, jax.Array], dict]:
        """(meta, arrays as they lie for the disk, data) of a step, the arrays not yet checked. Nothing collective."""
        folder = self.lineage.folder(step)
        meta = storage.read_meta(folder)
        if meta["step"] != step:
            raise DamagedError(
                f"checkpoint {step}: it is that of step {meta['step']}, in a folder of another name"
            )
        storage.check_format(meta, f"checkpoint {step}")
        if not storage.has_moments(meta):
            shardings, shapes = (state._replace(mu={}, nu={}) for state in (shardings, shapes))
        absent = {field: {} for field in storage.OPTIONAL if not storage.has(field, meta["arrays"])}
        shardings, shapes = (state._replace(**absent) for state in (shardings, shapes))
        wanted = {name: [list(x.shape), str(x.dtype)] for name, x in flat(shapes).items()}
        storage.check_arrays(step, meta, wanted)
        data = storage.read_data(folder, meta)
        layouts = storage.layouts(flat(shapes), flat(shardings))
        return (
            meta,
            storage.read_arrays(folder, meta, {name: x.sharding for name, x in layouts.items()}),
            data,
        )

    def restore_newest(self, shardings: TrainState, shapes: TrainState) -> TrainState | None:
        """The newest good checkpoint; None when there is none at all. Newer ones of no use are named and moved away.

        Raises StorageError when steps exist and none is good: a run never starts from scratch in silence; and when the
        storage does not give the newest, which may be good. ConfigError where all have lost their moments.
        """
        refused: list[StorageError | ThinnedError] = []
        listed = self.steps()
        for step in listed:
            try:
                state = self.restore(step, shardings, shapes)
            except (DamagedError, ThinnedError) as error:
                self.log(f"refused: {error}")
                refused.append(error)
                continue
            for bad, why in zip(listed, refused, strict=False):
                self.lineage.abandon(bad, str(why))
            if refused:
                self.manager.reload()  # it saves no step that it knows of
            self._steps = listed[len(refused) :]
            return state
        if refused:
            kind = ConfigError if isinstance(refused[0], ConfigError) else StorageError
            raise kind(
                f"none of {len(refused)} checkpoint(s) in {self.directory} can be used: "
                + "; ".join(map(str, refused))
                + "; restore one from a copy, or start in a new workdir"
            )
        return None

    def close(self) -> None:
        self.manager.close()
        self.lineage.close()


def _orbax(directory: epath.Path, read_only: bool, log: Callable[[str], None]) -> ocp.CheckpointManager:
    handlers = storage.handlers(log)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=1,
        create=not read_only,
        read_only=read_only,
        preservation_policy=preservation_policy.PreserveAll(),  # lineage.py decides
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_LIMIT_S),
    )
    return ocp.CheckpointManager(directory, options=options, item_names=tuple(handlers), item_handlers=handlers)


def _verify(step: int, meta: dict, found: dict[str, jax.Array]) -> None:
    """Every copy that this process's devices hold: where devices have copies of an array, one may be damaged alone."""
    read = {name: [int(shard.data) for shard in value.addressable_shards] for name, value in found.items()}
    wrong = {name: copies for name, copies in read.items() if set(copies) != {meta["digests"].get(name)}}
    if wrong:
        name, copies = next(iter(wrong.items()))
        raise DamagedError(
            f"checkpoint {step}: damaged array(s) {', '.join([*wrong][:5])}: digest "
            f"{', '.join(f'{copy:08x}' for copy in sorted(set(copies)))}, recorded {meta['digests'].get(name, 0):08x}"
        )


def _begun(shardings: TrainState, shapes: TrainState, read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the state's arrays, those that the checkpoint has none of, as before the first step: an average begins as the
    weights, all else as zeros."""
    wanted, places = ({n: x for n, x in flat(s).items() if n not in read} for s in (shapes, shardings))
    if not wanted:
        return {}

    def begin(read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in wanted.items()}
        return zeros | {name: jnp.copy(read[f"params{name[3:]}"]) for name in wanted if name.startswith("ema/")}

    return jax.jit(begin, out_shardings=places)(dict(read))


def _to_stderr(line: str) -> None:
    """What a process other than the first meets, which else says nothing."""
    print(f"process {cluster.index()}: {line}", file=sys.stderr, flush=True)


def _cannot_save(step: int, directory: epath.Path, error: Exception) -> StorageError:
    return StorageError(
        f"checkpoint {step} could not be saved under {directory}: {one_line(error)}; "
        f"the run stops, earlier checkpoints are untouched"
    )
