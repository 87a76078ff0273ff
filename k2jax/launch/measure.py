"""What preflight measures on one host: versions, disk, memory, loader, devices. Raises a RunError for what fails."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import k2jax
from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.data.loader import make_loader
from k2jax.data.manifest import manifest_digest
from k2jax.data.order import Order
from k2jax.errors import StorageError
from k2jax.run import drift
from k2jax.run.commit import git_commit
from k2jax.run.directory import versions
from k2jax.training.setup import open_data

PACKAGE = Path(k2jax.__file__).parent
REDUCED = 1024  # integers that each device contributes
CHUNK = 2**22  # bytes, of a read
ENDLESS = 1 << 62  # bytes: what is free in a bucket


def what_runs(config: ConfigDict, settings: str) -> dict[str, str]:
    """What must be the same everywhere; `settings` is the digest of all keys of the configuration."""
    lock = PACKAGE.parent / "requirements.lock"
    return {
        **versions(),
        "commit": git_commit() or "no checkout",
        "code": code_digest(),
        "requirements.lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "not there",
        "configuration": drift.config_digest(config),
        "all keys of the configuration": settings,
    }


def code_digest() -> str:
    """SHA-256 over the names and contents of this package's files, and of the kernels', in a checkout or installed."""
    digest, inside = hashlib.sha256(), PACKAGE / "kernels"
    kernels = inside if inside.is_dir() else PACKAGE.parent / "kernels"
    for name, folder in (("k2jax", PACKAGE), ("kernels", kernels)):
        for path in sorted(folder.rglob("*.py")):
            if name == "kernels" or inside not in path.parents:
                digest.update(f"{name}/{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def disk(workdir: Path | BucketPath, size: int, index: int) -> dict[str, float]:
    """Free bytes, and bytes a second of writing to the disk and of reading from it, by a file of `size` bytes."""
    path = workdir / f"preflight-speed-{index}"
    data = np.random.default_rng(index).integers(0, 256, size, np.uint8).tobytes()
    in_bucket = isinstance(workdir, BucketPath)
    try:
        started = time.perf_counter()
        files.write_bytes(path, data)
        write_s = time.perf_counter() - started
        with path.open("rb", **{} if in_bucket else {"buffering": 0}) as file:
            if hasattr(os, "posix_fadvise") and not in_bucket:
                os.posix_fadvise(
                    file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
                )  # else it is the memory that is read
            started = time.perf_counter()
            read = b"".join(iter(lambda: file.read(CHUNK), b""))
            read_s = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    if read != data:
        raise StorageError(
            f"{path}: what was read is not what was written: this storage loses data, use another"
        )
    found = None if in_bucket else os.statvfs(workdir)
    return {
        "free_bytes": found.f_bavail * found.f_frsize if found else ENDLESS,
        "write_bytes_per_s": size / write_s,
        "read_bytes_per_s": size / read_s,
    }


def host_memory() -> int:
    """Bytes that processes of this host, or of this container, may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def loader(config: ConfigDict, index: int, count: int, seconds: float) -> dict[str, Any]:
    """Tokens a second that this process's part of the first stage is read with, and which data that is."""
    stores, manifest = open_data(config, "no" if index else "sizes")  # one lists files for all; bytes are the trainer's
    order, stage = Order(manifest, []), config.stages[0]
    rows = np.arange(index, stage.rows_per_step, count)
    batches = make_loader(
        order, stores, label_shift=config.data.label_shift, first_step=1, last_step=order.stages[0].last_step,
        local_rows=rows, threads=config.data.threads, workers=config.data.workers, prefetch=config.data.prefetch,
    )  # fmt: skip
    steps, started, elapsed = 0, 0.0, 0.0
    try:
        for step, _ in batches:
            if step == 1:  # what was read ahead by then is counted with it
                started = time.perf_counter()
                continue
            steps, elapsed = steps + 1, time.perf_counter() - started
            if elapsed > seconds:
                break
    finally:
        batches.close()
    tokens = len(rows) * stage.sequence_length
    rate = steps * tokens / elapsed if steps else None  # one step is no measurement
    return {"data": manifest_digest(manifest), "tokens_per_s": rate, "tokens_a_step": tokens}


def reduce_over_devices() -> dict[str, Any]:
    """Whether the sum of known integers, others from each device, is right, and whose arrive wrong. All processes."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    number = mesh.devices.size
    expected = (np.arange(number)[:, None] + 1) * 1009 + np.arange(REDUCED)[None, :] * 7
    expected = expected.astype(np.int32)  # sums that overflow wrap alike
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("all"))
    parts = jax.make_array_from_callback(expected.shape, split, lambda index: expected[index])
    add = jax.jit(lambda x: x.sum(0, dtype=np.int32), out_shardings=everywhere)
    collect = jax.jit(lambda x: x, out_shardings=everywhere)
    total = np.asarray(add(parts).addressable_data(0))
    rows = np.asarray(collect(parts).addressable_data(0))
    started = time.perf_counter()
    jax.block_until_ready(add(parts))
    return {
        "sum_is_right": bool((total == expected.sum(0, dtype=np.int32)).all()),
        "wrong_devices": np.flatnonzero((rows != expected).any(1)).tolist(),
        "seconds": time.perf_counter() - started,
    }
