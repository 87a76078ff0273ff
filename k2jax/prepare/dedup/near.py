"""Which documents share a band of MinHash hashes: datatrove's second stage, and its bytes, by sorting with numpy.

Ranges of the first hash are taken one after the other, each small enough to hold, so that memory does not depend on the
number of documents.
"""

import itertools
from pathlib import Path

import numpy as np

from k2jax.files import whole_file
from k2jax.prepare.dedup.index import PAIR, repeated, within
from k2jax.prepare.dedup.minhash import MinHash, open_signatures, signature_path

STEP = 1 << 10  # every so-manieth signature of a file is looked at to choose the ranges
HELD = 1 << 20  # signatures held at a time, and at most STEP more for each file: 113 MB with 13 hashes


def pairs_path(folder: Path, band: int, part: int) -> Path:
    """Of one part of a band."""
    return folder / f"{band:05d}_{part:02d}.dups"


def find_near(rank: int, *, signatures: Path, folder: Path, num_tasks: int, parts: int, config: MinHash) -> None:
    """Writes the pairs of documents with equal hashes in a band, of task `rank` of `bands` x `parts`.

    Raises StorageError if a signature file of the `num_tasks` is missing, short or not sorted.
    """
    band, part = divmod(rank, parts)
    bounds = _ranges([open_signatures(signatures, band, task, config) for task in range(num_tasks)])
    ours = slice(len(bounds) * part // parts, len(bounds) * (part + 1) // parts)
    with whole_file(pairs_path(folder, band, part)) as out:
        for low, high in bounds[ours]:
            records, tasks = [], []
            for task in range(num_tasks):
                file = open_signatures(signatures, band, task, config)
                records.append(within(signature_path(signatures, band, task), file, _first_hash, low, high))
                tasks.append(np.full(len(records[-1]), task, np.uint32))
            out.write(_pairs(np.concatenate(records), np.concatenate(tasks)).tobytes())


def _first_hash(records: np.ndarray) -> np.ndarray:
    return records["hashes"][..., 0]


def _ranges(files: list[np.ndarray]) -> list[tuple[int, int | None]]:
    """Ranges of the first hash with about HELD signatures each: all of those there are, low <= hash < high."""
    sample = np.sort(np.concatenate([file["hashes"][::STEP, 0] for file in files]))
    return list(itertools.pairwise([0, *np.unique(sample[HELD // STEP :: HELD // STEP]).tolist(), None]))


def _pairs(records: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Each signature that is the same as the one before it, with that one, by hashes, task and index."""
    some = repeated(records["hashes"][:, 0])
    hashes, documents, tasks = records["hashes"][some], records["document"][some], tasks[some]
    order = np.lexsort((documents, tasks, *reversed(hashes.T)))
    hashes, documents, tasks = hashes[order], documents[order], tasks[order]
    [same] = np.nonzero(np.all(hashes[1:] == hashes[:-1], axis=1))
    pairs = np.empty(len(same), PAIR)
    pairs["task"], pairs["index"] = tasks[same], documents[same]
    pairs["other_task"], pairs["other_index"] = tasks[same + 1], documents[same + 1]
    return pairs
