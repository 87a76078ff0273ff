"""Which documents share a band of MinHash hashes: digests of bands are dealt out by their range, as ids are."""

import numpy as np
import xxhash

from k2jax.errors import StorageError
from k2jax.prepare.dedup.components import add_edges
from k2jax.prepare.dedup.exact import REMOVED
from k2jax.prepare.dedup.index import Clean, nodes_of, num_documents
from k2jax.prepare.dedup.minhash import MinHash, Signer
from k2jax.prepare.dedup.streams import partition_of, repeats
from k2jax.prepare.documents import read_documents
from k2jax.prepare.made import remedy
from k2jax.prepare.shuffle import Shuffle, Writer

# 128 bits of XXH3 stand for the hashes of a band, which take 104 bytes where there are 13. TxT360's 3.8e11 bands are
# 7e22 pairs: a chance of 2e-16 that two different ones anywhere have the same digest.
BAND = np.dtype([("high", "<u8"), ("low", "<u8"), ("node", "<u8")])
HELD = 1 << 14  # signatures that are held


def sign(
    rank: int, *, clean: Clean, removed: Shuffle | None, bands: Shuffle, config: MinHash, exempt: frozenset[str]
) -> None:
    """A task of the clean documents: the bands (BAND) of those that are not `removed` as exact copies.

    Subsets that are `exempt` have none: their documents are nearly the same as no other.
    """
    with bands.writer(rank) as out:
        if clean.subsets[clean.subsets_of(rank)].name not in exempt:
            gone = np.sort(removed.read_records(rank, REMOVED)) if removed else np.empty(0, REMOVED)
            _sign(rank, gone, out, clean=clean, bands=bands, config=config)


def _sign(rank: int, removed: np.ndarray, out: Writer, *, clean: Clean, bands: Shuffle, config: MinHash) -> None:
    path = clean.folder / "documents" / f"{rank:05d}.jsonl.zst"
    signer, gone = Signer(config), iter(removed)
    skip, seen = next(gone, None), 0
    indices: list[int] = []
    digests: list[bytes] = []

    def flush() -> None:
        records = np.empty(len(digests), BAND)
        records["high"], records["low"] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).T
        records["node"] = np.repeat(nodes_of(rank, np.array(indices, np.uint32)), config.bands)
        out.add_records(partition_of(records["high"], bands.partitions), records)
        indices.clear()
        digests.clear()

    for seen, document in enumerate(read_documents(path), 1):
        if seen - 1 == skip:
            skip = next(gone, None)
        elif (signature := signer.sign(document.text)) is not None:
            indices.append(seen - 1)
            digests += band_digests(signature, config)
        if len(indices) == HELD:
            flush()
    flush()
    if seen != (expected := num_documents(clean, rank)):
        raise StorageError(f"{path} has {seen} documents, its index {expected}: {remedy(path)}")


def band_digests(signature: np.ndarray, config: MinHash) -> list[bytes]:
    """Of each band of a signature; equal hashes in different bands are different."""
    data, size = signature.astype("<u8").tobytes(), 8 * config.hashes_per_band
    return [xxhash.xxh3_128_digest(data[band * size : (band + 1) * size], seed=band) for band in range(config.bands)]


def find_near(partition: int, *, bands: Shuffle, edges: Shuffle, first_writer: int) -> None:
    """A task: edges between the documents that have a band of the partition in common."""
    with edges.writer(first_writer + partition) as out:
        for later, first in repeats(bands, partition, BAND, by=["node"]):
            add_edges(out, edges, later["node"], first["node"])
