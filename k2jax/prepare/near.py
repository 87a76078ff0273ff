"""Which documents share a band of MinHash hashes: datatrove's second stage, and its bytes, by sorting with numpy.

Ranges of the first hash are taken one after the other, each small enough to hold, so that memory does not depend on the
number of documents.
"""

import itertools
from pathlib import Path

import numpy as np

from k2jax.errors import StorageError
from k2jax.prepare.documents import whole_file
from k2jax.prepare.index import PAIR, first_at, repeated
from k2jax.prepare.minhash import PRIME, MinHash, open_signatures, signature_path

STEP = 1 << 10  # every so-manieth signature of a file is looked at to choose the ranges
HELD = 1 << 21  # signatures held at a time, and at most STEP for each file: 240 MB with 13 hashes


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
                records.append(_within(file, low, high, signature_path(signatures, band, task)))
                tasks.append(np.full(len(records[-1]), task, np.uint32))
            out.write(_pairs(np.concatenate(records), np.concatenate(tasks)).tobytes())


def _ranges(files: list[np.ndarray]) -> list[tuple[int, int]]:
    """Ranges of the first hash with about HELD signatures each: all of those there are, low <= hash < high."""
    sample = np.sort(np.concatenate([file["hashes"][::STEP, 0] for file in files]))
    bounds = np.unique(sample[HELD // STEP :: HELD // STEP]).tolist()
    return list(itertools.pairwise([0, *bounds, PRIME]))


def _within(file: np.ndarray, low: int, high: int, path: Path) -> np.ndarray:
    """The signatures of a file whose first hash is in a range, checked."""
    start, end = (first_at(file, lambda record: record["hashes"][0], bound) for bound in (low, high))
    start, end = start if low else 0, end if high < PRIME else len(file)  # whatever is in the file is looked at
    records = np.array(file[start:end])
    first = records["hashes"][:, 0]
    if start > end or not (np.all(first[1:] >= first[:-1]) and np.all((first >= low) & (first < high))):
        raise StorageError(f"{path} is damaged, its hashes are not sorted: remove the signatures and prepare again")
    return records


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
