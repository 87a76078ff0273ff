"""Checkpoints: Orbax, asynchronous, verified by our own digests, with lineage.

One Orbax step has three parts that are committed together: `state` (plain named arrays), `data` (the one integer that
the loader needs, and the digest of its order), `meta` (what the arrays are, a digest of each, where they came from).
Orbax restores flipped bits in silence and lists half-deleted steps, so a step is good only when its digests say so.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from k2jax import files
from k2jax.data.journal import append_entry
from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError, DamagedError, StorageError
from k2jax.model.decoder import LAYOUT_VERSION
from k2jax.parallel import cluster
from k2jax.run import digest
from k2jax.run.reading import one_line, patiently
from k2jax.run.state import TrainState, flat, unflat

CHUNK_BYTES = 1 << 26  # of an array on disk, at most: read, checked and decoded as a whole
FORMAT = 1  # of the three parts; LAYOUT_VERSION is of the arrays' names and shapes


class _LateJson(ocp.JsonCheckpointHandler):
    """Writes the JSON that a function returns, called in the background: the digests need not be ready at the save.

    With its own SHA-256, so that a damaged meta is never taken for another configuration, or for damaged arrays.
    """

    async def _save_fn(self, item: Callable[[], dict], directory: epath.Path) -> None:
        values = item()
        if cluster.is_main():
            text = json.dumps({**values, "meta_sha256": sha256_json(values)}, indent=1)
            files.write_text(directory / "meta.json", text)

    def restore(self, directory: epath.Path, item: None = None, args: None = None) -> dict:
        return read_meta(directory)


def read_meta(directory: epath.PathLike) -> dict[str, Any]:
    """The meta part of a checkpoint, found whole; raises ValueError, KeyError or OSError when it is damaged."""
    values = json.loads((epath.Path(directory) / "meta.json").read_text())
    if values.pop("meta_sha256") != sha256_json(values):
        raise ValueError("meta.json does not have the SHA-256 that it records")
    return values


@ocp.args.register_with_handler(_LateJson, for_save=True, for_restore=True)
@dataclasses.dataclass
class _LateJsonArgs(ocp.args.CheckpointArgs):
    item: Callable[[], dict] | None = None


def _chunks(name: str) -> ocp.SaveArgs:
    """A chunk on disk is at most one layer of a stacked array, so that readers may go layer by layer."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if "/layers." in name else ())


