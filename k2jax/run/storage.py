"""One checkpoint on the storage: a folder of four parts that are committed together, and what is in each.

    params/    the weights, their average (ema), and the integers of the state; float32 by name, through Orbax
    moments/   the optimizer's; a checkpoint of weights only has none, an old one has lost them (thinned.json)
    data/      the one integer that the loader needs, and the digest of its order
    meta/      what the arrays are, a digest of each, where they came from; and its own SHA-256

Orbax restores flipped bits in silence and lists half-deleted steps, so a step is good only when its digests say so.

How the arrays are cut: disk_layout.py.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from orbax.checkpoint import future

from k2jax import bucket, files
from k2jax.bucket import BucketPath
from k2jax.data.manifest import sha256_json
from k2jax.data.storage import kvstore
from k2jax.errors import ConfigError, DamagedError, StorageError
from k2jax.model.decoder import LAYOUT_VERSION
from k2jax.parallel import cluster
from k2jax.run.disk_layout import DiskLayout, disk_layout, to_disk
from k2jax.run.reading import keep_writing

FORMAT = 2  # of the parts; LAYOUT_VERSION is of the arrays' names and shapes
CHUNK_BYTES = 1 << 27  # of an array on disk, at most: read, checked and decoded as a whole
SMALL_BYTES = 1 << 23  # a device's part of a parameter up to this is one chunk, all layers in it
READERS = 8  # arrays that a process reads at a time
OPTIONAL = ("clips", "ema")  # fields of the state that a run may turn on or off on its way
THINNED = "thinned.json"  # beside the parts: the moments were taken away, on purpose
Log = Callable[[str], None]
# What epath.Path makes of a URL, and leaves as it is, without gcsfs, s3fs or TensorFlow: here, and for JAX's cache.
epath.register_path_cls(("gs://", "s3://"))(BucketPath)


# ---- what a step says of itself --------------------------------------------------------------------------------------


def read_meta(step_folder: epath.PathLike) -> dict[str, Any]:
    """The meta part of a checkpoint, found whole; raises DamagedError, or OSError when it cannot be read."""
    folder = epath.Path(step_folder)
    values = _read_json(folder, "meta/meta.json")
    recorded = values.pop("meta_sha256", None)
    if recorded != sha256_json(values):
        raise DamagedError(f"checkpoint {folder.name}: meta.json does not have the SHA-256 that it records")
    return values


def read_data(step_folder: epath.PathLike, meta: dict[str, Any]) -> dict[str, Any]:
    """The data part; DamagedError when it is not the one that the meta records."""
    folder = epath.Path(step_folder)
    data = _read_json(folder, "data/metadata")
    if data != meta["data"]:
        raise DamagedError(f"checkpoint {folder.name}: its data part is not the one that its meta records")
    return data


def _read_json(folder: epath.Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        if not folder.exists():  # so nothing is known of it: the storage may be gone as a whole
            raise StorageError(
                f"checkpoint {folder.name}: its folder {folder} was listed and is not there"
            ) from error
        raise DamagedError(f"checkpoint {folder.name}: there is no {name} in its folder") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"checkpoint {folder.name}: {name} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise DamagedError(f"checkpoint {folder.name}: {name} is no JSON object")
    return values


def check_format(meta: dict[str, Any], what: str) -> None:
    """ConfigError for a checkpoint of a format or layout that this code does not read."""
    for key, known in (("format", FORMAT), ("layout", LAYOUT_VERSION)):
        if meta.get(key) != known:
            raise ConfigError(
                f"{what}: {key} {meta.get(key)!r}, this k2jax reads {key} {known}: "
                f"use the version that wrote it ({meta.get('versions', {}).get('k2jax', 'unknown')})"
            )


def check_arrays(step: int, meta: dict[str, Any], wanted: Mapping[str, list]) -> None:
    """ConfigError when a checkpoint does not hold {name: [shape, type]}: the configuration needs another."""
    check_format(meta, f"checkpoint {step}")
    off = tuple(f"{field}/" for field in OPTIONAL if not has(field, wanted))  # nobody needs those arrays then
    found = {name for name in meta["arrays"] if not name.startswith(off)}
    differing = [name for name in sorted(wanted.keys() | found) if wanted.get(name) != meta["arrays"].get(name)]
    if differing:
        name = differing[0]
        saved = meta.get("config", {}).get("optimizer", {}).get("name", "adamw")
        why = f": its moments are of optimizer.name={saved!r}: train on with that one, or begin a run from its weights"
        why += " (tools/convert_to_hf.py, then tools/convert_from_hf.py)"
        raise ConfigError(
            f"checkpoint {step}: array {name} is {meta['arrays'].get(name, 'absent')}, the configuration needs "
            f"{wanted.get(name, 'none of that name')}{why if all(map(is_moment, differing)) else ''}"
        )


def has_moments(meta: dict[str, Any]) -> bool:
    """False for a checkpoint of weights only, as an import leaves it."""
    return any(is_moment(name) for name in meta["arrays"])


def has(field: str, names: Iterable[str]) -> bool:
    """Whether arrays of these names have those of a field of the state."""
    return any(name.startswith(f"{field}/") for name in names)


def is_thinned(step_folder: epath.PathLike) -> bool:
    """Whether its moments were taken away to save room: its weights are as good as ever."""
    return (epath.Path(step_folder) / THINNED).exists()


def is_moment(name: str) -> bool:
    return name.startswith(("mu/", "nu/", "clips/"))


def _part(name: str) -> str:
    """The folder, in a step's, of an array."""
    return "moments" if is_moment(name) else "params"


