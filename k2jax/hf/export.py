"""A checkpoint to a folder in Hugging Face's format, with its certificate (parity.json).

The folder is written beside its place and renamed when everything is on the disk and the certificate's logits agree.
"""

import glob
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2jax import __version__, files, upload
from k2jax.bucket import BucketPath
from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError, NumericsError, StorageError
from k2jax.hf import card, certificate, side_files
from k2jax.hf.families import config_from_hf, config_to_hf
from k2jax.hf.layout import tensors
from k2jax.hf.safetensors_io import CODES, DTYPES, INDEX, Entry, ShardWriter, index_json, plan_shards
from k2jax.hf.stream import Converted, stream
from k2jax.run.saved import SavedStep, check_tokenizer

CERTIFICATE = "parity.json"
# Of the checkpoint's meta, what the certificate repeats; a run that was imported has not all of it.
RECORDED = ("parent", "tokens_seen", "config_digest", "manifest_digest", "tokenizer_sha256", "commit", "versions")
# Keys of the model section that config.json does not hold.
NOT_INFERENCE = ("remat", "rings", "unroll", "attention", "pipeline", "mask_documents", "width_base")


class Exported(NamedTuple):
    """What `export` did."""

    parity: dict[str, Any]  # the certificate
    weights_s: float  # until all weights were on the disk; the logits come after that


def export(
    saved: SavedStep, out: Path | BucketPath, dtype: str, shard_bytes: int, progress: Callable[[int], None]
) -> Exported:
    """Writes the folder `out`. `progress` is told of each piece's bytes.

    Raises ConfigError when `out` is not empty or the tokenizer is not the run's, StorageError when the checkpoint is
    damaged or the folder cannot be written, NumericsError when a weight is not finite or the logits do not agree. In
    every case nothing is left of the folder.
    """
    m = saved.config.model
    texts = small_files(saved, dtype)
    shards = plan_shards([Entry(t.name, dtype, t.shape) for t in tensors(m)], shard_bytes)
    if len(shards) > 1:
        texts[INDEX] = as_json(index_json(shards))
    tokens_BT = certificate.probe_tokens(m, saved.stage.sequence_length)
    sums: dict[str, TensorSums] = {}
    with new_folder(out) as folder:
        for file, data in texts.items():
            files.write_bytes(folder / file, data)
        started = time.perf_counter()
        with ShardWriter(folder, shards) as writer:
            for item in stream(saved, DTYPES[dtype]):
                add(sums, item)
                writer.write(item.data)
                progress(item.data.nbytes)
        refuse_nonfinite(saved, dtype, sums)
        weights_s = time.perf_counter() - started
        logits_BTV = certificate.checkpoint_logits(saved, DTYPES[dtype], tokens_BT)
        comparison = certificate.compare_logits(folder, tokens_BT, logits_BTV)
        parity = {
            "format": certificate.FORMAT,
            "k2jax": __version__,
            "checkpoint": lineage(saved),
            "dtype": dtype,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()},
            "tensors": {
                entry.name: {"file": file, **entry_json(entry), **sums[entry.name].json()}
                for file, shard in shards.items()
                for entry in shard
            },
            "logits": certificate.describe(tokens_BT, logits_BTV, comparison),
        }
        parity["certificate_sha256"] = sha256_json(parity)
        files.write_bytes(folder / CERTIFICATE, as_json(parity))
        files.write_text(folder / "README.md", card.model_card(saved, dtype, parity))
    return Exported(parity, weights_s)


class TensorSums:
    """What the certificate says of a tensor's values, added up over its pieces."""

    def __init__(self) -> None:
        self.sha256, self.square, self.num_nonfinite = hashlib.sha256(), 0.0, 0

    def add(self, item: Converted) -> None:
        self.sha256.update(item.data.reshape(-1).view(np.uint8))
        self.square += item.square
        self.num_nonfinite += item.num_nonfinite

    def json(self) -> dict[str, Any]:
        return {"sha256": self.sha256.hexdigest(), "norm": self.square**0.5, "nonfinite": self.num_nonfinite}