class Checkpoints:
    """The checkpoints of one run directory. `keep_steps` are kept for ever, of the others only the newest few."""

    def __init__(
        self,
        workdir: Path,
        keep_steps: list[int] | None = None,
        keep_between: int = 2,
        log: Callable[[str], None] = print,
    ):
        workdir = workdir.absolute()  # Orbax takes no other
        self.directory, self.abandoned, self.log = workdir / "checkpoints", workdir / "abandoned", log
        read_only, self._told_of_trash = keep_steps is None, False
        if not read_only:
            self._empty_trash()
        policy = keep.AnyPreservationPolicy(
            [keep.CustomSteps(keep_steps or ()), keep.LatestN(keep_between + 1)]
        )
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=1,
            create=not read_only,
            read_only=read_only,
            preservation_policy=policy,
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else "trash",
            enable_async_checkpointing=True,
        )
        self.handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "meta": _LateJson(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=tuple(self.handlers), item_handlers=self.handlers
        )
        self._saving: int | None = None
        self.last_meta: dict | None = None  # of the newest checkpoint that is known to be good
        self.last_data: dict | None = None  # of the checkpoint that was restored

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """A run that stops for another reason completes the save under way: it may be of the last good state."""
        if error is not None:
            with suppress(StorageError):
                self.wait()

    def _empty_trash(self) -> None:
        """Orbax moves old steps to this folder, so that no kill leaves one half deleted; nothing else empties it."""
        trash = self.directory / "trash"
        if cluster.is_main() and trash.exists():
            shutil.rmtree(trash, ignore_errors=True)
            # NFS keeps a file that somebody has open, as .nfs...: until they close it, and it costs nothing but room.
            if trash.exists() and not self._told_of_trash:
                self._told_of_trash = True
                stays = ", ".join(path.name for path in trash.rglob("*") if path.is_file())
                self.log(f"{trash} cannot be emptied yet: {stays} stays; tried again at each save")

    # ---- save --------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, step: int, *, data: dict, meta: dict) -> None:
        """Starts saving; returns when the arrays are copied and training may go on. Waits for an earlier save.

        Raises StorageError when this or an earlier save fails.
        """
        self.wait()
        arrays = flat(state)
        parent = {key: self.last_meta[key] for key in ("step", "digest")} if self.last_meta else None
        described = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}

        digests: Future[dict[str, jax.Array]] = Future()

        def finish_meta() -> dict:
            values = {name: int(value) for name, value in digests.result().items()}
            self._saved_meta = {
                "format": FORMAT,
                "layout": LAYOUT_VERSION,
                "step": step,
                "parent": parent,
                "data": data,
                **meta,
                "arrays": described,
                "digests": values,
                "digest": digest.combine(values),
            }
            return self._saved_meta

        parts = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays, {name: _chunks(name) for name in arrays}),
            data=ocp.args.JsonSave(data),
            meta=_LateJsonArgs(finish_meta),
        )
        try:
            saved = self.manager.save(step, args=parts)
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
        if not saved:
            raise StorageError(
                f"checkpoint {step}: Orbax refused to save it: {self.directory} already holds "
                f"step {self.manager.latest_step()}; move later steps to {self.abandoned}"
            )
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
        except Exception as error:
            raise _cannot_save(step, self.directory, error) from error
        self.last_meta = self._saved_meta
        self.log(f"saved {step}")
        self._empty_trash()
        return self.last_meta

    # ---- restore -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps on disk as process 0 lists them, newest first; complete by Orbax's account, not yet verified."""
        self.manager.reload()
        return cluster.decide("lists checkpoints", lambda: sorted(self.manager.all_steps(), reverse=True))

    def meta(self, step: int) -> dict:
        """What the checkpoint of a step says of itself."""
        return self._part(step, "meta")

    def restore(self, step: int, shardings: TrainState, shapes: TrainState) -> TrainState:
        """State of one step on the mesh of `shardings`, every array checked against its digest.

        Raises the same on every process: ConfigError when the arrays are not those of this model, DamagedError when
        they are damaged, StorageError when the storage does not give them, which says nothing of them.
        """
        # Damage in what one process reads is met by that one alone; the others would wait for it for ever.
        meta, arrays, data = cluster.together(
            f"reads checkpoint {step}",
            lambda: patiently(f"checkpoint {step}", lambda: self._read(step, shardings, shapes), self.log),
        )
        found = jax.block_until_ready(jax.jit(digest.tree_digests)(arrays))
        cluster.together(f"verifies checkpoint {step}", lambda: _verify(step, meta, found, data))
        self.last_meta, self.last_data = meta, data
        return unflat(arrays if _has_moments(meta) else {**arrays, **_zero_moments(shardings, shapes)})

    def _read(self, step: int, shardings: TrainState, shapes: TrainState) -> tuple[dict, dict[str, jax.Array], dict]:
        """(meta, arrays, data) of a step, the arrays not yet checked."""
        meta = self.meta(step)
        if meta["step"] != step:
            raise DamagedError(f"checkpoint {step}: it is that of step {meta['step']}, in a folder of another name")
        if not _has_moments(meta):
            shardings, shapes = (state._replace(mu={}, nu={}) for state in (shardings, shapes))
        wanted = {name: [list(x.shape), str(x.dtype)] for name, x in flat(shapes).items()}
        _check_layout(step, meta, wanted)
        restore_args = {
            name: ocp.ArrayRestoreArgs(sharding=s, global_shape=tuple(wanted[name][0]))
            for name, s in flat(shardings).items()
        }
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat(shapes).items()}
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        return meta, self._part(step, "state", args=args), self._part(step, "data")

    def _part(self, step: int, name: str, **kwargs: Any) -> Any:
        """Without the manager, whose barriers hang the other processes when one fails to read."""
        return self.handlers[name].restore(epath.Path(self.directory) / str(step) / name, **kwargs)

    def restore_newest(self, shardings: TrainState, shapes: TrainState) -> TrainState | None:
        """The newest good checkpoint; None when there is none at all. Newer damaged ones are named and moved away.

        Raises StorageError when steps exist and none is good: a run never starts from scratch in silence; and when the
        storage does not give the newest, which may be good.
        """
        refused: list[str] = []
        listed = self.steps()
        for step in listed:
            try:
                state = self.restore(step, shardings, shapes)
            except DamagedError as error:
                self.log(f"refused: {error}")
                refused.append(str(error))
                continue
            for bad, why in zip(listed, refused, strict=False):
                self.abandon(bad, why)
            return state
        if refused:
            raise StorageError(
                f"none of {len(refused)} checkpoint(s) in {self.directory} can be used: "
                + "; ".join(refused)
                + "; restore one from a copy, or start in a new workdir"
            )
        return None

    def abandon(self, step: int, why: str) -> None:
        """Moves a step out of the way (Orbax saves no step at or below the newest on disk), keeping it, journalled."""

        def move() -> str:
            target = self.abandoned / f"{step}-{time.strftime('%Y%m%dT%H%M%S')}"
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entry = {"time": now, "by": "k2jax.train", "why": why, "kind": "abandon", "at_step": step}
            append_entry(self.directory.parent / "journal.jsonl", entry)
            files.make_folder(self.abandoned)
            (self.directory / str(step)).rename(target)
            return str(target)

        self.log(f"moved checkpoint {step} to {cluster.decide(f'abandons checkpoint {step}', move)}")
        self.manager.reload()

    def close(self) -> None:
        self.manager.close()