# ---- where arrays lie for the disk -----------------------------------------------------------------------------------


def layouts(shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> dict[str, DiskLayout]:
    """{name: where it lies in training and for the disk}; of `shapes` shape and dtype count."""
    return {
        name: disk_layout(tuple(x.shape), x.dtype.itemsize, shardings[name], by_layer=is_stacked(name))
        for name, x in shapes.items()
    }


def copy_to_host(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays as they go to the disk, in the hosts' memory: what is being saved outlives the step that follows."""
    places = layouts(arrays, {name: x.sharding for name, x in arrays.items()})

    def copy(x: jax.Array) -> jax.Array:
        place = [
            SingleDeviceSharding(shard.device, memory_kind="pinned_host") for shard in x.addressable_shards
        ]
        parts = jax.device_put([shard.data for shard in x.addressable_shards], place)
        return jax.make_array_from_single_device_arrays(
            x.shape, x.sharding.with_memory_kind("pinned_host"), parts
        )

    return jax.block_until_ready({name: copy(to_disk(x, places[name])) for name, x in arrays.items()})


def is_stacked(name: str) -> bool:
    """Whether its readers go layer by layer; those of the moments take all."""
    return name.startswith(("params/layers.", "ema/layers."))


def chunk_args(name: str, x: jax.Array) -> ocp.SaveArgs:
    """A chunk on disk: a device's part, or a layer of it where that is large, or so much of it as a chunk may have."""
    large = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize > SMALL_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if large and is_stacked(name) else ())


# ---- writing ---------------------------------------------------------------------------------------------------------


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Writes arrays that lie with the host, so that it can try again for as long as the storage fails."""

    def __init__(self, part: str, log: Log):
        super().__init__(use_replica_parallel=False, enable_write_sharding_file=False)
        self._part, self._log = part, log

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[future.Future]:
        """See Orbax. What it returns is being written."""
        again = super().serialize

        def write() -> None:
            # Orbax's limit on the bytes under way has a lock that a try which fails may leave taken: each has its own.
            limit = type(infos[0].byte_limiter)(infos[0].byte_limiter.max_bytes)
            anew = [info.replace(byte_limiter=limit) for info in infos]
            for part in asyncio.run(again(values, anew, args)):
                part.result()

        async def write_patiently() -> None:
            await asyncio.to_thread(keep_writing, f"{self._part} of a checkpoint", write, self._log)

        return [future.CommitFutureAwaitingContractedSignals(write_patiently(), name="arrays")]


class _Parts(ocp.PyTreeCheckpointHandler):
    """Arrays of one part; process 0 puts together at the end what all have written."""

    def __init__(self, part: str, log: Log):
        super().__init__(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, _Arrays(part, log))
            )
        )
        self._patient_log = log

    def finalize(self, directory: epath.Path) -> None:
        keep_writing(
            f"{directory}: its index", lambda: super(_Parts, self).finalize(directory), self._patient_log
        )


@ocp.args.register_with_handler(_Parts, for_save=True, for_restore=True)
class _PartsArgs(ocp.args.PyTreeSave):
    pass


class _LateJson(ocp.JsonCheckpointHandler):
    """Writes the JSON that a function returns, called in the background: the digests need not be ready at the save."""

    def __init__(self, name: str, log: Log):
        super().__init__(name)
        self._name, self._log = name, log

    async def _save_fn(self, item: Callable[[], dict], directory: epath.Path) -> None:
        text = json.dumps(item(), indent=1)
        if cluster.is_main():
            path = epath.Path(directory) / self._name
            await asyncio.to_thread(keep_writing, str(path), lambda: files.write_text(path, text), self._log)


@ocp.args.register_with_handler(_LateJson, for_save=True, for_restore=True)
@dataclass
class _LateJsonArgs(ocp.args.CheckpointArgs):
    item: Callable[[], dict] | None = None


def handlers(log: Log) -> dict[str, ocp.CheckpointHandler]:
    """Orbax's, by part. `log` is told of every write that fails, from another thread."""
    arrays = {name: _Parts(name, log) for name in ("params", "moments")}
    return {**arrays, "data": _LateJson("metadata", log), "meta": _LateJson("meta.json", log)}


def save_args(
    on_host: dict[str, jax.Array], data: dict[str, Any], finish_meta: Callable[[], dict[str, Any]]
) -> ocp.args.Composite:
    """What CheckpointManager.save takes. `finish_meta` is called in the background."""
    arrays = {
        part: _PartsArgs(group, {name: chunk_args(name, x) for name, x in group.items()})
        for part, group in parts(on_host).items()
    }
    return ocp.args.Composite(
        **arrays, data=_LateJsonArgs(lambda: data), meta=_LateJsonArgs(lambda: with_sha256(finish_meta()))
    )


def parts(arrays: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """{part: its arrays}."""
    groups: dict[str, dict[str, jax.Array]] = {}
    for name, x in arrays.items():
        groups.setdefault("moments" if is_moment(name) else "params", {})[name] = x
    return groups


def texts(
    data: dict[str, Any], finish_meta: Callable[[], dict[str, Any]]
) -> dict[str, Callable[[], str]]:
    """{file: function that gives its content} of the other parts, the meta last."""
    return {
        "data/metadata": lambda: json.dumps(data, indent=1),
        "meta/meta.json": lambda: json.dumps(with_sha256(finish_meta()), indent=1),
    }


def with_sha256(meta: dict[str, Any]) -> dict[str, Any]:
    """So that a damaged meta is never taken for another configuration, or for damaged arrays."""
    return {**meta, "meta_sha256": sha256_json(meta)}


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_array(step_folder: epath.PathLike, meta: dict[str, Any], name: str) -> ts.TensorStore:
    """One array of a step, found to be as its meta records; raises DamagedError, or what TensorStore raises."""
    if is_moment(name) and is_thinned(step_folder):
        raise StorageError(
            f"checkpoint {meta['step']}: {name} is gone: its moments were taken away to save room"
        )
    folder = epath.Path(step_folder) / _part(name)
    base, context = kvstore(str(folder)), bucket.context() if isinstance(folder, BucketPath) else None
    place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    # By default a chunk that is missing reads as zeros.
    spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
    array = ts.open(spec, open=True, read=True, context=context).result()
    found, expected = [list(array.shape), array.dtype.name], meta["arrays"].get(name)
    if found != expected:
        raise DamagedError(f"checkpoint {meta['step']}: array {name} is {found}, its meta records {expected}")
    return array


def read_arrays(
    step_folder: epath.PathLike, meta: dict[str, Any], places: Mapping[str, Sharding], *, one_by_one: bool = False
) -> dict[str, jax.Array]:
    """{name: array} as `places` says: a process reads the parts of its own devices, one that several have once.

    `one_by_one`: of an array, its host then has one part at a time. Raises what TensorStore raises; StorageError when
    the step is gone as a whole, which says nothing of it.
    """

    def read(name: str) -> jax.Array:
        store, place = open_array(step_folder, meta, name), places[name]
        index_of = place.addressable_devices_indices_map(store.shape)
        indices = {str(index): index for index in index_of.values()}
        reads = {} if one_by_one else {key: store[index].read() for key, index in indices.items()}
        parts = {}
        for key, index in indices.items():
            part = (reads.pop(key) if reads else store[index].read()).result()
            parts |= {device: jax.device_put(part, device) for device, i in index_of.items() if str(i) == key}
            if one_by_one:
                jax.block_until_ready(list(parts.values()))
        return jax.make_array_from_single_device_arrays(store.shape, place, [parts[device] for device in index_of])

    try:
        with ThreadPoolExecutor(READERS) as pool:  # TensorStore reads and decodes outside of Python's lock
            return dict(zip(places, pool.map(read, places), strict=True))
    except Exception as error:
        if not (epath.Path(step_folder) / "meta" / "meta.json").exists():
            raise StorageError(f"checkpoint {meta['step']}: {step_folder} is no longer there") from error
        raise
