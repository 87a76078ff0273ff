"""What checkpoints cost on devices that are not here: bytes and pieces of a save, its time, what training waits for.

Each device's part of each array goes to its host's memory, which training waits for, and from there to the storage
beside the next steps, cut as run/disk_layout.py says: each part is written once. At a restore each host reads what its
devices wrote and no more; what others need is sent between devices.

Sources: the link to the host's memory, chips.py. Storage: out of Google Cloud Storage a project's machines of a region
get 200 Gbit/s in all, 25 GB/s, unless more is asked for (cloud.google.com/storage/quotas, "Bandwidth"), which is taken
for writing, too; 1 GB/s a host is our assumption. Both are options of tools/plan.py. Nothing here was measured.
"""

import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape

from k2jax.plan.chips import Chip
from k2jax.run import storage as on_disk
from k2jax.run.state import flat
from k2jax.training.optimizer import first_state
from k2jax.training.placement import place_state

DATA_FILE_BYTES = 1 << 31  # to which OCDBT fills one, as Orbax asks of it on a file system


class Storage(NamedTuple):
    """Rates of what holds the checkpoints, the same for reading and writing."""

    bytes_per_s: float = 25e9  # of all hosts together
    host_bytes_per_s: float = 1e9

    def seconds(self, most_of_a_host: float, of_all: float) -> float:
        """For so many bytes."""
        return max(most_of_a_host / self.host_bytes_per_s, of_all / self.bytes_per_s)


DEFAULT = Storage()


class Pieces(NamedTuple):
    """One array on the storage."""

    chunks: int
    written: dict[Any, int]  # bytes by device
    read: dict[int, int]  # bytes by host


def cost(
    config: ConfigDict, mesh: Mesh, chip: Chip, stages: dict[str, dict[str, Any]], storage: Storage
) -> dict[str, Any]:
    """Of each save and restore; and by stage, with the step times of `estimate.plan`, how often and which share."""
    shapes = jax.eval_shape(lambda: first_state(config))
    places = flat(place_state(config, shapes, mesh))
    arrays = {name: (x, pieces(name, x, places[name])) for name, x in flat(shapes).items()}
    by_device, by_host, reads = Counter(), Counter(), Counter()
    for _, of in arrays.values():
        by_device.update(of.written)
        reads.update(of.read)
    for device, size in by_device.items():
        by_host[device.process_index] += size
    state = sum(x.size * x.dtype.itemsize for x, _ in arrays.values())
    chunks = sum(of.chunks for _, of in arrays.values())
    hosts = {device.process_index for device in mesh.devices.flat}
    waits_s = max(by_device.values()) / chip.host_bytes_per_s
    write_s = storage.seconds(max(by_host.values()), state)
    return {
        "state_bytes": state,
        "hosts": len(hosts),
        "host_write_bytes": max(by_host.values()),
        "host_read_bytes": max(reads.values()),
        "read_bytes": sum(reads.values()),
        "chunks": chunks,
        "chunk_bytes": state / chunks,
        "data_files": sum(math.ceil(size / DATA_FILE_BYTES) for size in by_host.values()),
        "storage_bytes_per_s": storage.bytes_per_s,
        "storage_host_bytes_per_s": storage.host_bytes_per_s,
        "write_seconds": write_s,
        "restore_seconds": storage.seconds(max(reads.values()), sum(reads.values())),
        "stall_seconds": waits_s,
        "stages": _by_stage(config, stages, waits_s, write_s),
    }


def pieces(name: str, x: jax.ShapeDtypeStruct, place: NamedSharding) -> Pieces:
    """How an array of this shape is cut for the storage, and who writes and reads how much of it."""
    stored = on_disk.layouts({name: x}, {name: place})[name].sharding
    local, itemsize = stored.shard_shape(x.shape), x.dtype.itemsize
    owners = defaultdict(list)
    for device, index in stored.devices_indices_map(x.shape).items():
        owners[str(index)].append(device)
    copies = len(next(iter(owners.values())))
    shared = next((dim for dim, size in enumerate(local) if size % copies == 0), None)
    part = math.prod(local) * itemsize
    written, read = Counter(), Counter()
    for devices in owners.values():
        for device in devices if shared is not None else devices[:1]:
            written[device] += part // copies if shared is not None else part
        for host in {device.process_index for device in devices}:
            read[host] += part
    one = tuple(size // copies if dim == shared else size for dim, size in enumerate(local))
    asked = on_disk.chunk_args(name, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stored))
    chunk = choose_chunk_shape(
        x.shape, one, np.dtype(x.dtype), asked.chunk_byte_size, shard_axes=asked.shard_axes
    )
    chunks = math.prod(size // of for size, of in zip(x.shape, chunk, strict=True))
    return Pieces(chunks, dict(written), dict(read))


def _by_stage(
    config: ConfigDict, stages: dict[str, dict[str, Any]], waits_s: float, write_s: float
) -> dict[str, dict[str, Any]]:
    found, first = {}, 1
    for stage in config.stages:
        steps, step_s = stage.steps_per_chunk * stage.chunks, stages[stage.name]["step_seconds"]
        saved = save_steps(first, stage.steps_per_chunk, stage.chunks, config.checkpoint.every_steps)
        found[stage.name] = {"saves": len(saved), "interval_seconds": None, "share": None}
        if step_s:
            # A save waits for the one before it.
            gaps = [(step - before) * step_s for before, step in pairwise(saved)]
            waits = len(saved) * waits_s + sum(max(0.0, waits_s + write_s - gap) for gap in gaps)
            every, share = steps * step_s / len(saved), waits / (steps * step_s + waits)
            found[stage.name] |= {"interval_seconds": every, "share": share}
        first += steps
    return found


def save_steps(first: int, steps_per_chunk: int, chunks: int, every: int) -> list[int]:
    """Of a stage that begins with step `first`: the last of each chunk, and all multiples of `every`."""
    last = first + steps_per_chunk * chunks - 1
    between = range(-(-first // every) * every, last + 1, every) if every else ()
    return sorted({*range(first + steps_per_chunk - 1, last + 1, steps_per_chunk), *between})


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A `cost` as labels and texts."""

    def gb(size: float) -> str:
        return f"{size / 1e9:,.1f} GB"

    lines = [
        ("state", f"{gb(found['state_bytes'])}; of {found['hosts']} host(s) one writes up to "
                  f"{gb(found['host_write_bytes'])} at a save and reads {gb(found['host_read_bytes'])} at a restore"),
        ("on disk", f"{found['chunks']:,} chunks of {found['chunk_bytes'] / 1e6:,.2f} MB on average, in at least "
                    f"{found['data_files']:,} data files"),
        ("storage", f"writing {found['write_seconds']:,.1f} s, restoring {found['restore_seconds']:,.1f} s at "
                    f"{gb(found['storage_bytes_per_s'])}/s, {gb(found['storage_host_bytes_per_s'])}/s a host "
                    f"(assumed)"),
        ("training waits", f"{found['stall_seconds']:.2f} s a save at least, for the copy to the host's memory"),
    ]  # fmt: skip
    for name, stage in found["stages"].items():
        if stage["interval_seconds"]:
            every = stage["interval_seconds"] / 60
            share = f"{stage['share']:.2%} of the time"
            lines.append((name, f"{stage['saves']:,} saves, one every {every:.1f} min: {share}"))
    return lines