def _verify(step: int, meta: dict, found: dict[str, jax.Array], data: dict) -> None:
    """Every copy that this process's devices hold: where devices have copies of an array, one may be damaged alone."""
    read = {name: [int(shard.data) for shard in value.addressable_shards] for name, value in found.items()}
    wrong = {name: copies for name, copies in read.items() if set(copies) != {meta["digests"].get(name)}}
    if wrong:
        name, copies = next(iter(wrong.items()))
        raise DamagedError(
            f"checkpoint {step}: damaged array(s) {', '.join([*wrong][:5])}: digest "
            f"{', '.join(f'{copy:08x}' for copy in sorted(set(copies)))}, recorded {meta['digests'].get(name, 0):08x}"
        )
    if data != meta["data"]:
        raise DamagedError(f"checkpoint {step}: its data part is not the one that its meta records")


def _has_moments(meta: dict) -> bool:
    """False for a checkpoint of weights only, as an import leaves it."""
    return any(name.startswith(("mu/", "nu/")) for name in meta.get("arrays", ()))


def _zero_moments(shardings: TrainState, shapes: TrainState) -> dict[str, jax.Array]:
    """AdamW's moments before the first step."""
    wanted, places = ({n: x for n, x in flat(s).items() if n.startswith(("mu/", "nu/"))} for s in (shapes, shardings))
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wanted), out_shardings=places)()


def _check_layout(step: int, meta: dict, wanted: dict[str, list]) -> None:
    for key, known in (("format", FORMAT), ("layout", LAYOUT_VERSION)):
        if meta.get(key) != known:
            raise ConfigError(
                f"checkpoint {step}: {key} {meta.get(key)!r}, this k2jax reads {key} {known}: "
                f"use the version that wrote it ({meta.get('versions', {}).get('k2jax', 'unknown')})"
            )
    for name in sorted(wanted.keys() | meta["arrays"].keys()):
        if wanted.get(name) != meta["arrays"].get(name):
            raise ConfigError(
                f"checkpoint {step}: array {name} is {meta['arrays'].get(name, 'absent')}, "
                f"the configuration needs {wanted.get(name, 'none of that name')}"
            )


def _cannot_save(step: int, directory: Path, error: Exception) -> StorageError:
    return StorageError(
        f"checkpoint {step} could not be saved under {directory}: {one_line(error)}; "
        f"the run stops, earlier checkpoints are untouched"
    )
