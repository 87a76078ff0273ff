"""Checks an export: its files against its certificate, both against the run, and the logits once more."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError, StorageError
from k2jax.hf import certificate
from k2jax.hf.export import CERTIFICATE, add, check_config, entry_json, small_files
from k2jax.hf.layout import tensors
from k2jax.hf.safetensors_io import DTYPES, INDEX, Entry, read_header, sha256_of
from k2jax.hf.stream import stream
from k2jax.run.saved import SavedStep

MAY_CHANGE = {CERTIFICATE, "README.md"}  # the model card is there to be edited


def read_certificate(folder: Path) -> dict[str, Any]:
    """parity.json, found whole; ConfigError when `folder` has none, StorageError when it is damaged."""
    path = folder / CERTIFICATE
    if not path.is_file():
        raise ConfigError(f"--out={folder}: no export of k2jax, it has no {CERTIFICATE}")
    try:
        parity = json.loads(path.read_bytes())
        recorded = parity.pop("certificate_sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: {error!r}: export again") from error
    if parity.get("format") != certificate.FORMAT:
        raise ConfigError(f"{path} has format {parity.get('format')}, this k2jax reads {certificate.FORMAT}")
    if recorded != sha256_json(parity):
        raise StorageError(f"{path} is damaged: it does not have the SHA-256 that it records: export again")
    return parity


def verify(saved: SavedStep, folder: Path, progress: Callable[[int], None]) -> certificate.Comparison:
    """Checks everything. `progress` is told of the bytes of tensors, which are read three times.

    Raises StorageError naming a file or tensor that is not what the certificate says, ConfigError when the export is
    not of this checkpoint, NumericsError when its logits are not k2jax's.
    """
    parity = read_certificate(folder)
    found = parity["checkpoint"]["digest"]
    if found != saved.digest:
        raise ConfigError(
            f"{folder} is an export of a checkpoint with digest {found[:16]}... (step {parity['checkpoint']['step']}), "
            f"step {saved.step} of {saved.workdir} has {saved.digest[:16]}..."
        )
    check_files(folder, parity)
    check_tensors(folder, parity, progress)
    check_run(saved, folder, parity)
    return check_weights(saved, folder, parity, progress)


def check_files(folder: Path, parity: dict[str, Any]) -> None:
    """Every file is there and is what the certificate says, and no other; names that begin with a dot are let be."""
    weights = {record["file"] for record in parity["tensors"].values()}
    names = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    present = {name.as_posix() for name in names if not name.parts[0].startswith(".")} - MAY_CHANGE
    expected = parity["files"].keys() | weights
    for name in sorted(present ^ expected):
        raise StorageError(f"{folder}: {name} is {'missing' if name in expected else 'not of this export'}")
    for name, recorded in parity["files"].items():
        if sha256_of(folder / name) != recorded:
            raise StorageError(f"{folder}: {name} is not the file that {CERTIFICATE} records (its SHA-256 differs)")
    if len(weights) > 1:
        files = json.loads((folder / INDEX).read_bytes())["weight_map"]
        if files != {name: record["file"] for name, record in parity["tensors"].items()}:
            raise StorageError(f"{folder}: {INDEX} does not list the tensors that {CERTIFICATE} does")


def check_tensors(folder: Path, parity: dict[str, Any], progress: Callable[[int], None]) -> None:
    """Every tensor in the files is the one of the certificate: name, type, shape, bytes."""
    recorded, found, places = parity["tensors"], {}, {}
    for file in sorted({record["file"] for record in recorded.values()}):
        try:
            header = read_header(folder / file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{folder}: {file} is damaged: {error}") from error
        for name, place in header.items():
            found[name] = {"file": file, "dtype": place["dtype"], "shape": place["shape"]}
            places[name] = (folder / file, *place["data_offsets"])
    for name in sorted(found.keys() | recorded.keys()):
        expected = recorded.get(name) and {key: recorded[name][key] for key in ("file", "dtype", "shape")}
        if found.get(name) != expected:
            raise StorageError(
                f"{folder}: tensor {name} is {found.get(name, 'missing')}, {CERTIFICATE} says {expected}"
            )
    with ThreadPoolExecutor(2) as pool:
        for name, sha256 in zip(places, pool.map(lambda place: sha256_of(*place), places.values()), strict=True):
            if sha256 != recorded[name]["sha256"]:
                raise StorageError(f"{folder}: tensor {name} has other bytes than {CERTIFICATE} records")
            progress(places[name][2] - places[name][1])


def check_run(saved: SavedStep, folder: Path, parity: dict[str, Any]) -> None:
    """The small files are those that the run gives now."""
    values = json.loads((folder / "config.json").read_bytes())
    check_config(values, saved)
    for name, data in small_files(saved, parity["dtype"]).items():
        if hashlib.sha256(data).hexdigest() != parity["files"].get(name):
            raise ConfigError(f"{folder}: {name} is not the one that step {saved.step} of {saved.workdir} gives")


def check_weights(
    saved: SavedStep, folder: Path, parity: dict[str, Any], progress: Callable[[int], None]
) -> certificate.Comparison:
    """The tensors are the checkpoint's, converted anew, and k2jax and the files compute the same logits."""
    m, recorded, sums = saved.config.model, parity["tensors"], {}
    dtype = parity["dtype"]
    for item in stream(saved, DTYPES[dtype]):
        add(sums, item)
        progress(item.data.nbytes)
    expected = {t.name: entry_json(Entry(t.name, dtype, t.shape)) | sums[t.name].json() for t in tensors(m)}
    for name in sorted(expected.keys() | recorded.keys()):
        for key in ("dtype", "shape", "sha256", "nonfinite"):
            found, wanted = (of.get(name, {}).get(key) for of in (recorded, expected))
            if found != wanted:
                raise ConfigError(
                    f"{folder}: tensor {name} is not the one that step {saved.step} of {saved.workdir} gives: "
                    f"{key} {found}, expected {wanted}"
                )
    tokens_BT = np.array(parity["logits"]["tokens"], np.int32)
    logits_BTV = certificate.checkpoint_logits(saved, DTYPES[dtype], tokens_BT)
    comparison = certificate.compare_logits(folder, tokens_BT, logits_BTV)
    progress(sum(Entry(name, dtype, tuple(r["shape"])).num_bytes for name, r in recorded.items()))
    certificate.compare_recorded(parity["logits"], logits_BTV)
    return comparison