def add(sums: dict[str, TensorSums], item: Converted) -> None:
    """Adds a piece to the sums of its tensor."""
    sums.setdefault(item.piece.tensor.name, TensorSums()).add(item)


def entry_json(entry: Entry) -> dict[str, Any]:
    """Type and shape of a tensor, as a safetensors header has them."""
    return {"dtype": CODES[entry.dtype], "shape": list(entry.shape)}


def refuse_nonfinite(saved: SavedStep, dtype: str, sums: dict[str, TensorSums]) -> None:
    bad = {name: s.num_nonfinite for name, s in sums.items() if s.num_nonfinite}
    if bad:
        name, count = next(iter(bad.items()))
        raise NumericsError(
            f"checkpoint {saved.step}: {len(bad)} tensor(s) have values that are not finite as {dtype}, the first "
            f"{name} with {count:,}: export another step" + (", or as bfloat16" if dtype == "float16" else "")
        )


def lineage(saved: SavedStep) -> dict[str, Any]:
    """Which checkpoint it is, and what it records of where it came from."""
    recorded = {key: saved.meta[key] for key in RECORDED if key in saved.meta}
    imported = {} if saved.imported is None else {"imported": {**saved.imported}}
    imported.get("imported", {}).pop("side_files", None)  # which are files of the folder
    average = {} if saved.weights == "params" else {"weights": saved.weights}
    return {"name": saved.config.name, "step": saved.step, "digest": saved.digest, **average, **recorded, **imported}


# ---- the small files -------------------------------------------------------------------------------------------------


def small_files(saved: SavedStep, dtype: str) -> dict[str, bytes]:
    """{file name: bytes} of what the run determines besides the weights, and of what came with those it began with."""
    eos_id, context = saved.meta["eos_id"], saved.context
    tokenizer = check_tokenizer(saved)
    tokens, kept = card.special_tokens(tokenizer, eos_id), side_files.of_run(saved)
    kind = saved.imported["config"].get("model_type") if saved.imported else None
    ids = {"bos_id": None, "eos_id": eos_id}
    values = config_to_hf(saved.config.model, saved.stage, dtype=dtype, context=context, imported=kind, **ids)
    values |= side_files.token_ids(saved)
    check_config(values, saved)
    ours = {
        "config.json": as_json(values),
        "generation_config.json": as_json(card.generation_config(tokenizer, tokens, eos_id)),
        "tokenizer.json": saved.tokenizer.read_bytes(),
    }
    if side_files.TOKENIZER_CONFIG not in kept:  # which says of its own which tokens play which role
        ours[side_files.TOKENIZER_CONFIG] = as_json(card.tokenizer_config(tokens, context))
        ours[side_files.TOKENS_MAP] = as_json(tokens)
    return ours | {name: text.encode() for name, text in kept.items()}


def check_config(values: dict[str, Any], saved: SavedStep) -> None:
    """Reads config.json's values back: ConfigError when they do not give the model that the run has."""
    read = config_from_hf(json.loads(json.dumps(values)))
    found = {**read.model, "rope_base": read.rope_base, "context": read.context}
    expected = {**saved.config.model, "rope_base": saved.stage.rope_base, "context": saved.context}
    for key in expected.keys() - set(NOT_INFERENCE):
        off = key == "rope_scaling" and found[key].factor == expected[key].factor == 1.0
        if found[key] != expected[key] and not off:
            raise ConfigError(f"config.json says {key} = {found[key]}, the run has {expected[key]}")


def as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(out: Path | BucketPath) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, or is removed when anything fails.

    That of an `out` in a bucket is on this machine, and needs the room for all of it.
    """
    if isinstance(out, BucketPath):
        with upload.whole_folder(out, last=["config.json", CERTIFICATE]) as folder:
            yield folder
        return
    check_free(out)
    try:
        files.remove_leftovers(out.parent, glob.escape(out.name))
        with files.whole_folder(out) as folder:
            yield folder
            check_free(out)  # another conversion may have been faster
    except OSError as error:
        raise StorageError(
            f"--out={out}: cannot be written: {error.strerror}; nothing is left of it: make room or access, then "
            f"run the same command"
        ) from error


def check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out={out} is there and not empty: name a new folder, or remove it")
